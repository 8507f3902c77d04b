"""Whether anything grows: many calls of every kind over the same models.

    python bench/soak_calls.py --minutes 10

Tiny random models, so that an hour's calls take minutes. After each round of all kinds the process
counts the memory (RSS), the objects and the tensors that it holds; tensors are counted before any
garbage is collected. It fails if the last round holds more than the one after the first tenth.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import crossfade as cf
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

VOCAB, CONTEXT = 61, 64
SIZES = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
PROMPTS = [[7, 9, 30], [8, 9], [5, 40, 41, 42], [6]]
DRAW: dict[str, Any] = {
    "max_new_tokens": 12,
    "do_sample": True,
    "eos_token_id": [1, 20],
    "pad_token_id": 0,
    "progress": False,
}
SLACK_MB, SLACK_OBJECTS = 8.0, 200  # allocators and caches of Python may keep so much


def models() -> tuple[Any, Any]:
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(**SIZES, **HEADS, max_position_embeddings=CONTEXT))
    guide = GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=2, n_positions=CONTEXT)
    )
    return base.eval(), guide.eval()


def adapted() -> Any:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    model = get_peft_model(models()[0], config, adapter_name="tuned")
    model.add_adapter("ref", config)
    return model.eval()


class Streamer:
    def put(self, value: torch.Tensor) -> None:
        pass

    def end(self) -> None:
        pass


@contextmanager
def failing(module: torch.nn.Module, error: type[BaseException]) -> Iterator[None]:
    """Have a hook in the middle of a forward raise; a call ends by that or says that it was cut."""

    def hook(*_: Any) -> None:
        raise error("of the soak")

    handle = module.register_forward_hook(hook)
    try:
        yield
    except error:
        pass
    finally:
        handle.remove()


def calls() -> dict[str, Callable[[int], Any]]:
    """The calls by their kind; each takes the number of its round."""
    base, guide = models()
    peft = adapted()
    simple = cf.Engine(simple=True)
    tuned, ref = (cf.Model(peft, adapter=name) for name in ("tuned", "ref"))
    blend = cf.Model(base) + 0.5 * cf.Model(guide, name="guide")
    cut = (1.5 * cf.Model(base) - 0.5 * cf.Model(guide)).within(cf.Support(min_p=0.1))
    ratio = cf.LogRatio(cf.Model(guide), cf.Model(base))
    search = cf.ChunkBeamSearch(width=2, samples=2, chunk_length=4, value=ratio)
    layer = base.model.layers[0].mlp

    def generate(x: Any, i: int, prompts: Any = PROMPTS, **more: Any) -> Any:
        return cf.generate(x, prompts, **{**DRAW, "seed": i, **more})

    def fails(i: int, error: type[BaseException], **more: Any) -> None:
        with failing(layer, error):
            generate(blend, i, **more)

    def talk(i: int) -> None:
        first = generate(blend, i, return_cache=True)
        longer = [[*p, *r, 9] for p, r in zip(PROMPTS, first.responses, strict=True)]
        second = generate(blend, i, longer, cache=first.cache, return_cache=True)
        generate(blend, i, longer, cache=first.cache, num_return_sequences=2)
        generate(blend, i, PROMPTS, cache=second.cache)

    def threads(i: int) -> None:
        each = [threading.Thread(target=generate, args=(x, i)) for x in (blend, tuned - ref)]
        for thread in each:
            thread.start()
        for thread in each:
            thread.join()

    return {
        "greedy": lambda i: generate(base, i, do_sample=False),
        "sampled": lambda i: generate(blend, i, temperature=0.8, top_p=0.9),
        "queue": lambda i: generate(blend, i, PROMPTS * 3, max_batch=3),
        "samples": lambda i: generate(blend, i, num_return_sequences=3),
        "support": lambda i: generate(cut, i),
        "adapters": lambda i: generate(0.7 * (tuned - ref) + cf.Model(peft, adapter=None), i),
        "simple path": lambda i: generate(blend, i, engine=simple),
        "adapters, simple path": lambda i: generate(tuned - 0.5 * ref, i, engine=simple),
        "search": lambda i: generate(base, i, search=search),
        "cache": talk,
        "score": lambda i: cf.score(blend, PROMPTS, [[5, 6, 7 + i % 40]] * len(PROMPTS)),
        "streamer": lambda i: generate(blend, i, streamer=Streamer()),
        "processors": lambda i: generate(blend, i, repetition_penalty=1.2),
        "context": lambda i: generate(blend, i, [*PROMPTS, [5] * (CONTEXT + 1)]),
        "error": lambda i: fails(i, OSError),
        "error, simple path": lambda i: fails(i, OSError, engine=simple),
        "interrupt": lambda i: fails(i, KeyboardInterrupt),
        "threads": threads,
    }


def held() -> dict[str, float]:
    """What the process holds; tensors are counted before garbage is collected."""
    tensors = [x for x in gc.get_objects() if type(x) is torch.Tensor]
    found = {
        "tensors": len(tensors),
        "tensor_mb": sum(x.numel() * x.element_size() for x in tensors) / 1e6,
    }
    del tensors
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {**found, "objects": len(gc.get_objects()), "rss_mb": pages * 4096 / 1e6}


def soak(seconds: float, least: int) -> dict[str, Any]:
    """Call all kinds in rounds, for so many seconds and at least so many rounds."""
    kinds = calls()
    rounds: list[dict[str, float]] = []
    start = time.monotonic()
    gc.disable()  # what only a collection frees shows as growth
    try:
        while time.monotonic() - start < seconds or len(rounds) < least:
            for call in kinds.values():
                call(len(rounds))
            rounds.append(held())
    finally:
        gc.enable()
    early, late = rounds[max(1, len(rounds) // 10)], rounds[-1]
    peak = max(rounds[len(rounds) // 10 :], key=lambda r: r["tensor_mb"])
    return {
        "calls": len(rounds) * len(kinds),
        "kinds": list(kinds),
        "rounds": len(rounds),
        "seconds": round(time.monotonic() - start, 1),
        "after a tenth": {k: round(v, 2) for k, v in early.items()},
        "at the end": {k: round(v, 2) for k, v in late.items()},
        "most tensors, mb": round(peak["tensor_mb"], 2),
        "grows": late["objects"] > early["objects"] + SLACK_OBJECTS
        or late["tensors"] > early["tensors"]
        or late["rss_mb"] > early["rss_mb"] + SLACK_MB,
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--rounds", type=int, default=10, help="at least so many (default 10)")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(arguments)
    warnings.simplefilter("ignore")  # every round has rows that are cut and refused
    found = soak(args.minutes * 60, args.rounds)
    print(json.dumps(found, indent=1))
    if args.json is not None:
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    return int(found["grows"])


if __name__ == "__main__":
    sys.exit(main())
