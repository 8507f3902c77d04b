"""What the stages of `searches` have shown: rewards at equal tokens and at equal seconds."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from crossfade import metrics
from stages import Row

Runs = Mapping[tuple[str, str], Row]
BEST, BASE, CBS = "best of n", "base", "CBS"
ONE_ROW = ("asked", "EFT")
SEARCHES = (CBS, "IVG", "particles", "particles, drawn", "entropy-cut", "tilted")
POLICY = {"IVG": "EFT", "tilted": "asked"}  # what writes their rows, where it is not the base


def merged(files: Iterable[Row]) -> dict[tuple[str, str], Row]:
    """What each method wrote for all prompts, from its blocks of prompts in their order."""
    found: dict[tuple[str, str], Row] = {}
    for file in files:
        key = (file["objective"], file["method"])
        run = found.setdefault(key, {"seconds": [], "read": [], "prompts": []})
        run["seconds"].append(file["seconds"])
        run["read"].append(file["read"])
        run["prompts"] += file["prompts"]
    return found


def rank_weights(values: Sequence[float], n: int) -> list[float]:
    """How likely each of some rows is the best of n of them, over all choices of n."""
    order = sorted(range(len(values)), key=lambda i: -values[i])
    found = [0.0] * len(values)
    for rank, i in enumerate(order):
        found[i] = math.comb(len(values) - 1 - rank, n - 1) / math.comb(len(values), n)
    return found


class Texts:
    """Weighted texts of each prompt, whose weights sum to 1: what a method gives, and how often."""

    def __init__(
        self,
        run: Row,
        weights: Sequence[Sequence[float]],
        cost: tuple[Row, float] | None = None,
        choice: float | None = None,
    ) -> None:
        """Args:
        cost: another run, so many times whose cost it has.
        choice: the nats that choosing adds to the divergence, where all texts have the same.
        """
        self.prompts, self.weights, self.choice = run["prompts"], weights, choice
        measured, times = cost or (run, 1.0)
        self.blocks = [x * times for x in measured["seconds"]]
        self.seconds = sum(self.blocks) / len(self.prompts)
        self.read = sum(measured["read"]) * times / len(self.prompts)

    def each(self, column: str) -> list[float]:
        """The mean of a column for each prompt."""
        return [
            math.fsum(w * x for w, x in zip(ws, p[column], strict=True))
            for ws, p in zip(self.weights, self.prompts, strict=True)
        ]

    def figures(self) -> Row:
        """What it costs, and how far it is from the base."""
        ratios, tokens = self.each("ratio"), self.each("tokens")
        choices = self.each("choice") if self.choice is None else [self.choice] * len(ratios)
        return {
            "seconds": self.seconds,
            "read": self.read,
            "tokens": math.fsum(tokens) / len(tokens),
            "kl": metrics.mean_interval([r + c for r, c in zip(ratios, choices, strict=True)]),
            "kl_of_policy": metrics.mean_interval(ratios),
            "perplexity": metrics.perplexity_interval(self.each("plain"), tokens),
        }


def of_method(runs: Runs, objective: str, method: str) -> Texts:
    """The texts of a method. Its first row counts, which is the best, unless it is a draw."""
    run = runs.get((objective, method.removesuffix(", drawn"))) or runs["both", method]
    if method.endswith("drawn"):
        return Texts(run, [[w / sum(p["weights"]) for w in p["weights"]] for p in run["prompts"]])
    return Texts(run, [[1.0] + [0.0] * (len(p["texts"]) - 1) for p in run["prompts"]])


def best_of(runs: Runs, place: int, n: int, rows: int) -> Texts:
    """The best of n of the pool by the objective in this place, with the seconds that n rows take.

    They are those of the best of `rows`, which was timed, in proportion.
    """
    pool = runs["both", "pool"]
    weights = [rank_weights(p[f"value_{place}"], n) for p in pool["prompts"]]
    return Texts(pool, weights, (runs["both", "timed"], n / rows), math.log(n) - 1 + 1 / n)


def between(low: Sequence[float], high: Sequence[float], share: float) -> list[float]:
    """Prompt by prompt between two methods, at a share of the way within [0, 1]."""
    share = min(max(share, 0.0), 1.0)
    return [a + (b - a) * share for a, b in zip(low, high, strict=True)]


def at_seconds(one: Texts, all_rows: Texts, reward: str, seconds: float) -> list[float]:
    """The reward of a search with fewer rows, which takes so many seconds: between one row of its
    policy and all of its rows, in proportion to the logarithm of the seconds."""
    span = math.log(all_rows.seconds / one.seconds)
    share = math.log(seconds / one.seconds) / span if span > 0 else 1.0
    return between(one.each(reward), all_rows.each(reward), share)


def best_at(curve: Sequence[Texts], reward: str, n: float) -> list[float]:
    """The reward of the best of n, for an n between two numbers as well, up to the largest."""
    n = min(max(n, 1.0), float(len(curve)))
    low = min(int(n), len(curve) - 1)
    return between(curve[low - 1].each(reward), curve[low].each(reward), n - low)


def less(a: Sequence[float], b: Sequence[float]) -> tuple[float, float]:
    """The mean of a difference of two methods, prompt by prompt, and half of its 95 % interval."""
    return metrics.mean_interval([x - y for x, y in zip(a, b, strict=True)])


def compared(runs: Runs, rewards: Iterable[str], rows: int) -> Row:
    """For each objective the methods beside each other, and best of n as n grows."""
    names = list(rewards)
    return {
        "methods": {o: _methods(runs, names, place, rows) for place, o in enumerate(names)},
        "best": {
            o: [
                [n, t.seconds, *metrics.mean_interval(t.each(o))]
                for n, t in enumerate(_curve(runs, place, rows), 1)
            ]
            for place, o in enumerate(names)
        },
        "texts": {o: _samples(runs, o) for o in names},
    }


def _curve(runs: Runs, place: int, rows: int) -> list[Texts]:
    most = len(runs["both", "pool"]["prompts"][0]["texts"])
    return [best_of(runs, place, n, rows) for n in range(1, most + 1)]


def _methods(runs: Runs, names: Sequence[str], place: int, rows: int) -> list[Row]:
    """A method a row; differences are those of the objective's reward."""
    o, curve = names[place], _curve(runs, place, rows)
    best, cbs, base = curve[rows - 1], of_method(runs, o, CBS), of_method(runs, o, BASE)
    found = []
    for method in (BASE, *ONE_ROW, BEST, *SEARCHES):
        t, searches = best if method == BEST else of_method(runs, o, method), method in SEARCHES
        own, n = t.each(o), rows * t.seconds / best.seconds
        row = {
            "method": method,
            "rows": rows if searches or method == BEST else 1,
            **t.figures(),
            **{name: metrics.mean_interval(t.each(name)) for name in names},
            "times_best": [x / y for x, y in zip(t.blocks, best.blocks, strict=True)],
        }
        if searches:
            row["tokens_best"] = less(own, best.each(o))
        if method != BEST:
            row["n_at_seconds"], row["seconds_best"] = n, less(own, best_at(curve, o, n))
        if method == BEST or (searches and method != CBS):
            row["tokens_cbs"] = less(own, cbs.each(o))
        if method == BEST:
            at = best_at(curve, o, rows * cbs.seconds / best.seconds)
            row["seconds_cbs"] = less(at, cbs.each(o))
        elif t.seconds > cbs.seconds:
            one = of_method(runs, o, POLICY.get(method, BASE))
            row["seconds_cbs"] = less(at_seconds(one, t, o, cbs.seconds), cbs.each(o))
        elif method != CBS:
            row["seconds_cbs"] = less(own, at_seconds(base, cbs, o, t.seconds))
        found.append(row)
    return found


