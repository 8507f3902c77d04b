"""Conditioned language policies: one model that is steered by the weights of rewards.

Source: Wang et al., arXiv:2407.15762.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ... import lazy

if TYPE_CHECKING:  # type checkers take `X as X` for a public name
    from .baselines import DecodedPolicy as DecodedPolicy
    from .baselines import PromptedPolicy as PromptedPolicy
    from .baselines import SoupPolicy as SoupPolicy
    from .policy import ConditionedPolicy as ConditionedPolicy

_HOME = {
    "ConditionedPolicy": "policy",
    "DecodedPolicy": "baselines",
    "PromptedPolicy": "baselines",
    "SoupPolicy": "baselines",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    return lazy.attribute(__name__, name, _HOME)


def __dir__() -> list[str]:
    return __all__
