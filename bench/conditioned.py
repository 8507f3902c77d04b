"""What a token of a conditioned policy costs, beside other ways to the same weights of rewards.

    python bench/conditioned.py --json bench/results/conditioned.json

A policy of two rewards (the guides that come with crossfade) decodes a batch of requests: at one
mix, at another mix for each request, and merged into a plain model; beside it DeRa with two models
of their own, which needs two forwards a token, and the requests of each mix in turns. Contenders
take turns and write as many tokens. What is said of rows is checked first: each request gets the
tokens that it gets alone, and forwards are counted. On a CPU seconds are those of the processor, on
one thread, in which other work on the machine counts little.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import crossfade as cf
import decode_peers as peers
import torch
from crossfade.bench import hardware
from crossfade.policies.conditioned import DecodedPolicy
from peft import LoraConfig, get_peft_model
from reports.conditioned import DERA, EACH, GOALS, MERGED, ONE, TURNS, ratio, render
from tqdm import tqdm

REWARDS = ("kind", "brief")
KL = 0.3


class Run(NamedTuple):
    """What a contender wrote, and what it cost.

    Attributes:
        forwards: of all models, to read the prompts and to write.
    """

    tokens: list[list[int]]
    forwards: int
    seconds: float


def policy_of(base: Any, quick: bool) -> cf.ConditionedPolicy:
    if not quick:
        guides = dict(zip(REWARDS, map(cf.models.guide, ("sentiment", "brevity")), strict=True))
        return cf.ConditionedPolicy.from_adapters(base, guides)
    with tempfile.TemporaryDirectory() as folder:
        for seed, name in enumerate(REWARDS):
            config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
            torch.manual_seed(seed)
            alone = get_peft_model(
                peers.random_model(peers.TINY, "cpu", torch.float32), config, name
            )
            alone.save_pretrained(folder)
        folders = {name: Path(folder, name) for name in REWARDS}
        return cf.ConditionedPolicy.from_adapters(base, folders)


def contenders(
    policy: cf.ConditionedPolicy, batch: int, tokens: int, vocabulary: int
) -> dict[str, Callable[[], Run]]:
    """What decodes the batch, by name."""
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(5, vocabulary, (batch, 32), generator=generator).tolist()
    shares = [0.5] if batch == 1 else [i / (batch - 1) for i in range(batch)]
    half = dict.fromkeys(REWARDS, 0.5)
    mixes = {"kind": torch.tensor(shares), "brief": torch.tensor([1 - x for x in shares])}
    aligned, plain = policy.merged(half), policy.merged(half, kl=KL)

    def run(blend: Any, requests: Sequence[Any] = prompts) -> Run:
        start = seconds()
        out = cf.generate(blend, requests, max_new_tokens=tokens)
        took = seconds() - start
        if out.stats.notes:
            raise peers.Wrong(f"{out.stats.notes}")
        return Run(out.responses, sum(m.forwards for m in out.stats.models), took)

    def turns() -> Run:
        each = [
            run(policy.at({"kind": x, "brief": 1 - x}, kl=KL), [prompt])
            for x, prompt in zip(shares, prompts, strict=True)
        ]
        written = [r.tokens[0] for r in each]
        return Run(written, sum(r.forwards for r in each), sum(r.seconds for r in each))

    found: dict[str, Callable[[], Run]] = {
        ONE: lambda: run(policy.at(half, kl=KL)),
        MERGED: lambda: run(plain),
        DERA: lambda: run(DecodedPolicy(policy.base, {"both": aligned}).at({"both": 1}, kl=KL)),
    }
    if batch > 1:
        found |= {EACH: lambda: run(policy.at(mixes, kl=KL)), TURNS: turns}
    return found


def seconds() -> float:
    """A clock: the time of this process on a CPU, as it runs one thread; else that on the wall."""
    return time.perf_counter() if torch.cuda.is_available() else time.process_time()


def check(runs: dict[str, Run], batch: int, tokens: int) -> None:
    """Require what the figures are said to be of."""
    if runs[ONE].tokens != runs[MERGED].tokens:
        raise peers.Wrong("a mix is not the model that is merged of it")
    if batch > 1 and runs[EACH].tokens != runs[TURNS].tokens:
        raise peers.Wrong("a request beside others is not what it is alone")
    single = 1 + tokens  # the prompts together, then one a token
    expected = {ONE: 1, MERGED: 1, DERA: 2, EACH: 1, TURNS: batch}
    for name, run in runs.items():
        if run.forwards != expected[name] * single:
            raise peers.Wrong(f"{name} took {run.forwards} forwards")


def measure(
    policy: cf.ConditionedPolicy, batch: int, tokens: int, rounds: int, vocabulary: int
) -> Iterator[dict[str, Any]]:
    """The row of each contender's figures, from rounds in which each has its turn."""
    ways = contenders(policy, batch, tokens, vocabulary)
    first = {name: way() for name, way in ways.items()}  # untimed: models are tried out
    check(first, batch, tokens)
    found: dict[str, list[Run]] = {name: [] for name in ways}
    for turn in tqdm(range(rounds), desc=f"batch {batch}", file=sys.stderr):
        for name in ways if turn % 2 == 0 else reversed(ways):
            found[name].append(ways[name]())
    for name, runs in found.items():
        yield {
            "batch": batch,
            "contender": name,
            "forwards": runs[0].forwards,
            "rounds_s": [round(r.seconds, 4) for r in runs],
            "seconds": round(statistics.median(r.seconds for r in runs), 4),
        }


def missed(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """The goals that were not reached."""
    for (name, over), (least, most) in GOALS.items():
        for batch in {r["batch"] for r in rows}:
            found = ratio(rows, batch, name, over)
            if found is not None and not least <= found <= most:
                yield f"batch {batch}: {name} takes {found:.2f} times the time of {over}"


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    given = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a tiny random model: a smoke run")
    parser.add_argument("--json", type=Path, help="where results go")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--tokens", type=int, default=24, help="new ones of each request")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args(given)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as `seconds` counts them
    try:
        return bench(args, " ".join(["python bench/conditioned.py", *given]))
    finally:
        torch.set_num_threads(threads)


def bench(args: argparse.Namespace, command: str) -> dict[str, Any]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.quick:
        base = peers.random_model(peers.TINY, device, torch.float32)
    else:
        base = cf.models.smollm2()[0].to(device)
    base.generation_config.eos_token_id = None  # all requests then write as many tokens
    policy = policy_of(base, args.quick)
    vocabulary = base.config.vocab_size
    rows: list[dict[str, Any]] = []
    for batch in args.batch:
        rows += measure(policy, batch, args.tokens, args.rounds, vocabulary)
    report = {
        "command": command,
        "machine": hardware(device),
        "versions": {p: metadata.version(p) for p in ("torch", "transformers", "peft")},
        "settings": {
            "model": "a tiny random model" if args.quick else "SmolLM2-135M-Instruct, float32",
            "tokens": args.tokens,
        },
        "rows": rows,
    }
    if args.json is not None:
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    print(render(report))
    for line in missed(rows) if device == "cpu" and not args.quick else []:
        print(line, file=sys.stderr)
    return report


if __name__ == "__main__":
    main()
