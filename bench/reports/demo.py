"""The demo's fader: what each of its positions does to the texts, and how it was chosen."""

from __future__ import annotations

from typing import Any

from .markdown import number, table, text


def render(report: dict[str, Any]) -> str:
    """What `crossfade demo --json` printed."""
    base = next(p["perplexity"] for p in report["positions"] if p["weight"] == 0)
    rows = [
        [
            f"{p['weight']:g}" + (" (base)" if p["weight"] == 0 else ""),
            f"{p['sentiment']:+.2f} ± {p['sentiment_interval']:.2f}",
            f"{p['words']:.1f} ± {p['words_interval']:.1f}",
            f"{p['perplexity']:.2f} ± {p['perplexity_interval']:.2f}",
            f"{p['perplexity'] / base:.2f}",
            number(p["distinct_2"], ".2f"),
            f"{p['kl']:.3f} ± {p['kl_interval']:.3f}",
        ]
        for p in report["positions"]
    ]
    head = ["w", "sentiment (VADER)", "words a text", "perplexity (base)", "x the base's own"]
    head += ["distinct-2", "KL to the base, nats a token"]
    return text(
        table(head, rows),
        f"`{report['formula']}`, temperature {report['settings']['temperature']:g}; "
        f"{len(report['positions'][0]['texts'])} texts a position, ± is half of a 95 % interval; "
        "`crossfade demo --json`.",
    )


def moods(report: dict[str, Any]) -> str:
    """What `bench/reproduce/moods.py --json` wrote."""
    rows = [
        [
            f"`{formula}`{f', {pair}' if pair else ''}",
            f"{end['temperature']:g}",
            f"{end['from']:g} to {end['to']:g}",
            f"{end['sentiment'][0]:+.2f} to {end['sentiment'][1]:+.2f}",
            f"{end['range']:.2f}",
            f"{end['perplexity_over_base']:.2f}{'' if end['within'] else ' (too much)'}",
        ]
        for end in report["ends"]
        for formula, _, pair in [end["candidate"].partition(": ")]
    ]
    head = [
        "blend",
        "temperature",
        "w",
        "sentiment (VADER)",
        "range",
        "perplexity, x the base's own",
    ]
    settings = report["settings"]
    texts = len(settings["prompts"]) * settings["samples"]
    return text(
        table(head, rows),
        f"{texts} texts a position, on other prompts than the demo's; "
        "`python bench/reproduce/moods.py`. The perplexity is the largest of the positions.",
    )
