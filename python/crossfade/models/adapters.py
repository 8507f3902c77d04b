"""The adapters that PEFT put into a model: which there are, and which of them a term can have.

Adapters are added, merged and deleted while a program runs, so every call asks anew.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from torch import nn

from ..checks import did_you_mean
from .hf import underlying

# PEFT's types of adapters that change the output of a layer at a token by what the layer reads at
# that token alone. With them caches and batches work as they do without. Other types are refused:
# learned prompts, routers that look at whole texts (X-LoRA, Lily), networks beside the model
# (Shadow).
PER_TOKEN = {
    *("ADALORA", "BEFT", "BOFT", "C3A", "DEFT", "DELORA", "FOURIERFT", "FROD", "GLORA", "GRALORA"),
    *("HIRA", "HRA", "IA3", "LN_TUNING", "LOHA", "LOKR", "LORA", "MISS", "OFT", "OSF", "PEANUT"),
    *("PSOFT", "PVERA", "RANDLORA", "ROAD", "SHIRA", "SUPERTUNING", "TINYLORA"),
    *("TRAINABLE_TOKENS", "UNILORA", "VBLORA", "VERA", "WAVEFT"),
}
# Ways to initialise a LoRA that subtract something from the base's weights.
FROM_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def adapter_layers(model: nn.Module) -> list[Any]:
    """PEFT's layers in `model`: layers with adapters, and modules that are trained whole."""
    return [m for m in model.modules() if hasattr(m, "_active_adapter")]


def adapter_configs(model: Any) -> dict[str, Any]:
    """The configs of a model's adapters by name, whether or not a `PeftModel` is around it."""
    for m in (model, underlying(model)):
        if configs := getattr(m, "peft_config", None):
            return dict(configs)
    return {}


def has_adapter(layer: Any, adapter: str) -> bool:
    """Whether an adapter has a part in a layer of PEFT's."""
    if hasattr(layer, "_adapters"):  # a module that is trained whole
        return adapter in layer._adapters
    return any(adapter in getattr(layer, name, ()) for name in layer.adapter_layer_names)


def adapter_parameters(model: nn.Module, names: Collection[str]) -> list[nn.Parameter]:
    """The weights of adapters of plain LoRA."""
    parts = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B")
    found: list[nn.Parameter] = []
    for layer in adapter_layers(model):
        for part, name in ((p, n) for p in parts for n in names if n in getattr(layer, p, ())):
            own = getattr(layer, part)[name]
            found += [own] if isinstance(own, nn.Parameter) else own.parameters()
    return found


def check_adapter(model: Any, adapter: Any, term: str | None = None) -> None:
    """Raise an error if the model does not have an adapter, or if no term can have it.

    Args:
        adapter: the adapter's name, "active" for those that the model applies by itself, or None
            for the plain base.
        term: the name of the term that is being decoded, for which "active" is looked up; None
            while a term is being made, because "active" may change until it is decoded.

    Raises:
        TypeError: `adapter` is neither a str nor None.
        ValueError: the model has no such adapter, or the weights of the plain base are lost.
        NotImplementedError: an adapter is of a kind that no term can have.
    """
    whose = "adapter" if term is None else f"adapter of {term}"
    if adapter is not None and not isinstance(adapter, str):
        raise TypeError(
            f"{whose} is a {type(adapter).__name__}; it must be a name, 'active' or None"
        )
    configs = adapter_configs(model)
    for name, config in configs.items():
        kind = str(getattr(config.peft_type, "value", config.peft_type))
        if kind not in PER_TOKEN:
            raise NotImplementedError(
                f"model has the adapter {name!r} of PEFT's type {kind}, which is not supported yet"
            )
    if adapter is None:
        _check_base(configs, adapter_layers(model), f"{whose} is None")
        return
    late = {n for n, c in configs.items() if getattr(c, "alora_invocation_tokens", None)}
    if adapter == "active":
        late &= active_adapters(model) if late and term is not None else set()
    else:
        if adapter not in configs:
            raise ValueError(
                f"{whose} is {adapter!r}, which the {type(model).__name__} does not have; it must "
                f"be {_choices(configs)}"
                + (
                    did_you_mean(adapter, configs)
                    or "; crossfade.models.with_adapters(model, {name: folder}) adds adapters"
                )
            )
        if not any(has_adapter(x, adapter) for x in adapter_layers(model)):
            raise ValueError(
                f"{whose} is {adapter!r}, which is in the model's peft_config but in none of its "
                "layers; was it merged and unloaded, or renamed?"
            )
        late &= {adapter}
    for name in sorted(late):
        raise NotImplementedError(
            f"{whose} is {name!r}, an activated LoRA (aLoRA), which begins in the middle of the "
            "prompt; it is not supported yet"
        )


