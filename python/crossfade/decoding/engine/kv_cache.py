"""Keys and values of one model's rows, in buffers that are allocated once and grow in steps."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ... import ops
from ..forms import common
from ..runner import Shares

STEP = 64  # capacities are multiples of this


class KVCache:
    """A buffer ``[rows, heads, capacity, dim]`` of keys and one of values for every layer.

    Position j of a row holds its token j, whatever other rows hold. So tokens are taken back by
    counting fewer of them. A layer's buffers are allocated when it first writes, as only the model
    knows their shapes.

    Attributes:
        capacity: the positions that each row has in the buffers.
        held: of each row, the ids of its first tokens, as far as the host knows them. Only the
            methods here change it, together with the buffers, so that it is right for everybody who
            has this cache. A step writes a token whose id the host does not know yet; once it does,
            it calls `holds`.
        mixes: of each row, the weights of the mix of adapters that its keys and values are of; None
            where there is no mix. What is `held` serves rows of the same mix alone.
        lent: whether a call is going on from this cache. One call at a time may.
    """

    def __init__(self, rows: int, capacity: int) -> None:
        self.rows = rows
        self.capacity = _rounded(capacity)
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}
        self.held: list[list[int]] = [[] for _ in range(rows)]
        self.mixes: list[Shares] = [None] * rows
        self.lent = False
        self.growing_bytes = 0  # of the old buffers that were held beside new ones while they grew

    def layer(self, index: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """A layer's buffers, made at first with the dtype, heads and d of ``[B, heads, n, d]``."""
        found = self.layers.get(index)
        if found is None:
            found = self._buffer(key), self._buffer(value)
            self.layers[index] = found
        return found

    def _buffer(self, like: Tensor) -> Tensor:
        return like.new_empty(self.rows, like.shape[1], self.capacity, like.shape[3])

    def rewind(self, row: int, tokens: int) -> None:
        """Forget all but a row's first `tokens`: what is written next comes after these."""
        del self.held[row][tokens:]

    def holds(self, row: int, start: int, ids: Sequence[int]) -> None:
        """Note that a row's positions from `start` on hold these tokens."""
        if len(self.held[row]) >= start:  # Otherwise the tokens before them are not known.
            self.held[row][start:] = ids

    def reserve(self, capacity: int, most: int) -> bool:
        """Make room for `capacity` positions, by doubling up to `most`; True if buffers moved."""
        if capacity <= self.capacity:
            return False
        old = self.capacity
        self.capacity = _rounded(max(capacity, min(2 * old, most)))
        for index, pair in self.layers.items():
            grown = self._buffer(pair[0]), self._buffer(pair[1])
            for new, buffer in zip(grown, pair, strict=True):
                new[:, :, :old] = buffer
            self.layers[index] = grown
            self.growing_bytes = sum(b.nbytes for b in pair)  # Layers grow one after the other.
        return True

    def take(self, rows: Sequence[int]) -> KVCache:
        """A new cache that begins as a copy of these rows of this one."""
        taken = KVCache(len(rows), self.capacity)
        for i, (k, v) in self.layers.items():
            at = torch.tensor(rows, device=k.device)
            taken.layers[i] = k[at], v[at]
        taken.held = [list(self.held[row]) for row in rows]
        taken.mixes = [self.mixes[row] for row in rows]
        return taken

    def fork(self, parents: Tensor, rows: Sequence[int], start: Tensor | int, end: Tensor) -> None:
        """Row i becomes a copy of row ``rows[i]``; `parents` holds the same numbers on the device.

        Before position `start` the two are equal already; from `end` on the parent holds nothing.
        """
        buffers = [b for pair in self.layers.values() for b in pair]
        changed = {i: self.held[p] for i, p in enumerate(rows) if p != i}
        for i in changed:
            self.held[i] = []  # If an interrupt stops the copying, nobody knows what it holds.
        ops.fork_cache_(buffers, parents, start, end)
        mixes = [self.mixes[p] for p in rows]
        for i, tokens in changed.items():
            self.held[i], self.mixes[i] = list(tokens), mixes[i]

    def begin(self, rows: Sequence[int], parents: Sequence[int], lengths: Sequence[int]) -> None:
        """Let `rows` hold so many of the first tokens of their parents, and nothing else.

        All parents are taken as they are before. What a row has in common with its parent is not
        copied.
        """
        taken = [self.held[p][:n] for p, n in zip(parents, lengths, strict=True)]
        mixes = [self.mixes[p] for p in parents]
        sources, starts, ends = list(range(self.rows)), [0] * self.rows, [0] * self.rows
        for row, parent, tokens in zip(rows, parents, taken, strict=True):
            alike = common(self.held[row], tokens)
            if alike < len(tokens):
                sources[row], starts[row], ends[row] = parent, alike, len(tokens)
        for row in rows:
            self.held[row] = []  # If an interrupt stops the copying, nobody knows what it holds.
        if any(ends):
            buffers = [b for pair in self.layers.values() for b in pair]
            of_rows = torch.tensor([sources, starts, ends], device=buffers[0].device)
            ops.fork_cache_(buffers, *of_rows)
        for row, tokens, mix in zip(rows, taken, mixes, strict=True):
            self.held[row], self.mixes[row] = tokens, mix

    @property
    def peak_bytes(self) -> int:
        """The most bytes that were held at a time."""
        return self.nbytes + self.growing_bytes

    @property
    def nbytes(self) -> int:
        # A list, as another thread may ask while a layer writes for the first time.
        return sum(b.nbytes for pair in [*self.layers.values()] for b in pair)


def _rounded(capacity: int) -> int:
    return -(-capacity // STEP) * STEP
