"""Many short requests through one running loop: whether what it holds grows."""

from __future__ import annotations

from typing import Any

from .markdown import table, text

HELD = {
    "objects": "objects of Python",
    "rss_mb": "resident memory, MB",
    "cache_bytes": "caches, bytes",
    "peak_bytes": "caches and buffers at their peak, bytes",
}


def render(report: dict[str, Any]) -> str:
    times = ["after two tenths", "at the end"]
    rows = [[what, *(f"{report[t][key]:,.0f}" for t in times)] for key, what in HELD.items()]
    grows = "What is held grows" if report["grows"] else "Nothing grows"
    return text(
        table(["held", *times], rows),
        f"{grows}. {report['left']:,} of {report['requests']:,} requests ended, "
        f"{report['tokens']:,} tokens in {report['seconds']:.0f} s; `{report['command']}`.",
    )
