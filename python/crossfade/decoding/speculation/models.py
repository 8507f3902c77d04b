"""Guesses of models: they draw with the noise that the blend draws with, ahead of it."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import torch

from ..engine.drafting import Drafting
from ..job import DRAW, Row
from ..mixer import Mixer
from ..rows import Slots
from .drafter import Guesses, Progress, before_end, ends_of, room
from .pace import Costs, Hope, best_size


class ModelDrafter:
    """Lets a blend guess. Its models read what rows have written, and what they guess, ahead.

    Where they rest, as guessing does not pay, they read what they owe when they are asked next.

    Attributes:
        read: of each slot, how many tokens of its row the models have read: the prompt's last one,
            then what was written.

    Args:
        mixer: of the blend that guesses, with the weights of the rows in slots.
        costs: what rounds have cost.
        length: guesses at a time; None: as many as pay.
    """

    def __init__(
        self,
        drafting: Drafting,
        mixer: Mixer,
        slots: Slots,
        costs: Costs,
        length: int | None,
    ) -> None:
        self.drafting, self.mixer, self.slots, self.length = drafting, mixer, slots, length
        self.costs = costs
        self.hope = Hope()
        self.read: dict[int, int] = {}
        self.ends: list[set[int]] = []
        self.progress = Progress(slots)
        # In the round under way: of each slot its guesses, and how many tokens its row had before.
        self.guessed: dict[int, tuple[list[int], int]] = {}

    def join(self, seated: Mapping[int, Row]) -> None:
        for slot in seated:
            self.read[slot] = self.progress.seen[slot] = 0
        self.ends = ends_of(self.slots)

    def fork(self, slots: Sequence[int], parents: Sequence[int]) -> None:
        for state in (self.read, self.progress.seen):
            kept = {p: state[p] for p in parents}
            state.update((s, kept[p]) for s, p in zip(slots, parents, strict=True))

    def guess(self, live: Sequence[int], *, refilled: bool) -> Guesses | None:
        left = room(self.slots)
        most = max(left[s] for s in live)
        count = min(self._count(len(live), most), most)
        if count == 0:
            return None
        begin = time.perf_counter()
        guesses = self._guess(live, count, left)
        if guesses is not None:
            self.costs.guesses.append((time.perf_counter() - begin) / count)
        return guesses

    def _count(self, rows: int, most: int) -> int:
        """How many tokens to guess."""
        if self.length is not None:
            return self.length
        yields = [self.hope.expected(most)] * rows
        count = best_size(yields, self.costs) - 1
        return self.hope.tries(count)

    def _guess(self, live: Sequence[int], count: int, left: Sequence[int]) -> Guesses | None:
        """So many guesses of each row, as far as it has room for them in its limit, as `left` says,
        and in the contexts of the models; None if no row has."""
        slots, drafting = self.slots, self.drafting
        new, written = slots.new.tolist(), slots.written["tokens"]
        # The last token of the prompt comes first; the models know it, each its own.
        owed = {
            s: [*[0][self.read[s] :], *written[s, max(self.read[s] - 1, 0) : new[s]].tolist()]
            for s in live
        }
        if drafting.shared:  # It has read what the others have.
            owed = {s: [int(slots.tokens[s])] for s in live}
        context = drafting.room()
        if context is not None:
            owed = {s: ids for s, ids in owed.items() if len(ids) <= context[s]}
            # The last guess is not read.
            left = [min(n, context[s] - len(owed.get(s, ())) + 1) for s, n in enumerate(left)]
        if not owed:
            return None
        width = max(map(len, owed.values()))
        fed = [[*owed.get(s, ()), *[0] * (width - len(owed.get(s, ())))] for s in range(len(new))]
        counts = torch.tensor([len(owed.get(s, ())) for s in range(len(new))], device=slots.device)
        draw = {name: slots.table[name] for name in DRAW}
        # Of a row's guesses, those that models read: not past its room, where it has no place.
        going = counts > 0
        reads = torch.tensor(left, device=slots.device) - int(not drafting.shared)
        tokens, logits = torch.tensor(fed, device=slots.device), []
        guesses, total = [], torch.zeros_like(counts)
        for i in range(count + drafting.shared):
            found = drafting.feed(tokens, counts)
            total += counts
            if drafting.shared:
                logits.append(found[0].clone())  # The next forward may write over it.
            if i < count:
                drawn = self.mixer.sample(found, {**draw, "step": slots.new + i}).tokens
                guesses.append(drawn)
                tokens, counts = drawn.clamp(min=0)[:, None], (going & (i < reads)).long()
        each = torch.stack(guesses, dim=1)
        if drafting.shared:  # `EngineRunner.verify` goes on from where the others are.
            drafting.take_back(total)
        rows = [row[:n] for row, n in zip(each.tolist(), left, strict=True)]
        self.guessed = {s: (rows[s], new[s]) for s in owed}
        kept = [
            len(before_end(row, self.ends[s])) if s in owed else 0 for s, row in enumerate(rows)
        ]
        return Guesses(each.clamp(min=0), kept, logits or None)

    def learn(self, live: Sequence[int]) -> None:
        written = self.progress.new(live)
        if not self.guessed:
            return
        back = [0] * len(self.slots.each)
        for slot, (guesses, before) in self.guessed.items():
            new = written[slot]
            pairs = enumerate(zip(guesses, new, strict=False))
            alike = next((i for i, (a, b) in pairs if a != b), min(len(guesses), len(new)))
            self.hope.learn(alike, min(alike + 1, len(guesses), len(new)))
            # It has read all guesses but the last. The row's last token is yet to be read.
            read, right = max(len(guesses) - 1, 0), min(alike, len(new) - 1)
            back[slot] = max(read - right, 0)
            self.read[slot] = 1 + before + read - back[slot]
        self.guessed = {}
        if not self.drafting.shared:
            self.drafting.take_back(torch.tensor(back, device=self.slots.device))
