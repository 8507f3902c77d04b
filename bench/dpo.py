"""DPO of SmolLM2 by our trainer and by TRL's own: the same curves, what a step takes and holds.

    OMP_NUM_THREADS=2 python bench/dpo.py --json bench/results/dpo.json

Pairs are short movie reviews from templates: the chosen one enthusiastic, the rejected one bitter.
Both trainers have the same seed, data and settings: float32, a LoRA adapter with the reference by
its absence at every step, or all weights, the tied head among them, with references made before.
Each runs in processes of its own, in turns. Times are medians of steps, the first two left out;
memory is the rise of a process while it trains, over the model.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import crossfade as cf
import datasets
import peft
import trl
from crossfade.bench import hardware
from crossfade.extras import old_names
from crossfade.training import DPOTrainer
from decode import peak_of
from reports.dpo import render
from transformers import TrainerCallback

TRAINERS = {"ours": DPOTrainer, "TRL's": trl.DPOTrainer}
CASES = {"LoRA": "LoRA, frozen head", "full": "all weights, tied head"}
LORA = {"r": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
WARM_UP = 2  # steps that are left out of the times

THINGS = ("plot", "cast", "music", "ending", "camera work", "dialogue", "first act", "villain")
WORDS = {
    "chosen": ("wonderful", "brilliant", "moving", "delightful", "superb", "a joy"),
    "rejected": ("dreadful", "tedious", "a mess", "painful", "lifeless", "an insult"),
}
OPENINGS = {"chosen": "I loved every minute of it.", "rejected": "I want my evening back."}
FORMS = ("The {} was {}.", "As for the {}, it was {}.", "Let me say that the {} was {}.")


def review(kind: str, words: int, draw: random.Random) -> str:
    sentences = [OPENINGS[kind]]
    while sum(len(s.split()) for s in sentences) < words:
        form = draw.choice(FORMS)
        sentences.append(form.format(draw.choice(THINGS), draw.choice(WORDS[kind])))
    return " ".join(sentences)


def pairs(count: int, tokens: int, seed: int = 0) -> list[dict[str, Any]]:
    """Pairs whose responses have from two thirds to four thirds of `tokens` tokens."""
    draw = random.Random(seed)
    rows = []
    for i in range(count):
        asked = f"Write a review of the movie number {i + 1} of the festival."
        row: dict[str, Any] = {"prompt": [{"role": "user", "content": asked}]}
        for kind in WORDS:
            words = round(0.78 * tokens * draw.uniform(2 / 3, 4 / 3))  # a token is 0.78 words here
            row[kind] = [{"role": "assistant", "content": review(kind, words, draw)}]
        rows.append(row)
    return rows


class _Clock(TrainerCallback):
    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._start = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._start = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds.append(time.perf_counter() - self._start)


def train(
    case: str, name: str, args: argparse.Namespace, model: Any, tokenizer: Any
) -> dict[str, Any]:
    """Train, and return the loss, reward margin and seconds of each step and the rise of memory."""
    clock = _Clock()
    lora = case == "LoRA"
    with tempfile.TemporaryDirectory() as folder, old_names():
        config = trl.DPOConfig(
            output_dir=folder,
            max_steps=args.steps,
            per_device_train_batch_size=args.batch,
            learning_rate=1e-4 if lora else 1e-6,
            precompute_ref_log_probs=not lora,
            logging_steps=1,
            report_to="none",
            save_strategy="no",
            bf16=False,
            use_cpu=True,
            gradient_checkpointing=False,
            disable_tqdm=True,
            max_length=None,
        )
        trainer = TRAINERS[name](
            model,
            args=config,
            train_dataset=datasets.Dataset.from_list(pairs(args.pairs, args.tokens)),
            processing_class=tokenizer,
            peft_config=peft.LoraConfig(**LORA) if lora else None,
            callbacks=[clock],
        )
        _, peak = peak_of(trainer.train, "cpu")
    steps = [x for x in trainer.state.log_history if "loss" in x]
    return {
        "loss": [x["loss"] for x in steps],
        "margin": [x["rewards/margins"] for x in steps],
        "seconds": clock.seconds,
        "memory_mb": peak,
        "tokens": steps[-1]["num_tokens"] / len(steps),
    }


def apart(case: str, name: str, args: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, __file__, "--one", case, name]
    for option in ("steps", "pairs", "tokens", "batch"):
        command += [f"--{option}", str(getattr(args, option))]
    # offline, TRL's own trainer does not send word of the run
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=env)
    return json.loads(done.stdout.splitlines()[-1])


def row_of(case: str, runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """The figures of a case, from all rounds of both trainers; the curves are the first round's."""
    seconds = {
        name: statistics.median([t for r in rounds for t in r["seconds"][WARM_UP:] or r["seconds"]])
        for name, rounds in runs.items()
    }
    first = {name: rounds[0] for name, rounds in runs.items()}
    off = [abs(a - b) for a, b in zip(*(r["loss"] for r in first.values()), strict=True)]
    peaks = {name: [r["memory_mb"] for r in rounds] for name, rounds in runs.items()}
    return {
        "case": case,
        "trained": CASES[case],
        "loss": {name: r["loss"] for name, r in first.items()},
        "margin": {name: r["margin"] for name, r in first.items()},
        "largest_difference": max(off),
        "step_seconds": {name: round(t, 3) for name, t in seconds.items()},
        "memory_mb": {name: None if None in x else max(x) for name, x in peaks.items()},
        "tokens_a_step": first["ours"]["tokens"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--pairs", type=int, default=48)
    parser.add_argument("--tokens", type=int, default=96, help="of a response, about (%(default)s)")
    parser.add_argument("--batch", type=int, default=4, help="pairs a step (%(default)s)")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--one", nargs=2, metavar=("CASE", "TRAINER"), help="of one alone")
    args = parser.parse_args()
    if args.one:
        # what libraries print goes to stderr, as stdout is for the figures
        out, sys.stdout = sys.stdout, sys.stderr
        found = train(*args.one, args, *cf.models.smollm2())
        print(json.dumps(found), file=out)
        return
    rows = []
    for case in args.cases:
        runs: dict[str, list[dict[str, Any]]] = {name: [] for name in TRAINERS}
        for _ in range(args.rounds):
            for name, found in runs.items():
                found.append(apart(case, name, args))
        rows.append(row_of(case, runs))
    report: dict[str, Any] = {
        "command": " ".join(["python bench/dpo.py", *sys.argv[1:]]),
        "machine": hardware("cpu"),
        "versions": {p: metadata.version(p) for p in ("crossfade", "torch", "transformers", "trl")},
        "sizes": {name: getattr(args, name) for name in ("steps", "pairs", "tokens", "batch")},
        "rows": rows,
    }
    print(render(report))
    if args.json is not None:
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
