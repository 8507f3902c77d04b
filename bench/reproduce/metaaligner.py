"""MetaAligner (arXiv:2403.17141) at this library's scale: SmolLM2, two cores.

    python bench/reproduce/metaaligner.py --json bench/results/metaaligner.json

The base answers the training prompts of `reviews`, and `gold` rewards the answers. From pairs of
them come the rows of `metaaligner_rows`, by the three objectives of `gold.TRAINED`; rewards closer
than a tenth of their deviation are equal. Adapters over the base are trained on samples of the rows
in the paper's three stages, each from the end of the one before it: `warm-up`, `equal`, and
`aligner`, the better answers. Two ablations leave out the first stage and the second:
`no-warm-up` and `no-equal`.

Then each aligner edits the base's first answers to the held-out prompts, toward the three
objectives together, each of them alone, each unseen one alone, and all six; the ablations, and the
base by the same prompt, toward the three and all six. Beside them stand a second answer of the
base, the best of several by the gold rewards, and emulated fine-tuning (EFT) with an adapter by DPO
of the three rewards' mean.

Every stage keeps what it made in `--work` and is skipped if it is there. One that was interrupted
goes on from its last checkpoint, or with what is missing. `--only` runs some stages, so that
several processes share the work. The settings are fixed beforehand, by the training prompts alone.
The aligner of the first seed ships: `make_guides.py --only aligner` makes it alone.

The plan, by the speed of one core in bfloat16: training and decoding 300 tokens a second, reading
1300. Pairs: 240 prompts of 8 answers, 48,000 tokens. An aligner: 768 rows of 135 tokens, 105,000
tokens for each of three seeds; an ablation 85,000, for each of them, too; DPO 36,000. Held-out: 210
prompts, 10 answers of the base and 2 of EFT, 60,000 tokens; 38 edits of 25 tokens, whose prompts
have 130: 200,000 written tokens, and 1 million are read.
"""

from __future__ import annotations

import json
import random
import statistics
import sys
from collections.abc import Sequence
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import crossfade as cf
import gold
import metaaligner_figures as figures
import peft
import reviews
import stages as kept
import torch
from crossfade import training
from crossfade.bench import hardware
from crossfade.policies.metaaligner import AlignerRows, metaaligner_rows
from datasets import Dataset
from metaaligner_figures import TOTAL
from stages import Row, Stage
from trl import DPOConfig, SFTConfig

sys.path.append(str(Path(__file__).parent.parent))
from reports.metaaligner import render

SEEDS = (0, 1, 2)
DTYPE = torch.bfloat16  # of the base's weights; adapters are float32
NEW, TEMPERATURE, ROWS = 48, 0.7, 64  # rows are decoded at a time
SAMPLES, HELD_OUT, POOL = 8, 2, 8  # answers to a prompt
MARGIN = 0.1  # of a reward's deviation: closer rewards are equal
PAIRS = 8  # of each prompt, from which rows are drawn
COUNTS = {"warm-up": 128, "equal": 128, "better": 512}  # rows of each stage
LORA = {  # 0.8 MB in bfloat16
    "r": 2,
    "lora_alpha": 32,
    "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "layers_to_transform": list(range(10, 30)),  # what is below needs no backward pass
}
RATE, BATCH = 5e-4, 8  # of each stage, whose rows are seen once
BETA, DPO_RATE = 0.1, 2e-4
EFT = (1.0, 2.0)  # how far the adapter of DPO is followed
TRAINED = ("aligner", "no-warm-up", "no-equal")
CONDITIONS: dict[str, list[str]] = {  # what is named in the prompts of edits
    "trained": [*gold.TRAINED],
    **{name: [name] for name in gold.REWARDS},
    "all": [*gold.REWARDS],
}
TOGETHER = ("trained", "all")  # of editors other than the aligners


def settings() -> Row:
    """What a reader of the tables must know, and what runs that share `--work` must share."""
    return {
        "seeds": list(SEEDS),
        "new": NEW,
        "temperature": TEMPERATURE,
        "samples": SAMPLES,
        "held_out": HELD_OUT,
        "pool": POOL,
        "prompts": [len(reviews.prompts(split)) for split in (reviews.TRAINED, reviews.HELD_OUT)],
        "trained": [*gold.TRAINED],
        "unseen": [*gold.UNSEEN],
        "margin": MARGIN,
        "pairs": PAIRS,
        "counts": COUNTS,
        "lora": LORA,
        "rate": RATE,
        "batch": BATCH,
        "beta": BETA,
        "dpo_rate": DPO_RATE,
        "eft": list(EFT),
        "conditions": CONDITIONS,
    }


# ---- training


