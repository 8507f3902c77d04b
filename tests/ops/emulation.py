"""Compiles csrc/cuda for the CPU: see tests/cuda_emulation."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest

SOURCES = Path(__file__).parent.parent / "cuda_emulation"
# -fno-gnu-unique: libraries loaded together would share one machine, and what is forced on it
FLAGS = ["-std=c++17", "-O1", "-Wall", "-Werror", "-Wno-unknown-pragmas", "-U_FORTIFY_SOURCE"]
FLAGS += ["-fno-gnu-unique"]


def build(source: str, directory: Path) -> ctypes.CDLL:
    """The library of a source in tests/cuda_emulation; skips the test where there is no g++."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("there is no g++ to compile the kernels for the CPU with")
    built = directory / "kernels.so"
    includes = [f"-I{SOURCES / 'include'}", "-DCROSSFADE_CUDA"]
    files = ["-o", built, SOURCES / source]
    subprocess.run([compiler, *FLAGS, *includes, "-shared", "-fPIC", *files], check=True)
    return ctypes.CDLL(str(built))
