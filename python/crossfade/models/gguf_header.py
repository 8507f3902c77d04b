"""Checks a GGUF file before anything in it is used: offsets, sizes and counts.

https://github.com/ggml-org/ggml/blob/master/docs/gguf.md describes the format.
"""

from __future__ import annotations

import math
import mmap
import struct
from pathlib import Path
from typing import NamedTuple

SCALARS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # bytes of a value
STRING, ARRAY = 8, 9
MOST_DIMENSIONS = 4
# of a type: numbers of a block and its bytes
BLOCKS = {0: (1, 4), 1: (1, 2), 30: (1, 2), 28: (1, 8), 24: (1, 1), 25: (1, 2), 26: (1, 4)}
BLOCKS |= {2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34)}
BLOCKS |= {10: (256, 84), 11: (256, 110), 12: (256, 144), 13: (256, 176), 14: (256, 210)}


class Tensors(NamedTuple):
    """Where a tensor's bytes are."""

    shape: tuple[int, ...]  # the last dimension is contiguous
    type: int
    start: int
    end: int


class _Reader:
    def __init__(self, data: mmap.mmap, name: str) -> None:
        self.data, self.name, self.at = data, name, 0

    def skip(self, count: int, what: str) -> int:
        """The position of the next `count` bytes, which are passed over."""
        at = self.at
        if count > len(self.data) - at:
            raise ValueError(
                f"{self.name} is cut off: {what} at byte {at} takes {count} bytes, and the file "
                f"has {len(self.data)}"
            )
        self.at += count
        return at

    def number(self, form: str, what: str) -> int:
        return struct.unpack_from(f"<{form}", self.data, self.skip(struct.calcsize(form), what))[0]

    def text(self, what: str) -> str:
        count = self.number("Q", what)
        at = self.skip(count, what)
        try:
            return self.data[at : at + count].decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"{self.name}: {what} at byte {at} is no UTF-8") from error

    def value(self, kind: int, what: str) -> None:
        if kind in SCALARS:
            self.skip(SCALARS[kind], what)
        elif kind == STRING:
            self.skip(self.number("Q", what), what)
        elif kind == ARRAY:
            inner, count = self.number("I", what), self.number("Q", what)
            if inner in SCALARS:
                self.skip(count * SCALARS[inner], what)
            elif inner == STRING:
                if count > (len(self.data) - self.at) // 8:
                    self.skip(8 * count, what)
                for _ in range(count):
                    self.skip(self.number("Q", what), what)
            else:
                raise ValueError(f"{self.name}: {what} is an array of the unknown type {inner}")
        else:
            raise ValueError(f"{self.name}: {what} has the unknown type {kind}")


def read(path: Path) -> dict[str, Tensors]:
    """The tensors of a GGUF file of version 2 or 3, little-endian.

    Raises:
        ValueError: the file is no such file, or something in it cannot be; says what and where.
    """
    with path.open("rb") as file:
        if path.stat().st_size < 24:
            raise ValueError(f"{path} has {path.stat().st_size} bytes; it is no GGUF file")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _read(_Reader(data, str(path)))


def _read(r: _Reader) -> dict[str, Tensors]:
    if r.data[:4] != b"GGUF":
        raise ValueError(f"{r.name} begins with {r.data[:4]!r}; a GGUF file begins with b'GGUF'")
    r.at = 4
    version = r.number("I", "the version")
    if version not in (2, 3):
        raise ValueError(f"{r.name} has version {version}; it must be 2 or 3, little-endian")
    tensors, fields = r.number("Q", "the count of tensors"), r.number("Q", "the count of fields")
    for count, least, what in ((fields, 13, "fields"), (tensors, 24, "tensors")):
        if count > len(r.data) // least:
            raise ValueError(f"{r.name} has {count} {what}, more than its {len(r.data)} bytes hold")
    alignment, seen = 32, set()
    for _ in range(fields):
        key = r.text("a key")
        if key in seen:
            raise ValueError(f"{r.name} has {key!r} twice")
        seen.add(key)
        kind, at = r.number("I", key), r.at
        r.value(kind, key)
        if key == "general.alignment":
            if kind != 4:
                raise ValueError(f"{r.name}: general.alignment has type {kind}; it must be 4")
            alignment = struct.unpack_from("<I", r.data, at)[0]
            if alignment == 0 or alignment & (alignment - 1):
                raise ValueError(
                    f"{r.name}: general.alignment is {alignment}; it must be a power of two"
                )
    return _tensors(r, tensors, alignment)


def _tensors(r: _Reader, count: int, alignment: int) -> dict[str, Tensors]:
    infos = []
    for _ in range(count):
        name = r.text("the name of a tensor")
        dimensions = r.number("I", name)
        if dimensions > MOST_DIMENSIONS:
            raise ValueError(f"{r.name}: {name} has {dimensions} dimensions; 4 are the most")
        shape = tuple(r.number("Q", name) for _ in range(dimensions))[::-1]
        infos.append((name, shape, r.number("I", name), r.number("Q", name)))
    begin = -(-r.at // alignment) * alignment
    found: dict[str, Tensors] = {}
    for name, shape, kind, offset in infos:
        if name in found:
            raise ValueError(f"{r.name} has the tensor {name} twice")
        if kind not in BLOCKS:
            raise ValueError(f"{r.name}: {name} has type {kind}, which is not known here")
        numbers, size = BLOCKS[kind]
        if 0 in shape or (shape and shape[-1] % numbers):
            raise ValueError(
                f"{r.name}: {name} is {list(shape)}; its rows must be whole blocks of {numbers}"
            )
        start = begin + offset
        end = start + math.prod(shape) // numbers * size
        if offset % alignment or end > len(r.data):
            raise ValueError(
                f"{r.name}: {name} is in bytes {start} to {end} of {len(r.data)}; they must be in "
                f"the file, and begin at a multiple of {alignment} after its header"
            )
        found[name] = Tensors(shape, kind, start, end)
    return found
