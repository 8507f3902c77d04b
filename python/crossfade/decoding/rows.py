"""The rows of a call: what each has written, and which of them are being decoded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..ops import BlendSample
from .mixer import Weights


class Results:
    """What every row has written, a column a token, on the device.

    A last row takes what is written for slots that have no row.
    """

    def __init__(
        self, rows: int, limit: int, terms: int, references: int, values: int, device: torch.device
    ) -> None:
        self.rows, self.limit = rows, limit
        real: Any = {"dtype": torch.float32, "device": device}
        size = (rows + 1, limit)  # on CPUs, zeros take no memory until they are written to
        self.tokens = torch.zeros(size, dtype=torch.int64, device=device)
        self.logprobs = torch.zeros(size, **real)
        self.sampled_logprobs = torch.zeros(size, **real)
        self.term_logprobs = torch.zeros(*size, terms, **real) if terms else None
        self.kl = torch.zeros(*size, references, **real) if references else None
        # of a search: a row's value, then its parts
        self.values = torch.full((rows + 1, values), float("nan"), **real)
        # of each row: new tokens that it may have
        self.limits = torch.full((rows + 1,), limit, dtype=torch.int64, device=device)
        self.lengths = torch.zeros(rows + 1, dtype=torch.int64, device=device)
        self.finished = torch.zeros(rows + 1, dtype=torch.bool, device=device)
        self.failed = torch.zeros(rows + 1, dtype=torch.bool, device=device)

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in vars(self).values() if isinstance(x, Tensor))

    def forget(self, rows: Tensor) -> None:
        """Rows that start again."""
        for x in (self.lengths, self.finished, self.failed):
            x[rows] = 0
        self.values[rows] = float("nan")

    def fork(self, source: Tensor, target: Tensor, longest: int) -> None:
        """Rows `target` become copies of rows `source`, which wrote at most `longest` tokens."""
        per_token = (self.tokens, self.logprobs, self.sampled_logprobs)
        for x in (*per_token, self.term_logprobs, self.kl):
            if x is not None:
                x[target, :longest] = x[source, :longest]
        for x in (self.values, self.lengths, self.finished, self.failed):
            x[target] = x[source]


class Slots:
    """Places where rows are decoded: buffers that stay where they are, for captured steps.

    Attributes:
        row: ``[slots]``: the row in each; the one past the last where there is none.
        tokens, new: ``[slots]``: the last token of each, and how many it has written.
        stop: ``[slots]``: new tokens at which each stops.
        live, wrote: ``[slots]``: whether each goes on, and whether the last step wrote a token.
        seeds, streams, weights, value_weights: of each slot's row.
        references: of each reference, its weights and its values' weights of each slot's row.
    """

    def __init__(
        self,
        count: int,
        results: Results,
        seeds: Tensor,
        streams: Tensor,
        weights: Weights,
        value_weights: Weights,
        chunk: int | None = None,
        references: Sequence[tuple[Weights, Weights]] = (),
    ) -> None:
        device = seeds.device
        self.results = results
        self.chunk = results.limit if chunk is None else min(chunk, results.limit)
        self.row = torch.full((count,), results.rows, dtype=torch.int64, device=device)
        self.tokens = torch.zeros(count, dtype=torch.int64, device=device)
        self.new = torch.zeros(count, dtype=torch.int64, device=device)
        self.stop = torch.zeros(count, dtype=torch.int64, device=device)
        self.live = torch.zeros(count, dtype=torch.bool, device=device)
        self.wrote = torch.zeros(count, dtype=torch.bool, device=device)
        self.per_row: list[tuple[Tensor, Tensor]] = []  # of all rows, and of the slots' rows
        self.seeds, self.streams = self._of_slots(seeds), self._of_slots(streams)
        self.weights, self.value_weights = self._of_slots(weights), self._of_slots(value_weights)
        self.references = [(self._of_slots(w), self._of_slots(v)) for w, v in references]

    def _of_slots(self, x: Any) -> Any:
        """A buffer for what the slots' rows have of a tensor ``[rows, ...]``; else `x` itself."""
        if not isinstance(x, Tensor):
            return x
        here = x.new_zeros(len(self.row), *x.shape[1:])
        self.per_row.append((x, here))
        return here

    def seat(self, slots: Sequence[int], rows: Sequence[int]) -> None:
        device = self.row.device
        at, row = torch.tensor(slots, device=device), torch.tensor(rows, device=device)
        self.row[at] = row
        self.new[at] = 0
        self.tokens[at] = 0
        self.stop[at] = self.results.limits[row].clamp(max=self.chunk)
        self.live[at] = True
        for values, here in self.per_row:
            here[at] = values[row]

    def write(self, sample: BlendSample, kl: Tensor | None, eos: Tensor) -> None:
        """Append a token to every live row; end those that cannot go on."""
        r = self.results
        ok = self.live & (sample.tokens >= 0)
        nowhere = torch.full_like(self.row, r.rows)
        row = torch.where(ok, self.row, nowhere)
        at = (row, self.new.clamp(max=r.limit - 1))
        r.tokens[at] = sample.tokens
        r.logprobs[at] = sample.logprobs
        r.sampled_logprobs[at] = sample.sampled_logprobs
        if r.term_logprobs is not None and sample.term_logprobs is not None:
            r.term_logprobs[at] = sample.term_logprobs
        if r.kl is not None and kl is not None:
            r.kl[at] = kl
        # index_fill_: to assign a number would copy it to the device, which no capture allows
        r.failed.index_fill_(0, torch.where(self.live & ~ok, self.row, nowhere), True)
        self.wrote.copy_(ok)
        self.new += ok
        r.lengths[row] = self.new
        ended = ok & (sample.tokens[:, None] == eos).any(dim=1)
        r.finished.index_fill_(0, torch.where(ended, self.row, nowhere), True)
        self.tokens.copy_(torch.where(ok, sample.tokens, self.tokens))
        self.live &= ok & ~ended & (self.new < self.stop)

    def end(self, which: Tensor) -> None:
        """Rows ``[slots]`` bool that a criterion ends."""
        nowhere = torch.full_like(self.row, self.results.rows)
        self.results.finished[torch.where(which, self.row, nowhere)] = True
        self.live &= ~which

    def fork(self, slots: Sequence[int], parents: Sequence[int], live: Sequence[bool]) -> None:
        """Slots' rows become what the rows of their parents are; those `live` begin a chunk."""
        device = self.row.device
        at, source = torch.tensor(slots, device=device), torch.tensor(parents, device=device)
        longest = int(self.new[source].max())
        self.results.fork(self.row[source], self.row[at], longest)
        self.tokens[at] = self.tokens[source]
        self.new[at] = self.new[source]
        limits = self.results.limits[self.row[at]]
        self.stop[at] = torch.minimum(self.new[at] + self.chunk, limits)
        self.live[at] = torch.tensor(live, device=device)
