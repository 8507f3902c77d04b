"""Log-probs of a head and their gradients: ours, peers, and the bare products.

    OMP_NUM_THREADS=2 python bench/logp.py --json bench/results/logp.json
    python bench/logp.py --device cuda --dtype bfloat16 --hidden 4096 --vocab 151936 --tokens 8192

By default SmolLM2's head on 2,048 tokens, float32. Forward and backward of the mean of the tokens'
log-probs, with a head that is trained and one that is frozen; and of the DPO loss of two pairs of
responses that are the tokens, with a trained head and a reference that gives 0. Contenders take
turns; medians. The bare products are what a loss that weighs each log-prob cannot do without: of
logits, logits again, and two gradients, where a mean alone needs no logits again; of logits and the
expected embedding for a frozen head. On a CPU they are in our tiles, on a GPU of everything at
once, in the dtype of hidden. Memory is a step's rise above its inputs, less the gradients; on a CPU
it is a process's, with a contender for itself.
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
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from crossfade import losses
from crossfade.bench import hardware
from crossfade.ops import linear_logp
from crossfade.ops.logp import tiles as logp_tiles
from decode import peak_of, seconds
from torch import Tensor
from tqdm import tqdm

try:
    import trl.trainer.utils as TRL
except ImportError:
    TRL = None
try:
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss
except ImportError:
    LigerFusedLinearDPOLoss = None
try:
    from cut_cross_entropy import linear_cross_entropy as cut_cross_entropy
except ImportError:
    cut_cross_entropy = None

# what is differentiated, and the products that it cannot do without
KINDS = {"trained": 4, "frozen": 2, "dpo": 4}
RESPONSES = 4  # of "dpo": two that are chosen, then two that are rejected


@dataclass(frozen=True)
class Sizes:
    tokens: int
    hidden: int
    vocab: int
    device: str = "cpu"
    dtype: str = "float32"


@dataclass(frozen=True)
class Case:
    """Leaves, of which the head is trained or frozen."""

    hidden: Tensor
    weight: Tensor
    targets: Tensor


def case_of(kind: str, sizes: Sizes) -> Case:
    generator = torch.Generator(sizes.device).manual_seed(0)
    normal = functools.partial(torch.randn, generator=generator, device=sizes.device)
    hidden = normal(sizes.tokens, sizes.hidden)
    weight = normal(sizes.vocab, sizes.hidden) / sizes.hidden**0.5
    targets = torch.randint(sizes.vocab, (sizes.tokens,), generator=generator, device=sizes.device)
    dtype = getattr(torch, sizes.dtype)
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    return Case(hidden.requires_grad_(), weight.requires_grad_(kind != "frozen"), targets)


# ---- The mean of log-probs -----------------------------------------------------------------------


def ours(c: Case) -> Tensor:
    return linear_logp(c.hidden, c.weight, c.targets).logp.mean()


def our_mean(c: Case) -> Tensor:
    """For a loss that is nothing else, like torch's "mean"."""
    return linear_logp(c.hidden, c.weight, c.targets, mean_only=True).logp.mean()


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


def trl_logp(c: Case) -> Tensor:
    """What TRL's trainers run: chunks of 32,768 tokens in TRL 1.16, four products."""
    apply = TRL._ChunkedLogProbFunction.apply
    size = TRL._CHUNKED_LOGPROB_CHUNK_SIZE
    return apply(c.hidden, c.weight, None, c.targets, 1.0, size, None, 1.0, ())[0]


def trl_chunks(c: Case) -> Tensor:
    return trl_logp(c).mean()


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


def liger(c: Case) -> Tensor:
    """Its gradients are those of a mean, made in the forward pass, like torch's of "mean"."""
    from liger_kernel.ops import LigerFusedLinearCrossEntropyFunction

    return -LigerFusedLinearCrossEntropyFunction.apply(c.hidden, c.weight, c.targets)[0]


def cut(c: Case) -> Tensor:
    return -cut_cross_entropy(c.hidden, c.weight, c.targets)


# ---- The DPO loss --------------------------------------------------------------------------------


def dpo_of(logp: Tensor) -> Tensor:
    chosen, rejected = logp.view(RESPONSES, -1).sum(1).chunk(2)
    none = torch.zeros_like(chosen)
    return losses.sigmoid(losses.Pairs(chosen, rejected, none, none)).mean()


def our_dpo(c: Case) -> Tensor:
    return dpo_of(linear_logp(c.hidden, c.weight, c.targets).logp)


def naive_dpo(c: Case) -> Tensor:
    log_p = F.linear(c.hidden, c.weight).log_softmax(-1)
    return dpo_of(log_p.gather(-1, c.targets[:, None]))


def trl_dpo(c: Case) -> Tensor:
    return dpo_of(trl_logp(c))


def liger_dpo(c: Case, compiled: bool) -> Tensor:
    """Its gradients are made in the forward pass, in chunks of one pair."""
    loss = LigerFusedLinearDPOLoss(use_ref_model=False, compiled=compiled)
    hidden, targets = (x.view(RESPONSES, -1, *x.shape[1:]) for x in (c.hidden, c.targets))
    return loss(c.weight, hidden, targets)[0]


# ---- All of them ---------------------------------------------------------------------------------


