"""What a report says first, in words: the order, what is starved, and what to do."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .wording import NAMED, Line, Sentence, aligned, counted, figure, listed, percent

STARVED = 0.5  # from this priority on, the other behaviour is called starved
OPPOSED = 1.0  # above it, a step on both moves the other behaviour the wrong way
EVEN = 1.25  # shares within this factor are left as they are
TODO = "What to do"
SAME = "look the same to the model"


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
    first, last = ends(names, before)
    return {
        "pairs": len(names) * (len(names) - 1) // 2,
        "resolved": sum(map(sum, before)),
        "first": first,
        "last": last,
        "starved": starved,
        "opposed": opposed,
        "not_apart": [b["name"] for b in behaviours if not b["interval"][0]],
    }


def ends(names: Sequence[str], before: Sequence[Sequence[bool]]) -> tuple[list[str], list[str]]:
    """The names that may be first, and those that may be last: none is before, or after, them."""
    places = range(len(names))
    first = [names[j] for j in places if not any(before[i][j] for i in places)]
    last = [names[j] for j in places if not any(before[j][i] for i in places)]
    return first, last


def ahead(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    """Whether the interval of `a` lies above that of `b`."""
    high = b["interval"][1]
    return a["interval"][0] > (math.inf if high is None else high)


_Part = Callable[[Mapping[str, Any]], list[Line]]


def lines(data: Mapping[str, Any]) -> list[Line]:
    """The answer of a report, in words."""
    first: tuple[_Part, ...] = (_order, _starved)
    todo: tuple[_Part, ...] = (_rebalancing,)
    if len(data["behaviours"]) == 1:
        first, todo = (_alone,), ()
    elif not data["answer"]["resolved"]:
        first, todo = (_unresolved,), (_more_texts,)
    if data["answer"]["same"]:
        todo = (_labels,)
    return [line for part in (*first, _told_apart, _watched, *todo) for line in part(data)]


def _alone(data: Mapping[str, Any]) -> list[Line]:
    (only,) = data["behaviours"]
    low, high = only["interval"]
    x, low, high = aligned(only["distinguishability"], low, high)
    far = f"{x} (95 %: {low} to {high})"
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
    first, between, last = parted(answer["first"], answer["last"])
    lines = []
    for place, some, why in (
        ("first", first, ": their intervals overlap"),
        ("last", last[::-1], ""),
    ):
        who, names = listed(some)
        if len(some) > 1:
            said = f"{who} come {place}. Which of them is too close to call{why}."
        else:
            said = f"{who} comes {place}." if between else f"{who} will be learnt {place}."
        lines.append(Line(f"Learnt {place}", [Sentence(said, names)]))
    if between:
        who, names = listed(between)
        has = "has an interval that overlaps"
        has = has if len(between) == 1 else "have intervals that overlap"
        said = f"{who} {has} with those of both ends: any place is possible."
        lines.insert(1, Line("Between", [Sentence(said, names)]))
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
    for heading, each, verb, meaning, of_many in (
        (
            *("Starved", starved, "is starved by", "moves {1} at least twice as far as {0}"),
            "moves the one that starves at least twice as far as the one that is starved",
        ),
        (
            *("Opposed", against, "is opposed by", "moves {0} the wrong way"),
            "moves the one that is opposed the wrong way",
        ),
    ):
        said: list[Sentence] = []
        for x in each[:NAMED]:
            first, *others = x["by"]
            more = f" and {counted(len(others), 'other')}" if others else ""
            words = f"{{}} {verb} {{}} (priority {first['priority']:.2f}){more}."
            said.append(Sentence(words, (x["behaviour"], first["behaviour"])))
        if len(each) > NAMED:
            more = "So is 1 more" if len(each) == NAMED + 1 else f"So are {len(each) - NAMED} more"
            said.append(Sentence(f"{more}: see the priorities below."))
        if said:
            one = len(each) == len(each[0]["by"]) == 1
            step = f"A first step on both {meaning if one else of_many}."
            lines.append(Line(heading, [*said, Sentence(step, said[0].names if one else ())]))
    none = f"No behaviour: no priority of an order that is resolved reaches {STARVED}."
    return lines or [Line("Starved", [Sentence(none)])]


def _told_apart(data: Mapping[str, Any]) -> list[Line]:
    same = data["answer"]["same"]
    lines = []
    if same:
        who, names = listed(same)
        lines.append(Line("No difference", [Sentence(f"Both sides of {who} {SAME}.", names)]))
    found = [b for b in data["answer"]["not_apart"] if b not in same]
    if not found or (len(found) == len(data["behaviours"]) > 1):
        return lines
    who, names = listed(found)
    rest = "are not told apart from chance, as their intervals begin at 0."
    if len(found) == 1:
        rest = "is not told apart from chance, as its interval begins at 0."
    return [*lines, Line("Hardly there", [Sentence(f"{who} {rest}", names)])]


def _labels(data: Mapping[str, Any]) -> list[Line]:
    """What to do where both sides of a behaviour are the same: its share would be all rows."""
    who, names = listed(data["answer"]["same"])
    todo = [Sentence(f"Check the texts and labels of {who}: both sides {SAME}.", names)]
    if len(data["behaviours"]) > 1:
        todo.append(Sentence("Until then, leave the shares as they are."))
    if data["balanced"] is not None:
        todo.append(Sentence("Do not train on {}.", (data["balanced"],)))
    return [Line(TODO, todo)]


def _rebalancing(data: Mapping[str, Any]) -> list[Line]:
    each = [b for b in data["behaviours"] if b["even_share"] is not None]
    change = {b["name"]: b["even_share"] / b["share"] for b in each}
    starved = {x["behaviour"] for x in data["answer"]["starved"]}
    kept = [b for b in each if b["name"] in starved and 1 / EVEN <= change[b["name"]] <= EVEN]
    left = []
    if kept:
        who, names = listed([b["name"] for b in kept], _changes(kept))
        are = "is" if len(kept) == 1 else "are"
        left.append(Sentence(f"Though starved, {who} {are} about even already.", names))
    if not each or max(max(x, 1 / x) for x in change.values()) <= EVEN:
        return [Line(TODO, [Sentence("Nothing: the shares are about even already."), *left])]
    more = sorted((b for b in each if change[b["name"]] > EVEN), key=lambda b: -b["even_share"])
    less = sorted((b for b in each if change[b["name"]] < 1 / EVEN), key=lambda b: -b["share"])
    said = []
    guessed = [b["name"] for b in each if not b["interval"][0]]
    if guessed:
        who, names = listed(guessed)
        which = "its share is a guess" if len(guessed) == 1 else "their shares are guesses"
        said.append(Sentence(f"First get more texts of {who}: until then, {which}.", names))
    for verb, some in (("Give more rows to", more), ("Give fewer rows to", less)):
        if some:
            who, names = listed([b["name"] for b in some], _changes(some))
            said.append(Sentence(f"{verb} {who}.", names))
    said += left
    if data["balanced"] is not None:
        words = "{} has such rows: train on it."
        if data["kind"] != "pairs":
            words = (
                "{} has such rows: turn its statements into pairs by "
                "`dynamics.statement_pairs`, and train on these."
            )
        said.append(Sentence(words, (data["balanced"],)))
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
        who, names = listed([b["name"] for b in short], each_said)
        words = f"As a row is repeated {data['most']} times at most, even learning needs new rows"
        said.append(Sentence(f"{words} of {who}.", names))
    return [Line(TODO, said)]


def _changes(behaviours: Sequence[Mapping[str, Any]]) -> list[str]:
    """What follows the name of each behaviour: its share, and that of even learning."""
    return [f" ({percent(b['share'])} → {percent(b['even_share'])})" for b in behaviours]


def _watched(data: Mapping[str, Any]) -> list[Line]:
    """What trainings did that were watched."""
    lines = []
    of_data = {b["name"] for b in data["behaviours"]}
    for watch in data["watches"]:
        if of_data.isdisjoint(watch["behaviours"]):
            said = Sentence(
                "{} is left out here: it has none of these behaviours.", (watch["name"],)
            )
        else:
            said = _happened(watch)
        lines.append(Line("What happened", [said]))
    return lines


def _happened(watch: Mapping[str, Any]) -> Sentence:
    """In which order a training learnt, as far as intervals resolve it."""
    observed, warned = watch["observed"], len(watch["warnings"])
    first, between, last = parted(observed["first"], observed["last"])
    parts: list[str] = []
    names = [watch["name"]]

    def add(some: Sequence[str], one: str, more: str) -> None:
        if some:
            who, shown = listed(some)
            parts.append(f"{who} {one if len(some) == 1 else more}")
            names.extend(shown)

    if first:
        add(first, "was learnt first", "were learnt first")
        add(last, "last", "last")
        parts[:2] = [" and ".join(parts)]
        where = "overlaps with both: too close to call"
        add(between, where, where.replace("overlaps", "overlap"))
    else:
        add(between, "was learnt", "were learnt: their order is too close to call")
    add(observed["hardly"], "was hardly learnt", "were hardly learnt")
    add(observed["unknown"], "was measured too little", "were measured too little")
    words = "In {}, " + ("; ".join(parts) or "too little is known for an order")
    if observed["of"]:
        pairs = counted(observed["of"], "pair")
        words += f". Of {pairs} resolved before and after, {observed['agree']} came as predicted"
    words += f". {counted(warned, 'warning')}: see below." if warned else ". No warnings."
    return Sentence(words, tuple(names))


def parted(first: Sequence[str], last: Sequence[str]) -> tuple[list[str], list[str], list[str]]:
    """The names that may be first, those that may be both, and those that may be last."""
    between = [b for b in first if b in last]
    return (
        [b for b in first if b not in between],
        between,
        [b for b in last if b not in between],
    )
