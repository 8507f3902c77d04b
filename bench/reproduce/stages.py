"""What the reproductions share: stages that are kept and skipped, training that goes on, answers.

A stage writes into its folder in `--work`, and its log, which comes last, marks it as done.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import crossfade as cf
import torch
from crossfade import training
from crossfade.extras import old_names
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging

Row = dict[str, Any]
Stage = Callable[[Path, Path], dict[str, int]]  # of `--work` and its folder: tokens, by their kind
LOG, ANSWERS = "log.json", "answers.jsonl"


def main(
    script: str,
    doc: str,
    stages: Mapping[str, Stage],
    settings: Mapping[str, Any],
    report: Callable[[Path, str], Row],
    render: Callable[[Row], str],
    arguments: Sequence[str] | None,
) -> Row | None:
    """The command line of a reproduction: run what is missing, and report once all is there.

    Args:
        script: the file's name, without its suffix.
        stages: by name, in an order in which each finds what it needs.
        settings: what runs that share `--work` must share.
        report: of `--work` and the command, all figures.
        render: the figures' tables.
    """
    given = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("build") / script)
    parser.add_argument("--json", type=Path, help="where the figures go once all stages are there")
    parser.add_argument("--only", nargs="+", metavar="STAGE", choices=[*stages], default=[])
    args = parser.parse_args(given)
    args.work.mkdir(parents=True, exist_ok=True)
    kept, now = args.work / "settings.json", json.loads(json.dumps(settings))
    if kept.exists() and (old := json.loads(kept.read_text())) != now:
        changed = ", ".join(name for name in now if old.get(name) != now[name])
        parser.error(f"{args.work} was begun with other settings ({changed}); give another --work")
    kept.write_text(json.dumps(now, indent=1) + "\n")
    logging.disable_progress_bar()  # of loading weights
    with old_names():
        for name, stage in stages.items():
            if name in args.only or not args.only:
                run(args.work, name, stage)
    missing = [name for name in stages if not (args.work / name / LOG).exists()]
    if missing:
        print(f"missing: {', '.join(missing)}")
        return None
    command = " ".join([f"python bench/reproduce/{script}.py", *given])
    found: Row = json.loads(json.dumps(report(args.work, command)))  # as readers of the file see it
    if args.json is not None:
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    print(render(found))
    return found


def run(work: Path, name: str, stage: Stage) -> None:
    """Run a stage that is not there yet."""
    folder = work / name
    if (folder / LOG).exists():
        print(f"{name}: there already", flush=True)
        return
    folder.mkdir(parents=True, exist_ok=True)
    start, cpu = time.perf_counter(), time.process_time()
    tokens = stage(work, folder)
    log = {
        "tokens": tokens,
        "seconds": round(time.perf_counter() - start, 1),
        "processor_seconds": round(time.process_time() - cpu, 1),
    }
    (folder / LOG).write_text(json.dumps(log) + "\n")
    print(f"{name}: {log}", flush=True)


def costs(work: Path, names: Sequence[str]) -> list[Row]:
    return [{"stage": name, **json.loads((work / name / LOG).read_text())} for name in names]


# ---- training


def common(folder: Path, seed: int) -> Row:
    """The arguments of all trainers."""
    return {
        "output_dir": str(folder),
        "gradient_checkpointing": False,
        "bf16": False,
        "save_steps": 10,
        "save_total_limit": 1,
        "logging_steps": 5,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "report_to": "none",
        "seed": seed,
        "disable_tqdm": True,
        "max_length": None,
    }


def fit(trainer: Any, folder: Path) -> dict[str, int]:
    """Train from the last checkpoint on; the tokens that were trained on."""
    last = get_last_checkpoint(str(folder)) if folder.is_dir() else None
    trainer.train(resume_from_checkpoint=last)
    trainer.save_model()
    history = trainer.state.log_history
    (folder / "history.json").write_text(json.dumps(history, indent=1) + "\n")
    return {"trained": int(max(log.get("num_tokens", 0) for log in history))}


# ---- answers


def write(
    blend: Any, folder: Path, prompts: Sequence[Any], rewards: Mapping[str, Any], **options: Any
) -> dict[str, int]:
    """Answers to prompts with their rewards, by `training.rollouts`."""
    rows = training.rollouts(blend, prompts, rewards, folder / ANSWERS, **options)
    return {"sampled": sum(len(r["ids"]) for row in rows for r in row["responses"])}


def answers(folder: Path) -> list[Row]:
    return training.read_jsonl(folder / ANSWERS)


def base(dtype: torch.dtype) -> tuple[Any, Any]:
    """SmolLM2 and its tokenizer, with weights that lose what the dtype does not hold."""
    model, tokenizer = cf.models.smollm2()
    return model.to(dtype), tokenizer
