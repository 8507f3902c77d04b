"""What correcting answers costs: crossfade's `correct`, and what users write."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from . import OURS
from .markdown import machine, table, text

Row = dict[str, Any]


def render(report: dict[str, Any]) -> str:
    settings, rows = report["settings"], report["rows"]
    least, most = settings["prompts"]
    return text(
        corrections(rows),
        f"Prompts of {least} to {most} tokens, corrections of at most {settings['new_tokens']}, "
        f"greedy; {machine(report['machine'])}; {settings['model']}; "
        f"torch {report['versions']['torch']}; `{report['command']}`, "
        f"{len(rows[0]['rounds_s'])} rounds in turns. Seconds on a CPU are of the processor.",
    )


def ratio(rows: Sequence[Row], name: str) -> float:
    """How many times longer a contender takes than crossfade, the median over rounds."""
    of = {r["contender"]: r["rounds_s"] for r in rows}
    return statistics.median(x / y for x, y in zip(of[name], of[OURS], strict=True))


def corrections(rows: Sequence[Row]) -> list[str]:
    """A line a contender."""
    lines = [
        [
            r["contender"],
            f"{r['equal']} of {r['corrections']}",
            f"{r['tokens']:,}",
            f"{r['seconds']:.3g}",
            f"{r['corrections'] / r['seconds']:.3g}",
            "" if r["contender"] == OURS else f"{ratio(rows, r['contender']):.2f}",
        ]
        for r in rows
    ]
    head = ["corrected by", "texts equal to the loop's", "tokens written", "s"]
    return table([*head, "corrections a second", "times crossfade's time"], lines)
