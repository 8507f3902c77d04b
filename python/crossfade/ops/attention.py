"""`attend_`: append to key and value caches and attend to their live part, in one pass."""

from __future__ import annotations

import functools
from types import ModuleType

import torch
from torch import Tensor

from . import backends, reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


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
    """Append n tokens a row to caches, in place, and attend to each row's cache so far.

    The same in torch, for one row b, with ``r = rows[b]`` and ``at = lengths[b] + arange(n)``::

        keys[r, :, at], values[r, :, at] = key[b], value[b]
        k, v = (x[r].repeat_interleave(Hq // Hkv, dim=0) for x in (keys, values))
        score = scale * query[b] @ k.mT
        score = softcap * (score / softcap).tanh()       # if softcap > 0
        slot = arange(C)
        seen = slot <= at[:, None]
        seen &= slot > at[:, None] - window              # if window > 0
        out[b] = (score.masked_fill(~seen, -inf).softmax(-1) @ v).transpose(0, 1)

    Only what a row sees is read, so caches may hold anything past their rows' lengths; lengths stay
    on the device, so a step's shapes never change. Scores, softmax and sums are float32. A row's
    result depends on neither the other rows, the capacity nor the threads.

    Where a gradient is wanted, `backend` None takes the reference. That is the only one with a
    gradient, and it reads all of the capacity.

    Args:
        query: ``[B, Hq, n, D]`` float32, bfloat16 or float16, as all are; Hq a multiple of Hkv, n
            and D at least 1. Any strides but the last one, which must be 1 (in all).
        key, value: ``[B, Hkv, n, D]`` and ``[B, Hkv, n, Dv]`` of the new tokens.
        keys, values: the caches ``[S, Hkv, C, D]`` and ``[S, Hkv, C, Dv]`` of C slots a row.
        lengths: int64 ``[B]``, contiguous: the tokens that each row's caches hold already. A token
            whose slot would be at or past C is not written, and its result is undefined.
        scale: of the scores.
        window: how many of the last slots a token sees, its own among them; 0 is all.
        softcap: bounds the scores to (-softcap, softcap); 0 leaves them.
        rows: int64 ``[B]``, contiguous: the row of the caches that each row has, no two the same.
            By default row b has row b.
        backend: "native" (CPUs), "triton" (GPUs), "reference", or None for the fastest one.

    Returns:
        ``[B, n, Hq, Dv]``, contiguous, in the dtype of `query`.

    Raises:
        TypeError, ValueError: names the argument, what it was and what it must be.

    Source: the online softmax over splits of the slots is Flash-Decoding's (Dao et al., 2023); the
    soft cap is Gemma 2's (arXiv:2408.00118).
    """
    _check(query, key, value, keys, values, lengths, rows)
    if window < 0:
        raise ValueError(f"window is {window}; it must be 0 (off) or more")
    if not 0 <= softcap < float("inf"):
        raise ValueError(f"softcap is {softcap}; it must be 0 (off) or more, and finite")
    if torch.is_grad_enabled() and (
        query.requires_grad or key.requires_grad or value.requires_grad
    ):
        if backend not in (None, "reference"):
            raise ValueError(
                f"backend is {backend!r}; it must be None or 'reference' where a gradient is wanted"
            )
        run = reference.attend_
    elif torch.compiler.is_compiling():
        return torch.ops.crossfade.attend_(
            query, key, value, keys, values, lengths, scale, window, softcap, rows, backend
        )
    else:
        run = _module(backend, query.device).attend_
    return run(query, key, value, keys, values, lengths, scale, window, softcap, rows)


@functools.cache
def _module(name: str | None, device: torch.device) -> ModuleType:
    """The module that runs the op: natively on CPUs, by Triton elsewhere."""
    if name == "native" and device.type != "cpu":
        raise ValueError(f"backend is 'native', which attends on CPUs only; query is on {device}")
    if name is None:
        fastest = "native" if device.type == "cpu" else "triton"
        name = fastest if backends.why_not(fastest, device) is None else "reference"
    return backends.select(name, device)


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    rows: Tensor | None,
) -> None:
    """Everything but the contents of tensors. A model's step has tens of calls: few statements."""
    dtype, device, shape, cache = query.dtype, query.device, query.shape, keys.shape
    if dtype not in DTYPES:
        raise TypeError(f"query has dtype {dtype}; it must be float32, bfloat16 or float16")
    for name, x in (("query", query), ("keys", keys)):
        if x.dim() != 4:
            raise ValueError(f"{name} has shape {list(x.shape)}; it must have 4 dimensions")
    batch, heads, tokens, size = shape
    slots, kv_heads, capacity, _ = cache
    value_size = value.shape[-1] if value.dim() else 0
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"query has {heads} heads; it must have a multiple of keys' {kv_heads}")
    if tokens == 0 or size == 0:
        raise ValueError(f"query has shape {list(shape)}; n and D must be at least 1")
    if capacity == 0:
        raise ValueError(f"keys has shape {list(cache)}; C must be at least 1")
    if value_size == 0:
        raise ValueError(f"value has shape {list(value.shape)}; Dv must be at least 1")
    if rows is None and slots < batch:
        raise ValueError(f"keys has {slots} rows; it must have at least query's {batch}")
    _check_like("key", key, (batch, kv_heads, tokens, size), dtype, device)
    _check_like("value", value, (batch, kv_heads, tokens, value_size), dtype, device)
    _check_like("keys", keys, (slots, kv_heads, capacity, size), dtype, device)
    _check_like("values", values, (slots, kv_heads, capacity, value_size), dtype, device)
    _check_like("lengths", lengths, (batch,), torch.int64, device)
    if rows is not None:
        _check_like("rows", rows, (batch,), torch.int64, device)
    if query.stride()[3] != 1 and size > 1:
        raise ValueError(f"query has a last stride of {query.stride(3)}; it must be 1")


def _check_like(
    name: str, x: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> None:
    if x.dtype is not dtype:
        raise TypeError(f"{name} has dtype {x.dtype}; it must be {dtype}")
    if x.shape != shape:
        raise ValueError(f"{name} has shape {list(x.shape)}; it must be {list(shape)}")
    if x.device != device:
        raise ValueError(f"{name} is on {x.device}; it must be on {device}, as query")
    if not x.is_contiguous() and x.stride()[-1] != 1 and shape[-1] > 1:
        raise ValueError(f"{name} has a last stride of {x.stride(-1)}; it must be 1")


torch.library.define(
    "crossfade::attend_",
    "(Tensor query, Tensor key, Tensor value, Tensor(a!) keys, Tensor(b!) values, Tensor lengths, "
    "float scale, int window, float softcap, Tensor? rows, str? backend) -> Tensor",
)


@torch.library.impl("crossfade::attend_", "CompositeExplicitAutograd")
def _attend(query, key, value, keys, values, lengths, scale, window, softcap, rows, backend):
    run = _module(backend, query.device).attend_
    return run(query, key, value, keys, values, lengths, scale, window, softcap, rows)


@torch.library.register_fake("crossfade::attend_")
def _attend_fake(query, key, value, *_):
    batch, heads, tokens, _ = query.shape
    return query.new_empty(batch, tokens, heads, value.shape[3])
