"""Words and figures of reports: sentences with names in them, lists, and aligned numbers."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

NAMED = 5  # behaviours of a list that a sentence names; the tables have all
MOST_DECIMALS = 6  # of figures that are aligned
LONGEST = 60  # characters of a name in a sentence
NONE = "\u2013"  # in the place of a figure


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


def counted(n: int, what: str) -> str:
    """So many of something, in words."""
    return f"{n:,} {what}" if n == 1 else f"{n:,} {what}s"


def listed(names: Sequence[str], after: Sequence[str] | None = None) -> tuple[str, tuple[str, ...]]:
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


def aligned(*figures: float | None) -> tuple[str, ...]:
    """A figure and the ends of its interval with the same number of decimals; None is no end.

    The largest has three digits, and the smallest at least one that is not 0.
    """
    known = [abs(x) for x in figures if x]
    if not known or max(known) >= 1e9:
        return tuple(map(end, figures))
    digits = max(3 - _size(max(known)), 1 - _size(min(known)), 0)
    if digits > MOST_DECIMALS:
        return tuple(map(end, figures))
    return tuple("∞" if x is None else f"{x:,.{digits}f}" for x in figures)


def _size(x: float) -> int:
    """How many digits stand before the point; 0 or less for what is below 1."""
    return math.floor(math.log10(x)) + 1


def end(x: float | None) -> str:
    """The upper end of an interval."""
    return "∞" if x is None else figure(x)


def percent(x: float) -> str:
    """A share; a small one keeps a digit that is not 0."""
    return f"{100 * x:.0f} %" if x >= 0.02 or not x else f"{100 * x:.1g} %"
