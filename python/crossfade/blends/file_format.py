"""The JSON files of `Blend.save`: their keys, and the check of a file before anything is loaded.

A file holds what `Blend.to_dict` gives and a `format`. Each term and value also names one of the
file's ``models`` and its tokenizer: true for the one in the model's folder, null for none, or
another source. A value also has the source of its head over that model, if it has one. Each of the
``models`` has a source, as `crossfade.models.sources` describes them, or null where the caller must
bring the model; the name of its class; its dtype; and the sources of its adapters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..models import GUIDES, SMALL_MODEL, value_heads
from ..models.saved import HUB_ID
from ..models.sources import KINDS
from .saving import BLEND, PARTS, TERM, VALUE, check_keys, check_saved, shown

FORMAT = 1
WRITTEN = "it must be what Blend.save writes"  # the end of errors
DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
HEAD_DTYPES = sorted(name for name, dtype in DTYPES.items() if dtype in value_heads.DTYPES)
AUTO = "auto"  # the dtype of a model whose weights have several or another: as they are saved
MODEL = {"source", "class", "dtype", "adapters"}  # the keys of a model
OF_A_TERM = {"model", "tokenizer"}  # the keys that a file adds to those of a term
OF_A_VALUE = {"model", "tokenizer", "head", "head_dtype"}  # the keys that it adds to a value's


@dataclass(frozen=True)
class Member:
    """A term or a value of a blend, with what a file names by its source."""

    name: str
    model: Any
    tokenizer: Any
    is_value: bool = False


def check(whole: Any, where: str) -> dict[str, Any]:
    """Check what a file holds; the part that `Blend.to_dict` gave.

    Raises:
        ValueError: it is no saved blend; names the key, what it was and what it must be.
    """
    if isinstance(whole, dict) and "format" in whole and whole["format"] != FORMAT:
        raise ValueError(
            f"{where} has format {shown(whole['format'])}; this version of crossfade reads {FORMAT}"
        )
    keys = BLEND | ({PARTS} & set(whole) if isinstance(whole, dict) else set())
    check_keys(where, whole, {"format", "models", *keys}, WRITTEN)
    d = {key: whole[key] for key in keys}
    for part, own, more in (("terms", TERM, OF_A_TERM), ("values", VALUE, OF_A_VALUE)):
        if isinstance(d[part], list):
            for i, member in enumerate(d[part]):
                check_keys(f"{where}[{part!r}][{i}]", member, own | more, WRITTEN)
            d[part] = [{k: x for k, x in member.items() if k in own} for member in d[part]]
    check_saved(d, where, WRITTEN)
    known = _check_models(whole["models"], f"{where}['models']")
    used = set()
    for part in ("terms", "values"):
        for i, member in enumerate(whole[part]):
            at = f"{where}[{part!r}][{i}]"
            used.add(_one_of(f"{at}['model']", member["model"], sorted(known)))
            if member["tokenizer"] not in (None, True):
                _check_source(f"{at}['tokenizer']", member["tokenizer"])
            if part == "terms":
                entry = known[member["model"]]
                names = [None, "active", *entry["adapters"]]
                if entry["source"] is not None and isinstance(member["adapter"], dict):
                    for adapter in member["adapter"]:
                        _one_of(f"{at}['adapter']", adapter, names[2:])
                elif entry["source"] is not None:
                    _one_of(f"{at}['adapter']", member["adapter"], names)
            elif member["head"] is not None:
                _check_source(f"{at}['head']", member["head"])
                _one_of(f"{at}['head_dtype']", member["head_dtype"], HEAD_DTYPES)
    for key in known:
        if key not in used:
            raise ValueError(f"{where}['models'] has {key!r}, which no term and no value names")
    return d


def _check_models(models: Any, where: str) -> dict[str, Any]:
    if not isinstance(models, dict):
        raise ValueError(f"{where} is {shown(models)}; {WRITTEN}, a dict")
    for key, entry in models.items():
        at = f"{where}[{key!r}]"
        check_keys(at, entry, MODEL, WRITTEN)
        if entry["source"] is not None:
            _check_source(f"{at}['source']", entry["source"])
        if not isinstance(entry["class"], str):
            raise ValueError(f"{at}['class'] is {shown(entry['class'])}; it must be text")
        _one_of(f"{at}['dtype']", entry["dtype"], [*sorted(DTYPES), AUTO])
        if not isinstance(entry["adapters"], dict):
            raise ValueError(f"{at}['adapters'] is {shown(entry['adapters'])}; it must be a dict")
        for name, source in entry["adapters"].items():
            _check_source(f"{at}['adapters'][{name!r}]", source)
    return models


def _check_source(where: str, source: Any) -> None:
    keys = set(source) if isinstance(source, dict) else set()
    texts = isinstance(source, dict) and all(isinstance(x, str) and x for x in source.values())
    if not texts or len(keys & set(KINDS)) != 1 or keys - {*KINDS, "revision"}:
        raise ValueError(
            f"{where} is {shown(source)}; it must have one of the keys {list(KINDS)} with "
            "a text (and 'hub' may have a 'revision')"
        )
    if "revision" in source and "hub" not in source:
        raise ValueError(f"{where} is {shown(source)}; only 'hub' may have a 'revision'")
    if "hub" in source and not HUB_ID.fullmatch(source["hub"]):
        raise ValueError(f"{where}['hub'] is {shown(source['hub'])}; it must be OWNER/NAME")
    for key, known in (("model", (SMALL_MODEL,)), ("guide", GUIDES)):
        if key in source:
            _one_of(f"{where}[{key!r}]", source[key], list(known))


def _one_of(where: str, x: Any, known: Sequence[Any]) -> Any:
    if isinstance(x, (list, dict)) or x not in known:
        raise ValueError(f"{where} is {shown(x)}; it must be one of {list(known)}")
    return x
