"""What rows have yet to read of their prompts, in the order in which it is read."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ..forms import Ids


@dataclass
class Unread:
    """What a row has yet to read of its prompt: its tokens from `start` on, without the last."""

    row: int
    start: int
    prompt: Ids

    def __len__(self) -> int:
        return len(self.prompt) - 1 - self.start

    def piece(self, most: int) -> Ids:
        """The next tokens, at most so many."""
        return self.prompt[self.start : min(self.start + most, len(self.prompt) - 1)]


class Queue:
    """Prompts that are read piece by piece."""

    def __init__(self) -> None:
        self.each: list[Unread] = []

    def __len__(self) -> int:
        return len(self.each)

    @property
    def rows(self) -> set[int]:
        return {x.row for x in self.each}

    def put(self, each: Iterable[Unread]) -> None:
        """Prompts of about one length share a forward, and short ones do not wait for long ones."""
        self.each += sorted((x for x in each if len(x)), key=len)

    def take(self, most: int) -> list[Unread]:
        """The first prompts, whose next pieces have `most` tokens together, with padding."""
        taken: list[Unread] = []
        width = 0
        while self.each:
            width = max(width, min(len(self.each[0]), most))
            if taken and (len(taken) + 1) * width > most:
                break
            taken.append(self.each.pop(0))
        return taken

    def put_back(self, each: Iterable[Unread]) -> None:
        """Let prompts of which a piece was read wait for their next one, behind the others."""
        self.each += [x for x in each if len(x)]

    def drop(self, rows: Iterable[int]) -> None:
        self.each = [x for x in self.each if x.row not in set(rows)]
