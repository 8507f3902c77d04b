"""A short description of what a model computes with, which tells later whether that has changed."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor, nn

from ...models.hf import in_shards

SAMPLE = 16  # numbers of each tensor that are looked at


def fingerprint(model: nn.Module, *, active: bool) -> Hashable:
    """A description that stays equal until a model's weights, adapters or hooks change.

    A change in place raises a tensor's version. A change through ``.data``, by which PEFT merges
    adapters, does not: it shows in the few numbers of each tensor that are looked at, if all
    numbers change, and in what the layers say is merged. What a hook reads outside of the model is
    not looked at.

    Args:
        active: whether it matters which adapters the model itself has switched on.
    """
    each: list[Any] = [*model.parameters(), *model.buffers()]
    with torch.no_grad():  # Of a tensor in shards on several processes, this one's.
        tensors = [t.to_local() if in_shards(t) else t for t in each]
    about = [
        (t.data_ptr(), t.dtype, t.device, t.shape, None if t.is_inference() else t._version)
        for t in tensors
    ]
    tensors = [t.detach() for t in tensors]
    modules = [_about(m, active) for m in model.modules()]
    return model.training, tuple(about), _numbers(tensors), tuple(modules)


def _about(module: Any, active: bool) -> Hashable:
    state = vars(module)
    hooks = (*state["_forward_hooks"], *state["_forward_pre_hooks"])  # torch numbers them
    about: tuple[Hashable, ...] = (id(module), hooks, id(state.get("forward")))
    if "_active_adapter" not in state:
        return about
    merged = tuple(getattr(module, "merged_adapters", ()))
    scaling = tuple(getattr(module, "scaling", {}).items())
    on = (repr(state["_active_adapter"]), state["_disable_adapters"]) if active else ()
    return (*about, merged, scaling, on)


def _numbers(tensors: list[Tensor]) -> Hashable:
    """The bits of a few numbers of each tensor."""
    samples: dict[torch.device, list[Tensor]] = {}
    for t in tensors:
        if t.numel() and t.device.type != "meta":
            flat = t.view(-1) if t.is_contiguous() else t.reshape(-1)
            few = flat[:: max(1, len(flat) // SAMPLE)][:SAMPLE]
            samples.setdefault(t.device, []).append(few.float())
    return tuple(torch.cat(each).cpu().numpy().tobytes() for each in samples.values())
