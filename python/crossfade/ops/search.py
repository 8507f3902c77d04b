"""What a search does between two chunks: it chooses the rows to keep, and forks their caches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import backends, check, memory

MOST_ROWS_ON_GPUS = 2048  # as in csrc/cuda/search.cu
TO_THE_END = 2**63 - 1  # a position past all caches


def chunk_select(
    scores: Tensor, finished: Tensor, width: int, *, backend: str | None = None
) -> Tensor:
    """Keep each prompt's best `width` slots and fork them: the parent of every slot's next chunk.

    The same in torch, for W = `width` and N samples of each row that is kept::

        kept = (-scores).sort(dim=1, stable=True).indices[:, :W, None]    # NaN last
        idle = finished.gather(1, kept[..., 0])[..., None] & (arange(N) > 0)
        parents = where(idle, -1, kept).flatten(1)

    The row of rank j has slots j N to j N + N - 1. If it is unfinished it fills all of them, else
    only the first. Nothing waits for the device.

    Args:
        scores: ``[P, W N]`` of P prompts, float32, bfloat16, float16 or float64 (which the
        reference
            alone takes). Higher is better. Of a tie the lower slot is kept; NaN comes after -inf.
        finished: ``[P, W N]`` bool.
        width: W, how many slots to keep; it divides the number of columns.
        backend: "native", "triton", "reference", or None for the fastest one for the device.

    Returns:
        ``[P, W N]`` int64: slots within the prompt, or -1 where nothing is to be decoded.

    Raises:
        TypeError, ValueError: names the argument, what it was and what it must be.

    Source: chunk-level beam search (Zhou et al., arXiv:2405.19262). Finished rows are candidates
    that have no samples.
    """
    try:
        _check_slots(scores, finished, width)
    except (AttributeError, ValueError, RuntimeError):
        memory.check_strided((("scores", scores), ("finished", finished)))
        raise
    if memory.unobserved() or not memory.recorded():
        try:
            return _chunk_select(scores, finished, width, backend)
        except memory.NotPlain:
            pass
    return torch.ops.crossfade.chunk_select(scores.detach(), finished, width, backend)


def fork_cache_(
    tensors: Sequence[Tensor],
    parents: Tensor,
    start: int | Tensor = 0,
    end: int | Tensor | None = None,
    *,
    backend: str | None = None,
) -> None:
    """Copy rows of caches to other rows, in place: row i becomes what row ``parents[i]`` was.

    The same in torch, if all rows have the same range and every parent is a row::

        for x in tensors:
            x[:, :, start:end] = x[parents, :, start:end]

    Parents may be any permutation, repetition or mixture of the two. Only positions from `start` up
    to `end` are read and written, and only in rows that change and in their parents; all else keeps
    its bits. Nothing waits for the device.

    Args:
        tensors: caches ``[R, heads, length, dim]``, float32, bfloat16, float16 or float64, each of
            its own shape and dtype. The last stride must be 1. No two numbers of a tensor, nor two
            of the tensors, may share memory. Where gradients are recorded, none of the tensors may
            require one.
        parents: int64 ``[R]``: rows of the caches. A row whose parent is -1 or itself stays.
        start: the first position that is copied: a number, or int64 ``[R]``, one for each row.
        end: the position after the last that is copied, likewise; None is the end of each cache. It
            may lie past a cache's length, and a range may be empty.
        backend: "native", "triton", "reference", or None for the fastest one for the device.

    Raises:
        TypeError, ValueError: names the argument, what it was and what it must be. Parents outside
            [-1, R) raise from the native kernel on a CPU; elsewhere their rows stay.

    Source: a beam's fork as Hugging Face's caches do it (`reorder_cache`), but in place and from
    the first position that differs.
    """
    _check_caches(tensors, parents)
    start = _position("start", start, parents)
    end = TO_THE_END if end is None else _position("end", end, parents)
    if torch.is_grad_enabled():
        _check_no_gradient(tensors)
    if memory.unobserved() or not memory.recorded():
        try:
            return _fork_cache_(tensors, parents, start, end, backend)
        except memory.NotPlain:
            memory.check_not_negative((f"tensors[{k}]", x) for k, x in enumerate(tensors))
    if torch.jit.is_tracing():
        raise NotImplementedError(
            "torch.jit.trace leaves out what has no result, as fork_cache_; torch.export records it"
        )
    rows = parents.new_ones(parents.shape)
    torch.ops.crossfade.fork_cache_(tensors, parents, rows * start, rows * end, backend)


def _chunk_select(scores: Tensor, finished: Tensor, width: int, backend: str | None) -> Tensor:
    if scores.dtype is not torch.float32:
        backend = backends.of_dtype(backend, scores.dtype, "scores")
        if backend != "reference":
            scores = scores.float()  # which is exact for 16 bits
    run = backends.select(backend, scores.device).chunk_select
    return run(scores.contiguous(), finished.contiguous(), width)


def _checked_select(scores: Tensor, finished: Tensor, width: int, backend: str | None) -> Tensor:
    _check_slots(scores, finished, width)
    return _chunk_select(scores, finished, width, backend)


def _checked_fork_(
    tensors: Sequence[Tensor], parents: Tensor, start: Tensor, end: Tensor, backend: str | None
) -> None:
    _check_caches(tensors, parents)
    begin, stop = _position("start", start, parents), _position("end", end, parents)
    _fork_cache_(tensors, parents, begin, stop, backend)


def _fork_cache_(
    tensors: Sequence[Tensor],
    parents: Tensor,
    start: int | Tensor,
    end: int | Tensor,
    backend: str | None,
) -> None:
    run = backends.select(backend, parents.device).fork_cache_
    if len(tensors) > 0 and len(parents) > 0:
        run(tensors, parents, start, end)


def _check_slots(scores: Any, finished: Any, width: Any) -> None:
    for name, x in (("scores", scores), ("finished", finished)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} is a {type(x).__name__}; it must be a tensor")
        if x.layout is not torch.strided:
            memory.check_strided([(name, x)])
    if scores.dtype not in check.MATRIX_DTYPES:
        raise TypeError(f"scores has dtype {scores.dtype}; it must be {check.DTYPE_NAMES}")
    if finished.dtype != torch.bool:
        raise TypeError(f"finished has dtype {finished.dtype}; it must be torch.bool")
    if isinstance(width, bool) or not isinstance(width, int):
        raise TypeError(f"width is {width!r}; it must be an int")
    if scores.dim() != 2 or scores.shape[1] == 0:
        raise ValueError(
            f"scores has shape {list(scores.shape)}; it must be [P, W N] with at least one column"
        )
    if width < 1 or scores.shape[1] % width:
        raise ValueError(
            f"width is {width}; it must be 1 or more and divide scores' {scores.shape[1]} columns"
        )
    if finished.shape != scores.shape:
        raise ValueError(
            f"finished has shape {list(finished.shape)}; it must be {list(scores.shape)}, as scores"
        )
    if finished.device != scores.device:
        raise ValueError(f"finished is on {finished.device}; it must be on {scores.device}")


def _check_no_gradient(tensors: Sequence[Tensor]) -> None:
    for k, x in enumerate(tensors):
        if x.requires_grad:
            raise ValueError(
                f"tensors[{k}] requires a gradient; it is written into, without a derivative: "
                "it must not (under torch.no_grad() it may)"
            )


def _check_caches(tensors: Any, parents: Any) -> None:
    try:
        _check_each_cache(tensors, parents)
    except (AttributeError, ValueError, RuntimeError):
        if isinstance(tensors, (list, tuple)):
            memory.check_strided((f"tensors[{k}]", x) for k, x in enumerate(tensors))
        raise


def _check_each_cache(tensors: Any, parents: Any) -> None:
    """Checks everything but the contents of tensors, quickly: a model has a hundred caches."""
    if not isinstance(parents, Tensor):
        raise TypeError(f"parents is a {type(parents).__name__}; it must be a tensor")
    if parents.dtype != torch.int64:
        raise TypeError(f"parents has dtype {parents.dtype}; it must be torch.int64")
    if parents.dim() != 1 or not parents.is_contiguous():
        raise ValueError(
            f"parents has shape {list(parents.shape)} and strides {list(parents.stride())}; it "
            "must be [R], contiguous"
        )
    rows, device = parents.shape[0], parents.device
    if device.type != "cpu" and rows > MOST_ROWS_ON_GPUS:
        raise ValueError(
            f"parents has {rows} rows; on {device} it must have at most {MOST_ROWS_ON_GPUS}"
        )
    if not isinstance(tensors, (list, tuple)):
        raise TypeError(
            f"tensors is a {type(tensors).__name__}; it must be a list of [R, heads, length, dim] "
            "tensors"
        )
    on_cpu = parents.is_cpu  # takes half the time that comparing devices does
    for k, x in enumerate(tensors):
        if type(x) is not Tensor and not isinstance(x, Tensor):
            raise TypeError(f"tensors[{k}] is a {type(x).__name__}; it must be a tensor")
        if x.dtype not in check.MATRIX_DTYPES:
            raise TypeError(f"tensors[{k}] has dtype {x.dtype}; it must be {check.DTYPE_NAMES}")
        shape = x.shape
        if len(shape) != 4 or shape[0] != rows:
            raise ValueError(
                f"tensors[{k}] has shape {list(shape)}; it must be [{rows}, heads, length, dim], "
                "with as many rows as parents"
            )
        if not (x.is_cpu if on_cpu else x.device == device):
            raise ValueError(f"tensors[{k}] is on {x.device}; it must be on {device}, as parents")
        strides = x.stride()
        if strides[3] != 1 and shape[3] > 1:
            raise ValueError(f"tensors[{k}] has a last stride of {strides[3]}; it must be 1")
        if 0 in strides:
            memory.check_places(f"tensors[{k}]", x)


def _position(name: str, x: Any, parents: Tensor) -> int | Tensor:
    if isinstance(x, Tensor):
        if x.dtype != torch.int64:
            raise TypeError(f"{name} has dtype {x.dtype}; it must be torch.int64")
        if x.shape != parents.shape:
            raise ValueError(
                f"{name} has shape {list(x.shape)}; it must be {list(parents.shape)}, as parents"
            )
        if x.device != parents.device:
            raise ValueError(f"{name} is on {x.device}; it must be on {parents.device}, as parents")
        return x.contiguous()
    if isinstance(x, bool) or not isinstance(x, int):
        raise TypeError(f"{name} is {x!r}; it must be an int or a tensor")
    if not 0 <= x <= TO_THE_END:
        raise ValueError(f"{name} is {x}; it must be within [0, 2^63)")
    return x


# The ops as torch's dispatcher sees them. Eager calls of plain tensors go past it: see memory.py.
torch.library.define(
    "crossfade::chunk_select", "(Tensor scores, Tensor finished, int width, str? backend) -> Tensor"
)
torch.library.define(
    "crossfade::fork_cache_",
    "(Tensor(a!)[] tensors, Tensor parents, Tensor start, Tensor end, str? backend) -> ()",
)
torch.library.impl("crossfade::chunk_select", "CompositeExplicitAutograd", _checked_select)
torch.library.impl("crossfade::fork_cache_", "CompositeExplicitAutograd", _checked_fork_)


@torch.library.register_fake("crossfade::chunk_select")
def _chunk_select_fake(scores, finished, width, backend):
    return torch.empty_like(scores, dtype=torch.int64, memory_format=torch.contiguous_format)


@torch.library.register_fake("crossfade::fork_cache_")
def _fork_cache_fake(tensors, parents, start, end, backend):
    return None
