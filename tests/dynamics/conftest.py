"""Helpers of all tests are importable, and datasets shows no progress bars."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path += [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

# datasets and TRL may be missing
collect_ignore = [
    *([] if importlib.util.find_spec("datasets") else ["test_rebalancing.py"]),
    *([] if importlib.util.find_spec("trl") else ["test_first_step.py", "test_watch_training.py"]),
]


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Have TRL send no telemetry, and datasets show no progress bars."""
    monkeypatch.setenv("CI", "1")
    if importlib.util.find_spec("datasets") is None:
        yield
        return
    import datasets

    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()
