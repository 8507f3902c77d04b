"""Launches the Triton kernels of kernels/search.py."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from crossfade.kernels import search as kernels

from .. import memory

MOST_SLOTS = 64  # slots of a program, which it compares with as many others at a time
HELD = 4096  # numbers that a program of a fork holds
BITS = {8: torch.int64, 4: torch.int32, 2: torch.int16}  # copied as integers, to keep their bits


def chunk_select(scores: Tensor, finished: Tensor, width: int) -> Tensor:
    memory.require(scores=scores, finished=finished)
    prompts, slots = scores.shape
    parents = torch.empty(prompts, slots, dtype=torch.int64, device=scores.device)
    block = min(MOST_SLOTS, _power_of_two(slots))
    if prompts > 0:
        with torch.accelerator.device_index(scores.device.index):
            kernels.chunk_select[prompts, -(-slots // block)](
                parents, scores, finished, slots, width, slots // width, BLOCK=block
            )
    return parents


def fork_cache_(
    tensors: Sequence[Tensor], parents: Tensor, start: int | Tensor, end: int | Tensor
) -> None:
    memory.require(tensors=tensors, parents=parents)
    memory.written(*tensors)
    rows = parents.shape[0]
    padded = _power_of_two(rows)
    block = max(1, HELD // padded)
    begins = start if isinstance(start, Tensor) else None
    ends = end if isinstance(end, Tensor) else None
    with torch.accelerator.device_index(parents.device.index):
        for x in tensors:
            _, heads, length, dim = x.shape
            first = 0 if isinstance(start, Tensor) else start
            last = length if isinstance(end, Tensor) else min(end, length)
            slabs = -(-(last - first) * dim // block)
            if slabs <= 0 or heads == 0:
                continue
            kernels.fork_cache[heads * slabs,](
                x.view(BITS[x.element_size()]),
                x.stride()[:3],
                parents,
                begins,
                ends,
                rows,
                first,
                last,
                slabs,
                DIM=dim,
                ROWS=padded,
                BLOCK=block,
            )


def _power_of_two(x: int) -> int:
    return 1 << (x - 1).bit_length()
