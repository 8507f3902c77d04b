"""A streamer for tests."""

from __future__ import annotations

from typing import Any

from torch import Tensor


class Kept:
    """A streamer that keeps what it is told, until it fails.

    Args:
        fails_at: after how many things; None: never.
        error: what it raises then.
    """

    def __init__(self, fails_at: int | None = None, error: BaseException | None = None) -> None:
        self.told: list[Any] = []
        self.fails_at, self.error = fails_at, error or OSError("the line is cut")

    def put(self, value: Tensor) -> None:
        if len(self.told) == self.fails_at:
            raise self.error
        self.told.append(value.tolist())

    def end(self) -> None:
        self.told.append("end")
