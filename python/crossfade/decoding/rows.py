"""The places where rows are decoded, and what each row has written there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..ops import BlendSample
from .job import Job, Row
from .output import Filtered, Played

if TYPE_CHECKING:
    from ..blends.blend import Blend

AHEAD = 256  # the tokens of a row that there is room for at first, at most

# What is kept of every token: by its name, the shape of it and its dtype.
Kept = dict[str, tuple[tuple[int, ...], torch.dtype]]
# What a search knows of a request when it is over, besides values.
Outcome = Played | Filtered


def kept(
    terms: int, references: int, *, entropies: bool = False, tops: int = 0, pushes: int = 0
) -> Kept:
    """What is kept of a token, with the log-probs of so many terms and so many divergences, the
    entropy of what it was drawn from if that is wanted, so many of the best tokens there, and so
    many pushes."""
    one: tuple[int, ...] = ()
    found: Kept = {
        "tokens": (one, torch.int64),
        "logprobs": (one, torch.float32),
        "sampled_logprobs": (one, torch.float32),
    }
    if terms:
        found["term_logprobs"] = ((terms,), torch.float32)
    if references:
        found["kl"] = ((references,), torch.float32)
    if entropies:
        found["entropies"] = (one, torch.float32)
    if tops:
        found["top_tokens"] = ((tops,), torch.int64)
        found["top_logprobs"] = ((tops,), torch.float32)
    if pushes:
        found["pushes"] = ((pushes,), torch.float32)
    return found


def kept_of(blend: Blend, job: Job) -> Kept:
    """What is kept of every token of the rows of a job, which decodes a blend."""
    terms, search = len(blend.terms), job.search
    others = len(blend.values) + len(blend.classifier_names)
    return kept(
        terms * job.term_logprobs,
        len(job.references),
        entropies=search is not None and search.settings.most_entropy is not None,
        tops=job.tops,
        pushes=(terms + others) * job.pushes,
    )


@dataclass(frozen=True, eq=False)
class Written:
    """What a row had written when it left its place.

    Attributes:
        block: ``[rows, tokens, ...]`` of each name that `kept` gives, for all rows that left at the
            same time. Past a row's own length it holds anything.
        place: the row's place in the block.
        length: how many tokens the row has.
        values: ``[value_size]``: in a search, the row's value, then the parts of this.
        finished, failed: as in `Output`.
        ended: whether the row is done: finished, failed or at its limit. False if it was cut.
        outcome: what the search knows of the row's request, if it is one that knows more.
        guessed: how many of its tokens a draft had guessed.
    """

    row: Row
    block: Mapping[str, Tensor]
    place: int
    length: int
    values: Tensor
    finished: bool = False
    failed: bool = False
    ended: bool = False
    outcome: Outcome | None = None
    guessed: int = 0

    def __len__(self) -> int:
        return self.length

    @property
    def columns(self) -> dict[str, Tensor]:
        """``[tokens, ...]`` of each name: what the row alone has written."""
        return {name: x[self.place, : self.length] for name, x in self.block.items()}

    @property
    def ids(self) -> list[int]:
        return self.block["tokens"][self.place, : self.length].tolist()


def unwritten(
    row: Row, kinds: Kept, value_size: int, device: torch.device, *, failed: bool = False
) -> Written:
    """What is given of a row that never had a place; `failed` if it cannot be decoded at all."""
    block = {
        name: torch.zeros(1, 0, *shape, dtype=dtype, device=device)
        for name, (shape, dtype) in kinds.items()
    }
    values = torch.full((value_size,), float("nan"), dtype=torch.float32, device=device)
    return Written(row, block, 0, 0, values, failed=failed, ended=failed)


def column(rows: Sequence[Written], name: str, fill: float = 0.0) -> Tensor | None:
    """``[rows, tokens, ...]``: what rows have written, `fill` past their ends; None if not kept."""
    if name not in rows[0].block:
        return None
    if len(rows) == 1:
        (row,) = rows  # A copy of its own, apart from what others wrote beside it.
        return row.block[name][None, row.place, : row.length].clone()
    longest = max(map(len, rows))
    blocks: dict[int, tuple[Tensor, list[int], list[int]]] = {}
    for i, row in enumerate(rows):
        block, at, places = blocks.setdefault(id(row.block), (row.block[name], [], []))
        at.append(i)
        places.append(row.place)
    found = rows[0].block[name].new_empty(len(rows), longest, *block.shape[2:])
    for block, at, places in blocks.values():
        width = min(longest, block.shape[1])
        found[at, :width] = block[places, :width]
    lengths = torch.tensor([len(row) for row in rows], device=found.device)
    past = torch.arange(longest, device=found.device) >= lengths[:, None]
    return found.masked_fill_(past.view(*past.shape, *[1] * (found.dim() - 2)), fill)


class Slots:
    """Places where rows are decoded. Their buffers stay where they are, for captured steps.

    Attributes:
        tokens, new: ``[slots]``: the last token of each row, and how many it has written.
        limits: ``[slots]``: how many new tokens each row may have.
        stop_at: ``[slots]``: the number of new tokens at which each row stops: the end of its
            chunk, or its limit.
        live, wrote: ``[slots]``: whether each row goes on, and whether the last step wrote a token.
        finished, failed: ``[slots]``, as in `Output`.
        table: as in `Job`, with ``[slots, ...]`` in place of ``[rows, ...]``.
        each: ``[slots]``: the numbers of the slots, from 0 on.
        heads: ``[slots, heads]`` float32: what value heads say of each row that rides with them: a
            Q-head of the text with the last token that was written, a scalar head of the text that
            the last step fed.
        of_fed: ``[heads]`` bool: which of them are scalar heads.
        capacity: the tokens of a row that the buffers have room for.
        written: ``[slots, capacity + 1, ...]`` of each name in `kinds`. The last column takes what
            is drawn for slots that write nothing.
        values: ``[slots, value_size]``: in a search, each row's value, then the parts of this.
        outcomes: of each slot, what a search knows of its row's request.
        begun: ``[slots]``: how many tokens each row had when its chunk began.
        guessed: ``[slots]``: how many tokens of each row a draft had guessed.
        waited: how often a chunk ended by the entropy: each time, a token that was read is read
            again when the row goes on.

    Args:
        count: how many slots there are.
        table: that of one job. The jobs of other rows have tensors of the same names.
        kinds: what `kept` gives.
        value_size: how many numbers `values` has of each row: 1 and one for each part of the value,
            or 0 where there is no search.
        limit: new tokens that any row may have, as far as it is known.
        chunk: tokens after which a row waits until `fork` lets it go on; None: it never waits.
        most_entropy: nats. Before a token whose distribution has a higher entropy a row waits too,
            if its chunk has a token; None: it does not.
    """

    def __init__(
        self,
        count: int,
        table: Mapping[str, Any],
        kinds: Kept,
        value_size: int,
        limit: int,
        device: torch.device,
        chunk: int | None = None,
        most_entropy: float | None = None,
    ) -> None:
        self.most_entropy = most_entropy
        self.kinds, self.chunk, self.device = kinds, chunk, device
        self.tokens = torch.zeros(count, dtype=torch.int64, device=device)
        self.new = torch.zeros_like(self.tokens)
        self.stop_at = torch.zeros_like(self.tokens)
        self.begun = torch.zeros_like(self.tokens)
        self.guessed = torch.zeros_like(self.tokens)
        self.waited = torch.zeros((), dtype=torch.int64, device=device)
        self.limits = torch.zeros_like(self.tokens)
        self.live = torch.zeros(count, dtype=torch.bool, device=device)
        self.wrote = torch.zeros_like(self.live)
        self.finished = torch.zeros_like(self.live)
        self.failed = torch.zeros_like(self.live)
        self.table: dict[str, Any] = {
            name: x.new_zeros(count, *x.shape[1:], device=device) if isinstance(x, Tensor) else x
            for name, x in table.items()
            if name != "limit"
        }
        self.each = torch.arange(count, device=device)
        self.values = torch.full(
            (count, value_size), float("nan"), dtype=torch.float32, device=device
        )
        self.keep_heads([])
        self.capacity = min(limit, AHEAD)
        self.outcomes: list[Outcome | None] = [None] * count
        self.bound = 0  # No slot has written more tokens, as far as the host knows.
        self.written = self._buffers(self.capacity)

    def _buffers(self, capacity: int) -> dict[str, Tensor]:
        # On CPUs, zeros take memory only when they are written to.
        count, device = len(self.each), self.device
        return {
            name: torch.zeros(count, capacity + 1, *shape, dtype=dtype, device=device)
            for name, (shape, dtype) in self.kinds.items()
        }

    def keep_heads(self, of_fed: Sequence[bool]) -> None:
        """Keep what these value heads say from the next step on; see `of_fed`."""
        self.of_fed = torch.tensor(of_fed, dtype=torch.bool, device=self.device)
        shape = len(self.each), len(of_fed)
        self.heads = torch.full(shape, float("nan"), dtype=torch.float32, device=self.device)

    def reserve(self, tokens: int = 1) -> bool:
        """The host's part of a step: make room for so many more tokens of each row.

        Returns:
            Whether the buffers moved.
        """
        self.bound += tokens
        if self.bound <= self.capacity:
            return False
        self.bound = int(self.new.max()) + tokens
        if self.bound <= self.capacity:
            return False
        old, capacity = self.written, max(2 * self.capacity, self.bound)
        self.written = self._buffers(capacity)
        for name, buffer in old.items():
            self.written[name][:, : self.capacity] = buffer[:, : self.capacity]
        self.capacity = capacity
        return True

    def nothing(self, row: Row) -> Written:
        """What is given of a row that leaves before it has had a slot."""
        return unwritten(row, self.kinds, self.values.shape[1], self.device)

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + sum(x.nbytes for x in self.written.values())

    def seat(self, slots: Sequence[int], rows: Sequence[Row]) -> None:
        """Give slots to rows. They do not write before `start`."""
        at = torch.tensor(slots, device=self.device)
        limits = torch.tensor([row.limit for row in rows], device=self.device)
        self.limits[at] = limits
        self.stop_at[at] = limits if self.chunk is None else limits.clamp(max=self.chunk)
        counts = self.tokens, self.new, self.begun, self.guessed
        for state in (*counts, self.finished, self.failed):
            state[at] = 0
        self.values[at] = float("nan")
        for slot in slots:
            self.outcomes[slot] = None
        by_job: dict[Job, tuple[list[int], list[int]]] = {}
        for slot, row in zip(slots, rows, strict=True):
            here, there = by_job.setdefault(row.job, ([], []))
            here.append(slot)
            there.append(row.index)
        for job, (here, there) in by_job.items():
            for name, mine in self.table.items():
                if isinstance(mine, Tensor):
                    of_job = torch.as_tensor(job.table[name], device=mine.device)
                    mine[here] = (of_job[there] if of_job.dim() else of_job).to(mine.dtype)

    def start(self, slots: Sequence[int]) -> None:
        """Let these rows, whose prompts have been read, write from the next step on."""
        if slots:
            self.live[torch.tensor(slots, device=self.device)] = True

    def write(
        self,
        sample: BlendSample,
        columns: Mapping[str, Tensor],
        heads: Tensor | None = None,
    ) -> Tensor | None:
        """Append a token to every live row, and end the rows that cannot go on.

        Args:
            columns: ``[slots, ...]``: what else `kinds` has of a token, by name. With "entropies",
                those of what the tokens were drawn from, chunks may end by them.
            heads: ``[slots, heads]``: what value heads say after the step, if there are any.

        Returns:
            ``[slots]`` bool: the rows whose chunks ended before their tokens, which were not
            written; None where chunks do not end by the entropy.
        """
        live, waits, entropies = self.live, None, columns.get("entropies")
        if entropies is not None and self.most_entropy is not None:
            waits = live & (self.new > self.begun) & (entropies > self.most_entropy)
            live = live & ~waits
            self.waited += waits.sum()
        ok = live & (sample.tokens >= 0)
        at = (self.each, torch.where(ok, self.new, self.capacity))
        self.written["tokens"][at] = sample.tokens
        self.written["logprobs"][at] = sample.logprobs
        self.written["sampled_logprobs"][at] = sample.sampled_logprobs
        if sample.term_logprobs is not None and "term_logprobs" in self.written:
            self.written["term_logprobs"][at] = sample.term_logprobs
        if sample.pushes is not None and "pushes" in self.written:
            self.written["pushes"][at] = sample.pushes
        for name, x in columns.items():
            self.written[name][at] = x
        if heads is not None:
            self.heads.copy_(torch.where(ok[:, None] | self.of_fed, heads, self.heads))
        self.failed |= live & ~ok
        self.wrote.copy_(ok)
        self.new += ok
        hit_eos = ok & (sample.tokens[:, None] == self.table["eos"]).any(dim=1)
        self.finished |= hit_eos
        self.tokens.copy_(torch.where(ok, sample.tokens, self.tokens))
        self.live &= ok & ~hit_eos & (self.new < self.stop_at)
        return waits

    def finish(self, which: Tensor) -> None:
        """End the rows that a criterion ends: `which` is ``[slots]`` bool."""
        self.finished |= which
        self.live &= ~which

    def fork(self, slots: Sequence[int], parents: Sequence[int], live: Sequence[bool]) -> None:
        """Slot ``slots[i]`` gets what slot ``parents[i]`` has; its row goes on if ``live[i]``."""
        at = torch.tensor(slots, device=self.device)
        source = torch.tensor(parents, device=self.device)
        longest = int(self.new[source].max())
        for x in self.written.values():
            x[at, :longest] = x[source, :longest]
        states = self.finished, self.failed, self.tokens, self.new, self.guessed
        for x in (self.values, self.heads, *states):
            x[at] = x[source]
        self.begun[at] = self.new[at]
        limits = self.limits[at]
        chunk = limits if self.chunk is None else self.new[at] + self.chunk
        self.stop_at[at] = torch.minimum(chunk, limits)
        self.live[at] = torch.tensor(live, device=self.device)

    def take(self, seated: Mapping[int, Row], *, cut: bool = False) -> list[Written]:
        """Take rows out of their slots, and give what they have written.

        Args:
            cut: whether the rows are taken before they are done.
        """
        if not seated:
            return []
        at = torch.tensor([*seated], device=self.device)
        self.live[at] = False
        lengths, finished, failed, guessed = torch.stack(
            [x[at].long() for x in (self.new, self.finished, self.failed, self.guessed)]
        ).tolist()
        longest = max(lengths)
        # These are copies, as the slots go to other rows.
        block = {name: x[at, :longest] for name, x in self.written.items()}
        values = self.values[at]
        written = [
            Written(
                row,
                block,
                i,
                lengths[i],
                values[i],
                bool(finished[i]),
                bool(failed[i]),
                not cut,
                self.outcomes[slot],
                guessed[i],
            )
            for i, (slot, row) in enumerate(seated.items())
        ]
        self.new[at] = 0  # What is gone needs no room any more.
        return written

    def change(self, slots: Sequence[int], name: str, value: Tensor) -> None:
        """Put another value into the table for some rows, from their next token on.

        Raises:
            ValueError: the table has one value of that name for all rows.
        """
        here = self.table[name]
        if not isinstance(here, Tensor):
            raise ValueError(f"{name} is {here!r} for all rows; a row has no value of its own")
        if slots:
            here[torch.tensor(slots, device=self.device)] = value.to(here)
