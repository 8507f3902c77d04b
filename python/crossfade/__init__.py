"""Decode with several language models at once: blends, values, and the kernels under them."""

from __future__ import annotations

import importlib
import importlib.metadata
from typing import TYPE_CHECKING, Any

from . import lazy

if TYPE_CHECKING:
    from . import models, ops, presets
    from .blend import Blend, Model, ValueHead, as_blend, power_mean
    from .decoding import Engine, Output, Scores, decode, generate, score
    from .formula import parse
    from .ops import Support
    from .search import BestOfN, ChunkBeamSearch, Recipe, sentence_end
    from .values import LogRatio, Reward, RewardModel, ValueSum, as_value

# Names are imported at their first use, so that the kernels alone, or the command line's help,
# do not wait for transformers.
_HOME = {
    "BestOfN": "search",
    "Blend": "blend",
    "ChunkBeamSearch": "search",
    "Engine": "decoding",
    "LogRatio": "values",
    "Model": "blend",
    "Output": "decoding",
    "Recipe": "search",
    "Reward": "values",
    "RewardModel": "values",
    "Scores": "decoding",
    "Support": "ops",
    "ValueHead": "blend",
    "ValueSum": "values",
    "as_blend": "blend",
    "as_value": "values",
    "decode": "decoding",
    "generate": "decoding",
    "parse": "formula",
    "power_mean": "blend",
    "score": "decoding",
    "sentence_end": "search",
}
_MODULES = ("models", "ops", "presets")

__all__ = [
    "BestOfN",
    "Blend",
    "ChunkBeamSearch",
    "Engine",
    "LogRatio",
    "Model",
    "Output",
    "Recipe",
    "Reward",
    "RewardModel",
    "Scores",
    "Support",
    "ValueHead",
    "ValueSum",
    "as_blend",
    "as_value",
    "decode",
    "generate",
    "models",
    "ops",
    "parse",
    "power_mean",
    "presets",
    "score",
    "sentence_end",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return importlib.metadata.version(__name__)
    if name in _MODULES:
        return importlib.import_module(f".{name}", __name__)
    return lazy.attribute(__name__, name, _HOME)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
