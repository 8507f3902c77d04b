"""Decoding: the loop that draws from a blend, its inputs and settings, and the ways into it."""

from .engine.options import Engine
from .generation import generate
from .hook import decode
from .output import Output, Scores
from .scoring import score
from .stats import ModelStats, Stats

__all__ = ["Engine", "ModelStats", "Output", "Scores", "Stats", "decode", "generate", "score"]


def __dir__() -> list[str]:
    return __all__
