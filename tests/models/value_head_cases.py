"""Value heads of every kind, and a way to fill them with values that differ."""

from __future__ import annotations

from typing import Any

import torch
from crossfade.models.value_heads import value_head
from tiny_models import spread

PROMPTS = [[7, 9, 30, 12, 8], [40], [11, 12, 13, 14, 15, 16, 17]]
DRAW: dict[str, Any] = {"max_new_tokens": 9, "seed": 5, "eos_token_id": [1, 20, 21, 22]}
HEADS: dict[str, dict[str, Any]] = {
    "full": {},
    "low rank": {"rank": 3},
    "scalar": {"kind": "scalar"},
    "bfloat16 full": {"dtype": torch.bfloat16},
    "bfloat16 low rank": {"rank": 5, "dtype": torch.bfloat16},
}


def fill(model: Any, seed: int = 0) -> Any:
    """Fill the head of a value model with values that differ, and return the model."""
    spread(value_head(model), seed)
    return model


def state(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
