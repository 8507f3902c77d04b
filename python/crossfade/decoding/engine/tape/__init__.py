"""A step of a model without Python: its operations, recorded once and replayed by native code."""

from .shelf import Programs
from .step import SHORTEST, TapedStep

__all__ = ["SHORTEST", "Programs", "TapedStep"]
