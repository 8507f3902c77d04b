"""What `crossfade bench` measures, and the timing that the scripts of bench/ use as well."""

from .ops import cases, run_ops, table
from .timing import check_floors, cpu_times, cuda_times, hardware, inputs_needed

__all__ = [
    "cases",
    "check_floors",
    "cpu_times",
    "cuda_times",
    "hardware",
    "inputs_needed",
    "run_ops",
    "table",
]
