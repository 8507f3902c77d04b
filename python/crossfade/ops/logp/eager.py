"""What `linear_logp` does to a tile between two products, in torch: for any dtype and device.

The functions are those of `native`; csrc/crossfade.h says what they compute. What the next product
multiplies is left in `tile.operand`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .tiles import Sums, Tile


def logp_forward(tile: Tile, sums: Sums, second_scores: Tensor | None) -> None:
    slope = _logits(tile)
    z = tile.scores
    top, total, weighted, target = sums.sums.unbind(1)
    inside = (tile.targets >= tile.first) & (tile.targets < tile.first + z.shape[1])
    at = (tile.targets - tile.first).clamp(0, z.shape[1] - 1)
    target.copy_(z.gather(1, at[:, None]).squeeze(1).where(inside, target))

    most = torch.maximum(top, z.amax(1))
    most_finite = most.where(most != -torch.inf, 0)
    step = (top - most_finite).where(top != -torch.inf, 0)
    factor = (top - most_finite).exp()
    below = z.sub_(most_finite.to(z.dtype)[:, None])
    p = below.exp()
    below.masked_fill_(below == -torch.inf, 0)
    weighted.copy_((weighted + step * total) * factor + (p * below).sum(1))
    total.copy_(total * factor + p.sum(1))
    top.copy_(most)
    if slope is not None:
        p = p * slope
    if sums.first is not None:
        if sums.second is not None and second_scores is not None:
            sums.second.addcmul_(sums.first, step.to(z.dtype)[:, None])
            sums.second.mul_(factor.to(z.dtype)[:, None])
            torch.mul(p, below, out=second_scores)
        sums.first.mul_(factor.to(z.dtype)[:, None])
        tile.operand.copy_(p)


def logp_backward(tile: Tile, of_logits: Tensor) -> None:
    slope = _logits(tile)
    top, log_total, pick, share, tilt = (x[:, None] for x in of_logits.unbind(1))
    log_p = tile.scores.sub_(top).sub_(log_total)
    p = log_p.exp()
    log_p.masked_fill_(log_p == -torch.inf, 0)
    grad = p * (share - tilt * log_p)
    at = torch.arange(tile.first, tile.first + p.shape[1], device=p.device)
    grad = torch.where(tile.targets[:, None] == at, grad + pick, grad)
    if slope is not None:
        grad = grad * slope
    without = (pick == 0) & (share == 0) & (tilt == 0)
    tile.operand.copy_(grad.masked_fill_(without, 0))


def _logits(tile: Tile) -> Tensor | None:
    """Makes logits of a tile's products, in place. Gives dz/dx * temperature, or None for 1."""
    x, s, slope = tile.scores, tile.settings, None
    if tile.bias is not None:
        x += tile.bias
    if s.softcap > 0:
        t = x.div_(s.softcap).tanh_()
        slope = 1 - t * t
        t.mul_(s.softcap)
    if s.temperature != 1:
        x.div_(s.temperature)
    return slope
