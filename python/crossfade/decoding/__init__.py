"""Decoding: the loop that draws from a blend, its inputs and settings, and the ways into it."""

from .engine.options import Engine
from .generation import generate
from .hook import decode
from .output import ModelStats, Output, Scores, Stats
from .scoring import score

__all__ = ["Engine", "ModelStats", "Output", "Scores", "Stats", "decode", "generate", "score"]


def __dir__() -> list[str]:
    return __all__
