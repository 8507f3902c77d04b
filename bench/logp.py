"""Log-probs of a head and their gradients: ours, peers, and the bare products in the same tiles.

    OMP_NUM_THREADS=2 python bench/logp.py --json bench/results/logp.json

SmolLM2's head on 2,048 tokens, float32. Forward and backward of the mean of the tokens' log-probs,
with a head that is trained and one that is frozen. Contenders take turns; medians. The bare
products are what the results cannot do without: of logits, logits again, and two gradients; of
logits and the expected embedding for a frozen head. Memory is a process's rise above its inputs,
less the gradients, each contender in a process of its own.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from crossfade.bench import hardware
from crossfade.ops import linear_logp, logp_tiles
from decode import peak_of, seconds
from torch import Tensor
from tqdm import tqdm

try:
    import trl.trainer.utils as TRL
except ImportError:
    TRL = None

KINDS = {"trained": 4, "frozen": 2}  # heads, and the products that theirs cannot do without


@dataclass(frozen=True)
class Sizes:
    tokens: int
    hidden: int
    vocab: int


@dataclass(frozen=True)
class Case:
    """Leaves, of which the head is trained or frozen."""

    hidden: Tensor
    weight: Tensor
    targets: Tensor


def case_of(kind: str, sizes: Sizes) -> Case:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(sizes.tokens, sizes.hidden, generator=generator)
    weight = torch.randn(sizes.vocab, sizes.hidden, generator=generator) / sizes.hidden**0.5
    targets = torch.randint(sizes.vocab, (sizes.tokens,), generator=generator)
    return Case(hidden.requires_grad_(), weight.requires_grad_(kind == "trained"), targets)


def ours(c: Case) -> Tensor:
    return linear_logp(c.hidden, c.weight, c.targets).logp.mean()


def naive(c: Case) -> Tensor:
    log_p = F.linear(c.hidden, c.weight).log_softmax(-1)
    return log_p.gather(-1, c.targets[:, None]).mean()


def selective_log_softmax(c: Case) -> Tensor:
    """TRL's where it is installed; else what it does, for sequences of 512 tokens."""
    logits = F.linear(c.hidden, c.weight)
    sequences, targets = torch.stack(logits.split(512)), torch.stack(c.targets.split(512))
    if TRL is not None:
        return TRL.selective_log_softmax(sequences, targets).mean()
    chosen = sequences.gather(-1, targets[..., None]).squeeze(-1)
    return (chosen - torch.stack([z.logsumexp(-1) for z in sequences])).mean()


def trl_chunks(c: Case) -> Tensor:
    """What TRL's trainers run: tiles of 4,096 tokens, four products."""
    apply = TRL._ChunkedLogProbFunction.apply
    size = TRL._CHUNKED_LOGPROB_CHUNK_SIZE
    return apply(c.hidden, c.weight, None, c.targets, 1.0, size, None, 1.0, ())[0].mean()


def torch_chunks(c: Case, reduction: str, rows: int | None = None) -> Tensor:
    """`rows` of all logits at once, by default as torch chooses. Of "mean", torch makes the
    gradients in the forward pass, with one product less: for a loss that is nothing else."""
    chunks = {} if rows is None else {"batch_chunk_size": rows, "chunking_method": None}
    options = torch.nn.LinearCrossEntropyOptions(**chunks)
    loss = F.linear_cross_entropy(
        c.hidden, c.weight, c.targets, reduction=reduction, options=options
    )
    return -loss.mean()


def checkpoints(c: Case) -> Tensor:
    """Chunks of 128 tokens, whose logits are made again."""

    def part(hidden: Tensor, targets: Tensor) -> Tensor:
        log_p = F.linear(hidden, c.weight).log_softmax(-1)
        return log_p.gather(-1, targets[:, None])

    again = functools.partial(torch.utils.checkpoint.checkpoint, part, use_reentrant=False)
    parts = zip(c.hidden.split(128), c.targets.split(128), strict=True)
    return torch.cat([again(h, t) for h, t in parts]).mean()


def losses() -> dict[str, Callable[[Case], Tensor]]:
    written_out = "" if TRL else " (written out)"
    ways: dict[str, Callable[[Case], Tensor]] = {
        "ours": ours,
        "naive": naive,
        f"TRL's selective_log_softmax{written_out}": selective_log_softmax,
    }
    if TRL is not None:
        ways["TRL's chunks"] = trl_chunks
    ways["checkpoints"] = checkpoints
    if hasattr(F, "linear_cross_entropy"):
        chunks = functools.partial(torch_chunks, rows=256)
        ways["torch's chunks of 256"] = functools.partial(chunks, reduction="none")
        ways["torch's chunks of 256, mean alone"] = functools.partial(chunks, reduction="mean")
        ways["torch's chunks, mean alone"] = functools.partial(torch_chunks, reduction="mean")
    return ways


