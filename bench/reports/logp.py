"""Log-probs of a head and their gradients: ours, peers, and the bare products."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .markdown import machine, number, table, text


def render(report: dict[str, Any]) -> str:
    s = report["sizes"]
    device = s.get("device", "cpu")
    means, dpo = ([r for r in report["rows"] if (r["head"] == "dpo") is x] for x in (False, True))
    lines = steps(means, "head", device) if means else []
    if dpo:
        lines += [""] * bool(means) + steps(dpo, "head, DPO loss", device)
    shape = f"{s['tokens']:,} tokens, hidden {s['hidden']:,}, vocabulary {s['vocab']:,}"
    absent = report.get("missing") or []
    left_out = f" Not installed: {', '.join(absent)}." if absent else ""
    return text(
        lines,
        f"{shape}, {s.get('dtype', 'float32')}; {machine(report['machine'])}; "
        f"`{report['command']}`.{left_out}",
    )


def steps(rows: Sequence[dict[str, Any]], what: str, device: str) -> list[str]:
    """A line a head and contender, the bare products first."""
    unit, scale, in_tiles = ("s", 1, " in tiles") if device == "cpu" else ("ms", 1e3, "")
    lines = []
    for r in rows:
        head = "trained" if r["head"] == "dpo" else r["head"]
        times = {name: f"{scale * t:.2f}" for name, t in r["seconds"].items()}
        lines.append([head, f"{r['products']} products{in_tiles}", times["products"], "1.00", "-"])
        for name, ratio in r["over_products"].items():
            memory = number(r["memory_mb"][name])
            lines.append([head, name, times[name], f"{ratio:.2f}", memory])
    return table([what, "contender", unit, "over the bare products", "memory, MB"], lines)
