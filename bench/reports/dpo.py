"""DPO by our trainer and by TRL's own: what a step takes and holds, and the curves' ends."""

from __future__ import annotations

from typing import Any

from .markdown import machine, number, table, text


def render(report: dict[str, Any]) -> str:
    rows, s = report["rows"], report["sizes"]
    lines = [
        [
            r["trained"],
            name,
            f"{seconds:.2f}",
            number(r["memory_mb"][name]),
            f"{r['loss'][name][0]:.4f}, {r['loss'][name][-1]:.4f}",
        ]
        for r in rows
        for name, seconds in r["step_seconds"].items()
    ]
    off = ", ".join(f"{r['largest_difference']:.1e} ({r['case']})" for r in rows)
    return text(
        table(["trained", "trainer", "s a step", "memory, MB", "loss, first and last step"], lines),
        f"SmolLM2-135M-Instruct, float32; {s['steps']} steps of {s['batch']} pairs, "
        f"{rows[0]['tokens_a_step']:.0f} tokens a step; at any step the losses differ by at most "
        f"{off}; TRL {report['versions']['trl']}; {machine(report['machine'])}; "
        f"`{report['command']}`.",
    )
