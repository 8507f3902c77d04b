"""What it saves to ask guides under a support less often, and for fewer columns."""

from __future__ import annotations

from typing import Any

from .markdown import machine, table, text


def render(report: dict[str, Any]) -> str:
    rows = report["rows"]
    batches = sorted({r["batch"] for r in rows})
    cells = {
        (r["way"], r["batch"]): f"{r['step_ms']:.1f} ({r['over_neither']:.2f}, "
        f"{r['guide_forwards']:.0%})"
        for r in rows
    }
    ways = dict.fromkeys(r["way"] for r in rows)
    titles = [f"batch {b}: ms a step (x neither, guide's forwards)" for b in batches]
    lines = table(
        ["guides asked for less", *titles], [[w, *(cells[w, b] for b in batches)] for w in ways]
    )
    return text(lines, f"{machine(report['machine'])}; `{report['command']}`.")
