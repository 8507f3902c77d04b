"""Ray Data: prompts of any number on many actors, each with the models and a loop of its own.

``ds.map_batches(Decoder, fn_constructor_kwargs=spec(...), ...)`` does it in a pipeline, and `run`
from files into a folder.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ... import lazy

if TYPE_CHECKING:  # type checkers take `X as X` for a public name
    from .actor_spec import spec as spec
    from .decoder import Decoder as Decoder
    from .driver import run as run

_HOME = {"Decoder": "decoder", "run": "driver", "spec": "actor_spec"}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    return lazy.attribute(__name__, name, _HOME)


def __dir__() -> list[str]:
    return __all__
