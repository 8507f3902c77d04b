"""How many tokens are guessed at a time: as many as pay, by what rounds have cost and yielded."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Sequence

SIZES = (2, 4, 8, 16)  # tokens that a round reads of each row: the last one and the guesses
FIRST = 2  # rounds of a size whose seconds say nothing: what runs them is being prepared
KEPT = 9  # seconds of rounds that count, the last ones
# What a further token of a row costs at first, as a share of a plain step.
SHARE = {"cpu": 0.05, "cuda": 0.01}
LONG = 8  # so many tokens alike and more are one kind of guess
# The chance of a guess with so many tokens alike before it, until there is experience: text that
# goes on as another one did, for a few tokens, is likely to go on so.
CHANCE = (0.0, 0.2, 0.35, 0.5, 0.6, 0.7, 0.75, 0.8, 0.9)
# The same of a text that rows are said to repeat. Where none are alike, one may have been changed.
GIVEN = (0.25, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.9, 0.95)
WEIGHT = 4.0  # guesses that this counts for
MEMORY = 64.0  # guesses that are remembered of each kind

WORTH = 1.03  # how many times as fast guesses must be expected to be
MODEL_CHANCE = 0.7  # of a model's guess, until there is experience
SOON, SELDOM = 16, 256  # plain steps after which models that do not pay are tried again

Yield = Sequence[float]  # of 0, 1, 2, ... guesses: how many tokens are expected to be drawn again


class Chances:
    """How likely a guess is, by how many tokens before it were alike.

    Args:
        given: whether guesses are of texts that rows are said to repeat.
    """

    def __init__(self, *, given: bool = False) -> None:
        self.hits = [WEIGHT * p for p in (GIVEN if given else CHANCE)]
        self.tries = [WEIGHT] * len(self.hits)

    def learn(self, matched: int, hit: bool) -> None:
        kind = min(matched, LONG)
        if self.tries[kind] >= MEMORY:
            self.hits[kind] /= 2
            self.tries[kind] /= 2
        self.hits[kind] += hit
        self.tries[kind] += 1

    def of(self, matched: int) -> float:
        kind = min(matched, LONG)
        return self.hits[kind] / self.tries[kind]

    def expected(self, matched: int, guesses: int) -> Yield:
        """What is expected of up to so many guesses after `matched` tokens that were alike."""
        found, chance = [0.0], 1.0
        for i in range(guesses):
            chance *= self.of(matched + i)
            found.append(found[-1] + chance)
        return found


class Costs:
    """Seconds of a round by how many tokens it reads of each row, measured or estimated.

    Args:
        device: the type of device.
        rows: how many rows one of the models' forwards has in a plain step, at most.
    """

    def __init__(self, device: str, rows: int) -> None:
        self.share = SHARE.get(device, SHARE["cuda"]) * rows
        self.sizes = SIZES
        self.seconds: dict[int, deque[float]] = {}
        self.counts: dict[int, int] = {}
        self.guesses: deque[float] = deque(maxlen=KEPT)

    @property
    def guess(self) -> float:
        """Seconds of a guess of all rows; 0.0 where guesses cost nothing."""
        return statistics.median(self.guesses) if self.guesses else 0.0

    def measured(self, size: int, seconds: float) -> None:
        self.counts[size] = self.counts.get(size, 0) + 1
        if self.counts[size] > FIRST:
            self.seconds.setdefault(size, deque(maxlen=KEPT)).append(seconds)

    @property
    def medians(self) -> dict[int, float]:
        """Seconds by size, as far as they were measured."""
        return {n: statistics.median(x) for n, x in sorted(self.seconds.items())}

    def of(self, size: int) -> float:
        """Seconds of a round of this size. Only ratios count where nothing was measured."""
        known = self.medians
        if size in known:
            return known[size]
        plain = known.get(1)
        if plain is None:
            nearest = min(known, default=None)
            if nearest is None:
                return 1.0 + self.share * (size - 1)
            plain = known[nearest] / (1.0 + self.share * (nearest - 1))
        shares = [(x / plain - 1.0) / (n - 1) for n, x in known.items() if n > 1]
        share = statistics.median(shares) if shares else self.share
        return plain * (1.0 + max(share, 0.0) * (size - 1))


def best_size(yields: Sequence[Yield], costs: Costs, left: Sequence[int] | None = None) -> int:
    """How many tokens of each row a round is to read; 1: a plain step.

    Where other rows take the places of those that end, the best size gives most tokens a second.
    Where none do, it lets the row end soonest that would otherwise end last: that some rows have
    good guesses is of no use to the one that all wait for, and which has none.

    Args:
        yields: of each row that is under way.
        left: of each, how many more tokens it may have; None: others take the places of rows.
    """
    if not yields:
        return 1
    longest = max(map(len, yields))  # with the last token, which is no guess

    def rate(size: int) -> float:
        drawn = [1.0 + y[min(size, len(y)) - 1] for y in yields]
        seconds = costs.of(size) + costs.guess * (size - 1)
        if left is None:
            return sum(drawn) / seconds
        rounds = max(n / d for n, d in zip(left, drawn, strict=True))
        return 1.0 / (rounds * seconds)

    sizes = [n for i, n in enumerate(SIZES) if i == 0 or SIZES[i - 1] < longest]
    best = max(sizes, key=rate)
    return best if longest > 1 and rate(best) > WORTH * rate(1) else 1


class Hope:
    """What models' guesses yield, so that those who do not pay rest, and are tried again."""

    def __init__(self) -> None:
        self.hits, self.tries_in_all = WEIGHT * MODEL_CHANCE, WEIGHT
        self.rested, self.patience = 0, SOON

    def learn(self, hits: int, tried: int) -> None:
        if self.tries_in_all >= MEMORY:
            self.hits /= 2
            self.tries_in_all /= 2
        self.hits += hits
        self.tries_in_all += tried

    def expected(self, guesses: int) -> Yield:
        chance, found = self.hits / self.tries_in_all, [0.0]
        for i in range(min(guesses, max(SIZES) - 1)):
            found.append(found[-1] + chance ** (i + 1))
        return found

    def tries(self, count: int) -> int:
        """So many guesses; where they do not pay, one after more and more plain steps."""
        if count > 0:
            self.rested, self.patience = 0, SOON
            return count
        self.rested += 1
        if self.rested < self.patience:
            return 0
        self.rested, self.patience = 0, min(2 * self.patience, SELDOM)
        return 1
