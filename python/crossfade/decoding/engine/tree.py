"""Which beginnings several texts share, as a tree: what there is to read, and what of it once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

from ..forms import common
from ..runner import PromptIds

Lengths = tuple[int, ...]  # of a text, or of a beginning of it: tokens as each model reads it


class Node(NamedTuple):
    """A beginning that neighbouring texts share and that is read once; or, as a leaf, a whole text.

    Attributes:
        texts: which share it, as a range of the sorted texts.
        start: how many of its tokens need not be read: another node has them, or they are held.
        end: how many tokens it has.
        level: of how many nodes it is a part.
    """

    texts: range
    start: Lengths
    end: Lengths
    level: int

    @property
    def tokens(self) -> int:
        """How many tokens all models read for it."""
        return sum(self.end) - sum(self.start)


def tree(texts: Sequence[PromptIds], held: Sequence[Lengths], worth: float) -> list[Node]:
    """What is read of sorted texts: a node before those within it, and a leaf for each text.

    If a node has n nodes and leaves right within it, it saves the reading of its tokens n - 1
    times. One that saves too little is left out: each of the n reads its tokens.

    Args:
        texts: the ids that each model reads.
        held: how many tokens of each text need not be read, as they have been before.
        worth: how many tokens a node must save each model, on average.
    """
    if not texts:
        return []
    whole, least = _whole_tree(texts), worth * len(texts[0])
    # From the leaves up, what there is right within a node: others take the place of one left out.
    for branch, around in reversed(whole):
        branch.inner = [x for inner in branch.inner for x in inner.stay]
        unread = sum(branch.end) - sum(_begun(around, held[branch.texts[0]], branch.end))
        worthy = (len(branch.inner) - 1) * unread >= least
        branch.stay = [branch] if worthy or not branch.inner else branch.inner
    nothing = (0,) * len(texts[0])
    found: list[Node] = []
    todo = [(branch, nothing, 0) for branch in reversed(whole[0][0].stay)]
    while todo:
        branch, around, level = todo.pop()
        start = _begun(around, held[branch.texts[0]], branch.end)
        found.append(Node(branch.texts, start, branch.end, level))
        todo += [(inner, branch.end, level + 1) for inner in reversed(branch.inner)]
    return found


def _whole_tree(texts: Sequence[PromptIds]) -> list[tuple[_Branch, Lengths]]:
    """All beginnings that sorted texts share and the texts themselves, each with the end of what is
    right around it; those around come before those within.

    Texts may share any number of beginnings, one within the other, so that nothing here recurs.
    """
    alike = [shared(a, b) for a, b in pairwise(texts)]
    leaves = [_Branch(range(i, i + 1), tuple(map(len, text))) for i, text in enumerate(texts)]
    # Beginnings that the next text may share too, the longest last, each with its tokens in all.
    shareable: list[tuple[int, _Branch]] = []

    def close(branch: _Branch, most: int) -> _Branch:
        """The outermost beginning around `branch` that ends where only so many tokens go on."""
        while shareable and shareable[-1][0] > most:
            _, outer = shareable.pop()
            outer.hold(branch)
            branch = outer
        return branch

    for leaf, between in zip(leaves, alike, strict=False):
        branch, tokens = close(leaf, sum(between)), sum(between)
        if not shareable or shareable[-1][0] < tokens:
            shareable.append((tokens, _Branch(range(0), between)))
        shareable[-1][1].hold(branch, between)
    whole = [(close(leaves[-1], -1), (0,) * len(texts[0]))]
    for branch, _ in whole:  # which grows meanwhile
        whole += [(inner, branch.end) for inner in branch.inner]
    for branch, _ in reversed(whole):
        if branch.inner:
            branch.texts = range(branch.inner[0].texts[0], branch.inner[-1].texts[-1] + 1)
    return whole


def shared(a: PromptIds, b: PromptIds) -> Lengths:
    """How many tokens two texts begin with alike."""
    return tuple(common(x, y) for x, y in zip(a, b, strict=True))


@dataclass(eq=False)
class _Branch:
    """A node that may be left out.

    Attributes:
        inner: what is right within it.
        stay: what of it stays: itself, or what is right within it.
    """

    texts: range
    end: Lengths
    inner: list[_Branch] = field(default_factory=list)
    stay: list[_Branch] = field(default_factory=list)

    def hold(self, inner: _Branch, between: Lengths | None = None) -> None:
        """Have another branch within. It has all tokens that this one has, of each model."""
        self.inner.append(inner)
        for lengths in (inner.end, between or self.end):
            self.end = tuple(map(min, self.end, lengths))


def _begun(around: Lengths, held: Lengths, end: Lengths) -> Lengths:
    """What of a node is read already, if the node around it is, and so much of its texts."""
    return tuple(min(max(a, h), e) for a, h, e in zip(around, held, end, strict=True))
