"""Forks of caches: in place, by Hugging Face's copy of all, and a plain copy of as many bytes."""

from __future__ import annotations

from typing import Any

from .markdown import machine, table, text


def render(report: dict[str, Any]) -> str:
    names = list(report["rows"][0]["ms"])
    head = ["parents", "positions", *(f"{n}, ms" for n in names), "ours / copy", "peer / ours"]
    rows = [
        [
            r["parents"],
            f"{r['start']} to {r['live']}",
            *(f"{r['ms'][n]:.3f}" for n in names),
            f"{r['over_copy']:.2f}",
            f"{r['index_select_over_ours']:.1f}",
        ]
        for r in report["rows"]
    ]
    return text(table(head, rows), f"{machine(report['machine'])}; `{report['command']}`.")
