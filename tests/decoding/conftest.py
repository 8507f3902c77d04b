"""Fixtures over the tiny models."""

from __future__ import annotations

import pytest
import torch
from tiny_models import PAD, VOCAB, make, make_tokenizer
from transformers import PreTrainedModel, PreTrainedTokenizerFast


@pytest.fixture(scope="session")
def trio() -> list[PreTrainedModel]:
    """A base, a tuned and a reference model of different shapes over one vocabulary."""
    return [make("llama", 0), make("gpt2", 1), make("qwen3", 2)]


@pytest.fixture(scope="session")
def base(trio: list[PreTrainedModel]) -> PreTrainedModel:
    return trio[0]


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    """Four left-padded prompts of 9, 5, 1 and 7 tokens, without special ids."""
    generator = torch.Generator().manual_seed(3)
    lengths = [9, 5, 1, 7]
    ids = torch.randint(5, VOCAB, (4, 9), generator=generator)
    mask = torch.stack([(torch.arange(9) >= 9 - n).long() for n in lengths])
    return {"input_ids": ids.masked_fill(mask == 0, PAD), "attention_mask": mask}


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()
