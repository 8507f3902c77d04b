"""Checks of arguments that all parts of the package use."""

from __future__ import annotations

import math
import numbers
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
