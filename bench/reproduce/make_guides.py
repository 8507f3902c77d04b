"""The guides that ship, made from nothing but SmolLM2 and a few rewards.

    python bench/reproduce/make_guides.py --work build/guides
    python bench/reproduce/make_guides.py --work build/guides --only aligner --install

The base answers the training prompts of `reviews`, and each reward ranks the answers. For each
reward three things are trained on that: a LoRA adapter by DPO (the implicit value, and the guide of
a blend), a low-rank Q-head by FUDGE (the explicit value), and, to compare, an adapter of more
weights by the same DPO (the model that is fine-tuned directly). The guide `aligner` is that of the
first seed of `metaaligner`, whose stages make it. Every stage keeps what it made in `--work` and is
skipped if it is there; one that was interrupted goes on from its last checkpoint. `--only` makes
some of them. `--install` copies the guides, in bfloat16, into the package's source.
"""

from __future__ import annotations

import argparse
import functools
import json
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import crossfade as cf
import metaaligner
import peft
import reviews
import torch
from crossfade import training
from crossfade.extras import old_names
from crossfade.models import saved_value_heads as heads
from crossfade.models import small_model
from crossfade.training import data
from datasets import Dataset
from safetensors.torch import load_file, save_file
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging
from trl import DPOConfig

SAMPLES, NEW, TEMPERATURE, SEED = 8, 40, 0.7, 0
GUIDE = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "o_proj"]}
DIRECT = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
FILES = (  # of an adapter, of a value head: weights, settings, and the backbone's key in these
    (*reversed(heads.ADAPTER_FILES), "base_model_name_or_path"),
    (heads.WEIGHTS, heads.SETTINGS, "backbone"),
)
BETA, PAIRS, BATCH = 0.1, 2, 16
RANK, VALUE_EPOCHS, VALUE_RATE = 8, 30, 1e-2


def rollouts(model: Any, tokenizer: Any, work: Path) -> list[dict[str, Any]]:
    """The base's answers with their rewards. They are written once, as all stages need them."""
    base = cf.Model(model, tokenizer=tokenizer, name="base")
    return training.rollouts(
        base,
        reviews.prompts(reviews.TRAINED),
        reviews.REWARDS,
        work / "rollouts.jsonl",
        n=SAMPLES,
        seed=SEED,
        batch_size=32,
        max_new_tokens=NEW,
        temperature=TEMPERATURE,
    )


def adapter(reward: str, lora: dict[str, Any], rate: float, folder: Path) -> None:
    """Train an adapter by DPO of the best answers against the worst; without it the model is the
    reference."""
    model, tokenizer = cf.models.smollm2()
    rows = rollouts(model, tokenizer, folder.parent)
    args = DPOConfig(
        output_dir=str(folder),
        beta=BETA,
        per_device_train_batch_size=BATCH,
        learning_rate=rate,
        lr_scheduler_type="linear",
        warmup_steps=3,
        num_train_epochs=1,
        precompute_ref_log_probs=True,
        gradient_checkpointing=False,
        bf16=False,
        save_steps=10,
        logging_steps=1,
        dataloader_pin_memory=torch.cuda.is_available(),
        report_to="none",
        seed=SEED,
        disable_tqdm=False,
    )
    trainer = training.DPOTrainer(
        model,
        args=args,
        train_dataset=Dataset.from_list(training.pairs(rows, reward, per_prompt=PAIRS)),
        processing_class=tokenizer,
        peft_config=peft.LoraConfig(task_type="CAUSAL_LM", **lora),
    )
    trainer.train(resume_from_checkpoint=_checkpoint(folder))
    trainer.save_model()
    _keep_log(trainer, folder)


