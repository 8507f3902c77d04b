"""Log-probs of a linear head over tiles of tokens and vocabulary, for `linear_logp`.

Tiles of logits are made by `torch.mm`, and used up before the next ones are made. Between the
products a kernel works on them.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

ROWS, COLUMNS = 1024, 1024  # of a tile, at most
FEWEST_ROWS = 16  # with fewer, products round otherwise: a row would depend on its batch


class Settings(NamedTuple):
    """What makes logits of products, and where targets do not count."""

    softcap: float  # 0: off
    temperature: float
    ignore_index: int


class Tile(NamedTuple):
    """Logits of some tokens and vocabulary rows, from row `first` on. Before: the products."""

    scores: Tensor  # [rows, columns]
    first: int
    bias: Tensor | None  # [columns]
    targets: Tensor  # [rows], in the vocabulary
    settings: Settings


class Sums(NamedTuple):
    """Of each token's logits z so far; as `LogpSums` and `LogpMoments` of csrc/crossfade.h."""

    sums: Tensor  # [T, 4] float64: max, sum of exp(z - max), of that times (z - max), target's z
    first: Tensor | None  # [T, H]: the sum of exp(z - max) s times weight
    second: Tensor | None  # [T, H]: of that times (z - max)

    def of(self, rows: slice) -> Sums:
        first, second = (None if x is None else x[rows] for x in self[1:])
        return Sums(self.sums[rows], first, second)


class Forward(NamedTuple):
    logp: Tensor  # [T]
    lse: Tensor  # [T]
    entropy: Tensor  # [T]
    normaliser: Tensor  # [3, T]: max, log of the sum of exp(z - max), target's z
    mean: Tensor | None  # [T, H]: E[dz/dx weight]
    covariance: Tensor | None  # [T, H]: E[(z - E[z]) dz/dx weight]


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


