"""SELF-JUDGE: a model that answers, and judges pairs of answers by the token that it says next.

Source: Lee et al., arXiv:2402.11253.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ... import lazy

if TYPE_CHECKING:  # type checkers take `X as X` for a public name
    from .data import jsft_rows as jsft_rows
    from .judge import Judge as Judge
    from .judgments import Judgments as Judgments
    from .template import TEMPLATES as TEMPLATES
    from .template import JudgeTemplate as JudgeTemplate

_HOME = {
    "Judge": "judge",
    "JudgeTemplate": "template",
    "Judgments": "judgments",
    "TEMPLATES": "template",
    "jsft_rows": "data",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    return lazy.attribute(__name__, name, _HOME)


def __dir__() -> list[str]:
    return __all__
