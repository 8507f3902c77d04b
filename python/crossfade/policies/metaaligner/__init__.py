"""MetaAligner: a model that corrects answers toward any set of objectives, named in its prompt.

Source: Yang et al., arXiv:2403.17141.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ... import lazy

if TYPE_CHECKING:  # type checkers take `X as X` for a public name
    from .aligner import MetaAligner as MetaAligner
    from .correction import correct as correct
    from .corrections import Corrections as Corrections
    from .data import AlignerRows as AlignerRows
    from .data import AlignerStream as AlignerStream
    from .data import metaaligner_rows as metaaligner_rows
    from .data import metaaligner_stream as metaaligner_stream
    from .objectives import OBJECTIVES as OBJECTIVES
    from .objectives import read_objectives as read_objectives
    from .objectives import resolve as resolve
    from .objectives import resolve_each as resolve_each
    from .template import AlignerTemplate as AlignerTemplate

_HOME = {
    "AlignerRows": "data",
    "AlignerStream": "data",
    "AlignerTemplate": "template",
    "Corrections": "corrections",
    "MetaAligner": "aligner",
    "OBJECTIVES": "objectives",
    "correct": "correction",
    "metaaligner_rows": "data",
    "metaaligner_stream": "data",
    "read_objectives": "objectives",
    "resolve": "objectives",
    "resolve_each": "objectives",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    return lazy.attribute(__name__, name, _HOME)


def __dir__() -> list[str]:
    return __all__
