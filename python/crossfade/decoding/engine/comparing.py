"""How far logits that the engine has computed are off a model's own."""

from __future__ import annotations

import torch
from torch import Tensor


def distance(found: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
    """How far logits ``[..., V]`` on the engine are off a model's own, and the spread of these."""
    found, own = found.double(), own.double()
    if own.shape[-1] == 1:  # The numbers of a scalar head are compared for all tokens at once.
        found, own = (x.flatten()[None] for x in (found, own))
    alike = (found == own) | (found.isnan() & own.isnan())  # Banned tokens have -inf in both.
    found, own = (x.masked_fill(alike & ~own.isfinite(), 0.0) for x in (found, own))
    return (found - own).norm(dim=-1), (own - own.mean(-1, keepdim=True)).norm(dim=-1)


def worst_of(off: Tensor, spread: Tensor) -> float:
    """The largest part of its spread that any row is off; inf where that is not a number."""
    parts = (off / spread.clamp(min=1e-30)).nan_to_num(torch.inf)
    return float(parts.max()) if parts.numel() else 0.0
