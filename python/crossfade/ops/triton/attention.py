"""Launches the Triton kernels of kernels/attend.py."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from crossfade.kernels import attend as kernels

from .. import memory

if TYPE_CHECKING:
    from ..attention import Attention

MOST_ROWS = 64  # query rows of a program, at most: tokens times heads of a group
SPLIT = 256  # slots of a split, where the tokens fit one tile
TILE_BYTES = 16 << 10  # bytes of a block's keys and values, unless it has only 16 slots
SHARED_BYTES = 99 << 10  # the shared memory of a program on sm_80 and all later GPUs


def attend_(given: Attention) -> Tensor:
    query, key, value, keys, values = given.query, given.key, given.value, given.keys, given.values
    lengths, softcap = given.lengths, given.softcap
    memory.require(query=query, key=key, value=value, keys=keys, values=values, lengths=lengths)
    memory.written(keys, values)
    batch, tokens, heads, kv_heads, size, value_size, _, capacity = given.sizes
    group = heads // kv_heads
    tile = max(1, min(tokens, MOST_ROWS // group))
    tiles = -(-tokens // tile)
    splits = -(-capacity // SPLIT) if tiles == 1 else 1
    split = SPLIT if splits > 1 else 0
    out = query.new_empty(batch, tokens, heads, value_size)
    if batch == 0:
        return out
    window = min(given.window, 2**31 - 1)
    padded_rows, d, dv = (_power_of_two(x) for x in (tile * group, size, value_size))
    block, slot = 64, (d + dv) * query.element_size()
    while block > 16 and block * slot > TILE_BYTES:
        block //= 2
    queries = padded_rows * d * query.element_size()  # the rest is what a pipeline's stages hold
    fit = [s for s in (3, 2) if (2 * s - 1) * block * slot + queries <= SHARED_BYTES]
    partials = stats = None
    if splits > 1:
        shape = batch, kv_heads, splits
        partials = query.new_empty(*shape, padded_rows, dv, dtype=torch.float32)
        stats = query.new_empty(*shape, 2, padded_rows, dtype=torch.float32)
    with torch.accelerator.device_index(query.device.index):
        kernels.attend_splits[batch * kv_heads, tiles, splits](
            out,
            partials,
            stats,
            query,
            query.stride()[:3],
            key,
            key.stride()[:3],
            value,
            value.stride()[:3],
            keys,
            keys.stride()[:3],
            values,
            values.stride()[:3],
            lengths,
            given.rows,
            float(given.scale),
            float(softcap),
            window,
            tokens,
            capacity,
            size,
            value_size,
            SOFTCAP=softcap > 0,
            KV_HEADS=kv_heads,
            GROUP=group,
            TILE=tile,
            SPLIT=split,
            ROWS=padded_rows,
            BLOCK=block,
            D=d,
            DV=dv,
            WIDEN=os.environ.get("TRITON_INTERPRET") == "1",
            num_stages=fit[0] if fit else 1,
        )
        if splits > 1:
            kernels.combine[batch * kv_heads,](
                out,
                partials,
                stats,
                lengths,
                window,
                tokens,
                capacity,
                splits,
                value_size,
                KV_HEADS=kv_heads,
                GROUP=group,
                SPLIT=split,
                ROWS=padded_rows,
                DV=dv,
            )
    return out


def _power_of_two(x: int) -> int:
    return max(16, 1 << (x - 1).bit_length())  # 16: the least that tl.dot takes
