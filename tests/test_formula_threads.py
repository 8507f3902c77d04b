"""Formulas are read in many threads at once, as servers do."""

from __future__ import annotations

import gc
import sys
import threading
import time
from collections.abc import Iterator

import pytest
from crossfade.formula import names_in


class Yields:
    """Garbage whose end lets another thread run, in the middle of whatever collects it."""

    def __init__(self) -> None:
        self.itself = self

    def __del__(self) -> None:
        time.sleep(0)


@pytest.fixture
def busy_collector() -> Iterator[None]:
    before, interval = gc.get_threshold(), sys.getswitchinterval()
    gc.set_threshold(20)
    sys.setswitchinterval(1e-6)
    yield
    gc.set_threshold(*before)
    sys.setswitchinterval(interval)


def test_formulas_in_threads(busy_collector: None) -> None:
    """Python's parser fails where another thread's is in between, up to Python 3.12."""
    raised: list[BaseException] = []

    def read(thread: int) -> None:
        for i in range(60):
            Yields()
            text = " + ".join(f"w{k} * (a{thread}_{i} - b{k})" for k in range(40))
            try:
                names_in(text)
            except BaseException as error:
                raised.append(error)

    threads = [threading.Thread(target=read, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not raised
