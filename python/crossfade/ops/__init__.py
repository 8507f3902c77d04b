"""Kernels: blending, sampling, what a decoding step runs most, and a search's forks."""

from .api import blend, blend_sample
from .attention import attend_
from .linear import Lora, linear
from .search import chunk_select, fork_cache_
from .types import BlendSample, Support

__all__ = [
    "BlendSample",
    "Lora",
    "Support",
    "attend_",
    "blend",
    "blend_sample",
    "chunk_select",
    "fork_cache_",
    "linear",
]
