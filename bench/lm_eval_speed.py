"""Requests of the evaluation harness, against the harness's own `HFLM` over the same model.

Both have the same batch size, answer alike, and take turns. Questions with several choices share
their context, and tasks begin each context with the same examples: `HFLM` shares the forward of
choices of one token, `CrossfadeLM` the reading of all that texts begin with alike.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import crossfade as cf
from crossfade.bench import hardware
from crossfade.integrations.lm_eval import CrossfadeLM
from lm_eval import __version__
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from reports.lm_eval import render
from tqdm import tqdm

WORDS = "the river walks slowly because old stone roads matter and light falls before rain comes"


def text(words: random.Random, count: int) -> str:
    return " ".join(words.choices(WORDS.split(), k=count))


def cases(questions: int, words: int, new: int) -> dict[str, tuple[str, list[Any]]]:
    """The requests of each case: the harness's name of their kind, and their arguments."""
    draw = random.Random(0)
    contexts = [f"{text(draw, words)}?" for _ in range(questions)]
    examples = " ".join(f"{text(draw, words)}? {text(draw, 6)}." for _ in range(5))
    letters = [(c, f" {x}") for c in contexts for x in "ABCD"]
    choices = [(c, f" {text(draw, 6)}") for c in contexts for _ in range(4)]
    shots = [(f"{examples} {c}", choice) for c, choice in choices]
    alone = [(f"{text(draw, words)}?", f" {text(draw, 6)}") for _ in range(4 * questions)]
    settings = {"until": ["\n\n\n"], "max_gen_toks": new}
    return {
        "choices of one token": ("loglikelihood", letters),
        "choices of several tokens": ("loglikelihood", choices),
        "the same after 5 examples": ("loglikelihood", shots),
        "contexts with nothing in common": ("loglikelihood", alone),
        "texts": ("generate_until", [(c, settings) for c in contexts]),
    }


def disagree(found: Any, expected: Any) -> bool:
    if isinstance(found, str):
        return found != expected
    return abs(found[0] - expected[0]) > 1e-3 or found[1] != expected[1]


def measure(lms: dict[str, Any], kind: str, given: list[Any], rounds: int) -> dict[str, Any]:
    """Seconds of both in turns."""
    for lm in lms.values():  # What is done once for a model or a stop string is not counted.
        getattr(lm, kind)([Instance(kind, {}, given[0], 0)] * 2, disable_tqdm=True)
    times: dict[str, list[float]] = {name: [] for name in lms}
    answers: dict[str, list[Any]] = {}
    for turn in range(rounds):
        for name in lms if turn % 2 == 0 else reversed(lms):
            requests = [Instance(kind, {}, args, i) for i, args in enumerate(given)]
            answer: Callable[..., list[Any]] = getattr(lms[name], kind)
            start = time.perf_counter()
            answers[name] = answer(requests, disable_tqdm=True)
            times[name].append(time.perf_counter() - start)
    both = zip(answers["CrossfadeLM"], answers["HFLM"], strict=True)
    if wrong := sum(disagree(a, b) for a, b in both):
        raise RuntimeError(f"{wrong} of {len(given)} answers to {kind} differ")
    ratios = [a / b for a, b in zip(times["HFLM"], times["CrossfadeLM"], strict=True)]
    return {
        "requests": len(given),
        "seconds": {name: round(statistics.median(t), 2) for name, t in times.items()},
        "ratio": round(statistics.median(ratios), 2),
        "ratios": [round(r, 2) for r in sorted(ratios)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--questions", type=int, default=25, help="each with 4 choices")
    parser.add_argument("--words", type=int, default=30, help="of a question or example")
    parser.add_argument("--new", type=int, default=32, help="tokens of a text")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="also write the figures there")
    args = parser.parse_args()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    model, tokenizer = cf.models.smollm2()
    lms = {
        "HFLM": HFLM(model, tokenizer=tokenizer, batch_size=args.batch),
        "CrossfadeLM": CrossfadeLM(cf.Model(model, tokenizer=tokenizer), batch_size=args.batch),
    }
    report: dict[str, Any] = {
        "command": " ".join(["python bench/lm_eval_speed.py", *sys.argv[1:]]),
        "hardware": hardware("cpu"),
        "model": "SmolLM2-135M-Instruct",
        "lm_eval": __version__,
        "batch_size": args.batch,
        "rounds": args.rounds,
        "cases": {},
    }
    asked = cases(args.questions, args.words, args.new)
    for name, (kind, given) in tqdm(asked.items(), desc="lm_eval", file=sys.stderr):
        report["cases"][name] = measure(lms, kind, given, args.rounds)
    print(render(report))
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
