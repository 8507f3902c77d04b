"""Checks of arguments that all parts of the package use."""

from __future__ import annotations

import difflib
import math
import numbers
from collections.abc import Iterable, Mapping
from typing import Any


def check_number(name: str, x: Any) -> float:
    """`x` as a float. Raises an error that calls it `name` unless it is a finite number."""
    if isinstance(x, bool) or not isinstance(x, numbers.Real):
        raise TypeError(f"{name} is {x!r:.80}; it must be a number")
    try:
        number = float(x)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"{name} is {number}; it must be finite")
    return number


def did_you_mean(name: Any, known: Iterable[str], meant: Mapping[str, str] | None = None) -> str:
    """The end of an error about an unknown name: what was probably meant, or nothing.

    Args:
        known: the names that there are.
        meant: for names of other libraries, which no spelling leads to, what to say in their place.
    """
    if meant is not None and name in meant:
        return f"; {meant[name]}"
    near = difflib.get_close_matches(str(name), list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""
