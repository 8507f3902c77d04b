"""New adapters for a policy that is to be trained: one a reward, where its scope is."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from ...extras import require
from ...models.value_heads import shared_copy


def with_new_adapters(base: Any, configs: Mapping[str, Any]) -> Any:
    """A `peft.PeftModel` over the base's weights with adapters that change nothing yet.

    Args:
        configs: of each adapter, by its name.
    """
    peft = require("peft", "adapters")
    (first, config), *others = configs.items()
    with warnings.catch_warnings():
        # PEFT warns that a head with an adapter must not be merged while it is tied: `merged`
        # unties it.
        warnings.filterwarnings("ignore", "Model has `tie_word_embeddings=True`")
        model = peft.get_peft_model(shared_copy(base), copy.deepcopy(config), first)
        for name, config in others:
            model.add_adapter(name, copy.deepcopy(config))
    return model


def placed(base: Any, name: str, config: Any, scope: str, *, inside: bool = True) -> Any:
    """A LoRA's config with the layers of a scope, unless it names layers itself.

    Args:
        name: what errors call the config.
        inside: whether its layers are those of the scope, or all others.

    Raises:
        TypeError: it is no `peft.LoraConfig`. NotImplementedError: it is of a kind that cannot be
            mixed.
    """
    peft = require("peft", "adapters")
    if not isinstance(config, peft.LoraConfig):
        raise TypeError(f"{name} is a {type(config).__name__}; it must be a peft.LoraConfig")
    for option in ("modules_to_save", "use_dora", "lora_bias", "trainable_token_indices"):
        if getattr(config, option, None):
            raise NotImplementedError(
                f"{name} has {option}={getattr(config, option)!r}; a policy's adapters must be "
                "plain LoRA, whose deltas can be added"
            )
    found = copy.deepcopy(config)
    found.task_type = found.task_type or "CAUSAL_LM"
    if found.target_modules is None:
        found.target_modules = _layers(base, scope, inside)
        if not found.target_modules:
            raise ValueError(
                f"{name} names no target_modules, and the {type(base).__name__} has none that the "
                f"scope {scope!r} {'names' if inside else 'leaves'}; it must name some"
            )
    return found


def scope_modules(base: Any, scope: str) -> set[int]:
    """The ids of the modules of a model that a scope takes in."""
    if scope == "head":
        return {id(base.get_output_embeddings())}
    return {
        id(m)
        for module in base.modules()
        if scope == "full" or "attention" in type(module).__name__.lower()
        for m in module.modules()
    }


def _layers(base: Any, scope: str, inside: bool) -> list[str]:
    """The last parts of the names of linear layers inside or outside of a scope."""
    here = scope_modules(base, scope)
    if scope == "full":  # as PEFT's "all-linear": the head is the reference's
        here.discard(id(base.get_output_embeddings()))
    head = base.get_output_embeddings()
    found: dict[bool, set[str]] = {True: set(), False: set()}
    for name, module in base.named_modules():
        if isinstance(module, (nn.Linear, Conv1D)) and (scope == "head" or module is not head):
            found[id(module) in here].add(name.rpartition(".")[2])
    return sorted(found[inside] - found[not inside])
