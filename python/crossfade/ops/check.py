"""Argument checks of the ops, for everything the host can see without waiting for a device.

Numbers are checked here; the contents of tensors are left to the kernels, which mark a bad row.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import memory

MAX_TERMS = 16
MAX_PARTS = 8
MOST_COLUMNS = 2**31 - 1
FLOAT32, FLOAT64 = torch.float32, torch.float64  # global names are found faster than attributes
MATRIX_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
DTYPE_NAMES = "float32, bfloat16, float16 or float64"
WEIGHT_SUM_TOLERANCE = 1e-3  # of a power mean, as in csrc/blend_math.h
# Powers that are nearer to 0 are raised to this. The mean is the same, and none of its products in
# float64 is subnormal.
LEAST_POWER = 2.0**-100
HUGE = (2 - 2.0**-23) * 2.0**127  # the largest float32


def matrices(
    name: str, tensors: Any, rows: int | None = None, device: torch.device | None = None
) -> tuple[Sequence[Tensor], int, int, torch.device]:
    """A sequence of `[rows, V_k]` float matrices, the smallest V_k, their rows and their device.

    Those of float64 come as float32, which results are. Strides are looked at by `columns`.
    """
    if not isinstance(tensors, (list, tuple)):  # abc.Sequence would cost a quarter microsecond
        raise TypeError(
            f"{name} is a {type(tensors).__name__}; it must be a list of [B, V] tensors"
        )
    if len(tensors) > MAX_TERMS:
        raise ValueError(f"{name} has {len(tensors)} tensors; it must have at most {MAX_TERMS}")
    try:
        columns, wide = MOST_COLUMNS, False
        for k, t in enumerate(tensors):
            if type(t) is not Tensor and not isinstance(t, Tensor):
                raise TypeError(f"{name}[{k}] is a {type(t).__name__}; it must be a tensor")
            dtype, shape = t.dtype, t.shape
            if dtype is not FLOAT32:
                if dtype not in MATRIX_DTYPES:
                    raise TypeError(f"{name}[{k}] has dtype {dtype}; it must be {DTYPE_NAMES}")
                wide |= dtype is FLOAT64
            if len(shape) != 2:
                raise ValueError(f"{name}[{k}] has shape {list(shape)}; it must be [B, V]")
            height, width = shape
            if rows is None:
                rows, device = height, t.device
            elif height != rows:
                raise ValueError(
                    f"{name}[{k}] has {height} rows; it must have {rows}, as logits[0]"
                )
            elif t.device != device:
                raise ValueError(
                    f"{name}[{k}] is on {t.device}; it must be on {device}, as logits[0]"
                )
            if width == 0:
                raise ValueError(f"{name}[{k}] has shape {list(shape)}; V must be at least 1")
            if width < columns:
                columns = width
        if rows is None or device is None:
            raise ValueError(f"{name} is empty; it must have at least one tensor")
        return [_narrow(t) for t in tensors] if wide else tensors, columns, rows, device
    except (AttributeError, ValueError, RuntimeError):
        memory.check_strided((f"{name}[{k}]", t) for k, t in enumerate(tensors))
        raise


def strides(tensors: dict[str, Tensor | None], written: Sequence[str] = ("keys", "values")) -> None:
    """Checks that last dimensions are contiguous, and that what is written into has places."""
    for name, x in tensors.items():
        if x is None or x.is_contiguous():
            continue
        if x.stride(-1) != 1 and x.shape[-1] > 1:
            raise ValueError(f"{name} has a last stride of {x.stride(-1)}; it must be 1")
        if name in written:
            memory.check_places(name, x)


def columns(name: str, tensors: Sequence[Tensor]) -> None:
    """Checks that columns of matrices are contiguous. Called by backends: they look at strides."""
    memory.check_strided((f"{name}[{k}]", t) for k, t in enumerate(tensors))
    for k, t in enumerate(tensors):
        if t.stride(1) != 1 and t.shape[1] > 1:
            raise ValueError(
                f"{name}[{k}] has column stride {t.stride(1)}; it must be 1 (any row stride works)"
            )


def _narrow(t: Tensor) -> Tensor:
    return t.float() if t.dtype == FLOAT64 else t


Weights = tuple[float, ...] | Tensor


def vocabulary(vocab_size: Any, columns: int) -> int:
    """How many columns to use, of the `columns` that all tensors have."""
    if isinstance(vocab_size, bool) or not isinstance(vocab_size, int):
        raise TypeError(f"vocab_size is a {type(vocab_size).__name__}; it must be an int")
    if not 1 <= vocab_size <= columns:
        raise ValueError(
            f"vocab_size is {vocab_size}; it must be within [1, {columns}], the columns that all "
            "logits and values have"
        )
    return vocab_size


def weights_of(
    name: str, w: Any, count: int, rows: int, device: torch.device, *, mean: bool = False
) -> tuple[float, ...] | Tensor:
    """`w` as `count` numbers, or as a float32 tensor `[count]` or `[rows, count]`.

    With `mean` they are the weights of a power mean: none is negative, and their sum is one.
    """
    if isinstance(w, Tensor):
        if not w.is_floating_point():
            raise TypeError(f"{name} has dtype {w.dtype}; it must be a float tensor")
        if w.shape != (count,) and w.shape != (rows, count):
            raise ValueError(
                f"{name} has shape {list(w.shape)}; it must be [{count}] or [{rows}, {count}]"
            )
        if w.device != device:
            raise ValueError(f"{name} is on {w.device}; it must be on {device}, as logits[0]")
        w = w.to(torch.float32)
        return w if w.stride(-1) == 1 or count == 1 else w.contiguous()
    if not isinstance(w, (list, tuple)):
        raise TypeError(
            f"{name} is a {type(w).__name__}; it must be a list of {count} numbers or a tensor"
        )
    if len(w) != count:
        raise ValueError(f"{name} has {len(w)} numbers; it must have {count}, one a tensor")
    for k, x in enumerate(w):
        if type(x) is float and -HUGE <= x <= HUGE and not mean:  # nearly all calls
            continue
        if type(x) is not float and (isinstance(x, bool) or not isinstance(x, (int, float))):
            raise TypeError(f"{name}[{k}] is {x!r}; it must be a number")
        if not -HUGE <= x <= HUGE:
            raise ValueError(f"{name}[{k}] is {x}; it must be finite, as a float32")
        if mean and x < 0:
            raise ValueError(f"{name}[{k}] is {x}; with power != 0 it must not be negative")
    if mean and abs(sum(w) - 1) > WEIGHT_SUM_TOLERANCE:
        raise ValueError(f"{name} sum to {sum(w):.6g}; with power != 0 they must sum to 1")
    return tuple(w)


def parts_of(
    parts: Sequence[Any], terms: int, rows: int, device: torch.device
) -> tuple[tuple[tuple[float, float, float], ...], Weights]:
    """The power, min and max of each `Part`, and their weights, as `Inputs` has them."""
    if len(parts) > MAX_PARTS:
        raise ValueError(f"parts has {len(parts)} members; it must have at most {MAX_PARTS}")
    each = [
        weights_of(f"parts[{g}].weights", p.weights, terms, rows, device)
        for g, p in enumerate(parts)
    ]
    settings = tuple((p.power, p.min, p.max) for p in parts)
    tensors = [w for w in each if isinstance(w, Tensor)]
    if not tensors:
        return settings, tuple(x for w in each for x in w)
    like = tensors[0]
    alike = [w if isinstance(w, Tensor) else like.new_tensor(w) for w in each]
    if any(w.dim() == 2 for w in alike):
        alike = [w.expand(rows, terms) for w in alike]
    return settings, torch.cat(alike, dim=-1)


def pushes_exist(power: float, parts: Sequence[Any]) -> None:
    """Refuses pushes of terms where the blend's log-probs are no weighted sum of theirs."""
    if power != 0:
        raise NotImplementedError(
            f"return_pushes is True and power is {power}; it must be 0: the log of a power mean is "
            "not a sum over its terms, so that none has a push of its own"
        )
    if parts:
        raise NotImplementedError(
            f"return_pushes is True and parts has {len(parts)} members; it must be empty: what is "
            "clamped or a union is not a sum over terms, so that none has a push of its own"
        )


