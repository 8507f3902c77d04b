"""What drafts are worth: plain decoding, crossfade with a draft, and Hugging Face with its own."""

from __future__ import annotations

from typing import Any

from . import OURS
from .markdown import machine, number, table, text

EDITS, EDITS_BLEND = "edits", "edits, a blend of two"
QUOTES, FREE = "quotes", "free text"
SEPARATE, FIXED = "separate models", "separate models, 4 guesses"
PLAIN = "crossfade, plain"
HF_PLAIN = "`generate`"
HF_LOOKUP, HF_ASSISTANT = "`prompt_lookup_num_tokens`", "`assistant_model`, 8 layers"


def render(report: dict[str, Any]) -> str:
    settings, rows = report["settings"], report["rows"]
    counts = sorted({row["rounds"] for row in rows}, reverse=True)
    rounds = " or ".join(map(str, counts))
    return text(
        speedups(rows),
        f"Up to {settings['new']} new tokens a row, {settings['edited']} of edits; "
        f"{settings['model']}; "
        f"{machine(report['machine'])}; torch {report['versions']['torch']}, transformers "
        f"{report['versions']['transformers']}; `{report['command']}`, {rounds} rounds in turns.",
    )


def speedups(rows: list[dict[str, Any]]) -> list[str]:
    """A line a task, batch and contender."""
    head = ["task", "batch", "decoded by", "s", "times plain (95 %)", "accepted", "drafted tokens"]
    lines = []
    for row in rows:
        low, high = row["interval"]
        of_draft = [""] * 4
        if row["contender"] == OURS:
            of_draft = [
                f"{row['acceptance']:.0%}",
                f"{row['share']:.0%}",
                number(row.get("predicted"), ".2f"),
                f"{row['same']} of {row['rows']}",
            ]
        ratio = f"{row['ratio']:.2f} ({low:.2f} to {high:.2f})"
        own = [row["task"], str(row["batch"]), row["contender"], f"{row['seconds']:.3g}"]
        lines.append([*own, "" if row["contender"] == PLAIN else ratio, *of_draft])
    return table([*head, "by the formula", "rows the same"], lines)
