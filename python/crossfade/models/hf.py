"""Questions to a Hugging Face model: bare or wrapped by PEFT, alone or in a multimodal one."""

from __future__ import annotations

from typing import Any

from torch import nn


def is_peft(model: Any) -> bool:
    """Whether `model` is a `peft.PeftModel` or `peft.PeftMixedModel`; peft is not imported."""
    return all(hasattr(model, name) for name in ("peft_config", "disable_adapter"))


def underlying(model: Any) -> nn.Module:
    """The Hugging Face model inside a PEFT model, or `model` itself if PEFT does not wrap it."""
    while is_peft(model):
        own = hasattr(model, "get_base_model")  # a PeftMixedModel has none
        model = model.get_base_model() if own else model.base_model.model
    return model


def text_config(model: Any) -> Any:
    """The config of the text decoder. A multimodal model keeps it inside its own config."""
    config = model.config
    return config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config


def is_multimodal(model: Any) -> bool:
    """Whether the text decoder is one part of a model that reads pictures or sounds as well."""
    config = getattr(underlying(model), "config", None)
    return config is not None and text_config(underlying(model)) is not config


def is_scalar(model: Any) -> bool:
    """Whether a value head gives one number for a token, and not one for each next token."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if head is not None:
        return getattr(head, "out_features", None) == 1
    return getattr(model.config, "num_labels", None) == 1


def check_language_model(model: Any, *, head: bool) -> None:
    """Raise an error if `model` cannot be decoded.

    Args:
        head: whether the model must have a language modelling head.
    """
    kind = type(model).__name__
    if (
        not isinstance(model, nn.Module)
        or getattr(model, "config", None) is None
        or type(model).forward is nn.Module.forward
    ):
        raise TypeError(
            f"model is a {kind}; it must be a loaded Hugging Face model: an nn.Module with a "
            "config and a forward"
        )
    base = underlying(model)
    if getattr(base.config, "is_encoder_decoder", False):
        raise NotImplementedError(f"model is a {kind}, an encoder-decoder; not supported yet")
    can_generate = getattr(base, "can_generate", None)
    if head and can_generate is not None and not can_generate():
        raise TypeError(
            f"model is a {kind}, which has no language modelling head; it must be a causal LM, as "
            "AutoModelForCausalLM loads it"
        )
