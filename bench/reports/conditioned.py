"""What a token of a conditioned policy costs, beside other ways to the same weights of rewards."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from .markdown import machine, table, text

Row = dict[str, Any]

ONE, EACH = "one mix for all requests", "a mix for each request"
MERGED, DERA = "merged into a plain model", "DeRa, two separate models"
TURNS = "the requests in turns, each at its mix"
# Within what the time of one contender must be, in times of another's on a CPU.
GOALS = {(DERA, ONE): (1.8, math.inf), (EACH, ONE): (0.0, 1.1)}


def render(report: dict[str, Any]) -> str:
    rows, settings = report["rows"], report["settings"]
    lines = [
        [
            str(r["batch"]),
            r["contender"],
            str(r["forwards"]),
            f"{r['seconds'] / settings['tokens'] * 1000:.3g}",
            f"{ratio(rows, r['batch'], r['contender'], ONE):.2f}",
        ]
        for r in rows
    ]
    head = ["requests", "decoded as", "forwards", "ms a step", "times one mix's"]
    return text(
        table(head, lines),
        f"{settings['tokens']} new tokens each after a prompt of 32; "
        f"{machine(report['machine'])}; {settings['model']}; torch {report['versions']['torch']}; "
        f"`{report['command']}`, {len(rows[0]['rounds_s'])} rounds in turns. On a CPU the time is "
        "that of the processor, on one thread.",
    )


def ratio(rows: Sequence[Row], batch: int, name: str, over: str) -> float | None:
    """How many times as long one contender takes as another, the median over rounds."""
    of = {r["contender"]: r["rounds_s"] for r in rows if r["batch"] == batch}
    if not {name, over} <= set(of):
        return None
    return statistics.median(x / y for x, y in zip(of[name], of[over], strict=True))
