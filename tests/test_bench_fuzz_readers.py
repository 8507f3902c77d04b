"""The targets of the fuzzer, on a few inputs: all that it calls is there and holds."""

from __future__ import annotations

import sys
from pathlib import Path

from hypothesis import example, given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
import fuzz_readers

RESULT = b'{"index": 0, "prompt": "a", "run": "run"}\n'
PLACE = {reader.__name__: bytes([i]) for i, reader in enumerate(fuzz_readers.READERS)}


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=200))
@example(PLACE["results"] + RESULT + b'{"index": 1')
@example(PLACE["results"] + RESULT + b"\0")
@example(PLACE["prompts"] + b'{"prompt": "\\ud800"}')
@example(PLACE["settings"] + b"{a: &a [*a]}")
@example(PLACE["override"] + b"model=x")
@example(PLACE["spec"] + b"a=b@sentiment")
@example(PLACE["formula"] + b"a + 2 * b")
def test_a_reader_reads_or_refuses(data: bytes) -> None:
    fuzz_readers.one(data)
