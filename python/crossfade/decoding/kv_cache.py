"""Keys and values of one model's rows, in buffers that are allocated once and grow in steps."""

from __future__ import annotations

from torch import Tensor

from .. import ops

STEP = 64  # slots: capacities are multiples of it


class KVCache:
    """A buffer ``[rows, heads, capacity, dim]`` of keys and one of values for every layer.

    Slot j of a row holds its token j, whatever the row's neighbours hold, so a row's tokens are
    taken back by counting fewer of them. Layers are allocated when they first write, as only the
    model knows their shapes.
    """

    def __init__(self, rows: int, capacity: int) -> None:
        self.rows = rows
        self.capacity = _rounded(capacity)
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}
        self.growing_bytes = 0  # that a growth held beside the new buffers

    def layer(self, index: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """A layer's buffers, with the dtype and dims of `key` and `value` ``[B, heads, n, d]``."""
        found = self.layers.get(index)
        if found is None:
            found = self._buffer(key), self._buffer(value)
            self.layers[index] = found
        return found

    def _buffer(self, like: Tensor) -> Tensor:
        return like.new_empty(self.rows, like.shape[1], self.capacity, like.shape[3])

    def reserve(self, capacity: int, most: int) -> bool:
        """Make room for `capacity` slots, by doubling up to `most`; True if the buffers moved."""
        if capacity <= self.capacity:
            return False
        old = self.capacity
        self.capacity = _rounded(max(capacity, min(2 * old, most)))
        for index, pair in self.layers.items():
            grown = self._buffer(pair[0]), self._buffer(pair[1])
            for new, buffer in zip(grown, pair, strict=True):
                new[:, :, :old] = buffer
            self.layers[index] = grown
            self.growing_bytes = sum(b.nbytes for b in pair)  # layer by layer: one old pair
        return True

    def take(self, rows: Tensor) -> KVCache:
        """A cache of its own that begins with these rows of this one."""
        taken = KVCache(len(rows), self.capacity)
        taken.layers = {i: (k[rows], v[rows]) for i, (k, v) in self.layers.items()}
        return taken

    def fork(self, parents: Tensor, start: Tensor | int, end: Tensor) -> None:
        """Row i becomes a copy of row ``parents[i]`` in slots [start, end); -1 leaves it."""
        buffers = [b for pair in self.layers.values() for b in pair]
        ops.fork_cache_(buffers, parents, start, end)

    @property
    def peak_bytes(self) -> int:
        """The most that was held at a time."""
        return self.nbytes + self.growing_bytes

    @property
    def nbytes(self) -> int:
        return sum(b.nbytes for pair in self.layers.values() for b in pair)


def _rounded(slots: int) -> int:
    return -(-slots // STEP) * STEP
