"""`attend_`: append to key and value caches and attend to their live part, in one pass."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import backends, check, memory, native, reference

NAMES = "query", "key", "value", "keys", "values", "lengths", "rows"
CPU = torch.device("cpu")
LONGEST_WINDOW = 2**63 - 1


@dataclass(init=False, eq=False, slots=True)
class Attention:
    """What a backend's `attend_` takes: `crossfade::Attention` of csrc/crossfade.h.

    It is made of arguments of the public `attend_`, which are checked here and nowhere else. Only
    the contents of tensors and, on the native backend, their strides are left to the backend.

    Attributes:
        query, key, value, keys, values, lengths, scale, window, softcap, rows: the arguments.
        sizes: batch, n, Hq, Hkv, D, Dv, S and C, which are the struct's sizes in its order.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    keys: Tensor
    values: Tensor
    lengths: Tensor
    scale: float
    window: int
    softcap: float
    rows: Tensor | None
    sizes: tuple[int, ...]

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        keys: Tensor,
        values: Tensor,
        lengths: Tensor,
        scale: float,
        window: int = 0,
        softcap: float = 0.0,
        rows: Tensor | None = None,
    ) -> None:
        dtype, shape, of_value, cache = query.dtype, query.shape, value.shape, keys.shape
        if dtype not in check.MATRIX_DTYPES:
            raise TypeError(f"query has dtype {dtype}; it must be {check.DTYPE_NAMES}")
        if not len(shape) == len(of_value) == len(cache) == 4:
            for name, x in (("query", shape), ("value", of_value), ("keys", cache)):
                if len(x) != 4:
                    raise ValueError(f"{name} has shape {list(x)}; it must have 4 dimensions")
        batch, heads, tokens, size = shape
        slots, kv_heads, capacity, _ = cache
        value_size = of_value[3]
        if kv_heads == 0 or heads % kv_heads:
            raise ValueError(
                f"query has {heads} heads; it must have a multiple of keys' {kv_heads}"
            )
        if tokens == 0 or size == 0:
            raise ValueError(f"query has shape {list(shape)}; n and D must be at least 1")
        if capacity == 0:
            raise ValueError(f"keys has shape {list(cache)}; C must be at least 1")
        if value_size == 0:
            raise ValueError(f"value has shape {list(of_value)}; Dv must be at least 1")
        if rows is None and slots < batch:
            raise ValueError(f"keys has {slots} rows; it must have at least query's {batch}")
        device = CPU if query.is_cpu else query.device
        _check_like("key", key, (batch, kv_heads, tokens, size), dtype, device)
        _check_like("value", value, (batch, kv_heads, tokens, value_size), dtype, device)
        _check_like("keys", keys, (slots, kv_heads, capacity, size), dtype, device)
        _check_like("values", values, (slots, kv_heads, capacity, value_size), dtype, device)
        _check_like("lengths", lengths, (batch,), torch.int64, device)
        if rows is not None:
            _check_like("rows", rows, (batch,), torch.int64, device)
        if type(scale) is not float or not -check.HUGE <= scale <= check.HUGE:
            scale = check.number("scale", scale, -check.HUGE, check.HUGE, "finite, as a float32")
        if type(softcap) is not float or not 0 <= softcap <= check.HUGE:
            softcap = check.number("softcap", softcap, 0, check.HUGE, "0 (off) or more, and finite")
        if type(window) is not int or not 0 <= window <= LONGEST_WINDOW:
            check.integer("window", window, 0, LONGEST_WINDOW, "0 (off) or more, and below 2^63")
        self.query, self.key, self.value = query, key, value
        self.keys, self.values, self.lengths, self.rows = keys, values, lengths, rows
        self.scale, self.window, self.softcap = scale, window, softcap
        self.sizes = batch, tokens, heads, kv_heads, size, value_size, slots, capacity

    def check_strides(self) -> None:
        """Checks that last dimensions are contiguous, and that what is written into has places."""
        named = {
            "query": self.query,
            "key": self.key,
            "value": self.value,
            "keys": self.keys,
            "values": self.values,
            "lengths": self.lengths,
            "rows": self.rows,
        }
        check.strides(named)


