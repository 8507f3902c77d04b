"""The ops as `torch.compile` sees them: one schema each, of tensors and plain numbers.

Eager calls never come here: a trip through the dispatcher costs more than the rest of the call.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import backends
from .types import BlendSample, Support

_BLEND = (
    "Tensor[] logits, Tensor weights, Tensor[] values, Tensor value_weights, float power, "
    "float[]? support, Tensor? mask, SymInt vocab_size, str? backend"
)
torch.library.define("crossfade::blend", f"({_BLEND}) -> Tensor")
torch.library.define(
    "crossfade::blend_sample",
    f"({_BLEND}, Tensor temperature, Tensor top_k, Tensor top_p, Tensor min_p, bool do_sample, "
    "Tensor seed, Tensor stream, Tensor step, bool return_term_logprobs) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
)


def _support_of(numbers: Sequence[float] | None) -> Support | None:
    if numbers is None:
        return None
    return Support(int(numbers[0]), int(numbers[1]), numbers[2], numbers[3])


@torch.library.impl("crossfade::blend", "CompositeExplicitAutograd")
def _blend(logits, weights, values, value_weights, power, support, mask, vocab_size, backend):
    run = backends.select(backend, logits[0].device).blend
    return run(
        logits,
        weights,
        values,
        value_weights,
        power=power,
        support=_support_of(support),
        mask=mask,
        vocab_size=vocab_size,
    )


@torch.library.register_fake("crossfade::blend")
def _blend_fake(logits, weights, values, value_weights, power, support, mask, vocab_size, backend):
    return logits[0].new_empty(logits[0].shape[0], vocab_size, dtype=torch.float32)


@torch.library.impl("crossfade::blend_sample", "CompositeExplicitAutograd")
def _blend_sample(
    logits,
    weights,
    values,
    value_weights,
    power,
    support,
    mask,
    vocab_size,
    backend,
    temperature,
    top_k,
    top_p,
    min_p,
    do_sample,
    seed,
    stream,
    step,
    return_term_logprobs,
):
    run = backends.select(backend, logits[0].device).blend_sample
    drawn = run(
        logits,
        weights,
        values,
        value_weights,
        power=power,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        do_sample=do_sample,
        seed=seed,
        stream=stream,
        step=step,
        support=_support_of(support),
        mask=mask,
        vocab_size=vocab_size,
        return_term_logprobs=return_term_logprobs,
    )
    terms = drawn.term_logprobs
    return *drawn[:3], drawn.logprobs.new_empty(len(drawn.tokens), 0) if terms is None else terms


@torch.library.register_fake("crossfade::blend_sample")
def _blend_sample_fake(logits, *args):
    rows, return_term_logprobs = logits[0].shape[0], args[-1]
    return (
        logits[0].new_empty(rows, dtype=torch.int64),
        logits[0].new_empty(rows, dtype=torch.float32),
        logits[0].new_empty(rows, dtype=torch.float32),
        logits[0].new_empty(rows, len(logits) if return_term_logprobs else 0, dtype=torch.float32),
    )


def _row_tensor(x: Any, rows: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    if isinstance(x, Tensor):
        return x
    if isinstance(x, int) and x >= 2**63:
        x -= 2**64
    return torch.full((rows,), x, dtype=dtype, device=device)


def _weight_tensor(w: Any, device: torch.device) -> Tensor:
    if isinstance(w, Tensor):
        return w.detach()
    return torch.tensor(w, dtype=torch.float32, device=device)


def _detached(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Gradients stop here: eager calls hand over addresses, which carry none either."""
    return [t.detach() for t in tensors]


def _support_numbers(s: Support | None) -> list[float] | None:
    return None if s is None else [float(s.term), float(s.top_k), s.top_p, s.min_p]


def blend(backend: str | None) -> Callable[..., Tensor]:
    """`blend` of a backend, as a call of the registered op."""
    return functools.partial(_call_blend, backend)


def _call_blend(
    backend, logits, weights, values, value_weights, *, power, support, mask, vocab_size
):
    device = logits[0].device
    return torch.ops.crossfade.blend(
        _detached(logits),
        _weight_tensor(weights, device),
        _detached(values),
        _weight_tensor(value_weights, device),
        power,
        _support_numbers(support),
        mask,
        vocab_size,
        backend,
    )


def blend_sample(backend: str | None) -> Callable[..., BlendSample]:
    """`blend_sample` of a backend, as a call of the registered op."""
    return functools.partial(_call_blend_sample, backend)


def _call_blend_sample(
    backend,
    logits,
    weights,
    values,
    value_weights,
    *,
    power,
    temperature,
    top_k,
    top_p,
    min_p,
    do_sample,
    seed,
    stream,
    step,
    support,
    mask,
    vocab_size,
    return_term_logprobs,
):
    rows, device = logits[0].shape[0], logits[0].device
    number = functools.partial(_row_tensor, rows=rows, device=device, dtype=torch.float32)
    integer = functools.partial(_row_tensor, rows=rows, device=device, dtype=torch.int64)
    tokens, logprobs, sampled, terms = torch.ops.crossfade.blend_sample(
        _detached(logits),
        _weight_tensor(weights, device),
        _detached(values),
        _weight_tensor(value_weights, device),
        power,
        _support_numbers(support),
        mask,
        vocab_size,
        backend,
        number(temperature),
        integer(top_k),
        number(top_p),
        number(min_p),
        do_sample,
        integer(seed),
        integer(stream),
        integer(step),
        return_term_logprobs,
    )
    return BlendSample(tokens, logprobs, sampled, terms if return_term_logprobs else None)
