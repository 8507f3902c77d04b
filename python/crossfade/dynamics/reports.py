"""A report of learning dynamics: what will be learnt first, what starves what, what to do."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..checks import explained
from ..decoding.settings import check_int
from ..files import write_text
from . import findings, runs, wording
from .behaviours import Statistics
from .priority import priorities
from .rebalancing import counts, shares

FORM = 1  # of the data of a report
ROUNDING = 1e-5  # of the norm of states: sides that are no further apart look the same


@dataclass(frozen=True, repr=False, eq=False)
class Report:
    """What `report` makes of statistics: one page, and its figures. Printed, it is the summary.

    Attributes:
        data: all figures as plain JSON; the page on learning dynamics says what each is.
    """

    data: dict[str, Any]

    @property
    def summary(self) -> str:
        """The answer in plain words, a part a paragraph."""
        found = [
            f"{line.heading}: " + " ".join(map(str, line.sentences))
            for line in findings.lines(self.data)
        ]
        return "\n".join(found)

    def __repr__(self) -> str:
        return self.summary

    @property
    def html(self) -> str:
        """The page: one HTML file, which needs nothing else and no network."""
        from . import page

        return page.html(self.data)

    def to_html(self, path: str | os.PathLike[str]) -> None:
        """Write the page; a file that is there keeps its text until the new one is whole.

        Raises:
            OSError: the folder is not there, or cannot be written.
        """
        write_text(path, self.html)

    def to_json(self, path: str | os.PathLike[str]) -> None:
        """Write `data`, as `to_html` writes the page."""
        text = json.dumps(self.data, ensure_ascii=False, indent=1, allow_nan=False)
        write_text(path, text + "\n")


@explained()
def report(
    stats: Mapping[str, Statistics],
    *,
    model: str | None = None,
    watches: Mapping[str, Any] | None = None,
    notes: Sequence[str] = (),
    balanced: str | None = None,
    most: int = 10,
) -> Report:
    """What statistics mean for a training: an order, priorities and shares, as far as resolved.

    Behaviours are in the order of the middles of their intervals. One is ahead of another if its
    interval lies above the other's. It starves the other if its priority over it is 0.5 or more
    besides, and opposes it if that is above 1.

    Args:
        stats: as `statistics` gives them.
        model: what the page calls the model.
        watches: trainings that were watched, by names: each a `Watch`, or what its file holds.
        notes: what a reader should know besides, such as the warnings of `statistics`.
        balanced: the name of a file with rows that are rebalanced, where there is one.
        most: how often a rebalanced row is there at most.

    Raises:
        TypeError, ValueError: names the argument, what it was and what it must be.
    """
    check_int("most", most, 1)
    if not isinstance(stats, Mapping) or not all(isinstance(s, Statistics) for s in stats.values()):
        raise TypeError("stats must be a mapping of names to Statistics, as statistics gives it")
    if not stats:
        raise ValueError("stats is empty; it must have a behaviour")
    for name, x in (("model", model), ("balanced", balanced)):
        if x is not None and not isinstance(x, str):
            raise TypeError(f"{name} is a {type(x).__name__}; it must be a text or None")
    if isinstance(notes, str) or not all(isinstance(x, str) for x in notes):
        raise TypeError(f"notes is {notes!r:.80}; it must be a list of texts")
    if watches is not None and not isinstance(watches, Mapping):
        raise TypeError(f"watches is a {type(watches).__name__}; it must be a mapping of names")
    ordered = dict(sorted(stats.items(), key=lambda item: -_middle(item[1])))
    kinds = {s.pairs for s in stats.values()}
    behaviours = _behaviours(ordered, most)
    matrix = priorities(ordered).matrix.tolist()
    data: dict[str, Any] = {
        "dynamics": FORM,
        "model": model,
        "kind": "pairs" if kinds == {True} else "statements" if kinds == {False} else "both",
        "behaviours": behaviours,
        "priorities": matrix,
        "answer": findings.find(behaviours, matrix) | {"same": _same(ordered)},
        "most": most,
        "balanced": balanced,
        "watches": [],
        "notes": [*notes],
    }
    for name, watch in (watches or {}).items():
        found = runs.checked(watch, f"watches[{name!r}]")
        data["watches"].append({"name": name, **found, "observed": _observed(found, behaviours)})
        data["notes"] += [f"{name}: {note}" for note in found["notes"]]
        data["notes"] += _differences(name, found, ordered)
    return Report(data)


def _middle(one: Statistics) -> float:
    """The middle of a behaviour's interval, which few texts do not move up as they do the rest."""
    low, high = one.interval
    return (low + high) / 2 if math.isfinite(high) else one.distinguishability


