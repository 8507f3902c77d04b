"""Launches the Triton kernels of kernels/logp.py.

The functions are those of `native`. What the next product multiplies is left in `tile.operand`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from crossfade.kernels import logp as kernels

from ..logp.tiles import Sums, Tile

MOST_COLUMNS = 2048  # columns of a program of the backward pass, at most
SIZE_BLOCK = 1024  # columns of the moments that a program takes at a time


def logp_forward(tile: Tile, sums: Sums, second_scores: Tensor | None) -> None:
    rows, columns = tile.scores.shape
    block = _power_of_two(columns)
    size = 0 if sums.first is None else sums.first.shape[1]
    with torch.accelerator.device_index(tile.scores.device.index):
        kernels.logp_forward[rows,](
            tile.scores,
            tile.operand,
            second_scores,
            sums.sums,
            sums.first,
            sums.second,
            tile.bias,
            tile.targets,
            tile.first,
            columns,
            size,
            tile.settings.softcap,
            tile.settings.temperature,
            SOFTCAP=tile.settings.softcap > 0,
            BLOCK=block,
            SIZE_BLOCK=min(SIZE_BLOCK, _power_of_two(size)),
            num_warps=max(1, min(8, block // 1024)),
            enable_fp_fusion=False,  # a row's sums are the same bits with moments and without
        )


def logp_backward(tile: Tile, of_logits: Tensor) -> None:
    rows, columns = tile.scores.shape
    block = min(MOST_COLUMNS, _power_of_two(columns))
    with torch.accelerator.device_index(tile.scores.device.index):
        kernels.logp_backward[rows, -(-columns // block)](
            tile.scores,
            tile.operand,
            of_logits,
            tile.bias,
            tile.targets,
            tile.first,
            columns,
            tile.settings.softcap,
            tile.settings.temperature,
            SOFTCAP=tile.settings.softcap > 0,
            BLOCK=block,
        )


def _power_of_two(x: int) -> int:
    return max(16, 1 << (x - 1).bit_length())
