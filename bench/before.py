"""Whether a checkout decodes as fast as another one: two processes that take turns.

    git worktree add --detach ../before COMMIT  # with the native module built or copied there
    python bench/before.py --before ../before --after . --json bench/results/before.json

Each checkout runs in a process of its own. In each turn both make the same call, in alternating
order, so that what else the machine does falls on both; the figure is the median of the ratios of
the pairs, after over before, with a bootstrap interval of 95 %. The time of a step is that of the
new tokens after the first, of two calls in one turn. Besides the clock's time the processes' own
CPU time is kept, which other processes disturb less.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from reports.before import render

NEW, PROMPT = 24, 30  # new tokens of a call, and tokens of its prompts
BATCHES = (1, 16)
SIZES = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}


@functools.cache
def tiny(seed: int) -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**SIZES)).eval()
    model.generation_config.eos_token_id = None  # all calls then have the same length
    return model


@functools.cache
def adapted() -> Any:
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(3)
    config = LoraConfig(
        r=4, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False
    )
    base = tiny.__wrapped__(0)  # a model of its own: PEFT changes its modules
    model = get_peft_model(base, config, adapter_name="tuned")
    model.add_adapter("ref", config)
    return model.eval()


@functools.cache
def small() -> Any:
    from crossfade import models

    model, _ = models.load(models.get())
    model.generation_config.eos_token_id = None
    return model


def blends() -> dict[str, Callable[[], Any]]:
    """The functions that make what is decoded, by name."""
    import crossfade as cf

    def three() -> Any:
        return cf.Model(tiny(0)) + 0.8 * (cf.Model(tiny(1)) - cf.Model(tiny(2)))

    def lora() -> Any:
        base, tuned, ref = (cf.Model(adapted(), adapter=a) for a in (None, "tuned", "ref"))
        return base + 0.8 * (tuned - ref)

    return {
        "one": lambda: cf.Model(tiny(0)),
        "three": three,
        "lora": lora,
        "support": lambda: three().within(cf.Support(min_p=0.05)),
        "small": lambda: cf.Model(small()),
    }


def cases(with_small: bool) -> dict[str, tuple[int, ...]]:
    """By case the new tokens of the calls that are timed; two calls give the time of a step."""
    found: dict[str, tuple[int, ...]] = {}
    for name in ("one", "three", "lora", "support", *(("small",) if with_small else ())):
        for batch in BATCHES:
            for how in ("greedy", "sampled"):
                found[f"{name}, {how}, batch {batch}"] = (1, NEW)
    for batch in BATCHES:
        found[f"one, search, batch {batch}"] = (NEW,)
        found[f"three, score, batch {batch}"] = (NEW,)
    return found


def prepare(case: str) -> Callable[[int], Any]:
    """What a case calls, as a function of the number of new tokens."""
    import crossfade as cf
    import torch

    name, how, rest = case.split(", ")
    batch = int(rest.removeprefix("batch "))
    torch.manual_seed(batch)
    prompts = torch.randint(5, 500, (batch, PROMPT))
    blend = blends()[name]()
    if how == "score":
        responses = torch.randint(5, 500, (batch, NEW)).tolist()
        return lambda new: cf.score(blend, prompts.tolist(), [r[:new] for r in responses])
    options: dict[str, Any] = {"do_sample": how != "greedy", "seed": 3, "progress": False}
    if how == "search":
        ratio = cf.LogRatio(cf.Model(tiny(1)), cf.Model(tiny(2)))
        options["search"] = cf.ChunkBeamSearch(width=2, samples=2, chunk_length=6, value=ratio)
    elif how == "sampled":
        options |= {"temperature": 0.8, "top_p": 0.95}
    return lambda new: cf.generate(blend, prompts, max_new_tokens=new, **options)


def work() -> None:
    """Time the calls that the parent asks for, a line each."""
    import torch

    warnings.simplefilter("ignore")
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    made: dict[str, Callable[[int], Any]] = {}
    for line in sys.stdin:
        case, new = json.loads(line)
        if case not in made:
            made[case] = prepare(case)
            for _ in range(2):
                made[case](min(new, 4))
        clock, cpu = time.perf_counter(), time.process_time()
        made[case](new)
        times = time.perf_counter() - clock, time.process_time() - cpu
        print(json.dumps(times), flush=True)


class Worker:
    """A process over one checkout."""

    def __init__(self, tree: Path, threads: int) -> None:
        self.tree = tree
        environment = {
            **os.environ,
            "PYTHONPATH": str(tree.resolve() / "python"),
            "OMP_NUM_THREADS": str(threads),
            "OMP_WAIT_POLICY": "passive",
        }
        command = [sys.executable, __file__, "--work"]
        self.process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def time(self, case: str, new: int) -> tuple[float, float]:
        """Seconds of one call, of the clock and of the CPU."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps([case, new]) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the process over {self.tree} ended in {case}")
        clock, cpu = json.loads(line)
        return clock, cpu

    def end(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def turns(workers: Sequence[Worker], found: dict[str, tuple[int, ...]], rounds: int) -> Iterator:
    """Each case of each turn, with the clock's and the CPU's times by worker and new tokens."""
    for case, lengths in found.items():  # Models are made and calls are warm before the first turn.
        for worker in workers:
            for new in lengths:
                worker.time(case, new)
    for turn in range(rounds):
        for case, lengths in found.items():
            times: list[dict[int, tuple[float, float]]] = [{}, {}]
            for new in lengths:
                for i in (0, 1) if turn % 2 else (1, 0):
                    times[i][new] = workers[i].time(case, new)
            yield case, times
        print(f"turn {turn + 1} of {rounds}", file=sys.stderr, flush=True)


def summary(before: Sequence[float], after: Sequence[float]) -> dict[str, Any]:
    """The medians of both in milliseconds, and that of the pairs' ratios with its interval."""
    pairs = [a / b for b, a in zip(before, after, strict=True) if a > 0 and b > 0]
    if not pairs:
        return {}
    pick = random.Random(0)
    medians = sorted(statistics.median(pick.choices(pairs, k=len(pairs))) for _ in range(1000))
    return {
        "before_ms": round(1e3 * statistics.median(before), 3),
        "after_ms": round(1e3 * statistics.median(after), 3),
        "ratio": round(statistics.median(pairs), 4),
        "interval": [round(medians[25], 4), round(medians[974], 4)],
        "pairs": len(pairs),
    }


def figures(seen: dict[str, list[list[dict[int, tuple[float, float]]]]]) -> list[dict[str, Any]]:
    """The times of each case's call and, where it has two lengths, of its step."""
    rows = []
    for case, all_times in seen.items():
        last = max(all_times[0][0])
        measures: dict[str, Callable[[dict[int, Any], int], float]] = {
            "call": lambda t, kind, last=last: t[last][kind],
        }
        if len(all_times[0][0]) > 1:
            measures["call of one token"] = lambda t, kind: t[1][kind]
            measures["step"] = lambda t, kind, last=last: (t[last][kind] - t[1][kind]) / (last - 1)
        for name, measure in measures.items():
            row: dict[str, Any] = {"case": case, "of": name}
            for kind, clock in enumerate(("wall", "cpu")):
                row[clock] = summary(*([measure(x[i], kind) for x in all_times] for i in (0, 1)))
            rows.append(row)
    return rows


def commit_of(tree: Path) -> str:
    command = ["git", "-C", str(tree), "rev-parse", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--before", type=Path, help="a checkout")
    parser.add_argument("--after", type=Path, default=Path(), help="a checkout (default: .)")
    parser.add_argument("--rounds", type=int, default=30, help="turns of every case (default 30)")
    parser.add_argument("--only", default="", help="cases that have this in their names")
    parser.add_argument("--no-small", action="store_true", help="tiny random models alone")
    parser.add_argument("--threads", type=int, default=1, help="of each process (default 1)")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(arguments)
    if args.work:
        work()
        return 0
    if args.before is None:
        parser.error("--before is missing; it must be a checkout to compare with")
    found = {k: n for k, n in cases(not args.no_small).items() if args.only in k}
    workers = [Worker(tree, args.threads) for tree in (args.before, args.after)]
    seen: dict[str, list[Any]] = {case: [] for case in found}
    try:
        for case, times in turns(workers, found, args.rounds):
            seen[case].append(times)
    finally:
        for worker in workers:
            worker.end()
    report = {
        "command": "python bench/before.py --before BEFORE --after AFTER "
        f"--rounds {args.rounds} --threads {args.threads}"
        + " --no-small" * args.no_small
        + f" --only {args.only!r}" * bool(args.only),
        "before": commit_of(args.before),
        "after": commit_of(args.after),
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "rows": figures(seen),
    }
    print(render(report))
    if args.json is not None:
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
