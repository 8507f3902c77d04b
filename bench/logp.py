"""Log-probs of a head and their gradients: ours, peers, and the bare products.

    OMP_NUM_THREADS=2 python bench/logp.py --json bench/results/logp.json
    python bench/logp.py --device cuda --dtype bfloat16 --hidden 4096 --vocab 151936 --tokens 8192

By default it is SmolLM2's head on 2,048 tokens in float32. A step is the forward and backward pass
of the mean of the tokens' log-probs, with a head that is trained and one that is frozen; or of the
DPO loss of two pairs of responses that are the tokens, with a trained head and a reference that
gives 0. Contenders take turns, the bare products are made right before and right after each of
them, and figures are medians. If ours takes less time than the products, that is an error.

The bare products are those that a loss which weighs each log-prob cannot do without. With a trained
head these are the logits, the logits again, and two gradients; a mean alone needs no logits again.
With a frozen head they are the logits and the expected embedding. On a CPU they are made in our
tiles, on a GPU all at once, in the dtype of hidden.

Memory is what a step takes above its inputs, less the gradients. On a CPU it is measured of a
process that runs one contender alone.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from crossfade.bench import hardware, timing
from crossfade.ops.logp import tiles as logp_tiles
from decode import peak_of, seconds
from logp_contenders import (
    RESPONSES,
    TRL,
    Case,
    LigerFusedLinearDPOLoss,
    Sizes,
    case_of,
    contenders,
    cut_cross_entropy,
    missing,
)
from reports.logp import render
from torch import Tensor
from tqdm import tqdm

# What is differentiated, and how many products that cannot do without.
KINDS = {"trained": 4, "frozen": 2, "dpo": 4}


def products(c: Case) -> tuple[Tensor, Tensor | None]:
    """Make the bare products alone: 4 with a trained head, 2 with a frozen one."""
    hidden, weight, trained = c.hidden.detach(), c.weight.detach(), c.weight.requires_grad
    most, columns = logp_tiles.tile_size(hidden.device)
    if not hidden.is_cpu:
        most, columns = len(hidden), len(weight)
    rows = hidden.split(most)
    columns = min(columns, len(weight))
    scores = hidden.new_empty(len(rows[0]) * columns)
    of_hidden = torch.zeros_like(hidden)
    of_weight = torch.empty_like(weight) if trained else None
    for backward in (False, True) if trained else (False,):
        for first in range(0, len(weight), columns):
            w = weight[first : first + columns]
            for i, (h, out) in enumerate(zip(rows, of_hidden.split(most), strict=True)):
                z = scores[: len(h) * len(w)].view(len(h), len(w))
                torch.mm(h, w.t(), out=z)
                if backward or not trained:
                    out.addmm_(z, w)
                if backward and of_weight is not None:
                    of_weight[first : first + columns].addmm_(z.t(), h, beta=min(i, 1))
    return of_hidden, of_weight


def step(loss: Callable[[Case], Tensor], c: Case) -> None:
    c.hidden.grad = c.weight.grad = None
    loss(c).backward()


def check(kind: str, sizes: Sizes, name: str) -> None:
    """Check a contender's gradients, on fewer tokens, against those in float32."""
    fewer = dataclasses.replace(sizes, tokens=min(sizes.tokens, 256))
    got = case_of(kind, fewer)
    head = got.weight.detach().float().requires_grad_(got.weight.requires_grad)
    want = Case(got.hidden.detach().float().requires_grad_(), head, got.targets)
    step(contenders(kind, sizes)["naive"], want)
    step(contenders(kind, sizes)[name], got)
    relative, absolute = (1e-3, 1e-4) if sizes.dtype == "float32" else (2e-2, 2e-2)
    for a, b in ((got.hidden.grad, want.hidden.grad), (got.weight.grad, want.weight.grad)):
        if a is not None and b is not None:
            tolerance = {"rtol": relative, "atol": absolute * float(b.abs().max())}
            torch.testing.assert_close(a.float(), b, **tolerance, msg=f"{name} is wrong")
        elif b is not None:
            raise AssertionError(f"{name} gives no gradient")


