"""Prompts of any number through one loop, against parts that each wait for their last row."""

from __future__ import annotations

from typing import Any

from .markdown import machine, table, text


def render(report: dict[str, Any]) -> str:
    ratios, seconds = report["ratios"], report["seconds"]
    return text(
        table(["decoded by", "s"], [[name, f"{s:.1f}"] for name, s in seconds.items()]),
        f"{report['prompts']:,} prompts, {report['mean_tokens']:.0f} tokens each on average and "
        f"{report['max_new_tokens']} at most, {report['max_batch']} rows at a time: "
        f"{report['ratio']:.2f} times as fast, the median of {report['rounds']} rounds "
        f"({min(ratios):.2f} to {max(ratios):.2f}); by the number of steps "
        f"{report['steps_ratio']:.2f}. {report['prompts_equal']:,} prompts got the same tokens. "
        f"{machine(report['hardware'])}; `{report['command']}`.",
    )
