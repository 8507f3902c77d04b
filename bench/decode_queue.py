"""A list of requests of unequal lengths: in a queue, and in fixed batches that wait for all."""

from __future__ import annotations

import heapq
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

import crossfade as cf
import decode_peers as peers
import torch
from decode_peers import Contest, Wrong
from tqdm import tqdm


def fixed_steps(lengths: Sequence[int], batch: int) -> int:
    """The steps of batches that each wait for their longest row."""
    return sum(max(lengths[i : i + batch]) for i in range(0, len(lengths), batch))


def queue_steps(lengths: Sequence[int], batch: int) -> int:
    """The steps of a queue, where a row that ends gives its place to the next request."""
    ends = [0] * batch
    for n in lengths:
        heapq.heappush(ends, heapq.heappop(ends) + n)
    return max(ends)


def measure_queue(
    contest: Contest, count: int, batch: int, new: int, rounds: int
) -> dict[str, Any]:
    """Time requests of unequal lengths both ways, which write the same tokens in other steps."""
    config = contest.models[0].config
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(20, 81, (count,), generator=generator).tolist()
    prompts = [
        torch.randint(20, config.vocab_size, (n,), generator=generator).tolist() for n in sizes
    ]

    def decode(first: int, last: int, ends: list[int] | None) -> list[list[int]]:
        return cf.generate(
            contest.blend, prompts[first:last], max_new_tokens=new, do_sample=True,
            eos_token_id=ends, seed=list(range(first, last)), max_batch=batch, progress=False,
            **peers.SAMPLING,
        ).responses  # fmt: skip

    ends = peers.ends_for(decode(0, count, None), shortest=new // 8, mean=new / 2)
    ways = {
        "queue": lambda: decode(0, count, ends),
        "fixed batches": lambda: [
            row for i in range(0, count, batch) for row in decode(i, min(i + batch, count), ends)
        ],
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    found: dict[str, list[list[int]]] = {}
    for _ in tqdm(range(rounds), desc="queue", file=sys.stderr):
        for name, way in ways.items():
            start = time.perf_counter()
            found[name] = way()
            times[name].append(time.perf_counter() - start)
    both = list(zip(found["queue"], found["fixed batches"], strict=True))
    equal = sum(a == b for a, b in both)
    if equal < 0.9 * count:  # near a tie the order of sums may change a draw
        raise Wrong(f"queue: {count - equal} of {count} rows are not those of fixed batches")
    lengths = [len(row) for row in found["queue"]]
    if not min(lengths) < max(lengths):
        raise Wrong(f"queue: all rows have {lengths[0]} tokens")
    pairs = zip(times["fixed batches"], times["queue"], strict=True)
    return {
        "set": contest.name,
        "requests": count,
        "max_batch": batch,
        "tokens": sum(lengths),
        "lengths": lengths,
        "rows_equal": equal,
        "seconds": {name: round(statistics.median(t), 2) for name, t in times.items()},
        "ratio": round(statistics.median(x / y for x, y in pairs), 2),
        "ideal_ratio": round(fixed_steps(lengths, batch) / queue_steps(lengths, batch), 2),
    }
