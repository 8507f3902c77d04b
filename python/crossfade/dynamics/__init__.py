"""Learning dynamics: what preference training will do to a model, from its states before it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .. import lazy

if TYPE_CHECKING:  # type checkers take `X as X` for a public name
    from .behaviours import Statistics as Statistics
    from .behaviours import statistics as statistics
    from .curves import Curve as Curve
    from .curves import Vulnerability as Vulnerability
    from .flipping import vulnerability as vulnerability
    from .priority import Priorities as Priorities
    from .priority import priorities as priorities
    from .questions import statement_pairs as statement_pairs
    from .readings import Reading as Reading
    from .readings import read_pairs as read_pairs
    from .rebalancing import rebalanced as rebalanced
    from .rebalancing import shares as shares
    from .reports import Report as Report
    from .reports import report as report
    from .watch import Watch as Watch

_HOME = {
    "Curve": "curves",
    "Priorities": "priority",
    "Reading": "readings",
    "Report": "reports",
    "Statistics": "behaviours",
    "Vulnerability": "curves",
    "Watch": "watch",
    "priorities": "priority",
    "read_pairs": "readings",
    "rebalanced": "rebalancing",
    "report": "reports",
    "shares": "rebalancing",
    "statement_pairs": "questions",
    "statistics": "behaviours",
    "vulnerability": "flipping",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    return lazy.attribute(__name__, name, _HOME)


def __dir__() -> list[str]:
    return __all__
