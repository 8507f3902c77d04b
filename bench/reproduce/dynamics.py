"""Learning dynamics of DPO (arXiv:2403.18742) at this library's scale: SmolLM2, two cores.

    python bench/reproduce/dynamics.py --json bench/results/dynamics.json

The data are the ten behaviours of `behaviours`: statements that someone would make, or would not.
Each is asked about, and the answer is one token, yes or no. What is compared is

- `statistics`: how far the base holds the two sides of each behaviour apart, before any training;
- `dpo`: DPO of all behaviours at once, watched on held-out statements. Is the order in which they
  are learnt the order of their distinguishability?
- `head`: the last layer alone, untied, by gradient descent over states that stay as they are. Its
  weights should change by as much as Theorem 4.1 says;
- `even`: the same DPO on data that `rebalanced` has evened out. Are behaviours learnt more evenly?
- `flip`: flipped labels, learnt by the base and by what `dpo` has made of it. Which flips faster?
- `squeeze`: DPO of responses that the base did not write. Where the rejected one is unlikely
  already, what happens to the most likely token (Ren and Sutherland, arXiv:2407.10490)?

Every stage keeps what it made in `--work` and is skipped if it is there. One that was interrupted
goes on from its last checkpoint. `--only` runs some stages, so that several processes share the
work.

The settings were fixed beforehand. They are those of the paper (beta 0.01, LoRA of rank 8 and
alpha 32 on the projections of queries and values) but for the rate, 1e-3 in place of 1e-5, and the
batch, 16 in place of 32: a core has time for 448 pairs a run. The rate is the one value that was
tried: a run of 30 steps with another seed, by the accuracy on its own batches.

The plan, by the speed of one core in bfloat16: a step of 16 pairs takes 3.2 seconds, a reading of
the held-out statements 8. So a run of DPO takes 140 seconds, and there are ten; the three runs of
flipped labels take 220 each, those of squeezing 65.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Sequence
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import behaviours
import crossfade as cf
import dynamics_figures as figures
import dynamics_picture as picture
import peft
import stages as kept
import torch
from crossfade import dynamics, models, training
from crossfade.bench import hardware
from crossfade.dynamics.states import LastStates
from crossfade.training.encoding import encoded
from datasets import Dataset
from safetensors.torch import load_file, save_file
from stages import Row, Stage
from transformers import PrinterCallback
from trl import DPOConfig

sys.path.append(str(Path(__file__).parent.parent))
from reports.dynamics import render

SEEDS = (0, 1, 2, 3, 4)
DTYPE = torch.bfloat16  # of the base's weights; adapters are float32
LORA = {"r": 8, "lora_alpha": 32, "target_modules": ["q_proj", "v_proj"]}
BETA, RATE, BATCH = 0.01, 1e-3, 16
STEPS, EVERY = 28, 7
HEAD_RATES, HEAD_BATCH = (1.0, 100.0), 32  # gradient descent of the head, one epoch
FLIP_SEEDS, FLIP_STEPS, FLIP_EVERY = (0, 1, 2), 21, 7
SQUEEZE_SEEDS, SQUEEZE_STEPS, SQUEEZE_EVERY, SQUEEZE_BATCH = (0, 1, 2), 20, 5, 8
SQUEEZE_BETA, SQUEEZE_RATE = 0.1, 5e-4
KINDS = ("unlikely", "likely")  # of rejected responses: scrambled words, or the base's own answer
ASKED = "Question: What do you do about {}?\nAnswer:"
LONGEST = 12  # tokens of a response of the base


def settings() -> Row:
    """What a reader of the tables must know, and what runs that share `--work` must share."""
    return {
        "seeds": list(SEEDS),
        "lora": LORA,
        "beta": BETA,
        "rate": RATE,
        "batch": BATCH,
        "steps": STEPS,
        "every": EVERY,
        "head_rates": list(HEAD_RATES),
        "head_batch": HEAD_BATCH,
        "flip": {"seeds": list(FLIP_SEEDS), "steps": FLIP_STEPS, "every": FLIP_EVERY},
        "squeeze": {
            "seeds": list(SQUEEZE_SEEDS),
            "steps": SQUEEZE_STEPS,
            "every": SQUEEZE_EVERY,
            "batch": SQUEEZE_BATCH,
            "beta": SQUEEZE_BETA,
            "rate": SQUEEZE_RATE,
        },
        "statements": [len(behaviours.rows(held_out)) for held_out in (False, True)],
        "examples": {name: behaviours.example(name) for name in behaviours.BEHAVIOURS},
    }


# ---- statistics


def statistics(work: Path, folder: Path) -> dict[str, int]:
    """The statistics of the trained statements under the base, and the states of all of them."""
    base, tokenizer = kept.base(DTYPE)
    read = LastStates(base)
    tokens = 0
    states = {}
    for split, held_out in (("trained", False), ("held", True)):
        rows = behaviours.rows(held_out)
        ids = [tokenizer(row["text"])["input_ids"] for row in rows]
        tokens += sum(map(len, ids))
        states[split] = read(ids)
    save_file(states, folder / "states.safetensors")
    rows = behaviours.rows(False)
    stats = dynamics.statistics(base, tokenizer, rows)
    names, matrix = dynamics.priorities(stats)
    found = {
        "behaviours": [
            {
                "behaviour": name,
                "n": s.n,
                "distinguishability": s.distinguishability,
                "interval": s.interval,
                "trace": s.trace,
                "concentration": s.concentration,
                "accuracy_bound": s.accuracy_bound,
            }
            for name, s in stats.items()
        ],
        "names": names,
        "priorities": matrix.tolist(),
        "shares": dynamics.shares(stats),
        "differences": torch.stack([s.difference for s in stats.values()]).tolist(),
    }
    (folder / "statistics.json").write_text(json.dumps(found) + "\n")
    return {"read": 2 * tokens}


def head(work: Path, folder: Path) -> dict[str, int]:
    """The change of an untied head that learns one behaviour, of which nothing else is trained."""
    states = load_file(work / "statistics" / "states.safetensors")
    rows = {"trained": behaviours.rows(False), "held": behaviours.rows(True)}
    found = []
    for name in behaviours.BEHAVIOURS:
        own = {
            split: [i for i, row in enumerate(its) if row["behaviour"] == name]
            for split, its in rows.items()
        }
        x, held = (states[split][i] for split, i in own.items())
        label, held_label = (
            torch.tensor([1.0 if rows[split][i]["label"] else -1.0 for i in its]).double()
            for split, its in own.items()
        )
        for rate in HEAD_RATES:
            change, growth = figures.trained_head(x, label, held, BETA, rate, HEAD_BATCH)
            found.append(
                {
                    "behaviour": name,
                    "rate": rate,
                    "steps": -(-len(x) // HEAD_BATCH),
                    "change": change,
                    "accuracy": float(((growth * held_label) > 0).double().mean()),
                }
            )
    (folder / "head.json").write_text(json.dumps(found) + "\n")
    return {}


# ---- training


def train(
    folder: Path, rows: Sequence[Row], held: Sequence[Row], seed: int, options: Row
) -> dict[str, int]:
    """DPO of pairs of ids, watched on held-out rows."""
    base, tokenizer = kept.base(DTYPE)
    base.set_attn_implementation("eager")  # its backward pass is faster on short rows
    every = options.pop("every")
    watch = dynamics.Watch(held, every=every, tokenizer=tokenizer)
    args = DPOConfig(
        **{
            **kept.common(folder, seed),
            "lr_scheduler_type": "constant",
            "use_cpu": not torch.cuda.is_available(),
            **options,
        }
    )
    torch.manual_seed(seed)
    trainer = training.DPOTrainer(
        base,
        args=args,
        train_dataset=Dataset.from_list(list(rows)),
        processing_class=tokenizer,
        peft_config=peft.LoraConfig(task_type="CAUSAL_LM", **LORA),
        callbacks=[watch],
    )
    trainer.remove_callback(PrinterCallback)  # the watch has a hundred figures a step
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "step ")  # what a watch warns of is in its file
        found = kept.fit(trainer, folder)
    read = sum(len(tokenizer(row["text"])["input_ids"]) for row in held if "text" in row)
    read += sum(len(row[x]) for row in held if "prompt_ids" in row for x in row if x != "behaviour")
    return {**found, "read": read * len(watch.history)}


def of_statements() -> Row:
    """The arguments of DPO of statements."""
    return {
        "beta": BETA,
        "learning_rate": RATE,
        "per_device_train_batch_size": BATCH,
        "max_steps": STEPS,
        "every": EVERY,
    }


def dpo(work: Path, folder: Path, seed: int, even: bool = False) -> dict[str, int]:
    """DPO of all behaviours at once; `even`: of as many rows, evened out by their statistics."""
    base, tokenizer = kept.base(DTYPE)
    rows: Any = behaviours.rows(False)
    if even:
        rows = list(
            dynamics.rebalanced(rows, dynamics.statistics(base, tokenizer, rows), seed=seed)
        )
    pairs = dynamics.statement_pairs(rows, tokenizer)
    return train(folder, pairs, behaviours.rows(True), seed, of_statements())


def flip(work: Path, folder: Path, seed: int) -> dict[str, int]:
    """Flipped labels, learnt by the base and by what `dpo` of the same seed has made of it."""
    base, tokenizer = kept.base(DTYPE)
    aligned = models.with_adapters(kept.base(DTYPE)[0], {"aligned": work / f"dpo-{seed}"})
    for model in (base, aligned.get_base_model()):
        model.set_attn_implementation("eager")
    rows = behaviours.rows(False)
    found = dynamics.vulnerability(
        cf.Model(base, tokenizer=tokenizer),
        cf.Model(aligned, adapter="aligned"),
        rows,
        steps=FLIP_STEPS,
        every=FLIP_EVERY,
        seeds=(seed,),
        lora=LORA,
        output_dir=folder / "runs",
        progress=False,
        beta=BETA,
        learning_rate=RATE,
        per_device_train_batch_size=BATCH,
        lr_scheduler_type="constant",
    )
    found.save(folder / "flip.json")
    mean = sum(len(tokenizer(row["text"])["input_ids"]) for row in rows) / len(rows)
    return {
        "trained": round(2 * FLIP_STEPS * BATCH * 2 * (mean + 1)),
        "read": round(2 * len(found.steps) * len(found.rows) * mean),
    }


# ---- squeezing


def responses(work: Path, folder: Path) -> dict[str, int]:
    """Pairs of responses to questions: what someone would say, and a rejected one of each kind."""
    base, tokenizer = kept.base(DTYPE)
    rows = behaviours.answers(seed=0)
    prompts = [ASKED.format(row["about"]) for row in rows]
    written = cf.generate(
        cf.Model(base, tokenizer=tokenizer),
        prompts,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=LONGEST,
        seed=0,
        progress=False,
        max_batch=64,
    )
    found = []
    for i, (row, prompt) in enumerate(zip(rows, prompts, strict=True)):
        texts = {side: f" {row[side]}" for side in ("chosen", "unlikely")}
        ids = {side: encoded(prompt, x, tokenizer, False, side) for side, x in texts.items()}
        own = written.sequences[i, written.prompt_length :][: int(written.lengths[i])].tolist()
        if own[-1:] == [tokenizer.eos_token_id]:
            own.pop()
        if not own:
            continue
        likely = tokenizer.decode(own)
        found.append(
            {
                "held_out": row["held_out"],
                "prompt_ids": ids["chosen"][0],
                "chosen_ids": ids["chosen"][1],
                "unlikely_ids": ids["unlikely"][1],
                "likely_ids": own,
                "texts": {"prompt": prompt, **texts, "likely": likely},
            }
        )
    lines = (json.dumps(row) + "\n" for row in found)
    (folder / kept.ANSWERS).write_text("".join(lines), encoding="utf-8")
    return {"sampled": sum(len(row["likely_ids"]) for row in found)}


def squeeze(work: Path, folder: Path, kind: str, seed: int) -> dict[str, int]:
    """DPO of responses that the base did not write, against rejected ones of a kind."""
    every = [
        {
            "behaviour": kind,
            "held_out": row["held_out"],
            "prompt_ids": row["prompt_ids"],
            "chosen_ids": row["chosen_ids"],
            "rejected_ids": row[f"{kind}_ids"],
        }
        for row in kept.answers(work / "responses")
    ]
    parts: dict[bool, list[Row]] = {False: [], True: []}
    for row in every:
        parts[row.pop("held_out")].append(row)
    options = {
        "beta": SQUEEZE_BETA,
        "learning_rate": SQUEEZE_RATE,
        "per_device_train_batch_size": SQUEEZE_BATCH,
        "max_steps": SQUEEZE_STEPS,
        "every": SQUEEZE_EVERY,
    }
    return train(folder, parts[False], parts[True], seed, options)


# ---- the stages


def stages() -> dict[str, Stage]:
    """All stages by name, in an order in which each finds what it needs."""
    found: dict[str, Stage] = {"statistics": statistics, "head": head}
    found |= {f"dpo-{seed}": partial(dpo, seed=seed) for seed in SEEDS}
    found |= {f"flip-{seed}": partial(flip, seed=seed) for seed in FLIP_SEEDS}
    found["responses"] = responses
    for seed in SQUEEZE_SEEDS:
        found |= {f"squeeze-{k}-{seed}": partial(squeeze, kind=k, seed=seed) for k in KINDS}
    found |= {f"even-{seed}": partial(dpo, seed=seed, even=True) for seed in SEEDS}
    return found


def report(work: Path, command: str) -> Row:
    """All figures, once every stage is there."""
    told = json.loads((work / "statistics" / "statistics.json").read_text())
    plain, even = (
        [figures.history(work / f"{kind}-{seed}") for seed in SEEDS] for kind in ("dpo", "even")
    )
    flips = dynamics.Vulnerability.joined(
        [dynamics.Vulnerability.load(work / f"flip-{s}" / "flip.json") for s in FLIP_SEEDS]
    )
    squeezed = {
        kind: [figures.history(work / f"squeeze-{kind}-{seed}") for seed in SQUEEZE_SEEDS]
        for kind in KINDS
    }
    found = {
        "command": command,
        "machine": hardware("cpu"),
        "versions": {p: metadata.version(p) for p in ("torch", "transformers", "trl", "peft")},
        "settings": settings(),
        "statistics": {k: told[k] for k in ("behaviours", "names", "priorities", "shares")},
        "learning": figures.learning(told, plain),
        "pairs": figures.pairs(told, plain),
        "head": figures.head(told, json.loads((work / "head" / "head.json").read_text()), BETA),
        "even": figures.evenness(told, plain, even),
        "flip": figures.flips(flips),
        "squeeze": figures.squeezing(squeezed, kept.answers(work / "responses")),
        "costs": kept.costs(work, list(stages())),
    }
    picture.plot(
        told, found, plain, flips, Path(__file__).parent.parent / "results" / "dynamics.png"
    )
    return found


def main(arguments: Sequence[str] | None = None) -> Row | None:
    return kept.main("dynamics", __doc__ or "", stages(), settings(), report, render, arguments)


if __name__ == "__main__":
    main()
