"""What the stages of `dynamics` have shown: figures, from the files that they kept."""

from __future__ import annotations

import math
import statistics
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from crossfade import dynamics
from scipy import stats
from stages import Row
from torch import Tensor

DRAWS = 1000  # of the bootstrap over behaviours and seeds
History = list[Row]
TEXTS = 3  # pairs of responses that are shown


def history(folder: Path) -> History:
    """What a run's watch has seen."""
    found: History = dynamics.Watch.load(folder)["history"]
    return found


def trained_head(
    x: Tensor, label: Tensor, held: Tensor, beta: float, rate: float, batch: int
) -> tuple[float, Tensor]:
    """An epoch of gradient descent on DPO's loss of statements, of an untied head alone.

    The log-probs of yes and no differ by the product of the state and the difference of their two
    weights; the normaliser cancels, so that no other weight has a gradient. With u the change of
    yes's weights, that of no's is -u, and the margin of yes grows by ``2 u'x``.

    Args:
        x: ``[n, H]``: the states; they are taken in a fixed order in which labels alternate.
        label: ``[n]``: 1 for yes and -1 for no.
        held: ``[m, H]``: other states.

    Returns:
        The norm of the change of the head's weights, and ``[m]``: by how much the margin of yes
        over no has grown of the other states.
    """
    u = torch.zeros(x.shape[1], dtype=torch.float64)
    for own, sign in zip(x.split(batch), label.split(batch), strict=True):
        slope = torch.sigmoid(-beta * sign * 2 * (own @ u))  # 1/2 at the start
        u = u + rate * beta * (slope * sign) @ own / len(own)
    return math.sqrt(2) * float(u.norm()), 2 * held @ u


def series(run: History, behaviour: str, figure: str) -> list[float]:
    return [row["behaviours"][behaviour][figure] for row in run]


def area(run: History, behaviour: str, figure: str = "loss") -> float:
    """Under a figure over the steps, divided by the steps: its mean over the run."""
    steps = [row["step"] for row in run]
    return float(np.trapezoid(series(run, behaviour, figure), steps)) / steps[-1]


def fell(run: History, behaviour: str) -> float:
    """By how much the mean loss of a run is below that before it: how early it was learnt."""
    return series(run, behaviour, "loss")[0] - area(run, behaviour)


def first_fall(run: History, behaviour: str) -> float:
    """By how much the loss has fallen at the first step that was measured."""
    losses = series(run, behaviour, "loss")
    return losses[0] - losses[1]


def learning(told: Row, runs: Sequence[History]) -> Row:
    """Of each behaviour how fast it was learnt, and how well that was predicted."""
    names = told["names"]
    apart = {r["behaviour"]: r["distinguishability"] for r in told["behaviours"]}
    d = np.array(told["differences"])
    common = dict(zip(names, d @ d.mean(axis=0), strict=True))
    rows = []
    for name in names:
        falls = [fell(run, name) for run in runs]
        rows.append(
            {
                "behaviour": name,
                "fall": statistics.fmean(falls),
                "falls": falls,
                "first": statistics.fmean(first_fall(run, name) for run in runs),
                "accuracy": statistics.fmean(series(run, name, "accuracy")[-1] for run in runs),
                "plain": [
                    statistics.fmean(series(run, name, "plain_accuracy")[at] for run in runs)
                    for at in (0, -1)
                ],
            }
        )
    measures: dict[str, Callable[[History, str], float]] = {"area": fell, "first": first_fall}
    predictors = {"distinguishability": apart, "common": common}
    return {
        "behaviours": rows,
        "steps": [row["step"] for row in runs[0]],
        "correlations": {
            f"{predictor}-{measure}": correlation(
                [values[name] for name in names],
                [[of(run, name) for name in names] for run in runs],
            )
            for predictor, values in predictors.items()
            for measure, of in measures.items()
        },
    }


def correlation(predicted: Sequence[float], observed: Sequence[Sequence[float]]) -> Row:
    """Spearman's, of a prediction and the mean over seeds of what was observed.

    Args:
        predicted: of each behaviour.
        observed: of each seed and behaviour.

    Returns:
        It, its 95 % interval by a bootstrap over behaviours and seeds, and that of each seed.
    """
    x, y = np.array(predicted), np.array(observed)
    rng = np.random.default_rng(0)
    drawn = []
    for _ in range(DRAWS):
        seeds, taken = (rng.integers(n, size=n) for n in y.shape)
        r = spearman(x[taken], y[seeds][:, taken].mean(axis=0))
        if not math.isnan(r):
            drawn.append(r)
    low, high = np.quantile(drawn, [0.025, 0.975]).tolist()
    return {
        "value": spearman(x, y.mean(axis=0)),
        "interval": [low, high],
        "each": [spearman(x, own) for own in y],
    }


