"""Kernels: blending, sampling, what decoding steps and searches run most, and log-probs."""

from .attention import attend_
from .blending import blend, blend_sample
from .linear import Lora, linear
from .logp.api import linear_logp
from .search import chunk_select, fork_cache_
from .types import BlendSample, Draw, Inputs, LinearLogp, Support

__all__ = [
    "BlendSample",
    "Draw",
    "Inputs",
    "LinearLogp",
    "Lora",
    "Support",
    "attend_",
    "blend",
    "blend_sample",
    "chunk_select",
    "fork_cache_",
    "linear",
    "linear_logp",
]
