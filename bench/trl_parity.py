"""Our trainers against TRL's own, option by option: losses, metrics and gradients of every step.

    OMP_NUM_THREADS=1 python bench/trl_parity.py --json bench/results/trl_parity.json

Both train one tiny random model in float32, by plain SGD, on the same rows in the same order. The
error of a figure is its difference over the larger of 1 and what TRL has; that of a gradient is the
largest difference of its numbers over the largest of them. Both must be within `LIMIT`: sums of a
few hundred float32 products in another order. A case that TRL refuses must be refused by ours.
With `--only` the other cases keep what the file of results says of them.
"""

from __future__ import annotations

import argparse
import copy
import inspect
import json
import logging
import math
import os
import sys
import tempfile
import warnings
from importlib import metadata
from pathlib import Path
from typing import Any

import datasets
import peft
import torch
import transformers
import trl
from crossfade import losses
from crossfade.bench import hardware
from crossfade.extras import old_names
from reports.trl_parity import render
from trl_parity_cases import ADAPTERS, KINDS, Case, all_cases, make, make_tokenizer, rows_of

LIMIT = 2e-4
PLAIN = {
    "max_steps": 3,
    "per_device_train_batch_size": 4,
    "logging_steps": 1,
    "learning_rate": 0.02,
    "max_grad_norm": 0.0,  # gradients are not clipped
    "optim": "sgd",
    "report_to": "none",
    "save_strategy": "no",
    "bf16": False,
    "use_cpu": True,
    "disable_tqdm": True,
    "gradient_checkpointing": False,
}
# What a loss by its name calls the arguments of TRL's config.
LOSS_OPTIONS = {"beta": "beta", "label_smoothing": "label_smoothing", "discopop_tau": "tau"}
# TRL's own options that say where a model or its data come from, or how fast they do.
NOT_COMPARED = {
    "chat_template_path",
    "dataset_kwargs",
    "dataset_num_proc",
    "model_init_kwargs",
    "trust_remote_code",
}


# ---- Runs --------------------------------------------------------------------------------------


class Gradients(transformers.TrainerCallback):
    """Keeps the gradients of each step, as the optimizer has them."""

    def __init__(self) -> None:
        self.steps: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        named = given["model"].named_parameters()
        self.steps.append({n: p.grad.clone() for n, p in named if p.grad is not None})


def run(case: Case, trls: bool, folder: Path) -> tuple[list[dict[str, float]], list[Any]]:
    """Train, and return what was logged at each step and the gradients."""
    ours, theirs, config = KINDS[case.kind]
    options = {**PLAIN, **case.options}
    if case.evaluated:
        options |= {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 4}
    given: dict[str, Any] = {}
    if case.by_name and not trls:
        given, options = by_name(options)
    args = config(output_dir=str(folder), **options)
    data = datasets.Dataset.from_list(rows_of(case.kind, case.rows))
    model, adapter = make(case.model), ADAPTERS[case.adapter]() if case.adapter else None
    if case.trained:
        torch.manual_seed(1)
        model, adapter = peft.get_peft_model(model, adapter), None
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.2)
    if case.kind != "sft" and case.adapter is None:
        given["ref_model"] = make(case.model)
    seen = Gradients()
    made = (theirs if trls else ours)(
        model,
        args=args,
        train_dataset=data,
        eval_dataset=copy.deepcopy(data) if case.evaluated else None,
        processing_class=make_tokenizer(),
        peft_config=adapter,
        callbacks=[seen],
        **given,
    )
    made.remove_callback(transformers.PrinterCallback)
    made.train()
    skipped = ("runtime", "per_second", "flos")
    logs = [
        {k: x for k, x in log.items() if not k.endswith(skipped)} for log in made.state.log_history
    ]
    return logs, seen.steps


