"""The CPU kernels of lesser instruction sets pass the tests of the kernels too."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from crossfade.ops import native

# The tests of each file or folder here, as pytest's -k selects them.
LEVELS = ("baseline", "avx2", "avx512", "avx512_vnni", "avx512_bf16")
TESTS = {
    "test_attention.py": "native and not compile",
    "test_linear.py": "truth or deltas or rows_alone or threads or not_finite or rounding",
    "test_linear_packed.py": "kernel",
    "test_long_rows.py": "native and test_thresholds",
    "test_pushes.py": "native",
    "logp": "native and (test_truth or test_error or test_same_bits or extreme or bad)",
}


@pytest.mark.skipif(
    native.why_not(torch.device("cpu")) is not None, reason="the kernels are not built"
)
@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512", "avx512_vnni"])
def test_lesser_instruction_sets(isa: str) -> None:
    """The kernels are chosen when a process begins: one process runs the tests of all files."""
    order, own = list(LEVELS), native._native.cpu_isa()
    if order.index(own) <= order.index(isa):
        pytest.skip(f"these tests run with {own} already")
    chosen = " or ".join(f"({file} and ({tests}))" for file, tests in TESTS.items())
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", chosen]
    files = [str(Path(__file__).parent / file) for file in TESTS]
    environment = {**os.environ, "CROSSFADE_ISA": isa}
    done = subprocess.run([*command, *files], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
