"""What a report says first, in words: the order, what is starved, and what to do."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

STARVED = 0.5  # from this priority on, the other behaviour is called starved
OPPOSED = 1.0  # above it, a step on both moves the other behaviour the wrong way
EVEN = 1.25  # shares within this factor are left as they are
NAMED = 5  # behaviours of a list that a sentence names; the tables have all
LONGEST = 60  # characters of a name in a sentence
NONE = "\u2013"  # in the place of a figure
TODO = "What to do"


@dataclass(frozen=True)
class Sentence:
    """Words with a ``{}`` for each name of a behaviour or a file, which may hold any characters.

    Code is between backticks.
    """

    words: str
    names: tuple[str, ...] = ()

    def __str__(self) -> str:
        return self.words.format(*map(brief, self.names))


@dataclass(frozen=True)
class Line:
    """A part of the answer."""

    heading: str
    sentences: Sequence[Sentence]


def find(
    behaviours: Sequence[Mapping[str, Any]], matrix: Sequence[Sequence[float]]
) -> dict[str, Any]:
    """Who is first, last, starved and opposed, as far as intervals resolve it.

    Args:
        behaviours: as `Report.data` has them, in their order.
        matrix: the priorities in that order.
    """
    names = [b["name"] for b in behaviours]
    before = [[ahead(a, b) for b in behaviours] for a in behaviours]
    places = range(len(names))
    starved: list[dict[str, Any]] = []
    opposed: list[dict[str, Any]] = []
    for j in places:
        over = [i for i in places if before[i][j]]
        by = sorted((i for i in over if matrix[i][j] >= STARVED), key=lambda i: -matrix[i][j])
        against = [i for i in by if matrix[i][j] > OPPOSED]
        for kept, found in ((by, starved), (against, opposed)):
            if kept:
                each = [{"behaviour": names[i], "priority": matrix[i][j]} for i in kept]
                found.append({"behaviour": names[j], "by": each})
    starved.sort(key=lambda x: -x["by"][0]["priority"])
    opposed.sort(key=lambda x: -x["by"][0]["priority"])
    last = len(names) - 1
    return {
        "pairs": len(names) * last // 2,
        "resolved": sum(map(sum, before)),
        "first": [names[j] for j in places if not before[0][j]],
        "last": [names[j] for j in places if not before[j][last]],
        "starved": starved,
        "opposed": opposed,
        "not_apart": [b["name"] for b in behaviours if not b["interval"][0]],
    }


def ahead(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    """Whether the interval of `a` lies above that of `b`."""
    high = b["interval"][1]
    return a["interval"][0] > (math.inf if high is None else high)


def lines(data: Mapping[str, Any]) -> list[Line]:
    """The answer of a report, in words."""
    if len(data["behaviours"]) == 1:
        return [*_alone(data), *_told_apart(data), *_watched(data)]
    if not data["answer"]["resolved"]:
        return [*_unresolved(data), *_told_apart(data), *_watched(data), *_more_texts(data)]
    parts = (_order, _starved, _told_apart, _watched, _rebalancing)
    return [line for part in parts for line in part(data)]


def _alone(data: Mapping[str, Any]) -> list[Line]:
    (only,) = data["behaviours"]
    low, high = only["interval"]
    far = f"{figure(only['distinguishability'])} (95 %: {figure(low)} to {end(high)})"
    said = f"{{}} is the only one: its sides are {far} apart. An order, priorities and shares need "
    return [Line("One behaviour", [Sentence(f"{said}at least two.", (only["name"],))])]


def _unresolved(data: Mapping[str, Any]) -> list[Line]:
    said = "Which behaviour is learnt first cannot be told from these texts: all intervals overlap."
    return [Line("Nothing is resolved", [Sentence(said)])]


def _more_texts(data: Mapping[str, Any]) -> list[Line]:
    todo = [
        Sentence("Leave the shares as they are."),
        Sentence(
            "More texts of each behaviour make the intervals narrower: four times as many about "
            "halve them."
        ),
    ]
    if data["balanced"] is not None:
        said = "Do not train on {}: its shares rest on differences that may be chance."
        todo.insert(0, Sentence(said, (data["balanced"],)))
    return [Line(TODO, todo)]


def _order(data: Mapping[str, Any]) -> list[Line]:
    answer, every = data["answer"], len(data["behaviours"])
    first, last = answer["first"], answer["last"][::-1]
    if len(first) == 1:
        found = Sentence("{} will be learnt first.", (first[0],))
    elif len(first) == every:
        said = "Too close to call: the interval of {} overlaps with all others."
        found = Sentence(said, (first[0],))
    else:
        who, names = _listed(first)
        said = f"{who} come first. Which of them is too close to call: their intervals overlap."
        found = Sentence(said, names)
    lines = [Line("Learnt first", [found])]
    if len(last) == 1:
        lines.append(Line("Learnt last", [Sentence("{} will be learnt last.", (last[0],))]))
    elif len(last) < every:
        who, names = _listed(last)
        said = f"{who} come last. Which of them is too close to call."
        lines.append(Line("Learnt last", [Sentence(said, names)]))
    unresolved = answer["pairs"] - answer["resolved"]
    if unresolved and every > 2:
        are = "is" if unresolved == 1 else "are"
        said = (
            f"Of {answer['pairs']:,} pairs of behaviours, {unresolved:,} {are} too close to call."
        )
        lines.append(Line("Not resolved", [Sentence(said)]))
    return lines


def _starved(data: Mapping[str, Any]) -> list[Line]:
    against = data["answer"]["opposed"]
    opposed = {x["behaviour"] for x in against}
    starved = [x for x in data["answer"]["starved"] if x["behaviour"] not in opposed]
    lines = []
    for heading, each, verb, meaning in (
        (
            "Starved",
            starved,
            "is starved by",
            "moves the other at least twice as far",
        ),
        ("Opposed", against, "is opposed by", "pushes it the wrong way"),
    ):
        said = []
        for x in each[:NAMED]:
            first, *others = x["by"]
            more = f" and {counted(len(others), 'other')}" if others else ""
            words = f"{{}} {verb} {{}} (priority {first['priority']:.2f}){more}."
            said.append(Sentence(words, (x["behaviour"], first["behaviour"])))
        if len(each) > NAMED:
            more = "So is 1 more" if len(each) == NAMED + 1 else f"So are {len(each) - NAMED} more"
            said.append(Sentence(f"{more}: see the priorities below."))
        if said:
            lines.append(Line(heading, [*said, Sentence(f"A first step on both {meaning}.")]))
    none = f"No behaviour: no priority of an order that is resolved reaches {STARVED}."
    return lines or [Line("Starved", [Sentence(none)])]


def _told_apart(data: Mapping[str, Any]) -> list[Line]:
    found = data["answer"]["not_apart"]
    if not found or (len(found) == len(data["behaviours"]) > 1):
        return []
    who, names = _listed(found)
    rest = "are not told apart from chance, as their intervals begin at 0."
    if len(found) == 1:
        rest = "is not told apart from chance, as its interval begins at 0."
    return [Line("Hardly there", [Sentence(f"{who} {rest}", names)])]


def _rebalancing(data: Mapping[str, Any]) -> list[Line]:
    each = [b for b in data["behaviours"] if b["even_share"] is not None]
    change = {b["name"]: b["even_share"] / b["share"] for b in each}
    if not each or max(max(x, 1 / x) for x in change.values()) <= EVEN:
        return [Line(TODO, [Sentence("Nothing: the shares are about even already.")])]
    more = sorted((b for b in each if change[b["name"]] > EVEN), key=lambda b: -b["even_share"])
    less = sorted((b for b in each if change[b["name"]] < 1 / EVEN), key=lambda b: -b["share"])
    said = []
    guessed = [b["name"] for b in each if not b["interval"][0]]
    if guessed:
        who, names = _listed(guessed)
        which = "its share is a guess" if len(guessed) == 1 else "their shares are guesses"
        said.append(Sentence(f"First get more texts of {who}: until then, {which}.", names))
    for verb, some in (("Give more rows to", more), ("Give fewer rows to", less)):
        if some:
            each_said = [f" ({percent(b['share'])} → {percent(b['even_share'])})" for b in some]
            who, names = _listed([b["name"] for b in some], each_said)
            said.append(Sentence(f"{verb} {who}.", names))
    if data["balanced"] is not None:
        said.append(Sentence("{} has such rows: train on it.", (data["balanced"],)))
    else:
        said.append(
            Sentence(
                "`crossfade dynamics ... --balanced FILE` writes such rows, and "
                "`dynamics.rebalanced(rows, stats)` gives them."
            )
        )
    short = [b for b in each if b["repeats_needed"] > data["most"]]
    if short:
        each_said = [f" ({figure(b['repeats_needed'])} times as many)" for b in short]
        who, names = _listed([b["name"] for b in short], each_said)
        words = f"As a row is repeated {data['most']} times at most, even learning needs new rows"
        said.append(Sentence(f"{words} of {who}.", names))
    return [Line(TODO, said)]


def _watched(data: Mapping[str, Any]) -> list[Line]:
    """What trainings did that were watched."""
    lines = []
    for watch in data["watches"]:
        found, warned = watch["observed"], len(watch["warnings"])
        order, names = found["order"], [watch["name"]]
        if len(order) == 1:
            words = "In {}, its loss was measured"
        elif order:
            words = "In {}, {} was learnt first and {} last"
            names += [order[0], order[-1]]
            if found["of"]:
                pairs = counted(found["of"], "pair")
                words += f"; {found['agree']} of {pairs} whose order is resolved came in that order"
        else:
            words = "In {}, too little is known for an order"
        words += f". {counted(warned, 'warning')}: see below." if warned else ". No warnings."
        lines.append(Line("What happened", [Sentence(words, tuple(names))]))
    return lines


def counted(n: int, what: str) -> str:
    """So many of something, in words."""
    return f"{n:,} {what}" if n == 1 else f"{n:,} {what}s"


def _listed(
    names: Sequence[str], after: Sequence[str] | None = None
) -> tuple[str, tuple[str, ...]]:
    """The words of a list and the names in it, of which there are few; `after` follows each."""
    shown = tuple(names[:NAMED])
    each = [f"{{}}{after[i] if after else ''}" for i in range(len(shown))]
    if len(names) > NAMED:
        each.append(f"{len(names) - NAMED} more")
    return ", ".join(each[:-1]) + " and " * (len(each) > 1) + each[-1], shown


def brief(name: str) -> str:
    """A name that a sentence can hold."""
    name = plain(name)
    return name if len(name) <= LONGEST else f"{name[: LONGEST - 1]}…"


def plain(name: str) -> str:
    """A name without line breaks, and without what steers a terminal or turns its text around."""
    kept = "".join(
        " " if x.isspace() else "\ufffd" if unicodedata.category(x) in ("Cc", "Cs") else x
        for x in name
        if unicodedata.bidirectional(x) not in _TURNS
    )
    return " ".join(kept.split()) or repr(name)


_TURNS = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}  # classes of Unicode


def figure(x: float | None) -> str:
    """A figure with three digits, or with all before the point."""
    if x is None:
        return NONE
    return f"{x:,.0f}" if 1000 <= abs(x) < 1e9 else f"{x:.3g}"


def end(x: float | None) -> str:
    """The upper end of an interval."""
    return "∞" if x is None else figure(x)


def percent(x: float) -> str:
    """A share; a small one keeps a digit that is not 0."""
    return f"{100 * x:.0f} %" if x >= 0.02 or not x else f"{100 * x:.1g} %"
