"""The small real model, a core for each worker, and without a GPU Triton in its interpreter."""

import os
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # which it must know before it is imported
if "PYTEST_XDIST_WORKER" in os.environ:  # one of several; tests of threads ask for more
    torch.set_num_threads(1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start


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
