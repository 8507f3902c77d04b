"""Fewer reads of guides: under a support, most rows need few columns of them, or none at all."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ... import ops
from ...ops import Support
from .group import Group

FEW = 8  # a head's columns are computed alone where they are fewer than one in so many


class Lazy:
    """A plan under a support: its term's model reads every token, the others when they are needed.

    With a support, a token outside it has probability 0 whatever the guides say; where one token
    is left, they have no say. So guides compute the surviving columns of their heads, and rest
    while every row has one survivor; they read what they skipped in one pass when they are next
    asked. The distribution is the same. The host chooses at every step.
    """

    def __init__(
        self,
        groups: Sequence[Group],
        support: Support,
        vocabulary: int,
        *,
        restrict: bool,
        skip: bool,
    ) -> None:
        self.first = next(g for g in groups if support.term in g.terms)
        self.stepped = [self.first]
        self.member = self.first.terms.index(support.term)
        self.cut = Support(0, support.top_k, support.top_p, support.min_p)
        self.vocabulary, self.restrict, self.skip = vocabulary, restrict, skip
        self.owed: dict[Group, list[list[int]]] = {
            g: [[] for _ in range(g.cache.rows)] for g in groups if g is not self.first
        }

    def join(self, slots: Sequence[int]) -> None:
        """The prompts of these slots have been read, but for their last tokens."""
        for guide, owed in self.owed.items():
            pending = guide.pending.tolist()
            for m in range(len(guide.terms)):
                for slot in slots:
                    row = m * guide.slots + slot
                    owed[row] = [pending[row]]
            guide.fresh.zero_()

    def fork(self, parents: Sequence[int]) -> None:
        """Slot i owes what slot ``parents[i]`` does; -1 leaves it as it is."""
        for guide, owed in self.owed.items():
            slots = guide.slots
            self.owed[guide] = [
                list(owed[r if parents[r % slots] < 0 else r - r % slots + parents[r % slots]])
                for r in range(len(owed))
            ]

    def step(self, tokens: Tensor, live: Tensor) -> dict[Group, Tensor]:
        """Logits ``[rows, V]`` of every group; where a guide was not asked, they are 0."""
        fresh = self.first.fresh[: self.first.slots].tolist()
        going, new = live.tolist(), tokens.tolist()
        found = {self.first: self.first.step(tokens, live)}
        slots = self.first.slots
        own = found[self.first].unflatten(0, (-1, slots))[self.member]
        survivors = (
            ops.blend([own], [1.0], support=self.cut, vocab_size=self.vocabulary) > -torch.inf
        )
        asked = [s for s in range(slots) if going[s]]
        if self.skip and all(n == 1 for n in survivors[asked].sum(dim=1).tolist()):
            asked = []  # rows one by one would save little: a guide's weights are read anyway
        columns = survivors[asked].any(dim=0).nonzero()[:, 0] if self.restrict else None
        if columns is not None and FEW * len(columns) > self.vocabulary:
            columns = None
        for guide, owed in self.owed.items():
            for row, tokens_owed in enumerate(owed):
                slot = row % slots
                if going[slot] and not fresh[slot]:
                    tokens_owed.append(new[slot])
            rows = [m * slots + s for m in range(len(guide.terms)) for s in asked]
            logits = guide.catch_up(rows, [owed[r] for r in rows], columns)
            for r in rows:
                owed[r] = []
            nothing = own.new_zeros(1, self.vocabulary).expand(len(owed), -1)
            found[guide] = nothing if logits is None else logits
        return found
