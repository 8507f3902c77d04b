"""What chunk beam search costs: crossfade's, the algorithm of the official code, and value heads.

    python bench/search.py --json bench/results/search.json

One prompt; a base that decodes and two models of its size whose log-ratio is the value. Seconds are
of whole calls, prompt and set-up in them; contenders take turns, medians over rounds. Before
anything is timed, and after, the value of each one's best row is computed anew. Where there are
many boundaries the official algorithm decodes all tokens, but its scoring is timed at every 8th
boundary and interpolated. On a GPU, models have the shapes of Llama 3 1B and random weights.

Searches by value heads over the policy's own backbone are set against plain sampling of as many
rows (`search_heads.py`).
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import decode_peers as peers
import search_heads
import torch
from crossfade.bench import hardware
from decode import peak_of
from reports import OURS
from reports.search import OFFICIAL, ratio, render, searches
from search_peers import TEMPERATURE, Found, Shape, check, official, ours, scored
from torch import Tensor
from tqdm import tqdm

BLENDED = "crossfade, value models in the blend"
NAMES = {"official": OFFICIAL, "crossfade": OURS, "blended": BLENDED}
HEADS = "heads"  # on the command line, what `search_heads` measures
HEAD_SHAPE = Shape(4, 4, 5, 60, 50)
SETTINGS = [(4, 4, 5), (2, 2, 30)]
BLENDED_SHAPE = Shape(4, 4, 5, 60, 50)  # BLENDED takes part in this one, by default
GOALS = {Shape(4, 4, 5, 60, 50): 4, Shape(4, 4, 5, 300, 50): 10, Shape(4, 4, 5, 300, 256): 15}
# The part of the official algorithm's time that scoring took in an earlier measurement.
KNOWN_SCORING = {Shape(4, 4, 5, 60, 50): 0.79, Shape(4, 4, 5, 300, 50): 0.89}
MANY, EVERY = 20, 8  # above MANY boundaries the official scoring is timed at every 8th
QUICK = [Shape(2, 3, 4, 9, 10), Shape(2, 2, 1, 5, MANY + 2)]
QUICK_HEADS = Shape(2, 2, 3, 5, 6)
Runs = dict[str, Callable[[Shape], Found]]


def shape_of(text: str) -> Shape:
    return Shape(*map(int, text.split(",")))


def measure(
    runs: Runs, models: Sequence[Any], ids: Tensor, shape: Shape, rounds: int, limit: float
) -> list[dict[str, Any]]:
    """The row of each contender's figures, from rounds in which each has its turn."""
    short = dataclasses.replace(shape, new=min(shape.new, shape.chunk_length + 1))  # two boundaries
    for name, run in runs.items():
        check(name, models, ids, short, run(short))
    found: dict[str, list[Found]] = {name: [] for name in runs}
    peaks: dict[str, list[float]] = {name: [] for name in runs}
    end = time.monotonic() + limit
    for _ in tqdm(range(rounds), desc=str(dataclasses.astuple(shape)), file=sys.stderr):
        for name, run in runs.items():
            result, peak = peak_of(functools.partial(run, shape), ids.device.type)
            check(name, models, ids, shape, result)
            found[name].append(result)
            peaks[name] += [] if peak is None else [peak]
        if time.monotonic() > end:
            break
    prompt = shape.prompt * peers.bytes_of_a_token(models[0]) / 1e6
    rows = []
    for name, results in found.items():
        row = {
            "shape": dataclasses.asdict(shape),
            "contender": name,
            "seconds": round(statistics.median(r.seconds for r in results), 3),
            "rounds_s": [round(r.seconds, 3) for r in results],
            "base_tokens": results[0].base_tokens,
            "value_tokens": results[0].value_tokens,
            "peak_mb": max(peaks[name], default=None),
            "prompt_mb": {"one row": round(prompt, 2), "all rows": round(prompt * shape.rows, 2)},
        }
        first = results[0]
        if first.scoring is not None:
            shares = [r.scoring / r.seconds for r in results if r.scoring is not None]
            row["scoring"] = round(statistics.median(shares), 3)
        if first.cache_bytes is not None:
            row |= {"cache_mb": round(first.cache_bytes / 1e6, 1), "notes": list(first.notes)}
        rows.append(row)
    return rows


def known_scoring(shape: Shape) -> dict[str, float]:
    """What the official algorithm's row of a shape says of an earlier measurement on a CPU."""
    return {"known_scoring": KNOWN_SCORING[shape]} if shape in KNOWN_SCORING else {}


