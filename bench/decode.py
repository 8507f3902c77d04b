"""What a decoding step costs with crossfade's engine, and with what users write instead.

    python bench/decode.py --json bench/results/decode.json     (--compile adds the compiled engine)

One process, the contenders taking turns; medians over rounds. On a CPU a round's step is the median
time between two tokens of a run; on a GPU, where nobody may wait for a token, the difference of two
runs' times over the difference of their tokens. Prompts, first calls and set-up are not in it.
Before anything is timed, every contender's tokens are checked against the first one's. On a GPU,
models have the shapes of Llama 3 and random weights.

The floor of a step is a read of its weights and live caches, at the speed of reads right before and
right after the contender's turn: on a CPU of the same weights, which lie in its caches as far as
steps leave them there, on a GPU of a large sum or copy. A step that beats its floor is an error.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import functools
import gc
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from importlib import metadata, util
from pathlib import Path
from typing import Any

import crossfade as cf
import decode_peers as peers
import torch
from crossfade.bench import hardware, timing
from decode_peers import Contest, check, tokens_of
from decode_queue import measure_queue
from reports.decode import ratio, render, steps
from torch import Tensor
from tqdm import tqdm

# Steps that were measured on two CPU cores: SmolLM2-135M in float32, after 59 tokens, at batch 1, 4
# and 16. A recipe that takes more, in Hugging Face's greedy steps, is slower than it has to be.
KNOWN_GREEDY_MS = {1: 65.6, 4: 130, 16: 244}
KNOWN_MS = {
    ("LoRA guides", "PEFT mixed batch"): {1: 118, 4: 225, 16: 413},
    ("LoRA guides", "three forwards"): {1: 302, 4: 450, 16: 869},
    ("separate models", "three forwards"): {1: 248, 4: 384, 16: 750},
}
MOST_OFF = 0.2
PIECE = 4 << 20  # bytes of weights that are read at once
PACKAGES = ("crossfade", "torch", "transformers", "peft")


@dataclasses.dataclass(frozen=True)
class Sizes:
    """`short` and `long`: the new tokens of runs."""

    batches: Sequence[int]
    prompt: int
    short: int
    long: int
    rounds: int


def seconds(call: Callable[[], Any], device: str) -> float:
    start = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def used(device: str) -> int | None:
    """Bytes that torch holds on a GPU, or the process on a CPU; None where that is not known."""
    gc.collect()
    if device == "cuda":
        return torch.cuda.memory_allocated()
    if not Path("/proc/self/status").exists():
        return None
    ctypes.CDLL(None).malloc_trim(0)  # so that the system has back what is freed
    return _process("VmRSS")


def peak_of(call: Callable[[], Any], device: str) -> tuple[Any, float | None]:
    """What `call` gives, and by how many megabytes it raised what is held, at most."""
    before = used(device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        result = call()
        return result, rise_mb(torch.cuda.max_memory_allocated(), before)
    if before is None:
        return call(), None
    Path("/proc/self/clear_refs").write_text("5")  # this resets VmHWM
    result = call()
    return result, rise_mb(_process("VmHWM"), before)


def rise_mb(after: int | None, before: int | None) -> float | None:
    return None if after is None or before is None else round((after - before) / 1e6, 1)


def _process(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(x.split()[1]) << 10 for x in lines if x.startswith(field + ":"))


def first_calls(
    contests: Sequence[Contest], ids: Tensor, sizes: Sizes
) -> dict[Any, dict[str, Any]]:
    """Check each contender, and return what its first call takes and the memory that it costs."""
    device = ids.device.type
    found: dict[Any, dict[str, Any]] = {}
    for contest in contests:
        tokens: dict[str, Tensor] = {}
        for name, run in contest.runs.items():
            before = used(device)
            start = time.perf_counter()
            tokens[name] = tokens_of(run(ids, sizes.short, False))
            first = time.perf_counter() - start
            entry: dict[str, Any] = {"kept_mb": rise_mb(used(device), before)}
            again = seconds(functools.partial(run, ids, sizes.short, False), device)
            entry["setup_s"] = round(max(0.0, first - again), 1)
            call = functools.partial(run, ids, sizes.long, contest.sample)
            result, entry["peak_mb"] = peak_of(call, device)
            if isinstance(result, cf.Output):
                entry["cache_mb"] = round(result.stats.cache_bytes / 1e6, 1)
                entry["notes"] = list(result.stats.notes)
                for note in result.stats.notes:
                    print(f"{contest.name}, {name}: {note}", file=sys.stderr)
            found[contest.name, name] = entry
        check(contest, ids, tokens)
    return found


def step_ms(run: peers.Run, ids: Tensor, sizes: Sizes, sample: bool) -> float:
    """The milliseconds of a step, from one run or, on a GPU, from two."""
    if ids.device.type == "cpu":
        ticks: list[float] = []
        run(ids, sizes.long, sample, lambda: ticks.append(time.perf_counter()))
        return 1e3 * statistics.median(b - a for a, b in itertools.pairwise(ticks))
    short, long = (
        seconds(functools.partial(run, ids, n, sample), "cuda") for n in (sizes.short, sizes.long)
    )
    return 1e3 * (long - short) / (sizes.long - sizes.short)


def read_gb_per_s(weights: Sequence[Tensor], device: str) -> float:
    """The bandwidth: on a CPU of reads of the weights, on a GPU of a large sum or copy."""
    if device == "cpu":
        return weights_gb_per_s(weights)
    x = torch.zeros(1 << 29, device=device)  # 2 GB
    calls = [(x.nbytes, x.sum), (2 * x.nbytes, x.clone)]
    rates = []
    for nbytes, call in calls:
        call()
        torch.cuda.synchronize()
        rates.append(nbytes / statistics.median(seconds(call, device) for _ in range(5)) / 1e9)
    return max(rates)


def weights_gb_per_s(weights: Sequence[Tensor]) -> float:
    """The bandwidth of two reads of the weights, after a first one that is not timed.

    They are read in pieces, so that the pieces whose reads other processes interrupted can be left
    out; if those are more than half, none is. Small weights, whose reads are mostly overhead, are
    left out as well.
    """
    pieces = [p for w in weights for p in w.detach().view(-1).split(PIECE // w.itemsize)]
    largest = max(p.nbytes for p in pieces)
    pieces = [p for p in pieces if 2 * p.nbytes >= largest]
    reads = [functools.partial(timing.read, p) for p in pieces]
    for read in reads:
        read()
    found = [(p.nbytes, timing.timed(r)) for p, r in 2 * list(zip(pieces, reads, strict=True))]
    calm = [(nbytes, sample) for nbytes, sample in found if not sample.interrupted]
    if 2 * len(calm) >= len(found):
        found = calm
    return sum(nbytes for nbytes, _ in found) / sum(sample.us for _, sample in found) / 1e3


def measure(
    contests: Sequence[Contest], batch: int, sizes: Sizes, rounds: int, limit: float, device: str
) -> list[dict[str, Any]]:
    """The row of each contender's figures, from rounds in which each has its turn.

    Raises:
        timing.FasterThanItsFloor: a step takes less time than reading what it needs.
    """
    generator = torch.Generator().manual_seed(batch)
    vocabulary = contests[0].models[0].config.vocab_size
    ids = torch.randint(20, vocabulary, (batch, sizes.prompt), generator=generator).to(device)
    first = first_calls(contests, ids, sizes)
    took: dict[Any, list[float]] = {key: [] for key in first}
    rates: dict[Any, list[float]] = {key: [] for key in first}
    end = time.monotonic() + limit
    for _ in tqdm(range(rounds), desc=f"batch {batch}", file=sys.stderr):
        for contest in contests:
            before = read_gb_per_s(contest.weights, device)
            for name, run in contest.runs.items():
                took[contest.name, name].append(step_ms(run, ids, sizes, contest.sample))
                after = read_gb_per_s(contest.weights, device)
                rates[contest.name, name] += [before, after]
                before = after
        if time.monotonic() > end:
            break
    rows = []
    for contest in contests:
        # Keys and values of so many tokens are read in the middle one of the steps that are timed.
        tokens = sizes.prompt + (sizes.long + (sizes.short if device == "cuda" else 0)) // 2
        for name in contest.runs:
            key = (contest.name, name)
            floors = [timing.Sample(contest.bytes(batch, tokens) / r / 1e3) for r in rates[key]]
            t = timing.timing_of([timing.Sample(1e3 * ms) for ms in took[key]], floors)
            timing.check_floors(f"{contest.name}, batch {batch}", {name: t}, device)
            rows.append(
                {
                    "set": contest.name,
                    "contender": name,
                    "batch": batch,
                    "step_ms": round(t.us / 1e3, 2),
                    "steps_ms": [round(ms, 2) for ms in took[key]],
                    "read_ms": round(t.floor_us / 1e3, 2),
                    "read_gb_per_s": round(statistics.median(rates[key]), 1),
                    **first[key],
                }
            )
    return rows


def baselines(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The recipes over Hugging Face's greedy step, and how far that is from what is known."""
    result = []
    for (key, known), batch in ((k, b) for k in KNOWN_MS.items() for b in k[1]):
        found = ratio(rows, key, ("single", "Hugging Face"), batch)
        if found is None:
            continue
        expected = known[batch] / KNOWN_GREEDY_MS[batch]
        off = found / expected - 1
        figures = {"over_greedy": found, "known": expected, "off": off}
        entry = {"set": key[0], "contender": key[1], "batch": batch}
        entry |= {name: round(x, 3) for name, x in figures.items()}
        result.append(entry | {"flagged": abs(off) > MOST_OFF})
    return result


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    cpu = device == "cpu"
    names = ["single", "lora", "models", "queue"] if cpu else ["models", "lora"]
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a tiny random model: a smoke run")
    parser.add_argument("--json", type=Path, help="where results go, batch by batch")
    parser.add_argument("--only", nargs="+", choices=names, default=names)
    parser.add_argument("--batch", nargs="+", type=int, help="instead of all batch sizes")
    parser.add_argument("--rounds", type=int, help="turns of each contender (5; 2 if quick)")
    parser.add_argument("--new-tokens", nargs=2, type=int, metavar=("SHORT", "LONG"),
                        help="of the runs that a step's time is taken from")  # fmt: skip
    parser.add_argument("--limit", type=float, default=float("inf"), metavar="SECONDS",
                        help="begin no further round of a batch after this long")  # fmt: skip
    if cpu:
        parser.add_argument("--compile", action="store_true", help="also Engine(compile=True)")
    given = sys.argv[1:] if arguments is None else arguments
    args = parser.parse_args(given)

    sizes = Sizes([1, 4, 16], 59, 6, 22, 5) if cpu else Sizes([1, 8, 64], 128, 80, 128, 5)
    if args.quick:
        sizes = Sizes([1, 2], 9, 2, 14, 2)
    if args.new_tokens is not None:
        sizes = dataclasses.replace(sizes, short=args.new_tokens[0], long=args.new_tokens[1])
    batches, rounds = args.batch or sizes.batches, args.rounds or sizes.rounds
    report: dict[str, Any] = {
        "command": " ".join(
            ["python bench/decode.py", *(sys.argv[1:] if arguments is None else arguments)]
        ),
        "machine": hardware(device),
        "versions": {p: metadata.version(p) for p in PACKAGES if util.find_spec(p)},
        "settings": {
            "models": {},
            "prompt": sizes.prompt,
            "new_tokens": [sizes.short, sizes.long],
            "rounds": rounds,
            **peers.SAMPLING,
        },
        "rows": [],
    }

    def save() -> None:
        if args.json is not None:
            args.json.write_text(json.dumps(report, indent=1) + "\n")

    for contests in peers.cpu_contests(args) if cpu else peers.gpu_contests(args):
        report["settings"]["models"] |= {
            c.name: peers.model_of(c.name, device, args.quick) for c in contests
        }
        for batch in batches if set(args.only) - {"queue"} else []:
            rows = measure(contests, batch, sizes, rounds, args.limit, device)
            print("\n".join(steps(rows)), flush=True)
            report["rows"] += rows
            save()
        if "queue" in args.only:
            lora = next(c for c in contests if c.name == "LoRA guides")
            counts = (8, 4, 16, 1) if args.quick else (64, 16, 64, 3)
            report["queue"] = measure_queue(lora, *counts)
        del contests
    if cpu and not args.quick:
        report["baselines"] = baselines(report["rows"])
        for b in report["baselines"]:
            if b["flagged"]:
                print(f"not the peer that is known: {b}", file=sys.stderr)
    save()
    print(render(report))
    return report


if __name__ == "__main__":
    main()
