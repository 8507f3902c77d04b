"""What a decoding step costs, with crossfade's engine and with what users write instead."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from typing import Any

from . import OURS
from .markdown import machine, number, table, text

Row = dict[str, Any]


def render(report: dict[str, Any]) -> str:
    settings = report["settings"]
    models = " and ".join(dict.fromkeys(settings["models"].values()))
    note = (
        f"{machine(report['machine'])}; {models}; prompts of {settings['prompt']} "
        f"tokens; torch {report['versions']['torch']}; `{report['command']}`. Read: of all "
        "weights and live caches once. Peak: memory over what was held before, at the largest "
        "batch; kept: of it after the call."
    )
    return text(steps(report["rows"]), note, *notes(report))


def ratio(rows: Sequence[Row], one: Any, other: Any, batch: int) -> float | None:
    """How many times longer a step of `one` takes than one of `other`, the median over rounds.

    Both are a set and a contender.
    """
    found = {(r["set"], r["contender"]): r["steps_ms"] for r in rows if r["batch"] == batch}
    if one not in found or other not in found:
        return None
    return statistics.median(x / y for x, y in zip(found[one], found[other], strict=True))


def steps(rows: Sequence[Row]) -> list[str]:
    """A line a contender: its step at each batch, and its ratios to the read and to crossfade's."""
    batches = list(dict.fromkeys(r["batch"] for r in rows))
    lines = []
    for key in dict.fromkeys((r["set"], r["contender"]) for r in rows):
        mine = {r["batch"]: r for r in rows if (r["set"], r["contender"]) == key}
        cells = []
        for b in batches:
            over = ratio(rows, key, (key[0], OURS), b)
            r = mine.get(b)
            cells.append("-")
            if r is not None and over is not None:
                cells[-1] = f"{r['step_ms']:,.1f} ({r['step_ms'] / r['read_ms']:.1f}, {over:.2f})"
        kept = max(r["kept_mb"] or 0 for r in mine.values())
        lines.append([*key, *cells, number(mine[max(mine)]["peak_mb"]), number(kept)])
    titles = [f"batch {b}: ms (x read, x crossfade)" for b in batches]
    return table(["what", "decoded by", *titles, "peak, MB", "kept, MB"], lines)


def notes(report: dict[str, Any]) -> Iterator[str]:
    compiled = [r["setup_s"] for r in report["rows"] if r["contender"].endswith("compiled")]
    if compiled:
        yield f"Compiling took {min(compiled):.0f} to {max(compiled):.0f} s a shape."
    if queue := report.get("queue"):
        times = queue["seconds"]
        yield (
            f"{queue['requests']} requests of {min(queue['lengths'])} to {max(queue['lengths'])} "
            f"tokens ({queue['set']}), {queue['max_batch']} rows at a time: {times['queue']:.0f} s "
            f"where rows join as others end, {times['fixed batches']:.0f} s in fixed batches: "
            f"{queue['ratio']:.2f} times; by the steps alone {queue['ideal_ratio']:.2f}."
        )
    found = report.get("baselines", [])
    for key in dict.fromkeys((b["set"], b["contender"]) for b in found):
        mine = [b for b in found if (b["set"], b["contender"]) == key]
        here, known = (", ".join(f"{b[x]:.1f}" for b in mine) for x in ("over_greedy", "known"))
        far = ", ".join(str(b["batch"]) for b in mine if b["flagged"])
        told = f" Over a fifth off at batch {far}." if far else ""
        yield (
            f"{key[1]} ({key[0]}): {here} times Hugging Face's greedy step here, {known} in an "
            f"earlier measurement on two cores.{told}"
        )