def shard(return_partial: Any, first_token: int, return_pushes: Any) -> None:
    if not flag("return_partial", return_partial):
        raise ValueError(
            f"first_token is {first_token} and return_partial is False; it must be 0: only a part "
            "of a vocabulary begins elsewhere"
        )
    if flag("return_pushes", return_pushes):
        raise NotImplementedError(
            "return_pushes is True and return_partial is True; it must be False: the mean that a "
            "push departs from is one over the whole vocabulary, which merge does not find"
        )


def power_of(r: Any) -> float:
    if isinstance(r, float) and math.isinf(r):
        return r
    r = number("power", r, -HUGE, HUGE, "finite as a float32, inf or -inf")
    return math.copysign(LEAST_POWER, r) if 0 < abs(r) < LEAST_POWER else r


def mask_of(m: Any, rows: int, vocab: int, device: torch.device) -> Tensor:
    """`m` as bool `[vocab]` or `[rows, vocab]`, True where a token is allowed."""
    if not isinstance(m, Tensor) or m.dtype != torch.bool:
        found = m.dtype if isinstance(m, Tensor) else type(m).__name__
        raise TypeError(f"mask is {found}; it must be a bool tensor, True where allowed")
    if m.dim() not in (1, 2) or m.shape[-1] < vocab or (m.dim() == 2 and m.shape[0] != rows):
        raise ValueError(
            f"mask has shape {list(m.shape)}; it must be [{vocab}] or [{rows}, {vocab}] (more "
            "columns are ignored)"
        )
    if m.device != device:
        raise ValueError(f"mask is on {m.device}; it must be on {device}, as logits[0]")
    m = m[..., :vocab]
    return m if m.stride(-1) == 1 or vocab == 1 else m.contiguous()


