"""SELF-JUDGE's comparison: the judge, the policies, self-rejection, and what each stage took."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .markdown import machine, table

Row = dict[str, Any]
NAMES = {
    "base": "base",
    "jsft": "JSFT",
    "sft": "SFT",
    "dpo": "offline DPO",
    "self": "self-judged",
}


def render(report: dict[str, Any]) -> str:
    s = report["settings"]
    prompts = s["prompts"][1]
    parts = [
        _judges(report),
        f"{prompts} pairs of the base's answers to held-out prompts, ties by the annotator left "
        'out; "wide" is the half of them whose rewards differ most. Order decides: the same label '
        "is the likelier one in both orders. On different answers of one policy the trained judge "
        f"agrees with the annotator in {_matches(report)}.",
        _policies(report),
        f"{prompts} held-out prompts, {s['held_out']} answers a seed, up to {s['new']} tokens at "
        f"temperature {s['temperature']}; total: the mean of the four, each over its deviation in "
        "the base's answers to the training prompts.",
        _differences(report),
        "Over all prompts and seeds, prompt by prompt. A difference is resolved if its interval "
        "excludes 0 and all seeds agree in its sign.",
        _rejection(report),
        f"Of the first N of one pool of {s['pool']} answers a prompt, which JSFT or the "
        f"self-judged policy of seed {s['seeds'][0]} wrote. Any: the mean of the N. Share: the "
        "judge's gain over the best's.",
        _costs(report),
        "Tokens read by training, sampled, and read by the judge, in thousands. Processor seconds "
        "are those of one core; the machine did other work beside, which the seconds hold.",
    ]
    end = f"± is a 95 % interval over the prompts. {machine(report['machine'])}; "
    return "\n\n".join([*parts, f"{end}`{report['command']}`."])


def _judges(report: Mapping[str, Any]) -> str:
    at = {(r["judge"], r["question"]): r for r in report["judges"]}
    lines = []
    for question, phrase in report["settings"]["questions"].items():
        before, after = at["base", question], at["jsft", question]
        lines.append(
            [
                question,
                phrase,
                str(before["pairs"]),
                *(_share(r["accuracy"]) for r in (before, after)),
                *(_share(r["wide"]) for r in (before, after)),
                *(f"{r['position_bias']:.0%}" for r in (before, after)),
            ]
        )
    head = ["question", '"which answer is more ...?"', "pairs", "base agrees", "JSFT agrees"]
    more = ["base, wide", "JSFT, wide", "order decides: base", "order decides: JSFT"]
    return "\n".join(table([*head, *more], lines))


def _policies(report: Mapping[str, Any]) -> str:
    rewards = _rewards(report)
    lines = [
        [
            NAMES[r["policy"]],
            str(len(r["seeds"])),
            *(_mean(r[name]) for name in (*rewards, "total")),
            ", ".join(f"{x:+.2f}" for x in r["seeds"]),
            f"{r['tokens']:.0f}",
            f"{r['distinct_2']:.2f}",
        ]
        for r in report["policies"]
    ]
    head = ["policy", "seeds", *rewards, "total", "total, seed by seed", "tokens", "distinct-2"]
    return "\n".join(table(head, lines))


def _differences(report: Mapping[str, Any]) -> str:
    lines = [
        [
            f"{NAMES[r['to']]} - {NAMES[r['from']]}",
            _mean(r["total"]),
            ", ".join(f"{x:+.2f}" for x in r["seeds"]) or "-",
            "yes" if resolved(r["total"], r["seeds"]) else "not resolved",
        ]
        for r in report["differences"]
    ]
    return "\n".join(table(["difference of totals", "mean", "seed by seed", "resolved"], lines))


def resolved(mean: Sequence[float], seeds: Sequence[float]) -> bool:
    """Whether a difference is outside of the noise of the prompts, and every seed has its sign."""
    x, half = mean
    return abs(x) > half and all(x * seed > 0 for seed in seeds)


def _rejection(report: Mapping[str, Any]) -> str:
    rewards, lines = _rewards(report), []
    for policy, rows in report["rejection"].items():
        for r in rows:
            gain, possible = r["gain"][0], r["best"]["total"][0] - r["any"]["total"][0]
            one = r["n"] == 1
            lines.append(
                [
                    _pool(policy),
                    str(r["n"]),
                    *(_mean(r["judge"][name]) for name in (*rewards, "total")),
                    _mean(r["any"]["total"]),
                    _mean(r["best"]["total"]),
                    "-" if one else _mean(r["gain"]),
                    "-" if one else f"{gain / possible:.0%}" if possible else "-",
                    "-" if one else "yes" if resolved(r["gain"], []) else "not resolved",
                ]
            )
    head = ["pool", "N", *rewards, "total", "any: total", "best by gold: total"]
    return "\n".join(table([*head, "judge - any", "share", "resolved"], lines))


def _matches(report: Mapping[str, Any]) -> str:
    each = [
        f"{_share(r['accuracy'])} of {r['matches']:,} matches ({_pool(policy)})"
        for policy, r in report["matches"].items()
    ]
    return " and ".join(each)


def _pool(policy: str) -> str:
    """A policy's name without its seed."""
    return NAMES[policy.split("-")[0]]


def _costs(report: Mapping[str, Any]) -> str:
    lines = [
        [
            r["stage"],
            *(_thousands(r["tokens"].get(kind)) for kind in ("trained", "sampled", "judged")),
            f"{r['seconds']:,.0f}",
            f"{r['processor_seconds']:,.0f}",
        ]
        for r in report["costs"]
    ]
    head = ["stage", "trained", "sampled", "judged", "seconds", "processor seconds"]
    return "\n".join(table(head, lines))


def _rewards(report: Mapping[str, Any]) -> list[str]:
    return [name for name in report["settings"]["questions"] if name != "total"]


def _mean(x: Sequence[float]) -> str:
    return f"{x[0]:+.2f} ± {x[1]:.2f}"


def _share(x: Sequence[float]) -> str:
    return f"{x[0]:.0%} ± {x[1]:.0%}"


def _thousands(x: float | None) -> str:
    return "-" if x is None else f"{x / 1000:,.0f}"
