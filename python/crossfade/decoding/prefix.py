"""What a call has read, kept for the next one: conversations go on without reading it again."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .engine_runner import EngineRunner


class PrefixCache:
    """The caches of all models of a blend after a call, for the rows that it decoded.

    ``generate(..., cache=out.cache)`` reads of each prompt only what follows its longest common
    prefix with what its row holds, model by model: a conversation that goes on, or takes another
    turn. Its rows are those of the call, in order; or one serves all samples of a request. The call
    writes into the same buffers, so a cache goes on with the last call that used it.

    Attributes:
        rows: how many there are.
        nbytes: of keys and values.
    """

    def __init__(
        self, runner: EngineRunner, responses: Sequence[Sequence[int]], kept: Sequence[int]
    ) -> None:
        """`responses` of all the runner's rows, of which those `kept` are held."""
        self.rows = len(kept)
        self._groups = runner.groups
        for group in runner.groups:
            lengths = group.lengths.tolist()
            for row, length in enumerate(lengths):
                term, slot = group.terms[row // runner.slots], row % runner.slots
                prompt = runner.prompts[term][slot // runner.copies]
                group.held[row] = [*prompt, *responses[slot]][:length]
            if self.rows < runner.slots:
                rows = [m * runner.slots + s for m in range(len(group.terms)) for s in kept]
                group.cache = group.cache.take(torch.tensor(rows, device=group.device))
                group.held = [group.held[r] for r in rows]

    @property
    def nbytes(self) -> int:
        return sum(g.cache.nbytes for g in self._groups)

    def __repr__(self) -> str:
        tokens = max(len(held) for g in self._groups for held in g.held)
        return f"PrefixCache({self.rows} rows, up to {tokens} tokens, {self.nbytes} bytes)"

    def give(self, runner: EngineRunner) -> None:
        """Let a new runner begin with what is held here.

        Raises:
            ValueError: it runs other terms, or has other rows.
        """
        if runner.slots == self.rows:
            rows = list(range(self.rows))
        elif runner.slots == self.rows * runner.copies:
            rows = [slot // runner.copies for slot in range(runner.slots)]
        else:
            raise ValueError(
                f"cache has {self.rows} rows; the inputs have {runner.slots // runner.copies} "
                f"requests of {runner.copies} rows"
            )
        mine = [[(m.bare, m.adapter) for m in g.models] for g in self._groups]
        if mine != [[(m.bare, m.adapter) for m in g.models] for g in runner.groups]:
            raise ValueError("cache was made by a blend of other models or adapters")
        for old, new in zip(self._groups, runner.groups, strict=True):
            new.adopt(old, [m * self.rows + r for m in range(len(old.terms)) for r in rows])
