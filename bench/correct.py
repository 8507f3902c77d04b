"""What correcting answers costs: crossfade's `correct`, and what users write.

    python bench/correct.py --json bench/results/correct.json

16 queries with an answer each and sets of one to three objectives, in one call. The official way
takes one after the other: tokenizer, `model.generate`, decode. A careful user pads a batch on the
left. All decode greedily and take turns; that they write the same is checked on two queries before
they are timed, and on all after. On a CPU seconds are those of the processor, on one thread, in
which other work on the machine counts little. On a GPU the model has the shape of Llama 3 1B and
random weights, and its tokenizer has a token a word.
"""

from __future__ import annotations

import argparse
import functools
import json
import random
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import crossfade as cf
import decode_peers as peers
import torch
from crossfade.bench import hardware
from crossfade.policies.metaaligner import OBJECTIVES
from judge import seconds, word_tokenizer, words_of
from reports import OURS
from reports.correct import ratio, render
from tqdm import tqdm

LOOP, PADDED = "the official loop, one at a time", "batched `generate`, padded on the left"
GOALS = {LOOP: 4.0}  # how many times as fast, on a CPU
SETS: list[Any] = [
    ["brevity"],
    ["harmlessness", "helpfulness"],
    {"formality": "The response should sound like a letter"},
    ["humour", "positivity", {"rhyme": "The response should rhyme"}],
]
# Two tokens may change places where they are as likely as this, in nats.
TOLERANCE = {"cpu": 1e-3, "cuda": 0.2}


class Task(NamedTuple):
    """Queries with an answer and objectives each, and how many tokens a correction may have."""

    queries: list[str]
    answers: list[str]
    objectives: list[Any]
    new: int


class Written(NamedTuple):
    """What a contender wrote, EOS left out, and what it took."""

    tokens: list[list[int]]
    texts: list[str]
    seconds: float


Run = Callable[[Task], Written]


def task_of(tokenizer: Any, batch: int, query: int, answer: tuple[int, int], new: int) -> Task:
    draw = random.Random(0)
    return Task(
        [words_of(draw, tokenizer, query) for _ in range(batch)],
        [words_of(draw, tokenizer, draw.randint(*answer)) for _ in range(batch)],
        [SETS[i % len(SETS)] for i in range(batch)],
        new,
    )


def prompts_of(aligner: cf.MetaAligner, task: Task) -> list[str]:
    return [aligner.prompt(*each) for each in zip(*task[:3], strict=True)]


def stripped(ids: Sequence[int], ends: Sequence[int]) -> list[int]:
    """Tokens up to the first that ends a text."""
    return next((list(ids[:i]) for i, x in enumerate(ids) if x in ends), list(ids))


def ends_of(model: Any) -> list[int]:
    ends = model.generation_config.eos_token_id
    return [] if ends is None else [ends] if isinstance(ends, int) else [*ends]


def ours(aligner: cf.MetaAligner, model: Any, task: Task) -> Written:
    start = seconds()
    out = cf.correct(
        aligner, *task[:3], max_new_tokens=task.new, do_sample=False, max_batch=len(task.queries),
        progress=False,
    )  # fmt: skip
    took = seconds() - start
    texts = aligner.tokenizer.batch_decode(out.responses, skip_special_tokens=True)
    return Written([stripped(r, ends_of(model)) for r in out.responses], texts, took)


def generated(aligner: cf.MetaAligner, model: Any, batch: int, task: Task) -> Written:
    """`generate` on so many prompts at a time; one alone has no padding."""
    start, tokens, texts = seconds(), [], []
    tokenizer = aligner.tokenizer
    tokenizer.padding_side = "left"
    prompts = prompts_of(aligner, task)
    for at in range(0, len(prompts), batch):
        read = tokenizer(prompts[at : at + batch], padding=batch > 1, return_tensors="pt")
        read = read.to(model.device)
        out = model.generate(
            **read, max_new_tokens=task.new, do_sample=False, pad_token_id=tokenizer.pad_token_id
        )
        new = out[:, read.input_ids.shape[1] :]
        texts += tokenizer.batch_decode(new, skip_special_tokens=True)
        tokens += new.tolist()
    took = seconds() - start
    return Written([stripped(row, ends_of(model)) for row in tokens], texts, took)


