"""Tiny models with heads of every kind, a few rows of data, and runs of a few steps."""

from __future__ import annotations

import gc
import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.append(str(Path(__file__).parent.parent / "decoding"))

import tiny_models as tiny
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

collect_ignore = []
if importlib.util.find_spec("trl") is None:  # TRL needs Python 3.11
    collect_ignore = ["test_trainers.py", "test_train_cli.py"]

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
    """A random model with logits far enough apart."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIGS[name](), dtype=torch.float32)
    for weight in model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.4)
    if getattr(model.lm_head, "bias", None) is not None:
        torch.nn.init.normal_(model.lm_head.bias)
    return model.train()


def texts(kind: str = "dpo", rows: int = 12) -> list[dict[str, Any]]:
    """Prompts and responses of differing lengths."""
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


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """TRL's own trainers tell nobody that they ran, and bars are off."""
    monkeypatch.setenv("CI", "1")  # where TRL sends no telemetry
    if importlib.util.find_spec("datasets") is None:
        yield
        return
    import datasets

    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


@pytest.fixture(autouse=True, scope="session")
def few_objects() -> Iterator[None]:
    """Trainer collects garbage as it starts, through all modules that are loaded: a second."""
    gc.freeze()
    yield
    gc.unfreeze()
