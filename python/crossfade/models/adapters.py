"""The adapters that PEFT put into a model: which there are, and which a term can have.

Adapters come and go: what is said here is asked again by every call.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from ..hf import underlying

# Types of adapters that change a layer's output at each token by that token alone, so that caches
# and batches mean what they mean without them. Others are refused by name: prompts that are
# learned, routers that look at whole texts (X-LoRA, Lily), networks beside the model (Shadow).
PER_TOKEN = {
    *("ADALORA", "BEFT", "BOFT", "C3A", "DEFT", "DELORA", "FOURIERFT", "FROD", "GLORA", "GRALORA"),
    *("HIRA", "HRA", "IA3", "LN_TUNING", "LOHA", "LOKR", "LORA", "MISS", "OFT", "OSF", "PEANUT"),
    *("PSOFT", "PVERA", "RANDLORA", "ROAD", "SHIRA", "SUPERTUNING", "TINYLORA"),
    *("TRAINABLE_TOKENS", "UNILORA", "VBLORA", "VERA", "WAVEFT"),
}
# ways to begin a LoRA that take something out of the base's weights
FROM_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def adapter_layers(model: nn.Module) -> list[Any]:
    """PEFT's layers in `model`: those with adapters, and the modules it trains whole."""
    return [m for m in model.modules() if hasattr(m, "_active_adapter")]


def adapter_configs(model: Any) -> dict[str, Any]:
    """The configs of a model's adapters by their names; a model's own adapters count as PEFT's."""
    for m in (model, underlying(model)):
        if configs := getattr(m, "peft_config", None):
            return dict(configs)
    return {}


def has_adapter(layer: Any, adapter: str) -> bool:
    """Whether a layer of PEFT's has something of an adapter."""
    if hasattr(layer, "_adapters"):  # a module trained whole
        return adapter in layer._adapters
    return any(adapter in getattr(layer, name, ()) for name in layer.adapter_layer_names)


def check_adapter(model: Any, adapter: Any, term: str | None = None) -> None:
    """Refuse an adapter that the model lacks, or that cannot be a term's.

    Args:
        term: the term's name at a call, which is when "active" is known; None: it is being made.

    Raises:
        TypeError: `adapter` is of the wrong kind.
        ValueError: the model has no such adapter, or has none of the plain base's weights any more.
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
        _check_base(configs, adapter_layers(model), whose)
        return
    late = {n for n, c in configs.items() if getattr(c, "alora_invocation_tokens", None)}
    if adapter == "active":
        late &= _active(model) if late and term is not None else set()
    else:
        if adapter not in configs:
            raise ValueError(
                f"{whose} is {adapter!r}, which the {type(model).__name__} does not have; it must "
                f"be {_choices(configs)}"
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


def _active(model: nn.Module) -> set[str]:
    """The adapters that the model applies by itself."""
    layers = [x for x in adapter_layers(model) if not x._disable_adapters]
    return {name for x in layers for name in x.active_adapters}


def _choices(names: Any) -> str:
    return f"one of {sorted(names)}, 'active' or None" if names else "'active' or None"


def _check_base(configs: dict[str, Any], layers: list[Any], whose: str) -> None:
    """Refuse the plain base of a model whose own weights an adapter has changed for good."""
    if configs and not layers:
        raise ValueError(
            f"{whose} is None, but the model has no layer with an adapter any more; were they "
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
        raise ValueError(f"{whose} is None, but adapter {name!r} {why}; load the base by itself")
