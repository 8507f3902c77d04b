"""Kernels: blending, sampling, and what a decoding step runs most. Each op has one truth."""

from .api import blend, blend_sample
from .attention import attend_
from .linear import Lora, linear
from .types import BlendSample, Support

__all__ = ["BlendSample", "Lora", "Support", "attend_", "blend", "blend_sample", "linear"]
