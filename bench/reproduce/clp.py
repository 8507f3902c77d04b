"""Conditioned language policies (arXiv:2407.15762) at this library's scale: SmolLM2, two cores.

    python bench/reproduce/clp.py --json bench/results/clp.json

The task is that of `reviews`, opinions of movies in a sentence. Policies are trained by
`CLPTrainer` in the paper's three settings: two rewards with one KL weight, one reward with many KL
weights, and three rewards with one KL weight. In each stand beside each other

* full-, attention- and head-scoped conditioning (the paper's full-, attn- and logit-CLP), of which
  the latter two have a part that all weights share, over the layers that are not conditioned;
* of two rewards, a model that is told the weights in its system prompt, trained by the same steps;
* experts, each trained on one reward alone, whose deltas are averaged (rewarded soups) or whose
  log-probs are (MOD); with the reference also scaled down (an expert between itself and the base)
  and blended token by token (DeRa).

Every run has the same steps, responses and rates, so that the experts of a soup together have seen
as many times the responses of a conditioned policy as there are rewards. The fronts are of held-out
prompts, by `cf.pareto.sweep`.

Every stage keeps what it made in `--work` and is skipped if it is there. One that was interrupted
goes on from its last checkpoint, or with the texts that are missing. `--only` runs some stages, so
that several processes share the work. The settings were fixed beforehand, by the training prompts
alone.

The plan, by the speed of one core in bfloat16: a step of 8 prompts with 4 responses each takes 13
seconds, of which half is sampling; 25 runs. A point of a front: 42 texts of 25 tokens, at 150
tokens a second.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import clp_figures as figures
import crossfade as cf
import opinions
import peft
import reviews
import stages as kept
import torch
from crossfade import models, pareto, training
from crossfade.bench import hardware
from crossfade.policies.conditioned import DecodedPolicy, PromptedPolicy
from stages import Row, Stage

sys.path.append(str(Path(__file__).parent.parent))
from reports.clp import render

SEEDS = (0, 1, 2)
DTYPE = torch.bfloat16  # of the base's weights; adapters are float32
NEW = 48
STEPS, PROMPTS, RESPONSES = 20, 8, 4
RATE, CONCENTRATION = 1e-3, 1.0
KL, KL_RANGE = 0.05, (0.0, 0.5)
LAYERS = list(range(15, 30))  # what is below needs no backward pass
LORA = {"r": 4, "lora_alpha": 32}
HELD_OUT = {"two": 42, "kl": 42, "three": 21, "base": 42}  # prompts of a front; fewer for time
ROWS = 64  # decoded at a time
REWARDS: dict[str, Callable[[Sequence[Any], Sequence[str]], list[float]]] = {
    **reviews.REWARDS,
    "readability": opinions.readability,
}
TWO, THREE = list(reviews.REWARDS), list(REWARDS)
SCOPES = ("full", "attention", "head")
GRID = {"two": 6, "three": 3}  # of weightings, as `sweep` takes it; fewer for time
KL_WEIGHTS = (0.0, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0)
# Where hypervolumes begin: a text of 40 words, without praise; and beyond the divergence of any.
REFERENCE = {"sentiment": -1.0, "brevity": -1.0, "readability": 0.0, "kl": -40.0}


def settings() -> Row:
    """What a reader of the tables must know, and what runs that share `--work` must share."""
    return {
        "seeds": list(SEEDS),
        "new": NEW,
        "steps": STEPS,
        "prompts": PROMPTS,
        "responses": RESPONSES,
        "rate": RATE,
        "concentration": CONCENTRATION,
        "kl": KL,
        "kl_range": list(KL_RANGE),
        "layers": LAYERS,
        "lora": LORA,
        "held_out": HELD_OUT,
        "grid": GRID,
        "kl_weights": list(KL_WEIGHTS),
        "reference": REFERENCE,
        "rewards": THREE,
    }


# ---- training


def lora(scope: str) -> peft.LoraConfig:
    """The adapter of a scope; the head is in no layer."""
    layers = None if scope == "head" else LAYERS
    return peft.LoraConfig(task_type="CAUSAL_LM", layers_to_transform=layers, **LORA)


def train(
    work: Path, folder: Path, rewards: list[str], scope: str, seed: int, kl: Any = KL
) -> dict[str, int]:
    """Train a policy of some rewards; `scope` is "prompt" for one that is told the weights."""
    base, tokenizer = kept.base(DTYPE)
    base.set_attn_implementation("eager")  # its backward pass is faster on short rows
    torch.manual_seed(seed)
    policy: Any
    if scope == "prompt":
        policy = PromptedPolicy.create(base, rewards, lora("full"), tokenizer)
    else:
        shared = None if scope == "full" else lora("full")
        policy = cf.ConditionedPolicy.create(
            base, rewards, lora(scope), scope=scope, shared=shared, tokenizer=tokenizer
        )
    shape = {
        "max_steps": STEPS,
        "per_device_train_batch_size": PROMPTS,
        "num_generations": RESPONSES,
        "max_new_tokens": NEW,
        "max_length": None,
        "learning_rate": RATE,
        "lr_scheduler_type": "cosine",
        "concentration": CONCENTRATION,
        "kl": kl,
        "save_steps": 4,
        "logging_steps": 1,
        "use_cpu": not torch.cuda.is_available(),
    }
    trainer = training.CLPTrainer(
        policy,
        training.CLPConfig(**{**kept.common(folder, seed), **shape}),
        {name: REWARDS[name] for name in rewards},
        train_dataset=[{"prompt": chat} for chat in reviews.prompts(reviews.TRAINED)],
    )
    kept.fit(trainer, folder)
    parameters = sum(p.numel() for p in policy.model.parameters() if p.requires_grad)
    (folder / "parameters.json").write_text(json.dumps(parameters) + "\n")
    lengths = [log.get("samples/length", 0.0) for log in trainer.state.log_history]
    tokens = round(sum(lengths) * PROMPTS * RESPONSES)
    return {"sampled": tokens, "trained": tokens}


# ---- fronts


def front(
    folder: Path,
    name: str,
    methods: dict[str, Callable[[dict[str, float]], Any]],
    rewards: Sequence[str],
    weights: Any,
    base: Any,
) -> dict[str, int]:
    """The front of some methods on held-out prompts."""
    found = pareto.sweep(
        methods,
        reviews.prompts(reviews.HELD_OUT)[: HELD_OUT[name]],
        {reward: REWARDS[reward] for reward in rewards},
        weights=weights,
        path=folder / "texts.jsonl",
        kl_to=base,
        do_sample=True,
        max_new_tokens=NEW,
        max_batch=ROWS,
        progress=False,
    )
    if found.interrupted:
        raise KeyboardInterrupt
    found.save(folder / "front.json")
    rows = training.read_jsonl(folder / "texts.jsonl")
    written = sum(len(ids) for row in rows for ids in row.get("ids") or [])
    return {"sampled": written}


def loaded(work: Path, name: str, base: Any, tokenizer: Any) -> cf.ConditionedPolicy:
    return cf.ConditionedPolicy.load(work / name, base, tokenizer=tokenizer)


def soup_of(
    work: Path, rewards: Sequence[str], seed: int, base: Any, tokenizer: Any
) -> cf.ConditionedPolicy:
    """The experts of some rewards, to be averaged."""
    folders = {reward: work / f"expert-{reward}-{seed}" / reward for reward in rewards}
    return cf.ConditionedPolicy.from_adapters(base, folders, tokenizer=tokenizer)


def of_rewards(work: Path, folder: Path, setting: str, rewards: list[str], seed: int) -> Any:
    """The front of two or three rewards, all methods at the KL weight that they were trained at."""
    base, tokenizer = kept.base(DTYPE)
    methods: dict[str, Callable[[dict[str, float]], Any]] = {}
    for scope in SCOPES:
        policy = loaded(work, f"{setting}-{scope}-{seed}", base, tokenizer)
        methods[scope] = partial(policy.at, kl=KL)
    soup = soup_of(work, rewards, seed, base, tokenizer)
    methods["soup"] = partial(soup.at, kl=KL)
    experts = {reward: soup.at({reward: 1.0}, kl=KL) for reward in rewards}
    methods["mod"] = DecodedPolicy(None, experts).at
    if setting == "two":
        folder_of = work / f"two-prompt-{seed}" / "prompted"
        told = models.with_adapters(kept.base(DTYPE)[0], {"prompted": folder_of})
        term = cf.Model(told, tokenizer=tokenizer, adapter="prompted")
        methods["prompt"] = partial(PromptedPolicy(term, rewards).at, kl=KL)
    reference = cf.Model(base, tokenizer=tokenizer, name="base")
    return front(folder, setting, methods, rewards, GRID[setting], reference)


def of_kl(work: Path, folder: Path, seed: int) -> Any:
    """The front of one reward and the divergence, at many KL weights."""
    base, tokenizer = kept.base(DTYPE)
    methods: dict[str, Callable[[dict[str, float]], Any]] = {}

    def at(policy: Any) -> Callable[[dict[str, float]], Any]:
        return lambda w: policy.at({"sentiment": 1.0}, kl=w["kl"])

    for scope in SCOPES:
        methods[scope] = at(loaded(work, f"kl-{scope}-{seed}", base, tokenizer))
    expert = soup_of(work, ["sentiment"], seed, base, tokenizer)
    methods["soup"] = at(expert)
    reference = cf.Model(base, tokenizer=tokenizer, name="base")
    methods["dera"] = at(
        DecodedPolicy(expert.reference, {"sentiment": expert.at({"sentiment": 1})})
    )
    weights = [{"sentiment": 1 - kl, "kl": kl} for kl in KL_WEIGHTS]
    return front(folder, "kl", methods, ["sentiment"], weights, reference)


def of_base(work: Path, folder: Path) -> Any:
    """The base alone, by all rewards."""
    base, tokenizer = kept.base(DTYPE)
    term = cf.Model(base, tokenizer=tokenizer, name="base")
    return front(folder, "base", {"base": lambda w: term}, THREE, [dict.fromkeys(THREE, 1.0)], term)


# ---- the stages


def stages() -> dict[str, Stage]:
    """All stages by name, in an order in which each finds what it needs."""
    found: dict[str, Stage] = {"front-base": of_base}
    for seed in SEEDS:
        for scope in (*SCOPES, "prompt"):
            found[f"two-{scope}-{seed}"] = partial(train, rewards=TWO, scope=scope, seed=seed)
        for reward in TWO:
            found[f"expert-{reward}-{seed}"] = partial(
                train, rewards=[reward], scope="full", seed=seed
            )
        found[f"front-two-{seed}"] = partial(of_rewards, setting="two", rewards=TWO, seed=seed)
    first = SEEDS[0]
    for scope in SCOPES:
        found[f"kl-{scope}-{first}"] = partial(
            train, rewards=["sentiment"], scope=scope, seed=first, kl=list(KL_RANGE)
        )
    found[f"front-kl-{first}"] = partial(of_kl, seed=first)
    for scope in SCOPES:
        found[f"three-{scope}-{first}"] = partial(train, rewards=THREE, scope=scope, seed=first)
    found[f"expert-readability-{first}"] = partial(
        train, rewards=["readability"], scope="full", seed=first
    )
    found[f"front-three-{first}"] = partial(of_rewards, setting="three", rewards=THREE, seed=first)
    return found


def report(work: Path, command: str) -> Row:
    """All figures of the settings whose fronts are there."""
    first = SEEDS[0]
    fronts = {}
    for setting, seeds in (("two", SEEDS), ("kl", SEEDS[:1]), ("three", SEEDS[:1])):
        files = [work / f"front-{setting}-{seed}" / "front.json" for seed in seeds]
        if all(file.exists() for file in files):
            fronts[setting] = [pareto.Front.load(file) for file in files]
    fronts["two"][0].plot(Path(__file__).parent.parent / "results" / "clp.png")
    return {
        "command": command,
        "machine": hardware("cpu"),
        "versions": {p: metadata.version(p) for p in ("torch", "transformers", "trl", "peft")},
        "settings": settings(),
        "base": pareto.Front.load(work / "front-base" / "front.json").points[0],
        "fronts": {name: figures.of_fronts(each, REFERENCE) for name, each in fronts.items()},
        "differences": {
            name: figures.differences(each, REFERENCE, "full") for name, each in fronts.items()
        },
        "parameters": figures.parameters(work, first, SCOPES, TWO),
        "learnt": figures.learnt(work, list(stages())),
        "texts": figures.texts(fronts["two"][0], "full"),
        "costs": kept.costs(work, [name for name in stages() if (work / name / kept.LOG).exists()]),
    }


def main(arguments: Sequence[str] | None = None) -> Row | None:
    return kept.main("clp", __doc__ or "", stages(), settings(), report, render, arguments)


if __name__ == "__main__":
    main()
