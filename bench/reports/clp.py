"""Conditioned language policies beside soups, MOD, DeRa and prompts: fronts of gold rewards."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from .markdown import machine, table

Row = dict[str, Any]
NAMES = {
    "full": "full-CLP",
    "attention": "attn-CLP",
    "head": "logit-CLP",
    "soup": "rewarded soup",
    "mod": "MOD",
    "prompt": "told in the prompt",
    "dera": "DeRa",
}
TITLES = {
    "two": "Two rewards, one KL weight",
    "kl": "One reward, many KL weights",
    "three": "Three rewards, one KL weight",
}
# Forwards of a token, in times of the base's, as rows of one forward or not.
FORWARDS = {"mod": "one a reward", "dera": "2"}


def render(report: dict[str, Any]) -> str:
    s = report["settings"]
    parts = []
    for name, title in TITLES.items():
        if name not in report["fronts"]:
            continue
        seeds = len(next(iter(report["fronts"][name].values()))["volumes"])
        said = f"{seeds} seeds" if seeds > 1 else "one seed"
        parts += [f"**{title}** ({said})", _front(report, name)]
        if name == "two":
            parts.append(_base(report))
    parts += [
        "Volume: the hypervolume above "
        + ", ".join(f"{name} {x:g}" for name, x in s["reference"].items())
        + "; the mean over seeds, with the 95 % interval of a bootstrap over the prompts. full-CLP "
        "less: how much larger the volume of full-CLP is, of the same draws of prompts; resolved "
        "if the interval excludes 0 and all seeds agree in its sign. Steerability: the mean over "
        "objectives of Spearman's correlation of weight and reward, of each seed. At its weight 1: "
        "the mean reward where the objective has the greatest weight. KL: the mean over all points "
        "of a text's divergence from the base, in nats. Forwards: of a token.",
        f"Fronts are of {_prompts(report)} held-out prompts, one text each at temperature "
        f"1 and up to {s['new']} tokens. Each run has {s['steps']} steps of {s['prompts']} prompts "
        f"with {s['responses']} responses; KL weight {s['kl']}, in the second setting drawn from "
        f"{s['kl_range']}. LoRA of rank {s['lora']['r']} in the layers {s['layers'][0]} to "
        f"{s['layers'][-1]}, of the head in logit-CLP. A soup's and MOD's experts have together "
        "seen as many times the responses as there are rewards.",
        _learnt(report),
        "What the runs of the first seed logged in the first and the last quarter of their steps: "
        "the objective at drawn weights, and the log-ratio to the base in nats.",
        _texts(report),
        f"full-CLP of the first seed: {_cell(report['texts']['prompt'])}",
        _costs(report),
        "Tokens in thousands: sampled, and trained on beside the prompts. Processor seconds are "
        "those of one core; the machine did other work beside, which the seconds hold. "
        f"{machine(report['machine'])}; `{report['command']}`.",
    ]
    return "\n\n".join(parts)


def summary(report: dict[str, Any]) -> str:
    """The main comparison alone, for the page on conditioned policies."""
    rows, gaps = report["fronts"]["two"], report["differences"]["two"]
    lines = []
    for method, r in rows.items():
        gap = gaps.get(method)
        said = "-"
        if gap is not None:
            said = f"{gap['difference']:+.2f}" + ("" if gap["resolved"] else ", not resolved")
        lines.append(
            [
                NAMES[method],
                _with_interval(r["volume"], r["interval"]),
                said,
                f"{statistics.fmean(r['steerability']):.2f}",
                FORWARDS.get(method, "1"),
                f"{report['parameters'][method] / 1e6:.2f} M",
            ]
        )
    head = ["method", "hypervolume", "full-CLP less", "steerability", "forwards", "parameters"]
    return "\n".join(table(head, lines))


def _front(report: Mapping[str, Any], name: str) -> str:
    rows, gaps = report["fronts"][name], report["differences"][name]
    objectives = list(next(iter(rows.values()))["ends"])
    head = ["method", "volume", "full-CLP less", "steerability"]
    head += [f"{o} at its weight 1" if o != "kl" else "-KL at kl = 1" for o in objectives]
    head += ["KL", "forwards"]
    if name == "two":
        head.append("trained parameters")
    lines = []
    for method, r in rows.items():
        line = [NAMES[method], _with_interval(r["volume"], r["interval"]), "-"]
        if method in gaps:
            gap = gaps[method]
            line[-1] = _with_interval(gap["difference"], gap["interval"])
            line[-1] += ", resolved" if gap["resolved"] else ", not resolved"
        line.append(", ".join(f"{x:.2f}" for x in r["steerability"]))
        line += [f"{x:.2f}" for x in r["ends"].values()]
        line += ["-" if r["kl"] is None else f"{r['kl']:.2f}", FORWARDS.get(method, "1")]
        if name == "two":
            line.append(f"{report['parameters'][method] / 1e6:.2f} M")
        lines.append(line)
    return "\n".join(table(head, lines))


def _prompts(report: Mapping[str, Any]) -> str:
    """How many prompts fronts have, which may be fewer in some settings."""
    counts = report["settings"]["held_out"]
    most = max(counts.values())
    fewer = [
        f"{counts[name]} in {title[0].lower()}{title[1:]}"
        for name, title in TITLES.items()
        if counts[name] < most and name in report["fronts"]
    ]
    return f"{most} ({', '.join(fewer)})" if fewer else str(most)


def _base(report: Mapping[str, Any]) -> str:
    each = report["base"]["rewards"].items()
    return "The base alone: " + ", ".join(f"{name} {x:.2f}" for name, x in each) + "."


def _learnt(report: Mapping[str, Any]) -> str:
    first = f"-{report['settings']['seeds'][0]}"
    lines = [
        [
            r["run"].removesuffix(first),
            *(f"{r[end]['objective']:.2f}" for end in ("first", "last")),
            *(f"{r[end]['kl']:.2f}" for end in ("first", "last")),
        ]
        for r in report["learnt"]
        if r["run"].endswith(first)
    ]
    return "\n".join(table(["run", "objective, first", "last", "KL, first", "last"], lines))


def _texts(report: Mapping[str, Any]) -> str:
    lines = [
        [", ".join(f"{n} {w:.1f}" for n, w in r["weights"].items()), _cell(r["text"])]
        for r in report["texts"]["rows"]
    ]
    return "\n".join(table(["weights", "text"], lines))


def _costs(report: Mapping[str, Any]) -> str:
    lines = [
        [
            r["stage"],
            *(f"{r['tokens'].get(kind, 0) / 1000:.1f}" for kind in ("sampled", "trained")),
            f"{r['processor_seconds']:.0f}",
        ]
        for r in report["costs"]
    ]
    return "\n".join(table(["stage", "sampled", "trained", "processor seconds"], lines))


def _with_interval(x: float, interval: Sequence[float]) -> str:
    low, high = interval
    return f"{x:.2f} ({low:.2f} to {high:.2f})"


def _cell(text: str) -> str:
    """A text on one line of a table."""
    return " ".join(text.split()).replace("|", "\\|")
