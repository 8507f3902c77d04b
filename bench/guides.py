"""What it saves to ask guides under a support less often, and for fewer columns.

    python bench/guides.py --json bench/results/guides.json

The blend is contrastive decoding, 1.5 base - 0.5 amateur, among the tokens that have at least a
tenth of the probability of the base's best one. The base is SmolLM2, the amateur a copy of it with
noise, and the prompts are real. All ways draw the same tokens and take turns; the figures are
medians of ratios to the way that does neither.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import crossfade as cf
from crossfade.bench import hardware
from decode_peers import load, perturbed, unending
from reports.guides import render
from tqdm import tqdm

WAYS = {
    "neither": {"restrict_guides": False, "skip_guides": False},
    "restricted heads": {"restrict_guides": True, "skip_guides": False},
    "skipped steps": {"restrict_guides": False, "skip_guides": True},
    "both": {"restrict_guides": True, "skip_guides": True},
}
SUBJECTS = [
    *("rain", "the moon", "bread", "bicycles", "chess", "rivers", "glass", "honey"),
    *("maps", "violins", "the desert", "trains", "salt", "lighthouses", "paper", "winter"),
]


def measure(blend: Any, prompts: list[Any], new: int, rounds: int) -> list[dict[str, Any]]:
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    found: dict[str, Any] = {}
    for _ in tqdm(range(rounds), desc=f"batch {len(prompts)}", file=sys.stderr):
        for way, options in WAYS.items():
            start = time.perf_counter()
            found[way] = cf.generate(
                blend, prompts, max_new_tokens=new, do_sample=True, seed=0,
                engine=cf.Engine(**options),
            )  # fmt: skip
            times[way].append((time.perf_counter() - start) / new)
    same = [found[w].responses == found["neither"].responses for w in WAYS]
    if not all(same):
        raise SystemExit(
            f"the ways do not write the same tokens: {dict(zip(WAYS, same, strict=True))}"
        )
    rows = []
    for way in WAYS:
        first, guide = found[way].stats.models
        ratios = [x / y for x, y in zip(times[way], times["neither"], strict=True)]
        rows.append(
            {
                "batch": len(prompts),
                "way": way,
                "step_ms": round(1e3 * statistics.median(times[way]), 2),
                "over_neither": round(statistics.median(ratios), 3),
                "guide_forwards": round(guide.forwards / first.forwards, 3),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    import torch

    model = load(torch.float32, quick=False)
    tokenizer = cf.models.smollm2()[1]
    expert = cf.Model(model, tokenizer=tokenizer, name="expert")
    amateur = cf.Model(unending(perturbed(model, 2)), tokenizer=tokenizer, name="amateur")
    blend = (1.5 * expert - 0.5 * amateur).within(cf.Support(min_p=0.1))
    chats = [[{"role": "user", "content": f"Write a few sentences about {s}."}] for s in SUBJECTS]
    report: dict[str, Any] = {
        "command": " ".join(["python bench/guides.py", *sys.argv[1:]]),
        "machine": hardware("cpu"),
        "versions": {p: metadata.version(p) for p in ("crossfade", "torch", "transformers")},
        "rows": [],
    }
    for batch in (1, 4, 16):
        report["rows"] += measure(blend, chats[:batch], 64, args.rounds)
        print(render(report), flush=True)
    if args.json is not None:
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