def check_mix(model: Any, names: Sequence[str], term: str | None = None) -> None:
    """Raise an error unless the model has these adapters, and a term can have a mix of them.

    In every layer the delta of a mix must be the weighted sum of the deltas of its adapters. So it
    is for plain LoRA, of any rank, alpha or way of scaling (rsLoRA), on linear and embedding
    layers.

    Args:
        term: as in `check_adapter`.

    Raises:
        ValueError: as `check_adapter`, or an adapter has changed the base itself.
        NotImplementedError: an adapter is of another kind; names it.
    """
    whose = "adapter" if term is None else f"adapter of {term}"
    for name in names:
        if name == "active" and name not in adapter_configs(model):
            raise ValueError(f"{whose} mixes 'active'; a mix must have the names of adapters")
        check_adapter(model, name, term)
    from peft.tuners.lora.layer import Embedding, Linear  # here, as PEFT is there if adapters are

    layers = adapter_layers(model)
    for name in names:
        for layer in layers:
            if not has_adapter(layer, name):
                continue
            if hasattr(layer, "_adapters"):
                why = "which trains whole modules (modules_to_save or trainable tokens)"
            elif type(layer) not in (Linear, Embedding):
                kind = type(layer)
                why = f"which has a layer of the type {kind.__module__}.{kind.__name__}"
            elif name in layer.lora_variant:
                why = "a variant of LoRA (DoRA or its like), whose weights are no sum of deltas"
            else:
                continue
            raise NotImplementedError(
                f"{whose} mixes {name!r}, {why}; a mix must be of plain LoRA on linear and "
                "embedding layers"
            )
    _check_base(adapter_configs(model), layers, f"{whose} is a mix")


def active_adapters(model: nn.Module) -> set[str]:
    """The adapters that the model applies by itself."""
    layers = [x for x in adapter_layers(model) if not x._disable_adapters]
    return {name for x in layers for name in x.active_adapters}


def _choices(names: Any) -> str:
    return f"one of {sorted(names)}, 'active' or None" if names else "'active' or None"


def _check_base(configs: dict[str, Any], layers: list[Any], what: str) -> None:
    """Refuse the plain base of a model whose own weights an adapter has changed for good.

    Args:
        what: the beginning of errors: what needs the plain base.
    """
    if configs and not layers:
        raise ValueError(
            f"{what}, but the model has no layer with an adapter any more; were they "
            "merged and unloaded? Then only 'active', the model as it is, is left"
        )
    for name, config in configs.items():
        start = getattr(config, "init_lora_weights", None)
        if getattr(config, "bias", "none") != "none":
            why = f"was trained with bias={config.bias!r} and changed the base's own biases"
        elif isinstance(start, str) and start.lower().startswith(FROM_THE_BASE):
            why = f"began with init_lora_weights={start!r} and changed the base's own weights"
        elif getattr(config, "kasa_config", None) is not None:
            why = "is a KaSA and changed the base's own weights"
        elif getattr(config, "layer_replication", None):
            why = "has layer_replication and changed the base's own layers"
        else:
            continue
        raise ValueError(f"{what}, but adapter {name!r} {why}; load the base by itself")
