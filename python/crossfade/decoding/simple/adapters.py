"""Which of a PEFT model's adapters a term applies. They are switched on in a `Replica` of it.

A mix of adapters is applied by PEFT's own layers, whose scalings are multiplied by its weights:
those of each row of the next forward, which `MixedRows` is told before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from ...blends.mixes import Mix
from ...models.adapters import adapter_layers, check_adapter, check_mix, has_adapter
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


class MixedRows:
    """The layers of a replica that have a mix of adapters, and its weights in the next forward.

    Args:
        model: the model that the replica is of.
        names: of the adapters.
    """

    def __init__(self, model: nn.Module, replica: Replica, names: Sequence[str], term: str) -> None:
        self.names = names
        self.rows: list[int] = [1]  # how many rows the next forward has; 1: they are all alike
        # Layers whose adapters have equal scalings, on one device: the scalings of their copies.
        self.layers: dict[Any, list[dict[str, Any]]] = {}
        check = _row_check(self.rows, term)
        for name, layer in model.named_modules():
            if not hasattr(layer, "_active_adapter"):
                continue
            twin = replica[layer]
            here = [n for n in names if has_adapter(layer, n)]
            twin._active_adapter, twin._disable_adapters = here, False
            if not here:
                continue
            scaling = dict(layer.scaling)
            twin.scaling = scaling
            device = next(layer.parameters()).device
            key = device, tuple((n, layer.scaling[n]) for n in here)
            self.layers.setdefault(key, []).append(scaling)
            twin.register_forward_pre_hook(check(name))

    def seat(self, weights: Tensor) -> None:
        """Set the weights ``[B, adapters]`` of the rows of the next forward."""
        alike = bool((weights == weights[:1]).all())
        self.rows[0] = 1 if alike else len(weights)
        columns = dict(zip(self.names, weights.unbind(1), strict=True))
        for (device, scalings), layers in self.layers.items():
            now = {
                n: scaling
                * (float(columns[n][0]) if alike else columns[n].to(device)[:, None, None])
                for n, scaling in scalings
            }
            for layer in layers:
                layer.update(now)


def _row_check(rows: Sequence[int], term: str) -> Any:
    """Makes hooks that refuse a layer's input which is not ``[rows, tokens, width]``.

    An embedding's is ``[rows, tokens]``.
    """

    def of_layer(name: str) -> Any:
        def check(layer: Any, inputs: tuple[Any, ...]) -> None:
            shape = inputs[0].shape
            dims = 2 if layer.lora_embedding_A else 3
            if rows[0] > 1 and (len(shape) != dims or shape[0] != rows[0]):
                raise NotImplementedError(
                    f"adapter of {term} is a mix that differs between requests, and its layer "
                    f"{name} does not tell the requests of a batch apart; decode those of each mix "
                    "by themselves"
                )

        return check

    return of_layer


def adapter_states(model: nn.Module, adapter: str | Mix | None, term: str) -> list[AdapterState]:
    """How the layers of `model` must be set to apply `adapter`; for "active" they stay as they are.

    Those of a mix are set by `MixedRows`.

    PEFT's own switches also change `requires_grad`, which would surprise a training run, and walk
    the whole model. So the two fields of each layer are set directly.

    Raises:
        ValueError: the model lacks the adapter or, for None, no longer has its plain base; or a
            layer has an adapter merged into the base's weights.
        NotImplementedError: as `check_adapter`, or as `check_mix`.
    """
    if isinstance(adapter, Mix):
        check_mix(model, adapter.names, term)
    else:
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
        if isinstance(adapter, Mix):
            continue
        if adapter is None:
            result.append(AdapterState(layer, layer._active_adapter, True))
        else:
            result.append(
                AdapterState(layer, [adapter] if has_adapter(layer, adapter) else [], False)
            )
    return result
