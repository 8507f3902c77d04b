"""More than one process: prompts a second against actors of Ray."""

from __future__ import annotations

from typing import Any

from .markdown import machine, table, text


def render(report: dict[str, Any], part: str) -> str:
    """One part of the report."""
    return {"ray": ray, "shards": shards}[part](report)


def ray(report: dict[str, Any]) -> str:
    found = report["ray"]
    rows = []
    for size, timed in found["sizes"].items():
        width, layers, _ = timed["shape"]
        prompts, ways = timed["prompts"], timed["ways"]
        one = next(iter(ways.values()))["rate"]
        rows += [
            [
                f"{size}: {layers} layers of {width}, {prompts:,} prompts",
                way,
                f"{x['seconds']:.1f}",
                f"{x['rate']:,.0f}",
                f"{x['rate'] / one:.2f}",
                f"{x['seconds'] - prompts / x['rate']:.1f}",
                f"{x['equal']:,}",
            ]
            for way, x in ways.items()
        ]
    head = ["model", "by", "s", "prompts/s while decoding", "of one thread's"]
    head += ["s to begin and end", "equal texts"]
    return text(
        table(head, rows),
        f"{found['tokens']} tokens each, {found['batch']} rows at a time in each process, from the "
        f"start of the command to its end. {machine(found['hardware'])}, {found['cores']} cores; "
        f"`{found['command']}`.",
    )


def shards(report: dict[str, Any]) -> str:
    found = report["shards"]
    layers, width, vocab = found["shape"]
    ranks, weights, measured = found["ranks"], found["weights"], found["in ranks"]
    rows, rounds = [], []
    one = found["alone"]["1"]
    for batch, steps in measured["steps"].items():
        alone = one[batch]
        sums, small, whole = (measured[n][batch] for n in ("sums", "small", "rows"))
        paper = alone / ranks + 2 * layers * sums + small
        rows += [
            [batch, "one process, 1 thread", ms(alone), "1.00"],
            *(
                [batch, f"one process, {n} threads", ms(x[batch]), f"{alone / x[batch]:.2f}"]
                for n, x in found["alone"].items()
                if int(n) != 1
            ),
            [batch, f"{ranks} ranks, by the formula", ms(paper), f"{alone / paper:.2f}"],
            *(
                [batch, f"{ranks} ranks, head {how}", ms(x), f"{alone / x:.2f}"]
                for how, x in steps.items()
            ),
        ]
        rounds.append(
            [
                batch,
                f"{4 * width * int(batch):,} B in {1e6 * sums:.0f} us",
                f"{192 * int(batch):,} B in {1e6 * small:.0f} us",
                f"{4 * vocab // ranks * int(batch):,} B in {1e6 * whole:.0f} us",
            ]
        )
    drawn = [
        [f"{x['rows']}", x["draw"], *(ms(x["seconds"][n]) for n in x["seconds"])]
        for x in found["draws"]
    ]
    return text(
        [
            *table(["rows", "way", "ms a step", "of one thread's speed"], rows),
            "",
            f"The formula: one thread's time over {ranks} ranks, {2 * layers} sums of layers, and "
            "the round of the draw, each as measured:",
            "",
            *table(["rows", "a sum of a layer", "a draw in shards", "logits, gathered"], rounds),
            "",
            "A draw of three terms in one process with one thread, from parts one after the other:",
            "",
            *table(["rows", "draw", "whole, ms", "2 parts", "4 parts"], drawn),
        ],
        f"{layers} layers of {width}, {vocab:,} tokens, float32, {weights / 1e6:,.0f} MB read a "
        f"step, gloo, one thread a rank. {machine(found['hardware'])}; `{found['command']}`.",
    )


def ms(seconds: float) -> str:
    return f"{1e3 * seconds:.2f}" if seconds < 1e-2 else f"{1e3 * seconds:.1f}"
