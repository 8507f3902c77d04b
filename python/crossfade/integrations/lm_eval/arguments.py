"""The harness's ``--model_args``: a blend by paths and a formula, and settings."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import Any

import torch

from ...blends.file_reader import is_file
from ...checks import did_you_mean
from ...loading import Plan

log = logging.getLogger("lm_eval.crossfade")

LOADING = ("blend", "system", "dtype", "device")
SETTINGS = (
    *("batch_size", "max_batch_size", "max_length", "max_gen_toks", "add_bos_token"),
    *("prefix_token_id", "chat_template_args", "think_end_token", "seed"),
)


def from_names(given: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `CrossfadeLM`, its blend loaded, of those that the harness has.

    Raises:
        TypeError, ValueError: names the argument, what it was and what it must be.
    """
    settings = {name: given[name] for name in SETTINGS if name in given}
    names = {n: x for n, x in given.items() if n not in (*SETTINGS, *LOADING)}
    paths = {n: x for n, x in names.items() if isinstance(x, str)}
    faders = {n: x for n, x in names.items() if n not in paths}
    for name, x in faders.items():
        used = re.search(rf"\b{re.escape(name)}\b", str(given.get("blend", "")))
        if isinstance(x, bool) or not isinstance(x, (int, float)) or not used:
            raise TypeError(
                f"model_args has {name}={x!r}; a name other than "
                f"{', '.join((*LOADING, *SETTINGS))} is a model's, and must be its path, or a "
                f"fader's in blend, and must be a number{did_you_mean(name, (*LOADING, *SETTINGS))}"
            )
    if not paths and not is_file(str(given.get("blend", ""))):
        raise ValueError(
            "model_args has no model; they must have NAME=PATH, once for each model, and with "
            'several models blend=FORMULA, such as base=PATH,tuned=PATH,blend="base + 0.8 * '
            '(tuned - base)", or blend=FILE.json with a saved blend'
        )
    system = given.get("system") or {}
    if not isinstance(system, Mapping):
        raise TypeError(f"system is {system!r:.80}; it must be a mapping of names to prompts")
    plan = Plan.read(
        [f"{name}={path}" for name, path in paths.items()],
        given.get("blend"),
        system=[f"{name}={text}" for name, text in system.items()],
        fader=[f"{name}={x}" for name, x in faders.items()],
    )
    plan.check()
    loaded = plan.load(_device(given.get("device")), given.get("dtype", "auto"))
    return {"blend": loaded.blend(), **settings}


def _device(given: str | None) -> str:
    """Where models go. The harness says "cuda:0" where its user says nothing."""
    if given is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    if given.startswith("cuda") and not torch.cuda.is_available():
        log.warning("There is no GPU for device %s: models go to the CPU.", given)
        return "cpu"
    return given


def rows_at_a_time(batch_size: int | str, most: int | None) -> int | None:
    """How many rows share a forward, at most; None: as many as memory is meant for."""
    text = str(batch_size)
    if text.split(":")[0] == "auto":
        return most
    if isinstance(batch_size, bool) or not text.isdecimal() or int(text) < 1:
        raise ValueError(f'batch_size is {batch_size!r}; it must be an int from 1 on, or "auto"')
    return int(text)
