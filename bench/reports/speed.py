"""README's one table of speed: a row a claim, from the reports of many benches.

A claim is set against what users pick instead, and where they have a choice that is not a matter of
form, against the fastest. Its figures are not the best case but those of 8 rows, of the largest
batch or of the shortest texts, and a range says how the ratio changes with them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from . import OURS, correct, decode, judge, search
from .markdown import machine, table, text

Report = dict[str, Any]
Claim = list[str]  # the cells of a row
UNPROVEN, SLOW = "†", "‡"
SAMPLING, ROWS = "top-k 50, top-p 0.9", 8
STEPS = {  # set and contender of decode.py, and what is said of them
    ("single", "Hugging Face"): ("a token of one model", "`model.generate`"),
    ("LoRA guides", "PEFT mixed batch"): (
        "a token of a base and two LoRA guides",
        "PEFT's mixed batch",
    ),
    ("separate models", "three forwards"): ("a token of three models", "a forward for each"),
}
HEADS = {"dpo": "DPO's loss, head trained", "frozen": "mean log-prob, head frozen"}


def render(
    cpu: Report,
    steps: Report,
    searches: Report,
    judgments: Report,
    corrections: Report,
    logp: Report,
    dpo: Report,
    gpu: Report,
) -> str:
    """The table. `gpu` is of a GPU and unproven since, as the note says."""
    claims = [
        *of_kernels(cpu, ["float32", "bfloat16"]),
        *of_steps(steps),
        *of_queue(steps),
        *of_searches(searches),
        *of_judgments(judgments),
        *of_corrections(corrections),
        *of_log_probs(logp),
        *of_training(dpo),
        *of_kernels(gpu["bench"]["figures"], ["bfloat16"], UNPROVEN),
        *of_steps(gpu["steps"]["figures"], UNPROVEN),
    ]
    return text(
        table(
            ["claim", "crossfade", "what users pick instead", "times faster", "hardware"], claims
        ),
        "Ranges are over all batches, or over all lengths of prompts and texts that were timed in "
        "full; the figures beside them are those of the largest batch, or of the shortest texts.",
        f"{UNPROVEN} Measured before tokens were drawn on two levels of noise and before calls ran "
        "copies of a model's modules; what is so today is unproven, as neither has run on a GPU "
        "since.",
        *of_slow_peers(steps),
    )


def of_kernels(report: Report, dtypes: Sequence[str], mark: str = "") -> Iterator[Claim]:
    for r in report["results"]:
        if (r["batch"], r["setting"]) == (ROWS, SAMPLING) and r["dtype"] in dtypes:
            ours, chain = r["us"]["ours"], r["us"]["torch chain"]
            yield [
                f"blend three models' logits and draw, {SAMPLING}, {ROWS} x {r['vocab']:,}, "
                f"{r['dtype']}",
                duration(ours),
                f"torch and Hugging Face's processors: {duration(chain)}",
                times([chain / ours]),
                where(report["hardware"], mark),
            ]


def of_steps(report: Report, mark: str = "") -> Iterator[Claim]:
    rows = report["rows"]
    batches = sorted({r["batch"] for r in rows})
    for (group, peer), (what, instead) in STEPS.items():
        over = [decode.ratio(rows, (group, peer), (group, OURS), b) for b in batches]
        ms = {
            r["contender"]: r["step_ms"]
            for r in rows
            if (r["set"], r["batch"]) == (group, batches[-1])
        }
        if None not in over:
            yield [
                f"{what}, {report['settings']['models'][group]}, batch {batches[-1]}",
                f"{ms[OURS]:.1f} ms",
                f"{instead}: {ms[peer]:.1f} ms",
                times(over) + (f" {SLOW}" if slow_peers(report, group, peer) else ""),
                where(report["machine"], mark),
            ]


def slow_peers(report: Report, group: str, peer: str) -> bool:
    """Whether a peer was slower than it is known to be, in Hugging Face's steps, at some batch."""
    return any(
        b["flagged"] and b["off"] > 0 and (b["set"], b["contender"]) == (group, peer)
        for b in report.get("baselines", [])
    )


def of_slow_peers(report: Report) -> Iterator[str]:
    """What the ratios to such peers would be, had these been as fast as they are known to be."""
    for group, peer in STEPS:
        if slow_peers(report, group, peer):
            known = [
                over * b["known"] / b["over_greedy"]
                for b in report["baselines"]
                if (b["set"], b["contender"]) == (group, peer)
                if (over := decode.ratio(report["rows"], (group, peer), (group, OURS), b["batch"]))
            ]
            yield (
                f"{SLOW} {STEPS[group, peer][1]} was slower here, in steps of `model.generate`, "
                f"than in an earlier measurement on two cores, by which it is {times(known)} times."
            )


