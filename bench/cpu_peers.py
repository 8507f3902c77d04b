"""What a token costs on a CPU, beside what a CPU's user would pick instead: llama.cpp and a loop.

    export OMP_NUM_THREADS=2 OMP_PROC_BIND=true
    python bench/cpu_peers.py --json bench/results/cpu_peers.json

All in one process, the contenders taking turns; medians over rounds, and ratios of turns of the
same round. A step is the median time between two tokens of a run, sampled with top-k and top-p.
The floor of a step is the larger of two times: reading weights and live caches once, and the
products, each at a rate that is measured in every round. Before anything is timed, everybody's
next-token distributions are compared with those of the model's own forward in float32.

llama-cpp-python takes part where it is installed. `--only` measures some parts anew and leaves
the others in the file as they are.
"""

from __future__ import annotations

import argparse
import functools
import gc
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata, util
from pathlib import Path
from typing import Any

import cpu_tape
import crossfade as cf
import decode_peers as peers
import llama_peer as llama
import torch
from cpu_contenders import Contender, Lineup, errors
from crossfade.bench import hardware, timing
from reports.cpu_peers import render
from torch import Tensor
from tqdm import tqdm

PACKAGES = ("crossfade", "torch", "transformers", "peft")
PARTS = ("beyond", "errors", "steps", "prompts", "calls", "big")
PROMPT = 59  # tokens; four times as many in all rows of a batch, at most
READ = 512 << 20  # bytes of the read that a floor's rate is taken from
PIECE = 16 << 20  # that are read at once: both halves of a larger one lie too far apart
PRODUCT = 1024  # rows and columns of its product


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny random models: a smoke run")
    parser.add_argument("--json", type=Path, help="where results go, part by part")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--batch", nargs="+", type=int, help="instead of 1, 4 and 16")
    parser.add_argument("--rounds", type=int, help="turns of each contender (5; 2 if quick)")
    parser.add_argument("--new-tokens", type=int, default=18, help="of a run")
    parser.add_argument("--limit", type=float, default=float("inf"), metavar="SECONDS",
                        help="begin no further round of a batch after this long")  # fmt: skip
    parser.add_argument("--compile", action="store_true",
                        help="at batch 1 also Engine(compile=True): minutes")  # fmt: skip
    parser.add_argument("--work", type=Path, help="a folder that keeps llama.cpp's models")
    given = list(sys.argv[1:] if arguments is None else arguments)
    args = parser.parse_args(given)
    args.rounds = args.rounds or (2 if args.quick else 5)
    args.batch = args.batch or ([1, 2] if args.quick else [1, 4, 16])
    report = _begun(args.json)
    report |= {
        "machine": hardware("cpu"),
        "versions": {p: metadata.version(p) for p in PACKAGES if util.find_spec(p)},
        "llama.cpp": llama.build(),
        "settings": {"prompt": PROMPT, "new_tokens": args.new_tokens, **peers.SAMPLING},
    }
    with tempfile.TemporaryDirectory() as folder:
        args.work = args.work or Path(folder)
        args.work.mkdir(parents=True, exist_ok=True)
        lineup = None
        for part in sorted(args.only, key=PARTS.index):
            start, load = time.monotonic(), os.getloadavg()[0]
            if part == "big" or lineup is None:
                del lineup  # The small models are freed before the big ones are made.
                lineup = (Lineup.big if part == "big" else Lineup.of)(args.quick, args.work)
            done: dict[str, Any] = {
                "rows": [],
                "command": " ".join(["python bench/cpu_peers.py", *given]),
                "load_before": round(load, 2),
            }
            report["parts"][part] = done
            for rows in measure(part, lineup, args):
                done["rows"] += rows
                done["seconds"] = round(time.monotonic() - start, 1)
                if args.json is not None:
                    args.json.write_text(json.dumps(report, indent=1) + "\n")
    print(render(report))
    return report


