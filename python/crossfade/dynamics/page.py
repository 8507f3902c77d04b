"""One HTML file of a report: the answer, pictures, tables, notes."""

from __future__ import annotations

import html as escaping
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from . import charts, runs
from .charts import Curve, escaped
from .findings import STARVED, TODO, lines
from .wording import NONE, Sentence, aligned, brief, counted, figure, percent

KINDS = {
    "statements": "statements, read as they stand",
    "pairs": "pairs of responses after their prompts, read as trainers encode them",
    "both": "statements and pairs of responses",
}
HEADS = {
    "trained": "the output head was trained",
    "frozen": "the output head was frozen, so that the figures above are a guess at the order",
    "tied": "the output head is tied to the embeddings, so that the figures above are a guess at "
    "the order",
}
MEANINGS = {
    "distance": "distinguishability: how far apart the mean states of the positive and of the "
    "negative texts are. Training moves the farthest apart first.",
    "95 % interval": "of the distance that endlessly many such texts would have. Few texts look "
    "further apart by chance, so that the distance may lie above its interval.",
    "positive, negative": "how many texts there are of each label; of pairs, chosen and rejected.",
    "concentration": "the larger of both sides' largest eigenvalues of the covariance: how far "
    "states spread along one direction.",
    "trace": "the larger of both sides' traces of the covariance: how far states spread in all.",
    "accuracy bound": "what accuracy the head's first step reaches at least on these statements, "
    "for a behaviour trained alone.",
    "share, even": "the part of the rows that a behaviour has, and that by which all losses fall "
    "about as fast: as distance to the power of -2.",
    "rows, balanced": "how many rows there are, and how many after rebalancing, which repeats a "
    "row {most} times at most.",
}
SHOWN = 8  # behaviours whose curves are drawn in full; of more, the first and the last ones are
# Figures whose curves of all behaviours share a picture: what it is called, the ends of its
# vertical axis or None for those of the curves, and what that reaches at least.
OVERLAID = {
    "loss": ("loss", None, (0.0, 0.0)),
    "accuracy": ("accuracy", (0.0, 1.02), None),
    "argmax": ("log-prob of the likeliest token", None, None),
}
LOG_PROBS = {"chosen": 0, "rejected": 1}  # and their styles


def html(data: Mapping[str, Any]) -> str:
    """The page; `Report.html` says what it is."""
    template = (Path(__file__).parent / "page.html").read_text(encoding="utf-8")
    title = "Learning dynamics" + (f" of {data['model']}" if data["model"] else "")
    sections = (_head, _distances, _priorities, _shares, _watches, _figures, _notes)
    parts = {
        "TITLE": escaping.escape(brief(title)),
        "BODY": "\n".join(part for section in sections if (part := section(data))),
    }
    return re.sub("@(TITLE|BODY)@", lambda found: parts[found[1]], template)


def _head(data: Mapping[str, Any]) -> str:
    behaviours = data["behaviours"]
    texts = sum(b["rows"] for b in behaviours)
    what = {"statements": "statement", "pairs": "pair", "both": "row"}[data["kind"]]
    said = [escaped(data["model"])] if data["model"] else []
    said.append(f"{counted(texts, what)} of {counted(len(behaviours), 'behaviour')}")
    each = "".join(
        f"<dt{of}>{line.heading}</dt><dd{of}>{''.join(map(_sentence, line.sentences))}</dd>"
        for line in lines(data)
        for of in (' class="todo"' if line.heading == TODO else "",)
    )
    return (
        f'<h1>Learning dynamics</h1>\n<p class="soft">{" · ".join(said)}</p>\n'
        f'<main>\n<dl id="answer">{each}</dl>'
    )


def _sentence(sentence: Sentence) -> str:
    names = (f"<strong>{escaped(brief(name))}</strong>" for name in sentence.names)
    words = re.sub("`(.*?)`", r"<code>\1</code>", escaping.escape(sentence.words))
    for part in (" %", " → "):  # a line does not end within a share
        words = words.replace(part, part.replace(" ", "&nbsp;"))
    return f"<p>{words.format(*names)}</p>"


def _distances(data: Mapping[str, Any]) -> str:
    return _picture(
        "How far apart the model holds each behaviour",
        "Bars are 95 % intervals, from 0 at the left edge; the dot is the distance that was found, "
        "which few texts put too far right. Where bars overlap, the order is too close to call.",
        charts.distances(data["behaviours"]),
    )


def _priorities(data: Mapping[str, Any]) -> str:
    if len(data["behaviours"]) == 1:
        return ""
    return _picture(
        "Which behaviour starves which",
        "The priority of each row over each column, from &minus;2 to 2: how much more of a step on "
        "both goes to the row's behaviour. In brackets: too close to call. Out of them, from "
        f"{STARVED} on, the column's is starved, and above 1 it is pushed the wrong way.",
        charts.heat_map(data["behaviours"], data["priorities"]),
    )


