"""Coverage-guided fuzzing of what reads files: JSON lines, YAML, training rows, saved settings.

    pip install atheris
    python bench/fuzz_readers.py -max_total_time=300 CORPUS

Every input is read, or refused by an error that names its place: ValueError or TypeError. The
arguments are libFuzzer's; CORPUS is a folder that is read and added to, and may be empty.
"""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import atheris

with atheris.instrument_imports(include=["crossfade"]):
    from crossfade import reading, records
    from crossfade.training import checkpoints, config, data, rows, value_head
    from crossfade.training.value_data import Rollouts

FOLDER = Path(tempfile.mkdtemp())
SEEDS = [
    {"prompt": "a", "chosen": "b", "rejected": "c", "margins": [1.0]},
    {"prompt": [{"role": "user", "content": "a"}], "completion": [], "label": True},
    {"prompt_ids": [5], "completion_ids": [6], "reward": 1.0, "finished": True},
    {"input_ids": [5, 6], "completion_mask": [0, 1], "labels": [-100, 6]},
    {"messages": [{"from": "user", "value": "a"}], "tools": "[{}]", "text": "a"},
    {
        "prompt": "a",
        "prompt_ids": [5],
        "responses": [{"text": "b", "ids": [6], "finished": True, "rewards": {"r": 1.0}}],
    },
    {"model": "m", "data": "d.jsonl", "arguments": {"output_dir": "o", "max_steps": 1e-4}},
    {"format": 1, "kind": "q", "rank": None, "hidden_size": 8, "vocabulary": 61, "adapter": False},
    {"global_step": 4, "weight_map": {"a": "b.safetensors"}},
]


def once(given: bytes) -> None:
    """One input, by every reader. Errors other than those allowed end the run."""
    try:
        text = reading.decode(given, "input")
        found = records.objects(text.split("\n"), "input")
    except ValueError:
        found = []
    file = FOLDER / "input"
    file.write_bytes(given)
    for read in (yaml, settings, checkpoint):
        with contextlib.suppress(ValueError, TypeError):
            read(file)
    if not found:
        return
    for kind in ("sft", "dpo", "kto"):
        with contextlib.suppress(ValueError, TypeError):
            rows.check_rows(kind, found, "input")
    for build in (data.pairs, data.values):
        with contextlib.suppress(ValueError, TypeError):
            build(found, "r")
    with contextlib.suppress(ValueError, TypeError):
        Rollouts(found, None, 61, "score", "input")


def yaml(file: Path) -> Any:
    return config.read("dpo", file)


def settings(file: Path) -> Any:
    return value_head._read_settings(file)


def checkpoint(file: Path) -> Any:
    """Damage is told, and never raised."""
    folder = FOLDER / "checkpoint-4"
    folder.mkdir(exist_ok=True)
    (folder / "trainer_state.json").write_bytes(file.read_bytes())
    (folder / "model.safetensors.index.json").write_bytes(file.read_bytes())
    assert isinstance(checkpoints.damage(folder, ["model.safetensors"]), str)


def main() -> None:
    seeds = FOLDER / "seeds"
    seeds.mkdir()
    for i, seed in enumerate(SEEDS):
        (seeds / str(i)).write_text(json.dumps(seed))
    atheris.Setup([*sys.argv, str(seeds)], once)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
