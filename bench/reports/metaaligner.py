"""MetaAligner's comparison: edits toward sets of objectives, ablations, and what others cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .markdown import machine, table
from .self_judge import resolved

Row = dict[str, Any]
NAMES = {
    "base": "base, by the same prompt",
    "aligner": "aligner",
    "no-warm-up": "without warm-up",
    "no-equal": "without the equal stage",
}
TOGETHER = {"trained": "the three trained", "all": "all six"}
TOTAL = "total"


def render(report: dict[str, Any]) -> str:
    s = report["settings"]
    counts = s["counts"]
    parts = [
        _gains(report),
        f"Means over {s['prompts'][1]} held-out prompts of how far an edit raises each gold reward "
        f"above that of the answer it edits, the base's first; bold is what was named. Trained on: "
        f"{_words(s['trained'])}; never: {_words(s['unseen'])}. Total: the mean of the three "
        "trained, each over its deviation in the base's answers to the training prompts. The "
        f"aligner and its ablations have {len(s['seeds'])} seeds. Edit distance: in words, from 0 "
        f"to 1. Up to {s['new']} tokens at temperature {s['temperature']}.",
        _wins(report),
        f"A tie changes the reward by no more than {s['margin']:g} of its deviation. Net: wins "
        "less losses.",
        _named(report),
        "How far an objective's reward rises where it alone is named, and where one of the other "
        f"{len(report['named']) - 1} is, in the mean: what naming it does, beside what any edit "
        "does.",
        _ablations(report),
        "An aligner without a stage of training less that of the same seed with all of them, which "
        "has seen as many better answers. Net is the mean over the objectives that were named.",
        _baselines(report),
        "All three trained objectives at once. Gains are over the base's first answer; tokens are "
        "those that all models read as prompts and write for one answer, of an edit also those of "
        "the answer that it edits. The best of n are chosen by the gold rewards themselves, which "
        "no other method sees; EFT with beta = 1 is the adapter of DPO, which is blended with the "
        "base. Processor seconds are those of the stage over its answers.",
        _texts(report),
        f"The first held-out prompt: {_cell(report['texts']['prompt'])} By the aligner of seed "
        f"{s['seeds'][0]}, which ships as the guide `aligner`.",
        _costs(report),
        "Tokens read by training, read as prompts, and written, in thousands. The stages of an "
        f"aligner's training have {_each(counts)} rows, of {_each(report['rows'])} that there are. "
        "Processor seconds are those of one core; the machine did other work beside, which the "
        "seconds hold.",
    ]
    end = (
        "± is a 95 % interval over the prompts. What is resolved has an interval that excludes 0, "
        f"and all seeds agree in its sign. {machine(report['machine'])}; "
    )
    return "\n\n".join([*parts, f"{end}`{report['command']}`."])


def _gains(report: Mapping[str, Any]) -> str:
    rewards = _rewards(report)
    lines = []
    for r in report["edits"]:
        gains = [
            f"**{_mean(r['gains'][name])}**" if name in r["named"] else _mean(r["gains"][name])
            for name in rewards
        ]
        lines.append(
            [
                NAMES[r["editor"]],
                _toward(r["condition"]),
                *gains,
                _mean(r["gains"][TOTAL]),
                _share(r["unchanged"]),
                f"{r['edit_distance'][0]:.2f} ± {r['edit_distance'][1]:.2f}",
                f"{r['tokens']:.0f}",
            ]
        )
    head = ["editor", "toward", *map(_word, rewards), TOTAL, "unchanged", "edit distance", "tokens"]
    return "\n".join(table(head, lines))


def _wins(report: Mapping[str, Any]) -> str:
    lines = []
    for r in report["edits"]:
        for name in r["named"] if r["editor"] in ("base", "aligner") else ():
            of = r["wins"][name]
            lines.append(
                [
                    NAMES[r["editor"]],
                    _toward(r["condition"]),
                    _word(name),
                    *(f"{of[word]:.0%}" for word in ("won", "tied", "lost")),
                    _mean(of["net"]),
                    _seeds(of["net"]),
                    _verdict(of["net"]),
                ]
            )
    head = ["editor", "toward", "reward", "won", "tied", "lost", "net", "seed by seed", "resolved"]
    return "\n".join(table(head, lines))


def _named(report: Mapping[str, Any]) -> str:
    lines = [
        [
            _word(r["objective"]),
            "yes" if r["trained"] else "no",
            *(_mean(r[key], 3) for key in ("named", "others", "difference")),
            _seeds(r["difference"], 3),
            _verdict(r["difference"]),
        ]
        for r in report["named"]
    ]
    head = ["objective", "trained", "named", "another named", "difference", "seed by seed"]
    return "\n".join(table([*head, "resolved"], lines))


def _ablations(report: Mapping[str, Any]) -> str:
    lines = []
    for r in report["ablations"]:
        for key, name in ((TOTAL, "total"), ("net", "net of wins")):
            lines.append(
                [
                    NAMES[r["ablation"]],
                    _toward(r["condition"]),
                    name,
                    _mean(r[key]),
                    _seeds(r[key]),
                    _verdict(r[key]),
                ]
            )
    head = ["ablation", "toward", "difference of", "mean", "seed by seed", "resolved"]
    return "\n".join(table(head, lines))


def _baselines(report: Mapping[str, Any]) -> str:
    trained = report["settings"]["trained"]
    lines = []
    for r in report["baselines"]:
        gains, same = r["gains"], r["method"] == "base"
        lines.append(
            [
                _method(r["method"]) + (", equal cost" if r["equal_cost"] else ""),
                *("-" if same else _mean(gains[name]) for name in (*trained, TOTAL)),
                "-" if same else _seeds(gains[TOTAL]),
                "-" if same else _verdict(gains[TOTAL]),
                f"{r['tokens']:.0f}",
                f"{r['processor_seconds']:.2f}",
            ]
        )
    head = ["method", *map(_word, trained), TOTAL, "total, seed by seed", "resolved"]
    return "\n".join(table([*head, "tokens an answer", "processor seconds"], lines))


def _method(name: str) -> str:
    return f"EFT, beta = {name.removeprefix('eft-')}" if name.startswith("eft-") else name


def _texts(report: Mapping[str, Any]) -> str:
    found = report["texts"]
    lines = [["the answer", _cell(found["answer"])]]
    lines += [[_toward(condition), _cell(text)] for condition, text in found["edits"].items()]
    return "\n".join(table(["toward", "text"], lines))


def _costs(report: Mapping[str, Any]) -> str:
    lines = [
        [
            r["stage"],
            *(_thousands(r["tokens"].get(kind)) for kind in ("trained", "read", "sampled")),
            f"{r['seconds']:,.0f}",
            f"{r['processor_seconds']:,.0f}",
        ]
        for r in report["costs"]
    ]
    head = ["stage", "trained", "read", "written", "seconds", "processor seconds"]
    return "\n".join(table(head, lines))


def _rewards(report: Mapping[str, Any]) -> list[str]:
    return [*report["settings"]["trained"], *report["settings"]["unseen"]]


def _toward(condition: str) -> str:
    return TOGETHER.get(condition, _word(condition))


def _word(name: str) -> str:
    return name.replace("_", " ")


def _words(names: Sequence[str]) -> str:
    return ", ".join(map(_word, names))


def _each(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{n:,} {name}" for name, n in counts.items())


def _cell(text: str) -> str:
    """A text in one line, in which nothing ends the cell of a table or the section."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def _mean(figure: Mapping[str, Any], digits: int = 2) -> str:
    x, half = figure["mean"]
    return f"{x:+.{digits}f} ± {half:.{digits}f}"


def _seeds(figure: Mapping[str, Any], digits: int = 2) -> str:
    seeds = figure["seeds"]
    return ", ".join(f"{x:+.{digits}f}" for x in seeds) if len(seeds) > 1 else "-"


def _verdict(figure: Mapping[str, Any]) -> str:
    return "yes" if resolved(figure["mean"], figure["seeds"]) else "not resolved"


def _share(x: Sequence[float]) -> str:
    return f"{x[0]:.0%} ± {x[1]:.0%}"


def _thousands(x: float | None) -> str:
    return "-" if x is None else f"{x / 1000:,.0f}"
