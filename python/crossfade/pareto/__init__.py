"""Sweeps of methods over weightings of rewards, and their Pareto fronts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .. import lazy

if TYPE_CHECKING:  # type checkers take `X as X` for a public name
    from .fronts import Estimate as Estimate
    from .fronts import Front as Front
    from .measures import front as front
    from .measures import hypervolume as hypervolume
    from .measures import non_dominated as non_dominated
    from .measures import spearman as spearman
    from .measures import steerability as steerability
    from .sweeps import sweep as sweep

_HOME = {
    "Estimate": "fronts",
    "Front": "fronts",
    "front": "measures",
    "hypervolume": "measures",
    "non_dominated": "measures",
    "spearman": "measures",
    "steerability": "measures",
    "sweep": "sweeps",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    return lazy.attribute(__name__, name, _HOME)


def __dir__() -> list[str]:
    return __all__