def products(c: Case) -> tuple[Tensor, Tensor | None]:
    """Nothing but the products of tiles: 4 with a trained head, 2 with a frozen one."""
    hidden, weight, trained = c.hidden.detach(), c.weight.detach(), c.weight.requires_grad
    rows, columns = hidden.split(logp_tiles.ROWS), logp_tiles.COLUMNS
    scores = hidden.new_empty(len(rows[0]) * columns)
    of_hidden = torch.zeros_like(hidden)
    of_weight = torch.empty_like(weight) if trained else None
    for backward in (False, True) if trained else (False,):
        for first in range(0, len(weight), columns):
            w = weight[first : first + columns]
            for i, (h, out) in enumerate(zip(rows, of_hidden.split(logp_tiles.ROWS), strict=True)):
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
    """Gradients before times, on fewer tokens."""
    fewer = Sizes(min(sizes.tokens, 256), sizes.hidden, sizes.vocab)
    want, got = case_of(kind, fewer), case_of(kind, fewer)
    step(naive, want)
    step(losses()[name], got)
    for a, b in ((got.hidden.grad, want.hidden.grad), (got.weight.grad, want.weight.grad)):
        if b is not None:
            scale = float(b.abs().max())
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * scale, msg=f"{name} is wrong")


def memory_mb(kind: str, name: str, sizes: Sizes) -> float | None:
    """The peak of a step over the inputs and the gradients."""
    c = case_of(kind, sizes)
    loss = losses()[name]
    small = case_of(kind, Sizes(64, sizes.hidden, 128))
    step(loss, small)  # libraries keep buffers of their own
    _, peak = peak_of(lambda: step(loss, c), "cpu")
    if peak is None:
        return None
    grads = sum(x.grad.nbytes for x in (c.hidden, c.weight) if x.grad is not None)
    return round(peak - grads / 1e6, 1)


def memory_apart(kind: str, name: str, args: argparse.Namespace) -> float | None:
    command = [sys.executable, __file__, "--memory", kind, name]
    command += ["--tokens", str(args.tokens), "--vocab", str(args.vocab)]
    command += ["--hidden", str(args.hidden)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def measure(kind: str, sizes: Sizes, args: argparse.Namespace) -> dict[str, Any]:
    ways = losses()
    for name in ways:
        check(kind, sizes, name)
    c = case_of(kind, sizes)
    calls = {name: functools.partial(step, loss, c) for name, loss in ways.items()}
    times: dict[str, list[float]] = {name: [] for name in ("products", *calls)}
    for turn in tqdm(range(args.rounds + 1), desc=kind, file=sys.stderr):
        for name, call in {"products": functools.partial(products, c), **calls}.items():
            took = seconds(call, "cpu")
            if turn > 0:
                times[name].append(took)
    median = {name: statistics.median(t) for name, t in times.items()}
    memory = {name: memory_apart(kind, name, args) for name in ways}
    return {
        "head": kind,
        "products": KINDS[kind],
        "seconds": {name: round(t, 3) for name, t in median.items()},
        "spread": {name: round((max(t) - min(t)) / median[name], 3) for name, t in times.items()},
        "over_products": {name: round(median[name] / median["products"], 3) for name in ways},
        "memory_mb": memory,
    }


def summary(report: dict[str, Any]) -> str:
    lines = [
        "| head | contender | s | over the bare products | memory, MB |",
        "|---|---|---|---|---|",
    ]
    for r in report["rows"]:
        lines.append(
            f"| {r['head']} | {r['products']} products in tiles | {r['seconds']['products']:.2f} "
            "| 1.00 | |"
        )
        for name, ratio in r["over_products"].items():
            memory = r["memory_mb"][name]
            lines.append(
                f"| {r['head']} | {name} | {r['seconds'][name]:.2f} | {ratio:.2f} | "
                f"{'' if memory is None else format(memory, '.0f')} |"
            )
    s = report["sizes"]
    where = ", ".join(f"{v} {k}" if k != "device" else v for k, v in report["machine"].items())
    shape = f"{s['tokens']:,} tokens, hidden {s['hidden']:,}, vocabulary {s['vocab']:,}, float32"
    return "\n".join([*lines, "", f"{shape}; {where}; `{report['command']}`."])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--hidden", type=int, default=576)
    parser.add_argument("--vocab", type=int, default=49152)
    parser.add_argument("--memory", nargs=2, metavar=("HEAD", "CONTENDER"), help="of one alone")
    args = parser.parse_args()
    sizes = Sizes(args.tokens, args.hidden, args.vocab)
    if args.memory:
        print(json.dumps(memory_mb(*args.memory, sizes)))
        return
    report: dict[str, Any] = {
        "command": " ".join(["python bench/logp.py", *sys.argv[1:]]),
        "machine": hardware("cpu"),
        "versions": {
            p: metadata.version(p) for p in ("crossfade", "torch", *(["trl"] if TRL else []))
        },
        "sizes": asdict(sizes),
        "tile": [logp_tiles.ROWS, logp_tiles.COLUMNS],
        "rows": [measure(kind, sizes, args) for kind in KINDS],
    }
    print(summary(report))
    if args.json is not None:
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