def _begun(file: Path | None) -> dict[str, Any]:
    """What was measured before; parts that are measured anew take the place of their like."""
    return json.loads(file.read_text()) if file is not None and file.exists() else {"parts": {}}


def measure(part: str, lineup: Lineup, args: argparse.Namespace) -> Iterator[list[dict[str, Any]]]:
    """The rows of a part, as they are found."""
    if part == "beyond":
        small = [] if args.quick else lineup.taped()
        blends = itertools.chain(small, cpu_tape.families(args.quick))  # one model after the other
        yield list(tqdm(cpu_tape.measure(blends), desc="beyond", file=sys.stderr))
    elif part == "errors":
        yield errors(lineup)
    elif part == "prompts":
        for length in (20, 40) if args.quick else (400, 2000):
            yield prompts(lineup, length, args)
    elif part == "calls":
        yield calls(lineup, args)
    else:
        for batch in args.batch if part == "steps" else args.batch[:1]:
            compiled = args.compile and batch == 1
            contenders = lineup.contenders(batch, PROMPT + args.new_tokens + 1, compiled)
            yield steps(lineup, contenders, batch, args)
            del contenders
            lineup.close()
            gc.collect()


# ---- Turns ---------------------------------------------------------------------------------------


def turns(
    calls: dict[Any, Callable[[], float]], rounds: int, limit: float, what: str
) -> tuple[dict[Any, list[float]], list[dict[str, float]]]:
    """What each call returns in each round, and the machine's rates in each round."""
    found: dict[Any, list[float]] = {key: [] for key in calls}
    rates = []
    end = time.monotonic() + limit
    for i in tqdm(range(rounds), desc=what, file=sys.stderr):
        rates.append(machine_rates())
        for key in calls if i % 2 == 0 else reversed(calls):
            found[key].append(calls[key]())
        if time.monotonic() > end:
            break
    rates.append(machine_rates())
    return found, rates


