"""Kernels: blending and sampling. Each op has one truth, `reference`, and fast backends."""

from .api import blend, blend_sample
from .types import BlendSample, Support

__all__ = ["BlendSample", "Support", "blend", "blend_sample"]
