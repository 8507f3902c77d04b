"""A million draws of each kind, against the probabilities that they should have.

    OMP_NUM_THREADS=2 python bench/exact.py --json bench/results/exact.json    # 20 minutes

Every truncation alone and together, over vocabularies of less than one group to hundreds; rows with
long tails and flat ones, along steps, streams and seeds; and whether the draws of a lattice tell
of one another or, of one draw, the group of its token's place. Each case gives p-values of
chi-square (tests/ops/frequencies.py has the rows and the bins). The smallest of all is compared
with the level over their number (Bonferroni's bound): if it is smaller, the exit status is 1.

Cases that the JSON file has already, of as many draws of the same backend, are not drawn again:
remove the file after a change in a kernel.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from crossfade import ops
from crossfade.bench import hardware
from reports.exact import verdict
from scipy.stats import chi2_contingency
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "ops"))

from frequencies import CUTS, VOCABULARIES, Row, flat, lattice, p_values, row, zipf
from numpy_noise import GROUP

LEVEL = 0.01  # how often a correct sampler fails, with fresh seeds
CHUNK = 50_000  # rows of a call, which are one row expanded
AXES = ("step", "stream", "seed")
IDS = {"seed": 12, "stream": 3, "step": 5}
GROUPS, PLACES = 8, 6  # of the lattice

Case = Callable[["Drawn"], dict[str, float]]
Drawn = Callable[..., Iterator[np.ndarray]]  # (row, axis, **ids): chunks of tokens


def cases() -> dict[str, Case]:
    """Each case makes its draws and gives its p-values by name."""
    found: dict[str, Case] = {}
    for vocab in VOCABULARIES:
        for cut in CUTS:
            found[f"{cut}, {vocab} tokens"] = lambda drawn, v=vocab, c=cut: fit(drawn, row(v, c))
    for axis in AXES:
        for name, shape, vocab in (("Zipf", zipf, 50_257), ("flat", flat, 151_936)):
            found[f"{name}, {vocab} tokens, along {axis}s"] = (
                lambda drawn, a=axis, s=shape, v=vocab: fit(drawn, s(v), axis=a)
            )
        found[f"lattice, along {axis}s"] = lambda drawn, a=axis: alone(drawn, a)
        found[f"lattice, neighbours along {axis}s"] = lambda drawn, a=axis: beside(drawn, a)
    return found


def fit(drawn: Drawn, r: Row, axis: str = "step") -> dict[str, float]:
    vocab = len(r.probability)
    seen = sum(np.bincount(tokens, minlength=vocab) for tokens in drawn(r, axis))
    return p_values(np.asarray(seen, dtype=float), r.probability.numpy())


def alone(drawn: Drawn, axis: str) -> dict[str, float]:
    """Whether a draw's group tells of its token's place, and a draw of those 1, 4, 64 after it."""
    r = lattice(GROUPS, PLACES)
    tokens = np.concatenate(list(drawn(r, axis)))
    seen = np.bincount(tokens, minlength=len(r.probability)).astype(float)
    found = p_values(seen, r.probability.numpy())
    found["group, place"] = contingency(tokens // GROUP, tokens % GROUP)
    for lag in (1, 4, 64):
        found |= by_level(f"lag {lag}", tokens[:-lag], tokens[lag:])
    return found


def beside(drawn: Drawn, axis: str) -> dict[str, float]:
    """Whether draws along an axis tell of those whose other numbers differ in one bit."""
    r, found = lattice(GROUPS, PLACES), {}
    first = np.concatenate(list(drawn(r, axis)))
    for other in AXES:
        for bit in (0, 31) if other == "step" else (0, 32, 62):
            if other != axis:
                tokens = np.concatenate(list(drawn(r, axis, **{other: IDS[other] ^ (1 << bit)})))
                found |= by_level(f"{other}, bit {bit}", first, tokens)
    return found


def by_level(name: str, one: np.ndarray, other: np.ndarray) -> dict[str, float]:
    return {
        f"{name}: groups": contingency(one // GROUP, other // GROUP),
        f"{name}: places": contingency(one % GROUP, other % GROUP),
        f"{name}: group, place": contingency(one // GROUP, other % GROUP),
        f"{name}: place, group": contingency(one % GROUP, other // GROUP),
    }


def contingency(one: np.ndarray, other: np.ndarray) -> float:
    """Whether what stands at the same place of two arrays of small numbers is independent."""
    width = int(other.max()) + 1
    table = np.bincount(one * width + other, minlength=(int(one.max()) + 1) * width)
    return float(chi2_contingency(table.reshape(-1, width)).pvalue)


def drawing(backend: str, device: str, count: int, chunk: int, progress: tqdm) -> Drawn:
    def drawn(r: Row, axis: str, **ids: int) -> Iterator[np.ndarray]:
        logits = r.logits.to(device)
        options = {n: x.to(device) if n == "mask" else x for n, x in r.options.items()}
        for first in range(0, count, chunk):
            nth = torch.arange(first, min(first + chunk, count), device=device)
            chosen = {**IDS, **ids, axis: nth}
            rows = logits.expand(len(nth), -1)
            out = ops.blend_sample([rows], [1.0], **options, **chosen, backend=backend)
            progress.update(len(nth))
            yield out.tokens.cpu().numpy()

    return drawn


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--backend", default="native")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--draws", type=int, default=1_000_000, help="of a case (default 1000000)")
    parser.add_argument("--only", default="", help="cases whose names contain this")
    parser.add_argument("--json", type=Path, help="write p-values there, after each case")
    args = parser.parse_args(arguments)

    todo = {name: case for name, case in cases().items() if args.only in name}
    if not todo:
        parser.error(f"--only is {args.only!r}; it must be part of a case's name: {[*cases()]}")
    report: dict[str, Any] = {
        "command": " ".join(["python bench/exact.py", *(arguments or sys.argv[1:])]),
        "machine": hardware(torch.device(args.device).type),
        "versions": {p: metadata.version(p) for p in ("torch", "numpy", "scipy")},
        **{"backend": args.backend, "device": args.device, "draws": args.draws},
        **{"level": LEVEL, "ids": IDS, "cases": {}},
    }
    if args.json is not None and args.json.exists():
        before = json.loads(args.json.read_text())
        if all(before[n] == report[n] for n in ("backend", "device", "draws", "ids")):
            report["cases"] = before["cases"]
    for number, (name, case) in enumerate(todo.items(), start=1):
        if name in report["cases"]:
            continue
        with tqdm(desc=f"{number}/{len(todo)} {name}", unit=" draws", file=sys.stderr) as progress:
            start = time.perf_counter()
            p = case(drawing(args.backend, args.device, args.draws, CHUNK, progress))
            seconds = round(time.perf_counter() - start, 1)
        report["cases"][name] = {"p": p, "seconds": seconds}
        if args.json is not None:
            args.json.write_text(json.dumps(report, indent=1) + "\n")
    line, passed = verdict(report)
    print(line)
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