def q_head(reward: str, folder: Path) -> None:
    """Train a Q-head by FUDGE on the base's own answers.

    Rewards are taken less their mean. A shift of all values changes nothing, and tokens that were
    never sampled, whose value stays 0, then have the mean.
    """
    model, tokenizer = cf.models.smollm2()
    rows = rollouts(model, tokenizer, folder.parent)
    examples = data.values(rows, reward)
    mean = sum(row["reward"] for row in examples) / len(examples)
    examples = [{**row, "reward": row["reward"] - mean} for row in examples]
    held_out = len(examples) // 10
    args = training.ValueConfig(
        output_dir=str(folder),
        objective="fudge",
        cache_hidden=True,
        per_device_train_batch_size=64,
        learning_rate=VALUE_RATE,
        num_train_epochs=VALUE_EPOCHS,
        eval_strategy="epoch",
        logging_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=1,
        load_best_model_at_end=True,
        dataloader_pin_memory=torch.cuda.is_available(),
        report_to="none",
        seed=SEED,
    )
    torch.manual_seed(SEED)
    trainer = training.ValueTrainer(
        training.value_model(model, "q", rank=RANK),
        args,
        train_dataset=Dataset.from_list(examples[held_out:]),
        eval_dataset=Dataset.from_list(examples[:held_out]),
        processing_class=tokenizer,
    )
    trainer.train(resume_from_checkpoint=_checkpoint(folder))
    trainer.save_model()
    _keep_log(trainer, folder)


def aligner(folder: Path) -> None:
    """Train an aligner by the stages of `metaaligner` that lead to that of the first seed."""
    run, seed = folder / "run", metaaligner.SEEDS[0]
    last = f"aligner-{seed}"
    stages = ["pairs", "rows", f"warm-up-{seed}", f"equal-{seed}", last]
    metaaligner.main(["--work", str(run), "--only", *stages])
    for name in (*heads.ADAPTER_FILES, "log.json"):  # the log, which marks it as done, comes last
        shutil.copy(run / last / name, folder / name)


def _checkpoint(folder: Path) -> str | None:
    return get_last_checkpoint(str(folder)) if folder.is_dir() else None


def _keep_log(trainer: Any, folder: Path) -> None:
    """Mark the stage as done, which comes last of all."""
    (folder / "log.json").write_text(json.dumps(trainer.state.log_history, indent=1))


def stage(folder: Path, run: Callable[[Path], None]) -> None:
    if (folder / "log.json").exists():
        print(f"{folder}: there already")
        return
    folder.mkdir(exist_ok=True)
    start = time.perf_counter()
    run(folder)
    print(f"{folder}: {time.perf_counter() - start:.0f} s")


def install(work: Path, target: Path, names: Sequence[str] = cf.models.GUIDES) -> None:
    """Copy what ships, its weights in bfloat16 and its backbone under its public name."""
    for folder in (work / name for name in names):
        made = target / folder.name
        made.mkdir(parents=True, exist_ok=True)
        weights, settings, backbone = next(f for f in FILES if (folder / f[0]).exists())
        said = {**json.loads((folder / settings).read_text()), backbone: small_model.HUB_ID}
        (made / settings).write_text(json.dumps(said, indent=2) + "\n")
        halves = {k: x.bfloat16() for k, x in load_file(folder / weights).items()}
        save_file(halves, made / weights, metadata={"format": "pt"})
        print(f"{made / weights}: {(made / weights).stat().st_size / 1e6:.2f} MB")


def every_stage() -> dict[str, Callable[[Path], None]]:
    """All stages by name; each makes what its folder holds."""
    found: dict[str, Callable[[Path], None]] = {}
    for r in reviews.REWARDS:
        found[r] = functools.partial(adapter, r, GUIDE, 1e-3)
        found[f"{r}_value"] = functools.partial(q_head, r)
        found[f"{r}_direct"] = functools.partial(adapter, r, DIRECT, 2e-4)
    return found | {"aligner": aligner}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("build/guides"))
    stages = every_stage()
    parser.add_argument("--only", nargs="+", metavar="STAGE", choices=[*stages], default=[*stages])
    parser.add_argument("--install", action="store_true", help="into the package's source")
    args = parser.parse_args(arguments)
    logging.disable_progress_bar()  # of loading weights
    args.work.mkdir(parents=True, exist_ok=True)
    with old_names():
        for name, run in stages.items():
            if name in args.only:
                stage(args.work / name, run)
    if args.install:
        names = [name for name in cf.models.GUIDES if name in args.only]
        install(args.work, Path(cf.__file__).parent / "guides", names)


if __name__ == "__main__":
    main()
