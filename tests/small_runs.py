"""The arguments that small runs of trainers have in common."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def settings(folder: Path, steps: int, batch: int) -> dict[str, Any]:
    """Arguments of some steps on a CPU, of which each is logged and nothing is reported."""
    return {
        "output_dir": str(folder),
        "max_steps": steps,
        "per_device_train_batch_size": batch,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "report_to": "none",
        "save_strategy": "no",
        "bf16": False,
        "use_cpu": True,
        "disable_tqdm": True,
        "gradient_checkpointing": False,
    }
