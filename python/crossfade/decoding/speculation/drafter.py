"""What a loop needs of whatever guesses tokens, and the texts that do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from ..job import Row
from ..rows import Slots
from .lookup import Lookup
from .pace import SIZES, Chances, Costs, best_size


@dataclass
class Guesses:
    """What is guessed of the next tokens of all rows.

    Attributes:
        tokens: ``[slots, n]`` int64. What a row has no guess for means nothing.
        counts: of each slot, how many of its tokens are guesses.
        logits: ``[slots, V]`` after the last token and after each guess, of the term that guessed
            and has read them; None if none has.
    """

    tokens: Tensor
    counts: list[int]
    logits: Sequence[Tensor] | None = None


class Drafter(Protocol):
    """Guesses the next tokens of rows in slots."""

    costs: Costs

    def join(self, seated: Mapping[int, Row]) -> None:
        """Rows have taken slots, and write from now on."""

    def fork(self, slots: Sequence[int], parents: Sequence[int]) -> None:
        """Slot ``slots[i]`` becomes what slot ``parents[i]`` is."""

    def guess(self, live: Sequence[int], *, refilled: bool) -> Guesses | None:
        """Guess tokens of the rows in these slots; None: a plain step pays more.

        Args:
            refilled: whether other rows take the places of those that end.
        """

    def learn(self, live: Sequence[int]) -> None:
        """The rows in these slots have written tokens since they were asked about."""


def room(slots: Slots) -> list[int]:
    """Of each slot, how many guesses are of use: a row's last token is read by nobody."""
    return (slots.stop_at - slots.new - 1).clamp(min=0).tolist()


def before_end(tokens: Sequence[int], ends: set[int]) -> list[int]:
    """Guesses up to the first that would end a row, or that is none."""
    stop = next((i for i, t in enumerate(tokens) if t in ends or t < 0), len(tokens))
    return list(tokens[:stop])


def ends_of(slots: Slots) -> list[set[int]]:
    """Of each slot, the tokens that end its row."""
    return [set(ids) for ids in slots.table["eos"].tolist()]


@dataclass
class Progress:
    """How far rows had come when they were last looked at."""

    slots: Slots
    seen: dict[int, int] = field(default_factory=dict)

    def new(self, live: Sequence[int]) -> dict[int, list[int]]:
        """What each of these slots' rows has written since this was last called."""
        now = self.slots.new.tolist()
        tokens = self.slots.written["tokens"]
        found = {s: tokens[s, self.seen.get(s, 0) : now[s]].tolist() for s in live}
        self.seen.update((s, now[s]) for s in live)
        return found


class TextDrafter:
    """Looks guesses up in texts: those of a row's request, or its prompts and what it has written.

    Guesses cost nothing, so that they are compared with what is drawn in plain steps as well.

    Args:
        costs: what rounds have cost.
        length: guesses at a time; None: as many as pay.
        given: whether texts are given that rows are said to repeat.
    """

    def __init__(
        self, slots: Slots, costs: Costs, length: int | None, *, given: bool = False
    ) -> None:
        self.slots, self.length = slots, length
        self.lookups: dict[int, Lookup] = {}
        self.chances = Chances(given=given)
        self.costs = costs
        self.progress = Progress(slots)
        self.ends: list[set[int]] = []

    def join(self, seated: Mapping[int, Row]) -> None:
        for slot, row in seated.items():
            draft = row.job.draft
            assert draft is not None
            if draft.texts is None:
                first, *others = row.prompt_ids
                distinct = dict.fromkeys(tuple(ids) for ids in others if list(ids) != list(first))
                self.lookups[slot] = Lookup([list(ids) for ids in distinct], list(first))
            else:
                self.lookups[slot] = Lookup([draft.texts[row.request]])
            self.progress.seen[slot] = 0
        self.ends = ends_of(self.slots)

    def fork(self, slots: Sequence[int], parents: Sequence[int]) -> None:
        kept = {p: (self.lookups[p], self.progress.seen[p]) for p in parents}
        for slot, parent in zip(slots, parents, strict=True):
            lookup, self.progress.seen[slot] = kept[parent]
            self.lookups[slot] = lookup if slot == parent else lookup.copy()

    def guess(self, live: Sequence[int], *, refilled: bool) -> Guesses | None:
        left = room(self.slots)
        most = max(self.costs.sizes) - 1 if self.length is None else self.length
        each = {
            s: before_end(self.lookups[s].guesses(min(most, left[s])), self.ends[s]) for s in live
        }
        if self.length is None:
            yields = [
                self.chances.expected(self.lookups[s].matched, len(found))
                for s, found in each.items()
            ]
            most_left = None if refilled else [left[s] + 1 for s in each]
            count = best_size(yields, self.costs, most_left) - 1
        else:
            longest = max(map(len, each.values()))
            enough = next((n for n in SIZES if n > longest), self.length + 1) - 1
            count = min(enough, self.length) if longest else 0
        if count == 0:
            return None
        rows = [each.get(s, [])[:count] for s in range(len(left))]
        padded = [[*found, *[0] * (count - len(found))] for found in rows]
        return Guesses(torch.tensor(padded, device=self.slots.device), list(map(len, rows)))

    def learn(self, live: Sequence[int]) -> None:
        for slot, tokens in self.progress.new(live).items():
            lookup = self.lookups[slot]
            for token in tokens:
                matched = lookup.matched
                hit = lookup.write(token)
                if hit is not None:
                    self.chances.learn(matched, hit)
