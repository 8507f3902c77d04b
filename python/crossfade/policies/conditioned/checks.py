"""Which adapters may be the deltas of a policy: of one base, within its scope, with plain names."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from ...blends.terms import source_name
from ...checks import did_you_mean, warn
from ...models.adapters import adapter_configs, adapter_layers, has_adapter
from ...models.hf import check_language_model, check_tokenizer, is_peft, underlying
from ...models.saved import expanded, read_object
from ...models.saved_adapters import ADAPTER, ADAPTER_CONFIG, check_adapter_folder
from .fresh import scope_modules
from .preferences import KL

PART = "shared"  # the name of the adapter that all weightings have in common
TAKEN = (PART, "default", KL)  # PEFT puts an adapter "default" into the folder itself
NAME = re.compile(r"[A-Za-z0-9_-]+")
PathLike = str | os.PathLike[str]


def check_choice(name: str, x: Any, known: tuple[str, ...]) -> None:
    if x not in known:
        says = did_you_mean(x, known)
        raise ValueError(f"{name} is {x!r}; it must be one of {', '.join(map(repr, known))}{says}")


def check_base(base: Any, tokenizer: Any) -> None:
    check_language_model(base, head=True)
    check_tokenizer(tokenizer)
    if is_peft(base) or adapter_configs(base):
        raise TypeError(
            f"base is a {type(base).__name__} with PEFT adapters; it must be a plain model, which "
            "adapters are put on here"
        )


def check_name(name: Any, where: str = "adapters") -> None:
    if not isinstance(name, str) or not NAME.fullmatch(name) or name in TAKEN:
        raise ValueError(
            f"{where} has {name!r}; the name of a reward must be of letters, digits, '_' and '-', "
            f"and none of {list(TAKEN)}"
        )
    if hasattr(nn.ModuleDict, name):
        raise ValueError(
            f"{where} has {name!r}, an attribute of torch's modules, which PEFT keeps adapters in; "
            "a reward must have another name"
        )


def check_not_of_base(base: Any, names: Collection[str], where: str) -> None:
    """Refuse names by which PEFT could not tell an adapter's weights from the model's when it loads
    them."""
    parts = {part for name in base.state_dict() for part in name.split(".")}
    for name in names:
        if name in parts or name in ("base_layer", "base_model") or name.startswith("lora"):
            raise ValueError(
                f"{where} has {name!r}, a part of the names of the model's or of PEFT's weights; a "
                "reward must have another name"
            )


def folders_of(adapters: Any, shared: PathLike | None) -> dict[str, PathLike]:
    """The folders of all adapters by name, of which each has an adapter that can be loaded."""
    if not isinstance(adapters, Mapping):
        raise TypeError(
            f"adapters is a {type(adapters).__name__}; it must be a dict with the folder of each "
            "reward's adapter"
        )
    if not adapters:
        raise ValueError("adapters is empty; it must have an adapter for each reward")
    for name, folder in adapters.items():
        check_name(name)
        check_adapter_folder(folder, f"adapters[{name!r}]")
    found = dict(adapters)
    if shared is not None:
        check_adapter_folder(shared, "shared")
        found[PART] = shared
    return found


def check_one_base(base: Any, folders: Mapping[str, PathLike]) -> None:
    """Refuse adapters that say that they are of different bases, as far as their names tell."""
    names = {}
    for adapter, folder in folders.items():
        config = read_object(expanded(folder) / ADAPTER_CONFIG)
        said = config.get("base_model_name_or_path")
        if isinstance(said, str) and source_name(said):
            names[adapter] = said
    for adapter, said in names.items():
        first, of_first = next(iter(names.items()))
        if not _same_name(said, of_first):
            raise ValueError(
                f"adapters are of different bases: {first!r} of {of_first!r} and {adapter!r} of "
                f"{said!r}; they must be of one. If these are one model, say so in "
                f"base_model_name_or_path of the {ADAPTER_CONFIG}"
            )
    own, theirs = (
        str(getattr(base.config, "name_or_path", "") or ""),
        next(iter(names.values()), ""),
    )
    if source_name(own) and theirs and not _same_name(own, theirs):
        warn(
            f"base was loaded from {own!r}, and the adapters say that they are of {theirs!r}; "
            "deltas mean nothing on another base, so these must be one model"
        )


def _same_name(one: str, other: str) -> bool:
    """Whether two paths or ids name one model, as far as their last parts tell."""
    return source_name(one).casefold() == source_name(other).casefold()


def check_weights_beside(base: Any, name: str, folder: PathLike) -> None:
    """Refuse weights of the base beside an adapter that are not the base's own.

    PEFT stores the head and the embeddings beside an adapter of them, and would load them into the
    base.
    """
    own = base.state_dict()
    with safe_open(expanded(folder) / ADAPTER, "pt") as file:
        for key in file.keys():  # noqa: SIM118  (it is no mapping)
            place = key.removeprefix("base_model.model.").replace(".base_layer.", ".")
            if place not in own:
                continue
            theirs, weight = file.get_tensor(key), own[place]
            if theirs.shape != weight.shape or not torch.equal(theirs.to(weight), weight):
                raise ValueError(
                    f"{name} is {str(folder)!r}, which has weights for "
                    f"{key.removeprefix('base_model.model.')}, which base has otherwise; it must "
                    "be an adapter of this base"
                )


def check_scope(model: Any, name: str, scope: str) -> None:
    """Refuse an adapter with layers outside of what its policy conditions."""
    bare: Any = underlying(model)
    inside = scope_modules(bare, scope)
    places = {id(m): place for place, m in bare.named_modules()}
    for layer in adapter_layers(bare):
        if has_adapter(layer, name) and id(layer) not in inside:
            raise ValueError(
                f"adapters[{name!r}] changes {places[id(layer)]}, and scope is {scope!r}; an "
                "adapter must be within it, or scope must be 'full'"
            )
