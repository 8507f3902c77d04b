"""A particle filter as a search: rows are resampled by their weights, and keep these."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ... import ops
from ...search import Search
from ..output import Filtered
from .loop import SearchLoop

LARGEST = 1e300  # what an infinite value counts as, so that differences of values are numbers
# A slot's first stream is below 2^42, the request's number and `MOST_ROWS` slots; above are its
# others.
FIRST_STREAMS, STREAMS = 42, 1 << 21


def normalised(log_weights: Tensor) -> Tensor:
    """Weights ``[n]`` that sum to 1. Where all are 0, all are the same."""
    if not bool((log_weights > -torch.inf).any()):
        return torch.full_like(log_weights, 1 / len(log_weights))
    return log_weights.softmax(dim=0)


def effective_size(weights: Tensor) -> float:
    """``1 / sum_i w_i^2`` of weights that sum to 1: of how many equal rows they are worth."""
    return float(1 / weights.square().sum())


def resampled(weights: Tensor, u: float) -> list[int]:
    """The parent of each slot by systematic resampling: slot i is chosen floor or ceil of ``n w_i``
    times, and in the mean over `u`, uniform within [0, 1), ``n w_i`` times.

    A row that is chosen stays in its slot. Its copies take the slots of those that are not.
    """
    n = len(weights)
    steps = weights.cumsum(dim=0)
    at = (torch.arange(n, dtype=torch.float64, device="cpu") + u) / n
    chosen = torch.searchsorted(steps / steps[-1], at, right=True).clamp(max=n - 1)
    counts = torch.bincount(chosen, minlength=n).tolist()
    copies = iter([i for i, count in enumerate(counts) for _ in range(count - 1)])
    return [i if count else next(copies) for i, count in enumerate(counts)]


class ParticleLoop(SearchLoop):
    """Decodes the particles of a request in neighbouring slots, and resamples them at boundaries.

    Attributes:
        bases: ``[slots]`` float64: the value from whose rise each row's weight follows: that which
            it had when its request's rows were resampled last, or 0.
        sizes: of the first slot of each group under way, the effective sample sizes so far.
    """

    def __init__(self, *arguments: Any, **others: Any) -> None:
        super().__init__(*arguments, **others)
        self.bases = torch.zeros_like(self.totals)
        self.sizes: dict[int, list[float]] = {}

    def _occupy(self, seated: dict[int, Any]) -> None:
        for slot in seated:
            self.bases[slot] = 0.0
            if slot % self.size == 0:
                self.sizes[slot // self.size] = []
        super()._occupy(seated)

    def _kept(
        self,
        groups: Sequence[int],
        settings: Search,
        scores: Tensor,
        ended: Tensor,
        last: bool,
    ) -> tuple[Tensor, Tensor]:
        order = ops.chunk_select(scores, torch.zeros_like(ended), settings.rows).tolist()
        parents: list[list[int]] = []
        over: list[list[bool]] = []
        for i, g in enumerate(groups):
            found, is_over = self._filter(g, settings, scores[i], ended[i], last, order[i])
            parents.append(found)
            over.append([is_over])
        return torch.tensor(parents, device="cpu"), torch.tensor(over, device="cpu")

    def _filter(
        self,
        group: int,
        settings: Any,
        scores: Tensor,
        ended: Tensor,
        last: bool,
        order: list[int],
    ) -> tuple[list[int], bool]:
        """What becomes of the rows of one group: the parents of its slots, and whether it is over.

        Args:
            order: the places of the rows, that with the highest value first.
        """
        n = settings.rows
        here = slice(group * self.size, group * self.size + n)
        values = self.totals[here].nan_to_num(nan=-torch.inf, posinf=LARGEST, neginf=-torch.inf)
        values = values.masked_fill(scores == -torch.inf, -torch.inf)
        rises = (values - self.bases[here]) / settings.temperature
        weights = normalised(rises.clamp(max=LARGEST))
        size, sizes = effective_size(weights), self.sizes[group]
        sizes.append(size)
        parents, over = list(range(n)), last or bool(ended.all())
        if not over and size < settings.resample_below * n:
            parents = resampled(weights, self._uniform(group))
            weights = torch.full_like(weights, 1 / n)
            self.bases[here] = values[parents].nan_to_num(neginf=0.0)
            over = bool(ended[parents].all())
        if over:
            ranks = {row: rank for rank, row in enumerate(order)}
            by_value = sorted(range(n), key=lambda slot: ranks[parents[slot]])
            parents, weights = [parents[slot] for slot in by_value], weights[by_value]
            outcome = Filtered(weights.tolist(), sizes)
            for slot in range(here.start, here.stop):
                self.slots.outcomes[slot] = outcome
        else:
            self._new_streams(here.start, parents)
        return parents, over

    def _uniform(self, group: int) -> float:
        """The number that resamples a group's rows at this boundary, from its own seed and stream.

        Python promises the same `random.random` in all its versions.
        """
        row = self.seated[group * self.size]
        boundary = len(self.sizes[group])
        return random.Random(f"{row.value('seed')} {row.value('stream')} {boundary}").random()

    def _new_streams(self, first: int, parents: Sequence[int]) -> None:
        """Let copies draw from streams that no row has drawn from.

        The row that a copy replaces may have drawn more tokens than its new parent, and its noise
        decided that it was replaced.
        """
        copies = [first + i for i, p in enumerate(parents) if p != i]
        boundary = len(self.sizes[first // self.size]) % STREAMS
        streams = [
            int(self.seated[slot].value("stream")) + (boundary << FIRST_STREAMS) for slot in copies
        ]
        self.slots.change(copies, "stream", torch.tensor(streams, device="cpu"))
