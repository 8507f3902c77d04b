"""The order of a tournament: who plays whom in each round, and who is placed where."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Sequence

from ..output import Match, Played


def shuffled(n: int, seed: int, stream: int) -> list[int]:
    """The numbers below n in an order that depends on the seed and the stream alone.

    All orders are equally likely. Python promises the same `random.random` in all its versions,
    which it does not of `random.shuffle`.
    """
    draw = random.Random(f"{seed} {stream}")
    keys = [draw.random() for _ in range(n)]
    return sorted(range(n), key=keys.__getitem__)


class Bracket:
    """A knock-out tournament of one request that is being played.

    Args:
        order: the slots of the request, in the order in which they are set.

    Attributes:
        left: the slots that are still in, in that order.
        rounds: the matches played so far.
    """

    def __init__(self, order: Iterable[int]) -> None:
        self.left = list(order)
        self.rounds: list[list[Match]] = []
        self._byes: Counter[int] = Counter()

    @property
    def over(self) -> bool:
        return len(self.left) == 1

    @property
    def resting(self) -> int | None:
        """The slot that has a bye in the next round: of those that had the fewest, the last."""
        if len(self.left) % 2 == 0:
            return None
        return min(reversed(self.left), key=self._byes.__getitem__)

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """The slots that play each other in the next round."""
        resting = self.resting
        play = [s for s in self.left if s != resting]
        return list(zip(play[::2], play[1::2], strict=True))

    def play(self, probs: Sequence[float]) -> None:
        """Play the next round.

        Args:
            probs: of each of `pairs`, the probability that its first slot is preferred, or NaN.
        """
        resting = self.resting
        matches = [
            Match(a, b, p, a if p > 0.5 else b if p < 0.5 else min(a, b))
            for (a, b), p in zip(self.pairs, probs, strict=True)
        ]
        if resting is not None:
            self._byes[resting] += 1
            matches.append(Match(resting, None, float("nan"), resting))
        self.rounds.append(matches)
        stay = {m.winner for m in matches}
        self.left = [s for s in self.left if s in stay]

    def played(self) -> Played:
        """The whole tournament, once it is over."""
        order = list(self.left)
        for matches in reversed(self.rounds):
            lost = {m.winner: m.a if m.winner == m.b else m.b for m in matches}
            order += [s for s in map(lost.get, order) if s is not None]
        return Played(self.rounds, order)


def mean_probs(played: Played) -> list[float]:
    """Of each slot, the mean probability that it is preferred, over its matches that have one."""
    each: list[list[float]] = [[] for _ in played.order]
    for match in (m for matches in played.rounds for m in matches):
        if match.b is not None and match.prob == match.prob:  # It is not NaN.
            each[match.a].append(match.prob)
            each[match.b].append(1 - match.prob)
    return [sum(probs) / len(probs) if probs else float("nan") for probs in each]
