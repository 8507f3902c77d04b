"""Checks of the arguments of losses, and the dtypes that losses compute in."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..checks import check_number

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
INTEGERS = (torch.int64, torch.int32)


def wide(x: Tensor) -> Tensor:
    """The tensor in the dtype that losses compute in: float64 stays, all others become float32."""
    return x if x.dtype is torch.float64 else x.float()


def constant(x: Tensor) -> Tensor:
    """The same of a tensor that no gradient goes to."""
    return wide(x.detach())


def positive(name: str, x: Any) -> float:
    """A finite number above 0, as a float."""
    number = check_number(name, x)
    if number <= 0:
        raise ValueError(f"{name} is {number}; it must be above 0")
    return number


def not_negative(name: str, x: Any) -> float:
    """A finite number that is 0 or more, as a float."""
    number = check_number(name, x)
    if number < 0:
        raise ValueError(f"{name} is {number}; it must be 0 or more")
    return number


def smoothing(x: Any) -> float:
    """A share of flipped labels. At one half the labels would say nothing any more."""
    number = check_number("label_smoothing", x)
    if not 0 <= number < 0.5:
        raise ValueError(f"label_smoothing is {number}; it must be within [0, 0.5)")
    return number


def check_rows(
    name: str, x: Any, dtypes: tuple[torch.dtype, ...] = FLOATS, like: Tensor | None = None
) -> None:
    """Require one entry a row: a tensor of one dimension, of the shape and device of `like`."""
    check_dtype(name, x, dtypes)
    if like is not None:
        check_place(name, x, tuple(like.shape), like)
    elif x.dim() != 1:
        raise ValueError(f"{name} has shape {list(x.shape)}; it must have 1 dimension")


def check_dtype(name: str, x: Any, dtypes: tuple[torch.dtype, ...]) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} is a {type(x).__name__}; it must be a tensor")
    if x.dtype not in dtypes:
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{name} has dtype {x.dtype}; it must be {names}")


def check_place(name: str, x: Tensor, shape: tuple[int, ...], like: Tensor) -> None:
    if x.shape != shape:
        raise ValueError(f"{name} has shape {list(x.shape)}; it must be {list(shape)}")
    if x.device != like.device:
        raise ValueError(f"{name} is on {x.device}; it must be on {like.device}")
