"""Penalties of OpenAI's interface, which Hugging Face's `generate` does not have."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import LogitsProcessor


class CountPenalty(LogitsProcessor):
    """``z[v] -= presence + frequency * count[v]`` for each token v that the response has.

    The prompt does not count.

    Args:
        prompt: how many tokens of a row are its prompt.
    """

    def __init__(self, presence: float, frequency: float, prompt: int) -> None:
        self.presence, self.frequency, self.prompt = presence, frequency, prompt

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        written = input_ids[:, self.prompt :]
        ones = torch.ones_like(written, dtype=scores.dtype)
        counts = torch.zeros_like(scores).scatter_add_(1, written, ones)
        return scores - self.presence * (counts > 0) - self.frequency * counts
