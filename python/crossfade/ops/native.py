"""The compiled backend: hands tensors to `crossfade._native` as addresses, strides and a stream."""

from __future__ import annotations

import importlib
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import check
from .memory import address, check_apart, written
from .packed import Packed
from .types import BlendSample, Draw, Inputs, ShardDraw

if TYPE_CHECKING:
    from .attention import Attention
    from .logp.tiles import Sums, Tile

try:
    _native: Any = importlib.import_module("crossfade._native")
except ImportError as error:  # a source tree that was never built
    _native, _missing = None, str(error)

if _native is not None:  # std::bad_alloc is what torch raises where there is no memory left
    _native.out_of_memory_is(torch.OutOfMemoryError)

CPU = torch.device("cpu")
SHARD_FACTS = 7  # the numbers of a crossfade::Shard
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
    # The driver compiles the PTX that comes along for GPUs newer than the machine code's.
    built = [int(n) for n in re.findall(r"\d+", _native.cuda_architectures)]
    if built and min(built) > 10 * major + minor:
        return f"it was built for sm_{min(built)} and later; this GPU is sm_{major}{minor}"
    return None


def _matrices(name: str, tensors: Sequence[Tensor]) -> list[tuple[int, int, int]]:
    found = []
    try:
        for t in tensors:
            row_stride, column_stride = t.stride()  # faster than stride(0) and stride(1)
            if column_stride != 1:
                check.columns(name, tensors)
            found.append((address(t, name), row_stride, DTYPE_CODES[t.dtype]))
    except RuntimeError:  # there are no strides
        check.columns(name, tensors)
        raise
    return found


def _weights(name: str, w: tuple[float, ...] | Tensor) -> Any:
    if isinstance(w, Tensor):
        return [address(w, name), w.stride(0) if w.dim() == 2 else 0]
    return w


def _setting(name: str, s: float | Tensor) -> Any:
    return [address(s, name)] if isinstance(s, Tensor) else s


def _stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream


def _blend(i: Inputs) -> tuple:
    """`crossfade::Blend` as the binding reads it."""
    support, mask = i.support, i.mask
    return (
        i.rows,
        i.vocab_size,
        _matrices("logits", i.logits),
        _matrices("values", i.values),
        _weights("weights", i.weights),
        _weights("value_weights", i.value_weights),
        i.power,
        None if support is None else (support.term, support.top_k, support.top_p, support.min_p),
        0 if mask is None else address(mask, "mask", integers=True),
        0 if mask is None or mask.dim() == 1 else mask.stride(0),
        _parts(i) if i.parts else (),
        0 if i.log_z is None else i.log_z.data_ptr(),
    )


def _parts(i: Inputs) -> list[tuple[Any, float, float, float]]:
    """Each `crossfade::Part` as the binding reads it."""
    terms, w = len(i.logits), i.part_weights
    each = [slice(g * terms, (g + 1) * terms) for g in range(len(i.parts))]
    if isinstance(w, Tensor):
        return [
            (_weights("parts", w[..., at]), *part) for at, part in zip(each, i.parts, strict=True)
        ]
    return [(w[at], *part) for at, part in zip(each, i.parts, strict=True)]


def _sampling(d: Draw, out: BlendSample | ShardDraw) -> tuple:
    """`crossfade::Sampling` as the binding reads it."""
    return (
        d.do_sample,
        _setting("temperature", d.temperature),
        _setting("top_p", d.top_p),
        _setting("min_p", d.min_p),
        _setting("top_k", d.top_k),
        _setting("seed", d.seed),
        _setting("stream", d.stream),
        _setting("step", d.step),
        out.tokens.data_ptr(),
        *(_WITHOUT_ROWS if isinstance(out, ShardDraw) else _addresses(*out[1:])),
        d.first_token,
        out.facts.data_ptr() if isinstance(out, ShardDraw) else 0,
    )


_WITHOUT_ROWS = (0, 0, 0, 0)


def _addresses(*tensors: Tensor | None) -> tuple[int, ...]:
    return tuple([0 if x is None else x.data_ptr() for x in tensors])


def blend(inputs: Inputs, raw: bool = False) -> Tensor:
    device = inputs.device
    out = torch.empty(inputs.rows, inputs.vocab_size, dtype=torch.float32, device=device)
    if device.type == "cpu":
        _native.blend_cpu(_blend(inputs), out.data_ptr(), raw, torch.get_num_threads())
    else:
        _native.blend_cuda(_blend(inputs), out.data_ptr(), raw, device.index, _stream(device))
    return out


def blend_sample(
    inputs: Inputs, draw: Draw, return_term_logprobs: bool, return_pushes: bool
) -> BlendSample:
    rows, device, terms = inputs.rows, inputs.device, len(inputs.logits)
    both = terms + len(inputs.values)
    logprobs = torch.empty(rows, dtype=torch.float32, device=device)
    out = BlendSample(
        torch.empty(rows, dtype=torch.int64, device=device),
        logprobs,
        torch.empty_like(logprobs),
        logprobs.new_empty(rows, terms) if return_term_logprobs else None,
        logprobs.new_empty(rows, both) if return_pushes else None,
    )
    _run_sample(inputs, draw, out)
    return out


def draw_shard(inputs: Inputs, draw: Draw) -> ShardDraw:
    rows, device = inputs.rows, inputs.device
    out = ShardDraw(
        torch.empty(rows, dtype=torch.int64, device=device),
        torch.empty(rows, SHARD_FACTS, dtype=torch.float32, device=device),
    )
    _run_sample(inputs, draw, out)
    return out