def _shares(data: Mapping[str, Any]) -> str:
    behaviours = data["behaviours"]
    if len(behaviours) == 1 or behaviours[0]["even_share"] is None:
        return ""
    now = '<span class="track" aria-hidden="true"><i class="{}" style="width:100%"></i></span>'
    key = "".join(
        f"<span>{now.format(kind)}{what}</span>"
        for kind, what in (("now", "share of the rows now"), ("then", "share for even learning"))
    )
    title = "Which part of the data each gets, and should get"
    caption = "With the second shares, the losses of all behaviours fall about as fast."
    if not data["answer"]["resolved"]:
        title = "Which part of the data each gets"
        caption += " Nothing is resolved here: they may be chance alone."
    elif data["answer"]["same"]:
        caption += " Sides that look the same are given nearly all rows: check their labels first."
    return _picture(
        title,
        caption,
        f'<div class="key">{key}</div>{charts.shares(behaviours)}',
    )


def _picture(title: str, caption: str, picture: str) -> str:
    return (
        f"<section><h2>{title}</h2><figure><figcaption>{caption}</figcaption>{picture}</figure>"
        "</section>"
    )


def _figures(data: Mapping[str, Any]) -> str:
    heads = ["distance", "95 % interval", "positive", "negative", "concentration", "trace"]
    heads += ["accuracy bound", "share", "even", "rows", "balanced"]
    rows = []
    for rank, b in enumerate(data["behaviours"], 1):
        distance, *ends = aligned(b["distinguishability"], *b["interval"])
        error = b["concentration_error"]
        near = f" ± {figure(error)}" if error > 0.01 * b["concentration"] else ""
        bound, even = b["accuracy_bound"], b["even_share"]
        cells = [
            distance,
            " to ".join(ends),
            f"{b['n_positive']:,}",
            f"{b['n_negative']:,}",
            figure(b["concentration"]) + near,
            figure(b["trace"]),
            NONE if bound is None else f"{bound:.2f}",
            percent(b["share"]),
            NONE if even is None else percent(even),
            f"{b['rows']:,}",
            NONE if b["balanced_rows"] is None else f"{b['balanced_rows']:,}",
        ]
        rows.append(
            f'<tr><th scope="row" title="{escaping.escape(charts.plain(b["name"]))}">'
            f"{charts.name_of(b, rank)}</th>" + "".join(f"<td>{x}</td>" for x in cells) + "</tr>"
        )
    head = "<th>behaviour</th>" + "".join(f'<th scope="col">{x}</th>' for x in heads)
    meanings = "".join(
        f"<dt>{name}</dt><dd>{said.format(most=data['most'])}</dd>"
        for name, said in MEANINGS.items()
    )
    return (
        f"<section><h2>All figures</h2>{charts.table(head, rows, 'All figures', 'figures')}"
        f'<dl class="meanings">{meanings}</dl></section>'
    )


def _watches(data: Mapping[str, Any]) -> str:
    return "".join(_watch(data, watch, k) for k, watch in enumerate(data["watches"]))


