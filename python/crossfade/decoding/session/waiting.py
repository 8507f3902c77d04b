"""Requests that wait for a place, and whose turn it is."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Hashable, Mapping

from .request import Request


class Waiting:
    """Requests that wait: those of the highest priority first; of these, those of the scope that
    has fewest requests under way; of these, the one that came first."""

    def __init__(self) -> None:
        self._order = itertools.count()
        self._each: dict[Request, tuple[int, int]] = {}

    def __len__(self) -> int:
        return len(self._each)

    def add(self, request: Request, priority: int) -> None:
        self._each[request] = (-priority, next(self._order))

    def remove(self, request: Request) -> bool:
        """Whether it was there."""
        return self._each.pop(request, None) is not None

    def all(self) -> list[Request]:
        return list(self._each)

    def first(self, running: Mapping[str, int], full: Collection[Hashable] = ()) -> Request | None:
        """Whose turn it is.

        Args:
            running: how many requests of each scope are under way.
            full: the kinds of requests whose turn it cannot be.
        """

        def turn(request: Request) -> tuple[int, int, int]:
            priority, order = self._each[request]
            return priority, running.get(request.asked.given.scope, 0), order

        return min((r for r in self.all() if r.asked.kind not in full), key=turn, default=None)

    def late(self, now: float) -> list[Request]:
        """Take out the requests whose time is up."""
        found = [r for r in self.all() if r.is_late(now)]
        for request in found:
            self.remove(request)
        return found
