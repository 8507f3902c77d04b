"""Rows of statements and of pairs, and made-up statistics."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from crossfade.dynamics import Statistics


def statements(behaviours: Sequence[str] = ("film", "plot"), each: int = 6) -> list[dict[str, Any]]:
    """As many of each label, of different lengths."""
    return [
        {
            "behaviour": b,
            "text": f"the {b} was{' very' * (i % 3)} {word} w{i}",
            "label": label,
        }
        for i in range(each)
        for b in behaviours
        for label, word in ((True, "great"), (False, "awful"))
    ]


def pairs(behaviours: Sequence[str] = ("film", "plot"), each: int = 5) -> list[dict[str, Any]]:
    return [
        {
            "behaviour": b,
            "prompt": f"the {b} w{i} was",
            "chosen": " great" + " cast" * (i % 2),
            "rejected": " awful dull" + f" w{20 + i}" * (i % 3),
        }
        for i in range(each)
        for b in behaviours
    ]


def apart(behaviour: str, difference: Sequence[float]) -> Statistics:
    """Statistics of a behaviour whose means differ by so much."""
    d = torch.tensor(difference, dtype=torch.float64)
    return Statistics(
        behaviour, False, 4, 4, d, torch.zeros_like(d), 1.0, 1.0, 0.0, (0.0, math.inf), (1.0, 1.0)
    )
