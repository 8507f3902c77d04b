"""Fixtures for sessions."""

from __future__ import annotations

import time
from typing import Any

import pytest
from crossfade.decoding.loop import Loop


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps take so long that what a test does meanwhile comes before a long response ends."""
    advance = Loop.advance

    def slowly(self: Loop) -> Any:
        time.sleep(0.01)
        return advance(self)

    monkeypatch.setattr(Loop, "advance", slowly)
