"""Which free slot a row takes."""

from __future__ import annotations

from collections.abc import Iterable

from .job import Row
from .runner import Runner


class Places:
    """The free slots of a loop.

    Rows take them in their order. Where caches are remembered, a row takes the slot whose caches
    hold most of its prompt, which need not be read then; of equal ones the one that was left first.
    What a row of one scope has read serves rows of the same scope alone.

    Attributes:
        free: the slots that rows can take.
        reused: how many tokens of prompts were not read, of all models together.

    Args:
        remembers: whether caches are remembered.
    """

    def __init__(self, runner: Runner, free: Iterable[int], *, remembers: bool) -> None:
        self.runner, self.free, self.remembers = runner, list(free), remembers
        self.scopes: dict[int, str] = {}  # whose each slot's caches are
        self.reused = 0

    def take(self, row: Row) -> int:
        """A slot for a row."""
        if not self.remembers:
            return self.free.pop(0)
        scope = row.job.scope
        held = {
            s: self.runner.held(s, row.prompt_ids, row.mixes) if self.scopes.get(s) == scope else 0
            for s in self.free
        }
        slot = max(self.free, key=lambda s: held[s])
        self.free.remove(slot)
        if self.scopes.get(slot) != scope:
            self.runner.forget(slot)
        self.scopes[slot] = scope
        self.reused += held[slot]
        return slot

    def give_back(self, slots: Iterable[int]) -> None:
        self.free += slots