def _same(stats: Mapping[str, Statistics]) -> list[str]:
    """Behaviours whose sides differ by no more than the rounding of their states."""
    return [
        name
        for name, s in stats.items()
        if s.distinguishability <= ROUNDING * float(s.mean_positive.norm())
    ]


def _behaviours(stats: Mapping[str, Statistics], most: int) -> list[dict[str, Any]]:
    """The figures of each behaviour."""
    rows = {b: s.n_positive if s.pairs else s.n for b, s in stats.items()}
    total = sum(rows.values())
    even: dict[str, float] = {}
    if any(s.distinguishability for s in stats.values()):
        even = shares(stats)
    then = counts(rows, even, most) if even else {}
    found = []
    for name, s in stats.items():
        low, high = s.interval
        found.append(
            {
                "name": name,
                "distinguishability": s.distinguishability,
                "interval": [low, high if math.isfinite(high) else None],
                "n_positive": s.n_positive,
                "n_negative": s.n_negative,
                "concentration": s.concentration,
                "concentration_error": s.concentration_error,
                "trace": s.trace,
                "accuracy_bound": None if s.pairs else s.accuracy_bound,
                "rows": rows[name],
                "share": rows[name] / total,
                "even_share": even.get(name),
                "repeats_needed": even[name] * total / rows[name] if even else None,
                "balanced_rows": then.get(name),
            }
        )
    return found


def _observed(watch: Mapping[str, Any], behaviours: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The order in which behaviours were learnt, as far as the growth of their margins resolves it.

    One was learnt before another if its growth at the last step lies above 0 and above the other's,
    by their intervals, and its loss fell further on average.
    """
    falls = {b: runs.fall(watch, b) for b in watch["behaviours"]}
    known = {b: x for b, x in falls.items() if x is not None}
    order = sorted(known, key=lambda b: -known[b])
    growths = {b: runs.growth(watch, b) for b in order}
    measured = {b: (g[0] - g[1], g[0] + g[1]) for b, g in growths.items() if g is not None}
    learnt = [b for b, (low, _) in measured.items() if low > 0]

    def before(a: str, b: str) -> bool:
        above = a in learnt and b in measured and measured[a][0] > measured[b][1]
        return above and known[a] > known[b]

    first, last = findings.ends(learnt, [[before(a, b) for b in learnt] for a in learnt])
    pairs = [
        (a["name"], b["name"])
        for a in behaviours
        for b in behaviours
        if findings.ahead(a, b) and (before(a["name"], b["name"]) or before(b["name"], a["name"]))
    ]
    return {
        "order": order,
        "falls": falls,
        "first": first,
        "last": last,
        "hardly": [b for b in measured if b not in learnt],
        "unknown": [b for b in order if b not in measured],
        "agree": sum(before(a, b) for a, b in pairs),
        "of": len(pairs),
    }


def _differences(name: str, watch: Mapping[str, Any], stats: Mapping[str, Statistics]) -> list[str]:
    """That a watch is of other behaviours than the statistics are."""
    found = []
    for which, some in (
        ("not watched", [b for b in stats if b not in watch["behaviours"]]),
        ("watched, but not in the data", [b for b in watch["behaviours"] if b not in stats]),
    ):
        if some:
            named = ", ".join(map(wording.brief, some[: wording.NAMED]))
            more = len(some) - wording.NAMED
            found.append(f"{name}: {which}: {named}" + (f" and {more} more" if more > 0 else ""))
    return found
