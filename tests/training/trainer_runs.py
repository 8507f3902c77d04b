"""Small runs of our trainers and of TRL's own over the same models and rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import peft
import pytest
import small_runs
import tiny_models as tiny
import trl
from crossfade.training import DPOTrainer, KTOTrainer, SFTTrainer
from trained_models import make, texts

LORA = {"r": 2, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}
KINDS = {
    "sft": (SFTTrainer, trl.SFTTrainer, trl.SFTConfig),
    "dpo": (DPOTrainer, trl.DPOTrainer, trl.DPOConfig),
    "kto": (KTOTrainer, trl.KTOTrainer, trl.KTOConfig),
}

# TRL 1.16 and PEFT use names that Transformers 5.23 has renamed
OLD_NAMES = pytest.mark.filterwarnings("ignore:`[a-z_.]*gradient_checkpointing:FutureWarning")


def arguments(kind: str, folder: Path, **options: Any) -> Any:
    return KINDS[kind][2](**{**small_runs.settings(folder, 3, 3), **options})


def trainer(
    kind: str,
    folder: Path,
    *,
    trls: bool = False,
    model: str = "llama",
    lora: bool | dict[str, Any] = True,
    rows: list[dict[str, Any]] | None = None,
    adapter: Any = None,
    others: dict[str, Any] | None = None,
    **options: Any,
) -> Any:
    """Our trainer, or with `trls` TRL's own, with the same model, rows and seed."""
    if lora and adapter is None:
        adapter = peft.LoraConfig(**{**LORA, **(lora if isinstance(lora, dict) else {})})
    given = dict(others or {})
    if kind != "sft" and adapter is None and given.get("loss") not in ("orpo", "simpo"):
        given["ref_model"] = make(model).eval()
    return KINDS[kind][trls](
        make(model),
        args=arguments(kind, folder, **options),
        train_dataset=datasets.Dataset.from_list(texts(kind) if rows is None else rows),
        processing_class=tiny.make_tokenizer(),
        peft_config=adapter,
        **given,
    )


def curve(made: Any) -> list[dict[str, float]]:
    made.train()
    return [x for x in made.state.log_history if "loss" in x]


def check_same(kind: str, folder: Path, rtol: float = 2e-5, **options: Any) -> Any:
    """Compare every figure that our trainer and TRL's log at every step."""
    runs = {t: trainer(kind, folder / str(t), trls=t, **options) for t in (False, True)}
    for run in runs.values():
        run.train()
    ours, theirs = (runs[t].state.log_history for t in (False, True))
    assert len(ours) == len(theirs) > 1
    skipped = ("runtime", "per_second", "flos")
    for mine, its in zip(ours, theirs, strict=True):
        assert mine.keys() == its.keys()
        for name in mine:
            if not name.endswith(skipped):
                assert mine[name] == pytest.approx(its[name], rel=rtol, abs=rtol), name
    # the weights have changed
    assert ours[0]["loss"] != pytest.approx(ours[1].get("loss"), rel=1e-4)
    return runs[False]
