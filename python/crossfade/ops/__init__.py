"""Kernels: blending and sampling, linear layers. Each op has one truth and fast backends."""

from .api import blend, blend_sample
from .linear import Lora, linear
from .types import BlendSample, Support

__all__ = ["BlendSample", "Lora", "Support", "blend", "blend_sample", "linear"]
