"""What `crossfade bench` measures, and the timing that the scripts of bench/ use as well."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .. import lazy

if TYPE_CHECKING:  # type checkers take `X as X` for a public name
    from .ops import cases as cases
    from .ops import run_ops as run_ops
    from .report import table as table
    from .timing import check_floors as check_floors
    from .timing import cpu_times as cpu_times
    from .timing import cuda_times as cuda_times
    from .timing import hardware as hardware
    from .timing import inputs_needed as inputs_needed

# The modules that measure import torch; the one that makes the table does not.
_HOME = {
    "cases": "ops",
    "check_floors": "timing",
    "cpu_times": "timing",
    "cuda_times": "timing",
    "hardware": "timing",
    "inputs_needed": "timing",
    "run_ops": "ops",
    "table": "report",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    return lazy.attribute(__name__, name, _HOME)


def __dir__() -> list[str]:
    return __all__
