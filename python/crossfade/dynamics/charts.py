"""Pictures of a report: bars with intervals, a heat map of priorities, and curves over steps.

Bars and the heat map are plain HTML, which fits any width; curves are SVG. Names of behaviours are
escaped by `escaped`, which is all that brings text into the page.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from . import findings
from .wording import aligned, percent, plain

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 420, 250, 52, 30, 12, 42  # of curves, and their margins
DIGIT = 8.6  # how wide a digit is at most, which the left margin leaves room for
STYLES = 8  # curves that differ by colour and dashes
DASHES = ("none", "7 4", "2 3", "9 3 2 3")
MINUS = "\u2212"
GAP = 13  # between the numbers at the ends of curves


def escaped(text: str) -> str:
    """A text as HTML, whose direction does not reach what stands around it."""
    return f"<bdi>{html.escape(plain(text))}</bdi>"


def name_of(behaviour: Mapping[str, Any], rank: int) -> str:
    """The number and the name of a behaviour. A name that is cut is whole in its title."""
    return f'<span class="rank">{rank}</span>{escaped(behaviour["name"])}'


def distances(behaviours: Sequence[Mapping[str, Any]]) -> str:
    """A row for each behaviour: its interval, and a dot where its distance was found."""
    ends = [b["interval"][1] or 0.0 for b in behaviours]
    most = max([*ends, *(b["distinguishability"] for b in behaviours)]) or 1.0
    rows = []
    for rank, b in enumerate(behaviours, 1):
        low, high = b["interval"]
        at = 100 * b["distinguishability"] / most
        left, right = 100 * low / most, 100.0 if high is None else 100 * high / most
        found, *ends_ = aligned(b["distinguishability"], low, high)
        said = f"{found} ({' to '.join(ends_)})"
        open_ = " open" if high is None else ""
        rows.append(
            f'<li><span class="name" title="{html.escape(plain(b["name"]))}">{name_of(b, rank)}'
            f'</span><span class="track" aria-hidden="true"><i class="between{open_}" '
            f'style="left:{left:.2f}%;width:{max(0.0, right - left):.2f}%"></i>'
            f'<i class="dot" style="left:{at:.2f}%"></i></span>'
            f'<span class="figures">{said}</span></li>'
        )
    return f'<ol class="bars" id="distances">{"".join(rows)}</ol>'


def shares(behaviours: Sequence[Mapping[str, Any]]) -> str:
    """A row for each behaviour: its share of the rows as they are, and by which all are even."""
    most = max(max(b["share"], b["even_share"]) for b in behaviours)
    rows = []
    for rank, b in enumerate(behaviours, 1):
        bars = "".join(
            f'<i class="{kind}" style="width:{100 * x / most:.2f}%"></i>'
            for kind, x in (("now", b["share"]), ("then", b["even_share"]))
        )
        rows.append(
            f'<li><span class="name" title="{html.escape(plain(b["name"]))}">{name_of(b, rank)}'
            f'</span><span class="track" aria-hidden="true">{bars}</span><span class="figures">'
            f"{percent(b['share'])} → {percent(b['even_share'])}</span></li>"
        )
    return f'<ol class="bars" id="shares">{"".join(rows)}</ol>'


def heat_map(behaviours: Sequence[Mapping[str, Any]], matrix: Sequence[Sequence[float]]) -> str:
    """The priorities as a table whose cells are coloured; unresolved ones are in brackets."""
    columns = "".join(
        f'<th scope="col" title="{html.escape(plain(b["name"]))}">{j}</th>'
        for j, b in enumerate(behaviours, 1)
    )
    rows = []
    for i, a in enumerate(behaviours):
        cells = [
            _cell(matrix[i][j], findings.ahead(a, b) or findings.ahead(b, a))
            if i != j
            else "<td>·</td>"
            for j, b in enumerate(behaviours)
        ]
        rows.append(
            f'<tr><th scope="row" title="{html.escape(plain(a["name"]))}">{name_of(a, i + 1)}</th>'
            f"{''.join(cells)}</tr>"
        )
    return table(f"<th>over</th>{columns}", rows, "Priorities", "priorities")


def _cell(priority: float, resolved: bool) -> str:
    said = f"{round(priority, 2) + 0.0:.2f}".replace("-", MINUS)  # no -0.00
    if not resolved:
        return f'<td class="close">({said})</td>'
    sign = "up" if priority > 0 else "down"
    return f'<td class="{sign}" style="--a:{min(1.0, abs(priority)):.2f}">{said}</td>'


def table(head: str, rows: Iterable[str], label: str, place: str) -> str:
    """A table that scrolls in a box of its own, also by keys."""
    return (
        f'<div class="box" tabindex="0" role="region" aria-label="{label}"><table id="{place}">'
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


class Curve(NamedTuple):
    """A curve: its points, the number of its style or None for a pale one, and what it is."""

    points: Sequence[tuple[float, float]]
    style: int | None
    label: str
    tag: str = ""


def style_of(number: int) -> str:
    """Colour and dashes of a curve. Eight curves differ in both together."""
    return (
        f"stroke:var(--c{number % STYLES});stroke-dasharray:"
        f"{DASHES[(number + number // 4) % len(DASHES)]}"
    )


def key(labels: Sequence[tuple[int, str]]) -> str:
    """What styles mean, each beside a short piece of its curve; labels are HTML."""
    each = "".join(
        f'<span><svg viewBox="0 0 36 10" aria-hidden="true"><path class="series" d="M1 5H35" '
        f'style="{style_of(number)}"/></svg><span>{label}</span></span>'
        for number, label in labels
    )
    return f'<div class="key">{each}</div>'


def curves(
    each: Sequence[Curve],
    label: str,
    *,
    span: tuple[float, float] | None = None,
    least: tuple[float, float] | None = None,
) -> str:
    """Curves over the steps of a training.

    Args:
        label: what the picture shows, for who cannot see it.
        span: the ends of the vertical axis; None: those of the points.
        least: what the vertical axis reaches at least.
    """
    points = [p for curve in each for p in curve.points]
    if not points:
        return '<p class="soft">Nothing is known of it.</p>'
    values = [y for _, y in points] + list(least or ())
    x0, x1 = _apart(min(x for x, _ in points), max(x for x, _ in points))
    y0, y1 = span or _padded(*_apart(min(values), max(values)))
    ticks = [(t, _said(t)) for t in _ticks(y0, y1)]
    left = max(LEFT, 12 + DIGIT * max((len(said) for _, said in ticks), default=0))

    def at(x: float, y: float) -> tuple[float, float]:
        across = left + (x - x0) / (x1 - x0) * (WIDTH - left - RIGHT)
        return across, HEIGHT - BOTTOM - (y - y0) / (y1 - y0) * (HEIGHT - TOP - BOTTOM)

    parts = []
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    for t, said in ticks:
        y = at(x0, t)[1]
        parts.append(f'<line class="axis" x1="{left:.1f}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(_text(left - 6, y + 4.5, "end", said))
    steps = _ticks(x0, x1, whole=True)
    parts += [_text(at(t, y0)[0], bottom + 18, "middle", _said(t)) for t in steps]
    parts.append(_text((left + right) / 2, HEIGHT - 5, "middle", "step"))
    ends: list[tuple[float, float, Curve]] = []
    for curve in sorted(each, key=lambda c: c.style is not None):  # pale ones lie below
        if not curve.points:
            continue
        places = [at(*p) for p in curve.points]
        path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
        path += "h.1" * (len(places) == 1)
        kind = 'class="pale"'
        if curve.style is not None:
            kind = f'class="series" style="{style_of(curve.style)}"'
            ends += [(places[-1][1], places[-1][0], curve)] if curve.tag else []
        title = f"<title>{html.escape(plain(curve.label))}</title>"
        parts.append(f'<path {kind} stroke-linecap="round" d="{path}">{title}</path>')
    ends.sort(key=lambda each: each[0])
    for y, (_, x, curve) in zip(_parted([y for y, *_ in ends]), ends, strict=True):
        color = f"fill:var(--c{(curve.style or 0) % STYLES})"
        tag = html.escape(curve.tag)
        parts.append(
            f'<text class="tag" x="{x + 5:.1f}" y="{y + 4:.1f}" style="{color}">{tag}</text>'
        )
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(plain(label))}">'
        f"{''.join(parts)}</svg>"
    )


def _text(x: float, y: float, anchor: str, said: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{said}</text>'


def _apart(low: float, high: float) -> tuple[float, float]:
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _padded(low: float, high: float) -> tuple[float, float]:
    more = 0.06 * (high - low)
    return low - more, high + more


def _ticks(low: float, high: float, whole: bool = False) -> list[float]:
    """Round numbers between two ends, four or so."""
    rough = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(s for s in (power, 2 * power, 5 * power, 10 * power) if s >= rough * (1 - 1e-9))
    step = max(1.0, step) if whole else step
    first = math.ceil(low / step - 1e-9)
    return [k * step for k in range(first, first + 12) if k * step <= high + 1e-9 * step]


def _said(x: float) -> str:
    return f"{x:.6g}".replace("-", MINUS)


def _parted(places: Sequence[float]) -> list[float]:
    """Places in ascending order, moved so that neighbours are `GAP` apart and none leaves."""
    found: list[float] = []
    for y in places:
        found.append(max(y, found[-1] + GAP) if found else max(y, TOP))
    limit = float(HEIGHT - BOTTOM)
    for k in reversed(range(len(found))):
        found[k] = min(found[k], limit)
        limit = found[k] - GAP
    return found
