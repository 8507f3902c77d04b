"""Running out of memory: what it looks like, whoever notices it."""

from __future__ import annotations

import torch

# of torch's RuntimeErrors: its CPU allocator's on each system, those of CUDA and its libraries
MESSAGES = (
    "can't allocate memory",
    "not enough memory",
    "bad_alloc",
    "out of memory",
    "ALLOC_FAILED",
    "Storage size calculation overflowed",
)


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether an error, or the one that it was raised from, says that memory ran out."""
    if error is None:
        return False
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    told = isinstance(error, RuntimeError) and any(m in str(error) for m in MESSAGES)
    return told or is_out_of_memory(error.__cause__)