def of_queue(report: Report) -> Iterator[Claim]:
    if queue := report.get("queue"):
        seconds, lengths = queue["seconds"], queue["lengths"]
        yield [
            f"{queue['requests']} requests of {min(lengths)} to {max(lengths)} tokens, "
            f"{queue['set']}, {queue['max_batch']} rows at a time",
            f"{seconds['queue']:.0f} s",
            f"batches that wait for their longest row: {seconds['fixed batches']:.0f} s",
            times([queue["ratio"]]),
            where(report["machine"]),
        ]


def of_searches(report: Report) -> Iterator[Claim]:
    full = [r for r in report["rows"] if r.get("scored_every") == 1]
    for setting in dict.fromkeys(search.wnl(r["shape"]) for r in full):
        mine = [r for r in full if search.wnl(r["shape"]) == setting]
        first = min(mine, key=lambda r: (r["shape"]["prompt"], r["shape"]["new"]))
        ours = search.of(report["rows"], first["shape"], OURS)
        assert ours is not None
        yield [
            f"chunk-level beam search, W, N, L = {setting}, {search.lengths(first['shape'])} "
            f"tokens, {report['settings']['model']}",
            f"{ours['seconds']:.1f} s",
            f"the official algorithm: {first['seconds']:.1f} s",
            times([search.ratio(report["rows"], r["shape"], search.OFFICIAL) for r in mine]),
            where(report["machine"]),
        ]


def of_judgments(report: Report) -> Iterator[Claim]:
    """The tournament, against the fastest of the others."""
    s, rows = report["settings"], [r for r in report["rows"] if r["task"] == "a tournament"]
    ours, *others = rows
    peer = min(others, key=lambda r: r["seconds"])
    yield [
        f"a tournament of {s['answers']} answers of {s['answer']} tokens to a context of "
        f"{s['context']}, judged in both orders, {s['model']}",
        f"{ours['seconds']:.1f} s",
        f"{peer['contender']}: {peer['seconds']:.1f} s",
        times([judge.ratio(rows, ours["task"], peer["contender"])]),
        where(report["machine"]),
    ]


def of_corrections(report: Report) -> Iterator[Claim]:
    s, rows = report["settings"], report["rows"]
    ours, *others = rows
    yield [
        f"{ours['corrections']} corrections of {s['new_tokens']} tokens, toward objectives of "
        f"their own, {s['model']}",
        f"{ours['seconds']:.1f} s",
        "; ".join(f"{peer['contender']}: {peer['seconds']:.1f} s" for peer in others),
        "; ".join(times([correct.ratio(rows, peer["contender"])]) for peer in others),
        where(report["machine"]),
    ]


def of_log_probs(report: Report) -> Iterator[Claim]:
    """Against the fastest of the others that give tokens weights of their own."""
    s = report["sizes"]
    rows = {r["head"]: r for r in report["rows"]}
    for head, what in HEADS.items():
        if head in rows:
            r = rows[head]
            seconds, memory = r["seconds"], r["memory_mb"]
            others = {n for n in seconds if n not in ("products", "ours")}
            peer = min((n for n in others if "mean alone" not in n), key=lambda n: seconds[n])
            name = "whole logits and log_softmax" if peer == "naive" else peer
            yield [
                f"{what}: forward and backward of {s['tokens']:,} tokens x {s['vocab']:,}, "
                f"{s['dtype']}",
                f"{seconds['ours']:.2f} s, {memory['ours']:,.0f} MB",
                f"{name}: {seconds[peer]:.2f} s, {memory[peer]:,.0f} MB",
                with_memory(seconds[peer] / seconds["ours"], memory[peer] / memory["ours"]),
                where(report["machine"]),
            ]


def of_training(report: Report) -> Iterator[Claim]:
    for r in report["rows"]:
        (ours, theirs), (mine, other) = r["step_seconds"].values(), r["memory_mb"].values()
        yield [
            f"a step of DPO, {r['trained']}, SmolLM2-135M, float32",
            f"{ours:.1f} s, {mine:,.0f} MB",
            f"TRL's trainer: {theirs:.1f} s, {other:,.0f} MB",
            with_memory(theirs / ours, other / mine),
            where(report["machine"]),
        ]


def times(ratios: Sequence[float | None]) -> str:
    """A ratio, or the range of several."""
    found = [x for x in ratios if x is not None]
    ends = dict.fromkeys(f"{x:.0f}" if x >= 9.95 else f"{x:.1f}" for x in (min(found), max(found)))
    return " to ".join(ends)


def with_memory(time: float, memory: float) -> str:
    return f"{times([time])}, in {times([memory])} times less memory"


def duration(us: float) -> str:
    return f"{us:.0f} µs" if us < 1000 else f"{us / 1e3:.1f} ms"


def where(hardware: dict[str, Any], mark: str = "") -> str:
    return f"{machine(hardware)} {mark}".strip()
