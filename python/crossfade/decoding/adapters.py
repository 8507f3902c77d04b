"""Which of a PEFT model's adapters a term applies; they are switched on in a `Replica` of it."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import nn

from .replica import Replica


class State(NamedTuple):
    """Which adapters one layer applies."""

    layer: Any
    active: Any
    disabled: bool

    def apply(self, replica: Replica) -> None:
        twin = replica[self.layer]
        twin._active_adapter = self.active
        twin._disable_adapters = self.disabled


def adapter_layers(model: nn.Module) -> list[Any]:
    """PEFT's layers in `model`: those with adapters, and the modules it trains whole."""
    return [m for m in model.modules() if hasattr(m, "_active_adapter")]


def states(model: nn.Module, adapter: str | None, term: str) -> list[State]:
    """What the layers of `model` must be set to for `adapter`; nothing for "active".

    PEFT's own switches change `requires_grad` too, and walk the whole model: too slow for every
    token and a surprise to a training run. So the layers' two fields are set directly.

    Raises:
        ValueError: a layer has the adapter merged into the base's weights, or the adapter changed
            the base's biases, so that the plain base is not there any more.
    """
    if adapter == "active":
        return []
    layers = adapter_layers(model)
    if adapter is None:
        for name, config in getattr(model, "peft_config", {}).items():
            if getattr(config, "bias", "none") != "none":
                raise ValueError(
                    f"adapter of {term} is None, but adapter {name!r} was trained with "
                    f"bias={config.bias!r} and changed the base's own biases"
                )
    result = []
    for layer in layers:
        if getattr(layer, "merged", False):
            raise ValueError(
                f"adapter of {term} is {adapter!r}, but the model's adapters are merged into its "
                "weights; call unmerge_adapter() first"
            )
        if adapter is None:
            result.append(State(layer, layer._active_adapter, True))
        else:
            # a module trained whole lists its adapters; where this one is not, it applies none
            has_it = adapter in getattr(layer, "_adapters", (adapter,))
            result.append(State(layer, [adapter] if has_it else [], False))
    return result
