"""The compiled backend: hands tensors to `crossfade._native` as addresses, strides and a stream."""

from __future__ import annotations

import importlib
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .types import BlendSample, Support

if TYPE_CHECKING:
    from .logp_tiles import Sums, Tile

try:
    _native: Any = importlib.import_module("crossfade._native")
except ImportError as error:  # a source tree that was never built
    _native, _missing = None, str(error)

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # crossfade::DType


def why_not(device: torch.device) -> str | None:
    if _native is None:
        return f"the native module does not import ({_missing})"
    if device.type == "cpu":
        return None
    if device.type != "cuda":
        return f"there are no native kernels for {device.type}"
    if _native.cuda_architectures is None:
        return "it was built without CUDA (no nvcc was found)"
    major, minor = torch.cuda.get_device_capability(device)
    # machine code of older architectures comes with PTX, which the driver compiles for newer ones
    built = [int(n) for n in re.findall(r"\d+", _native.cuda_architectures)]
    if built and min(built) > 10 * major + minor:
        return f"it was built for sm_{min(built)} and later; this GPU is sm_{major}{minor}"
    return None


def _matrices(tensors: Sequence[Tensor]) -> list[tuple[int, int, int]]:
    # stride()[0] takes half the time of stride(0)
    return [(t.data_ptr(), t.stride()[0], DTYPE_CODES[t.dtype]) for t in tensors]


def _weights(w: tuple[float, ...] | Tensor) -> Any:
    if isinstance(w, Tensor):
        return [w.data_ptr(), w.stride(0) if w.dim() == 2 else 0]
    return w


def _setting(s: float | Tensor) -> Any:
    return [s.data_ptr()] if isinstance(s, Tensor) else s


def _stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream


def _blend(
    logits: Sequence[Tensor],
    weights: tuple[float, ...] | Tensor,
    values: Sequence[Tensor],
    value_weights: tuple[float, ...] | Tensor,
    power: float,
    support: Support | None,
    mask: Tensor | None,
    vocab_size: int,
) -> tuple:
    """`crossfade::Blend` as the binding reads it."""
    return (
        logits[0].shape[0],
        vocab_size,
        _matrices(logits),
        _matrices(values),
        _weights(weights),
        _weights(value_weights),
        power,
        None if support is None else (support.term, support.top_k, support.top_p, support.min_p),
        0 if mask is None else mask.data_ptr(),
        0 if mask is None or mask.dim() == 1 else mask.stride(0),
    )


def blend(
    logits: Sequence[Tensor],
    weights: tuple[float, ...] | Tensor,
    values: Sequence[Tensor] = (),
    value_weights: tuple[float, ...] | Tensor = (),
    *,
    power: float,
    support: Support | None,
    mask: Tensor | None,
    vocab_size: int,
) -> Tensor:
    device = logits[0].device
    out = torch.empty(logits[0].shape[0], vocab_size, dtype=torch.float32, device=device)
    b = _blend(logits, weights, values, value_weights, power, support, mask, vocab_size)
    if device.type == "cpu":
        _native.blend_cpu(b, out.data_ptr(), torch.get_num_threads())
    else:
        _native.blend_cuda(b, out.data_ptr(), device.index, _stream(device))
    return out


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora: tuple[Tensor, Tensor, Tensor] | None
) -> Tensor:
    """`ops.linear` on a CPU: checked tensors, unit column strides in weight, a and b."""
    out, inner = weight.shape
    if x.dim() == 2:
        rows = x.shape[0]
        stride, columns = x.stride()
        if columns != 1 and inner > 1:
            x, stride = x.contiguous(), inner
        y = torch.empty(rows, out, dtype=x.dtype)
    else:
        shape = x.shape[:-1]
        x, stride = x.contiguous(), inner
        rows = x.numel() // inner
        y = torch.empty(*shape, out, dtype=x.dtype)
    deltas = None
    if lora is not None:
        a, b, scale = lora
        scale = scale if scale.stride()[1] == 1 else scale.contiguous()
        deltas = (
            a.shape[0],
            a.data_ptr(),
            a.stride()[0],
            b.data_ptr(),
            b.stride()[0],
            scale.data_ptr(),
            scale.stride()[0],
            rows // scale.shape[0] if rows else 1,
        )
    _native.linear_cpu(
        rows,
        inner,
        out,
        DTYPE_CODES[x.dtype],
        x.data_ptr(),
        stride,
        weight.data_ptr(),
        weight.stride()[0],
        0 if bias is None else bias.data_ptr(),
        y.data_ptr(),
        deltas,
        torch.get_num_threads(),
    )
    return y


