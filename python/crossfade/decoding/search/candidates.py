"""What rows of a search have written so far, for whoever scores them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from ..job import Row
from .job import search_of


@dataclass(frozen=True)
class Candidates:
    """What the rows in some slots have written so far.

    Attributes:
        finished: whether each row was ended by EOS or a stop string.
    """

    slots: list[int]
    rows: list[Row]
    tokens: list[list[int]]
    finished: list[bool]

    @property
    def requests(self) -> list[int]:
        """The number of each row's request in its job."""
        return [row.request for row in self.rows]

    @cached_property
    def by_job(self) -> list[tuple[list[int], Candidates]]:
        """The candidates of each job, with the places that they have among these."""
        found: dict[int, list[int]] = {}
        for i, row in enumerate(self.rows):
            found.setdefault(id(row.job), []).append(i)
        if len(found) == 1:
            return [(list(range(len(self.rows))), self)]
        return [
            (
                at,
                Candidates(
                    [self.slots[i] for i in at],
                    [self.rows[i] for i in at],
                    [self.tokens[i] for i in at],
                    [self.finished[i] for i in at],
                ),
            )
            for at in found.values()
        ]

    @cached_property
    def texts(self) -> list[str]:
        """The text that each row has written."""
        return self._texts(None)

    def since(self, starts: Sequence[int]) -> list[str]:
        """The text that each row has written from its token ``starts[slot]`` on."""
        return self._texts(starts)

    def _texts(self, starts: Sequence[int] | None) -> list[str]:
        texts = [""] * len(self.rows)
        for at, its in self.by_job:
            writing = search_of(its.rows[0]).writing
            assert writing is not None  # `SearchJob.texts` has raised an error if there is none.
            from_each = None if starts is None else [starts[s] for s in its.slots]
            found = writing.texts(its.requests, its.tokens, from_each)
            for i, text in zip(at, found, strict=True):
                texts[i] = text
        return texts
