"""Fuzz the readers of files that come from outside, guided by coverage.

Whatever bytes a file of prompts, rows, results or settings has, it is read, or refused in one
sentence by a ValueError, TypeError or OSError; a file of results that is refused keeps every byte.

    pip install atheris
    python bench/fuzz_readers.py -max_total_time=300 [CORPUS_FOLDER]

The options are libFuzzer's. Anything else that a reader raises ends the run with its input.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable
from contextlib import nullcontext, suppress
from pathlib import Path

try:
    import atheris
except ImportError:  # the readers can be called without it
    atheris = None

instrumented = nullcontext() if atheris is None else atheris.instrument_imports(["crossfade"])
with instrumented:
    from crossfade import batch, reading, records
    from crossfade.formula import evaluate
    from crossfade.loading import Spec
    from crossfade.training import config

EXPECTED = (ValueError, TypeError, OSError)
FILE = Path(tempfile.mkdtemp(), "file.jsonl")


def prompts(data: bytes) -> None:
    FILE.write_bytes(data)
    for i, prompt in enumerate(batch.read_prompts([], str(FILE), chat=False)):
        records.Results(None).begin([prompt], f"{i}")


def rows(data: bytes) -> None:
    FILE.write_bytes(data)
    records.objects(reading.read_text(FILE).split("\n"), "rows")


def results(data: bytes) -> None:
    FILE.write_bytes(data)
    try:
        with records.Results(FILE, resume=True) as file:
            file.begin(["a", [1, 2]], "run")
    except EXPECTED:
        assert FILE.read_bytes() == data
        raise
    assert data.startswith(FILE.read_bytes()[:-1])


def settings(data: bytes) -> None:
    FILE.write_bytes(data)
    config.read("sft", FILE)


def override(data: bytes) -> None:
    FILE.write_text("{model: m, data: d, arguments: {output_dir: o}}")
    config.read("sft", FILE, [reading.decode(data, "override")])


def spec(data: bytes) -> None:
    Spec.read(os.fsdecode(data))


def formula(data: bytes) -> None:
    evaluate(reading.decode(data, "formula"), {"a": 1.0, "b": 2.0})


READERS: list[Callable[[bytes], None]] = [
    *(prompts, rows, results, settings, override, spec, formula)
]


def one(data: bytes) -> None:
    """The first byte picks a reader, the others are its input."""
    if data:
        with suppress(*EXPECTED):
            READERS[data[0] % len(READERS)](data[1:])


if __name__ == "__main__":
    if atheris is None:
        sys.exit("atheris is not installed; run: pip install atheris")
    atheris.Setup(sys.argv, one)
    atheris.Fuzz()
