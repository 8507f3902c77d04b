"""Small runs of preference training, and callbacks that look on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import peft
import pytest
import small_runs
import tiny_models as tiny
import torch
import transformers
import trl
from crossfade import dynamics, training
from statements import pairs, statements

# TRL 1.16 and PEFT use names that Transformers 5.23 has renamed
OLD_NAMES = pytest.mark.filterwarnings("ignore:`[a-z_.]*gradient_checkpointing:FutureWarning")
ANSWERS = {"yes": " great", "no": " awful"}
LORA = {"r": 2, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}


class Recorder(transformers.TrainerCallback):
    """Hears what a reporter would, whose place is before all callbacks of users."""

    def __init__(self) -> None:
        self.heard: list[dict[str, Any]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        self.heard.append({**logs, "step": state.global_step})


def arguments(folder: Path, kind: Any = trl.DPOConfig, **options: Any) -> Any:
    return kind(**{**small_runs.settings(folder, 4, 4), **options})


def rows_of_ids(each: int = 6) -> list[dict[str, Any]]:
    """Statements as pairs, to train on."""
    return dynamics.statement_pairs(statements(each=each), tiny.make_tokenizer(), **ANSWERS)


def trainer(
    folder: Path,
    watch: dynamics.Watch | None = None,
    *,
    trls: bool = False,
    model: Any = None,
    lora: dict[str, Any] | None = None,
    rows: list[dict[str, Any]] | None = None,
    callbacks: Any = (),
    others: dict[str, Any] | None = None,
    **options: Any,
) -> Any:
    """Our DPO trainer, or TRL's, which the watch is attached to."""
    model = tiny.make() if model is None else model
    made = (trl if trls else training).DPOTrainer(
        model,
        # TRL turns dropout off by default, and a watch must not depend on that
        args=arguments(folder, **{"disable_dropout": False, **options}),
        train_dataset=datasets.Dataset.from_list(pairs(each=8) if rows is None else rows),
        processing_class=tiny.make_tokenizer(),
        peft_config=None if lora is None else peft.LoraConfig(**{**LORA, **lora}),
        callbacks=[*callbacks, *([] if watch is None or trls else [watch])],
        **{**({} if lora is not None else {"ref_model": tiny.make()}), **(others or {})},
    )
    if trls and watch is not None:
        assert watch.attach(made) is watch
    return made


def weights(made: Any) -> dict[str, torch.Tensor]:
    return {name: x.clone() for name, x in made.model.state_dict().items()}
