"""Log-probs of a linear head over tiles of tokens and vocabulary, for `linear_logp`.

A product of torch makes a tile of logits, a kernel works on it, and another product or two use what
the kernel leaves; then comes the next tile.

Tiles of a CPU stay in its cache. Those of a GPU go through its memory, as its cache is too small
for them: so there must be little traffic for the flops of each product. On an H100, with some
800e12 bfloat16 flops and 3e12 bytes a second, at H = 4,096, a product takes 10.2 ps for each logit,
and a byte for each logit takes 0.33 ps:

* Logits are written as float32, 2 bytes more than a bare product in bfloat16 writes. A kernel reads
  these 4 bytes once, and writes 2 for a frozen head, or backward.
* The gradient of hidden, or a mean, is a float32 sum that each tile's product adds to: 8 H /
  COLUMNS bytes a logit, so 4 with 8,192 columns; with 1,024 they would outlast the product.
* So is the gradient of weight, 8 H / ROWS bytes a logit. But if all tokens fit one block of rows,
  its products are written at once in the dtype of the weight.

If none of the traffic is hidden behind the products, a trained head should take (4 * 10.2 + 0.33 *
(6 + 8 + 4)) / (4 * 10.2) = 1.15 times as long as its four products, and a frozen head (2 * 10.2 +
0.33 * (8 + 4)) / (2 * 10.2) = 1.19 times as long as its two. A full tile takes 0.27 GB, and 0.13 GB
for each operand that a kernel leaves.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

ROWS, COLUMNS = 1024, 1024  # of a tile, at most
GPU_ROWS, GPU_COLUMNS = 8192, 8192
# What a forward pass keeps for the backward pass: nothing, a frozen head's first moment or both
# moments, or the gradients of the sum of the log-probs.
NOTHING, MEAN, MOMENTS, SUM = range(4)
FEWEST_ROWS = 16  # with fewer rows torch's products round otherwise, so these are padded


class Settings(NamedTuple):
    """What makes logits of products, and where targets do not count."""

    softcap: float  # 0: off
    temperature: float
    ignore_index: int

    @property
    def plain(self) -> bool:
        """Whether the products are the logits, but for a bias."""
        return self.softcap == 0 and self.temperature == 1


class Tile(NamedTuple):
    """The logits of some tokens, of the vocabulary from `first` on. At first mere products."""

    scores: Tensor  # [rows, columns]
    operand: Tensor  # [rows, columns], what the next product multiplies; `scores` if of its dtype
    first: int
    bias: Tensor | None  # [columns]
    targets: Tensor  # [rows], tokens of the vocabulary, within this tile or not
    settings: Settings


class Sums(NamedTuple):
    """Sums over each token's logits z so far: `LogpSums` and `LogpMoments` of csrc/crossfade.h."""

    # [T, 4]: max, sum of exp(z - max), sum of that times (z - max), target's z. Float64 on CPUs,
    # elsewhere the results' dtype: a GPU has few tiles, and its float64 may be slow.
    sums: Tensor
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
    # moments of a frozen head, or gradients of the sum of logp
    first: Tensor | None  # [T, H]: E[dz/dx weight], or by hidden
    second: Tensor | None  # [T, H]: E[(z - E[z]) dz/dx weight], or [V, H]: by weight


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def operand_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """The dtype in which products are taken: of hidden, weight and what kernels leave.

    On an NVIDIA GPU that is the dtype of hidden and weight, if they share one: its tensor cores
    take 16 bits, and add up in float32. Logits are as exact as of float32 operands then. What a
    kernel leaves, a softmax's terms or the gradient of logits, is rounded once, as in flash
    attention: each term of a sum to 1 part in 512 (bfloat16) or 4,096 (float16), before float32
    adds them up.
    """
    if hidden.device.type == "cuda" and torch.version.hip is None and hidden.dtype == weight.dtype:
        return hidden.dtype
    return compute_dtype(hidden.dtype)


def tile_size(device: torch.device) -> tuple[int, int]:
    """Rows and columns of a tile, at most."""
    return (GPU_ROWS, GPU_COLUMNS) if device.type == "cuda" else (ROWS, COLUMNS)


