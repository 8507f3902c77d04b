"""Means and covariances of states that come one batch after another, in memory that is bounded."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

EXACT = 4096  # the widest states whose covariance is exact
SKETCHED = 2048  # how many rows a covariance of wider states is cut down to
Z = 1.959964  # a normal distribution has 95 % of its mass within so many standard deviations


class Scatter:
    """``sum of outer(row, row)`` over rows that come in batches, as the product of few rows.

    Frequent Directions (Ghashami et al., 2016): once there are twice as many rows as are kept, they
    become that many with the same product less ``delta * I`` at most, `delta` being the first
    squared singular value that is left out. As many rows as the states are wide keep everything.

    Attributes:
        trace: of the whole sum, exact.
        error: how much larger an eigenvalue of the whole sum may be than that of what is kept; 0.0
            where nothing was left out.
    """

    def __init__(self, width: int, kept: int | None = None) -> None:
        self.kept = kept or (width if width <= EXACT else SKETCHED)
        self.trace = self.error = 0.0
        self._rows = torch.empty(0, width, dtype=torch.float64)
        self._new: list[Tensor] = []
        self._count = 0

    def add(self, rows: Tensor) -> None:
        """Take ``rows [n, width]``, float64 on the CPU."""
        self.trace += float(rows.square().sum())
        for part in rows.split(self.kept):
            self._new.append(part)
            self._count += len(part)
            if self._count >= 2 * self.kept:
                self._shrink()

    @property
    def rows(self) -> Tensor:
        """``[at most 2 * kept, width]``, whose outer products make up what is kept of the sum."""
        if self._new:
            self._rows = torch.cat([self._rows, *self._new])
            self._new = []
        return self._rows

    def _shrink(self) -> None:
        _, sizes, directions = torch.linalg.svd(self.rows, full_matrices=False)
        squares = sizes.square()
        delta = float(squares[self.kept]) if len(squares) > self.kept else 0.0
        sizes = (squares[: self.kept] - delta).clamp(min=0).sqrt()
        self._rows = sizes[:, None] * directions[: self.kept]
        self.error += delta
        self._count = len(self._rows)

    def largest(self) -> float:
        """The largest eigenvalue of what is kept; that of the whole is `error` above it at most."""
        rows = self.rows
        if not len(rows):
            return 0.0
        gram = rows @ rows.T if len(rows) < rows.shape[1] else rows.T @ rows
        return max(0.0, float(torch.linalg.eigvalsh(gram)[-1]))

    def along(self, direction: Tensor) -> float:
        """The sum's ``direction' sum direction``, or where it was cut down, what it is at most."""
        return float((self.rows @ direction).square().sum() + self.error * direction.square().sum())

    def inner(self, other: Scatter) -> float:
        """The trace of the product of what is kept of two sums."""
        a, b = self.rows, other.rows
        if max(len(a), len(b)) > a.shape[1]:
            return float(((a.T @ a) * (b.T @ b)).sum())
        return float((a @ b.T).square().sum())


class Moments:
    """Count, mean and covariance of states.

    The deviation of each state from the mean of those before it, times the root of ``k/(k + 1)``
    for k states before it, is a row of `scatter`: the sum of their outer products is that of the
    deviations from the mean of all (Welford, 1962).

    Attributes:
        mean: ``[width]`` float64.
        scatter: the sum of the outer products of the deviations from the mean.
    """

    def __init__(self, width: int, kept: int | None = None) -> None:
        self.n = 0
        self.mean = torch.zeros(width, dtype=torch.float64)
        self.scatter = Scatter(width, kept)

    def add(self, states: Tensor) -> None:
        """Take ``states [n, width]``, float64 on the CPU."""
        if not len(states):
            return
        before = self.n + torch.arange(len(states), dtype=torch.float64)[:, None]
        sums = self.n * self.mean + states.cumsum(dim=0)
        deviations = states - (sums - states) / before.clamp(min=1)
        self.scatter.add((deviations * (before / (before + 1)).sqrt())[int(self.n == 0) :])
        self.n += len(states)
        self.mean = sums[-1] / self.n

    @property
    def trace(self) -> float:
        """The covariance's trace; all covariances here divide by the number of states."""
        return self.scatter.trace / max(1, self.n)

    @property
    def concentration(self) -> tuple[float, float]:
        """What the covariance's largest eigenvalue is at least and at most; equal where exact."""
        least = self.scatter.largest()
        return least / max(1, self.n), (least + self.scatter.error) / max(1, self.n)

    def variance_along(self, direction: Tensor) -> float:
        """Of the states along a direction of any length; where sketched, what it is at most."""
        square = float(direction.square().sum())
        return self.scatter.along(direction) / (max(1, self.n) * square) if square else 0.0


