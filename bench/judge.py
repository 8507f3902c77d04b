"""What a judgment of two answers costs: crossfade's judge, and what users write.

    python bench/judge.py --json bench/results/judge.json

One context and 16 answers to it. A tournament has 15 matches in four rounds, each asked when the
one before is known; or all 120 pairs are asked at once. A match is read in both orders. Contenders
get texts and give probabilities, take turns, and agree before and after they are timed. Those that
read each prompt by itself are timed on some of the 120 pairs and counted up. On a CPU seconds are
those of the processor, on one thread, in which other work on the machine counts little. On a GPU
the model has the shape of Llama 3 1B and random weights, and its tokenizer has a token a word.
"""

from __future__ import annotations

import argparse
import functools
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import crossfade as cf
import decode_peers as peers
import torch
from crossfade.bench import hardware
from crossfade.policies.self_judge.template import TEMPLATES
from reports import OURS
from reports.judge import ratio, render
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

WORDS = "the river walks slowly because old stone roads matter and light falls before rain comes"
GENERATE, PLAIN = "batched `generate`, a new token", "one forward a prompt, all logits"
GOALS = {GENERATE: 2.7, PLAIN: 4.0}  # how many times as fast, in a tournament on a CPU
EVERY = 8  # of all pairs, contenders that read prompts by themselves are timed on every 8th
TOLERANCE = {"cpu": 1e-4, "cuda": 0.02}  # of probabilities

Pairs = list[tuple[int, int]]  # the places of two answers


class Task(NamedTuple):
    """A context, its answers, and which of them are compared in each round."""

    name: str
    context: str
    answers: list[str]
    rounds: list[Pairs]


class Judged(NamedTuple):
    """What a contender found and what it cost.

    Attributes:
        probs: ``[pairs, 2, 2]``: of both labels, in both orders.
        tokens: how many the model read.
    """

    probs: Tensor
    seconds: float
    tokens: int


Run = Callable[[Task], Judged]


def seconds() -> float:
    """A clock: the time of this process on a CPU, as it runs one thread; else that on the wall."""
    return time.perf_counter() if torch.cuda.is_available() else time.process_time()


def tournament(answers: int) -> list[Pairs]:
    """The rounds, where the first of two answers always wins."""
    left, rounds = [*range(answers)], []
    while len(left) > 1:
        rounds.append(list(zip(left[::2], left[1::2], strict=False)))
        left = left[::2]
    return rounds


def words_of(draw: random.Random, tokenizer: Any, tokens: int) -> str:
    """Random words of so many tokens."""
    text = draw.choice(WORDS.split())
    while len(tokenizer(text, add_special_tokens=False)["input_ids"]) < tokens:
        text += f" {draw.choice(WORDS.split())}"
    return text


def tasks_of(tokenizer: Any, answers: int, context: int, answer: int) -> list[Task]:
    draw = random.Random(0)
    question = words_of(draw, tokenizer, context)
    texts = [words_of(draw, tokenizer, answer) for _ in range(answers)]
    return [
        Task("a tournament", question, texts, tournament(answers)),
        Task("all pairs", question, texts, [[*combinations(range(answers), 2)]]),
    ]


def some_of(task: Task) -> Task:
    """Every 8th pair of a task of one round."""
    return task._replace(rounds=[task.rounds[0][::EVERY]]) if len(task.rounds) == 1 else task


def prompts_of(judge: cf.Judge, task: Task, pairs: Pairs) -> list[str]:
    a = task.answers
    return [judge.prompt(task.context, a[x], a[y]) for i, j in pairs for x, y in ((i, j), (j, i))]


def ours(judge: cf.Judge, task: Task) -> Judged:
    start, probs, tokens = seconds(), [], 0
    with judge.keeping() as reading:
        for pairs in task.rounds:
            answers = ([task.answers[p[x]] for p in pairs] for x in (0, 1))
            found = reading([task.context] * len(pairs), *answers)
            probs.append(found.orders[:, 0])
            tokens += sum(m.tokens for m in found.stats.models)
    return Judged(torch.cat(probs), seconds() - start, tokens)


@torch.inference_mode()
def generated(judge: cf.Judge, model: Any, labels: Sequence[int], batch: int, task: Task) -> Judged:
    """The scores of one new token after prompts that are padded on the left."""
    start, probs, tokens = seconds(), [], 0
    judge.tokenizer.padding_side = "left"
    for pairs in task.rounds:
        texts = prompts_of(judge, task, pairs)
        for at in range(0, len(texts), batch):
            read = judge.tokenizer(
                texts[at : at + batch], add_special_tokens=False, padding=True, return_tensors="pt"
            ).to(model.device)
            out = model.generate(
                **read, max_new_tokens=1, do_sample=False, output_scores=True,
                return_dict_in_generate=True, pad_token_id=0,
            )  # fmt: skip
            probs.append(out.scores[0].float().softmax(-1)[:, labels].cpu())
            tokens += read.input_ids.numel()
    return Judged(torch.cat(probs).view(-1, 2, 2), seconds() - start, tokens)


@torch.inference_mode()
def plain(judge: cf.Judge, model: Any, labels: Sequence[int], task: Task) -> Judged:
    start, probs, tokens = seconds(), [], 0
    for pairs in task.rounds:
        for text in prompts_of(judge, task, pairs):
            ids = judge.tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
            logits = model(ids.to(model.device)).logits
            probs.append(logits[0, -1].float().softmax(-1)[labels].cpu())
            tokens += ids.numel()
    return Judged(torch.stack(probs).view(-1, 2, 2), seconds() - start, tokens)


