"""Hugging Face models: looked into, read safely from the disk, and given value heads."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .. import lazy

if TYPE_CHECKING:  # type checkers take `X as X` for a public name
    from .saved import download as download
    from .saved import load as load
    from .saved_adapters import with_adapters as with_adapters
    from .small_model import GUIDES as GUIDES
    from .small_model import HUB_ID as HUB_ID
    from .small_model import SMALL_MODEL as SMALL_MODEL
    from .small_model import default_cache as default_cache
    from .small_model import folder_of as folder_of
    from .small_model import get as get
    from .small_model import guide as guide
    from .small_model import is_cached as is_cached
    from .small_model import path as path
    from .small_model import smollm2 as smollm2
    from .small_model import verify as verify

# The module that each public name comes from. It is imported when the name is first used: most of
# crossfade looks into models that are there and loads none.
_HOME = {
    "GUIDES": "small_model",
    "HUB_ID": "small_model",
    "SMALL_MODEL": "small_model",
    "default_cache": "small_model",
    "download": "saved",
    "folder_of": "small_model",
    "get": "small_model",
    "guide": "small_model",
    "is_cached": "small_model",
    "load": "saved",
    "path": "small_model",
    "smollm2": "small_model",
    "verify": "small_model",
    "with_adapters": "saved_adapters",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    return lazy.attribute(__name__, name, _HOME)


def __dir__() -> list[str]:
    return __all__
