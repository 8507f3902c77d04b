"""A linear layer for the few rows of a decoding step, with batched low-rank deltas.

With 1 to 64 rows, generic products reach only a fraction of the memory's bandwidth or of the
processor's speed. The native kernel reads the weights once for all rows and all adapters, in the
order in which they lie in memory.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import backends, check, memory, native
from . import packed as packing
from .packed import Packed

# With more rows F.linear is as fast. In bfloat16 that is so with few rows already where there is
# AMX, which torch uses; in float16 it never is without AMX (by a factor of 5 at 512 rows).
HAS_AMX = torch.cpu._is_amx_tile_supported()
MOST_NATIVE_ROWS = {
    torch.float32: 256,
    torch.bfloat16: 16 if HAS_AMX else 256,
    torch.float16: 256 if HAS_AMX else 4096,
}

BACKENDS = (None, "native", "reference")
NATIVE_IS_MISSING = backends.why_not("native", native.CPU)


class Lora(NamedTuple):
    """Low-rank deltas of one layer. The ranks of all adapters are stacked: R in all."""

    a: Tensor  # [R, in]
    b: Tensor  # [out, R]
    scale: Tensor  # [rows, R] float32: an adapter's scaling, 0 in rows that do not use it


def linear(
    x: Tensor,
    weight: Tensor | Packed,
    bias: Tensor | None = None,
    *,
    lora: Lora | None = None,
    backend: str | None = None,
) -> Tensor:
    """A linear layer, fast where x has few rows, with each row's own low-rank adapters.

    The same in torch::

        y = x @ weight.T + bias + ((x @ lora.a.T) * lora.scale) @ lora.b.T

    The native kernel sums in float32 whatever the dtype, and in an order of its own: a row of y
    depends on that row of x (and of scale) alone, to the bit, not on the rest of the batch nor on
    the number of threads. A row whose scale is 0 throughout is what the plain layer gives. CPUs
    with avx512_bf16 take bfloat16 numbers below 2^-126 for zeros, as their instruction does.

    With a weight of 8 or 4 bits, the formula takes its `dequantized` numbers, and the kernel also
    rounds each group of x to 8 bits: to multiples of its largest magnitude / 127. A row of x with
    numbers that are not finite then gives NaN alone.

    Args:
        x: ``[..., in]``, float32, bfloat16, float16 or float64 (which the formula alone takes). Its
            leading dimensions are the rows.
        weight: ``[out, in]`` in x's dtype, used as it is: nothing is packed or copied. Or a
            `Packed` weight of 8 or 4 bits, with any of x's dtypes.
        bias: ``[out]`` in x's dtype, or None.
        lora: deltas, with `a` ``[R, in]`` and `b` ``[out, R]`` in x's dtype and `scale` float32:
            ``[rows, R]``, or, of an x with three dimensions or more, ``[x.shape[0], R]`` to serve
            all rows of each ``x[i]``.
        backend: "native" (CPUs), "reference" (the torch formula), or None: native on a CPU where no
            gradient is wanted and the columns of weight, a and b are contiguous, for at most
            `MOST_NATIVE_ROWS` rows (for any number if the weight is packed); else the formula,
            which is differentiable.

    Returns:
        ``[..., out]`` in x's dtype.

    Raises:
        TypeError, ValueError: names the argument, what it was and what it must be.
    """
    try:
        out, inner = _check(x, weight, bias, lora)
    except (AttributeError, TypeError, ValueError, RuntimeError):
        _check_kinds(x, weight, bias, lora)
        raise
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}; it must be None, 'native' or 'reference'")
    if backend == "reference":
        return _formula(x, weight, bias, lora)
    if not memory.unobserved():
        own = None if isinstance(weight, Packed) else weight
        if memory.want_gradient(x, own, bias, *(lora or ())):
            return _instead(backend, "an argument requires a gradient", x, weight, bias, lora)
        if memory.recorded() and x.is_cpu:
            a, b, scale = (None, None, None) if lora is None else lora
            if isinstance(weight, Packed):
                return torch.ops.crossfade.linear_packed(x, *weight, bias, a, b, scale, backend)
            return torch.ops.crossfade.linear(x, weight, bias, a, b, scale, backend)
    try:
        return _run(x, weight, bias, lora, backend, out, inner)
    except memory.NotPlain:
        return _instead(backend, "an argument has no memory of its own", x, weight, bias, lora)
    except RuntimeError:
        _check_kinds(x, weight, bias, lora)
        raise


def _run(
    x: Tensor,
    weight: Tensor | Packed,
    bias: Tensor | None,
    lora: Lora | None,
    backend: str | None,
    out: int,
    inner: int,
) -> Tensor:
    if backend is None and not has_few_rows(x, weight, inner):
        return _formula(x, weight, bias, lora)
    reason = _why_not(x, weight, bias, lora)
    if reason is not None:
        return _instead(backend, reason, x, weight, bias, lora)
    return native.linear(x, weight, bias, lora, out, inner)


def has_few_rows(x: Tensor, weight: Tensor | Packed, inner: int) -> bool:
    """Whether the kernel is the faster one for so many rows of x."""
    return isinstance(weight, Packed) or x.numel() <= MOST_NATIVE_ROWS.get(x.dtype, 0) * inner


def _instead(
    backend: str | None,
    reason: str,
    x: Tensor,
    weight: Tensor | Packed,
    bias: Tensor | None,
    lora: Lora | None,
) -> Tensor:
    """If the kernel cannot run: the formula, or an error where the caller asked for the kernel."""
    if backend is not None:
        _check_kinds(x, weight, bias, lora)
        raise ValueError(f"backend is {backend!r}, which cannot run this: {reason}")
    return _formula(x, weight, bias, lora)


def _formula(x: Tensor, weight: Tensor | Packed, bias: Tensor | None, lora: Lora | None) -> Tensor:
    y = F.linear(x, weight.dequantized(x.dtype) if isinstance(weight, Packed) else weight, bias)
    if lora is None:
        return y
    down, scale = F.linear(x, lora.a), lora.scale
    if scale.shape[0] == x.shape[0] and x.dim() > 2:
        scale = scale.view(-1, *(1,) * (x.dim() - 2), scale.shape[1])
    else:
        scale = scale.reshape(down.shape)
    return y + F.linear((down * scale).to(x.dtype), lora.b)


def _why_not(
    x: Tensor, weight: Tensor | Packed, bias: Tensor | None, lora: Lora | None
) -> str | None:
    """Why the native kernel cannot take these; None if it can."""
    if not x.is_cpu:
        return f"x is on {x.device}; the kernel is for CPUs"
    if x.dtype is torch.float64:
        return "x has dtype torch.float64; the kernel's sums are float32"
    if not isinstance(weight, Packed) and weight.stride()[1] != 1 and weight.shape[1] > 1:
        return f"weight has column stride {weight.stride(1)}; it must be 1"
    if bias is not None and bias.stride() != (1,) and bias.shape[0] > 1:
        return f"bias has stride {bias.stride(0)}; it must be 1"
    if lora is not None:
        for name, t in (("lora.a", lora.a), ("lora.b", lora.b)):
            if t.stride()[1] != 1 and t.shape[1] > 1:
                return f"{name} has column stride {t.stride(1)}; it must be 1"
    return NATIVE_IS_MISSING


def _check(
    x: Tensor, weight: Tensor | Packed, bias: Tensor | None, lora: Lora | None
) -> tuple[int, int]:
    """Checks everything but the contents of tensors, quickly: a step has hundreds of calls."""
    dtype, device = x.dtype, x.device
    if isinstance(weight, Packed):
        packing.check(weight, device)
        shape = torch.Size((weight.out, weight.inner))
    else:
        shape = weight.shape
    if dtype not in check.MATRIX_DTYPES:
        raise TypeError(f"x has dtype {dtype}; it must be {check.DTYPE_NAMES}")
    if not isinstance(weight, Packed) and (weight.dtype is not dtype or weight.device != device):
        _check_like_x("weight", weight, dtype, device)
    if len(shape) != 2 or shape[1] == 0:
        raise ValueError(f"weight has shape {list(shape)}; it must be [out, in], in at least 1")
    out, inner = shape
    if x.shape[-1:] != shape[1:]:
        raise ValueError(
            f"x has shape {list(x.shape)}; it must be [..., {inner}], as weight has columns"
        )
    if bias is not None:
        _check_like_x("bias", bias, dtype, device)
        if bias.shape != shape[:1]:
            raise ValueError(f"bias has shape {list(bias.shape)}; it must be [{out}]")
    if lora is not None:
        _check_lora(lora, x, out)
    return out, inner


def _check_lora(lora: Lora, x: Tensor, out: int) -> None:
    if not isinstance(lora, Lora):
        raise TypeError(f"lora is a {type(lora).__name__}; it must be a Lora or None")
    a, b, scale = lora
    dtype, device, inner = x.dtype, x.device, x.shape[-1]
    _check_like_x("lora.a", a, dtype, device)
    if a.dim() != 2 or a.shape[1] != inner:
        raise ValueError(f"lora.a has shape {list(a.shape)}; it must be [R, {inner}]")
    rank = a.shape[0]
    _check_like_x("lora.b", b, dtype, device)
    if b.shape != (out, rank):
        raise ValueError(f"lora.b has shape {list(b.shape)}; it must be [{out}, {rank}]")
    if scale.dtype is not torch.float32:
        raise TypeError(f"lora.scale has dtype {scale.dtype}; it must be torch.float32")
    _check_like_x("lora.scale", scale, torch.float32, device)
    rows = x.numel() // inner
    groups = x.shape[0] if x.dim() > 2 else rows
    if scale.dim() != 2 or scale.shape[1] != rank or scale.shape[0] not in (rows, groups):
        each = "" if groups == rows else f" or [{groups}, {rank}]"
        raise ValueError(
            f"lora.scale has shape {list(scale.shape)}; it must be [{rows}, {rank}]{each}"
        )


def _check_like_x(name: str, t: Tensor, dtype: torch.dtype, device: torch.device) -> None:
    if t.dtype is not dtype:
        raise TypeError(f"{name} has dtype {t.dtype}; it must be {dtype}, as x")
    if t.device != device:
        raise ValueError(f"{name} is on {t.device}; it must be on {device}, as x")


def _check_kinds(x: Any, weight: Any, bias: Any, lora: Any) -> None:
    """Called after an error: an argument may be no tensor, or one without strides."""
    given = {"x": x} | ({} if isinstance(weight, Packed) else {"weight": weight})
    if bias is not None:
        given["bias"] = bias
    if isinstance(lora, Lora):
        given |= {"lora.a": lora.a, "lora.b": lora.b, "lora.scale": lora.scale}
    for name, t in given.items():
        if not isinstance(t, Tensor):
            raise TypeError(f"{name} is a {type(t).__name__}; it must be a tensor")
    memory.check_strided(given.items())


# The op as torch's dispatcher sees it. Eager calls of plain tensors never come here: see memory.py.
torch.library.define(
    "crossfade::linear",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor? a, Tensor? b, Tensor? scale, str? backend) "
    "-> Tensor",
)


@torch.library.impl("crossfade::linear", "CompositeExplicitAutograd")
def _linear(x, weight, bias, a, b, scale, backend):
    lora = None if a is None else Lora(a, b, scale)
    return _run(x, weight, bias, lora, backend, *_check(x, weight, bias, lora))


@torch.library.register_fake("crossfade::linear")
def _linear_fake(x, weight, bias, a, b, scale, backend):
    return x.new_empty(*x.shape[:-1], weight.shape[0])


torch.library.define(
    "crossfade::linear_packed",
    "(Tensor x, Tensor numbers, Tensor scales, Tensor? minima, int out, int bits, Tensor? bias, "
    "Tensor? a, Tensor? b, Tensor? scale, str? backend) -> Tensor",
)


@torch.library.impl("crossfade::linear_packed", "CompositeExplicitAutograd")
def _linear_packed(x, numbers, scales, minima, out, bits, bias, a, b, scale, backend):
    weight = Packed(numbers, scales, minima, out, bits)
    lora = None if a is None else Lora(a, b, scale)
    return _run(x, weight, bias, lora, backend, *_check(x, weight, bias, lora))


@torch.library.register_fake("crossfade::linear_packed")
def _linear_packed_fake(x, numbers, scales, minima, out, bits, bias, a, b, scale, backend):
    return x.new_empty(*x.shape[:-1], out)
