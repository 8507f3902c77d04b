"""What the stages of `metaaligner` have shown: figures, from the files that they kept."""

from __future__ import annotations

import functools
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import gold
import opinions
import stages as kept
from crossfade import metrics
from stages import Row

TOTAL = "total"  # the mean of the rewards that are trained on, each over its deviation


class Scores:
    """The mean of the rewards that are trained on, and its scale, which the base's answers to the
    training prompts make.

    Attributes:
        deviations: of each of these rewards.
    """

    def __init__(self, work: Path) -> None:
        rows = kept.answers(work / "pairs")
        self._mean = opinions.Annotator([r["rewards"] for row in rows for r in row["responses"]])
        self.deviations = self._mean.deviations

    def total(self, rewards: Mapping[str, float]) -> float:
        return self._mean.total(rewards)

    def add_totals(self, rows: Sequence[Row]) -> Sequence[Row]:
        """The rows, whose responses' rewards have the total besides."""
        for row in rows:
            for r in row["responses"]:
                r["rewards"][TOTAL] = self.total(r["rewards"])
        return rows


class Found:
    """The gold rewards of all answers to the held-out prompts, and figures of them.

    Args:
        margin: of a reward's deviation; an edit that changes a reward by no more is a tie.

    Attributes:
        question: the first prompt's.
        prompt: the mean number of a prompt's tokens.
        base: the base's answers to each prompt.
        before: the rewards of the first of them.
        scale: the means and deviations of all rewards in the base's answers to training prompts.
        least: what changes each reward by no more is a tie.
    """

    def __init__(self, work: Path, margin: float) -> None:
        self.work, self.scores = work, Scores(work)
        self.scale = json.loads((work / "scale" / "scale.json").read_text())
        self.least = {name: margin * x for name, x in self.scale["deviations"].items()}
        rows = kept.answers(work / "answers-base")
        self.question = rows[0]["prompt"][-1]["content"]
        self.prompt = statistics.fmean(len(row["prompt_ids"]) for row in rows)
        self.base = self._sampled("answers-base")
        self.before = [of[0]["rewards"] for of in self.base]

    @functools.cache  # noqa: B019 - it lives as long as the report is made
    def _sampled(self, stage: str) -> list[list[Row]]:
        """The responses to each prompt, with totals."""
        rows = self.scores.add_totals(kept.answers(self.work / stage))
        return [row["responses"] for row in rows]

    @functools.cache  # noqa: B019
    def edit(self, model: str, condition: str) -> Row:
        """What a model has edited, with totals."""
        found: Row = json.loads((self.work / f"edits-{model}" / f"{condition}.json").read_text())
        for rewards in found["rewards"]:
            rewards[TOTAL] = self.scores.total(rewards)
        return found

    def _gains(self, model: str, condition: str, name: str) -> list[float]:
        """By how much each edit has raised a reward."""
        edits = self.edit(model, condition)["rewards"]
        return [b[name] - a[name] for a, b in zip(self.before, edits, strict=True)]

    def _nets(self, model: str, condition: str, name: str) -> list[int]:
        """1 for each edit that wins by a reward, -1 for one that loses, 0 for a tie."""
        return [
            0 if abs(gain) <= self.least[name] else 1 if gain > 0 else -1
            for gain in self._gains(model, condition, name)
        ]

    # ---- edits

    def edits(
        self, groups: Mapping[str, Sequence[str]], conditions: Mapping[str, Sequence[str]]
    ) -> list[Row]:
        """What each editor has made of the base's answers in each of its conditions.

        Args:
            groups: for each editor the names of its models, one for each seed.
            conditions: the objectives that are named in each.
        """
        return [
            self._edits(editor, models, condition, named)
            for editor, models in groups.items()
            for condition, named in conditions.items()
            if (self.work / f"edits-{models[0]}" / f"{condition}.json").exists()
        ]

    def _edits(
        self, editor: str, models: Sequence[str], condition: str, named: Sequence[str]
    ) -> Row:
        each = [self.edit(model, condition) for model in models]
        by_prompt = {
            key: _mean([e[key] for e in each]) for key in ("unchanged", "edit_distance", "written")
        }
        return {
            "editor": editor,
            "condition": condition,
            "named": list(named),
            "unchanged": metrics.mean_interval(by_prompt["unchanged"]),
            "edit_distance": metrics.mean_interval(by_prompt["edit_distance"]),
            "tokens": statistics.fmean(by_prompt["written"]),
            "failed": sum(e["failed"] for e in each),
            "gains": {
                name: _over_seeds([self._gains(m, condition, name) for m in models])
                for name in (*gold.REWARDS, TOTAL)
            },
            "wins": {name: self._wins(models, condition, name) for name in gold.REWARDS},
        }

    def _wins(self, models: Sequence[str], condition: str, name: str) -> Row:
        nets = [self._nets(model, condition, name) for model in models]
        every = [net for of in nets for net in of]
        shares = {
            word: every.count(net) / len(every)
            for word, net in (("won", 1), ("tied", 0), ("lost", -1))
        }
        return shares | {"net": _over_seeds(nets)}

    def named(self, models: Sequence[str]) -> list[Row]:
        """By how much more an objective's reward rises where it alone is named than where one of
        the others is."""
        found = []
        for name in gold.REWARDS:
            own, others = [], []
            for model in models:
                own.append(self._gains(model, name, name))
                rest = [self._gains(model, o, name) for o in gold.REWARDS if o != name]
                others.append(_mean(rest))
            apart = [_less(a, b) for a, b in zip(own, others, strict=True)]
            row = {"objective": name, "trained": name in gold.TRAINED}
            each = {"named": own, "others": others, "difference": apart}
            found.append(row | {key: _over_seeds(of) for key, of in each.items()})
        return found

    def ablations(
        self, groups: Mapping[str, Sequence[str]], conditions: Mapping[str, Sequence[str]]
    ) -> list[Row]:
        """By how much an aligner is better that lacks a stage of training than that of the same
        seed which has all of them: in the total, and in wins less losses by what was named.

        Args:
            groups: for each kind the names of its models, one for each seed; the first lacks
                nothing.
        """
        (_, full), *others = groups.items()
        found = []
        for name, models in others:
            for condition, named in conditions.items():
                row: Row = {"ablation": name, "condition": condition}
                for key, of in ((TOTAL, self._totals), ("net", self._net)):
                    row[key] = _over_seeds(
                        [
                            _less(of(model, condition, named), of(whole, condition, named))
                            for model, whole in zip(models, full, strict=True)
                        ]
                    )
                found.append(row)
        return found

    def _totals(self, model: str, condition: str, named: Sequence[str]) -> list[float]:
        return self._gains(model, condition, TOTAL)

    def _net(self, model: str, condition: str, named: Sequence[str]) -> list[float]:
        return _mean([self._nets(model, condition, name) for name in named])

    # ---- baselines

    def baselines(self, aligners: Sequence[str], efts: Sequence[str]) -> list[Row]:
        """What each method makes that wants the three rewards together, and what an answer costs.

        Each has the gains over the base's first answer, and the tokens that are read as prompts and
        written for one answer, by all models. Of the best of n, one is marked as of equal cost: the
        largest n that takes no more tokens than an edit and the answer which it edits.
        """
        found = {
            "base": [self._sampled_method("answers-base", lambda of: of[0], 1)],
            "base, another answer": [self._sampled_method("answers-base", lambda of: of[1], 1)],
            "base, edited by itself": [self._edited_method("base")],
            "aligner": [self._edited_method(model) for model in aligners],
        }
        cost = statistics.fmean(m["tokens"] for m in found["aligner"])
        pool = len(self._sampled("pool")[0])
        best = {n: self._best_method(n) for n in range(1, pool + 1)}
        equal = max((n for n in best if best[n]["tokens"] <= cost), default=1)
        found |= {f"best of {n}": [best[n]] for n in sorted({2, 4, equal, pool} & best.keys())}
        found |= {stage: [self._sampled_method(stage, lambda of: of[0], 2)] for stage in efts}
        return [
            {
                "method": name,
                "equal_cost": name == f"best of {equal}",
                "gains": {
                    reward: _over_seeds([self._over_base(m, reward) for m in methods])
                    for reward in (*gold.REWARDS, TOTAL)
                },
                "tokens": statistics.fmean(m["tokens"] for m in methods),
                "processor_seconds": statistics.fmean(m["processor_seconds"] for m in methods),
            }
            for name, methods in found.items()
        ]

    def _over_base(self, method: Row, reward: str) -> list[float]:
        pairs = zip(self.before, method["rewards"], strict=True)
        return [after[reward] - before[reward] for before, after in pairs]

    def _sampled_method(self, stage: str, pick: Callable[[list[Row]], Row], models: int) -> Row:
        """One of the answers to each prompt that a blend of so many models has written."""
        picked = [pick(of) for of in self._sampled(stage)]
        every = sum(map(len, self._sampled(stage)))
        return {
            "rewards": [r["rewards"] for r in picked],
            "tokens": models * (self.prompt + statistics.fmean(len(r["ids"]) for r in picked)),
            "processor_seconds": self._seconds(stage) / every,
        }

    def _best_method(self, n: int) -> Row:
        """The best of the first n answers of the pool, by the total; they share their prompt."""
        firsts = [of[:n] for of in self._sampled("pool")]
        best = [max(of, key=lambda r: r["rewards"][TOTAL]) for of in firsts]
        written = statistics.fmean(sum(len(r["ids"]) for r in of) for of in firsts)
        one = self._seconds("pool") / sum(map(len, self._sampled("pool")))
        return {
            "rewards": [r["rewards"] for r in best],
            "tokens": self.prompt + written,
            "processor_seconds": n * one,
        }

    def _edited_method(self, model: str) -> Row:
        """The base's first answers, edited toward all three; the base's work counts, too."""
        base = self._sampled_method("answers-base", lambda of: of[0], 1)
        edit = self.edit(model, "trained")
        files = {p.name for p in (self.work / f"edits-{model}").glob("*.json")} - {kept.LOG}
        every = len(files) * len(edit["rewards"])
        tokens = statistics.fmean(map(sum, zip(edit["read"], edit["written"], strict=True)))
        seconds = self._seconds(f"edits-{model}") / every
        return {
            "rewards": edit["rewards"],
            "tokens": base["tokens"] + tokens,
            "processor_seconds": base["processor_seconds"] + seconds,
        }

    def _seconds(self, stage: str) -> float:
        seconds: float = kept.costs(self.work, [stage])[0]["processor_seconds"]
        return seconds

    # ---- texts

    def texts(self, model: str, conditions: Sequence[str]) -> Row:
        """The base's answer to the first prompt, and what a model makes of it."""
        edits = {c: self.edit(model, c)["texts"][0] for c in conditions}
        return {"prompt": self.question, "answer": self.base[0][0]["text"], "edits": edits}


def _mean(each: Sequence[Sequence[float]]) -> list[float]:
    """The mean of several lists, place by place."""
    return [statistics.fmean(of) for of in zip(*each, strict=True)]


def _less(a: Sequence[float], b: Sequence[float]) -> list[float]:
    return [x - y for x, y in zip(a, b, strict=True)]


def _over_seeds(each: Sequence[Sequence[float]]) -> Row:
    """Of a figure of each prompt for each seed: the mean, half of its 95 % interval over the
    prompts, and the mean of each seed."""
    return {
        "mean": metrics.mean_interval(_mean(each)),
        "seeds": [statistics.fmean(of) for of in each],
    }