def spearman(x: Any, y: Any) -> float:
    """NaN where all of one are equal."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.ConstantInputWarning)
        return float(stats.spearmanr(x, y).statistic)


def pairs(told: Row, runs: Sequence[History]) -> Row:
    """Of any two behaviours: is the one that has priority learnt earlier?"""
    names, matrix = told["names"], told["priorities"]
    each = [(i, j) for i in range(len(names)) for j in range(i)]
    ahead = np.array([[fell(run, name) for name in names] for run in runs])

    def agreeing(taken: Sequence[int], seeds: Sequence[int]) -> float:
        mean = ahead[seeds].mean(axis=0)
        some = [(a, b) for k, a in enumerate(taken) for b in taken[:k] if a != b]
        right = [(matrix[a][b] > 0) == (mean[a] > mean[b]) for a, b in some]
        return statistics.fmean(right) if right else math.nan

    everyone, seeds = list(range(len(names))), list(range(len(runs)))
    rng = np.random.default_rng(0)
    drawn = [
        agreeing(
            rng.integers(len(names), size=len(names)).tolist(),
            rng.integers(len(runs), size=len(runs)).tolist(),
        )
        for _ in range(DRAWS)
    ]
    low, high = np.nanquantile(drawn, [0.025, 0.975]).tolist()
    mean = ahead.mean(axis=0)
    return {
        "count": len(each),
        "agree": agreeing(everyone, seeds),
        "interval": [low, high],
        "each": [agreeing(everyone, [seed]) for seed in seeds],
        "spearman": spearman([matrix[i][j] for i, j in each], [mean[i] - mean[j] for i, j in each]),
    }


def head(told: Row, found: Sequence[Row], beta: float) -> Row:
    """The change of the head beside what Theorem 4.1 says of it, for each rate."""
    apart = {r["behaviour"]: r["distinguishability"] for r in told["behaviours"]}
    rates = {}
    for rate in dict.fromkeys(row["rate"] for row in found):
        rows = [
            {
                **row,
                "distinguishability": apart[row["behaviour"]],
                "predicted": row["steps"]
                * rate
                * math.sqrt(2)
                / 4
                * beta
                * apart[row["behaviour"]],
            }
            for row in found
            if row["rate"] == rate
        ]
        x, y = ([row[k] for row in rows] for k in ("distinguishability", "change"))
        rates[f"{rate:g}"] = {
            "rows": rows,
            "pearson": float(stats.pearsonr(x, y).statistic),
            "off": max(abs(row["change"] / row["predicted"] - 1) for row in rows),
        }
    return rates


def evenness(told: Row, plain: Sequence[History], even: Sequence[History]) -> Row:
    """How far apart the loss areas of behaviours are, on the data as they are and evened out."""
    names = told["names"]
    areas = {
        kind: [[area(run, name) for name in names] for run in runs]
        for kind, runs in (("plain", plain), ("even", even))
    }
    begun = series(plain[0], names[0], "loss")[0]
    measures: dict[str, Callable[[Sequence[float]], float]] = {
        "spread": statistics.pstdev,
        "relative": lambda own: statistics.pstdev(own) / (begun - statistics.fmean(own)),
        "mean": statistics.fmean,
        "slowest": max,
    }
    found: Row = {
        "falls": {
            kind: [begun - statistics.fmean(x) for x in zip(*runs, strict=True)]
            for kind, runs in areas.items()
        },
        "names": names,
    }
    for name, measure in measures.items():
        each = {kind: [measure(own) for own in runs] for kind, runs in areas.items()}
        gaps = [b - a for a, b in zip(each["plain"], each["even"], strict=True)]
        found[name] = {
            **{kind: statistics.fmean(x) for kind, x in each.items()},
            **paired(gaps),
        }
    return found


def paired(gaps: Sequence[float]) -> Row:
    """The mean of differences of seeds, its 95 % interval by Student's t, and whether it is clear
    of 0."""
    mean = statistics.fmean(gaps)
    if len(gaps) < 2:
        return {"gap": mean, "interval": None, "each": list(gaps), "resolved": False}
    error = statistics.stdev(gaps) / math.sqrt(len(gaps))
    half = float(stats.t.ppf(0.975, len(gaps) - 1)) * error
    low, high = mean - half, mean + half
    return {
        "gap": mean,
        "interval": [low, high],
        "each": list(gaps),
        "resolved": low > 0 or high < 0,
    }


def flips(found: dynamics.Vulnerability) -> Row:
    """Both measures of accuracy of both models, of all behaviours and of each."""
    return {
        "steps": list(found.steps),
        "seeds": list(found.seeds),
        "pairs": len(found.rows),
        "trained": found.trained,
        "rewards": found.figures(),
        "answers": found.answers.figures(),
        "behaviours": [
            {
                "behaviour": name,
                "ratio": own.figures()["ratio"],
                "interval": own.figures()["interval"],
                "areas": {side: getattr(own, side).area for side in ("base", "aligned")},
            }
            for name, own in found.by_behaviour.items()
        ],
    }


def squeezing(runs: Mapping[str, Sequence[History]], rows: Sequence[Row]) -> Row:
    """The log-probs of both responses, a token, and of the most likely token, over the steps."""
    found: Row = {"texts": [row["texts"] for row in rows if row["held_out"]][:TEXTS]}
    held = [row for row in rows if row["held_out"]]
    for kind, own in runs.items():
        lengths = {
            "chosen": statistics.fmean(len(row["chosen_ids"]) for row in held),
            "rejected": statistics.fmean(len(row[f"{kind}_ids"]) for row in held),
            "argmax": 1.0,
        }
        each = {
            name: [[x / n for x in series(run, kind, name)] for run in own]
            for name, n in lengths.items()
        }
        found[kind] = {
            "n": len(held),
            "steps": [row["step"] for row in own[0]],
            "curves": {
                name: [statistics.fmean(x) for x in zip(*lines, strict=True)]
                for name, lines in each.items()
            },
            "changes": {
                name: paired([x[-1] - x[0] for x in lines]) for name, lines in each.items()
            },
        }
    a, b = (found[kind]["changes"]["argmax"]["each"] for kind in runs)
    found["argmax"] = paired([x - y for x, y in zip(a, b, strict=True)])
    return found