def contenders(kind: str, sizes: Sizes) -> dict[str, Callable[[Case], Tensor]]:
    """Those that are installed and run there; `missing` names the rest."""
    ways: dict[str, Callable[[Case], Tensor]]
    if kind == "dpo":
        ways = {"ours": our_dpo, "naive": naive_dpo}
        if TRL is not None:
            ways["TRL's chunks"] = trl_dpo
        if LigerFusedLinearDPOLoss is not None:
            ways["Liger's"] = functools.partial(liger_dpo, compiled=False)
            ways["Liger's, compiled"] = functools.partial(liger_dpo, compiled=True)
        return ways
    written_out = "" if TRL else " (written out)"
    ways = {"ours": ours}
    if kind == "trained" and sizes.device == "cpu" and sizes.dtype == "float32":
        ways["ours, mean alone"] = our_mean
    ways |= {
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
    if sizes.device == "cuda" and LigerFusedLinearDPOLoss is not None:
        ways["Liger's, mean alone"] = liger
    if sizes.device == "cuda" and cut_cross_entropy is not None:
        ways["cut-cross-entropy"] = cut
    return ways


def missing(device: str) -> list[str]:
    """Peers that would run there, were they installed."""
    peers = {"TRL": TRL, "Liger": LigerFusedLinearDPOLoss}
    if device == "cuda":
        peers["cut-cross-entropy"] = cut_cross_entropy
    if not hasattr(F, "linear_cross_entropy"):
        peers["torch's linear_cross_entropy"] = None
    return [name for name, peer in peers.items() if peer is None]


def products(c: Case) -> tuple[Tensor, Tensor | None]:
    """Nothing but the products: 4 with a trained head, 2 with a frozen one."""
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
    """Gradients before times, on fewer tokens, against float32."""
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
    """The peak of a step over the inputs and the gradients."""
    c = case_of(kind, sizes)
    loss = contenders(kind, sizes)[name]
    small = case_of(kind, dataclasses.replace(sizes, tokens=64, vocab=128))
    step(loss, small)  # libraries keep buffers of their own
    _, peak = peak_of(lambda: step(loss, c), sizes.device)
    if peak is None:
        return None
    grads = sum(x.grad.nbytes for x in (c.hidden, c.weight) if x.grad is not None)
    return round(peak - grads / 1e6, 1)


def memory_apart(kind: str, name: str, sizes: Sizes) -> float | None:
    """As `memory_mb`, in a process of its own where the process is what is measured."""
    if sizes.device == "cuda":
        return memory_mb(kind, name, sizes)
    command = [sys.executable, __file__, "--memory", kind, name]
    for option, value in asdict(sizes).items():
        command += [f"--{option}", str(value)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def measure(kind: str, sizes: Sizes, rounds: int) -> dict[str, Any]:
    ways = contenders(kind, sizes)
    for name in ways:
        check(kind, sizes, name)
    c = case_of(kind, sizes)
    calls = {name: functools.partial(step, loss, c) for name, loss in ways.items()}
    times: dict[str, list[float]] = {name: [] for name in ("products", *calls)}
    for turn in tqdm(range(rounds + 1), desc=kind, file=sys.stderr):
        for name, call in {"products": functools.partial(products, c), **calls}.items():
            took = seconds(call, sizes.device)
            if turn > 0:
                times[name].append(took)
    del c, calls, call
    median = {name: statistics.median(t) for name, t in times.items()}
    return {
        "head": kind,
        "products": KINDS[kind],
        "seconds": {name: round(t, 5) for name, t in median.items()},
        "spread": {name: round((max(t) - min(t)) / median[name], 3) for name, t in times.items()},
        "over_products": {name: round(median[name] / median["products"], 3) for name in ways},
        "memory_mb": {name: memory_apart(kind, name, sizes) for name in ways},
    }


def table(rows: list[dict[str, Any]], what: str, device: str) -> list[str]:
    unit, scale, in_tiles = ("s", 1, " in tiles") if device == "cpu" else ("ms", 1e3, "")
    lines = [
        f"| {what} | contender | {unit} | over the bare products | memory, MB |",
        "|---|---|---|---|---|",
    ]
    for r in rows:
        head = "trained" if r["head"] == "dpo" else r["head"]
        times = {name: f"{scale * t:.2f}" for name, t in r["seconds"].items()}
        lines.append(
            f"| {head} | {r['products']} products{in_tiles} | {times['products']} | 1.00 | |"
        )
        for name, ratio in r["over_products"].items():
            memory = r["memory_mb"][name]
            lines.append(
                f"| {head} | {name} | {times[name]} | {ratio:.2f} | "
                f"{'' if memory is None else format(memory, '.0f')} |"
            )
    return lines


def summary(report: dict[str, Any]) -> str:
    s = report["sizes"]
    device = s.get("device", "cpu")
    means, dpo = ([r for r in report["rows"] if (r["head"] == "dpo") is x] for x in (False, True))
    lines = table(means, "head", device) if means else []
    if dpo:
        lines += [""] * bool(means) + table(dpo, "head, DPO loss", device)
    where = ", ".join(f"{v} {k}" if k != "device" else v for k, v in report["machine"].items())
    shape = f"{s['tokens']:,} tokens, hidden {s['hidden']:,}, vocabulary {s['vocab']:,}"
    absent = report.get("missing") or []
    left_out = f" Not installed: {', '.join(absent)}." if absent else ""
    shape += f", {s.get('dtype', 'float32')}"
    return "\n".join([*lines, "", f"{shape}; {where}; `{report['command']}`.{left_out}"])


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
    print(summary(report))
    if args.json is not None:
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
