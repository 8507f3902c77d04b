"""Which of a PEFT model's adapters a term applies. They are switched on in a `Replica` of it."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import nn

from ...models.adapters import adapter_layers, check_adapter, has_adapter
from .replica import Replica


class AdapterState(NamedTuple):
    """Which adapters one layer applies."""

    layer: Any
    active: Any
    disabled: bool

    def apply(self, replica: Replica) -> None:
        twin = replica[self.layer]
        twin._active_adapter = self.active
        twin._disable_adapters = self.disabled


def adapter_states(model: nn.Module, adapter: str | None, term: str) -> list[AdapterState]:
    """How the layers of `model` must be set to apply `adapter`; for "active" they stay as they are.

    PEFT's own switches also change `requires_grad`, which would surprise a training run, and walk
    the whole model. So the two fields of each layer are set directly.

    Raises:
        ValueError: the model lacks the adapter or, for None, no longer has its plain base; or a
            layer has an adapter merged into the base's weights.
        NotImplementedError: as `check_adapter`.
    """
    check_adapter(model, adapter, term)
    if adapter == "active":
        return []
    result = []
    for layer in adapter_layers(model):
        if getattr(layer, "merged", False):
            raise ValueError(
                f"adapter of {term} is {adapter!r}, but the model's adapters are merged into its "
                "weights; call unmerge_adapter() first"
            )
        if adapter is None:
            result.append(AdapterState(layer, layer._active_adapter, True))
        else:
            result.append(
                AdapterState(layer, [adapter] if has_adapter(layer, adapter) else [], False)
            )
    return result
