"""Whether one checkout decodes as fast as another: ratios of calls and steps that took turns."""

from __future__ import annotations

from typing import Any

from .markdown import table, text

MEASURES = ("step", "call", "call of one token")


def render(report: dict[str, Any]) -> str:
    found: dict[str, dict[str, Any]] = {}
    for r in report["rows"]:
        found.setdefault(r["case"], {})[r["of"]] = r
    rows = []
    for case, of in found.items():
        finest = of.get("step", of["call"])
        wall = finest["wall"]
        rows.append(
            [
                case,
                *(f"{wall[x]:.2f}" if wall else "-" for x in ("before_ms", "after_ms")),
                *(ratio(of.get(m, {}).get("wall")) for m in MEASURES),
                ratio(finest["cpu"]),
            ]
        )
    head = ["case", "before, ms", "after, ms", *(f"{m}, after / before" for m in MEASURES)]
    return text(
        table([*head, "the same in CPU time"], rows),
        "Milliseconds and CPU time are those of a step, or of a call where no step was timed; in "
        f"brackets intervals of 95 %. Before: {report['before'][:7]}, after: "
        f"{report['after'][:7]}. {report['machine']}; `{report['command']}`.",
    )


def ratio(of: dict[str, Any] | None) -> str:
    """The median of the pairs' ratios with its interval."""
    if not of:
        return "-"
    return "{:.2f} ({:.2f} to {:.2f})".format(of["ratio"], *of["interval"])