def _run_sample(inputs: Inputs, draw: Draw, out: BlendSample | ShardDraw) -> None:
    b, s = _blend(inputs), _sampling(draw, out)
    if inputs.device.type == "cpu":
        _native.blend_sample_cpu(b, s, torch.get_num_threads())
    else:
        _native.blend_sample_cuda(b, s, inputs.device.index, _stream(inputs.device))


def linear(
    x: Tensor,
    weight: Tensor | Packed,
    bias: Tensor | None,
    lora: tuple[Tensor, Tensor, Tensor] | None,
    out: int,
    inner: int,
) -> Tensor:
    """`ops.linear` on a CPU, of checked tensors. In weight, a and b the column stride is 1."""
    if isinstance(weight, Packed):
        numbers, scales, minima, _, bits = weight
        packed = (
            bits,
            inner // scales.shape[1],
            address(numbers, "weight.numbers", integers=True),
            address(scales, "weight.scales"),
            0 if minima is None else address(minima, "weight.minima"),
        )
        at = 0, 0
    else:
        packed = None
        at = address(weight, "weight"), weight.stride()[0]
    if x.dim() == 2:
        rows = x.shape[0]
        stride, columns = x.stride()
        if columns != 1 and inner > 1:
            x, stride = x.contiguous(), inner
        y = torch.empty(rows, out, dtype=x.dtype, device=CPU)
    else:
        shape = x.shape[:-1]
        x, stride = x.contiguous(), inner
        rows = x.numel() // inner
        y = torch.empty(*shape, out, dtype=x.dtype, device=CPU)
    deltas = None
    if lora is not None:
        a, b, scale = lora
        scale = scale if scale.stride()[1] == 1 else scale.contiguous()
        deltas = (
            a.shape[0],
            address(a, "lora.a"),
            a.stride()[0],
            address(b, "lora.b"),
            b.stride()[0],
            address(scale, "lora.scale"),
            scale.stride()[0],
            rows // scale.shape[0] if rows else 1,
        )
    _native.linear_cpu(
        rows,
        inner,
        out,
        DTYPE_CODES[x.dtype],
        address(x, "x"),
        stride,
        *at,
        0 if bias is None else address(bias, "bias"),
        y.data_ptr(),
        deltas,
        packed,
        torch.get_num_threads(),
    )
    return y


def attend_(given: Attention) -> Tensor:
    query, key, value, keys, values = given.query, given.key, given.value, given.keys, given.values
    lengths, rows = given.lengths, given.rows
    batch, tokens, heads, _, _, value_size, _, _ = given.sizes
    strides = query.stride(), key.stride(), value.stride(), keys.stride(), values.stride()
    of_query, of_key, of_value, of_keys, of_values = strides
    last = of_query[3], of_key[3], of_value[3], of_keys[3], of_values[3], *lengths.stride()
    if last != (1, 1, 1, 1, 1, 1) or 0 in of_keys or 0 in of_values or rows is not None:
        given.check_strides()
    out = torch.empty(batch, tokens, heads, value_size, dtype=query.dtype, device=CPU)
    keys_at, values_at = address(keys, "keys"), address(values, "values")
    if keys_at == values_at:
        check_apart((("keys", keys_at), ("values", values_at)))
    attention = (
        DTYPE_CODES[query.dtype],
        *given.sizes,
        (address(query, "query"), of_query),
        (address(key, "key"), of_key),
        (address(value, "value"), of_value),
        (keys_at, of_keys),
        (values_at, of_values),
        address(lengths, "lengths", integers=True),
        0 if rows is None else address(rows, "rows", integers=True),
        given.scale,
        given.softcap,
        given.window,
        (out.data_ptr(), (tokens * heads * value_size, value_size, heads * value_size)),
    )
    written(keys, values)
    _native.attention_cpu(attention, torch.get_num_threads())
    return out


def tape() -> Any:
    """An empty tape, to which `decoding.engine.tape` adds instructions."""
    return _native.Tape()


def logp_forward(tile: Tile, sums: Sums, second_scores: Tensor | None) -> None:
    """Adds a tile to the sums of its rows. Leaves what the moments, where kept, are made of."""
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
    """Overwrites a tile with its gradient. A row of `of_logits` [rows, 5] is a `LogpGradient`."""
    _native.logp_backward_cpu(_logp_tile(tile), of_logits.data_ptr(), torch.get_num_threads())


def _logp_tile(tile: Tile) -> tuple:
    """`crossfade::LogpTile` as the binding reads it."""
    return (
        *tile.scores.shape,
        tile.first,
        tile.scores.data_ptr(),
        0 if tile.bias is None else address(tile.bias, "bias"),
        tile.settings.softcap,
        tile.settings.temperature,
        address(tile.targets, "targets", integers=True),
    )


def chunk_select(scores: Tensor, finished: Tensor, width: int) -> Tensor:
    prompts, slots = scores.shape
    parents = torch.empty(prompts, slots, dtype=torch.int64, device=scores.device)
    selection = (
        prompts,
        slots,
        width,
        address(scores, "scores"),
        address(finished, "finished", integers=True),
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
    fork = (
        parents.shape[0],
        address(parents, "parents", integers=True),
        _setting("start", start),
        _setting("end", end),
    )
    caches = [(address(x, "tensors"), x.stride(), *x.shape[1:], x.element_size()) for x in tensors]
    if len({cache[0] for cache in caches}) < len(caches):
        check_apart((f"tensors[{k}]", cache[0]) for k, cache in enumerate(caches))
    written(*tensors)
    if device.type == "cpu":
        _native.fork_cache_cpu(fork, caches, torch.get_num_threads())
    else:
        _native.fork_cache_cuda(fork, caches, device.index, _stream(device))
