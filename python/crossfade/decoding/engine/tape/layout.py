"""Where the tensors of a tape lie, and where its threads wait for each other.

Of most instructions each thread computes the rows of a batch that are its own, one instruction
after the other. Threads need only wait where one reads or overwrites what another may have written
since they last met.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .instructions import TEAM, Instead, Instruction
from .recording import storage

ALIGNED = 64  # bytes of a cache line
ALONE = "alone"  # who touches memory: the first thread
ANY = "any"  # several threads, each a part that no row of the batch tells


@dataclass
class Temporary:
    """Memory that a step computes in: one of its tensors' storages."""

    bytes: int
    first: int  # the places of the first and the last step that touch it
    last: int
    owners: set[Hashable] = field(default_factory=set)  # as `owner` gives them
    offset: int = -1

    @property
    def room(self) -> int:
        """The bytes that it takes of an arena, in whole cache lines."""
        return -(-max(self.bytes, 1) // ALIGNED) * ALIGNED


def owner(x: Tensor, rows: int) -> Hashable:
    """Which thread touches which part of a tensor's memory, in an instruction over `rows`.

    A whole number stands for: row b touches its b-th part of so many bytes, and nothing else.
    """
    if rows == 1:
        return ALONE
    part = x.shape[0] // rows
    stride = part * x.stride(0) * x.element_size()
    begin = x.storage_offset() * x.element_size()
    sizes = (part, *x.shape[1:])
    ends = sum((n - 1) * s for n, s in zip(sizes, x.stride(), strict=True)) + 1
    return stride if stride > 0 and begin + ends * x.element_size() <= stride else ANY


def rows_of(step: Instruction, batch: int) -> int:
    """How many rows threads may share out: those of the batch, or 1 where these are not told
    apart."""
    shape = step.out.shape if step.shape is None else step.shape
    return batch if shape and shape[0] % batch == 0 and shape[0] > 0 else 1


class Layout:
    """Offsets of all temporaries in one arena, and before which instructions threads wait.

    Memory is used again once nobody reads it: by a tensor of which each thread touches the same
    parts at once, by others after the threads have met.

    Args:
        steps: the instructions, and the calls between them.
        batch: rows of a forward.
        changing: storages whose numbers change.
        temporaries: those of them that are memory of the step's own.
        kept: storages that are read after the step.
        scratch: of each product, by its place, how many bytes it needs to work in.

    Attributes:
        bytes: of the arena.
        offsets: of each temporary, by its storage; of scratch, by the place of its product.
        waits: before which steps all threads must have met.
    """

    def __init__(
        self,
        steps: Sequence[Instruction | Instead],
        batch: int,
        changing: set[int],
        temporaries: set[int],
        kept: set[int],
        scratch: dict[int, int],
    ) -> None:
        self.steps, self.batch = steps, batch
        self.changing, self.own = changing, temporaries
        self.temporaries: dict[Any, Temporary] = {}
        self.waits: set[int] = set()
        self._touched: dict[Any, set[tuple[Hashable, bool]]] = {}  # since the threads last met
        for place, step in enumerate(steps):
            self._visit(place, step)
        for place, size in scratch.items():
            self.temporaries["scratch", place] = Temporary(size, place, place, {ANY})
        for key in kept & set(self.temporaries):
            self.temporaries[key].last = len(steps)
        self.bytes = self._place()
        self.offsets = {key: t.offset for key, t in self.temporaries.items()}

    def _visit(self, place: int, step: Instruction | Instead) -> None:
        if isinstance(step, Instead):  # The threads end before it, and begin anew after it.
            self._touched.clear()
            for x in (*step.call.inputs, *step.call.outputs):
                self._use(place, x, ANY)
            return
        team = step.op in TEAM
        rows = rows_of(step, self.batch)
        reads = [(x, ANY if team else owner(x, rows), False) for x in step.inputs]
        accesses = [*reads, (step.out, ANY if team else owner(step.out, rows), True)]
        if any(self._collides(storage(x), who, writes) for x, who, writes in accesses):
            self.waits.add(place)
            self._touched.clear()
        for x, who, writes in accesses:
            if storage(x) in self.changing:
                self._touched.setdefault(storage(x), set()).add((who, writes))
                self._use(place, x, who)

    def _collides(self, key: int, who: Hashable, writes: bool) -> bool:
        """Whether another thread may have written what is touched, or read what is written."""
        return any(
            (wrote or writes) and (before != who or who == ANY)
            for before, wrote in self._touched.get(key, ())
        )

    def _use(self, place: int, x: Tensor, who: Hashable) -> None:
        key = storage(x)
        if key not in self.own:
            return
        size = x.untyped_storage().nbytes()
        found = self.temporaries.setdefault(key, Temporary(size, place, place))
        found.last = place
        found.owners.add(who)

    def _place(self) -> int:
        """Give every temporary its offset; the bytes of all."""
        begins: dict[int, list[Temporary]] = {}
        ends: dict[int, list[Temporary]] = {}
        for t in self.temporaries.values():
            begins.setdefault(t.first, []).append(t)
            ends.setdefault(t.last, []).append(t)
        free: dict[int, list[int]] = {}  # by size: for anybody
        owned: dict[tuple[int, Hashable], list[int]] = {}  # freed since the threads last met
        total = 0
        for place, step in enumerate(self.steps):
            if place in self.waits or isinstance(step, Instead):
                for (size, _), offsets in owned.items():
                    free.setdefault(size, []).extend(offsets)
                owned.clear()
            for t in begins.get(place, ()):
                size = t.room
                same = owned.get((size, _only(t)))
                if same and _only(t) != ANY:
                    t.offset = same.pop()
                elif free.get(size):
                    t.offset = free[size].pop()
                else:
                    t.offset, total = total, total + size
            for t in ends.get(place, ()):
                owned.setdefault((t.room, _only(t)), []).append(t.offset)
        return total


def _only(t: Temporary) -> Hashable:
    """Who touches all of a temporary; `ANY` if that is not always the same."""
    return next(iter(t.owners)) if len(t.owners) == 1 else ANY


def loops(
    shape: Sequence[int], tensors: Sequence[Tensor], rows: int, dimensions: int, whole: bool
) -> tuple[list[int], list[list[int]]] | None:
    """Sizes of an instruction's loops over tensors of a shape, and each tensor's strides.

    The first loop is over rows. Of the others, those are joined that run over adjacent numbers in
    every tensor. None if more than `dimensions` are left.

    Args:
        whole: whether the last dimension stays as it is, as something is computed of all of it.
    """
    shape = list(shape)
    operands = [list(x.stride()) for x in tensors]
    if rows > 1:
        part = shape[0] // rows
        shape = [rows, part, *shape[1:]]
        operands = [[s[0] * part, *s] for s in operands]
    else:
        shape = [1, *shape]
        operands = [[0, *s] for s in operands]
    sizes, strides = [shape[0]], [[s[0]] for s in operands]
    for d in range(1, len(shape)):
        last = d == len(shape) - 1
        if shape[d] == 1 and not last:
            continue
        joins = (
            len(sizes) > 1
            and not (whole and last)
            and all(mine[-1] == s[d] * shape[d] for mine, s in zip(strides, operands, strict=True))
        )
        if joins:
            sizes[-1] *= shape[d]
        else:
            sizes.append(shape[d])
        for mine, s in zip(strides, operands, strict=True):
            if joins:
                mine[-1] = s[d]
            else:
                mine.append(s[d])
    if len(sizes) > dimensions:
        return None
    blank = dimensions - len(sizes)
    for mine in strides:
        mine[1:1] = [0] * blank
    sizes[1:1] = [1] * blank
    return sizes, strides


def view(arena: Tensor, offset: int, like: Tensor) -> Tensor:
    """The tensor of the arena that has the geometry of a recorded one, in storage at `offset`."""
    whole = arena[offset : offset + like.untyped_storage().nbytes()].view(like.dtype)
    return torch.as_strided(
        whole, like.shape, like.stride(), whole.storage_offset() + like.storage_offset()
    )
