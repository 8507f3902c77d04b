"""Requests of the evaluation harness, made by hand, and models that answer them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from tiny_models import HEADS, SIZES
from tokenizer_kinds import tokenizer_of
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

KINDS = ["bytes", "sentencepiece-first"]  # without a BOS of its own, and with one


@cache
def model_of(kind: str, seed: int = 0, context: int = 512) -> PreTrainedModel:
    """A random model for the tokens of a tokenizer."""
    tokenizer = tokenizer_of(kind)
    torch.manual_seed(seed)
    config = LlamaConfig(
        **{**SIZES, "vocab_size": len(tokenizer)},
        **HEADS,
        max_position_embeddings=context,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config).eval()
    for weight in model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.5)
    return model


def hflm(kind: str, **options: Any) -> HFLM:
    """The harness's own model, as the truth."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # It warns that the model is loaded.
    return HFLM(model_of(kind), tokenizer=tokenizer_of(kind), **options)


def requests(kind: str, arguments: Sequence[tuple[Any, ...]]) -> list[Instance]:
    return [
        Instance(request_type=kind, doc={}, arguments=given, idx=i)
        for i, given in enumerate(arguments)
    ]
