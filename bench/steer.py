"""What guidance gains: tokens blended, chunks searched, and both, at equal samples and equal time.

    python bench/steer.py --json bench/results/steer.json

100 questions about movies to three critics, which are one small model under three system prompts.
The base is the neutral one. A token's guide is ``base + w * (enthusiastic - bitter)``; a text's is
the value `LogRatio(enthusiastic, bitter)`. Neither has seen the gold reward, VADER, which judges.

KL(decoded || base) of a response is bounded from above, as `steered` says. The fader, the blend
without a search, is run at several w: its reward at the same KL stands beside each method's.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import crossfade as cf
from crossfade import demo, metrics
from crossfade.bench import hardware
from steered import between, figures
from tqdm import tqdm

SUBJECTS = (
    *demo.MOVIES,
    "a western",
    "a cartoon about two cats",
)
PLACES = (
    "you saw last night",
    "that won the prize",
    "with the famous cast",
    "your neighbour made",
    "from the eighties",
    "with the long ending",
    "that everybody talks about",
    "you saw on a plane",
    "with the loud music",
    "that had a sequel",
)
QUESTIONS = [demo.QUESTION.format(f"{s} {p}") for s in SUBJECTS for p in PLACES]
FADER = (0.0, 0.5, 1.0, 2.0, 3.0, 4.0)
WEIGHT = 0.5  # of the blend that is searched
WIDTH, SAMPLES, CHUNK, NEW = 2, 4, 4, 16
ROWS = WIDTH * SAMPLES
BATCH = 32  # rows at a time, or a few more to have whole prompts
METHODS = ("base, best of n", "blend, best of n", "search alone", "both (IVG)")


def search_of(method: str, value: Any, rows: int) -> cf.ChunkBeamSearch:
    if "best" in method:
        return cf.BestOfN(rows, value)
    return cf.ChunkBeamSearch(WIDTH, max(1, round(rows / WIDTH)), CHUNK, value)


def run(blend: cf.Blend, search: cf.ChunkBeamSearch | None, questions: list[str]) -> dict[str, Any]:
    """Decode every question and measure the texts."""
    base = blend.terms[0]
    rows = 1 if search is None else search.rows
    out: Any = cf.generate(
        blend,
        questions,
        do_sample=True,
        max_new_tokens=NEW,
        seed=0,
        max_batch=rows * -(-BATCH // rows),
        search=search,
    )
    found = figures(out, base, questions, search, NEW)
    reward, interval = metrics.mean_interval(metrics.sentiment(found["texts"]))
    return {
        "rows": rows,
        "reward": reward,
        "reward_interval": interval,
        "value": None if out.values is None else float(out.values.mean()),
        **found,
    }


def at_kl(rows: Sequence[dict[str, Any]], kl: float) -> float | None:
    """The fader's reward at a divergence, between the weights that were run; None: beyond them."""
    return between([(r["kl"], r["reward"]) for r in rows if r["group"] == "fader"], kl)


def summary(report: dict[str, Any]) -> str:
    rows = sorted(report["rows"], key=lambda r: r["group"] != "fader")
    lines = [
        "| at equal | method | rows a prompt | s a prompt | reward (VADER) | the fader's at this "
        "KL | perplexity (base) | distinct-2 | KL to the base, nats a response, at most |",
        "|---" * 9 + "|",
    ]
    for r in rows:
        same = at_kl(rows, r["kl"])
        fader = "beyond it" if same is None else f"{same:+.2f}"
        group = r["group"]
        if group == "fader":
            group = fader = "-"
        lines.append(
            f"| {group} | {r['method']} | {r['rows']} | {r['seconds']:.2f} | {r['reward']:+.2f} ± "
            f"{r['reward_interval']:.2f} | {fader} | {r['perplexity']:.1f} | {r['distinct_2']:.2f} "
            f"| {round(r['kl'], 2) + 0.0:.2f} ± {r['kl_interval']:.2f} |"
        )
    machine, s = report["machine"], report["settings"]
    return "\n".join(
        [
            *lines,
            "",
            f"{s['questions']} prompts, a text of up to {NEW} tokens each at temperature 1; blend: "
            f"w = {WEIGHT}; search: chunks of {CHUNK} tokens, W = {WIDTH}; ± is a 95 % interval of "
            f"the mean. {machine['device']}, {machine['threads']} threads; "
            f"`{report['command']}`.",
        ]
    )


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    given = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, help="results, method by method; those in it are kept")
    parser.add_argument("--questions", type=int, default=len(QUESTIONS))
    args = parser.parse_args(given)
    questions = QUESTIONS[: args.questions]
    report: dict[str, Any] = {
        "command": " ".join(["python bench/steer.py", *given]),
        "machine": hardware("cpu"),
        "versions": {p: metadata.version(p) for p in ("crossfade", "torch", "transformers")},
        "settings": {"questions": len(questions), "new": NEW, "weight": WEIGHT},
        "rows": [],
    }
    if args.json is not None and args.json.exists():
        kept = json.loads(args.json.read_text())
        if kept["settings"] != report["settings"]:
            parser.error(f"{args.json} has other settings; remove it to begin anew")
        report = kept
    rows = report["rows"]
    model, tokenizer = cf.models.smollm2()
    base, up, down = demo.terms(model, tokenizer)
    blend, value = base + WEIGHT * (up - down), cf.LogRatio(up, down)
    tasks = [("fader", f"blend, w = {w:g}", 1) for w in FADER]
    tasks += [(group, method, ROWS) for group in ("samples", "time") for method in METHODS]
    for group, method, n in tqdm(tasks, file=sys.stderr):
        if any((r["group"], r["method"]) == (group, method) for r in rows):
            continue
        if group == "fader":
            weight = float(method.split("=")[1])
            found = run(base + weight * (up - down), None, questions)
        else:
            if group == "time":  # as many rows as the time of both allows
                at = {r["method"]: r for r in rows if r["group"] == "samples"}
                step = WIDTH if method.startswith("search") else 1
                n = ROWS * at[METHODS[-1]]["seconds"] / at[method]["seconds"]
                n = max(1, round(n / step)) * step
                if n == ROWS:  # both, which is the measure, and what takes as long
                    rows.append({**at[method], "group": group})
                    continue
            searched = blend if method.startswith(("blend", "both")) else cf.as_blend(base)
            found = run(searched, search_of(method, value, n), questions)
        rows.append({"group": group, "method": method, **found})
        if args.json is not None:
            args.json.write_text(json.dumps(report, indent=1) + "\n")
    if args.json is not None:
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    print(summary(report))
    return report


if __name__ == "__main__":
    main()
