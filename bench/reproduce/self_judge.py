"""SELF-JUDGE (arXiv:2402.11253) at this library's scale: SmolLM2, two cores.

    python bench/reproduce/self_judge.py --json bench/results/self_judge.json

The annotator is the gold rewards of `opinions`; an opinion is better if their standardised mean is
larger. The base answers the training prompts of `reviews`, and the annotator compares its answers,
by each reward and by their mean. From these pairs:

- `sft`: the base, fine-tuned on the best answer to each prompt;
- `jsft`: the base, fine-tuned on the same answers and on judgments of all pairs, in both orders;
- `dpo`: an adapter over `jsft`, by DPO of the pairs of the mean;
- `self`: an adapter over `jsft`, by as many steps of DPO of its own pairs, which `jsft` judges;
- self-rejection: of the answers of `self`, and of `jsft`, which has not learned from its own
  judgments, the winner of a tournament that `jsft` judges.

Then the held-out prompts: how well the judge agrees with the annotator before and after its
training, and the gold rewards of what every policy writes. The tournaments of 2, 4, 8 and 16 of a
pool are one: without a shuffle the winner of its first two answers plays the winner of the next
two, and so on.

Every stage keeps what it made in `--work` and is skipped if it is there. One that was interrupted
goes on from its last checkpoint, or with the prompts that are missing. `--only` runs some stages,
so that several processes share the work. The settings are fixed beforehand, by the training
prompts alone.

The plan, by the speed of one core in bfloat16: decoding 300 tokens a second, training 300, reading
1300. Pairs: 240 prompts of 8 answers, 48,000 tokens. `jsft`: 1200 pairs in both orders, 370,000
tokens of training. `dpo`, `self`: 240 pairs, 36,000 tokens of training for each of three seeds, and
480 judgments. Held-out: two answers of each of eleven models to 210 prompts, 16 answers for the
tournament, 120,000 tokens of training's length; judgments of 210 pairs by five questions, twice,
and of 15 matches a prompt: 1.5 million tokens are read.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import crossfade as cf
import opinions
import peft
import reviews
import self_judge_figures as figures
import stages as kept
import torch
from crossfade import training
from crossfade.bench import hardware
from crossfade.decoding.search.bracket import Bracket
from crossfade.decoding.search.tournament import judged
from crossfade.policies.self_judge import JudgeTemplate, jsft_rows
from datasets import Dataset
from self_judge_figures import TOTAL, add_total, annotated
from stages import Row, Stage, answers
from trl import DPOConfig, SFTConfig

sys.path.append(str(Path(__file__).parent.parent))
from reports.self_judge import render

SEEDS = (0, 1, 2)
DTYPE = torch.bfloat16  # of the base's weights; adapters are float32
NEW, TEMPERATURE, ROWS = 48, 0.7, 64  # rows are decoded at a time
SAMPLES, HELD_OUT, POOL = 8, 2, 16  # answers to a prompt
POOLS = ("jsft", f"self-{SEEDS[0]}")  # the policies whose answers tournaments reject
LORA = {
    "r": 16,
    "lora_alpha": 32,
    "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "layers_to_transform": list(range(10, 30)),  # what is below needs no backward pass
}
SFT_RATE, JUDGE_WEIGHT, JSFT_BATCH = 5e-4, 4.0, 16
BETA, RATE, EPOCHS, BATCH = 0.1, 2e-4, 1, 8  # of preferences, and the batch of `sft`
PHRASES = {
    "sentiment": "positive",
    "brevity": "brief",
    "readability": "easy to read",
    "plainness": "plainly worded",
}
TEMPLATE = JudgeTemplate(
    system="You are a judge who compares two answers.",
    question="Which answer is more {principle}?",
    principle="positive, brief, plain, and easy to read",
    principles=PHRASES,
    prefix="The answer that is more {principle} is Answer",
    noun="Answer",
)
QUESTIONS: dict[str, str | None] = {**{name: name for name in PHRASES}, TOTAL: None}


def settings() -> dict[str, Any]:
    """What a reader of the tables must know, and what runs that share `--work` must share."""
    return {
        "seeds": list(SEEDS),
        "new": NEW,
        "temperature": TEMPERATURE,
        "samples": SAMPLES,
        "held_out": HELD_OUT,
        "pool": POOL,
        "pools": list(POOLS),
        "prompts": [len(reviews.prompts(split)) for split in (reviews.TRAINED, reviews.HELD_OUT)],
        "lora": LORA,
        "sft_rate": SFT_RATE,
        "judge_weight": JUDGE_WEIGHT,
        "jsft_batch": JSFT_BATCH,
        "beta": BETA,
        "rate": RATE,
        "epochs": EPOCHS,
        "batch": BATCH,
        "questions": {q: PHRASES.get(q, TEMPLATE.principle) for q in QUESTIONS},
    }


# ---- what stages have made, and models


def policy(work: Path, *adapters: str) -> tuple[Any, Any]:
    """The base with some adapters, in the order in which they were trained, and its tokenizer."""
    model, tokenizer = cf.models.smollm2()
    for name in adapters:
        model = peft.PeftModel.from_pretrained(model, work / name).merge_and_unload()
    return model.to(DTYPE), tokenizer


def parts(name: str) -> tuple[str, ...]:
    """The adapters of a policy."""
    if name == "base":
        return ()
    return ("jsft", name) if name.startswith(("dpo", "self")) else (name,)


class Judge:
    """A frozen judge of one question, and how many tokens it has read."""

    def __init__(self, model: Any, tokenizer: Any, question: str = TOTAL) -> None:
        principle = QUESTIONS[question]
        self.judge = cf.Judge(
            cf.Model(model, tokenizer=tokenizer, name="judge"),
            template=TEMPLATE,
            principles=None if principle is None else [principle],
            max_batch=ROWS,
        )
        self.tokens = 0

    def __call__(self, contexts: Any, firsts: Any, seconds: Any) -> Any:
        found = self.judge(contexts, firsts, seconds)
        self.tokens += sum(model.tokens for model in found.stats.models)
        return found

    def prefer(self, contexts: Any, firsts: Any, seconds: Any) -> Any:
        return self(contexts, firsts, seconds).preference


# ---- training


def trained(work: Path, *adapters: str) -> tuple[Any, Any, peft.LoraConfig]:
    """A model to train, with its tokenizer and a new adapter's settings."""
    model, tokenizer = policy(work, *adapters)
    model.set_attn_implementation("eager")  # its backward pass is faster on short rows
    return model, tokenizer, peft.LoraConfig(task_type="CAUSAL_LM", **LORA)