def equal(
    name: str, aligner: cf.MetaAligner, task: Task, found: Written, truth: Written, tolerance: float
) -> int:
    """How many texts are those of the loop. Others may leave it at two tokens that are as likely.

    Raises:
        Wrong: one leaves it elsewhere; names the contender.
    """
    same = 0
    prompts = prompts_of(aligner, task)
    for i, (one, other) in enumerate(zip(truth.tokens, found.tokens, strict=True)):
        if truth.texts[i] == found.texts[i]:
            same += 1
            continue
        n = next((k for k, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), None)
        if n is None:
            raise peers.Wrong(f"{name} ends text {i} after {len(other)} tokens, not {len(one)}")
        ids = aligner.tokenizer(prompts[i])["input_ids"]
        both = [one[: n + 1], other[: n + 1]]
        a, b = cf.score(aligner.blend, [ids] * 2, both).logprobs[:, n].tolist()
        if not abs(a - b) <= tolerance:
            raise peers.Wrong(f"{name} leaves text {i} at token {n}, by {a - b:.2g} nats")
    return same


def measure(
    aligner: cf.MetaAligner, task: Task, runs: dict[str, Run], rounds: int, tolerance: float
) -> Iterator[dict[str, Any]]:
    """The row of each contender's figures, from rounds in which each has its turn."""
    few = Task(task.queries[:2], task.answers[:2], task.objectives[:2], task.new)
    truth = runs[LOOP](few)
    for name, run in runs.items():
        equal(name, aligner, few, run(few), truth, tolerance)
    found: dict[str, list[Written]] = {name: [] for name in runs}
    for turn in tqdm(range(rounds), file=sys.stderr):
        for name in runs if turn % 2 == 0 else reversed(runs):
            found[name].append(runs[name](task))
    truth = found[LOOP][0]
    for name, each in found.items():
        yield {
            "contender": name,
            "corrections": len(task.queries),
            "equal": min(equal(name, aligner, task, w, truth, tolerance) for w in each),
            "tokens": sum(map(len, each[0].tokens)),
            "rounds_s": [round(w.seconds, 3) for w in each],
            "seconds": round(statistics.median(w.seconds for w in each), 3),
        }


def missed(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """The goals that were not reached."""
    for name, goal in GOALS.items():
        if ratio(rows, name) < goal:
            yield f"{name}: {ratio(rows, name):.2f} times as fast; the goal is {goal}"


def model_of(device: str, quick: bool) -> tuple[Any, Any]:
    if device == "cpu" and not quick:
        return cf.models.smollm2()
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    model = peers.random_model(peers.TINY if quick else peers.LLAMA_1B, device, dtype)
    words = " ".join([*OBJECTIVES.values(), "user assistant system | Context: Answer: Edit:"])
    lacking = model.config.vocab_size - len(word_tokenizer(words))  # no model writes those
    return model, word_tokenizer(" ".join([words, *(f"word{i}" for i in range(lacking))]))


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    given = sys.argv[1:] if arguments is None else arguments
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a tiny random model: a smoke run")
    parser.add_argument("--json", type=Path, help="where results go")
    parser.add_argument("--batch", type=int, default=16, help="how many answers are corrected")
    parser.add_argument("--query", type=int, default=24, help="the tokens of each")
    parser.add_argument("--answer", type=int, nargs=2, default=[20, 80], help="least and most")
    parser.add_argument("--new-tokens", type=int, default=64, help="of a correction, at most")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args(given)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as `seconds` counts them
    try:
        return bench(args, device, " ".join(["python bench/correct.py", *given]))
    finally:
        torch.set_num_threads(threads)


def bench(args: argparse.Namespace, device: str, command: str) -> dict[str, Any]:
    model, tokenizer = model_of(device, args.quick)
    aligner = cf.MetaAligner(model, tokenizer=tokenizer)
    runs: dict[str, Run] = {
        OURS: functools.partial(ours, aligner, model),
        PADDED: functools.partial(generated, aligner, model, args.batch),
        LOOP: functools.partial(generated, aligner, model, 1),
    }
    task = task_of(tokenizer, args.batch, args.query, tuple(args.answer), args.new_tokens)
    lengths = [len(tokenizer(p)["input_ids"]) for p in prompts_of(aligner, task)]
    name = "SmolLM2-135M-Instruct, float32"
    if device == "cuda":
        name = "random weights of the shape of Llama 3 1B, bfloat16"
    rows = list(measure(aligner, task, runs, args.rounds, TOLERANCE[device]))
    report: dict[str, Any] = {
        "command": command,
        "machine": hardware(device),
        "versions": {p: metadata.version(p) for p in ("crossfade", "torch", "transformers")},
        "settings": {
            "model": "a tiny random model" if args.quick else name,
            "prompts": [min(lengths), max(lengths)],
            "new_tokens": args.new_tokens,
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
