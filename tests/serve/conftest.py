"""Servers over scripted sessions, which end with their test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
from servers import Running, running


@pytest.fixture
def serve() -> Iterator[Callable[..., Running]]:
    """Starts servers that stop with the test."""
    with ExitStack() as stack:
        yield lambda *args, **options: stack.enter_context(running(*args, **options))


@pytest.fixture(scope="module")
def standing() -> Iterator[Running]:
    """The server that the tests of a module share."""
    with running() as found:
        yield found


@pytest.fixture
def server(standing: Running) -> Iterator[Running]:
    """The server of the module, whose session forgets what the last test did to it."""
    standing.session.reset()
    yield standing
    standing.session.reset()
