"""What a judgment of two answers costs: crossfade's judge, and what users write."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from . import OURS
from .markdown import machine, table, text

Row = dict[str, Any]


def render(report: dict[str, Any]) -> str:
    settings = report["settings"]
    return text(
        judgments(report["rows"]),
        f"{settings['answers']} answers of {settings['answer']} tokens to a context of "
        f"{settings['context']}, both orders; {machine(report['machine'])}; {settings['model']}; "
        f"torch {report['versions']['torch']}; `{report['command']}`, "
        f"{len(report['rows'][0]['rounds_s'])} rounds in turns. Seconds on a CPU are of the "
        "processor.",
        *notes(report),
    )


def ratio(rows: Sequence[Row], task: str, name: str) -> float | None:
    """How many times longer a contender takes than crossfade, the median over rounds."""
    of = {r["contender"]: r["rounds_s"] for r in rows if r["task"] == task}
    if not {name, OURS} <= set(of):
        return None
    return statistics.median(x / y for x, y in zip(of[name], of[OURS], strict=True))


def allowed(rows: Sequence[Row], row: Row) -> float:
    """How many times as many tokens a contender reads as crossfade."""
    (own,) = (r for r in rows if (r["task"], r["contender"]) == (row["task"], OURS))
    return row["tokens"] / own["tokens"]


def judgments(rows: Sequence[Row]) -> list[str]:
    """A line a task and contender."""
    lines = []
    for r in rows:
        over, most = ratio(rows, r["task"], r["contender"]), allowed(rows, r)
        lines.append(
            [
                f"{r['task']}, {r['pairs']}",
                r["contender"] + (" *" if r["timed"] < r["pairs"] else ""),
                f"{r['tokens']:,}",
                f"{r['seconds']:.3g}",
                f"{r['pairs'] / r['seconds']:.3g}",
                *(
                    ["", "", ""]
                    if over is None or r["contender"] == OURS
                    else [f"{over:.2f}", f"{most:.2f}", f"{over / most:.0%}"]
                ),
            ]
        )
    head = ["matches", "judged by", "tokens read", "s", "matches a second"]
    return table([*head, "times crossfade's", "the tokens allow", "reached"], lines)


def notes(report: dict[str, Any]) -> list[str]:
    if all(r["timed"] == r["pairs"] for r in report["rows"]):
        return []
    every = report["settings"]["every"]
    return [
        f"\\* timed on every {every}th pair and counted up, as each prompt is read by itself there."
    ]
