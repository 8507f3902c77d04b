"""What serving costs: requests with guidance of their own, over HTTP, beside one call for all.

    export OMP_NUM_THREADS=2 OMP_PROC_BIND=true
    python bench/serving.py --json bench/results/serving.json

Each request has its own weights of two LoRA guides over SmolLM2, its own seed, and a text of the
same length. They arrive at random (a Poisson process) at several rates, and all at once. Beside
that: `crossfade.generate` with the same list, and two servers that decode one request at a time: a
recipe of three forwards a token, without HTTP, and ours with `max_batch=1`. Server and clients
share a process, so that what the clients take is counted too.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import itertools
import json
import random
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import crossfade as cf
import decode_peers as peers
import httpx
import torch
from crossfade.bench import hardware
from crossfade.serve import Background
from reports.serving import render
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

FORMULA = "base + w * (kind - base) + v * (short - base)"
GUIDES = {"kind": "sentiment", "short": "brevity"}
PROMPT = 24  # tokens
RATES = (0.5, 0.9, 1.5)  # times what a call of all at once decodes
SEED = 7


@dataclass
class Asked:
    """A request: what it is, and when it comes."""

    ids: list[int]
    weights: dict[str, float]
    seed: int
    at: float = 0.0


@dataclass
class Got:
    """What a client saw of its request: when it sent it, and when each token came."""

    sent: float
    tokens: list[float] = field(default_factory=list)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a tiny random model: a smoke run")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--requests", type=int, help="(64; 6 if quick)")
    parser.add_argument("--new-tokens", type=int, help="of each text (48; 6 if quick)")
    parser.add_argument("--alone", type=int, help="requests decoded one at a time (6; 2 if quick)")
    parser.add_argument(
        "--rounds", type=int, help="turns of what comes all at once (3; 1 if quick)"
    )
    given = list(sys.argv[1:] if arguments is None else arguments)
    args = parser.parse_args(given)
    args.requests = args.requests or (6 if args.quick else 64)
    args.new_tokens = args.new_tokens or (6 if args.quick else 48)
    args.alone = args.alone or (2 if args.quick else 6)
    args.rounds = args.rounds or (1 if args.quick else 3)

    terms, model, vocabulary = load(args.quick)
    asked = requests(args.requests, vocabulary)
    report = {
        "command": " ".join(["python bench/serving.py", *given]),
        "machine": hardware("cpu"),
        "versions": {p: metadata.version(p) for p in ("crossfade", "torch", "fastapi", "uvicorn")},
        "settings": {
            "requests": len(asked), "new_tokens": args.new_tokens, "prompt": PROMPT,
            "alone": args.alone, **peers.SAMPLING,
        },
        **measure(terms, model, asked, args),
    }  # fmt: skip
    print(render(report))
    if args.json is not None:
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    return report


def load(quick: bool) -> tuple[dict[str, Any], Any, int]:
    """The terms by name, the model that has the guides, and how many tokens it knows."""
    if quick:
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=512, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=256,
        )  # fmt: skip
        each = [LlamaForCausalLM(config).eval() for _ in ("base", *GUIDES)]
        words = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer(WordLevel({f"w{i}": i for i in range(512)}, unk_token="w0"))
        )
        pairs = zip(("base", *GUIDES), each, strict=True)
        return {n: cf.Model(m, tokenizer=words, name=n) for n, m in pairs}, each, 512
    model, tokenizer = cf.models.smollm2()
    guides = {name: cf.models.guide(guide) for name, guide in GUIDES.items()}
    model = cf.models.with_adapters(model, guides)
    terms = {
        name: cf.Model(model, tokenizer=tokenizer, adapter=adapter, name=name)
        for name, adapter in (("base", None), *((n, n) for n in GUIDES))
    }
    return terms, model, len(tokenizer)


def requests(count: int, vocabulary: int) -> list[Asked]:
    pick = random.Random(SEED)
    return [
        Asked(
            [pick.randrange(20, vocabulary - 20) for _ in range(PROMPT)],
            {"w": round(pick.uniform(0.2, 1.2), 2), "v": round(pick.uniform(0.2, 1.2), 2)},
            i,
        )
        for i in range(count)
    ]


def measure(
    terms: dict[str, Any], model: Any, asked: Sequence[Asked], args: argparse.Namespace
) -> dict[str, Any]:
    new = args.new_tokens
    faders = {"w": 0.0, "v": 0.0}
    with (
        cf.Session(terms, blend=FORMULA, weights=faders, max_batch=len(asked)) as session,
        Background(session) as server,
    ):
        at_once(server.url, asked[:2], 4)
        at_once(server.url, asked, 4)  # Steps of that many rows are recorded.
        calls, served = [], []
        for _ in tqdm(range(args.rounds), desc="all at once", file=sys.stderr):
            calls.append(new * len(asked) / call_of_all(terms, asked, new))
            got, seconds = at_once(server.url, asked, new)
            served.append(sum(len(g.tokens) for g in got) / seconds)
        rate = statistics.median(calls) / new  # requests a second
        found = {}
        for times in RATES:
            pick = random.Random(SEED)
            gaps = [pick.expovariate(times * rate) for _ in asked]
            ats = list(itertools.accumulate(gaps))
            coming = [Asked(a.ids, a.weights, a.seed, t) for a, t in zip(asked, ats, strict=True)]
            got, seconds = at_once(server.url, coming, new)
            found[str(times)] = {
                "requests_per_s": round(times * rate, 3),
                **latencies(got, seconds),
            }
        got, seconds = at_once(server.url, asked, new)
        found["all at once"] = latencies(got, seconds)
        stats = session.stats()
    few = asked[: args.alone]
    gc.collect()
    with (
        cf.Session(terms, blend=FORMULA, weights=faders, max_batch=1) as session,
        Background(session) as server,
    ):
        at_once(server.url, few[:1], 4)
        got, seconds = at_once(server.url, few, new)
        alone = sum(len(g.tokens) for g in got) / seconds
    recipe = recipe_of(terms, model)
    recipe_seconds = [
        seconds_of_recipe(recipe, a, new) for a in tqdm(few, "recipe", file=sys.stderr)
    ]
    return {
        "generate": [round(x, 2) for x in calls],
        "served": [round(x, 2) for x in served],
        "one at a time": round(alone, 2),
        "recipe": [round(new / s, 2) for s in recipe_seconds],
        "rates": found,
        "notes": list(stats.notes),
    }


# ---- Contenders ----------------------------------------------------------------------------------


def call_of_all(terms: dict[str, Any], asked: Sequence[Asked], new: int) -> float:
    """Seconds of one call with the whole list."""
    faders = {n: torch.tensor([a.weights[n] for a in asked]) for n in ("w", "v")}
    blend = cf.parse(FORMULA, **terms, **faders)
    start = time.perf_counter()
    cf.generate(
        blend, [a.ids for a in asked], seed=[a.seed for a in asked], max_new_tokens=new,
        do_sample=True, eos_token_id=[0], max_batch=len(asked), **peers.SAMPLING,
    )  # fmt: skip
    return time.perf_counter() - start


def recipe_of(terms: dict[str, Any], model: Any) -> peers.Recipe:
    """Three forwards a token, as users write them."""
    if isinstance(model, list):
        return peers.three_forwards(model)
    return peers.switched_adapters(terms["base"].model, list(GUIDES))


def seconds_of_recipe(recipe: peers.Recipe, asked: Asked, new: int) -> float:
    w, v = asked.weights["w"], asked.weights["v"]
    recipe.weights = (1 - w - v, w, v)
    start = time.perf_counter()
    recipe(torch.tensor([asked.ids]), new, True)
    return time.perf_counter() - start


def at_once(url: str, asked: Sequence[Asked], new: int) -> tuple[list[Got], float]:
    """Let clients send each request at its time, and give what they saw and the seconds it took."""
    return asyncio.run(_at_once(url, asked, new))


async def _at_once(url: str, asked: Sequence[Asked], new: int) -> tuple[list[Got], float]:
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as client:
        start = time.perf_counter()
        got = await asyncio.gather(*(_ask(client, a, new, start) for a in asked))
        return list(got), time.perf_counter() - start


async def _ask(client: httpx.AsyncClient, asked: Asked, new: int, start: float) -> Got:
    await asyncio.sleep(max(0.0, start + asked.at - time.perf_counter()))
    body = {
        "model": "crossfade", "prompt": asked.ids, "weights": asked.weights, "seed": asked.seed,
        "max_tokens": new, "stream": True, "logprobs": 0, **peers.SAMPLING,
    }  # fmt: skip
    got = Got(time.perf_counter())
    async with client.stream("POST", "/v1/completions", json=body) as response:
        if response.status_code != 200:
            raise RuntimeError((await response.aread()).decode())
        async for line in response.aiter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            chunk = json.loads(line.removeprefix("data: "))
            if "error" in chunk:
                raise RuntimeError(line)
            for choice in chunk["choices"]:
                new_tokens = (choice.get("logprobs") or {}).get("tokens", [])
                got.tokens += [time.perf_counter()] * len(new_tokens)
    return got


def latencies(got: Sequence[Got], seconds: float) -> dict[str, Any]:
    """Milliseconds to the first token, and from one to the next."""
    first = [1e3 * (g.tokens[0] - g.sent) for g in got]
    between = [1e3 * (b - a) for g in got for a, b in itertools.pairwise(g.tokens)]
    return {
        "tokens_per_s": round(sum(len(g.tokens) for g in got) / seconds, 2),
        "first_ms": [round(x, 1) for x in _quantiles(first)],
        "between_ms": [round(x, 1) for x in _quantiles(between)],
    }


def _quantiles(values: Sequence[float]) -> tuple[float, float]:
    """The median and the 95th percentile."""
    found = torch.tensor(values).quantile(torch.tensor([0.5, 0.95]))
    return float(found[0]), float(found[1])


if __name__ == "__main__":
    main()
