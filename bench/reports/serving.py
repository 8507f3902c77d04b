"""What serving costs: requests with guidance of their own, over HTTP, beside one call for all."""

from __future__ import annotations

import statistics
from typing import Any

from .markdown import machine, number, table, text


def render(report: dict[str, Any]) -> str:
    own, served = statistics.median(report["generate"]), statistics.median(report["served"])
    recipe = statistics.median(report["recipe"])
    pairs = zip(report["served"], report["generate"], strict=True)
    ratios = sorted(s / g for s, g in pairs)
    alone = report["one at a time"]
    rows = [
        ["one call of `crossfade.generate`", number(own), "1.00", f"{own / recipe:.1f}"],
        [
            "served, all at once",
            number(served),
            f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})",
            f"{served / recipe:.1f}",
        ],
        ["served, one at a time", number(alone), f"{alone / own:.2f}", f"{alone / recipe:.1f}"],
        [
            "three forwards a token, one request at a time",
            number(recipe),
            f"{recipe / own:.2f}",
            "1.0",
        ],
    ]
    arrivals = [
        [
            name if name == "all at once" else f"{float(name):g} x what a call decodes",
            number(of["requests_per_s"]) if "requests_per_s" in of else "",
            number(of["tokens_per_s"]),
            *(f"{ms:,.0f}" for ms in (*of["first_ms"], *of["between_ms"])),
        ]
        for name, of in report["rates"].items()
    ]
    s = report["settings"]
    first = table(["decoded by", "tokens / s", "x one call", "x three forwards"], rows)
    second = table(
        [
            "requests come at",
            "requests / s",
            "tokens / s",
            "first token, ms: median",
            "95 %",
            "between tokens, ms: median",
            "95 %",
        ],
        arrivals,
    )
    return text(
        [*first, "", *second],
        f"{machine(report['machine'])}; {s['requests']} requests of {s['prompt']} tokens, each "
        f"with its own weights of two LoRA guides over SmolLM2-135M, {s['new_tokens']} new tokens "
        f"each, float32; one at a time: {s['alone']} of them; `{report['command']}`.",
    )
