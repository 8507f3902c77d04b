"""Integrated Value Guidance's comparison: rewards, divergence and time of every method."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from .markdown import machine, table, text

Row = dict[str, Any]


def render(report: dict[str, Any]) -> str:
    s = report["settings"]
    names = s["rewards"]
    order = ["both", *names, "fader"]
    rows = sorted(report["rows"], key=lambda r: order.index(r["objective"]))
    lines = []
    for r in rows:
        same = None
        if r["objective"] in names and not r["method"].startswith("EFT"):
            same = at_kl(rows, r["objective"], r["kl"])
        line = [
            r["objective"],
            r["method"],
            f"{r['seconds']:.2f}",
            *(f"{r[n]:+.2f} ± {r[f'{n}_interval']:.2f}" for n in names),
            "-" if same is None else f"{same:+.2f}",
            f"{r['perplexity']:.1f}",
            f"{r['distinct_2']:.2f}",
            f"{r['kl']:.2f} ± {r['kl_interval']:.2f}",
        ]
        lines.append(line)
    head = ["objective", "method", "s a prompt", *names, "EFT's at this KL", "perplexity (base)"]
    return text(
        table([*head, "distinct-2", "KL, nats a response, at most"], lines),
        f"{s['prompts']} held-out prompts, up to {s['new']} tokens at temperature "
        f"{s['temperature']}; W, N, L = {', '.join(map(str, s['search']))}; IVG: beta = "
        f"{s['beta']:g}; fader: (1 - w) * {names[0]} + w * {names[1]}; ± is a 95 % interval of "
        f"the mean. {machine(report['machine'])}; `{report['command']}`.",
    )


def at_kl(rows: Sequence[Row], objective: str, kl: float) -> float | None:
    """EFT's reward at a divergence, between the betas that were run; None beyond them."""
    of = [r for r in rows if r["objective"] == objective and r["method"].startswith("EFT")]
    points = sorted((r["kl"], r[objective]) for r in [*of, *filter(is_base, rows)])
    if not of:
        return None
    for (low, one), (high, other) in itertools.pairwise(points):
        if low <= kl <= high:
            return one + (other - one) * (kl - low) / ((high - low) or 1.0)
    return None


def is_base(row: Row) -> bool:
    return (row["objective"], row["method"]) == ("both", "base")
