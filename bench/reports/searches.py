"""Searches at equal tokens and at equal seconds: rewards, divergence and perplexity of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .markdown import machine, table

Row = Mapping[str, Any]
NAMES = {
    "asked": "asked by a system prompt",
    "EFT": "EFT, without a search",
    "CBS": "chunk beam search (CBS)",
    "particles": "particles, the best",
    "particles, drawn": "particles, a draw",
    "entropy-cut": "CBS, entropy-cut chunks (CARDS)",
    "tilted": "asked, CBS tilted to the base (GSI)",
}


def render(report: Row) -> str:
    s = report["settings"]
    width, samples, chunk = s["search"]
    parts = []
    for objective, rows in report["methods"].items():
        parts += [f"**{objective}**", _methods(rows, s["rewards"], objective), _gaps(rows)]
    parts += [
        f"{s['prompts']} held-out prompts, one seed, up to {s['new']} tokens at temperature "
        f"{s['temperature']}, weights in bfloat16; ± is a 95 % interval over the prompts, of "
        "differences prompt by prompt. Rows: of a prompt; all searches may draw "
        f"{s['rows'] * s['new']} tokens of it. Best of n: the mean over all choices of n of a pool "
        f"of {s['pool']}. W, N, L = {width}, {samples}, {chunk}; EFT and IVG: beta = "
        f"{s['beta']:g}; particles: temperature 1; chunks are cut above {report['nats']:.1f} nats; "
        f"the system prompts: {', '.join(repr(asked) for asked in s['asked'].values())}.",
        "s: processor seconds a prompt, of one thread. Read: tokens that the policy read, of all "
        f"rows. Times: of the seconds of best of {s['rows']}, the least and the most of blocks of "
        f"{s['block']} prompts. At equal tokens: the objective's reward less that of best of "
        f"{s['rows']}, and of CBS. At equal seconds: less that of best of n, with the n that takes "
        f"as long, in brackets, up to {s['pool']}; and less that of CBS, where the one that takes "
        "longer has fewer rows, by a line in the logarithm of the seconds between one row of its "
        "policy and all its rows. A difference in bold excludes 0. KL: nats a response, at most, "
        "and what of it the policy has without the choice of rows.",
        f"{machine(report['machine'])}; `{report['command']}`.",
    ]
    return "\n\n".join(parts)


def summary(report: Row) -> str:
    """The gains over best of n alone, for the page on searches."""
    each = report["methods"]
    head = ["method", *(f"{o}, equal {what}" for o in each for what in ("tokens", "seconds"))]
    lines = []
    for rows in zip(*each.values(), strict=True):
        if rows[0]["method"] == "EFT" or "tokens_best" in rows[0]:
            cells = [_gap(r.get(key)) for r in rows for key in ("tokens_best", "seconds_best")]
            lines.append([_name(rows[0]), *cells])
    return "\n".join(table(head, lines))


def _methods(rows: Sequence[Row], rewards: Sequence[str], objective: str) -> str:
    head = [
        "method",
        "rows",
        "s",
        "read",
        "tokens",
        *rewards,
        "perplexity (base)",
        "KL",
        "of policy",
    ]
    lines = [
        [
            _name(r),
            str(r["rows"]),
            f"{r['seconds']:.2f}",
            f"{r['read']:.0f}",
            f"{r['tokens']:.0f}",
            *(_mean(r[name]) for name in rewards),
            "{:.1f} ± {:.1f}".format(*r["perplexity"]),
            "{:.1f} ± {:.1f}".format(*r["kl"]),
            f"{r['kl_of_policy'][0]:.1f}",
        ]
        for r in rows
    ]
    return "\n".join(table(head, lines))


def _gaps(rows: Sequence[Row]) -> str:
    head = ["method", "times", "equal tokens: best of n", "CBS"]
    head += ["equal seconds: best of n", "CBS"]
    lines = []
    for r in rows[1:]:
        low, high = min(r["times_best"]), max(r["times_best"])
        line = [_name(r), f"{low:.2f} to {high:.2f}"]
        line += [_gap(r.get("tokens_best")), _gap(r.get("tokens_cbs"))]
        at = f" ({r['n_at_seconds']:.1f})" if "n_at_seconds" in r else ""
        line += [_gap(r.get("seconds_best")) + at, _gap(r.get("seconds_cbs"))]
        lines.append(line)
    return "\n".join(table(head, lines))


def _name(row: Row) -> str:
    return NAMES.get(row["method"], row["method"])


def _mean(x: Sequence[float]) -> str:
    return f"{x[0]:+.2f} ± {x[1]:.2f}"


def _gap(x: Sequence[float] | None) -> str:
    """A difference with its interval, in bold if that excludes 0."""
    if x is None:
        return "-"
    said = _mean(x)
    return f"**{said}**" if abs(x[0]) > x[1] else said