def aligner_rows(work: Path, tokenizer: Any) -> AlignerRows:
    """All rows of the base's answers to the training prompts."""
    scores = figures.Scores(work)
    margins = {name: MARGIN * scores.deviations[name] for name in gold.TRAINED}
    return metaaligner_rows(
        kept.answers(work / "pairs"),
        tokenizer,
        [*gold.TRAINED],
        margins=margins,
        per_prompt=PAIRS,
    )


def rows(work: Path, folder: Path) -> dict[str, int]:
    """The rows that training draws from."""
    found = aligner_rows(work, kept.base(DTYPE)[1])
    lines = [json.dumps(row) for row in found]
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "counts.json").write_text(json.dumps(found.counts.rows["train"]) + "\n")
    print(found.summary(), flush=True)
    return {}


def tune(
    work: Path, folder: Path, stage: str, seed: int, start: str | None = None
) -> dict[str, int]:
    """Train a new adapter, or go on with that of another stage, on rows of one stage."""
    model, tokenizer = trained()
    read = [r for r in training.read_jsonl(work / "rows" / "rows.jsonl") if r["stage"] == stage]
    drawn = random.Random(f"{seed} {stage}").sample(read, COUNTS[stage])
    data = [{key: row[key] for key in ("prompt_ids", "completion_ids")} for row in drawn]
    torch.manual_seed(seed)
    if start is None:
        adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **LORA))
    else:
        adapted = peft.PeftModel.from_pretrained(model, work / start, is_trainable=True)
    args = SFTConfig(
        **kept.common(folder, seed),
        per_device_train_batch_size=BATCH,
        learning_rate=RATE,
        lr_scheduler_type="cosine",
        warmup_steps=0.05,
        num_train_epochs=1,
    )
    trainer = training.SFTTrainer(
        adapted, args, train_dataset=Dataset.from_list(data), processing_class=tokenizer
    )
    return kept.fit(trainer, folder)


def dpo(work: Path, folder: Path) -> dict[str, int]:
    """The adapter of EFT, by DPO of the three rewards' mean."""
    model, tokenizer = trained()
    rows = figures.Scores(work).add_totals(kept.answers(work / "pairs"))
    torch.manual_seed(SEEDS[0])
    args = DPOConfig(
        **kept.common(folder, SEEDS[0]),
        beta=BETA,
        per_device_train_batch_size=BATCH,
        learning_rate=DPO_RATE,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=0.1,
        num_train_epochs=1,
    )
    trainer = training.DPOTrainer(
        model,
        args=args,
        train_dataset=Dataset.from_list(training.rated_pairs(rows, TOTAL)),
        processing_class=tokenizer,
        peft_config=peft.LoraConfig(task_type="CAUSAL_LM", **LORA),
        loss="sigmoid",
    )
    return kept.fit(trainer, folder)


def trained() -> tuple[Any, Any]:
    """The base, to be trained, and its tokenizer."""
    model, tokenizer = kept.base(DTYPE)
    model.set_attn_implementation("eager")  # its backward pass is faster on short rows
    return model, tokenizer


# ---- answers


def write(
    work: Path,
    folder: Path,
    split: Any,
    n: int,
    seed: int,
    rewards: Any,
    eft: float | None = None,
) -> dict[str, int]:
    """Answers of the base, or of EFT, with their rewards."""
    model, tokenizer = kept.base(DTYPE)
    blend: Any = cf.Model(model, tokenizer=tokenizer, name="base")
    if eft is not None:
        wrapped = cf.models.with_adapters(model, {"dpo": work / "dpo"})
        base, guide = (
            cf.Model(wrapped, tokenizer=tokenizer, adapter=adapter, name=name)
            for name, adapter in (("base", None), ("dpo", "dpo"))
        )
        blend = cf.presets.eft(base, guide, base, eft)
    return kept.write(
        blend,
        folder,
        reviews.prompts(split),
        rewards,
        n=n,
        seed=seed,
        batch_size=ROWS,
        max_new_tokens=NEW,
        temperature=TEMPERATURE,
    )


def scale(work: Path, folder: Path) -> dict[str, int]:
    """The means and deviations of all rewards in the base's answers to the training prompts."""
    rows = kept.answers(work / "pairs")
    prompts = [row["prompt"] for row in rows for _ in row["responses"]]
    texts = [r["text"] for row in rows for r in row["responses"]]
    each = {name: fn(prompts, texts) for name, fn in gold.REWARDS.items()}
    found = {
        "means": {name: statistics.fmean(of) for name, of in each.items()},
        "deviations": {name: statistics.pstdev(of) for name, of in each.items()},
    }
    (folder / "scale.json").write_text(json.dumps(found) + "\n")
    return {}


