"""The demo's fader: what each of its positions does to the texts."""

from __future__ import annotations

from typing import Any

from .markdown import table, text


def render(report: dict[str, Any]) -> str:
    rows = [
        [
            f"{p['weight']:g}",
            f"{p['sentiment']:+.2f} ± {p['sentiment_interval']:.2f}",
            f"{p['words']:.1f} ± {p['words_interval']:.1f}",
            f"{p['perplexity']:.1f}",
            f"{p['distinct_2']:.2f}",
            f"{p['kl']:.3f} ± {p['kl_interval']:.3f}",
        ]
        for p in report["positions"]
    ]
    head = ["w", "sentiment (VADER)", "words a text", "perplexity (base)", "distinct-2"]
    return text(
        table([*head, "KL to the base, nats a token"], rows),
        f"{len(report['positions'][0]['texts'])} texts a position, ± is a 95 % interval of the "
        "mean; `crossfade demo --json`.",
    )
