"""The table that `crossfade bench ops` prints, from its figures alone.

It imports no torch, so that the tables of the documentation can be made without.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

FLOOR, OURS = "read", "ours"  # among the contenders of a case


def table(report: dict[str, Any]) -> Iterator[str]:
    """The report as the lines of a Markdown table."""
    results = report["results"]
    names = list(dict.fromkeys(n for r in results for n in r["us"] if n != FLOOR))
    peers = [n for n in names if n != OURS]
    warm = any("warm_us" in r for r in results)
    titles = ["inputs", "sampling", "read, us", "ours, us", "ours / read"]
    titles += ["the same, warm"] * warm + [f"{p} / ours" for p in peers]
    yield f"| {' | '.join(titles)} |"
    yield "|---" * len(titles) + "|"
    for r in results:
        us, rows = r["us"], r.get("rows", "normal")
        cells = [
            f"{r['dtype']} {r['batch']} x {r['vocab']:,}",
            r["setting"] + (f", {rows} rows" if rows != "normal" else ""),
            *(f"{us[name]:,.0f}" for name in (FLOOR, OURS)),
            *(f"{x[OURS] / x[FLOOR]:.2f}" for x in ([us, r["warm_us"]] if warm else [us])),
            *(f"{us[p] / us[OURS]:.1f}" if p in us else "-" for p in peers),
        ]
        yield f"| {' | '.join(cells)} |"