def _watch(data: Mapping[str, Any], watch: Mapping[str, Any], number: int) -> str:
    """What happened in a training: the order, warnings, and curves."""
    ranks = {b["name"]: rank for rank, b in enumerate(data["behaviours"], 1)}
    names = sorted(watch["behaviours"], key=lambda b: ranks.get(b, len(ranks) + 1))
    few = names if len(names) <= SHOWN else [*names[: SHOWN // 2], *names[-SHOWN // 2 :]]
    styles = {name: k for k, name in enumerate(few)}
    tags = {name: str(ranks.get(name, "")) for name in names}
    steps = [record["step"] for record in watch["history"]]
    said = [f"steps {steps[0]:,} to {steps[-1]:,}"]
    said += [HEADS[watch["head"]]] if watch["head"] in HEADS else []
    said += [f"β = {figure(watch['beta'])}"] if watch["beta"] is not None else []
    parts = [
        f"<p class=soft>{'; '.join(said)}.</p>",
        _warnings(watch),
        _order(watch, ranks, number),
    ]
    key = charts.key([(styles[b], f"{tags[b]} {escaped(b)}") for b in few])
    if len(few) < len(names):
        key += f'<p class="soft">Pale: the {len(names) - len(few)} others.</p>'
    overlaid = []
    for figure_, (title, span, least) in OVERLAID.items():
        drawn = [Curve(runs.points(watch, b, figure_), styles.get(b), b, tags[b]) for b in names]
        if any(curve.points for curve in drawn):
            said_ = f"{title} of each behaviour over steps"
            picture = charts.curves(drawn, said_, span=span, least=least)
            overlaid.append(f"<div><h4>{title}</h4>{picture}</div>")
    parts.append(f'<h3>Curves</h3>{key}<div class="charts">{"".join(overlaid)}</div>')
    warned = {w["behaviour"] for w in watch["warnings"]}
    parts.append(_log_probs(watch, sorted(names, key=lambda b: b not in warned), tags))
    title = f"What happened: {escaped(watch['name'])}"
    return f'<section class="watch"><h2>{title}</h2>{"".join(parts)}</section>'


def _warnings(watch: Mapping[str, Any]) -> str:
    if not watch["warnings"]:
        return ""
    each = "".join(f"<li>step {w['step']:,}: {escaped(w['text'])}</li>" for w in watch["warnings"])
    return f'<h3>Warnings</h3><ul class="notes warnings">{each}</ul>'


def _order(watch: Mapping[str, Any], ranks: Mapping[str, int], number: int) -> str:
    """The observed order beside the predicted one."""
    order = watch["observed"]["order"]
    if not order:
        return "<p>The loss is known at one step alone, so that there is no observed order.</p>"
    rows = []
    for place, name in enumerate(order, 1):
        ends = []
        for figure_ in ("loss", "accuracy"):
            known = runs.points(watch, name, figure_)
            ends.append(f"{figure(known[0][1])} → {figure(known[-1][1])}" if known else NONE)
        growth = runs.growth(watch, name)
        grown = NONE if growth is None else " ± ".join(aligned(*growth))
        fall = figure(watch["observed"]["falls"][name])
        cells = (str(ranks.get(name, NONE)), fall, grown, *ends)
        rows.append(
            f'<tr><th scope="row" title="{escaping.escape(charts.plain(name))}">'
            f'<span class="rank">{place}</span>{escaped(name)}</th>'
            + "".join(f"<td>{x}</td>" for x in cells)
            + "</tr>"
        )
    head = "<th>as observed</th>" + "".join(
        f'<th scope="col">{x}</th>'
        for x in ("predicted place", "mean fall", "growth", "loss", "accuracy")
    )
    agree = watch["observed"]
    said = (
        "The mean fall is how far the loss lay below its start, on average over all steps. One was "
        "learnt before another only where the growth of its margin at the last step lies above 0 "
        "and above the other's, by 95 % intervals; else the order is too close to call."
    )
    if agree["of"]:
        said += (
            f" Of {counted(agree['of'], 'pair')} resolved both before and after, "
            f"{agree['agree']} came as predicted."
        )
    label = "Predicted and observed order"
    return f"<h3>{label}</h3><p class=soft>{said}</p>" + charts.table(
        head, rows, label, f"observed{number}"
    )


def _log_probs(watch: Mapping[str, Any], names: Sequence[str], tags: Mapping[str, str]) -> str:
    """A picture for each behaviour: log-probs of chosen and of rejected responses."""
    pictures = []
    for name in names:
        drawn = [
            Curve(runs.points(watch, name, figure_), style, figure_)
            for figure_, style in LOG_PROBS.items()
        ]
        if any(curve.points for curve in drawn):
            picture = charts.curves(drawn, f"log-probs of {name} over steps")
            pictures.append(f"<div><h4>{tags[name]} {escaped(name)}</h4>{picture}</div>")
    if not pictures:
        return ""
    key = charts.key([(style, name) for name, style in LOG_PROBS.items()])
    found = (
        '<h3>Log-probs of responses</h3><p class="soft">In nats, of whole responses. Squeezing: '
        "where chosen and rejected fall together while the likeliest token's log-prob above rises, "
        "training moves mass to neither.</p>"
        f'{key}<div class="charts">{"".join(pictures[:SHOWN])}</div>'
    )
    if len(pictures) > SHOWN:
        found += (
            f"<details><summary>{len(pictures) - SHOWN} more behaviours</summary>"
            f'<div class="charts">{"".join(pictures[SHOWN:])}</div></details>'
        )
    return found


def _notes(data: Mapping[str, Any]) -> str:
    texts = [escaped(note) for note in data["notes"]]
    model = f" of {escaped(data['model'])}" if data["model"] else ""
    texts.append(
        f"States are what the output head{model} reads at the last token of each text. Texts: "
        f"{KINDS[data['kind']]}."
    )
    texts.append(
        "The order is that of the middles of the intervals. Method: Im and Li, "
        "arXiv:2403.18742; squeezing: Ren and Sutherland, arXiv:2407.10490."
    )
    each = "".join(f"<li>{text}</li>" for text in texts)
    return f'<section><h2>Notes</h2><ul class="notes" id="notes">{each}</ul></section>\n</main>'
