"""Models and blends as the command line names them: ``--model base=PATH --blend "base + ..."``."""

from __future__ import annotations

import keyword
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import torch
from torch import nn

from . import models, reading
from .blends.blend import Blend, Model, ValueHead
from .blends.values import ValueSum, formula_value
from .formula import parse
from .models import saved_adapters, saved_value_heads


@dataclass(frozen=True)
class Spec:
    """What an option ``--model`` says: ``NAME=PATH`` or ``NAME=PATH@GUIDE``.

    Attributes:
        name: the term's name in formulas.
        path: the model: a folder, an id on the Hugging Face hub, or "smollm2".
        guide: the folder of an adapter or value head over the model, or None.
    """

    name: str
    path: str
    guide: Path | None = None

    @classmethod
    def read(cls, text: str, default_name: str | None = None) -> Spec:
        """Read the text of an option. `default_name` is the name if the text has none."""
        name, equals, path = text.partition("=")
        if not equals:
            if default_name is None:
                raise ValueError(f"--model is {text!r}; it must be NAME=PATH")
            name, path = default_name, text
        if not name.isidentifier() or keyword.iskeyword(name):
            raise ValueError(f"--model is {text!r}; the name before = must be an identifier")
        path, guide = _parted(path)
        if not path or guide == "":
            raise ValueError(f"--model is {text!r}; it must be NAME=PATH or NAME=PATH@GUIDE")
        return cls(name, path, None if guide is None else _guide_folder(guide))

    @property
    def is_value_head(self) -> bool:
        return self.guide is not None and (self.guide / saved_value_heads.SETTINGS).is_file()


def _parted(path: str) -> tuple[str, str | None]:
    """The texts before and after the @ of a guide. Names of folders may contain an @ as well."""
    if "@" not in path or os.path.exists(os.path.expanduser(path)):
        return path, None
    places = [i for i, character in enumerate(path) if character == "@"]
    there = [i for i in places if os.path.exists(os.path.expanduser(path[:i]))]
    at = max(there or places)
    return path[:at], path[at + 1 :]


def _guide_folder(guide: str) -> Path:
    """The folder of a guide, which is given as a path or as the name of one that ships."""
    folder = Path(guide).expanduser()
    if guide in models.GUIDES and not folder.is_dir():
        return models.guide(guide)
    if not (folder / saved_value_heads.SETTINGS).is_file():
        if not (folder / saved_adapters.ADAPTER).is_file():
            raise FileNotFoundError(
                f"the guide is {guide!r}; it must be a folder with an {saved_adapters.ADAPTER} "
                f"(pickled weights are not loaded) or a {saved_value_heads.SETTINGS}, or one that "
                f"ships: {', '.join(models.GUIDES)}"
            )
        saved_adapters.check_adapter_folder(folder, "the guide")
    return folder


def load_blend(
    model: Sequence[str],
    blend: str | None,
    system: Sequence[str] = (),
    *,
    value: str | None = None,
    device: str = "cpu",
    dtype: str = "auto",
) -> tuple[Blend, ValueSum | None]:
    """The blend and the value that options of the command line describe.

    Terms over the same path share one model.

    Args:
        model: each ``NAME=PATH`` or ``NAME=PATH@GUIDE``, or a single ``PATH``.
        blend: a formula of these names; None if there is a single model.
        system: each ``NAME=TEXT``, the system prompt of a term.
        value: a formula of the value that searches ask, or None.
        device: where the models go.
        dtype: of the models, or "auto" for what they were saved in.

    Raises:
        ValueError: an option is malformed or does not fit the others. OSError: a model or adapter
            is not there. ImportError: names what is not installed.
    """
    if not model:
        raise ValueError("no model is given; it must be --model NAME=PATH, once for each model")
    specs = [Spec.read(text, "model" if len(model) == 1 else None) for text in model]
    names = [spec.name for spec in specs]
    repeated = next((n for n in names if names.count(n) > 1), None)
    if repeated is not None:
        raise ValueError(f"--model {repeated}=... is given twice; names must differ")
    if blend is None:
        if len(specs) > 1:
            raise ValueError(f"--blend is missing; with {len(specs)} models it must be a formula")
        blend = names[0]
    prompts = dict(_system(text, names) for text in system)
    _check_formulas({"--blend": blend, "--value": value}, specs)

    terms: dict[str, Any] = {}
    for path in dict.fromkeys(spec.path for spec in specs):
        same = [spec for spec in specs if spec.path == path]
        terms |= _terms(path, same, device, dtype)
    for name, text in prompts.items():
        if isinstance(terms[name], ValueHead):
            raise ValueError(f"--system names {name!r}, a value head; it must name a model")
        terms[name] = replace(terms[name], system=text)
    return parse(blend, **terms), None if value is None else formula_value(parse(value, **terms))


class _Unloaded(nn.Module):
    """Takes the place of a model in a formula that is checked before the model is loaded."""

    config = SimpleNamespace()

    def forward(self) -> NoReturn:
        raise NotImplementedError


def _check_formulas(formulas: dict[str, str | None], specs: Sequence[Spec]) -> None:
    """Raise errors of formulas now, before models are loaded, which may take minutes."""
    given = {option: formula for option, formula in formulas.items() if formula is not None}
    terms = {s.name: (ValueHead if s.is_value_head else Model)(_Unloaded()) for s in specs}
    for formula in given.values():
        parse(formula, **terms)
    for name in terms:
        if not any(re.search(rf"\b{name}\b", formula) for formula in given.values()):
            found = " and ".join(f"{option} {formula!r}" for option, formula in given.items())
            verb = "does" if len(given) == 1 else "do"
            raise ValueError(f"--model {name}=... is given, but {found} {verb} not use it")


def _system(text: str, names: Sequence[str]) -> tuple[str, str]:
    name, equals, prompt = text.partition("=")
    if not equals:
        raise ValueError(f"--system is {text!r}; it must be NAME=TEXT")
    if name not in names:
        raise ValueError(f"--system names {name!r}; the models are {', '.join(names)}")
    reading.check_unicode(prompt, f"--system {name}")
    return name, prompt


def _terms(path: str, specs: Sequence[Spec], device: str, dtype: str) -> dict[str, Any]:
    """All terms over one model: the model as it is, with adapters, and value heads over it."""
    loaded: Any
    loaded, tokenizer = models.load(
        models.folder_of(path), device, dtype if dtype == "auto" else getattr(torch, dtype)
    )
    terms: dict[str, Any] = {}
    heads = [spec for spec in specs if spec.is_value_head]
    for spec in heads:  # before adapters, because PEFT changes the model that it wraps
        head = saved_value_heads.load_value_head(str(spec.guide), loaded)
        terms[spec.name] = ValueHead(head, tokenizer=tokenizer)
    others = [spec for spec in specs if spec not in heads]
    adapters = {spec.name: spec.guide for spec in others if spec.guide is not None}
    if adapters:
        loaded = models.with_adapters(loaded, adapters)
    for spec in others:
        adapter = (spec.name if spec.guide else None) if adapters else "active"
        terms[spec.name] = Model(loaded, tokenizer=tokenizer, adapter=adapter)
    return terms