def blend_sample(
    logits: Sequence[Tensor],
    weights: tuple[float, ...] | Tensor,
    values: Sequence[Tensor] = (),
    value_weights: tuple[float, ...] | Tensor = (),
    *,
    power: float,
    temperature: float | Tensor,
    top_k: int | Tensor,
    top_p: float | Tensor,
    min_p: float | Tensor,
    do_sample: bool,
    seed: int | Tensor,
    stream: int | Tensor,
    step: int | Tensor,
    support: Support | None,
    mask: Tensor | None,
    vocab_size: int,
    return_term_logprobs: bool,
) -> BlendSample:
    rows, device = logits[0].shape[0], logits[0].device
    tokens = torch.empty(rows, dtype=torch.int64, device=device)
    logprobs = torch.empty(rows, dtype=torch.float32, device=device)
    sampled = torch.empty_like(logprobs)
    terms = (
        torch.empty(rows, len(logits), dtype=torch.float32, device=device)
        if return_term_logprobs
        else None
    )
    b = _blend(logits, weights, values, value_weights, power, support, mask, vocab_size)
    s = (
        do_sample,
        _setting(temperature),
        _setting(top_p),
        _setting(min_p),
        _setting(top_k),
        _setting(seed),
        _setting(stream),
        _setting(step),
        tokens.data_ptr(),
        logprobs.data_ptr(),
        sampled.data_ptr(),
        0 if terms is None else terms.data_ptr(),
    )
    if device.type == "cpu":
        _native.blend_sample_cpu(b, s, torch.get_num_threads())
    else:
        _native.blend_sample_cuda(b, s, device.index, _stream(device))
    return BlendSample(tokens, logprobs, sampled, terms)


def attend_(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    scale: float,
    window: int,
    softcap: float,
    rows: Tensor | None,
) -> Tensor:
    batch, heads, tokens, size = query.shape
    cache_rows, kv_heads, capacity, value_size = values.shape
    out = query.new_empty(batch, tokens, heads, value_size)
    attention = (
        DTYPE_CODES[query.dtype],
        batch,
        tokens,
        heads,
        kv_heads,
        size,
        value_size,
        cache_rows,
        capacity,
        (query.data_ptr(), query.stride()),
        (key.data_ptr(), key.stride()),
        (value.data_ptr(), value.stride()),
        (keys.data_ptr(), keys.stride()),
        (values.data_ptr(), values.stride()),
        lengths.data_ptr(),
        0 if rows is None else rows.data_ptr(),
        scale,
        softcap,
        window,
        out.data_ptr(),
    )
    _native.attention_cpu(attention, torch.get_num_threads())
    return out


def logp_forward(tile: Tile, sums: Sums, second_scores: Tensor | None) -> None:
    """Adds a tile to the sums of its rows; leaves the moments of its logits, where wanted."""
    moments = (
        sum(x is not None for x in (sums.first, sums.second)),
        0 if sums.first is None else sums.first.shape[1],
        0 if sums.first is None else sums.first.data_ptr(),
        0 if sums.second is None else sums.second.data_ptr(),
        0 if second_scores is None else second_scores.data_ptr(),
    )
    threads = torch.get_num_threads()
    _native.logp_forward_cpu(_logp_tile(tile), sums.sums.data_ptr(), moments, threads)


def logp_backward(tile: Tile, of_logits: Tensor) -> None:
    """Turns a tile into its gradient. `of_logits` [rows, 5]: `crossfade::LogpGradient`."""
    _native.logp_backward_cpu(_logp_tile(tile), of_logits.data_ptr(), torch.get_num_threads())


def _logp_tile(tile: Tile) -> tuple:
    """`crossfade::LogpTile` as the binding reads it."""
    return (
        *tile.scores.shape,
        tile.first,
        tile.scores.data_ptr(),
        0 if tile.bias is None else tile.bias.data_ptr(),
        tile.settings.softcap,
        tile.settings.temperature,
        tile.targets.data_ptr(),
    )


def chunk_select(scores: Tensor, finished: Tensor, width: int) -> Tensor:
    prompts, slots = scores.shape
    parents = torch.empty(prompts, slots, dtype=torch.int64, device=scores.device)
    selection = (
        prompts,
        slots,
        width,
        scores.data_ptr(),
        finished.data_ptr(),
        parents.data_ptr(),
    )
    if scores.is_cpu:
        _native.chunk_select_cpu(selection)
    else:
        _native.chunk_select_cuda(selection, scores.device.index, _stream(scores.device))
    return parents


def fork_cache_(
    tensors: Sequence[Tensor], parents: Tensor, start: int | Tensor, end: int | Tensor
) -> None:
    device = parents.device
    fork = parents.shape[0], parents.data_ptr(), _setting(start), _setting(end)
    caches = [(x.data_ptr(), x.stride(), *x.shape[1:], x.element_size()) for x in tensors]
    if device.type == "cpu":
        _native.fork_cache_cpu(fork, caches, torch.get_num_threads())
    else:
        _native.fork_cache_cuda(fork, caches, device.index, _stream(device))
