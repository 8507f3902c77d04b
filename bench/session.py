"""Many short requests through one running loop: whether what it holds grows with their number.

    python bench/session.py --requests 10000 --json bench/results/session.json

Each request is a job of one row over tiny random models, with a prompt, a seed and a limit of its
own; the next one joins where one has left, and some are cancelled. Memory is looked at after each
tenth of them, garbage not collected in between. It fails where it grows after the first tenth.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import sys
import time
from pathlib import Path
from typing import Any

import crossfade as cf
import torch
from crossfade.decoding.driver import Driver
from crossfade.decoding.engine.options import Engine
from crossfade.decoding.generation import Generation
from crossfade.decoding.inputs import Requests
from crossfade.decoding.loop import Loop
from reports.session import render
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

VOCAB, CONTEXT, PLACES = 61, 128, 8
SIZES = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
SLACK_MB, SLACK_OBJECTS = 8.0, 2000  # what allocators and caches of Python may keep


def blend() -> Any:
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(**SIZES, **HEADS, max_position_embeddings=CONTEXT))
    guide = GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=2, n_positions=CONTEXT)
    )
    return cf.Model(base.eval()) + 0.5 * cf.Model(guide.eval())


def held(loop: Loop) -> dict[str, float]:
    """What the process holds, and the loop's caches and buffers."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {
        "objects": len(gc.get_objects()),
        "rss_mb": pages * 4096 / 1e6,
        "cache_bytes": loop.cache_bytes,
        "peak_bytes": loop.peak_bytes,
    }


def soak(requests: int) -> dict[str, Any]:
    pick = random.Random(0)
    generation = Generation(
        blend(), arguments={"do_sample": True, "max_new_tokens": 12, "eos_token_id": [1, 20]}
    )
    call = generation.call

    def job(number: int) -> Any:
        prompt = [pick.randrange(3, VOCAB) for _ in range(pick.randrange(1, 30))]
        return generation.job(Requests([prompt]), [number])

    first = job(0)
    driver = Driver(call.blend, call.models, call.vocabulary, Engine(), PLACES)
    driver.job = first
    loop = driver._loop(first.rows(), PLACES)
    loop.join(first.rows())
    seen: list[dict[str, float]] = []
    left = tokens = 0
    start = time.monotonic()

    def advance() -> bool:
        nonlocal left, tokens
        happened = loop.advance()
        if happened is None:
            return False
        left += len(happened.left)
        tokens += sum(map(len, happened.left))
        return True

    gc.collect()
    gc.disable()  # What only a collection frees shows as growth.
    try:
        with torch.no_grad():
            for number in range(1, requests):
                while loop.free_places < 1:
                    advance()
                rows = job(number).rows()
                loop.join(rows)
                if number % 50 == 0:
                    loop.cancel(rows if number % 100 else [*loop.seated.values()][:2])
                if number % max(1, requests // 10) == 0:
                    seen.append(held(loop))
            while advance():
                pass
    finally:
        gc.enable()
    seen.append(held(loop))
    early, late = seen[1], seen[-1]
    return {
        "requests": requests,
        "left": left,
        "tokens": tokens,
        "seconds": round(time.monotonic() - start, 1),
        "after two tenths": {k: round(v, 2) for k, v in early.items()},
        "at the end": {k: round(v, 2) for k, v in late.items()},
        "grows": late["objects"] > early["objects"] + SLACK_OBJECTS
        or late["rss_mb"] > early["rss_mb"] + SLACK_MB
        or late["cache_bytes"] > early["cache_bytes"]
        or left != requests,
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=10_000, help="(default 10000)")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(arguments)
    given = sys.argv[1:] if arguments is None else arguments
    found = {"command": " ".join(["python bench/session.py", *given]), **soak(args.requests)}
    print(render(found))
    if args.json is not None:
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    return int(found["grows"])


if __name__ == "__main__":
    sys.exit(main())