def machine_rates() -> dict[str, float]:
    """GB/s of a read, and GFLOP/s of products in float32 and bfloat16, with torch's threads."""
    pieces = _numbers(READ // 4).split(PIECE // 4)
    seconds = _best(lambda: [timing.read(p) for p in pieces])
    found = {"read": READ / 1e9 / seconds}
    for dtype in (torch.float32, torch.bfloat16):
        x = _numbers(PRODUCT * PRODUCT).view(PRODUCT, PRODUCT).to(dtype)
        seconds = _best(functools.partial(torch.mm, x, x))
        found[str(dtype).removeprefix("torch.")] = 2 * PRODUCT**3 / 1e9 / seconds
    return found


def _best(call: Callable[[], object], times: int = 3) -> float:
    """The least seconds: what the machine can do."""
    return min(_seconds(call) for _ in range(times))


def _seconds(call: Callable[[], object]) -> float:
    start = clock()
    call()
    return clock() - start


def clock() -> float:
    """Seconds; on one thread those of the processor, as others may use it too."""
    return time.thread_time() if torch.get_num_threads() == 1 else time.perf_counter()


@functools.cache
def _numbers(count: int) -> Tensor:
    return torch.ones(count)


# ---- Steps ---------------------------------------------------------------------------------------


def steps(
    lineup: Lineup, contenders: Sequence[Contender], batch: int, args: argparse.Namespace
) -> list[dict[str, Any]]:
    """Milliseconds of a step of each contender, and of its floor."""
    prompt = 9 if args.quick else min(PROMPT, 4 * PROMPT // batch)
    generator = torch.Generator().manual_seed(batch)
    ids = torch.randint(20, lineup.vocabulary, (batch, prompt), generator=generator)
    setup, notes = {}, {}
    for c in contenders:  # The first call of each is not in the rounds.
        setup[c.key] = _seconds(lambda c=c: notes.update({c.key: notes_of(c.run(ids, 12, True))}))
    called = {c.key: functools.partial(step_ms, c.run, ids, args.new_tokens) for c in contenders}
    found, rates = turns(called, args.rounds, args.limit, f"batch {batch}")
    tokens = prompt + args.new_tokens // 2
    rate = {name: statistics.median(r[name] for r in rates) for name in rates[0]}
    return [
        {
            "size": lineup.name, "of": c.of, "by": c.by, "weights": c.weights, "batch": batch,
            "prompt": prompt,
            "rounds_ms": [round(ms, 3) for ms in found[c.key]],
            "step_ms": round(statistics.median(found[c.key]), 3),
            **floor(c, batch, tokens, rate),
            "first_call_s": round(setup[c.key], 2),
            "notes": notes[c.key],
            "rates": {name: round(x, 1) for name, x in rate.items()},
        }
        for c in contenders
    ]  # fmt: skip


def step_ms(run: peers.Run, ids: Tensor, new: int) -> float:
    """The median time between two tokens of a run."""
    ticks: list[float] = []
    run(ids, new, True, lambda: ticks.append(clock()))
    return 1e3 * statistics.median(b - a for a, b in itertools.pairwise(ticks))


def floor(c: Contender, batch: int, tokens: int, rate: dict[str, float]) -> dict[str, float]:
    """Milliseconds of the reads and of the products that a step cannot do without."""
    read = (c.weight_bytes + batch * tokens * c.token_bytes) / rate["read"] / 1e6
    fast = rate["float32"] if c.weights == "float32" else max(rate["float32"], rate["bfloat16"])
    products = 2 * c.products * batch / fast / 1e6
    times = {"read_ms": read, "products_ms": products, "floor_ms": max(read, products)}
    return {name: round(ms, 6) for name, ms in times.items()}


def notes_of(result: Any) -> list[str]:
    return list(result.stats.notes) if isinstance(result, cf.Output) else []


# ---- Prompts and short calls ---------------------------------------------------------------------


def prompts(lineup: Lineup, length: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Seconds from a prompt to its first token."""
    generator = torch.Generator().manual_seed(length)
    ids = torch.randint(20, lineup.vocabulary, (1, length), generator=generator)
    readers = lineup.readers(length + 8)
    called = {
        key: functools.partial(_seconds, functools.partial(read, ids))
        for key, read in readers.items()
    }
    for call in called.values():
        call()
    rounds = max(2, args.rounds - 2)
    found, _ = turns(called, rounds, args.limit, f"{length} tokens")
    lineup.close()
    return [
        {
            "size": lineup.name, "by": by, "weights": weights, "tokens": length,
            "rounds_s": [round(s, 4) for s in found[by, weights]],
            "tokens_per_s": round(length / statistics.median(found[by, weights]), 1),
        }
        for by, weights in readers
    ]  # fmt: skip


def calls(lineup: Lineup, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Seconds of calls of 20 tokens, and how much of them no step and no prompt takes."""
    ids = torch.randint(20, lineup.vocabulary, (1, 20), generator=torch.Generator().manual_seed(0))
    contenders = [c for c in lineup.contenders(1, 64, False) if c.by != "llama.cpp"]
    contenders = [c for c in contenders if c.weights in ("float32", "bfloat16")]
    fixed: dict[Any, list[float]] = {c.key: [] for c in contenders}

    def short(c: Contender) -> float:
        ticks: list[float] = []
        start = clock()
        c.run(ids, 20, True, lambda: ticks.append(clock()))
        took = clock() - start
        step = statistics.median(b - a for a, b in itertools.pairwise(ticks[8:]))
        fixed[c.key].append(took - 20 * step)
        return took

    called = {c.key: functools.partial(short, c) for c in contenders}
    for call in called.values():
        call()
    for each in fixed.values():
        each.clear()
    found, _ = turns(called, 2 * args.rounds, args.limit, "calls")
    return [
        {
            "size": lineup.name, "of": c.of, "by": c.by, "weights": c.weights,
            "rounds_s": [round(s, 4) for s in found[c.key]],
            "fixed_s": [round(s, 4) for s in fixed[c.key]],
        }
        for c in contenders
    ]  # fmt: skip


if __name__ == "__main__":
    main()
