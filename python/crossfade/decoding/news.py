"""The tokens that rows get while they are decoded, for whoever reads them before the end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from .job import Row
from .rows import Slots


@dataclass(frozen=True, eq=False)
class News:
    """Tokens that a row got.

    Attributes:
        columns: ``[tokens, ...]`` of each name that `kept` gives.
    """

    row: Row
    columns: dict[str, Tensor]


class Teller:
    """Keeps what rows in slots have written since it was last told.

    Attributes:
        told: how many tokens of each row were told so far.
    """

    def __init__(self, slots: Slots) -> None:
        self.slots = slots
        self.told: dict[Row, int] = {}
        self._news: list[News] = []

    def look(self, writing: Mapping[int, Row]) -> None:
        """Keep what these rows, by their slots, have written since the last look."""
        new = self.slots.new.tolist()
        for slot, row in writing.items():
            start, end = self.told.get(row, 0), new[slot]
            if end > start:
                # These are copies, as the row may leave and another one come in its place.
                columns = {n: x[slot, start:end].clone() for n, x in self.slots.written.items()}
                self._news.append(News(row, columns))
                self.told[row] = end

    def leave(self, row: Row) -> None:
        """The row has ended."""
        self.told.pop(row, None)

    def take(self) -> list[News]:
        """What is new since this was last called."""
        news, self._news = self._news, []
        return news
