"""The positions that the demo measured, as a table, as texts side by side, and as a plot."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

from ..extras import require
from .fader import FORMULA, MOVIES, Position


def table(found: Sequence[Position]) -> str:
    """The figures of the positions, each on a line."""
    lines = [
        "     w   sentiment (VADER)        words       perplexity   distinct-2     KL to base"
        "       tokens/s",
        "                                               (base)                  (nats a token)",
    ]
    lines += [
        f"{p.weight:+6.2f}     {p.sentiment:+.2f} ± {p.sentiment_interval:.2f}     "
        f"{p.words:5.1f} ± {p.words_interval:3.1f}   {p.perplexity:10.1f}   {p.distinct_2:10.2f}   "
        f"{p.kl:6.3f} ± {p.kl_interval:.3f}   {p.tokens_per_second:8.0f}"
        for p in found
    ]
    return "\n".join(lines)


def side_by_side(found: Sequence[Position], rows: int = 2, width: int = 110) -> str:
    """The first text about each of the first `rows` movies, with a column for each position."""
    gap = 3
    column = max(16, (width - gap * (len(found) - 1)) // len(found))
    lines = [(" " * gap).join(f"w = {p.weight:g}".ljust(column) for p in found)]
    for i, movie in enumerate(MOVIES[:rows]):
        first = [p.texts[i * len(p.texts) // len(MOVIES)] for p in found]
        cells = [textwrap.wrap(text, column) or ["(empty)"] for text in first]
        lines.append(f"-- {movie}")
        for j in range(max(map(len, cells))):
            row = (" " * gap).join((c[j] if j < len(c) else "").ljust(column) for c in cells)
            lines.append(row.rstrip())
        lines.append("")
    return "\n".join(lines)


def plot(found: Sequence[Position], path: Path) -> None:
    """Save a PNG of both rewards and the divergence against the weight. Needs the extra "plot"."""
    require("matplotlib", "plot").use("Agg")  # no display is needed
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(3, 1, sharex=True, figsize=(7, 7), layout="constrained")
    ordered = sorted(found, key=lambda p: p.weight)
    shown = (
        ("sentiment", "sentiment\n(VADER compound, from -1 to 1)", "C0"),
        ("words", "words a text", "C2"),
        ("kl", "KL to the base\n(nats a token)", "C3"),
    )
    for axes, (name, label, color) in zip(panels, shown, strict=True):
        axes.errorbar(
            [p.weight for p in ordered],
            [getattr(p, name) for p in ordered],
            [getattr(p, f"{name}_interval") for p in ordered],
            color=color,
            marker="o",
            capsize=4,
            linewidth=1.8,
        )
        axes.set_ylabel(label)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_title(f"{FORMULA}\nSmolLM2-135M-Instruct, {len(found[0].texts)} texts a point")
    panels[-1].set_xlabel("fader weight w   (error bars: 95 % interval of the mean)")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