def edit(work: Path, folder: Path, name: str) -> dict[str, int]:
    """Edits of the base's first answers by an aligner or the base, a file for each condition."""
    model, tokenizer = kept.base(torch.float32)
    if name != "base":
        model = peft.PeftModel.from_pretrained(model, work / name).merge_and_unload()
    aligner = cf.MetaAligner(cf.Model(model.to(DTYPE), tokenizer=tokenizer, name="aligner"))
    rows = kept.answers(work / "answers-base")
    queries = [row["prompt"] for row in rows]
    answers = [row["responses"][0]["text"] for row in rows]
    read = written = 0
    for condition in CONDITIONS if name.startswith("aligner") else TOGETHER:
        path = folder / f"{condition}.json"
        if not path.exists():
            edits = edited(aligner, queries, answers, CONDITIONS[condition])
            path.write_text(json.dumps(edits) + "\n")
            print(f"{name}: {condition}", flush=True)
        found = json.loads(path.read_text())
        read, written = read + sum(found["read"]), written + sum(found["written"])
    return {"read": read, "sampled": written}


def edited(
    aligner: cf.MetaAligner, queries: Sequence[Any], answers: Sequence[str], objectives: Any
) -> Row:
    """The edits, the gold rewards of each, and how many tokens each took."""
    out = cf.correct(
        aligner,
        queries,
        answers,
        objectives,
        do_sample=True,
        temperature=TEMPERATURE,
        max_new_tokens=NEW,
        max_batch=ROWS,
        seed=3,
    )
    pairs = zip(queries, answers, strict=True)
    prompts = [aligner.prompt(q, a or "-", objectives) for q, a in pairs]
    texts = [text.strip() for text in out.text]
    each = {reward: fn(queries, texts) for reward, fn in gold.REWARDS.items()}
    return {
        "texts": texts,
        "rewards": [dict(zip(each, of, strict=True)) for of in zip(*each.values(), strict=True)],
        "unchanged": out.unchanged.tolist(),
        "edit_distance": out.edit_distance.tolist(),
        "failed": int(out.failed.sum()),
        "read": [len(ids) for ids in aligner.tokenizer(prompts)["input_ids"]],
        "written": out.lengths.tolist(),
        "seconds": out.stats.seconds,
    }


# ---- the stages


def stages() -> dict[str, Stage]:
    """All stages by name, in an order in which each finds what it needs."""
    found: dict[str, Stage] = {
        "pairs": partial(write, split=reviews.TRAINED, n=SAMPLES, seed=0, rewards=gold.TRAINED),
        "rows": rows,
    }
    for seed in SEEDS:
        found |= {
            f"warm-up-{seed}": partial(tune, stage="warm-up", seed=seed),
            f"equal-{seed}": partial(tune, stage="equal", seed=seed, start=f"warm-up-{seed}"),
            f"aligner-{seed}": partial(tune, stage="better", seed=seed, start=f"equal-{seed}"),
            f"equal-alone-{seed}": partial(tune, stage="equal", seed=seed),
            f"no-warm-up-{seed}": partial(
                tune, stage="better", seed=seed, start=f"equal-alone-{seed}"
            ),
            f"no-equal-{seed}": partial(tune, stage="better", seed=seed, start=f"warm-up-{seed}"),
        }
    found["dpo"] = dpo
    held_out = partial(write, split=reviews.HELD_OUT, rewards=gold.REWARDS)
    found |= {"scale": scale, "answers-base": partial(held_out, n=HELD_OUT, seed=1)}
    editors = ["base", *(f"{name}-{seed}" for name in TRAINED for seed in SEEDS)]
    found |= {f"edits-{name}": partial(edit, name=name) for name in editors}
    found["pool"] = partial(held_out, n=POOL, seed=2)
    return found | {f"eft-{beta:g}": partial(held_out, n=1, seed=1, eft=beta) for beta in EFT}


def report(work: Path, command: str) -> Row:
    """All figures, once every stage is there."""
    groups = {name: [f"{name}-{seed}" for seed in SEEDS] for name in TRAINED}
    found = figures.Found(work, MARGIN)
    return {
        "command": command,
        "machine": hardware("cpu"),
        "versions": {p: metadata.version(p) for p in ("torch", "transformers", "trl", "peft")},
        "settings": settings(),
        "scale": found.scale,
        "rows": json.loads((work / "rows" / "counts.json").read_text()),
        "edits": found.edits({"base": ["base"], **groups}, CONDITIONS),
        "named": found.named(groups["aligner"]),
        "ablations": found.ablations(groups, {name: CONDITIONS[name] for name in TOGETHER}),
        "baselines": found.baselines(groups["aligner"], [f"eft-{beta:g}" for beta in EFT]),
        "texts": found.texts(f"aligner-{SEEDS[0]}", [*CONDITIONS]),
        "costs": kept.costs(work, list(stages())),
    }


def main(arguments: Sequence[str] | None = None) -> Row | None:
    return kept.main("metaaligner", __doc__ or "", stages(), settings(), report, render, arguments)


if __name__ == "__main__":
    main()