def memory_mb(kind: str, name: str, sizes: Sizes) -> float | None:
    """The peak of a step's memory, above the inputs and less the gradients."""
    c = case_of(kind, sizes)
    loss = contenders(kind, sizes)[name]
    small = case_of(kind, dataclasses.replace(sizes, tokens=64, vocab=128))
    step(loss, small)  # libraries keep buffers from their first call on
    _, peak = peak_of(lambda: step(loss, c), sizes.device)
    if peak is None:
        return None
    grads = sum(x.grad.nbytes for x in (c.hidden, c.weight) if x.grad is not None)
    return round(peak - grads / 1e6, 1)


def memory_apart(kind: str, name: str, sizes: Sizes) -> float | None:
    """What `memory_mb` gives, on a CPU from a process of its own, which is what is measured."""
    if sizes.device == "cuda":
        return memory_mb(kind, name, sizes)
    command = [sys.executable, __file__, "--memory", kind, name]
    for option, value in asdict(sizes).items():
        command += [f"--{option}", str(value)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def measure(kind: str, sizes: Sizes, rounds: int) -> dict[str, Any]:
    """Check and time the contenders of a kind.

    Raises:
        timing.FasterThanItsFloor: ours takes less time than the bare products.
    """
    ways = contenders(kind, sizes)
    for name in ways:
        check(kind, sizes, name)
    c = case_of(kind, sizes)
    calls = {name: functools.partial(step, loss, c) for name, loss in ways.items()}
    bare = functools.partial(products, c)
    times: dict[str, list[float]] = {name: [] for name in calls}
    beside: dict[str, list[float]] = {name: [] for name in calls}  # what the products took
    for turn in tqdm(range(rounds + 1), desc=kind, file=sys.stderr):
        before = seconds(bare, sizes.device)
        for name, call in calls.items():
            took, after = seconds(call, sizes.device), seconds(bare, sizes.device)
            if turn > 0:
                times[name].append(took)
                beside[name] += [before, after]
            before = after
    del c, calls, call, bare
    ours, floors = ([timing.Sample(1e6 * t) for t in x["ours"]] for x in (times, beside))
    timing.check_floors(f"{kind} head", {"ours": timing.timing_of(ours, floors)}, sizes.device)
    over = {n: statistics.median(times[n]) / statistics.median(beside[n]) for n in ways}
    times = {"products": beside["ours"]} | times
    median = {name: statistics.median(t) for name, t in times.items()}
    return {
        "head": kind,
        "products": KINDS[kind],
        "seconds": {name: round(t, 5) for name, t in median.items()},
        "spread": {name: round((max(t) - min(t)) / median[name], 3) for name, t in times.items()},
        "over_products": {name: round(ratio, 3) for name, ratio in over.items()},
        "memory_mb": {name: memory_apart(kind, name, sizes) for name in ways},
    }


def versions() -> dict[str, str]:
    found = {"crossfade": True, "torch": True, "trl": TRL, "liger-kernel": LigerFusedLinearDPOLoss}
    found["cut-cross-entropy"] = cut_cross_entropy
    return {name: metadata.version(name) for name, there in found.items() if there}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--hidden", type=int, default=576)
    parser.add_argument("--vocab", type=int, default=49152)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--memory", nargs=2, metavar=("KIND", "CONTENDER"), help="of one alone")
    args = parser.parse_args()
    if args.tokens % RESPONSES:
        parser.error(f"--tokens is {args.tokens}; it must be a multiple of {RESPONSES}")
    sizes = Sizes(args.tokens, args.hidden, args.vocab, args.device, args.dtype)
    if args.memory:
        print(json.dumps(memory_mb(*args.memory, sizes)))
        return
    report: dict[str, Any] = {
        "command": " ".join(["python bench/logp.py", *sys.argv[1:]]),
        "machine": hardware(args.device),
        "versions": versions(),
        "missing": missing(args.device),
        "sizes": asdict(sizes),
        "tile": list(logp_tiles.tile_size(torch.device(args.device))),
        "rows": [measure(kind, sizes, args.rounds) for kind in args.kinds],
    }
    print(render(report))
    if args.json is not None:
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
