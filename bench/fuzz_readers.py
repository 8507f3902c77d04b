"""Coverage-guided fuzzing of what reads from outside: prompts, rows, results, settings, formulas.

    pip install atheris
    python bench/fuzz_readers.py -max_total_time=300 [CORPUS]

Every input is read, or refused by an error that names its place: ValueError, TypeError or OSError;
a file of results that is refused keeps every byte. Anything else ends the run with its input. The
arguments are libFuzzer's; CORPUS is a folder that is read and added to, and may be empty.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

try:
    import atheris
except ImportError:  # without it the readers can be called, but not fuzzed
    atheris = None

instrumented = nullcontext() if atheris is None else atheris.instrument_imports(["crossfade"])
with instrumented:
    from crossfade import reading
    from crossfade.bulk import records
    from crossfade.bulk.prompts import read_prompts
    from crossfade.formula import evaluate
    from crossfade.models import saved_value_heads
    from crossfade.specs import Spec
    from crossfade.training import checkpoints, config, data, rows
    from crossfade.training.value.rollouts import Rollouts

EXPECTED = (ValueError, TypeError, OSError)
FOLDER = Path(tempfile.mkdtemp())
FILE = FOLDER / "input.jsonl"


def prompts(given: bytes) -> None:
    for line in read_prompts([], str(FILE)):
        records.Results(None).begin([line.sent(chat=False)], "run", [line.settings])


def results(given: bytes) -> None:
    try:
        with records.Results(FILE, resume=True) as file:
            file.begin(["a", [1, 2]], "run")
    except EXPECTED:
        assert FILE.read_bytes() == given
        raise
    assert given.startswith(FILE.read_bytes()[:-1])


def training_rows(given: bytes) -> None:
    found = reading.parse_json_lines(reading.read_text(FILE).split("\n"), "input")
    if not found:  # such a file is refused before its rows are looked at
        return
    for kind in ("sft", "dpo", "kto"):
        with suppress(*EXPECTED):
            rows.check_rows(kind, found, "input")
    for build in (data.pairs, data.values):
        with suppress(*EXPECTED):
            build(found, "r")
    Rollouts(found, None, 61, "score", "input")


def settings(given: bytes) -> None:
    config.read("dpo", FILE)


def override(given: bytes) -> None:
    file = FOLDER / "settings.yaml"
    file.write_text("{model: m, data: d, arguments: {output_dir: o}}")
    config.read("sft", file, [reading.decode(given, "override")])


def head(given: bytes) -> None:
    saved_value_heads._read_settings(FILE)


def checkpoint(given: bytes) -> None:
    """Damage is said in a text, and never raised."""
    folder = FOLDER / "checkpoint-4"
    folder.mkdir(exist_ok=True)
    (folder / "trainer_state.json").write_bytes(given)
    (folder / "model.safetensors.index.json").write_bytes(given)
    assert isinstance(checkpoints.damage(folder, ["model.safetensors"]), str)


def spec(given: bytes) -> None:
    Spec.read(os.fsdecode(given))


def formula(given: bytes) -> None:
    evaluate(reading.decode(given, "formula"), {"a": 1.0, "b": 2.0})


READERS: list[Callable[[bytes], None]] = [
    *(prompts, results, training_rows, settings, override, head, checkpoint, spec, formula)
]
SEEDS: list[tuple[Callable[[bytes], None], Any]] = [
    (prompts, {"messages": [{"role": "user", "content": "a"}]}),
    (prompts, {"prompt": "a \N{GRINNING FACE}"}),
    (results, {"index": 1, "prompt": [1, 2], "run": "run"}),
    (training_rows, {"prompt": "a", "chosen": "b", "rejected": "c", "margins": [1.0]}),
    (
        training_rows,
        {"prompt": [{"role": "user", "content": "a"}], "completion": [], "label": True},
    ),
    (
        training_rows,
        {"prompt_ids": [5], "completion_ids": [6], "reward": 1.0, "finished": True},
    ),
    (training_rows, {"input_ids": [5, 6], "completion_mask": [0, 1], "labels": [-100, 6]}),
    (training_rows, {"messages": [{"from": "user", "value": "a"}], "tools": "[{}]", "text": "a"}),
    (
        training_rows,
        {
            "prompt": "a",
            "prompt_ids": [5],
            "responses": [{"text": "b", "ids": [6], "finished": True, "rewards": {"r": 1.0}}],
        },
    ),
    (settings, {"model": "m", "data": "d", "arguments": {"output_dir": "o", "max_steps": 1e-4}}),
    (override, "arguments.max_steps=3"),
    (
        head,
        {"format": 1, "kind": "q", "rank": 2, "hidden_size": 8, "vocabulary": 9, "adapter": False},
    ),
    (checkpoint, {"global_step": 4, "weight_map": {"a": "b.safetensors"}}),
    (spec, "a=b@sentiment"),
    (formula, "(a + 2 * b) / -3"),
]


def once(given: bytes) -> None:
    """Call a reader, which the first byte picks, with the other bytes as its input."""
    if given:
        FILE.write_bytes(given[1:])
        with suppress(*EXPECTED):
            READERS[given[0] % len(READERS)](given[1:])


def seed(reader: Callable[[bytes], None], content: Any) -> bytes:
    text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False) + "\n"
    return bytes([READERS.index(reader)]) + text.encode()


def main() -> None:
    if atheris is None:
        sys.exit("atheris is not installed; run: pip install atheris")
    seeds = FOLDER / "seeds"
    seeds.mkdir()
    for i, (reader, content) in enumerate(SEEDS):
        (seeds / str(i)).write_bytes(seed(reader, content))
    atheris.Setup([*sys.argv, str(seeds)], once)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