class _Head:
    """The head's tiles, as numbers to compute with; one buffer holds each in its turn."""

    def __init__(
        self, hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, s: Settings
    ) -> None:
        self.dtype = compute_dtype(hidden.dtype)
        missing = max(0, FEWEST_ROWS - hidden.shape[0])
        self.hidden = F.pad(hidden.to(self.dtype), (0, 0, 0, missing))
        self.targets = F.pad(targets, (0, missing), value=s.ignore_index).contiguous()
        self.weight, self.bias, self.settings = weight, bias, s
        count = -(-len(self.hidden) // ROWS)
        ends = [len(self.hidden) * i // count for i in range(count + 1)]
        self.rows = [slice(*ends[i : i + 2]) for i in range(count)]
        self.columns = min(COLUMNS, len(weight))
        most = max(r.stop - r.start for r in self.rows)
        self.scores = self.hidden.new_empty(most * self.columns)
        if weight.dtype != self.dtype:
            self._weight = self.hidden.new_empty(self.columns, weight.shape[1])

    def tiles(self) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
        """Slices of the vocabulary, with their rows of weight and bias."""
        for first in range(0, len(self.weight), self.columns):
            part = slice(first, min(first + self.columns, len(self.weight)))
            weight = self.weight[part]
            if weight.dtype != self.dtype:
                weight = self._weight[: len(weight)].copy_(weight)
            bias = None if self.bias is None else self.bias[part].to(self.dtype).contiguous()
            yield part, weight, bias

    def tile(self, rows: slice, part: slice, weight: Tensor, bias: Tensor | None) -> Tile:
        hidden = self.hidden[rows]
        scores = self.scores[: len(hidden) * len(weight)].view(len(hidden), len(weight))
        torch.mm(hidden, weight.t(), out=scores)
        return Tile(scores, part.start, bias, self.targets[rows], self.settings)


def forward(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    settings: Settings,
    moments: int,
    kernel: ModuleType,
) -> Forward:
    """The results, with what a backward pass needs.

    `moments`: how many of mean and covariance to make; each costs a product, and with them a frozen
    head's gradient is known. The other results do not depend on it. `kernel`: `native` or
    `logp_torch`.
    """
    head = _Head(hidden, weight, targets, bias, settings)
    shape = head.hidden.shape
    first, second = (head.hidden.new_zeros(shape) if moments > i else None for i in range(2))
    start = torch.tensor([-torch.inf, 0, 0, torch.nan], dtype=torch.float64, device=hidden.device)
    all_sums = Sums(start.repeat(shape[0], 1), first, second)
    buffer = torch.empty_like(head.scores) if moments > 1 else None
    for part, w, b in head.tiles():
        for rows in head.rows:
            tile, sums = head.tile(rows, part, w, b), all_sums.of(rows)
            scores = tile.scores
            again = None if buffer is None else buffer[: scores.numel()].view(scores.shape)
            kernel.logp_forward(tile, sums, again)
            if sums.first is not None:
                sums.first.addmm_(scores, w)
            if sums.second is not None and again is not None:
                sums.second.addmm_(again, w)
    return _results(all_sums, targets, settings, head.dtype)


def _results(all_sums: Sums, targets: Tensor, s: Settings, dtype: torch.dtype) -> Forward:
    all_sums = all_sums.of(slice(len(targets)))
    top, total, weighted, target = all_sums.sums.unbind(1)
    log_total, below = total.log(), weighted / total
    lse = top + log_total
    lse = lse.where(lse.isfinite(), torch.nan)
    logp = ((target - top) - log_total).where(lse.isfinite(), torch.nan)
    logp = logp.where(targets != s.ignore_index, 0)
    mean, covariance = all_sums.first, all_sums.second
    scale = (total * s.temperature).to(dtype)[:, None]
    if mean is not None:
        mean.div_(scale)
    if mean is not None and covariance is not None:
        covariance.div_(scale).addcmul_(mean, below.to(dtype)[:, None], value=-1)
    return Forward(
        logp.to(dtype),
        lse.to(dtype),
        (log_total - below).to(dtype),
        torch.stack([top, log_total, target]).to(dtype),
        mean,
        covariance,
    )


class Gradients(NamedTuple):
    """Of the results, [T] each; None is zero."""

    logp: Tensor | None
    lse: Tensor | None
    entropy: Tensor | None

    def of_logits(self, counts: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """`pick`, `share` and `tilt` [T] of the loss's gradient, which is for a logit z

            [target] pick + p (share - tilt (z - E[z]))

        from ``d logp/dz = [target] - p``, ``d lse/dz = p`` and ``d entropy/dz = -p (z - E[z])``.
        `counts`: where a target does.
        """
        zero = torch.zeros(counts.shape, dtype=dtype, device=counts.device)
        logp, lse, tilt = (zero if x is None else x.to(dtype) for x in self)
        pick = logp.where(counts, 0)
        return pick, lse - pick, tilt


def backward(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    settings: Settings,
    entropy: Tensor,
    normaliser: Tensor,
    gradients: Gradients,
    wanted: tuple[bool, bool, bool],
    kernel: ModuleType,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of hidden, weight and bias that are `wanted`, from logits made once more."""
    dtype = normaliser.dtype
    pick, share, tilt = gradients.of_logits(targets != settings.ignore_index, dtype)
    share = share - (tilt * entropy).where(tilt != 0, 0)  # z - E[z] = log p + entropy
    of_logits = torch.stack(
        [*normaliser[:2], *(x / settings.temperature for x in (pick, share, tilt))], 1
    )
    used = _used_rows(of_logits)
    if used is not None:
        hidden, targets, of_logits = hidden[used], targets[used], of_logits[used]
    head = _Head(hidden, weight, targets, bias, settings)
    of_logits = F.pad(of_logits, (0, 0, 0, len(head.hidden) - len(of_logits)))
    for_hidden = head.hidden.new_zeros(head.hidden.shape) if wanted[0] else None
    for_weight = weight.new_empty(weight.shape) if wanted[1] else None
    for_bias = weight.new_empty(len(weight), dtype=head.dtype) if wanted[2] else None
    apart = wanted[1] and weight.dtype != head.dtype
    buffer = head.hidden.new_empty(head.columns, weight.shape[1]) if apart else None
    for part, w, b in head.tiles():
        out = None
        if for_weight is not None:
            out = for_weight[part] if buffer is None else buffer[: len(w)]
        for i, rows in enumerate(head.rows):
            tile = head.tile(rows, part, w, b)
            kernel.logp_backward(tile, of_logits[rows])
            scores = tile.scores
            if for_hidden is not None:
                for_hidden[rows].addmm_(scores, w)
            if out is not None:
                out.addmm_(scores.t(), head.hidden[rows], beta=min(i, 1))
            if for_bias is not None:
                for_bias[part] = scores.sum(0) + (for_bias[part] if i else 0)
        if for_weight is not None and buffer is not None and out is not None:
            for_weight[part] = out
    if for_hidden is not None:
        for_hidden = for_hidden[: len(hidden)]
        if used is not None:
            for_hidden = for_hidden.new_zeros(len(normaliser[0]), hidden.shape[1]).index_copy_(
                0, used, for_hidden
            )
        for_hidden = for_hidden.to(hidden.dtype)
    if bias is not None and for_bias is not None:
        for_bias = for_bias.to(bias.dtype)
    return for_hidden, for_weight, for_bias


def _used_rows(of_logits: Tensor) -> Tensor | None:
    """The tokens that have a gradient: padding and prompts have none. None is all of them, as it is
    where one would have to wait for a device to know."""
    if not of_logits.is_cpu:
        return None
    used = (of_logits[:, 2:] != 0).any(1)
    return None if bool(used.all()) else used.nonzero().squeeze(1)


def frozen_backward(
    weight: Tensor,
    targets: Tensor,
    settings: Settings,
    normaliser: Tensor,
    mean: Tensor,
    covariance: Tensor | None,
    gradients: Gradients,
) -> Tensor:
    """The gradient of hidden, from a frozen head's moments: no products are left."""
    dtype = mean.dtype
    pick, share, tilt = gradients.of_logits(targets != settings.ignore_index, dtype)
    slope = torch.full_like(pick, 1 / settings.temperature)
    if settings.softcap > 0:
        t = normaliser[2] * (settings.temperature / settings.softcap)
        slope = slope * (1 - t * t)
    at_target = (pick * slope).where(pick != 0, 0)
    result = weight.index_select(0, targets.clamp(0, len(weight) - 1)).to(dtype)
    result.mul_(at_target[:, None]).addcmul_(mean, share[:, None])
    if covariance is not None:
        result.addcmul_(covariance, tilt[:, None], value=-1)
    without = (pick == 0) & (share == 0) & (tilt == 0)
    return result.masked_fill_(without[:, None], 0)
