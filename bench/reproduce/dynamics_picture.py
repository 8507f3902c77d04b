"""What the stages of `dynamics` have shown, in one picture."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from crossfade import dynamics
from dynamics_figures import History, series
from stages import Row

matplotlib.use("Agg")  # no display is needed
from matplotlib import pyplot


def plot(
    told: Row,
    found: Row,
    runs: Sequence[History],
    flipped: dynamics.Vulnerability,
    path: Path,
) -> None:
    """All of it in one picture."""
    figure, grid = pyplot.subplots(2, 3, figsize=(15, 8.6), layout="constrained")
    rows = sorted(told["behaviours"], key=lambda r: -r["distinguishability"])
    colors = dict(
        zip(
            (r["behaviour"] for r in rows),
            pyplot.get_cmap("viridis")(np.linspace(0, 0.92, len(rows))),
            strict=True,
        )
    )
    _learnt(grid[0, 0], rows, runs, colors)
    _order(grid[0, 1], rows, found["learning"], colors)
    _head(grid[0, 2], found["head"], colors)
    _even(grid[1, 0], rows, found["even"])
    flipped.draw(grid[1, 1])
    low, high = flipped.interval
    grid[1, 1].set_title(
        f"flipped labels: aligned / base = {flipped.ratio:.2f} ({low:.2f} to {high:.2f})",
        fontsize="medium",
    )
    _squeeze(grid[1, 2], found["squeeze"])
    for axes in grid.flat:
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _learnt(axes: Any, rows: Sequence[Row], runs: Sequence[History], colors: Any) -> None:
    steps = [row["step"] for row in runs[0]]
    for row in rows:
        name = row["behaviour"]
        lines = [series(run, name, "growth") for run in runs]
        mean = [statistics.fmean(x) for x in zip(*lines, strict=True)]
        axes.plot(steps, mean, color=colors[name], label=name)
    axes.set_xlabel("steps of DPO on all behaviours")
    axes.set_ylabel("growth of the held-out margin, nats")
    axes.set_title("what is learnt (most distinguishable first)", fontsize="medium")
    axes.legend(fontsize="small", frameon=False, ncols=2)


def _order(axes: Any, rows: Sequence[Row], learnt: Row, colors: Any) -> None:
    falls = {r["behaviour"]: r for r in learnt["behaviours"]}
    for row in rows:
        name = row["behaviour"]
        own = [1000 * x for x in falls[name]["falls"]]
        x, y = row["distinguishability"], statistics.fmean(own)
        low, high = row["interval"]
        axes.errorbar(
            x,
            y,
            xerr=[[max(0.0, x - low)], [max(0.0, high - x)]],
            yerr=[[y - min(own)], [max(own) - y]],
            fmt="o",
            color=colors[name],
            elinewidth=0.8,
        )
        axes.annotate(
            name,
            (x, max(own)),
            xytext=(0, 3),
            textcoords="offset points",
            ha="center",
            rotation=90,
            fontsize="small",
        )
    axes.set_ylim(0, axes.get_ylim()[1] * 1.2)  # room for the names
    found = learnt["correlations"]["distinguishability-area"]
    low, high = found["interval"]
    axes.set_title(
        f"order: Spearman {found['value']:.2f} ({low:.2f} to {high:.2f})", fontsize="medium"
    )
    axes.set_xlabel("distinguishability under the base (95 %)")
    axes.set_ylabel("mean fall of the held-out loss, 1/1000 (range of seeds)")


def _head(axes: Any, heads: Mapping[str, Row], colors: Any) -> None:
    rate, found = next(iter(heads.items()))
    for row in found["rows"]:
        axes.scatter(row["distinguishability"], row["change"], color=colors[row["behaviour"]])
    ends = [0.0, 1.08 * max(row["distinguishability"] for row in found["rows"])]
    first = found["rows"][0]
    slope = first["predicted"] / first["distinguishability"]
    axes.plot(ends, [slope * x for x in ends], color="0.5", linewidth=1, label="Theorem 4.1")
    axes.set_xlabel("distinguishability under the base")
    axes.set_ylabel("change of the head's weights, norm")
    axes.set_title(f"the head alone, rate {rate}: r = {found['pearson']:.4f}", fontsize="medium")
    axes.legend(frameon=False)


def _even(axes: Any, rows: Sequence[Row], even: Row) -> None:
    place = {name: i for i, name in enumerate(even["names"])}
    names = [row["behaviour"] for row in rows]
    each = {
        kind: [1000 * even["falls"][kind][place[name]] for name in names]
        for kind in ("plain", "even")
    }
    axes.hlines(range(len(names)), each["plain"], each["even"], color="0.8", zorder=1)
    for kind, color in (("plain", "0.45"), ("even", "tab:orange")):
        falls = each[kind]
        label = "as they are" if kind == "plain" else "rebalanced"
        axes.plot(falls, range(len(names)), "o", color=color, label=label)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    spread = even["spread"]
    said = "resolved" if spread["resolved"] else "not resolved"
    axes.set_title(
        f"spread {1000 * spread['plain']:.1f} → {1000 * spread['even']:.1f}, {said}",
        fontsize="medium",
    )
    axes.set_xlabel("mean fall of the held-out loss, 1/1000")
    axes.legend(frameon=False)


def _squeeze(axes: Any, found: Row) -> None:
    colors = {"chosen": "tab:blue", "rejected": "tab:red", "argmax": "tab:green"}
    for kind, style in (("unlikely", "-"), ("likely", "--")):
        for name, line in found[kind]["curves"].items():
            axes.plot(
                found[kind]["steps"],
                line,
                style,
                color=colors[name],
                label=f"{name}, rejected is {kind}",
            )
    axes.set_xlabel("steps of off-policy DPO")
    axes.set_ylabel("mean log-prob of a token, nats")
    axes.set_title("squeezing", fontsize="medium")
    low, high = axes.get_ylim()
    axes.set_ylim(low - 0.25 * (high - low), high)  # room for the legend
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(fontsize="x-small", frameon=False, ncols=2, loc="lower left")
