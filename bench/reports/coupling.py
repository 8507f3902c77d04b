"""How often a draft's token is the target's, drawn and by the closed forms."""

from __future__ import annotations

from typing import Any

from .markdown import machine, table, text

EACH = "each token"  # of the vocabulary has noise of its own


def render(report: dict[str, Any]) -> str:
    return "\n".join([*pairs(report), "", groups(report)])


def pairs(report: dict[str, Any]) -> list[str]:
    """The shares of equal tokens."""
    columns = {
        "1 - TV": "optimum",
        "drawn": "drawn",
        "two levels": f"groups of {report['group']}",
        "one level": "one level",
        "bound": "bound",
        "likeliest token": "argmax",
    }
    rows = []
    for r in report["rows"]:
        cells = [f"{r[name]:.3f}" for name in columns.values()]
        cells[1] += f" ± {r['drawn, interval']:.3f}"
        rows.append([r["target"], r["draft"], *cells])
    return table(["target", "draft", *columns], rows)


def groups(report: dict[str, Any]) -> str:
    """What groups of other sizes would give by the closed form, and what noise they cost."""
    noise = report["noise"]
    sizes = [size for size in next(iter(noise.values())) if size != EACH]
    rows = []
    for r in report["rows"]:
        cells = [f"{r[f'groups of {size}']:.3f}" for size in sizes]
        rows.append([f"{r['target']}; {r['draft']}", *cells, f"{r['one level']:.3f}"])
    for vocab, needed in noise.items():
        cells = [f"{needed[size]['philox']:,}" for size in [*sizes, EACH]]
        rows.append([f"calls of Philox, {int(vocab):,} tokens", *cells])
    return text(
        table(["groups of", *sizes, "noise a token"], rows),
        f"{machine(report['machine'])}; `{report['command']}`.",
    )
