"""What tests of the desk share: a browser, a fake server, and the page on it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from browser import chromium
from desk_driver import Desk
from fake_desk import FakeDesk, serving


@pytest.fixture(scope="module")
def window() -> Iterator[Any]:
    """One Chromium for all tests of a file."""
    with chromium() as found:
        yield found


@pytest.fixture
def server() -> Iterator[FakeDesk]:
    with serving() as found:
        yield found


@pytest.fixture
def desk(window: Any, server: FakeDesk) -> Iterator[Desk]:
    """The desk, not opened yet. What the browser complained about fails the test."""
    window.get_log("browser")
    found = Desk(window, server)
    found.emulate()
    yield found
    said = [x for x in found.complaints() if "Failed to load resource" not in x]
    assert said == []
