"""Settings that a prompt has of its own, and those of all prompts as arguments of `decode`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from ..checks import check_number
from ..decoding.settings import LARGEST, SAMPLING, Sampling, check_int, check_stop_strings
from ..ops import check
from ..reading import check_unicode
from .records import seed_of

SETTINGS = ("weights", "seed", "max_new_tokens", *SAMPLING, "stop", "system")
NEUTRAL = {f.name: f.default for f in fields(Sampling)}


def check_settings(given: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of one prompt, checked, in the order of `SETTINGS`.

    ``weights`` are the positions of faders by name; ``stop`` is a text or a list of texts, and
    becomes a list; the others are as in `crossfade.generate`.

    Raises:
        TypeError, ValueError: names the setting, what it was and what it must be.
    """
    found: dict[str, Any] = {}
    for name in SETTINGS:
        if name in given:
            found[name] = check_setting(name, given[name])
    return found


def check_setting(name: str, x: Any) -> Any:
    """One setting, checked as `check_settings` does."""
    if name in SAMPLING:
        if isinstance(x, Tensor):
            raise TypeError(f"{name} is a tensor; it must be a number")
        try:
            return check.setting(name, x, 1, torch.device("cpu"))
        except TypeError as error:
            raise TypeError(str(error).removesuffix(" or a tensor")) from None
    if name == "weights":
        if not isinstance(x, Mapping):
            raise TypeError(f'weights is {x!r:.80}; it must be an object such as {{"w": 0.8}}')
        return {str(key): check_number(f"weights[{key!r}]", w) for key, w in x.items()}
    if name == "stop":
        texts = [x] if isinstance(x, str) else x
        if not isinstance(texts, list) or not texts:
            raise TypeError(f"stop is {x!r:.80}; it must be a text or a list of texts")
        try:
            check_stop_strings(texts)
        except ValueError as error:
            raise ValueError(str(error).replace("stop_strings", "stop", 1)) from None
        return texts
    if name == "system":
        if not isinstance(x, str):
            raise TypeError(f"system is {x!r:.80}; it must be a text")
        check_unicode(x, "system")
        return x
    if x is None:
        raise TypeError(f"{name} is None; it must be an int")
    if name == "seed":
        check_int(name, x, 0, 2**64 - 1)
    else:
        check_int(name, x, 1, LARGEST)
    return x


def seeds(own: Sequence[Mapping[str, Any]], seed: int) -> list[int]:
    """The seed of each prompt: its own, as it is, or one that is made of `seed` and its place."""
    return [settings.get("seed", seed_of(seed, i)) for i, settings in enumerate(own)]


def positions(
    own: Sequence[Mapping[str, Any]], faders: Mapping[str, float]
) -> dict[str, float | Tensor]:
    """The position of each fader: a number, or ``[prompts]`` where a prompt has its own.

    Args:
        own: the settings of each prompt.
        faders: the positions for prompts that do not have their own.
    """
    found: dict[str, float | Tensor] = dict(faders)
    for name in {name: None for settings in own for name in settings.get("weights", {})}:
        each = [settings.get("weights", {}).get(name, faders.get(name)) for settings in own]
        found[name] = torch.tensor(each, dtype=torch.float64)
    return found


def arguments(
    own: Sequence[Mapping[str, Any]], common: Mapping[str, Any], saved: Any
) -> dict[str, Any]:
    """`common`, the arguments of `decode` for all prompts, with what prompts have of their own.

    Where a prompt has a setting of sampling, it is drawn; whether the others are, `common` or the
    saved config says. A prompt that is not drawn has the temperature 0.

    Args:
        own: the settings of each prompt.
        saved: the generation config of the blend's first model.
    """
    found = dict(common)
    for name, argument in (("max_new_tokens", "max_new_tokens"), ("stop", "stop_strings")):
        if any(name in settings for settings in own):
            found[argument] = [settings.get(name, common.get(argument)) for settings in own]
    draws = [not settings.keys().isdisjoint(SAMPLING) for settings in own]
    if not any(draws):
        return found
    do_sample = common.get("do_sample", bool(getattr(saved, "do_sample", False)))
    default: dict[str, Any] = {}
    for name in SAMPLING:
        stated = (common.get(name), getattr(saved, name, None), NEUTRAL[name])
        default[name] = next(x for x in stated if x is not None)
    for name in SAMPLING:
        each = [settings.get(name, default[name]) for settings in own]
        if name == "temperature" and not do_sample:
            each = [x if drawn else 0.0 for x, drawn in zip(each, draws, strict=True)]
        if any(x != default[name] for x in each):
            found[name] = each
    return {**found, "do_sample": True}
