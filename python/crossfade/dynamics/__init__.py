"""Learning dynamics: what preference training will do to a model, from its states before it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .. import lazy

if TYPE_CHECKING:  # type checkers take `X as X` for a public name
    from .behaviours import Statistics as Statistics
    from .behaviours import statistics as statistics
    from .priority import Priorities as Priorities
    from .priority import priorities as priorities
    from .rebalancing import rebalanced as rebalanced
    from .rebalancing import shares as shares

_HOME = {
    "Priorities": "priority",
    "Statistics": "behaviours",
    "priorities": "priority",
    "rebalanced": "rebalancing",
    "shares": "rebalancing",
    "statistics": "behaviours",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    return lazy.attribute(__name__, name, _HOME)


def __dir__() -> list[str]:
    return __all__
