"""A term's model as a plain one, to be trained: the model itself is left alone."""

from __future__ import annotations

import copy
from typing import Any

from ..blends.blend import Model
from ..blends.mixes import Mix
from ..models.adapters import active_adapters, adapter_configs, adapter_layers
from ..models.hf import is_peft
from ..models.value_heads import shared_copy
from ..policies.conditioned.merging import merged


def plain_model(term: Model, name: str) -> Any:
    """A copy of a term's model whose modules may be changed and put elsewhere.

    Without an adapter the copy has the model's own weights, which must not be written into. An
    adapter, or a mix of them, is merged into weights of the copy's own.

    Args:
        name: what errors call the model.

    Raises:
        NotImplementedError: the model has adapters and is no `peft.PeftModel`.
        ValueError: its adapters are merged already.
    """
    model, adapter = term.model, term.adapter
    if not adapter_layers(model):
        return shared_copy(model)
    if not is_peft(model):
        raise NotImplementedError(
            f"{name} is a {type(model).__name__} with adapters inside; it must be a "
            "peft.PeftModel, such as crossfade.models.with_adapters gives"
        )
    if any(getattr(layer, "merged", False) for layer in adapter_layers(model)):
        raise ValueError(
            f"{name} has adapters that are merged into its weights; call unmerge_adapter() first"
        )
    weights: dict[str, float] = {}
    if isinstance(adapter, Mix):
        weights = {n: float(w) for n, w in zip(adapter.names, adapter.weights, strict=True)}  # type: ignore[arg-type]
    elif adapter == "active":
        weights = dict.fromkeys(sorted(active_adapters(model)), 1.0)
    elif adapter is not None:
        weights = {str(adapter): 1.0}
    if all(_is_plain_lora(adapter_configs(model)[n]) for n in weights):
        base = shared_copy(model).unload()
        return merged(base, model, weights) if weights else base
    return copy.deepcopy(model).merge_and_unload(adapter_names=list(weights))


def _is_plain_lora(config: Any) -> bool:
    """Whether what an adapter adds is its delta of each layer, and no more."""
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    others = ("use_dora", "modules_to_save", "trainable_token_indices")
    return kind == "LORA" and not any(getattr(config, name, None) for name in others)