def _samples(runs: Runs, objective: str) -> Row:
    """What each method wrote first, to the first prompt."""
    own = {m: r for (k, m), r in runs.items() if k in ("both", objective) and m != "pool"}
    return {m: r["prompts"][0]["texts"][0] for m, r in own.items() if m != "timed"}


def plot(report: Row, path: Path) -> None:
    """Rewards against processor seconds: best of n as n grows, and every other method."""
    import matplotlib

    matplotlib.use("Agg")  # no display is needed
    from matplotlib import pyplot

    each = report["methods"]
    figure, panels = pyplot.subplots(1, len(each), figsize=(12, 5.5), layout="constrained")
    for axes, (objective, rows) in zip(panels, each.items(), strict=True):
        counts, seconds, mean, half = zip(*report["best"][objective], strict=True)
        axes.errorbar(seconds, mean, half, color="black", marker=".", elinewidth=0.7, label=BEST)
        for n, x, y in zip(counts, seconds, mean, strict=True):
            axes.annotate(str(n), (x, y), (3, -10), textcoords="offset points", fontsize=7)
        at = {row["method"]: row for row in rows}
        for i, row in enumerate(r for r in rows if r["method"] != BEST):
            x, (y, e), color = row["seconds"], row[objective], f"C{i}"
            marker = "s" if row["method"] in SEARCHES else "D"
            axes.errorbar(x, y, e, color=color, marker=marker, linestyle="", label=row["method"])
            if row["method"] in SEARCHES:
                start = at[POLICY.get(row["method"], BASE)]
                xs, ys = [start["seconds"], x], [start[objective][0], y]
                axes.plot(xs, ys, ":", color=color, linewidth=0.8)
        axes.set_xscale("log")
        axes.xaxis.set_minor_formatter("{x:g}")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.tick_params(axis="x", which="both", labelsize=7)
        axes.set_xlabel("processor seconds a prompt")
        axes.set_ylabel(objective)
        axes.grid(alpha=0.25)
    lines = panels[0].get_legend_handles_labels()
    figure.legend(*lines, loc="outside lower center", ncols=5, fontsize=8)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