def missed(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """The goals that were not reached."""
    for shape, goal in GOALS.items():
        over = ratio(rows, dataclasses.asdict(shape), OFFICIAL)
        if over is not None and over < goal:
            yield f"{shape}: {over:.1f} times as fast; the goal is {goal}"


def prompt_of(model: Any, shape: Shape) -> Tensor:
    """A prompt ``[1, tokens]`` of ordinary ids."""
    generator = torch.Generator().manual_seed(0)
    high = model.config.vocab_size
    return torch.randint(20, high, (1, shape.prompt), generator=generator).to(model.device)


def models_of(device: str, quick: bool) -> list[Any]:
    """The base, and the two models whose ratio is the value."""
    if device == "cuda":
        config = peers.TINY if quick else peers.LLAMA_1B
        return [peers.random_model(config, device, torch.bfloat16, seed) for seed in range(3)]
    model = peers.load(torch.float32, quick)
    return [model, peers.perturbed(model, 2), peers.perturbed(model, 3)]


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    given = sys.argv[1:] if arguments is None else arguments
    device = "cuda" if torch.cuda.is_available() else "cpu"
    cpu = device == "cpu"
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a tiny random model: a smoke run")
    parser.add_argument("--json", type=Path, help="where results go; shapes in it are kept")
    parser.add_argument("--only", nargs="+", choices=[*NAMES, HEADS], help="contenders")
    parser.add_argument("--shape", nargs="+", type=shape_of, metavar="W,N,L,PROMPT,NEW",
                        help="instead of all shapes")  # fmt: skip
    parser.add_argument("--rounds", type=int, help="turns of each (3; 1 if summed up)")
    parser.add_argument("--limit", type=float, default=float("inf"), metavar="SECONDS",
                        help="begin no further round of a shape after this long")  # fmt: skip
    parser.add_argument("--sampled-boundaries", type=int, metavar="K",
                        help="time the official scoring at every K-th boundary and sum up (1; "
                             f"{EVERY} above {MANY} boundaries)")  # fmt: skip
    args = parser.parse_args(given)

    lengths = [(n, new) for n in ((60, 300) if cpu else (300, 2000)) for new in (50, 256)]
    shapes = args.shape or [Shape(*wnl, *n) for n in lengths for wnl in SETTINGS]
    if args.quick:
        shapes = args.shape or QUICK
    name = "SmolLM2-135M, float32" if cpu else "random weights of the shape of Llama 3 1B, bfloat16"
    report: dict[str, Any] = {
        "command": " ".join(["python bench/search.py", *given]),
        "machine": hardware(device),
        "versions": {p: metadata.version(p) for p in ("crossfade", "torch", "transformers")},
        "settings": {
            "model": "a tiny random model" if args.quick else name,
            "temperature": TEMPERATURE,
        },
        "rows": [],
        "heads": [],
    }
    if args.json is not None and args.json.exists():  # shapes in it are kept
        kept = json.loads(args.json.read_text())
        if any(kept[key] != report[key] for key in ("machine", "versions", "settings")):
            parser.error(f"{args.json} is of another machine or version; remove it to begin anew")
        report = {"heads": [], **kept}
    done = {tuple(row["shape"].values()) for row in report["rows"]}
    models = models_of(device, args.quick)
    only_heads = args.only == [HEADS]
    for shape in shapes:
        if only_heads or dataclasses.astuple(shape) in done:
            continue
        boundaries = len(shape.chunks)
        every = args.sampled_boundaries or (EVERY if boundaries > MANY else 1)
        rounds = args.rounds or (1 if every > 1 else 3)
        ids = prompt_of(models[0], shape)
        contenders: Runs = {
            OFFICIAL: functools.partial(official, models, ids, every=every),
            OURS: functools.partial(ours, models, ids),
            BLENDED: functools.partial(ours, models, ids, blended=True),
        }
        only = args.only or [
            key for key in NAMES if key != "blended" or args.quick or shape == BLENDED_SHAPE
        ]
        runs = {NAMES[key]: contenders[NAMES[key]] for key in only if key != HEADS}
        rows = measure(runs, models, ids, shape, rounds, args.limit)
        for row in rows:
            if row["contender"] == OFFICIAL:
                row |= {"scored_every": every, "scored": len(scored(boundaries, every))}
                row |= known_scoring(shape) if cpu else {}
        report["rows"] += rows
        print("\n".join(searches(rows)), flush=True)
        if args.json is not None:
            args.json.write_text(json.dumps(report, indent=1) + "\n")
    if (args.only is None or HEADS in args.only) and not report["heads"]:
        shape = QUICK_HEADS if args.quick else (args.shape or [HEAD_SHAPE])[0]
        ids = prompt_of(models[0], shape)
        rounds = args.rounds or 3
        report["heads"] = search_heads.measure(models[0], ids, shape, rounds, args.limit)
        if args.json is not None:
            args.json.write_text(json.dumps(report, indent=1) + "\n")
    for line in [*missed(report["rows"]), *search_heads.missed(report["heads"])] if cpu else []:
        print(line, file=sys.stderr)
    print(render(report))
    return report


if __name__ == "__main__":
    main()
