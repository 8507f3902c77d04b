"""A mix of adapters, added into a plain model's weights once and for all."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ...models.adapters import has_adapter
from ...models.hf import underlying


@torch.no_grad()
def merged(base: Any, adapted: Any, weights: Mapping[str, float]) -> Any:
    """A copy of `base` whose weights are ``W + sum_k weights[k] * delta_k``.

    Sums are in float32 whatever the dtype, and are rounded once. A weight that several layers share
    (an output head that is tied to the embeddings) is copied for a layer that has a delta: the
    others keep what they have, as with adapters.

    Args:
        base: a plain model.
        adapted: the PEFT model around a copy of it, with the adapters.

    Raises:
        NotImplementedError: an adapter has a bias of its own for a layer that has none.
    """
    model = copy.deepcopy(base)
    shared = {id(p) for p in _shared(model)}
    for name, layer in underlying(adapted).named_modules():
        if not hasattr(layer, "_active_adapter"):
            continue
        here = {n: w for n, w in weights.items() if w != 0 and has_adapter(layer, n)}
        if not here:
            continue
        target: Any = model.get_submodule(name)
        if id(target.weight) in shared:
            requires = target.weight.requires_grad
            target.weight = nn.Parameter(target.weight.detach().clone(), requires_grad=requires)
            model.config.tie_word_embeddings = False
            model.all_tied_weights_keys = {}
        total = target.weight.float()
        for n, w in here.items():
            total = total + w * layer.get_delta_weight(n).float()
        target.weight.copy_(total)
        for n, w in here.items():
            if not layer.lora_bias.get(n):
                continue
            if target.bias is None:
                raise NotImplementedError(
                    f"{n!r} has a bias for {name}, which has none; merged needs lora_bias=False"
                )
            target.bias.add_(w * layer.scaling[n] * layer.lora_B[n].bias)
    model.config._name_or_path = ""  # It is not the model that was loaded from there any more.
    return model


def _shared(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that several modules have."""
    seen: set[int] = set()
    found = []
    for module in model.modules():
        for p in module._parameters.values():
            if p is not None:
                if id(p) in seen:
                    found.append(p)
                seen.add(id(p))
    return found
