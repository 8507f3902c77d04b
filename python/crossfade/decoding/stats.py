"""What a call cost."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class ModelStats:
    """What one model of the blend did.

    Attributes:
        names: the terms and values that it computed, as rows of one batch.
        forwards: how often it ran.
        tokens: how many tokens it read for all of them, without padding.
    """

    names: tuple[str, ...]
    forwards: int
    tokens: int


@dataclass(frozen=True)
class Stats:
    """What a call cost.

    Attributes:
        tokens: how many tokens were generated, in all rows that are returned.
        seconds: how long it took, from the first forward to the last token.
        models: an entry for each model and adapter, in the order of their first terms; then for
            those of a search's value. Rows that a search dropped are counted too.
        cache_bytes: the size of all caches at the end.
        peak_bytes: on GPUs torch's peak on the first term's device since it was last reset; on CPUs
            the size of caches and results at their largest.
        notes: what the engine left out, and why.
        interrupted: whether Ctrl-C cut the call short.
    """

    tokens: int
    seconds: float
    models: tuple[ModelStats, ...]
    cache_bytes: int
    peak_bytes: int
    notes: tuple[str, ...] = ()
    interrupted: bool = False


def summed(each: Iterable[ModelStats]) -> tuple[ModelStats, ...]:
    """Each model's work over several batches, in the order in which models first appear."""
    total: dict[tuple[str, ...], ModelStats] = {}
    for s in each:
        old = total.get(s.names, ModelStats(s.names, 0, 0))
        total[s.names] = ModelStats(s.names, old.forwards + s.forwards, old.tokens + s.tokens)
    return tuple(total.values())