def product(a: Tensor, b: Tensor, out: Tensor, beta: int = 0) -> None:
    """Makes `out` the matrix a b + beta out. Sums have the dtype of `out`, also if a and b have 16
    bits."""
    if a.dtype == out.dtype:
        out.addmm_(a, b, beta=beta)
    elif a.is_cuda:
        torch.addmm(out, a, b, out_dtype=out.dtype, beta=beta, out=out)
    else:
        out.addmm_(a.to(out.dtype), b.to(out.dtype), beta=beta)


class Head:
    """The head and its tokens, ready to be multiplied tile by tile.

    The buffers hold one tile at a time. With `whole` they hold all tiles of a block of tokens. A
    block then has no more tokens than weight has columns (or 32), so that the buffers take no more
    memory than weight does.
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        bias: Tensor | None,
        s: Settings,
        *,
        whole: bool = False,
    ) -> None:
        self.dtype = compute_dtype(hidden.dtype)
        self.operand_dtype = operand_dtype(hidden, weight)
        missing = max(0, FEWEST_ROWS - hidden.shape[0])
        hidden = hidden.to(self.operand_dtype)
        self.hidden = F.pad(hidden, (0, 0, 0, missing)) if missing else hidden
        self.targets = F.pad(targets, (0, missing), value=s.ignore_index).contiguous()
        self.weight, self.bias, self.settings = weight, bias, s
        most_rows, most_columns = tile_size(hidden.device)
        if whole:
            # at least twice the fewest, so that half a block still has enough
            most_rows = min(most_rows, max(2 * FEWEST_ROWS, weight.shape[1]))
        count = -(-len(self.hidden) // most_rows)
        ends = [len(self.hidden) * i // count for i in range(count + 1)]
        self.rows = [slice(*ends[i : i + 2]) for i in range(count)]
        self.columns, self.whole = min(most_columns, len(weight)), whole
        most = max(r.stop - r.start for r in self.rows) * (len(weight) if whole else self.columns)
        self.scores = self.hidden.new_empty(most, dtype=self.dtype)
        apart = self.operand_dtype != self.dtype
        self.operand = self.hidden.new_empty(most) if apart else self.scores
        if weight.dtype != self.operand_dtype:
            self._weight = self.hidden.new_empty(self.columns, weight.shape[1])

    def tiles(self) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
        """Slices of the vocabulary, with their rows of weight and bias."""
        for first in range(0, len(self.weight), self.columns):
            part = slice(first, min(first + self.columns, len(self.weight)))
            weight = self.weight[part]
            if weight.dtype != self.operand_dtype:
                weight = self._weight[: len(weight)].copy_(weight)
            bias = None if self.bias is None else self.bias[part].to(self.dtype).contiguous()
            yield part, weight, bias

    def tile(self, rows: slice, part: slice, weight: Tensor, bias: Tensor | None) -> Tile:
        hidden = self.hidden[rows]
        first = len(hidden) * part.start if self.whole else 0
        scores, operand = (_front(x[first:], hidden, weight) for x in (self.scores, self.operand))
        product(hidden, weight.t(), scores)
        return Tile(scores, operand, part.start, bias, self.targets[rows], self.settings)


def _front(buffer: Tensor, hidden: Tensor, weight: Tensor) -> Tensor:
    """The front of a buffer, as large as a tile of these tokens and rows of weight."""
    return buffer[: len(hidden) * len(weight)].view(len(hidden), len(weight))


def forward(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    settings: Settings,
    keep: int,
    kernel: ModuleType,
) -> Forward:
    """The results, with what a backward pass needs.

    `keep` is NOTHING, MEAN or MOMENTS. Each moment costs a product, and from them follows the
    gradient of a frozen head. The other results do not depend on it. `kernel` is `native`,
    `triton.logp` or `eager`.
    """
    head = Head(hidden, weight, targets, bias, settings)
    shape = head.hidden.shape
    first, second = (head.scores.new_zeros(shape) if keep > i else None for i in range(2))
    all_sums = Sums(start(head), first, second)
    buffer = torch.empty_like(head.operand) if keep == MOMENTS else None
    for part, w, b in head.tiles():
        for rows in head.rows:
            tile, sums = head.tile(rows, part, w, b), all_sums.of(rows)
            again = None if buffer is None else _front(buffer, tile.scores, w)
            kernel.logp_forward(tile, sums, again)
            if sums.first is not None:
                product(tile.operand, w, sums.first, beta=1)
            if sums.second is not None and again is not None:
                product(again, w, sums.second, beta=1)
    return results(all_sums, targets, settings, head.dtype)


def start(head: Head) -> Tensor:
    """The sums of no logits. They are set one by one, as copying a list would wait for a GPU."""
    dtype = torch.float64 if head.hidden.is_cpu else head.dtype
    sums = head.scores.new_zeros(len(head.hidden), 4, dtype=dtype)
    sums[:, 0] = -torch.inf
    sums[:, 3] = torch.nan
    return sums


def results(all_sums: Sums, targets: Tensor, s: Settings, dtype: torch.dtype) -> Forward:
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
    """The loss's derivatives by each result, [T]; None is zero."""

    logp: Tensor | None
    lse: Tensor | None
    entropy: Tensor | None

    def of_logits(self, counts: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """The `pick`, `share` and `tilt` [T] of the loss's gradient by a logit z, which is

            [target] pick + p (share - tilt (z - E[z]))

        from ``d logp/dz = [target] - p``, ``d lse/dz = p`` and ``d entropy/dz = -p (z - E[z])``.
        `counts` says which targets are not ignored.
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
    elif not hidden.is_cpu:  # a NaN in tokens without a gradient must not reach that of weight
        hidden = hidden.masked_fill((of_logits[:, 2:] == 0).all(1)[:, None], 0)
    head = Head(hidden, weight, targets, bias, settings)
    of_logits = F.pad(of_logits, (0, 0, 0, len(head.hidden) - len(of_logits)))
    scale = _scale(of_logits) if head.operand_dtype == torch.float16 else None
    for_hidden = head.scores.new_zeros(head.hidden.shape) if wanted[0] else None
    for_weight = weight.new_empty(weight.shape) if wanted[1] else None
    for_bias = weight.new_empty(len(weight), dtype=head.dtype) if wanted[2] else None
    apart = wanted[1] and weight.dtype != head.dtype
    if weight.dtype == head.operand_dtype and len(head.rows) == 1 and scale is None:
        apart = False  # there is one product for all tokens, and it is rounded once
    buffer = head.scores.new_empty(head.columns, weight.shape[1]) if apart else None
    for part, w, b in head.tiles():
        out = None
        if for_weight is not None:
            out = for_weight[part] if buffer is None else buffer[: len(w)]
        for i, rows in enumerate(head.rows):
            tile = head.tile(rows, part, w, b)
            kernel.logp_backward(tile, of_logits[rows])
            grad = tile.operand
            if for_hidden is not None:
                product(grad, w, for_hidden[rows], beta=1)
            if out is not None:
                product(grad.t(), head.hidden[rows], out, beta=min(i, 1))
            if for_bias is not None:
                for_bias[part] = grad.sum(0, dtype=head.dtype) + (for_bias[part] if i else 0)
        if for_weight is not None and buffer is not None and out is not None:
            for_weight[part] = out if scale is None else out.div_(scale)
    for x in (for_hidden, for_bias):
        if x is not None and scale is not None:
            x.div_(scale)
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


def _scale(of_logits: Tensor) -> Tensor:
    """Scales the largest coefficient to some 2^13, in place, and returns the factor, a power of 2.

    The gradients of a mean over thousands of tokens would be next to nothing in float16, whose
    largest number is 2^16.
    """
    coefficients = of_logits[:, 2:]
    largest = coefficients.abs().nan_to_num(0, 0).amax()
    scale = torch.exp2((2**13 / largest).log2().floor().clamp(-100, 100))
    coefficients.mul_(scale)
    return scale


def _used_rows(of_logits: Tensor) -> Tensor | None:
    """The tokens that have a gradient, as padding and prompts have none; None stands for all.

    On a GPU it is always None: to find out would wait for the device.
    """
    if not of_logits.is_cpu:
        return None
    used = (of_logits[:, 2:] != 0).any(1)
    return None if bool(used.all()) else used.nonzero().squeeze(1)


def frozen_backward(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    settings: Settings,
    normaliser: Tensor,
    mean: Tensor,
    covariance: Tensor | None,
    gradients: Gradients,
) -> tuple[Tensor, None, None]:
    """The gradient of hidden from a frozen head's moments, without a product."""
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
    return result.masked_fill_(without[:, None], 0).to(hidden.dtype), None, None