# For each setting: its type, its lowest and its highest number, and what errors say it must be.
RANGES: dict[str, tuple[type, float, float, str]] = {
    "temperature": (float, 0.0, HUGE, "0 (greedy) or above, and finite"),
    "top_k": (int, 0, 2**63 - 1, "0 (off) or more"),
    "top_p": (float, 0.0, 1.0, "within [0, 1]"),
    "min_p": (float, 0.0, 1.0, "within [0, 1]"),
    "seed": (int, 0, 2**64 - 1, "within [0, 2^64)"),
    "stream": (int, 0, 2**64 - 1, "within [0, 2^64)"),
    "step": (int, 0, 2**32 - 1, "within [0, 2^32)"),
}


def setting(name: str, x: Any, rows: int, device: torch.device) -> Any:
    """A setting of each row: a number in its range, or a float32 or int64 tensor `[rows]`."""
    kind, lowest, highest, must_be = RANGES[name]
    number: Any = x  # where it is one
    if type(x) is kind and lowest <= number <= highest:  # nearly all calls
        return x
    if isinstance(x, Tensor):
        if x.dtype == torch.bool or (kind is int and x.is_floating_point()) or x.is_complex():
            raise TypeError(
                f"{name} has dtype {x.dtype}; it must be {'an int' if kind is int else 'a float'} "
                "tensor"
            )
        if x.shape != (rows,) and x.dim() != 0:
            raise ValueError(f"{name} has shape {list(x.shape)}; it must be a scalar or [{rows}]")
        if x.device != device:
            raise ValueError(f"{name} is on {x.device}; it must be on {device}, as logits[0]")
        x = x.to(torch.int64 if kind is int else torch.float32)
        return x.expand(rows).contiguous() if x.dim() == 0 else x.contiguous()
    if isinstance(x, bool) or not isinstance(x, (int, kind)):
        raise TypeError(
            f"{name} is {x!r}; it must be {'an int' if kind is int else 'a number'} or a tensor"
        )
    if not lowest <= number <= highest:
        raise ValueError(f"{name} is {x}; it must be {must_be}")
    return x


def number(name: str, x: Any, least: float, most: float, must_be: str) -> float:
    if isinstance(x, bool) or not isinstance(x, (int, float)):
        raise TypeError(f"{name} is {x!r}; it must be a number")
    if not least <= x <= most:
        raise ValueError(f"{name} is {x}; it must be {must_be}")
    return float(x)


def integer(name: str, x: Any, least: int, most: int, must_be: str) -> int:
    if isinstance(x, bool) or not isinstance(x, int):
        raise TypeError(f"{name} is {x!r}; it must be an int")
    if not least <= x <= most:
        raise ValueError(f"{name} is {x}; it must be {must_be}")
    return x


def flag(name: str, x: Any) -> bool:
    if not isinstance(x, bool):
        raise TypeError(f"{name} is {x!r}; it must be True or False")
    return x
