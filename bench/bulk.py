"""A thousand prompts through `bulk.decode`, against parts that each wait for their last row.

Parts are how files were decoded before: eight batches a call of `generate`, in which a prompt takes
the place of one that has ended, until the last of the part has ended. Both ways draw the same
tokens, and take turns.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import crossfade as cf
import torch
from crossfade.bench import hardware
from crossfade.bulk.decode import decode
from crossfade.bulk.records import batches, seed_of
from decode_queue import queue_steps
from reports.bulk import render
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

PART = 8  # batches of a part
ENDS = range(100, 115)  # tokens that end a row: some one in seventy of what the model draws


def random_model(vocabulary: int = 1024) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=128,
        intermediate_size=344,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
    )
    return LlamaForCausalLM(config).eval()


def measure(count: int, batch: int, new: int, rounds: int) -> dict[str, Any]:
    """Seconds of both ways in turns, and how far the steps alone would tell them apart."""
    model = random_model()
    generator = torch.Generator().manual_seed(1)
    sizes = torch.randint(4, 33, (count,), generator=generator).tolist()
    prompts = [torch.randint(200, 1024, (n,), generator=generator).tolist() for n in sizes]
    arguments: dict[str, Any] = {
        "max_new_tokens": new,
        "do_sample": True,
        "eos_token_id": list(ENDS),
        "pad_token_id": 0,
        "max_batch": batch,
    }

    def in_parts() -> dict[int, list[int]]:
        found: dict[int, list[int]] = {}
        for part in batches(range(count), PART * batch):
            out: Any = cf.generate(
                model,
                [prompts[i] for i in part],
                seed=[seed_of(0, i) for i in part],
                progress=False,
                **arguments,
            )
            found.update(zip(part, out.responses, strict=True))
        return found

    def without_parts() -> dict[int, list[int]]:
        return {i: out.responses[0] for i, out in decode(model, prompts, seed=0, **arguments)}

    ways: dict[str, Callable[[], dict[int, list[int]]]] = {
        "parts": in_parts,
        "bulk.decode": without_parts,
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    found: dict[str, dict[int, list[int]]] = {}
    for turn in tqdm(range(rounds), desc="bulk", file=sys.stderr):
        for name in ways if turn % 2 == 0 else reversed(ways):
            start = time.perf_counter()
            found[name] = ways[name]()
            times[name].append(time.perf_counter() - start)
    equal = sum(found["parts"][i] == found["bulk.decode"][i] for i in range(count))
    if equal < 0.98 * count:  # a draw at a near tie may differ, as the order of sums does
        raise RuntimeError(f"{count - equal} of {count} prompts did not get the tokens of parts")
    lengths = [len(found["parts"][i]) for i in range(count)]
    each_part = batches(range(count), PART * batch)
    steps = sum(queue_steps([lengths[i] for i in part], batch) for part in each_part)
    ratios = [a / b for a, b in zip(times["parts"], times["bulk.decode"], strict=True)]
    return {
        "prompts": count,
        "max_batch": batch,
        "max_new_tokens": new,
        "mean_tokens": round(statistics.mean(lengths), 1),
        "prompts_equal": equal,
        "rounds": rounds,
        "seconds": {name: round(statistics.median(t), 2) for name, t in times.items()},
        "ratio": round(statistics.median(ratios), 3),
        "ratios": [round(r, 3) for r in sorted(ratios)],
        "steps_ratio": round(steps / queue_steps(lengths, batch), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=32, help="rows decoded at a time")
    parser.add_argument("--new", type=int, default=200, help="the most new tokens of a row")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="also write the figures there")
    args = parser.parse_args()
    report = {
        "command": " ".join(["python bench/bulk.py", *sys.argv[1:]]),
        "hardware": hardware("cpu"),
        **measure(args.prompts, args.batch, args.new, args.rounds),
    }
    print(render(report))
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