class _Draws:
    """What the numbers of times that a sample's draws are there say of its mean and its scatter.

    With ``w_i = m_i / n`` for a draw that is there m_i times, the mean has the covariance C of the
    states times ``sum w_i²``. The scatter is ``n X' A X`` with ``A = diag(w) - ww'``, and C times
    ``n tr A`` on average; ``(tr A)² / tr A²`` are its degrees of freedom, one less than the draws
    where each is there as often.
    """

    def __init__(self, moments: Moments, times: Iterable[int] | None) -> None:
        self.moments = moments
        n = max(1, moments.n)
        # how many draws are there so many times
        counts = Counter({1: moments.n} if times is None else times)
        self.n = sum(counts.values())
        two, three = (sum(c * (m / n) ** k for m, c in counts.items()) for k in (2, 3))
        self.share = two
        self.left = n * (1 - two)
        self.freedom = (1 - two) ** 2 / (two - 2 * three + two**2) if self.n > 1 else 0.0

    @property
    def scale(self) -> float:
        """The covariance of the mean is so many times the scatter."""
        return self.share / self.left

    def square_trace(self) -> float:
        """An estimate of the trace of the states' covariance's square, no larger by chance.

        It is the unbiased one of normal states (Bai and Saranadasa, 1996), and no less than that of
        the most even spectrum.
        """
        scatter, f = self.moments.scatter, self.freedom
        square, trace = scatter.inner(scatter) / self.left**2, scatter.trace / self.left
        if self.n > 2:
            square = f**2 / ((f - 1) * (f + 2)) * (square - trace**2 / f)
        return max(square, trace**2 / len(self.moments.mean))


def interval(
    difference: Tensor,
    samples: Sequence[Moments],
    times: Sequence[Iterable[int]] | None = None,
) -> tuple[float, float]:
    """A 95 % interval of the length of what `difference` estimates.

    The square of a difference of means is too large by ``tr V`` on average, where V is the
    covariance of that difference: wide states and few of them look far apart by chance alone. What
    is left without it is about normal around the true square, with the variance
    ``4 d'V d + 2 tr V²`` (Chen and Qin, 2010), and all of these come from the moments. The interval
    has those lengths of d, along the direction that was found, from which what was found is within
    1.96 standard deviations.

    Args:
        difference: of means of independent samples, or the mean of one sample.
        samples: the moments of these.
        times: for each sample, how many times each of its draws is there; None: all are there once.

    Returns:
        Its ends; 0 and infinity where a sample has one draw, which says nothing of its spread.
    """
    of: Sequence[Iterable[int] | None] = times or [None] * len(samples)
    draws = [_Draws(moments, its) for moments, its in zip(samples, of, strict=True)]
    if min(draw.n for draw in draws) < 2:
        return 0.0, math.inf
    # V is the sum of the scatters times their scales
    each = [(draw.moments.scatter, draw.scale) for draw in draws]
    noise = sum(scale * scatter.trace for scatter, scale in each)
    along = sum(scale * scatter.along(difference) for scatter, scale in each)
    square = sum(draw.square_trace() * draw.share**2 for draw in draws)
    for i, (a, scale) in enumerate(each):
        square += sum(2 * scale * s * a.inner(b) for b, s in each[:i])
    length = float(difference.square().sum())
    centre, reach = length - noise, Z**2 * (2 * along / length if length else 0.0)
    # the ends are where (centre - square of the length)² is Z² times the variance there
    half = math.sqrt(max(0.0, reach**2 + 2 * reach * centre + 2 * Z**2 * square))
    low, high = (math.sqrt(max(0.0, centre + reach + side * half)) for side in (-1, 1))
    return low, high
