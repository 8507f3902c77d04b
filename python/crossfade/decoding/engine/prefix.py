"""What a call has read, kept for the next one: conversations go on without reading it again."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ..forms import Ids
from ..runner import PromptIds
from .fingerprint import fingerprint
from .group import Group
from .kv_cache import KVCache
from .runner import EngineRunner

TURNS = threading.Lock()  # It is held while caches are lent and copied, never while models run.


@dataclass(frozen=True)
class KeptCache:
    """The cache of one group of the engine, and what its model was when the cache was filled.

    Attributes:
        terms: the model and the adapter of each term of the group.
        fingerprint: of the model.
    """

    terms: list[tuple[weakref.ref[Any], Any]]
    fingerprint: Hashable
    cache: KVCache

    def is_of(self, group: Group) -> bool:
        """Whether a group runs the same models with the same adapters."""
        return [(model(), adapter) for model, adapter in self.terms] == [
            (m.bare, m.adapter) for m in group.models
        ]


def fingerprints_of(runner: EngineRunner) -> list[Hashable]:
    """The fingerprints of the models of a runner's groups, as the models are now."""
    return [
        fingerprint(g.backbone.model, active=any(m.adapter == "active" for m in g.models))
        for g in runner.groups
    ]


class PrefixCache:
    """The caches of all models of a blend after a call, for the rows that it decoded.

    ``generate(..., cache=out.cache)`` reads of each prompt only what follows its longest common
    prefix with what its row holds, model by model: a conversation that goes on, or takes another
    turn. Its rows are those of the call, in order; or one serves all samples of a request.

    A call with the same rows writes into the same buffers, and every cache that shares them knows
    what they hold now. So an older cache may be used again, and the call reads what it lacks. Calls
    that share buffers take turns. Where a model's weights, hooks or active adapters have changed
    since the cache was filled, the call reads that model's prompts anew, and a note says so.

    Attributes:
        rows: how many there are.
        nbytes: of keys and values.
    """

    def __init__(
        self,
        runner: EngineRunner,
        fingerprints: Sequence[Hashable],
        written: Sequence[tuple[PromptIds, Ids]],
        kept: Sequence[int],
    ) -> None:
        """Take the caches of a runner whose rows have ended.

        Args:
            fingerprints: of the models of its groups, from before anything was read.
            written: of each slot, what every model read before the row wrote, and the row's tokens.
            kept: the slots whose rows are given back.
        """
        self.rows = len(kept)
        self._kept: list[KeptCache] = []
        for group, its_fingerprint in zip(runner.groups, fingerprints, strict=True):
            cache = group.cache
            read = group.prompt_lengths.tolist()
            for row, length in enumerate(group.lengths.tolist()):
                if read[row] == 0:
                    continue  # No row of the call took this slot.
                term, slot = group.terms[row // runner.slots], row % runner.slots
                prompt, new = written[slot]
                cache.rewind(row, 0)
                cache.holds(row, 0, [*prompt[term], *new][:length])
            if self.rows < runner.slots:
                cache = cache.take(
                    [m * runner.slots + s for m in range(len(group.terms)) for s in kept]
                )
            terms = [(weakref.ref(m.bare), m.adapter) for m in group.models]
            self._kept.append(KeptCache(terms, its_fingerprint, cache))

    @property
    def nbytes(self) -> int:
        return sum(kept.cache.nbytes for kept in self._kept)

    def __repr__(self) -> str:
        tokens = max(len(held) for kept in self._kept for held in kept.cache.held)
        return f"PrefixCache({self.rows} rows, up to {tokens} tokens, {self.nbytes} bytes)"

    @contextmanager
    def lent(self, rows: int) -> Iterator[None]:
        """Keep other calls from the buffers while a call of so many rows writes into them.

        A call of fewer or more rows copies what it needs, and writes into buffers of its own.

        Raises:
            ValueError: another call is writing into them.
        """
        mine: list[KVCache] = []
        try:
            if rows == self.rows:
                with TURNS:
                    self._check_turn()
                    mine += [kept.cache for kept in self._kept]
                    for cache in mine:
                        cache.lent = True
            yield
        finally:
            for cache in mine:
                cache.lent = False

    def _check_turn(self) -> None:
        if any(kept.cache.lent for kept in self._kept):
            raise ValueError(
                "cache is in use by a call under way, which writes into it; calls that share one "
                "must take turns"
            )

    def give(
        self, runner: EngineRunner, fingerprints: Sequence[Hashable], copies: int
    ) -> list[str]:
        """Let a new runner begin with what is held here.

        Args:
            fingerprints: of the models of its groups, as they are now.
            copies: how many of its slots each request has.

        Returns:
            Notes that say which caches are not used, and why.

        Raises:
            ValueError: it runs other terms or has other rows, or it would copy from a cache that
                another call is writing into.
        """
        if runner.slots == self.rows:
            rows = list(range(self.rows))
        elif runner.slots == self.rows * copies:
            rows = [slot // copies for slot in range(runner.slots)]
        else:
            raise ValueError(
                f"cache has {self.rows} rows; the inputs have {runner.slots // copies} "
                f"requests of {copies} rows"
            )
        if len(self._kept) != len(runner.groups) or not all(
            kept.is_of(group) for kept, group in zip(self._kept, runner.groups, strict=True)
        ):
            raise ValueError("cache was made by a blend of other models or adapters")
        notes = []
        with TURNS:
            if runner.slots != self.rows:
                self._check_turn()
            for kept, group, its_fingerprint in zip(
                self._kept, runner.groups, fingerprints, strict=True
            ):
                each = [m * self.rows + r for m in range(len(kept.terms)) for r in rows]
                if kept.fingerprint == its_fingerprint:
                    group.adopt(kept.cache, each)
                else:
                    notes.append(
                        f"{group.name} has changed since the cache was filled: it reads anew"
                    )
        return notes
