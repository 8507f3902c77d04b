"""What `crossfade bench` measures, and the timing that the scripts of bench/ use as well."""

from .ops import cases, run_ops, table
from .timing import COLD_BYTES, cpu_times, cuda_times, hardware

__all__ = [
    "COLD_BYTES",
    "cases",
    "cpu_times",
    "cuda_times",
    "hardware",
    "run_ops",
    "table",
]
