"""What the stages of `self_judge` have shown: figures, from the files that they kept."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import opinions
from crossfade import metrics
from crossfade.training import read_jsonl
from stages import Row, answers

TOTAL = "total"  # the annotator's mean of all rewards, and the question for it
TEXTS = 3  # of each policy, so many answers are shown


def annotated(work: Path) -> tuple[list[Row], opinions.Annotator]:
    """The base's answers to the training prompts, with the annotator's mean among their rewards,
    and the annotator, whose scale they make."""
    rows = answers(work / "pairs")
    scores = [r["rewards"] for row in rows for r in row["responses"]]
    annotator = opinions.Annotator(scores)
    add_total(rows, annotator)
    return rows, annotator


def add_total(rows: Sequence[Row], annotator: opinions.Annotator) -> None:
    for row in rows:
        for r in row["responses"]:
            r["rewards"][TOTAL] = annotator.total(r["rewards"])


def judge(folder: Path, question: str) -> Row:
    """How often a judge agrees with the annotator on the held-out pairs, also on the half of them
    that differ most, and how far the order sways it."""
    kept = json.loads((folder / f"{question}.json").read_text())
    both = sorted(zip(kept["gaps"], kept["preferences"], strict=True), key=lambda x: -abs(x[0]))
    right = [0.5 if p == 0.5 else float((p > 0.5) == (gap > 0)) for gap, p in both]
    return {
        "pairs": len(right),
        "accuracy": metrics.mean_interval(right),
        "wide": metrics.mean_interval(right[: len(right) // 2]),
        "position_bias": kept["position_bias"],
        "toward_first": kept["toward_first"],
    }


def by_prompt(work: Path, names: Sequence[str], annotator: opinions.Annotator) -> list[Row]:
    """For each held-out prompt, the mean rewards of the answers of some policies."""
    each = [answers(work / f"answers-{name}") for name in names]
    for rows in each:
        add_total(rows, annotator)
    return [
        mean_rewards([r["rewards"] for row in rows for r in row["responses"]])
        for rows in zip(*each, strict=True)
    ]


def mean_rewards(rewards: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: statistics.fmean(r[name] for r in rewards) for name in rewards[0]}


def summary(rows: Sequence[Mapping[str, float]]) -> Row:
    """The mean of each reward over the prompts, and half of its 95 % interval."""
    return {name: metrics.mean_interval([row[name] for row in rows]) for name in rows[0]}


def difference(one: Sequence[Row], other: Sequence[Row]) -> tuple[float, float]:
    """By how much the total of the second is larger, prompt by prompt, with its interval."""
    pairs = zip(one, other, strict=True)
    return metrics.mean_interval([b[TOTAL] - a[TOTAL] for a, b in pairs])


def policies(work: Path, groups: Mapping[str, Sequence[str]]) -> list[Row]:
    """Each policy's rewards over all its seeds, the total of each seed, and what it writes.

    Args:
        groups: for each policy the names of its models, one for each seed.
    """
    _, annotator = annotated(work)
    found = []
    for name, models in groups.items():
        rows = answers(work / f"answers-{models[0]}")
        every = [r for model in models for r in responses_of(answers(work / f"answers-{model}"))]
        each = [by_prompt(work, [model], annotator) for model in models]
        found.append(
            {
                "policy": name,
                **summary(by_prompt(work, models, annotator)),
                "seeds": [summary(one)[TOTAL][0] for one in each],
                "tokens": statistics.fmean(len(r["ids"]) for r in every),
                "distinct_2": metrics.distinct_n([r["text"] for r in responses_of(rows)], 2),
                "texts": [row["responses"][0]["text"] for row in rows[:TEXTS]],
            }
        )
    return found


def responses_of(rows: Sequence[Row]) -> list[Row]:
    return [r for row in rows for r in row["responses"]]


def differences(work: Path, groups: Mapping[str, Sequence[str]]) -> list[Row]:
    """By how much each policy's total is above that of the one before it, over all seeds and for
    each seed."""
    _, annotator = annotated(work)
    names, found = list(groups), []
    for k, name in enumerate(names):
        for other in names[:k]:
            one, two = groups[other], groups[name]
            of = [by_prompt(work, models, annotator) for models in (one, two)]
            seeds = []
            if len(one) == len(two) > 1:
                pairs = zip(one, two, strict=True)
                seeds = [
                    difference(*(by_prompt(work, [m], annotator) for m in both))[0]
                    for both in pairs
                ]
            found.append({"from": other, "to": name, "total": difference(*of), "seeds": seeds})
    return found


def rejection(work: Path, policy: str) -> list[Row]:
    """Of the first N answers of a policy's pool: the winner of the tournament, the best by the
    annotator, and any, which is their mean."""
    rows, played = _pool(work, policy)
    found = []
    for k in range(len(played[0]["winners"])):
        n = 2**k
        first = [[r["rewards"] for r in row["responses"][:n]] for row in rows]
        won = [bracket["winners"][k] for bracket in played]
        chosen = [of[place] for of, place in zip(first, won, strict=True)]
        means = [mean_rewards(of) for of in first]
        best = [max(of, key=lambda r: r[TOTAL]) for of in first]
        texts = [row["responses"][place]["text"] for row, place in zip(rows, won, strict=True)]
        found.append(
            {
                "n": n,
                "judge": summary(chosen),
                "best": summary(best),
                "any": summary(means),
                "gain": difference(means, chosen),
                "texts": texts[:TEXTS],
            }
        )
    return found


def _pool(work: Path, policy: str) -> tuple[list[Row], list[Row]]:
    """The answers of a policy's pool with their totals, and their tournaments."""
    _, annotator = annotated(work)
    rows = answers(work / f"pool-{policy}")
    add_total(rows, annotator)
    return rows, read_jsonl(work / f"tournament-{policy}" / "brackets.jsonl")


def matches(work: Path, policy: str) -> Row:
    """How often the judge agrees with the annotator on two different answers of a policy: the
    matches of the tournaments' first round."""
    rows, played = _pool(work, policy)
    right: list[list[float]] = []
    for row, bracket in zip(rows, played, strict=True):
        rewards = [r["rewards"][TOTAL] for r in row["responses"]]
        own = [
            float((p > 0.5) == (rewards[a] > rewards[b]))
            for a, b, p in bracket["rounds"][0]
            if rewards[a] != rewards[b] and p != 0.5
        ]
        if own:
            right.append(own)
    return {
        "matches": sum(map(len, right)),
        "accuracy": metrics.mean_interval([statistics.fmean(own) for own in right]),
    }
