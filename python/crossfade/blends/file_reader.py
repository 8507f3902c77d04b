"""Reads a blend from a JSON file, and loads the models that the file names."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import reading
from ..checks import did_you_mean
from ..models import saved, saved_value_heads, sources, with_adapters
from ..models.hf import check_dtype
from ..models.sources import Source
from .file_format import AUTO, DTYPES, Member, check


def is_file(blend: str) -> bool:
    """Whether the text of an option is a file of a saved blend, not a formula."""
    return blend.strip().endswith(".json")


def described(path: str | os.PathLike[str]) -> tuple[Path, dict[str, Any], dict[str, Any]]:
    """A file, what it holds, and the part of it that `Blend.to_dict` gave. Nothing is loaded."""
    file = saved.expanded(path)
    whole = reading.parse_json(reading.read_text(file), str(file))
    return file, whole, check(whole, str(file))


def read(
    path: str | os.PathLike[str],
    given: Mapping[str, Any] | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[dict[str, Any], list[Member]]:
    """What `Blend.to_dict` gave, and the members with their models, which are loaded.

    Args:
        given: loaded models, by the keys of the file's ``models``: bare, or with a tokenizer as a
            `Model` or a `ValueHead`.
    """
    if given is not None and not isinstance(given, Mapping):
        raise TypeError(
            f"models is a {type(given).__name__}; it must be a mapping, such as {{'base': model}}"
        )
    if dtype is not None:
        check_dtype(dtype)
    file, whole, d = described(path)
    given = dict(given or {})
    for key in given:
        known = sorted({*whole["models"], *(v["name"] for v in d["values"])})
        if key not in known:
            raise ValueError(
                f"models has {key!r}; it must have names of models and values of {file}, {known}"
                f"{did_you_mean(key, known)}"
            )
    return d, _Loader(file, whole, given, device, dtype).members()


class _Loader:
    """Loads the models that a file names."""

    def __init__(
        self,
        file: Path,
        whole: dict[str, Any],
        given: Mapping[str, Any],
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        self.file, self.whole, self.given = file, whole, given
        self.device, self.dtype = device, dtype
        self.models: dict[str, Any] = {}
        self.tokenizers: dict[str, Any] = {}
        self.folders: dict[str, Path] = {}

    def members(self) -> list[Member]:
        for key, entry in self.whole["models"].items():
            self._load(key, entry)
        terms, values = self.whole["terms"], self.whole["values"]
        # A value head is put over the model before PEFT changes the model's layers for adapters.
        heads = [Member(v["name"], self._value(v), self._tokenizer(v), True) for v in values]
        for key, entry in self.whole["models"].items():
            if entry["adapters"] and key not in self.given:
                folders = {
                    name: self._folder(f"{key}@{name}", source)
                    for name, source in entry["adapters"].items()
                }
                self.models[key] = with_adapters(self.models[key], folders)
        return [
            Member(t["name"], self.models[t["model"]], self._tokenizer(t)) for t in terms
        ] + heads

    def _load(self, key: str, entry: dict[str, Any]) -> None:
        if key in self.given:
            self.models[key] = _bare(self.given[key])
            return
        if entry["source"] is None:
            raise ValueError(
                f"{self.file} names no source of the model {key!r}, a {entry['class']}; pass "
                f"models={{{key!r}: ...}}"
            )
        folder = self.folders[key] = self._folder(key, entry["source"])
        try:
            saved_as = DTYPES.get(entry["dtype"], AUTO)
            model = saved.load_model(folder, saved_as if self.dtype is None else self.dtype)
        except (OSError, ValueError) as error:
            raise type(error)(f"the model {key!r} of {self.file}: {error}") from error
        if type(model).__name__ != entry["class"]:
            raise ValueError(
                f"the model {key!r} of {self.file} is a {type(model).__name__} in {str(folder)!r}; "
                f"it must be a {entry['class']}, as when the blend was saved"
            )
        self.models[key] = model if self.device is None else model.to(self.device)

    def _value(self, entry: dict[str, Any]) -> Any:
        if entry["name"] in self.given:
            return _bare(self.given[entry["name"]])
        base = self.models[entry["model"]]
        if entry["head"] is None:
            return base
        folder = self._folder(entry["name"], entry["head"])
        dtype = DTYPES[entry["head_dtype"]]
        return saved_value_heads.load_value_head(folder, base, dtype=dtype)

    def _tokenizer(self, entry: dict[str, Any]) -> Any:
        key, source = entry["model"], entry["tokenizer"]
        brought = self.given.get(entry["name"], self.given.get(key))
        given = None if isinstance(brought, nn.Module) else getattr(brought, "tokenizer", None)
        if source is None or given is not None:
            return given
        if source is True and key not in self.folders:
            source = self.whole["models"][key]["source"]
            if source is None:
                raise ValueError(
                    f"models[{key!r}] has no tokenizer, and {self.file} names none; it must be a "
                    "crossfade.Model(..., tokenizer=...)"
                )
        folder = self.folders[key] if source is True else self._folder(key, source)
        at = str(folder)
        if at not in self.tokenizers:
            self.tokenizers[at] = saved.load_tokenizer(folder)
        return self.tokenizers[at]

    def _folder(self, key: str, source: Source) -> Path:
        try:
            return sources.folder_of(source, self.file.parent)
        except OSError as error:
            raise type(error)(
                f"{key!r} of {self.file}: {error}; pass models={{{key.partition('@')[0]!r}: ...}} "
                "for a model that is elsewhere"
            ) from error


def _bare(given: Any) -> Any:
    """The model that the caller brings, which may be in a term with a tokenizer."""
    return getattr(given, "model", given) if not isinstance(given, nn.Module) else given
