"""Queries, new tokens and caches for `ops.attend_`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from cases import NAN
from torch import Tensor


class Case(NamedTuple):
    """The arguments of `attend_`."""

    query: Tensor
    key: Tensor
    value: Tensor
    keys: Tensor
    values: Tensor
    lengths: Tensor

    def copy(self) -> Case:
        return Case(*(x.clone() for x in self))

    def rows(self, index: slice) -> Case:
        return Case(*(x[index] for x in self))


def case(
    lengths: Sequence[int] = (0, 5, 20),
    *,
    heads: tuple[int, int] = (6, 2),
    tokens: int = 1,
    sizes: tuple[int, int] = (16, 16),
    capacity: int = 40,
    cache_rows: Sequence[int] | None = None,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> Case:
    """Normal numbers: those of a row depend on the row alone, and NaN past each row's length."""
    rows = [b if cache_rows is None else cache_rows[b] for b in range(len(lengths))]
    slots = max(rows, default=-1) + 1
    query = torch.empty(len(lengths), heads[0], tokens, sizes[0], dtype=dtype)
    key = torch.empty(len(lengths), heads[1], tokens, sizes[0], dtype=dtype)
    value = torch.empty(len(lengths), heads[1], tokens, sizes[1], dtype=dtype)
    keys = torch.full((slots, heads[1], capacity, sizes[0]), NAN, dtype=dtype)
    values = torch.full((slots, heads[1], capacity, sizes[1]), NAN, dtype=dtype)
    for b, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        generator = torch.Generator().manual_seed(b)
        for x in (query[b], key[b], value[b], keys[row, :, :length], values[row, :, :length]):
            x.copy_(torch.randn(x.shape, generator=generator))
    on = [x.to(device) for x in (query, key, value, keys, values)]
    return Case(*on, torch.tensor(lengths, dtype=torch.int64, device=device))
