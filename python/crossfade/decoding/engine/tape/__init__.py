"""A step of a model without Python: its operations, recorded once and replayed by native code."""

from .step import SHORTEST, Tapes

__all__ = ["SHORTEST", "Tapes"]
