"""Which beginnings several texts share, as a tree: what there is to read, and what of it once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
    alike = [shared(a, b) for a, b in pairwise(texts)]
    least = worth * len(texts[0])

    def grow(part: range, around: Lengths) -> list[_Branch]:
        """What there is within a node that ends `around`, of these of its texts."""
        if len(part) == 1:
            return [_Branch(part, tuple(map(len, texts[part[0]])), [])]
        between = alike[part.start : part.stop - 1]
        end = tuple(map(min, zip(*between, strict=True)))
        smallest = min(map(sum, between))
        cuts = [part.start + i for i, x in enumerate(between, 1) if sum(x) == smallest]
        inner = [
            branch
            for a, b in pairwise([part.start, *cuts, part.stop])
            for branch in grow(range(a, b), end)
        ]
        unread = sum(end) - sum(_begun(around, held[part[0]], end))
        whole = (len(inner) - 1) * unread >= least
        return [_Branch(part, end, inner)] if whole else inner

    def nodes(branches: Sequence[_Branch], around: Lengths, level: int) -> Iterator[Node]:
        for branch in branches:
            start = _begun(around, held[branch.texts[0]], branch.end)
            yield Node(branch.texts, start, branch.end, level)
            yield from nodes(branch.inner, branch.end, level + 1)

    nothing = (0,) * len(texts[0])
    return [*nodes(grow(range(len(texts)), nothing), nothing, 0)]


def shared(a: PromptIds, b: PromptIds) -> Lengths:
    """How many tokens two texts begin with alike."""
    return tuple(common(x, y) for x, y in zip(a, b, strict=True))


class _Branch(NamedTuple):
    """A node whose place in the tree is not known yet, with what is right within it."""

    texts: range
    end: Lengths
    inner: list[_Branch]


def _begun(around: Lengths, held: Lengths, end: Lengths) -> Lengths:
    """What of a node is read already, if the node around it is, and so much of its texts."""
    return tuple(min(max(a, h), e) for a, h, e in zip(around, held, end, strict=True))
