"""Learning dynamics: what is learnt first, the head, flipped labels, even data, squeezing."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from .markdown import machine, table

Row = dict[str, Any]
LOG_2 = 0.693147
KINDS = {"unlikely": "scrambled words", "likely": "the base's own answer"}
FIGURES = {"chosen": "chosen", "rejected": "rejected", "argmax": "most likely token"}


def render(report: dict[str, Any]) -> str:
    s = report["settings"]
    trained, held = s["statements"]
    runs = f"{s['steps']} steps of {s['batch']} pairs"
    parts = [
        "**What is learnt first**",
        _learning(report),
        f"{trained} statements to train on and {held} held-out ones of other people and things; "
        f"{len(s['seeds'])} seeds of {runs}. Distinguishability: under the base, before any "
        "training, with the 95 % interval of that of endlessly many such statements. Fall: by how "
        "much the held-out loss is below log 2 in the mean over the run, in thousandths, with the "
        "range of the seeds; first: the same at the first step that was measured, "
        f"{report['learning']['steps'][1]}. Accuracy: of DPO's rewards after the last step. "
        "Answers: how many are right before and after.",
        _correlations(report),
        "Spearman's correlation of what is predicted with the fall. Intervals: 95 %, by a "
        "bootstrap over behaviours and seeds. The common direction of a behaviour is the product "
        "of its difference and the mean difference of all behaviours, which is the first step's "
        "growth where the head alone learns all of them.",
        _pairs(report),
        "**The last layer alone**",
        _head(report),
        "One epoch of gradient descent on the untied head, in batches of "
        f"{s['head_batch']}, of each behaviour alone, over states that stay as they are. "
        "Predicted: `steps * rate * sqrt(2) / 4 * beta * distinguishability`.",
        "**Flipped labels**",
        _flips(report),
        f"Three seeds of {s['flip']['steps']} steps; {report['flip']['pairs']} held-out pairs. The "
        "aligned model is that of the first experiment, of the same seed. By rewards: a pair is "
        "right where its flipped margin is above that before the first step. By answers: where the "
        "flipped answer is the likelier one. Intervals: 95 %, by a paired bootstrap over pairs and "
        "seeds.",
        "**Evened-out data**",
        _even(report),
        f"The same {runs}, of as many rows in which each behaviour has its part by "
        "`dynamics.rebalanced`, less those of the first experiment, seed by seed; Student's t. "
        "Spread: the standard deviation of the loss areas of the behaviours, in thousandths. "
        "Relative: the spread over the mean fall. Slowest: the largest area.",
        "**Squeezing**",
        _squeeze(report),
        f"DPO with beta {s['squeeze']['beta']} of {s['squeeze']['steps']} steps of "
        f"{s['squeeze']['batch']} pairs, rate {s['squeeze']['rate']:g}, "
        f"{len(s['squeeze']['seeds'])} seeds: log-probs of a held-out token in the mean, before "
        "and after. The chosen responses are statements that the base did not write; it answers "
        "nothing like them. Change: with the 95 % interval of the seeds. The most likely token is "
        "that at each place of the chosen response. "
        f"{report['squeeze']['unlikely']['n']} held-out pairs; questions to which the base wrote "
        "nothing are left out.",
        _texts(report),
        _costs(report),
        "Tokens in thousands. Processor seconds are those of one core; the machine did other work "
        f"beside. {machine(report['machine'])}; `{report['command']}`.",
    ]
    return "\n\n".join(parts)


def summary(report: dict[str, Any]) -> str:
    """The main figures alone, for the page on learning dynamics."""
    found = report["learning"]["correlations"]["distinguishability-area"]
    flip, even = report["flip"], report["even"]["spread"]
    rate, head = next(iter(report["head"].items()))
    squeeze = report["squeeze"]
    lines = [
        [
            "the order in which behaviours are learnt is that of their distinguishability",
            f"Spearman {_with(found['value'], found['interval'])}",
        ],
        [
            "of two behaviours, the one with priority is learnt first",
            f"{_percent(report['pairs']['agree'])} of {report['pairs']['count']} pairs",
        ],
        [
            "the head's change is linear in distinguishability (Theorem 4.1)",
            f"r = {head['pearson']:.4f}, at most {_percent(head['off'])} off at rate {rate}",
        ],
        [
            "the aligned model learns flipped labels faster: areas, by rewards",
            f"ratio {_with(flip['rewards']['ratio'], flip['rewards']['interval'])}",
        ],
        [
            "`rebalanced` lowers the spread of the loss areas",
            f"{1000 * even['plain']:.2f} to {1000 * even['even']:.2f} thousandths"
            + ("" if even["resolved"] else ", not resolved"),
        ],
        [
            "where the rejected response is unlikely already, the most likely token gains, and not "
            "the chosen one",
            f"{_gains(squeeze['unlikely'])}; else {_gains(squeeze['likely'])}",
        ],
    ]
    return "\n".join(table(["expected", "found"], lines))


def _gains(found: Mapping[str, Any]) -> str:
    """What a token of the chosen response and the most likely one gained, in nats."""
    chosen, argmax = (found["changes"][name]["gap"] for name in ("chosen", "argmax"))
    return f"chosen {chosen:+.2f}, most likely {argmax:+.2f} nats"


def _learning(report: Mapping[str, Any]) -> str:
    learnt = {r["behaviour"]: r for r in report["learning"]["behaviours"]}
    rows = sorted(report["statistics"]["behaviours"], key=lambda r: -r["distinguishability"])
    order = sorted(learnt, key=lambda name: -learnt[name]["fall"])
    lines = []
    for r in rows:
        own = learnt[r["behaviour"]]
        falls = [1000 * x for x in own["falls"]]
        before, after = own["plain"]
        lines.append(
            [
                r["behaviour"],
                " / ".join(report["settings"]["examples"][r["behaviour"]]),
                _with(r["distinguishability"], r["interval"], 1),
                f"{1000 * own['fall']:.1f} ({min(falls):.1f} to {max(falls):.1f})",
                f"{order.index(r['behaviour']) + 1}",
                f"{1000 * own['first']:.1f}",
                _percent(own["accuracy"]),
                f"{_percent(before)}, {_percent(after)}",
            ]
        )
    head = ["behaviour", "yes / no", "distinguishability", "fall", "rank", "first"]
    return "\n".join(table([*head, "accuracy", "answers"], lines))


def _correlations(report: Mapping[str, Any]) -> str:
    found = report["learning"]["correlations"]
    titles = {"distinguishability": "distinguishability", "common": "common direction"}
    lines = []
    for predictor, title in titles.items():
        cells = [title]
        for measure in ("area", "first"):
            r = found[f"{predictor}-{measure}"]
            each = ", ".join(f"{x:.2f}" for x in r["each"])
            cells.append(f"{_with(r['value'], r['interval'])}; seeds {each}")
        lines.append(cells)
    return "\n".join(table(["predicted by", "with the fall", "with the first fall"], lines))


def _pairs(report: Mapping[str, Any]) -> str:
    r = report["pairs"]
    low, high = r["interval"]
    return (
        f"Priorities: in {_percent(r['agree'])} ({_percent(low)} to {_percent(high)}) of "
        f"{r['count']} pairs of behaviours, which are all trained together, the one with priority "
        f"has the larger fall; Spearman of priorities and differences of falls {r['spearman']:.2f}."
    )


def _head(report: Mapping[str, Any]) -> str:
    heads = report["head"]
    first = next(iter(heads.values()))
    places = sorted(
        range(len(first["rows"])), key=lambda i: -first["rows"][i]["distinguishability"]
    )
    lines = []
    for i in places:
        row = first["rows"][i]
        cells = [row["behaviour"], f"{row['distinguishability']:.1f}"]
        for found in heads.values():
            own = found["rows"][i]
            cells += [f"{own['change']:.4g}", f"{own['predicted']:.4g}", _percent(own["accuracy"])]
        lines.append(cells)
    head = ["behaviour", "distinguishability"]
    for rate in heads:
        head += [f"change, rate {rate}", "predicted", "held-out accuracy"]
    said = "; ".join(
        f"rate {rate}: r = {found['pearson']:.4f} with distinguishability, at most "
        f"{_percent(found['off'])} off"
        for rate, found in heads.items()
    )
    return "\n".join([*table(head, lines), "", f"Pearson's correlation over behaviours. {said}."])


def _flips(report: Mapping[str, Any]) -> str:
    flip = report["flip"]
    steps = flip["steps"]
    shown = steps[:: max(1, (len(steps) - 1) // 6)]
    lines = []
    for measure in ("rewards", "answers"):
        for side in ("base", "aligned"):
            curve = flip[measure][side]
            ratio = "-"
            if side == "aligned":
                r, interval = flip[measure]["ratio"], flip[measure]["interval"]
                ratio = "-" if r is None or None in interval else _with(r, interval)
            lines.append(
                [
                    f"{side}, by {measure}",
                    *(f"{curve['mean'][steps.index(step)]:.2f}" for step in shown),
                    f"{curve['area']:.3f}",
                    ratio,
                ]
            )
    head = ["accuracy", *(f"step {step}" for step in shown), "area", "aligned / base"]
    each = [
        [
            r["behaviour"],
            f"{r['areas']['base']:.2f}",
            f"{r['areas']['aligned']:.2f}",
            "-" if r["ratio"] is None else _with(r["ratio"], r["interval"]),
        ]
        for r in flip["behaviours"]
    ]
    own = table(["behaviour", "area of the base", "of the aligned", "ratio, by rewards"], each)
    return "\n".join([*table(head, lines), "", *own])


def _even(report: Mapping[str, Any]) -> str:
    even = report["even"]
    shares = report["statistics"]["shares"]
    lines = []
    for name, title, scale in (
        ("spread", "spread", 1000),
        ("relative", "relative", 1),
        ("mean", "mean area less log 2", 1000),
        ("slowest", "slowest less log 2", 1000),
    ):
        r = even[name]
        less = LOG_2 if "less" in title else 0.0
        low, high = r["interval"] or (float("nan"), float("nan"))
        lines.append(
            [
                title,
                f"{scale * (r['plain'] - less):.2f}",
                f"{scale * (r['even'] - less):.2f}",
                f"{scale * r['gap']:+.2f} ({scale * low:+.2f} to {scale * high:+.2f})",
                ", ".join(f"{scale * x:+.2f}" for x in r["each"]),
                "resolved" if r["resolved"] else "not resolved",
            ]
        )
    most = sorted(shares, key=lambda name: -shares[name])
    said = ", ".join(f"{name} {_percent(shares[name])}" for name in most)
    head = ["of the loss areas", "as they are", "rebalanced", "difference", "seeds", ""]
    return "\n".join([*table(head, lines), "", f"The parts of the rebalanced rows: {said}."])


def _squeeze(report: Mapping[str, Any]) -> str:
    lines = []
    for kind, title in KINDS.items():
        own = report["squeeze"][kind]
        for name, what in FIGURES.items():
            curve, r = own["curves"][name], own["changes"][name]
            low, high = r["interval"] or (float("nan"), float("nan"))
            lines.append(
                [
                    title,
                    what,
                    f"{curve[0]:.2f}",
                    f"{curve[len(curve) // 2]:.2f}",
                    f"{curve[-1]:.2f}",
                    f"{r['gap']:+.2f} ({low:+.2f} to {high:+.2f})"
                    + ("" if r["resolved"] else ", not resolved"),
                ]
            )
    steps = report["squeeze"]["unlikely"]["steps"]
    head = ["rejected", "log-prob of", "before", f"step {steps[len(steps) // 2]}", "after"]
    r = report["squeeze"]["argmax"]
    low, high = r["interval"] or (float("nan"), float("nan"))
    said = (
        "The gain of the most likely token where the rejected response is scrambled, less that "
        f"where it is the base's own, seed by seed: {r['gap']:+.2f} ({low:+.2f} to {high:+.2f}), "
        f"{'resolved' if r['resolved'] else 'not resolved'}."
    )
    return "\n".join([*table([*head, "change"], lines), "", said])


def _texts(report: Mapping[str, Any]) -> str:
    lines = [
        [_cell(row[x]) for x in ("prompt", "chosen", "unlikely", "likely")]
        for row in report["squeeze"]["texts"]
    ]
    head = ["question", "chosen", "rejected, scrambled", "rejected, of the base"]
    return "\n".join(table(head, lines))


def _costs(report: Mapping[str, Any]) -> str:
    kinds: dict[str, list[Row]] = {}
    for r in report["costs"]:
        kinds.setdefault(r["stage"].rstrip("-0123456789"), []).append(r)
    lines = [
        [
            kind,
            str(len(rows)),
            *(
                f"{sum(r['tokens'].get(what, 0) for r in rows) / 1000:.1f}"
                for what in ("trained", "read", "sampled")
            ),
            f"{sum(r['processor_seconds'] for r in rows):.0f}",
            f"{statistics.fmean(r['processor_seconds'] for r in rows):.0f}",
        ]
        for kind, rows in kinds.items()
    ]
    head = ["stages", "runs", "trained", "read", "sampled", "processor seconds", "of a run"]
    return "\n".join(table(head, lines))


def _with(x: float, interval: Sequence[float], digits: int = 2) -> str:
    low, high = interval
    return f"{x:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def _percent(x: float) -> str:
    return f"{100 * x:.0f} %" if x >= 0.01 or x == 0 else f"{100 * x:.2f} %"


def _cell(text: str) -> str:
    """A text on one line of a table."""
    return " ".join(text.split()).replace("|", "\\|")
