"""Questions to a Hugging Face model: bare or wrapped by PEFT, alone or in a multimodal one."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import nn

from ..checks import did_you_mean

DTYPES = ("float32", "bfloat16", "float16", "float64", "auto")


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


def place(device: torch.device) -> tuple[str, int]:
    """A device by type and number. A CPU without a number is the one that processes call 0."""
    return device.type, device.index or 0


def in_shards(x: Any) -> bool:
    """Whether a parameter has its numbers in shards on several processes, as of FSDP."""
    return hasattr(x, "to_local")


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


def instead_of_model(x: Any) -> str:
    """What to do instead of passing `x` as a model: the end of an error, or nothing."""
    if isinstance(x, (str, os.PathLike)):
        load = "smollm2()" if x == "smollm2" else f"load({str(x)!r})"
        return f"; a name is loaded first: model, tokenizer = crossfade.models.{load}"
    if isinstance(x, type):
        return "; it is a class: from_pretrained loads a model of it"
    if isinstance(x, tuple) and x and isinstance(x[0], nn.Module):
        return "; a model and its tokenizer are Model(model, tokenizer=tokenizer)"
    if hasattr(x, "terms") or hasattr(x, "adapter"):
        return "; it is a term or a blend already"
    if hasattr(x, "rewards") and hasattr(x, "at"):  # a policy that is steered by weights
        return "; its term at some weights is x.at(weights)"
    if isinstance(getattr(x, "model", None), nn.Module):  # a pipeline of transformers
        return "; its model is x.model: Model(x.model, tokenizer=x.tokenizer)"
    return ""


def check_dtype(dtype: Any) -> None:
    """Raise an error unless this is a dtype of weights, by itself or by its name, or "auto"."""
    if isinstance(dtype, torch.dtype) or dtype in DTYPES:
        return
    kind = TypeError if not isinstance(dtype, str) else ValueError
    says = did_you_mean(dtype, DTYPES)
    raise kind(f"dtype is {dtype!r}; it must be one of {', '.join(DTYPES)}{says}")


def check_tokenizer(tokenizer: Any) -> None:
    """Raise a TypeError if a tokenizer is a name or a model."""
    if isinstance(tokenizer, (str, os.PathLike)):
        raise TypeError(
            f"tokenizer is {str(tokenizer)!r}; it must be a Hugging Face tokenizer: "
            f"AutoTokenizer.from_pretrained({str(tokenizer)!r})"
        )
    if isinstance(tokenizer, nn.Module):
        kind = type(tokenizer).__name__
        raise TypeError(f"tokenizer is a {kind}; it must be a Hugging Face tokenizer")


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
            f"config and a forward{instead_of_model(model)}"
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
