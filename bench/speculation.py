"""What drafts are worth: plain decoding, crossfade with a draft, and Hugging Face with its own.

    python bench/speculation.py --json bench/results/speculation.json    # 40 minutes

The tasks, on SmolLM2 in float32:

- `edits`: a model's answers in which one to three sentences were replaced by those of other texts;
  the model writes its own answer again, drafted from that. The model is SmolLM2, or the blend
  ``base + 0.8 (sentiment - base)`` of it and an adapter;
- `quotes`: a passage is to be copied, greedily, by one model; guesses are looked up in the prompt;
- `free text`: open questions, sampled from the blend, with the same look-up, which finds little;
- `separate models`: ``base + 0.8 (sentiment - base) + 0.4 (brevity - base)`` as three models, of
  which the second one drafts.

Plain decoding and the draft take turns; each round has prompts of its own. That both write the same
tokens is checked in each round: near ties in float32 are told, by how far the log-probs of the
two tokens are apart. Of ratios there is the median, and an interval that covers it with 95 %, from
their order. The separate models are also set beside what `crossfade.drafts.speedup` says of the
measured times and acceptance. Hugging Face decodes the quotes with `prompt_lookup_num_tokens` and
with `assistant_model`, the first layers of the model, greedily too.

On a GPU models have the shape of Llama 3 1B and random weights, texts are token ids, and edits are
spans of other ids.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import math
import random
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import crossfade as cf
import decode_peers as peers
import torch
from crossfade import drafts, models
from crossfade.bench import hardware
from reports import OURS
from reports.speculation import (
    EDITS,
    EDITS_BLEND,
    FIXED,
    FREE,
    HF_ASSISTANT,
    HF_LOOKUP,
    HF_PLAIN,
    PLAIN,
    QUOTES,
    SEPARATE,
    render,
)
from tqdm import tqdm

TASKS = [EDITS, EDITS_BLEND, QUOTES, FREE, SEPARATE, FIXED]
GOALS = {EDITS: 2.5, QUOTES: 1.5, FREE: 0.97}  # at batch 1
NEAR = 1e-3  # nats: tokens as likely as that may change places
ROUNDS, BATCHES = 9, (1, 4, 16)
NEW, EDITED = 96, 192  # tokens of a row, and of an answer that is edited
GAMMA = 4  # guesses at a time of the separate models, where the formula is compared
SUBJECTS = (
    *("a heist film", "a silent comedy", "the rain", "a new bicycle", "fresh bread", "the moon"),
    *("a long train ride", "old maps", "a garden in winter", "chess", "honey", "the sea at night"),
    *("a crowded market", "a violin", "the first snow", "a lighthouse", "wild horses", "tea"),
)
PASSAGES = (
    "The lighthouse at Cape Morrow was built in 1847 by Scottish engineers. Its lamp burned whale "
    "oil until 1889, when electric light replaced it. Two families of keepers lived there.",
    "On Monday the council met in the old library. Mayor Ellen Grant opened the session at nine. "
    "Members discussed the new bridge, its cost of 4.2 million, and the closing of Mill Road.",
    "Honey bees dance to tell others where flowers are. The angle of the dance shows the direction "
    "of the sun. The length of the dance shows how far the flowers are from the hive.",
    "The train to Norwich leaves platform three at 10:45. It stops at Ely, Thetford and Diss. "
    "Passengers with bicycles must reserve a place before they board the train.",
    "Clay is dug in spring, dried through summer, and fired in autumn. The kiln is heated slowly "
    "for two days. Potters in the valley have worked this way for over three hundred years.",
)


Settings = dict[str, Any]
GREEDY: Settings = {"do_sample": False}
SAMPLED: Settings = {"do_sample": True, "temperature": 0.7, "top_p": 0.9}


class Task(NamedTuple):
    """What is decoded in a round, and what drafts it, given what plain decoding wrote."""

    blend: Any
    inputs: Any
    settings: Settings
    new: int
    draft: Callable[[cf.Output], cf.Draft]


def timed(run: Callable[..., Any], *arguments: Any) -> tuple[float, Any]:
    start = time.perf_counter()
    found = run(*arguments)
    return time.perf_counter() - start, found


def interval(ratios: Sequence[float]) -> tuple[float, float]:
    """Covers the median with at least 95 %, from 6 values on: of 9, the second to the eighth.

    How many values lie below the median is binomial, with the chance of one half.
    """
    ordered, n = sorted(ratios), len(ratios)
    chances = [math.comb(n, i) / 2**n for i in range(n)]
    outside = [k for k in range(n // 2) if 2 * sum(chances[: k + 1]) <= 0.05]
    at = max(outside, default=0)
    return ordered[at], ordered[n - 1 - at]


def check(name: str, plain: cf.Output, drafted: cf.Output) -> int:
    """How many rows are the same. Others leave plain decoding at a near tie: what both computed
    until then is alike.

    Raises:
        Wrong: it is not.
    """
    same = 0
    width = min(plain.sequences.shape[1], drafted.sequences.shape[1])
    for i, (a, b) in enumerate(zip(plain.sequences, drafted.sequences, strict=True)):
        apart = (a[:width] != b[:width]).nonzero()
        same += len(apart) == 0
        end = int(apart[0]) - plain.prompt_length if len(apart) else width - plain.prompt_length
        off = (plain.logprobs[i, :end] - drafted.logprobs[i, :end]).abs()
        if end > 0 and float(off.max()) > NEAR:
            raise peers.Wrong(f"{name}: row {i} is off by {float(off.max()):.2g} nats")
    return same


# ---- The tasks -----------------------------------------------------------------------------------


def chats(texts: Sequence[str]) -> list[Any]:
    return [[{"role": "user", "content": text}] for text in texts]


SHORT = ("Write a short review of", "Tell me about", "Write a few sentences about")
LONG = ("Write a long essay about", "Write a long and detailed description of")


def questions(kinds: Sequence[str], round_: int, batch: int) -> list[Any]:
    draw = random.Random(f"{round_} {batch}")
    return chats([f"{draw.choice(kinds)} {draw.choice(SUBJECTS)}." for _ in range(batch)])


def copies(round_: int, batch: int) -> list[Any]:
    each = [PASSAGES[(round_ + i) % len(PASSAGES)] for i in range(batch)]
    return chats([f"Repeat this text word for word.\n\n{text}" for text in each])


def edited(texts: Sequence[str], others: Sequence[str], draw: random.Random) -> list[str]:
    """Answers with one to three sentences of other answers in the place of their own."""
    pool = [s for text in others for s in sentences(text)] or ["It was a day like any other. "]
    found = []
    for text in texts:
        parts = sentences(text)
        for i in draw.sample(range(len(parts)), min(len(parts), draw.randint(1, 3))):
            parts[i] = draw.choice(pool)
        found.append("".join(parts))
    return found


def respanned(ids: Sequence[int], draw: random.Random) -> list[int]:
    """One to three spans of a dozen tokens replaced by other ones."""
    found = list(ids)
    for _ in range(draw.randint(1, 3)):
        at = draw.randrange(max(1, len(found) - 12))
        found[at : at + 12] = [draw.randrange(20, 20_000) for _ in range(12)]
    return found


def sentences(text: str) -> list[str]:
    return re.findall(r"[^.!?]+[.!?]*\s*", text)


# ---- The contest ---------------------------------------------------------------------------------


class Contest:
    """Models, and the tasks that are decoded with them."""

    def __init__(self, device: str, quick: bool) -> None:
        self.new, self.edited = (12, 12) if quick else (NEW, EDITED)
        made = small() if quick else real() if device == "cpu" else random_(device)
        self.one, self.tokenizer, adapted, separate = made
        self.assistant = cut(self.one, 1 if quick else 8)
        base, kind = (
            cf.Model(adapted, tokenizer=self.tokenizer, adapter=a, name=n)
            for a, n in ((None, "base"), ("sentiment", "sentiment"))
        )
        self.blend = base + 0.8 * (kind - base)
        names = ("base", "sentiment", "brevity")
        self.models = [
            cf.Model(m, tokenizer=self.tokenizer, name=n)
            for m, n in zip(separate, names, strict=True)
        ]

    def task(self, name: str, round_: int, batch: int) -> Task:
        """A round of a task: each has prompts and seeds of its own."""
        asked, sampled = self.asked(SHORT, round_, batch), SAMPLED | {"seed": round_}
        one = cf.Model(self.one, tokenizer=self.tokenizer)
        if name in (EDITS, EDITS_BLEND):
            edits, asked = functools.partial(self._edits, round_), self.asked(LONG, round_, batch)
            blend = one if name == EDITS else self.blend
            return Task(blend, asked, sampled, self.edited, edits)
        if name in (QUOTES, FREE):
            prompt = cf.Draft("prompt")
            if name == QUOTES:
                return Task(one, copies(round_, batch), GREEDY, self.new, lambda _: prompt)
            return Task(self.blend, asked, sampled, self.new, lambda _: prompt)
        base, kind, short = self.models
        blend = base + 0.8 * (kind - base) + 0.4 * (short - base)
        draft = cf.Draft(kind, length="auto" if name == SEPARATE else GAMMA)
        return Task(blend, asked, sampled, self.new, lambda _: draft)

    def asked(self, kinds: Sequence[str], round_: int, batch: int) -> list[Any]:
        if self.tokenizer is not None:
            return questions(kinds, round_, batch)
        draw = random.Random(f"{round_} {batch}")
        return [[draw.randrange(20, 20_000) for _ in range(24)] for _ in range(batch)]

    def _edits(self, round_: int, out: cf.Output) -> cf.Draft:
        draw = random.Random(round_)
        if self.tokenizer is None:
            return cf.Draft(texts=[respanned(ids.tolist(), draw) for ids in out.responses])
        texts = out.text or []
        others = [text for text in texts[1:] if text] + list(PASSAGES)
        return cf.Draft(texts=edited(texts, others, draw))


def real() -> tuple[Any, Any, Any, list[Any]]:
    """SmolLM2, its tokenizer, the same with its guides as adapters, and three separate models."""
    one, tokenizer = models.smollm2()
    adapted = models.with_adapters(
        models.smollm2()[0], {name: models.guide(name) for name in ("sentiment", "brevity")}
    )
    separate = [models.smollm2()[0]]
    for name in ("sentiment", "brevity"):
        guided = models.with_adapters(models.smollm2()[0], {name: models.guide(name)})
        separate.append(guided.merge_and_unload())
    return one, tokenizer, adapted, separate


def small() -> tuple[Any, Any, Any, list[Any]]:
    """The same of tiny random models."""
    sys.path.append(str(Path(__file__).parent.parent / "tests"))
    from tiny_models import lora, make, make_tokenizer

    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    adapted = lora(2, lora(1, make("llama"), "sentiment"), "brevity")
    return make("llama"), tokenizer, adapted, [make("llama", seed=i) for i in range(3)]


def random_(device: str) -> tuple[Any, None, Any, list[Any]]:
    """Models of the shape of Llama 3 1B, in float32, in which tokens are the same to the last."""
    one, other, *separate = (
        peers.random_model(peers.LLAMA_1B, device, torch.float32, seed) for seed in range(5)
    )
    adapted = peers.adapted(other, 16)
    return one, None, adapted, separate


def cut(model: Any, layers: int) -> Any:
    """The first layers of a model, under its head."""
    shallow = copy.deepcopy(model)
    shallow.model.layers = shallow.model.layers[:layers]
    shallow.config.num_hidden_layers = layers
    return shallow


def ours(task: Task, draft: cf.Draft | None) -> cf.Output:
    settings: Settings = {"max_new_tokens": task.new, "progress": False, **task.settings}
    return cf.generate(task.blend, task.inputs, draft=draft, **settings)


def hugging_face(contest: Contest, task: Task, **options: Any) -> Any:
    """`model.generate`, one prompt at a time where it has a draft, as it must."""
    tokenizer, model = contest.tokenizer, contest.one
    texts = [tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
             for chat in task.inputs]  # fmt: skip
    found = []
    for text in texts:
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)
        found.append(model.generate(**ids, max_new_tokens=task.new, do_sample=False, **options))
    return found


def measure(contest: Contest, name: str, batch: int, rounds: int) -> list[dict[str, Any]]:
    """The row of the task, and on single-model work those of Hugging Face."""
    runs: dict[str, Callable[[Task], Any]] = {}
    if name == QUOTES and batch == 1:
        run = functools.partial(hugging_face, contest)
        runs = {
            HF_PLAIN: run,
            HF_LOOKUP: functools.partial(run, prompt_lookup_num_tokens=10),
            HF_ASSISTANT: functools.partial(run, assistant_model=contest.assistant),
        }
    seconds: dict[str, list[float]] = {n: [] for n in (PLAIN, OURS, *runs)}
    same = rows = 0
    outputs, by_formula = [], []
    for i in tqdm(range(rounds + 1), desc=f"{name}, batch {batch}", file=sys.stderr):
        task = contest.task(name, i, batch)
        took, plain = timed(ours, task, None)
        taken = {OURS: timed(ours, task, task.draft(plain))}
        taken |= {n: timed(run, task) for n, run in runs.items()}
        same_now = check(name, plain, taken[OURS][1])
        if i == 0:  # The first round prepares, and is not counted.
            continue
        same, rows = same + same_now, rows + batch
        outputs.append(taken[OURS][1])
        if name == FIXED:
            first, _ = timed(ours, task._replace(new=1), None)
            by_formula.append(predicted(taken[OURS][1], first, took))
        seconds[PLAIN].append(took)
        for n, (s, _) in taken.items():
            seconds[n].append(s)
    found = []
    for n, taken_s in seconds.items():
        ratios = [a / b for a, b in zip(seconds[PLAIN], taken_s, strict=True)]
        row: dict[str, Any] = {
            "task": name,
            "batch": batch,
            "contender": n,
            "seconds": round(statistics.median(taken_s), 4),
            "ratio": round(statistics.median(ratios), 3),
            "interval": [round(x, 3) for x in interval(ratios)],
            "rounds": len(ratios),
        }
        if n == OURS:
            row |= {"same": same, "rows": rows, **drafted(outputs)}
            if by_formula:
                row["predicted"] = round(statistics.median(by_formula), 3)
        found.append(row)
    return found


def drafted(outputs: Sequence[cf.Output]) -> dict[str, Any]:
    """What the draft did, over all rounds."""
    stats = [out.stats for out in outputs]
    guessed, right = sum(s.guessed for s in stats), sum(s.right for s in stats)
    rounds, tokens = sum(s.rounds for s in stats), sum(s.tokens for s in stats)
    acceptance = right / guessed if guessed else 0.0
    return {
        "acceptance": round(acceptance, 3),
        "share": round(right / tokens, 3),
        "guesses a round": round(guessed / rounds, 2) if rounds else 0.0,
    }


def predicted(out: cf.Output, first: float, plain: float) -> float:
    """How many times as fast as plain decoding `GAMMA` guesses a round are by the formula.

    Args:
        first: seconds of a plain call for one token, most of which is reading the prompts.
        plain: seconds of the plain call.
    """
    step = (plain - first) / max(int(out.lengths.max()) - 1, 1)
    check_ = out.stats.step_seconds.get(GAMMA + 1, math.nan) / step
    rate = drafts.speedup(out.stats.acceptance, GAMMA, check_, out.stats.guess_seconds / step)
    return plain / (first + (plain - first) / rate)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny random models: a smoke run")
    parser.add_argument("--json", type=Path, help="where results go; rows in it are kept")
    parser.add_argument("--only", nargs="+", choices=TASKS, default=TASKS, help="tasks")
    parser.add_argument("--batch", nargs="+", type=int, default=list(BATCHES))
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    args = parser.parse_args(arguments)
    given = sys.argv[1:] if arguments is None else arguments
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = "SmolLM2-135M" if device == "cpu" else "random weights of the shape of Llama 3 1B"
    report: dict[str, Any] = {
        "command": " ".join(["python bench/speculation.py", *given]),
        "machine": hardware(device),
        "versions": {p: metadata.version(p) for p in ("crossfade", "torch", "transformers")},
        "settings": {
            "model": "tiny random models" if args.quick else f"{model}, float32",
            "new": NEW,
            "edited": EDITED,
        },
        "rows": [],
    }
    if args.json is not None and args.json.exists():
        kept = json.loads(args.json.read_text())
        if any(kept[key] != report[key] for key in ("machine", "versions", "settings")):
            parser.error(f"{args.json} is of another machine or version; remove it to begin anew")
        report = kept
    done = {(row["task"], row["batch"]) for row in report["rows"]}
    contest = Contest(device, args.quick)
    for batch in args.batch:
        for name in args.only:
            if (name, batch) in done:
                continue
            report["rows"] += measure(contest, name, batch, args.rounds)
            if args.json is not None:
                args.json.write_text(json.dumps(report, indent=1) + "\n")
    for line in missed(report["rows"]):
        print(line, file=sys.stderr)
    print(render(report))
    return report


def missed(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """The goals that were not reached at batch 1."""
    for row in rows:
        goal = GOALS.get(row["task"], 0.0)
        if row["contender"] == OURS and row["batch"] == 1 and row["ratio"] < goal:
            yield f"{row['task']}: {row['ratio']:.2f} times plain decoding; the goal is {goal}"


if __name__ == "__main__":
    main()