def by_name(options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The loss that options of TRL ask for as arguments of our trainer, and the other options."""
    (name,) = options["loss_type"]
    known = inspect.signature(losses.PAIR_LOSSES[name]).parameters
    asked = {**{"beta": trl.DPOConfig.beta}, **options}
    chosen = {to: asked[k] for k, to in LOSS_OPTIONS.items() if k in asked and to in known}
    left = {k: x for k, x in options.items() if k not in ("loss_type", *LOSS_OPTIONS)}
    return {"loss": name, "loss_options": chosen}, left


def attempt(case: Case, trls: bool, folder: Path) -> Any:
    """What `run` gives, or how the case was refused."""
    try:
        return run(case, trls, folder)
    except Exception as error:  # TRL refuses by errors of many kinds
        return f"{type(error).__name__}: {' '.join(str(error).split()):.120}"


def compare(case: Case, folder: Path) -> dict[str, Any]:
    """The largest errors of our trainer, or how the case was refused."""
    ours, theirs = (attempt(case, trls, folder / str(trls)) for trls in (False, True))
    if isinstance(ours, str) or isinstance(theirs, str):
        both = isinstance(ours, str) and isinstance(theirs, str)
        told = {"ours": ours if isinstance(ours, str) else None}
        told["trl"] = theirs if isinstance(theirs, str) else None
        return {"refused": told, "ok": both}
    errors = {"loss": 0.0, "metrics": 0.0, "gradients": 0.0}
    same = [log.keys() for log in ours[0]] == [log.keys() for log in theirs[0]]
    for mine, its in zip(ours[0], theirs[0], strict=False):
        # Before anything is learnt, rounding decides which reward is larger.
        ties = all(abs(log.get("rewards/margins", 1.0)) < 1e-6 for log in (mine, its))
        for name in mine.keys() & its.keys():
            if ties and name.endswith("accuracies"):
                continue
            kind = "loss" if name.endswith("loss") else "metrics"
            errors[kind] = max(errors[kind], off(mine[name], its[name]))
    same = same and len(ours[1]) == len(theirs[1]) > 0
    for mine, its in zip(ours[1], theirs[1], strict=False):
        same = same and mine.keys() == its.keys() and len(mine) > 0
        largest = max(float(g.abs().max()) for g in its.values())
        for name in mine.keys() & its.keys():
            error = float((mine[name] - its[name]).abs().max()) / max(largest, 1e-30)
            errors["gradients"] = max(errors["gradients"], error)
    return {**errors, "ok": same and all(x <= LIMIT for x in errors.values())}


def off(a: Any, b: Any) -> float:
    if not isinstance(a, float | int) or math.isnan(b):
        return 0.0 if a == b or (math.isnan(a) and math.isnan(b)) else math.inf
    return abs(a - b) / max(1.0, abs(b))


def quiet() -> None:
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    datasets.disable_progress_bars()
    os.environ["TQDM_DISABLE"] = os.environ["CI"] = "1"  # no bars, and no telemetry, of TRL's


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", default="", help="cases whose name has this text")
    args = parser.parse_args()
    quiet()
    torch.set_num_threads(1)
    cases: dict[str, Any] = {}
    if args.only and args.json is not None and args.json.exists():
        cases = json.loads(args.json.read_text())["cases"]
    every = all_cases()
    for case in every:
        if args.only not in case.name:
            continue
        with tempfile.TemporaryDirectory() as folder, old_names():
            cases[case.name] = found = compare(case, Path(folder))
        if not found["ok"]:
            print(f"{case.name}: {found}", flush=True)
    cases = {case.name: cases[case.name] for case in every if case.name in cases}
    report = {
        "command": " ".join(["python bench/trl_parity.py", *sys.argv[1:]]),
        "machine": hardware("cpu"),
        "versions": {x: metadata.version(x) for x in ("torch", "transformers", "trl", "peft")},
        "limit": LIMIT,
        "cases": cases,
    }
    print(render(report))
    if args.json is not None:
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    raise SystemExit(not all(found["ok"] for found in cases.values()))


if __name__ == "__main__":
    main()
