"""What all tests share: the small real model, a browser, a core a worker, Triton without a GPU."""

import gc
import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton reads this when it is imported
# There are other workers. Tests of threads ask for more threads than one.
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the processes that tests start read this


@pytest.fixture(autouse=True, scope="module")
def light_collections() -> None:
    """Spare the garbage collector what is there before a module's tests, which stays to the end.

    Else each of the many calls of ``gc.collect()`` in trainers and benches takes half a second.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def smollm2_folder() -> Path:
    """The folder of the small real model.

    Where it cannot be had, the test is skipped, or fails if `CROSSFADE_REQUIRE_MODEL` is set, as it
    is where all tests must have run.
    """
    from crossfade import models

    try:
        return models.get()
    except (OSError, ImportError) as error:
        required = os.environ.get("CROSSFADE_REQUIRE_MODEL", "") not in ("", "0")
        give_up = pytest.fail if required else pytest.skip
        give_up(f"the small model cannot be had: {error}")


@pytest.fixture
def browser() -> Iterator[Any]:
    """Chromium, see `browser.chromium`."""
    from browser import chromium

    with chromium() as found:
        yield found


@pytest.fixture
def ticking(monkeypatch: pytest.MonkeyPatch) -> None:
    """For benches: a clock by which each call takes a second, and caches of no size."""
    from crossfade.bench import timing

    seconds = itertools.count()
    monkeypatch.setattr(timing, "perf_counter", lambda: float(next(seconds)))
    monkeypatch.setattr(timing, "waited_us", lambda: 0.0)
    monkeypatch.setattr(timing, "empty_caches", lambda: None)
