"""More than one process: prompts a second against actors of Ray."""

from __future__ import annotations

from typing import Any

from .markdown import machine, table, text


def render(report: dict[str, Any], part: str) -> str:
    """One part of the report."""
    return {"ray": ray}[part](report)


def ray(report: dict[str, Any]) -> str:
    found = report["ray"]
    rows = []
    for size, timed in found["sizes"].items():
        width, layers, _ = timed["shape"]
        prompts, ways = timed["prompts"], timed["ways"]
        one = next(iter(ways.values()))["rate"]
        rows += [
            [
                f"{size}: {layers} layers of {width}, {prompts:,} prompts",
                way,
                f"{x['seconds']:.1f}",
                f"{x['rate']:,.0f}",
                f"{x['rate'] / one:.2f}",
                f"{x['seconds'] - prompts / x['rate']:.1f}",
                f"{x['equal']:,}",
            ]
            for way, x in ways.items()
        ]
    head = ["model", "by", "s", "prompts/s while decoding", "of one thread's"]
    head += ["s to begin and end", "equal texts"]
    return text(
        table(head, rows),
        f"{found['tokens']} tokens each, {found['batch']} rows at a time in each process, from the "
        f"start of the command to its end. {machine(found['hardware'])}, {found['cores']} cores; "
        f"`{found['command']}`.",
    )
