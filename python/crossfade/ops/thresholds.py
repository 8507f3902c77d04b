"""Where rows are truncated whose vocabulary lies in parts: top-k, then top-p, then min-p.

Each part tells of its best tokens, which hold the threshold of most rows. Where they do not, a few
histograms find it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .noise import NEG_INF

CANDIDATES = 256  # the best tokens of a part, in which top-p looks for its threshold first
MOST_CANDIDATES = 1024  # top-k asks for as many as it keeps, up to this
DIGIT = 11  # bits of a key that a histogram tells of
BINS = 1 << DIGIT


class Cut(NamedTuple):
    """How each row is truncated, ``[B]`` on the device of the first part; in float64 but top_k."""

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor


class Thresholds:
    """Finds the thresholds of rows by rounds between the parts of their vocabulary.

    Args:
        gather: gives ``[N, ...]`` in float64, of all N parts, from what each part here has.
    """

    def __init__(self, gather: Callable[[Sequence[Tensor]], Tensor]) -> None:
        self.gather = gather

    def of(self, scores: list[Tensor], cut: Cut) -> tuple[Tensor, Tensor]:
        """Below which score ``[B]`` tokens are removed, and the log of the sum of e^s of all.

        That sum is not finite where scores are no distribution, and the threshold may be anything.
        """
        most = int(cut.top_k.amax()) if len(cut.top_k) else 0
        nucleus = bool((cut.top_p < 1).any())
        count = max(min(most, MOST_CANDIDATES), CANDIDATES if nucleus else 1)
        known = _Known(self.gather([_best(s, cut, count) for s in scores]), cut)
        least = known.least(cut)
        threshold, sure = known.threshold(cut, least)
        if not sure.all():
            threshold = torch.where(sure, threshold, self._searched(scores, cut, known))
        return torch.maximum(threshold, least), known.log_sum

    def _searched(self, scores: list[Tensor], cut: Cut, known: _Known) -> Tensor:
        """The threshold of top-k, then top-p, by histograms."""
        off, whole = cut.top_k == 0, cut.top_p >= 1
        threshold = torch.full_like(known.highest, NEG_INF)
        if not off.all():
            there = [(s > NEG_INF).double() for s in scores]
            threshold = self._search(scores, there, cut.top_k.double()).masked_fill(off, NEG_INF)
        if whole.all():
            return threshold
        masses = [known.share(s, cut) for s in scores]
        if not off.all():
            each = zip(masses, scores, strict=True)
            masses = [m.where(s >= _at(threshold, s), 0.0) for m, s in each]
        left = self.gather([m.sum(-1) for m in masses]).sum(0)
        least = torch.finfo(torch.float64).tiny  # top-p of 0 keeps the best token
        pth = self._search(scores, masses, (cut.top_p * left).clamp(min=least))
        return torch.maximum(threshold, pth.masked_fill(whole, NEG_INF))

    def _search(self, scores: list[Tensor], weights: list[Tensor], target: Tensor) -> Tensor:
        """The largest score ``[B]`` such that the weights of scores from it on reach the target;
        where all weights do not, the smallest score that has a weight.

        The key of a float32, which sorts as the numbers do, has 32 bits. Each round knows a digit
        more of the key that is sought, by a histogram of that digit.
        """
        keys = [_key(s) for s in scores]
        prefix, above = torch.full_like(target, -1, dtype=torch.int32), torch.zeros_like(target)
        for shift in (2 * DIGIT, DIGIT, 0):
            first = prefix * BINS  # of the keys' digits that are counted; -BINS in the first round
            if shift == 2 * DIGIT:
                first = first + BINS // 2
            histograms = [
                _histogram(k >> shift, w, first) for k, w in zip(keys, weights, strict=True)
            ]
            each = self.gather(histograms).sum(0)
            reached = each.flip(-1).cumsum(-1).flip(-1) + above[:, None]  # by this digit and above
            enough = reached >= target[:, None]
            nth = torch.arange(BINS, device=each.device)
            last = torch.where(enough, nth, -1).amax(-1)
            lowest = torch.where(each > 0, nth, BINS - 1).amin(-1)
            digit = torch.where(last >= 0, last, lowest)
            above = (reached - each).gather(1, digit[:, None])[:, 0]
            prefix = first + digit.int()
        return _of_key(prefix)


# ---- What a part tells of its own columns --------------------------------------------------------


def _at(x: Tensor, s: Tensor) -> Tensor:
    """A number of each row ``[B, 1]``, to be compared with scores."""
    return x.to(s.device, s.dtype)[:, None]


def _best(s: Tensor, cut: Cut, count: int) -> Tensor:
    """Of a part ``[B, 4 + count]``: the logs of its sums of e^x and of e^(x / temperature), where x
    is a score less the best one; its floor, how many tokens at the floor are not among the best,
    and these, the best first.

    The floor is the least of the best, or -inf where all tokens are among these.
    """
    rows, columns = s.shape
    some = min(count, columns)
    best = s.topk(some, dim=-1).values
    floor = best[:, -1] if some < columns else best.new_full((rows,), NEG_INF)
    at_least = (s >= floor[:, None]).count_nonzero(-1)
    left_out = torch.where(floor > NEG_INF, at_least - some, 0)
    x = s - _finite(best[:, :1])
    log_sum = x.exp().sum(-1).log()
    log_mass = x.div_(_at(cut.temperature, s)).exp_().sum(-1).log()
    best = torch.nn.functional.pad(best, (0, count - some), value=NEG_INF)
    told = torch.stack([log_sum, log_mass, floor, left_out], dim=1)
    return torch.cat([told, best], dim=1)


class _Known:
    """What the best tokens of all parts ``[N, B, 4 + count]`` tell of their rows.

    All tokens above the floor are among them. Of those at the floor, `left_out` are not.
    """

    def __init__(self, told: Tensor, cut: Cut) -> None:
        log_sum, log_mass, floor, left_out, first = told[..., :5].unbind(-1)
        self.floor = floor.amax(0)
        self.left_out = left_out.where(floor == self.floor, 0.0).sum(0)
        best = told[..., 4:].transpose(0, 1).flatten(1)
        self.best = best.sort(dim=-1, descending=True).values
        self.highest = _finite(self.best[:, 0])
        below = first - self.highest  # how far the best of a part is below the best of all
        self.log_mass = _finite((below / cut.temperature + log_mass).logsumexp(0))
        self.log_sum = self.highest + (below + log_sum).logsumexp(0)
        odd = log_sum.isnan() | (log_sum == float("inf"))  # of a part with NaN or +inf
        self.log_sum = self.log_sum.masked_fill(odd.any(0), float("nan"))

    def share(self, s: Tensor, cut: Cut) -> Tensor:
        """The share of tokens ``[B, n]`` in the mass of their row, in float64."""
        x = (s - _at(self.highest, s)).div_(_at(cut.temperature, s))
        return x.sub_(_at(self.log_mass, s)).exp_().double()

    def threshold(self, cut: Cut, least: Tensor) -> tuple[Tensor, Tensor]:
        """That of top-k, then top-p, as far as these tokens tell, and whether they do.

        A threshold of which they do not tell is at most the floor. Where min-p removes all below
        `least`, and that is at the floor or above, they need not tell.
        """
        best, count = self.best, self.best.shape[1]
        off = cut.top_k == 0
        kth = best.gather(1, (cut.top_k - 1).clamp(0, count - 1)[:, None])[:, 0]
        kth = kth.masked_fill(off | (cut.top_k > count), NEG_INF)
        all_known, ranked = self.floor == NEG_INF, ~off & (kth >= self.floor)

        share = self.share(best, cut).where(best >= kth[:, None], 0.0)
        at_floor = self.share(self.floor[:, None], cut)[:, 0]
        left = share.sum(-1) + (self.left_out * at_floor).where(kth == self.floor, 0.0)
        target = cut.top_p * left.masked_fill(off & ~all_known, 1.0)
        reached = share.cumsum(-1)
        inside = reached - share < target[:, None]  # by what sorts higher
        inside[:, 0] = True  # the best token stays, whatever top_p is
        last = inside.long().cumprod(-1).sum(-1, keepdim=True) - 1
        pth = best.gather(1, last)[:, 0]
        found = (pth >= self.floor) & (reached.gather(1, last)[:, 0] >= target)
        whole = cut.top_p >= 1
        sure = all_known | self.log_sum.isnan() | (off | ranked) & (whole | ranked | found)
        return torch.maximum(kth, pth.masked_fill(whole, NEG_INF)), sure | (least >= self.floor)

    def least(self, cut: Cut) -> Tensor:
        """The lowest score that min-p keeps."""
        return self.best[:, 0] + cut.temperature * cut.min_p.log()


def log_sum(z: Tensor) -> Tensor:
    """log sum e^z of each row: of float32 numbers in float64, which rounds no large one."""
    top = _finite(z.amax(-1))
    return top.double() + (z - top[:, None]).exp_().sum(-1).log()


def _finite(x: Tensor) -> Tensor:
    return x.where(x.isfinite(), 0.0)


def _key(s: Tensor) -> Tensor:
    """Integers of 32 bits that sort as float32 numbers do; -0 and +0 have one."""
    return _swapped((s + 0.0).view(torch.int32))


def _of_key(key: Tensor) -> Tensor:
    return _swapped(key).view(torch.float32).double()


def _swapped(bits: Tensor) -> Tensor:
    """Bits of float32 numbers as keys, and keys as bits: those below 0 have the other order."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _histogram(digits: Tensor, weights: Tensor, first: Tensor) -> Tensor:
    """The weights ``[B, BINS]`` of the digits from each row's `first` on."""
    # Digits below these are counted before them, and those above after them.
    at = (digits - (first.to(digits.device) - 1)[:, None]).clamp_(0, BINS + 1)
    histogram = weights.new_zeros(len(weights), BINS + 2)
    return histogram.scatter_add_(1, at.long(), weights)[:, 1:-1]
