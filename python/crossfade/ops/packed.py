"""Weights of 8 or 4 bits, laid out for the native kernel of linear layers.

Each group of a row's numbers has a scale of its own: 8 bits hold -127 to 127, 4 bits -8 to 7, or 0
to 15 above a minimum. The layout is that of `crossfade::Packed` (csrc/crossfade.h): 16 rows are
packed together, in the order in which the kernel reads them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

BITS = (4, 8)
GROUPS = (16, 32, 64, 128, 256)
BLOCK = 16  # rows of the weight that are packed together
LINE = 64  # bytes
ZERO = {4: 8, 8: 128}  # the packed number that stands for 0, where there are no minima


class Packed(NamedTuple):
    """A weight ``[out, in]`` of a linear layer, in few bits.

    Attributes:
        numbers: ``[blocks, in * bits / 32, 64]`` uint8, a block being 16 rows.
        scales: ``[blocks, in / group, 16]`` float16.
        minima: the same, with 4 bits only; None: numbers stand for -8 to 7.
        out: how many rows there are; the last block may be longer.
        bits: 8 or 4.
    """

    numbers: Tensor
    scales: Tensor
    minima: Tensor | None
    out: int
    bits: int

    @property
    def inner(self) -> int:
        """The columns of the weight."""
        return self.numbers.shape[1] * 32 // self.bits

    @property
    def group(self) -> int:
        """How many numbers of a row have one scale."""
        return self.inner // self.scales.shape[1]

    def unpacked(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Numbers ``[out, in]`` uint8, and scales and minima ``[out, in / group]`` float16."""
        blocks, lines, _ = self.numbers.shape
        each = self.numbers.view(blocks, lines, BLOCK, 4)
        if self.bits == 4:
            each = torch.stack((each & 15, each >> 4), dim=3)  # [blocks, lines, 16, 2, 4]
        numbers = each.flatten(3).transpose(1, 2).reshape(blocks * BLOCK, -1)[: self.out]
        of = [
            None if t is None else t.transpose(1, 2).reshape(blocks * BLOCK, -1)[: self.out]
            for t in (self.scales, self.minima)
        ]
        assert of[0] is not None
        return numbers, of[0], of[1]

    def dequantized(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """``[out, in]``: scale * (number - 8 or 128), or scale * number + minimum, in float32."""
        numbers, scales, minima = self.unpacked()
        grouped = numbers.view(self.out, -1, self.group).float()
        if minima is None:
            weight = (grouped - ZERO[self.bits]) * scales.float()[..., None]
        else:
            weight = grouped * scales.float()[..., None] + minima.float()[..., None]
        return weight.view(self.out, -1).to(dtype)


def pack(numbers: Tensor, scales: Tensor, minima: Tensor | None, bits: int) -> Packed:
    """The inverse of `Packed.unpacked`, for numbers ``[out, in]`` and scales ``[out, groups]``.

    Args:
        numbers: uint8, below 16 with 4 bits.
        scales, minima: rounded to float16.
    """
    out, inner = numbers.shape
    more = -out % BLOCK
    each = F.pad(numbers, (0, 0, 0, more), value=ZERO[bits])
    each = each.view(-1, BLOCK, inner * bits // 32, 32 // bits).transpose(1, 2)
    if bits == 4:
        each = each[..., :4] | each[..., 4:] << 4
    of = [
        None
        if t is None
        else F.pad(t.half(), (0, 0, 0, more))
        .view(-1, BLOCK, t.shape[1])
        .transpose(1, 2)
        .contiguous()
        for t in (scales, minima)
    ]
    assert of[0] is not None
    return Packed(each.reshape(*each.shape[:2], LINE), of[0], of[1], out, bits)


def quantize(weight: Tensor, bits: int, group: int = 32) -> Packed:
    """A weight ``[out, in]`` rounded to the nearest multiples of a scale a group.

    With 8 bits the scale is the group's largest magnitude / 127. With 4 bits it is the number of
    that magnitude / -8, with its sign, so that it is hit exactly: llama.cpp's Q8_0 and Q4_0 have
    the same scales. They are rounded to float16 before numbers are divided by them.

    Raises:
        TypeError, ValueError: names the argument, what it was and what it must be.
    """
    check_format(bits, group)
    if not weight.is_floating_point():
        raise TypeError(f"weight has dtype {weight.dtype}; it must be a float dtype")
    if weight.dim() != 2 or weight.shape[1] == 0 or weight.shape[1] % group:
        raise ValueError(
            f"weight has shape {list(weight.shape)}; it must be [out, in], where group {group} "
            "divides in"
        )
    if weight.is_meta:
        raise ValueError("weight is on meta; it must have its numbers")
    grouped = weight.detach().float().reshape(len(weight), -1, group)
    if not bool(grouped.isfinite().all()):
        raise ValueError("weight has infinite numbers or NaN; they must all be finite")
    at = grouped.abs().argmax(dim=-1, keepdim=True)
    most = grouped.gather(-1, at)[..., 0]
    scales = (most.abs() / 127 if bits == 8 else most / -8).half()
    if not bool(scales.isfinite().all()):
        raise ValueError(f"weight has {most.abs().max():.3g}, whose scale float16 does not hold")
    inverse = torch.where(scales == 0, 0.0, 1 / scales.float())[..., None]
    low, high = (-127, 127) if bits == 8 else (-8, 7)
    numbers = (grouped * inverse).round_().clamp_(low, high) + ZERO[bits]
    return pack(numbers.to(torch.uint8).view(weight.shape), scales, None, bits)


def check_format(bits: int, group: int) -> None:
    if bits not in BITS:
        raise ValueError(f"bits is {bits!r}; it must be 4 or 8")
    if group not in GROUPS:
        raise ValueError(f"group is {group!r}; it must be one of {', '.join(map(str, GROUPS))}")


def check(weight: Packed, device: torch.device) -> None:
    """Checks that the parts of a packed weight fit each other. Their contents are not looked at.

    Raises:
        TypeError, ValueError: names the part.
    """
    numbers, scales, minima, out, bits = weight
    if bits not in BITS:
        raise ValueError(f"weight.bits is {bits!r}; it must be 4 or 8")
    blocks = -(-out // BLOCK)
    given = {"numbers": (numbers, torch.uint8), "scales": (scales, torch.float16)}
    if minima is not None:
        given["minima"] = (minima, torch.float16)
        if bits != 4 or minima.shape != scales.shape:
            raise ValueError(
                f"weight.minima has shape {list(minima.shape)} with {bits} bits; it must be "
                f"{list(scales.shape)}, as weight.scales, with 4 bits"
            )
    for name, (t, dtype) in given.items():
        if t.dtype is not dtype:
            raise TypeError(f"weight.{name} has dtype {t.dtype}; it must be {dtype}")
        if t.device != device:
            raise ValueError(f"weight.{name} is on {t.device}; it must be on {device}, as x")
        last = LINE if name == "numbers" else BLOCK
        if t.dim() != 3 or t.shape[0] != blocks or t.shape[2] != last or not t.is_contiguous():
            raise ValueError(
                f"weight.{name} has shape {list(t.shape)}; it must be [{blocks}, n, {last}] and "
                "contiguous"
            )
    groups, inner = scales.shape[1], weight.inner
    if groups == 0 or inner % groups or inner // groups not in GROUPS:
        raise ValueError(
            f"weight.scales has {groups} groups for {inner} numbers; a group must have one of "
            f"{', '.join(map(str, GROUPS))}"
        )
