"""Runs of ``crossfade train`` from files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml
from crossfade import cli
from trained_models import texts

LORA = {"r": 2, "target_modules": ["q_proj", "down_proj"]}


def settings(base: str, folder: Path, kind: str = "dpo", **more: Any) -> dict[str, Any]:
    data = folder / f"{kind}.jsonl"
    data.write_text("\n".join(json.dumps(row) for row in texts(kind)) + "\n")
    arguments = {
        "output_dir": str(folder / "out"),
        "max_steps": 4,
        "per_device_train_batch_size": 3,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "save_steps": 2,
    }
    return {"model": base, "data": str(data), "lora": LORA, "arguments": arguments, **more}


def train(kind: str, folder: Path, given: dict[str, Any], *options: str) -> int:
    file = folder / f"{kind}.yaml"
    file.write_text(yaml.safe_dump(given))
    return cli.main(["train", kind, "--config", str(file), *options])


def losses(folder: Path, step: int) -> list[float]:
    state = json.loads((folder / "out" / f"checkpoint-{step}" / "trainer_state.json").read_text())
    return [x["loss"] for x in state["log_history"] if "loss" in x]
