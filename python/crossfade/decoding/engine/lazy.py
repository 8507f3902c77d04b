"""Fewer reads under a support: most rows need few columns of the other models, or none at all."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ... import ops
from ...ops import Support
from .group import Group

FEW = 8  # Some columns of a head are computed alone if they are fewer than one in so many.


class Lazy:
    """The plan under a support: the model of its term reads every token, the others when needed.

    A token outside the support has probability 0, whatever the other models say, and where one
    token is left they have no say at all. So the others compute only the columns of their heads
    that survive, and rest while every row has one survivor. When they are needed next, they read
    what they owe, the tokens that they skipped, in one forward. The distribution is the same. The
    host decides at every step.

    Attributes:
        owed: of each other group, the tokens that each of its rows has yet to read.

    Args:
        restrict: whether the others compute the surviving columns alone.
        skip: whether they rest.
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
        """The other models owe these slots the last tokens of their prompts, and no more."""
        for group, owed in self.owed.items():
            pending = group.pending.tolist()
            for m in range(len(group.terms)):
                for slot in slots:
                    row = m * group.slots + slot
                    owed[row] = [pending[row]]

    def fork(self, parents: Sequence[int]) -> None:
        """Slot i owes what slot ``parents[i]`` does; -1 leaves it as it is."""
        for group, owed in self.owed.items():
            slots = group.slots
            self.owed[group] = [
                list(owed[r if parents[r % slots] < 0 else r - r % slots + parents[r % slots]])
                for r in range(len(owed))
            ]

    def step(
        self, tokens: Tensor, live: Tensor, slots: Tensor | None = None
    ) -> dict[Group, Tensor]:
        """Logits ``[rows, V]`` of every group; those of a group that rests are 0."""
        assert slots is None, "a lazy plan feeds all slots"
        fresh = self.first.fresh[: self.first.slots].tolist()
        going, new = live.tolist(), tokens.tolist()
        found = {self.first: self.first.step(tokens, live)}
        count = self.first.slots
        own = found[self.first].unflatten(0, (-1, count))[self.member]
        survivors = (
            ops.blend([own], [1.0], support=self.cut, vocab_size=self.vocabulary) > -torch.inf
        )
        needed = [s for s in range(count) if going[s]]
        if self.skip and all(n == 1 for n in survivors[needed].sum(dim=1).tolist()):
            needed = []  # All rest or none: a single row would cost a read of all weights as well.
        columns = survivors[needed].any(dim=0).nonzero()[:, 0] if self.restrict else None
        if columns is not None and FEW * len(columns) > self.vocabulary:
            columns = None
        for group, owed in self.owed.items():
            for row, tokens_owed in enumerate(owed):
                slot = row % count
                if going[slot] and not fresh[slot]:
                    tokens_owed.append(new[slot])
            rows = [m * count + s for m in range(len(group.terms)) for s in needed]
            logits = group.catch_up(rows, [owed[r] for r in rows], columns)
            for r in rows:
                owed[r] = []
            nothing = own.new_zeros(1, self.vocabulary).expand(len(owed), -1)
            found[group] = nothing if logits is None else logits
        return found

    def take_back(self, which: Tensor) -> None:
        """Let rows forget the token of the last step; where it is owed, it was not read yet."""
        self.first.take_back(which)
        taken = which.tolist()
        for group, owed in self.owed.items():
            rows = [r for r in range(len(owed)) if taken[r % group.slots]]
            read = torch.zeros_like(group.lengths)
            for row in rows:
                if owed[row]:
                    owed[row].pop()
                else:
                    read[row] = 1
            group.lengths -= read
