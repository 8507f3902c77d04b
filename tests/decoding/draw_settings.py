"""What tests of draws share: the settings of a draw, and a processor that leaves few tokens."""

from __future__ import annotations

from typing import Any

import torch
from transformers import LogitsProcessor

Batch = dict[str, torch.Tensor]
DRAW: dict[str, Any] = {"do_sample": True, "max_new_tokens": 12, "eos_token_id": None}


class Only(LogitsProcessor):
    """Allows some tokens, and notes what it is called with."""

    def __init__(self, *tokens: int) -> None:
        self.tokens = list(tokens)
        self.calls: list[tuple[torch.Tensor, torch.Tensor]] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.calls.append((input_ids, scores.clone()))
        allowed = torch.full_like(scores, -float("inf"))
        allowed[:, self.tokens] = scores[:, self.tokens]
        return allowed
