"""Which models have one and the same backbone: the very weights, under heads of their own."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from typing import Any

from torch import Tensor, nn

from .hf import text_config

# What a config may say of a model's head, which has no part in its backbone.
OF_HEADS = {
    *("tie_word_embeddings", "final_logit_softcapping", "logits_scaling", "num_labels"),
    *("id2label", "label2id", "architectures", "_name_or_path", "use_cache"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "dtype", "transformers_version"),
}


def backbone(bare: Any) -> Hashable:
    """What is equal for two models if their backbones are one: the same weights in the same memory.

    Their modules, configs and adapters may be objects of their own.
    """
    body = getattr(bare, "base_model", bare)
    if body is bare or not hasattr(bare, "config"):
        return id(bare)
    modules = tuple(_modules(body, ""))
    devices = {device.type for *_, weights in modules for *_, device in weights}
    if not devices or "meta" in devices:
        return id(bare)  # there are no numbers here by which to know it
    config = {k: v for k, v in text_config(bare).to_dict().items() if k not in OF_HEADS}
    return type(bare), modules, repr(sorted(config.items(), key=lambda item: item[0]))


def _modules(module: Any, name: str) -> Iterator[tuple[Any, ...]]:
    """A module and those below it: their names, kinds and weights, beneath what PEFT put there."""
    if hasattr(module, "_active_adapter") and hasattr(module, "base_layer"):
        module = module.base_layer
    weights = tuple(
        (key, _memory(x), x.shape, x.dtype, x.device)
        for key, x in (*module._parameters.items(), *module._buffers.items())
        if x is not None
    )
    yield name, type(module), id(module.__dict__.get("forward")), weights
    for key, child in module._modules.items():
        if child is not None:
            yield from _modules(child, f"{name}.{key}")


def _memory(x: Tensor) -> Hashable:
    """Where a tensor's numbers are. Those of other types, as quantizers make them, are shared as
    objects."""
    return (x.data_ptr(), x.stride()) if type(x) in (Tensor, nn.Parameter) else id(x)