def attend_(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    *,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    rows: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Append n tokens to each row of caches, in place, and attend to what each row then holds.

    The same in torch for one row b, with ``r = rows[b]`` and ``at = lengths[b] + arange(n)``::

        keys[r, :, at], values[r, :, at] = key[b], value[b]
        k, v = (x[r].repeat_interleave(Hq // Hkv, dim=0) for x in (keys, values))
        score = scale * query[b] @ k.mT
        score = softcap * (score / softcap).tanh()       # if softcap > 0
        slot = arange(C)
        seen = slot <= at[:, None]
        seen &= slot > at[:, None] - window              # if window > 0
        out[b] = (score.masked_fill(~seen, -inf).softmax(-1) @ v).transpose(0, 1)

    Only what a row sees is read, so caches may hold anything past the lengths of their rows.
    Lengths stay on the device, so the shapes of a step never change. Scores, softmax and sums are
    float32. A row's result depends neither on the other rows, nor on the capacity or the threads.

    Where a gradient is wanted, `backend` None takes the reference. It is the only backend with a
    gradient, and it reads all of the capacity.

    Args:
        query: ``[B, Hq, n, D]``, float32, bfloat16, float16 or float64 (which the reference alone
            takes), with n and D at least 1. Hq is a multiple of Hkv. The key, the value and the
            caches have the same dtype, and of all these tensors the last stride must be 1.
        key, value: ``[B, Hkv, n, D]`` and ``[B, Hkv, n, Dv]`` of the new tokens.
        keys, values: the caches ``[S, Hkv, C, D]`` and ``[S, Hkv, C, Dv]``, of C slots in each row.
            They are written into: they must not share memory, nor be leaves that require a
            gradient.
        lengths: int64 ``[B]``, contiguous: the tokens that each row's caches hold already. A token
            whose slot would be at or past C is not written, and its result is undefined.
        scale: what products of queries and keys are multiplied by.
        window: how many of the last slots a token sees, its own among them; 0 is all.
        softcap: bounds the scores to (-softcap, softcap); 0 leaves them.
        rows: int64 ``[B]``, contiguous: which row of the caches each row has, no two the same. By
            default row b has row b.
        backend: "native" (CPUs), "triton" (GPUs), "reference", or None for the fastest one.

    Returns:
        ``[B, n, Hq, Dv]``, contiguous, in the dtype of `query`.

    Raises:
        TypeError, ValueError: names the argument, what it was and what it must be.

    Source: the online softmax over splits of the slots is Flash-Decoding's (Dao et al., 2023); the
    soft cap is Gemma 2's (arXiv:2408.00118).
    """
    try:
        given = Attention(query, key, value, keys, values, lengths, scale, window, softcap, rows)
    except (AttributeError, TypeError, ValueError, RuntimeError):
        _check_kinds(query, key, value, keys, values, lengths, rows)
        raise
    unobserved = memory.unobserved()
    if not unobserved and _wants_gradient(query, key, value, keys, values):
        if backend not in (None, "reference"):
            raise ValueError(
                f"backend is {backend!r}; it must be None or 'reference' where a gradient is wanted"
            )
        return reference.attend_(given)
    if unobserved or not memory.recorded():
        try:
            return _attend(given, backend)
        except memory.NotPlain:
            memory.check_not_negative((("keys", keys), ("values", values)))
            query, key, value = memory.resolved(query, key, value)
    scale, window, softcap = given.scale, given.window, given.softcap
    return torch.ops.crossfade.attend_(
        query, key, value, keys, values, lengths, scale, window, softcap, rows, backend
    )


def _wants_gradient(*tensors: Tensor) -> bool:
    """Whether one of query, key, value, keys and values needs one. Leaves are not written into."""
    for name, x in zip(("keys", "values"), tensors[3:], strict=True):
        if x.requires_grad and x.is_leaf and torch.is_grad_enabled():
            raise ValueError(
                f"{name} is a leaf that requires a gradient; it is written into, so it must not"
            )
    return memory.want_gradient(*tensors)


def _attend(given: Attention, backend: str | None) -> Tensor:
    query = given.query
    if query.dtype is torch.float64:
        backend = backends.of_dtype(backend, query.dtype, "query")
    module = _module(backend, query.device)
    if module is not native:  # native reads all strides anyway, and calls this if one is odd
        given.check_strides()
    return module.attend_(given)


@functools.cache
def _module(name: str | None, device: torch.device) -> ModuleType:
    """The module that runs the op: by default native on CPUs, and Triton elsewhere."""
    if name == "native" and device.type != "cpu":
        raise ValueError(f"backend is 'native', which attends on CPUs only; query is on {device}")
    if name is None:
        fastest = "native" if device.type == "cpu" else "triton"
        name = fastest if backends.why_not(fastest, device) is None else "reference"
    return backends.select(name, device)


def _check_like(
    name: str, x: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> None:
    if x.dtype is not dtype:
        raise TypeError(f"{name} has dtype {x.dtype}; it must be {dtype}")
    if x.shape != shape:
        raise ValueError(f"{name} has shape {list(x.shape)}; it must be {list(shape)}")
    # `is_cpu` takes half the time that comparing devices does
    if not (x.is_cpu if device is CPU else x.device == device):
        raise ValueError(f"{name} is on {x.device}; it must be on {device}, as query")


def _check_kinds(*tensors: Any) -> None:
    """Called after an error: an argument may be no tensor, or one without strides."""
    for name, x in zip(NAMES, tensors, strict=True):
        if not isinstance(x, Tensor) and not (name == "rows" and x is None):
            raise TypeError(f"{name} is a {type(x).__name__}; it must be a tensor")
    memory.check_strided(zip(NAMES, tensors, strict=True))


torch.library.define(
    "crossfade::attend_",
    "(Tensor query, Tensor key, Tensor value, Tensor(a!) keys, Tensor(b!) values, Tensor lengths, "
    "float scale, int window, float softcap, Tensor? rows, str? backend) -> Tensor",
)


@torch.library.impl("crossfade::attend_", "CompositeExplicitAutograd")
def _attend_checked(*arguments):
    *of_struct, backend = arguments
    return _attend(Attention(*of_struct), backend)


@torch.library.register_fake("crossfade::attend_")
def _attend_fake(query, key, value, *_):
    batch, heads, tokens, _ = query.shape
    return query.new_empty(batch, tokens, heads, value.shape[3])
