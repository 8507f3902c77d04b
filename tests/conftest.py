"""The small real model, and without a GPU Triton in its interpreter."""

import os
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # which it must know before it is imported


@pytest.fixture(scope="session")
def smollm2_folder() -> Path:
    """The folder of the small real model; where it cannot be had, the test is skipped."""
    from crossfade import models

    try:
        return models.get()
    except (OSError, ImportError) as error:
        pytest.skip(f"the small model cannot be had: {error}")
