"""How to tell that memory ran out, whichever library raised the error."""

from __future__ import annotations

import torch

# Parts of the messages of torch's RuntimeErrors: of its CPU allocator on each system, and of CUDA
# and its libraries.
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
