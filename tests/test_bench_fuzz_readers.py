"""The targets of the fuzzer take a few inputs: what they call is there, and they hold."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("trl")
sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
import fuzz_readers

SEEDS = [fuzz_readers.seed(*pair) for pair in fuzz_readers.SEEDS]


def test_each_reader_has_a_seed() -> None:
    assert {reader for reader, _ in fuzz_readers.SEEDS} == set(fuzz_readers.READERS)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(SEEDS), st.integers(0, 200), st.binary(max_size=20))
def test_a_reader_reads_or_refuses(seed: bytes, place: int, change: bytes) -> None:
    """The seeds are read as they are, and with a few bytes changed."""
    fuzz_readers.once(seed)
    fuzz_readers.once(seed[: place + 1] + change + seed[place + 1 + len(change) :])
