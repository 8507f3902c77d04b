"""What a token costs on a CPU: crossfade beside llama.cpp and a loop around it."""

from __future__ import annotations

import random
import statistics
from collections.abc import Iterator, Sequence
from typing import Any

from . import OURS
from .markdown import machine, number, table, text

Row = dict[str, Any]

ONE, THREE, ADAPTERS = "one model", "three models", "two adapters over one"
LLAMA, NUMPY, MODULES = "llama.cpp", "llama.cpp + NumPy", f"{OURS}, no tape"
LIKE = {"float32": "F16", "bfloat16": "F16", "8 bits": "Q8_0", "4 bits": "Q4_1"}


def render(report: dict[str, Any]) -> str:
    parts = {name: part["rows"] for name, part in report["parts"].items()}
    lines: list[str] = []
    for title, rows, make in (
        ("Steps", [*parts.get("steps", []), *parts.get("big", [])], steps),
        ("Tokens beyond the kernels that read weights and caches", parts.get("beyond"), beyond),
        ("Prompts", parts.get("prompts"), prompts),
        ("Short calls", parts.get("calls"), calls),
        ("Errors", parts.get("errors"), errors),
    ):
        if rows:
            lines += [f"{title}:", "", *make(rows), ""]
    return text(lines[:-1], *notes(report))


def ratio(peer: Sequence[float], own: Sequence[float]) -> tuple[float, float, float]:
    """The median of the rounds' ratios, and an interval of 95 % from resampled rounds."""
    found = [a / b for a, b in zip(peer, own, strict=True)]
    pick = random.Random(0)
    medians = sorted(statistics.median(pick.choices(found, k=len(found))) for _ in range(1000))
    return statistics.median(found), medians[25], medians[974]


def told(peer: Row | None, own: Row, field: str) -> str:
    """How many times as long a peer takes."""
    if peer is None:
        return ""
    return "{:.2f} ({:.2f} to {:.2f})".format(*ratio(peer[field], own[field]))


def steps(rows: Sequence[Row]) -> list[str]:
    """A line a contender and batch: its step, its floor, and how many times longer others take."""
    lines = []
    for r in rows:
        llama = None
        if r["by"].startswith(OURS):  # Adapters are set against separate models.
            of, by = (ONE, LLAMA) if r["of"] == ONE else (THREE, NUMPY)
            llama = find(rows, r, of=of, by=by, weights=LIKE[r["weights"]])
        modules = find(rows, r, by=MODULES) if r["by"] == OURS else None
        lines.append(
            [
                "1B, random" if "1B" in r["size"] else r["size"],
                *(r["of"], r["by"], r["weights"], str(r["batch"])),
                f"{r['step_ms']:,.1f}",
                f"{r['step_ms'] / r['floor_ms']:.2f}",
                told(llama, r, "rounds_ms"),
                told(modules, r, "rounds_ms"),
            ]
        )
    head = ["size", "what", "decoded by", "weights", "batch", "ms", "x floor"]
    return table([*head, "llama.cpp / this", "no tape / this"], lines)


def find(rows: Sequence[Row], like: Row, **other: Any) -> Row | None:
    """The row that differs from another one in these fields alone."""
    keys = [k for k in ("size", "of", "by", "weights", "batch", "tokens") if k in like]
    wanted = {k: like[k] for k in keys} | other
    return next((r for r in rows if {k: r[k] for k in keys} == wanted), None)


def beyond(rows: Sequence[Row]) -> list[str]:
    lines = []
    for r in rows:
        fields = ("token_ms", "kernels_ms", "other_instructions_ms", "outside_tape_ms", "beyond_ms")
        figures = [number(r.get(f), ".2f") for f in fields]
        torch = "all" if not r["taped"] else ", ".join(r["torch_runs"]) or "nothing"
        lines.append([r["model"], *figures, torch])
    head = ["model", "token, ms", "linear layers and attention", "the tape's other instructions"]
    return table([*head, "outside the tape", "beyond the kernels", "run by torch"], lines)


def prompts(rows: Sequence[Row]) -> list[str]:
    lines = []
    for r in rows:
        llama = find(rows, r, by=LLAMA, weights=LIKE.get(r["weights"], ""))
        over = told(llama, r, "rounds_s")
        lines.append([f"{r['tokens']:,}", r["by"], r["weights"], f"{r['tokens_per_s']:,.0f}", over])
    return table(["tokens", "read by", "weights", "tokens / s", "llama.cpp's time / this"], lines)


def calls(rows: Sequence[Row]) -> list[str]:
    lines = []
    for r in (r for r in rows if r["by"] == OURS):
        before = find(rows, r, by=MODULES)
        both = [x for x in (before, r) if x is not None]
        times = [f"{1e3 * statistics.median(x['rounds_s']):,.0f}" for x in both]
        fixed = [f"{1e3 * statistics.median(x['fixed_s']):,.0f}" for x in both]
        lines.append(
            [r["of"], r["weights"], *times, told(before, r, "rounds_s"), " and ".join(fixed)]
        )
    head = ["what", "weights", "no tape, ms", "with it, ms", "no tape / this"]
    return table([*head, "of these beyond 20 steps, ms"], lines)


def errors(rows: Sequence[Row]) -> list[str]:
    lines = [
        [r["model"], r["by"], r["weights"], f"{r['kl']:.2g}", f"{r['perplexity_ratio']:.4f}",
         f"{r['same_best']:.1%}"]
        for r in rows
        if r["weights"] != "float32"
    ]  # fmt: skip
    head = ["model", "by", "weights", "KL, nats", "perplexity / float32's", "same best token"]
    return table(head, lines)


def notes(report: dict[str, Any]) -> Iterator[str]:
    settings, versions = report["settings"], report["versions"]
    loads = ", ".join(f"{n} {p['load_before']:.1f}" for n, p in report["parts"].items())
    commands = dict.fromkeys(p["command"] for p in report["parts"].values())
    yield (
        f"{machine(report['machine'])}; prompts of {settings['prompt']} tokens, in "
        f"larger batches of {4 * settings['prompt']} in all at most; torch "
        f"{versions['torch']}; {' and '.join(f'`{c}`' for c in commands)}. In brackets intervals "
        "of 95 %. Floor: the larger of a read of all weights and live caches and of the products, "
        "at rates measured in the same rounds. On one thread, times are the "
        "processor's. llama.cpp's Q8_0 and Q4_1 are set against 8 and 4 "
        "bits, F16 against the floats; adapters against three models. Load of the machine before "
        f"each part: {loads}."
    )
    for part in ("steps", "big"):
        rows = report["parts"].get(part, {}).get("rows")
        if rows:
            rates = rows[0]["rates"]
            yield (
                f"Rates ({part}): reads {rates['read']:.1f} GB/s, products "
                f"{rates['float32']:.0f} GFLOP/s in float32, {rates['bfloat16']:.0f} in bfloat16."
            )
    if built := report.get("llama.cpp"):
        yield f"llama-cpp-python {built['version']}, {built['system']}"
    compiled = [
        r["first_call_s"]
        for p in report["parts"].values()
        for r in p["rows"]
        if r.get("by", "").endswith("compiled") and "first_call_s" in r
    ]
    if compiled:
        yield f"First calls that compile took {min(compiled):.0f} to {max(compiled):.0f} s."