def best_answers(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [
        {"prompt_ids": pair["prompt_ids"], "completion_ids": pair["chosen_ids"]}
        for pair in training.rated_pairs(rows, TOTAL)
    ]


def sft(work: Path, folder: Path, seed: int) -> dict[str, int]:
    rows, _ = annotated(work)
    model, tokenizer, lora = trained(work)
    args = SFTConfig(
        **kept.common(folder, seed),
        per_device_train_batch_size=BATCH,
        learning_rate=SFT_RATE,
        lr_scheduler_type="cosine",
        warmup_steps=0.03,
        num_train_epochs=EPOCHS,
    )
    data = Dataset.from_list(best_answers(rows))
    torch.manual_seed(seed)
    trainer = training.SFTTrainer(
        model, args, train_dataset=data, processing_class=tokenizer, peft_config=lora
    )
    return kept.fit(trainer, folder)


def jsft(work: Path, folder: Path) -> dict[str, int]:
    rows, _ = annotated(work)
    model, tokenizer, lora = trained(work)
    pairs = [
        {**pair, "principle": principle}
        for seed, (question, principle) in enumerate(QUESTIONS.items())
        for pair in training.rated_pairs(rows, question, seed=seed)
    ]
    data = jsft_rows(pairs, tokenizer, TEMPLATE, sft=best_answers(rows))
    args = SFTConfig(
        **kept.common(folder, SEEDS[0]),
        per_device_train_batch_size=JSFT_BATCH,
        learning_rate=SFT_RATE,
        lr_scheduler_type="cosine",
        warmup_steps=0.03,
        num_train_epochs=1,
    )
    torch.manual_seed(SEEDS[0])
    trainer = training.JSFTTrainer(
        model,
        args,
        train_dataset=Dataset.from_list(data),
        processing_class=tokenizer,
        peft_config=lora,
        judge_weight=JUDGE_WEIGHT,
    )
    return kept.fit(trainer, folder)


def of_preferences(folder: Path, seed: int) -> dict[str, Any]:
    return {
        **kept.common(folder, seed),
        "beta": BETA,
        "per_device_train_batch_size": BATCH,
        "learning_rate": RATE,
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": 0.1,
        "num_train_epochs": EPOCHS,
    }


def dpo(work: Path, folder: Path, seed: int) -> dict[str, int]:
    rows, _ = annotated(work)
    model, tokenizer, lora = trained(work, "jsft")
    data = Dataset.from_list(training.rated_pairs(rows, TOTAL))
    torch.manual_seed(seed)
    trainer = training.DPOTrainer(
        model,
        args=DPOConfig(**of_preferences(folder, seed)),
        train_dataset=data,
        processing_class=tokenizer,
        peft_config=lora,
        loss="sigmoid",
    )
    return kept.fit(trainer, folder)


def self_judged(work: Path, folder: Path, seed: int) -> dict[str, int]:
    model, tokenizer, lora = trained(work, "jsft")
    judge = Judge(*policy(work, "jsft"))
    args = training.SelfJudgeConfig(
        **of_preferences(folder, seed), temperature=TEMPERATURE, top_p=1.0, max_new_tokens=NEW
    )
    data = Dataset.from_list([{"prompt": p} for p in reviews.prompts(reviews.TRAINED)])
    torch.manual_seed(seed)
    trainer = training.SelfJudgeTrainer(
        model,
        args=args,
        judge=judge,
        train_dataset=data,
        processing_class=tokenizer,
        peft_config=lora,
    )
    found = kept.fit(trainer, folder)
    lengths = [
        log["samples/length"] for log in trainer.state.log_history if "samples/length" in log
    ]
    sampled = statistics.fmean(lengths) * 2 * len(data) * EPOCHS
    return {**found, "sampled": round(sampled), "judged": judge.tokens}


# ---- answers and judgments


def write(work: Path, folder: Path, name: str, split: Any, n: int, seed: int) -> dict[str, int]:
    """Answers of a policy, with their rewards."""
    model, tokenizer = policy(work, *parts(name))
    return kept.write(
        cf.Model(model, tokenizer=tokenizer, name=name.replace("-", "_")),
        folder,
        reviews.prompts(split),
        opinions.REWARDS,
        n=n,
        seed=seed,
        batch_size=ROWS,
        max_new_tokens=NEW,
        temperature=TEMPERATURE,
    )


def held_out_pairs(work: Path, question: str) -> list[tuple[Any, str, str, float]]:
    """The base's first two answers to each held-out prompt, and by how much the annotator finds the
    first one better. Pairs of equal ones are left out."""
    _, annotator = annotated(work)
    rows, found = answers(work / "answers-base"), []
    add_total(rows, annotator)
    for row in rows:
        a, b = row["responses"][:2]
        gap = a["rewards"][question] - b["rewards"][question]
        if gap and a["text"].strip() and b["text"].strip():
            found.append((row["prompt"], a["text"], b["text"], gap))
    return found


def judge_pairs(work: Path, folder: Path, name: str) -> dict[str, int]:
    """Judgments of the held-out pairs by each question, a file each."""
    model, tokenizer = policy(work, *parts(name))
    tokens = 0
    for question in QUESTIONS:
        path = folder / f"{question}.json"
        if not path.exists():
            contexts, firsts, seconds, gaps = zip(*held_out_pairs(work, question), strict=True)
            judge = Judge(model, tokenizer, question)
            said = judge(contexts, firsts, seconds)
            kept = {
                "gaps": gaps,
                "preferences": said.preference.tolist(),
                "position_bias": said.position_bias,
                "toward_first": said.toward_first,
                "tokens": judge.tokens,
            }
            path.write_text(json.dumps(kept) + "\n")
        tokens += json.loads(path.read_text())["tokens"]
    return {"judged": tokens}


def tournament(work: Path, folder: Path, pool: str) -> dict[str, int]:
    """The tournament of each prompt of a pool: a line has its matches, and the winner of the first
    1, 2, 4, 8 and 16 answers."""
    path, each = folder / "brackets.jsonl", 14
    have = len(path.read_text().splitlines()) if path.exists() else 0
    rows = answers(work / pool)
    judge = Judge(*policy(work, "jsft"))
    for start in range(have, len(rows), each):
        some = rows[start : start + each]
        before = judge.tokens
        contexts = [row["prompt"] for row in some for _ in row["responses"]]
        texts = [r["text"] for row in some for r in row["responses"]]
        n = len(some[0]["responses"])
        brackets = [Bracket(range(n)) for _ in some]
        winners = [[0] for _ in some]
        referee = judged(judge, contexts, texts, [False] * len(texts))
        while not brackets[0].over:
            pairs = [(g * n + a, g * n + b) for g, br in enumerate(brackets) for a, b in br.pairs]
            probs = iter(referee.probs(pairs))
            for bracket, won in zip(brackets, winners, strict=True):
                bracket.play([next(probs) for _ in bracket.pairs])
                won.append(bracket.left[0])
        tokens = round((judge.tokens - before) / len(some))
        with path.open("a") as file:
            for bracket, won in zip(brackets, winners, strict=True):
                matches = [[(m.a, m.b, m.prob) for m in played] for played in bracket.rounds]
                file.write(json.dumps({"winners": won, "rounds": matches, "tokens": tokens}) + "\n")
        print(f"{folder.name}: {start + len(some)} of {len(rows)} prompts", flush=True)
    return {"judged": sum(b["tokens"] for b in training.read_jsonl(path))}


# ---- the stages


def stages() -> dict[str, Stage]:
    """All stages by name, in an order in which each finds what it needs."""
    found: dict[str, Stage] = {
        "pairs": partial(write, name="base", split=reviews.TRAINED, n=SAMPLES, seed=0),
        "jsft": jsft,
    }
    for kind, make in (("sft", sft), ("dpo", dpo), ("self", self_judged)):
        found |= {f"{kind}-{seed}": partial(make, seed=seed) for seed in SEEDS}
    policies = ["base", *[name for name in found if name != "pairs"]]
    held_out = partial(write, split=reviews.HELD_OUT)
    found |= {f"answers-{p}": partial(held_out, name=p, n=HELD_OUT, seed=1) for p in policies}
    found |= {f"judge-{p}": partial(judge_pairs, name=p) for p in ("base", "jsft")}
    for p in POOLS:
        found[f"pool-{p}"] = partial(held_out, name=p, n=POOL, seed=2)
        found[f"tournament-{p}"] = partial(tournament, pool=f"pool-{p}")
    return found


def report(work: Path, command: str) -> dict[str, Any]:
    """All figures, once every stage is there."""
    groups = {"base": ["base"], "jsft": ["jsft"]}
    groups |= {kind: [f"{kind}-{seed}" for seed in SEEDS] for kind in ("sft", "dpo", "self")}
    _, annotator = annotated(work)
    return {
        "command": command,
        "machine": hardware("cpu"),
        "versions": {p: metadata.version(p) for p in ("torch", "transformers", "trl", "peft")},
        "settings": settings(),
        "scale": {"means": annotator.means, "deviations": annotator.deviations},
        "judges": [
            {"judge": name, "question": q, **figures.judge(work / f"judge-{name}", q)}
            for name in ("base", "jsft")
            for q in QUESTIONS
        ],
        "policies": figures.policies(work, groups),
        "differences": figures.differences(work, groups),
        "rejection": {p: figures.rejection(work, p) for p in POOLS},
        "matches": {p: figures.matches(work, p) for p in POOLS},
        "costs": kept.costs(work, list(stages())),
    }


def main(arguments: Sequence[str] | None = None) -> Row | None:
    return kept.main("self_judge", __doc__ or "", stages(), settings(), report, render, arguments)


if __name__ == "__main__":
    main()