def check(name: str, found: Judged, expected: Judged, tolerance: float) -> None:
    off = (found.probs.double() - expected.probs.double()).abs().max()
    if not off <= tolerance:
        raise peers.Wrong(f"{name} is off by {off:.2g}")


def measure(runs: dict[str, Run], task: Task, rounds: int, tolerance: float) -> Iterator[Any]:
    """The row of each contender's figures, from rounds in which each has its turn."""
    few = task._replace(rounds=[task.rounds[0][:2]])
    truth = runs[PLAIN](few)
    for name, run in runs.items():
        check(name, run(few), truth, tolerance)
    found: dict[str, list[Judged]] = {name: [] for name in runs}
    asked = {name: task if name == OURS else some_of(task) for name in runs}
    for turn in tqdm(range(rounds), desc=task.name, file=sys.stderr):
        for name in runs if turn % 2 == 0 else reversed(runs):
            found[name].append(runs[name](asked[name]))
    pairs = [pair for each in task.rounds for pair in each]
    for name, results in found.items():
        own = [pair for each in asked[name].rounds for pair in each]
        at = [own.index(pair) for each in some_of(task).rounds for pair in each]
        for result in results:
            check(name, result._replace(probs=result.probs[at]), found[PLAIN][0], tolerance)
        more = len(pairs) / len(own)
        yield {
            "task": task.name,
            "contender": name,
            "pairs": len(pairs),
            "timed": len(own),
            "rounds_s": [round(r.seconds * more, 3) for r in results],
            "seconds": round(statistics.median(r.seconds for r in results) * more, 3),
            "tokens": round(results[0].tokens * more),
        }


def missed(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """The goals that were not reached."""
    for name, goal in GOALS.items():
        over = min(
            (r for n in names_of(rows, name) if (r := ratio(rows, "a tournament", n))), default=goal
        )
        if over < goal:
            yield f"a tournament, {name}: {over:.2f} times as fast; the goal is {goal}"


def names_of(rows: Sequence[dict[str, Any]], name: str) -> list[str]:
    return [r["contender"] for r in rows if r["contender"].startswith(name)]


def word_tokenizer(judge_words: str) -> PreTrainedTokenizerFast:
    """A token a word of these, for models whose weights are random."""
    words = ["<pad>", "<eos>", "<bos>", "<unk>", *sorted({*judge_words.split(), *WORDS.split()})]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>",
        unk_token="<unk>", model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip
    tokenizer.chat_template = (
        "{% for m in messages %}<bos> {{ m['role'] }} : {{ m['content'] }} "
        "{% if not (loop.last and continue_final_message) %}<eos> {% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<bos> assistant : {% endif %}"
    )
    return tokenizer


def model_of(device: str, quick: bool) -> tuple[Any, Any]:
    if device == "cpu" and not quick:
        return cf.models.smollm2()
    template = TEMPLATES["hh"]
    said = " ".join([template.question, template.prefix, template.system or "", *template.labels])
    tokenizer = word_tokenizer(f"{said} user assistant system : A: B: A B {template.noun}")
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    return peers.random_model(peers.TINY if quick else peers.LLAMA_1B, device, dtype), tokenizer


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    given = sys.argv[1:] if arguments is None else arguments
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a tiny random model: a smoke run")
    parser.add_argument("--json", type=Path, help="where results go")
    parser.add_argument("--answers", type=int, default=16)
    parser.add_argument("--context", type=int, default=300, help="its tokens")
    parser.add_argument("--answer", type=int, default=60, help="the tokens of each")
    parser.add_argument("--batch", type=int, nargs="+", default=[8], help="of `generate`")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args(given)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as `seconds` counts them
    try:
        return bench(args, device, " ".join(["python bench/judge.py", *given]))
    finally:
        torch.set_num_threads(threads)


def bench(args: argparse.Namespace, device: str, command: str) -> dict[str, Any]:
    model, tokenizer = model_of(device, args.quick)
    judge = cf.Judge(model, tokenizer=tokenizer)
    labels = [tokenizer(f" {x}", add_special_tokens=False)["input_ids"][-1] for x in "AB"]
    runs: dict[str, Run] = {OURS: functools.partial(ours, judge)}
    for batch in args.batch:
        runs[f"{GENERATE}, batch {batch}"] = functools.partial(
            generated, judge, model, labels, batch
        )
    runs[PLAIN] = functools.partial(plain, judge, model, labels)
    name = "SmolLM2-135M-Instruct, float32"
    if device == "cuda":
        name = "random weights of the shape of Llama 3 1B, bfloat16"
    rows: list[dict[str, Any]] = []
    report: dict[str, Any] = {
        "command": command,
        "machine": hardware(device),
        "versions": {p: metadata.version(p) for p in ("crossfade", "torch", "transformers")},
        "settings": {
            "model": "a tiny random model" if args.quick else name,
            "answers": args.answers,
            "context": args.context,
            "answer": args.answer,
            "every": EVERY,
        },
        "rows": rows,
    }
    for task in tasks_of(tokenizer, args.answers, args.context, args.answer):
        rows += measure(runs, task, args.rounds, TOLERANCE[device])
    if args.json is not None:
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    print(render(report))
    for line in missed(rows) if device == "cpu" and not args.quick else []:
        print(line, file=sys.stderr)
    return report


if __name__ == "__main__":
    main()
