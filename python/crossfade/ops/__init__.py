"""Kernels: blending, sampling, attention. Each op has one truth, `reference`, and fast backends."""

from .api import blend, blend_sample
from .attention import attend_
from .types import BlendSample, Support

__all__ = ["BlendSample", "Support", "attend_", "blend", "blend_sample"]
