"""What chunk beam search costs: crossfade's, the official code's algorithm, and value heads."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from typing import Any

from . import OURS
from .markdown import machine, number, table, text

OFFICIAL = "official algorithm"
PLAIN = "plain sampling"
ONE, FOUR = "one Q-head", "four Q-heads"
SCALAR, APART = "one scalar head", "one Q-head, with forwards of its own"
Row = dict[str, Any]


def render(report: dict[str, Any]) -> str:
    rows = sorted(report["rows"], key=lambda r: (-r["shape"]["width"], *r["shape"].values()))
    rounds = sorted({len(r["rounds_s"]) for r in rows})
    note = (
        f"{machine(report['machine'])}; {report['settings']['model']}; torch "
        f"{report['versions']['torch']}; `{report['command']}`, shape by shape, medians of "
        f"{' or '.join(map(str, rounds))} rounds. Peak: memory over what was held before."
    )
    found = report.get("heads", [])
    return text(
        searches(rows), note, *notes(rows), *(["", text(heads(found), HEADS)] if found else [])
    )


HEADS = (
    "Searches by value heads over the policy's own backbone (full Q-heads), against plain sampling "
    "of as many rows: processor seconds, the median over rounds of those over plain sampling's."
)


def over_plain(rows: Sequence[Row], row: Row) -> float | None:
    """How many times the processor seconds of plain sampling a search takes, the median."""
    plain = of(rows, row["shape"], PLAIN)
    if plain is None:
        return None
    pairs = zip(row["processor_s"], plain["processor_s"], strict=True)
    return statistics.median(x / y for x, y in pairs)


def heads(rows: Sequence[Row]) -> list[str]:
    """A line a shape and contender."""
    lines = [
        [
            wnl(r["shape"]),
            lengths(r["shape"]),
            r["contender"],
            f"{statistics.median(r['processor_s']):,.2f}",
            number(over_plain(rows, r), ".2f"),
            " + ".join(map(str, r["forwards"])),
        ]
        for r in rows
    ]
    head = ["W, N, L", "prompt + new", "rows chosen by", "processor s", "x plain sampling"]
    return table([*head, "forwards, a model"], lines)


def of(rows: Sequence[Row], shape: Any, name: str) -> Row | None:
    return next((r for r in rows if (r["shape"], r["contender"]) == (shape, name)), None)


def ratio(rows: Sequence[Row], shape: Any, name: str) -> float | None:
    """How many times longer contender `name` takes than crossfade, the median over rounds."""
    one, other = of(rows, shape, name), of(rows, shape, OURS)
    if one is None or other is None:
        return None
    pairs = zip(one["rounds_s"], other["rounds_s"], strict=True)
    return statistics.median(x / y for x, y in pairs)


def wnl(shape: dict[str, int]) -> str:
    return f"{shape['width']}, {shape['samples']}, {shape['chunk_length']}"


def lengths(shape: dict[str, int]) -> str:
    return f"{shape['prompt']:,} + {shape['new']}"


def searches(rows: Sequence[Row]) -> list[str]:
    """A line a shape and contender."""
    lines = []
    for r in rows:
        over = ratio(rows, r["shape"], r["contender"])
        line = [
            wnl(r["shape"]),
            lengths(r["shape"]),
            r["contender"] + (" *" if r.get("scored_every", 1) > 1 else ""),
            f"{r['seconds']:,.1f}" + ("" if over is None else f" ({over:.1f})"),
            number(r.get("scoring"), ".0%"),
            number(r["base_tokens"]),
            number(r["value_tokens"]),
            number(r["peak_mb"]),
        ]
        lines.append(line)
    head = ["W, N, L", "prompt + new", "searched by", "s (x crossfade)", "of it scoring"]
    return table([*head, "tokens read by the base", "by value models", "peak, MB"], lines)


def notes(rows: Sequence[Row]) -> Iterator[str]:
    timed = sorted({r["scored_every"] for r in rows if r.get("scored_every", 1) > 1})
    if timed:
        every = " or ".join(f"{n}th" for n in timed)
        yield (
            f"\\* summed up: all tokens were decoded, scoring was timed at every {every} boundary "
            "and interpolated between."
        )
    prompts = {
        (s["prompt"], s["width"] * s["samples"]): r["prompt_mb"] for r in rows for s in [r["shape"]]
    }
    sizes = (
        f"{n:,} tokens {mb['one row']:,.1f} MB once, {mb['all rows']:,.1f} MB on {count} rows"
        for (n, count), mb in sorted(prompts.items())
    )
    yield f"Keys and values of a prompt, a model: {'; '.join(sizes)}."
    known = [r for r in rows if "known_scoring" in r]
    if known:
        here, before = (
            ", ".join(f"{r[x]:.0%}" for r in known) for x in ("scoring", "known_scoring")
        )
        shapes = "; ".join(f"{wnl(r['shape'])} at {lengths(r['shape'])}" for r in known)
        yield (
            f"Scoring takes {here} of the official algorithm's time ({shapes}), {before} in an "
            "earlier measurement on two cores."
        )
