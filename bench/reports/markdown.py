"""Tables in Markdown, and the words that reports have in common."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a table."""
    return [_line(head), "|---" * len(head) + "|", *map(_line, rows)]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def text(lines: Sequence[str], *notes: str) -> str:
    """A table and the notes under it, each a line of its own."""
    return "\n".join([*lines, "", *notes])


def machine(hardware: Mapping[str, Any]) -> str:
    """What a reader of figures must know of the machine."""
    if "cuda" in hardware:
        return f"{hardware['device']}, CUDA {hardware['cuda']}"
    threads = hardware["threads"]
    isa = f", {hardware['isa']}" if "isa" in hardware else ""
    return f"{hardware['device']}, {threads} thread{'s' * (threads != 1)}{isa}"


def number(x: float | None, form: str = ",.0f") -> str:
    """A figure, or a dash where it was not measured."""
    return "-" if x is None else format(x, form)
