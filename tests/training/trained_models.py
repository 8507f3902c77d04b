"""Tiny models with heads of every kind, and a few rows of data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tiny_models as tiny
import torch
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GraniteConfig,
    LlamaConfig,
    MixtralConfig,
    PhiConfig,
    PreTrainedModel,
)

SHAPE = {**tiny.SIZES, **tiny.HEADS, **tiny.LONG, **tiny.IDS}
CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaConfig(**SHAPE),
    "tied": lambda: LlamaConfig(**SHAPE, tie_word_embeddings=True),
    "softcap": lambda: Gemma2Config(
        **SHAPE, final_logit_softcapping=3.0, attn_implementation="eager", query_pre_attn_scalar=8
    ),
    "scale": lambda: CohereConfig(**SHAPE, logit_scale=0.3),
    "scaling": lambda: GraniteConfig(**SHAPE, logits_scaling=2.5),
    "bias": lambda: PhiConfig(**SHAPE),
    "experts": lambda: MixtralConfig(
        **SHAPE, num_local_experts=3, num_experts_per_tok=2, output_router_logits=True
    ),
}


def make(name: str = "llama", seed: int = 0) -> PreTrainedModel:
    """A random model whose logits are far from equal."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIGS[name](), dtype=torch.float32)
    for weight in model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.4)
    if getattr(model.lm_head, "bias", None) is not None:
        torch.nn.init.normal_(model.lm_head.bias)
    return model.train()


def texts(kind: str = "dpo", rows: int = 12) -> list[dict[str, Any]]:
    """Rows of prompts and responses of different lengths."""
    found: list[dict[str, Any]] = []
    for i in range(rows):
        prompt = f"the film w{i} was" + " very" * (i % 2)
        good = " great cast" + f" w{20 + i}" * (i % 3) + " <eos>"
        bad = " awful dull plot" + f" w{30 + i}" * (i % 4) + " <eos>"
        if kind == "dpo":
            found.append({"prompt": prompt, "chosen": good, "rejected": bad})
        elif kind == "sft":
            found.append({"prompt": prompt, "completion": good})
        else:
            found.append(
                {"prompt": prompt, "completion": bad if i % 2 else good, "label": i % 2 == 0}
            )
    return found
