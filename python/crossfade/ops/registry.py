"""Blending as torch's dispatcher sees it: one schema an op, of tensors and plain numbers.

Eager calls of plain tensors never come here: a trip through the dispatcher costs more than the rest
of the call. `memory.py` says which calls do.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from . import backends
from .types import BlendSample, Draw, Inputs, Support

_INPUTS = (
    "Tensor[] logits, Tensor weights, Tensor[] values, Tensor value_weights, float power, "
    "float[]? support, Tensor? mask, SymInt vocab_size, str? backend"
)
_DRAW = (
    "Tensor temperature, Tensor top_k, Tensor top_p, Tensor min_p, bool do_sample, Tensor seed, "
    "Tensor stream, Tensor step, bool return_term_logprobs"
)
torch.library.define("crossfade::blend", f"({_INPUTS}) -> Tensor")
torch.library.define(
    "crossfade::blend_sample", f"({_INPUTS}, {_DRAW}) -> (Tensor, Tensor, Tensor, Tensor)"
)


def _inputs(logits, weights, values, value_weights, power, support, mask, vocab_size):
    if support is not None:
        support = Support(int(support[0]), int(support[1]), support[2], support[3])
    return Inputs(logits, weights, values, value_weights, power, support, mask, vocab_size)


@torch.library.impl("crossfade::blend", "CompositeExplicitAutograd")
def _blend(*arguments):
    *given, backend = arguments
    inputs = _inputs(*given)
    return backends.select(backend, inputs.device).blend(inputs)


@torch.library.register_fake("crossfade::blend")
def _blend_fake(logits, weights, values, value_weights, power, support, mask, vocab_size, backend):
    return logits[0].new_empty(logits[0].shape[0], vocab_size, dtype=torch.float32)


@torch.library.impl("crossfade::blend_sample", "CompositeExplicitAutograd")
def _blend_sample(*arguments):
    *given, backend = arguments[:9]
    *settings, seed, stream, step, return_term_logprobs = arguments[9:]
    inputs = _inputs(*given)
    draw = Draw(inputs, *settings, seed=seed, stream=stream, step=step)
    drawn = backends.select(backend, inputs.device).blend_sample(inputs, draw, return_term_logprobs)
    terms = drawn.term_logprobs
    return *drawn[:3], drawn.logprobs.new_empty(inputs.rows, 0) if terms is None else terms


@torch.library.register_fake("crossfade::blend_sample")
def _blend_sample_fake(logits, *args):
    rows, return_term_logprobs = logits[0].shape[0], args[-1]
    return (
        logits[0].new_empty(rows, dtype=torch.int64),
        logits[0].new_empty(rows, dtype=torch.float32),
        logits[0].new_empty(rows, dtype=torch.float32),
        logits[0].new_empty(rows, len(logits) if return_term_logprobs else 0, dtype=torch.float32),
    )


# ---- Nothing here is differentiable, and a backward pass says so -------------------------------

torch.library.define("crossfade::no_derivative", "(Tensor like, str op) -> Tensor")


@torch.library.impl("crossfade::no_derivative", "CompositeExplicitAutograd")
def _no_derivative(like, op):
    raise NotImplementedError(
        f"{op} has no derivative, but a backward pass came to it; detach its inputs or its results"
    )


@torch.library.register_fake("crossfade::no_derivative")
def _no_derivative_fake(like, op):
    return torch.empty_like(like)


def _remember(ctx, inputs, output):
    """Of each input what its gradient would be like: a tensor that holds no numbers."""
    ctx.set_materialize_grads(False)
    ctx.likes = [
        [_empty(t) for t in x] if isinstance(x, (list, tuple)) else _empty(x) for x in inputs
    ]


def _empty(x: Any) -> Any:
    return x.new_empty(()).expand(x.shape) if isinstance(x, Tensor) else None


def _refuse(op: str, ctx: Any, *_: Any) -> tuple[Any, ...]:
    def refused(like: Any) -> Any:
        return None if like is None else torch.ops.crossfade.no_derivative(like, op)

    return tuple([refused(t) for t in x] if isinstance(x, list) else refused(x) for x in ctx.likes)


for _op in ("blend", "blend_sample"):
    torch.library.register_autograd(
        f"crossfade::{_op}", functools.partial(_refuse, _op), setup_context=_remember
    )


# ---- Calls of the registered ops -----------------------------------------------------------------


# Tensors of numbers are made by `new_full`, which gives what `like` is: a fake tensor, or on meta.


def blend(backend: str | None, inputs: Inputs) -> Tensor:
    """`blend` of a backend, as a call of the registered op."""
    return torch.ops.crossfade.blend(*_as_arguments(inputs), backend)


def blend_sample(
    backend: str | None, inputs: Inputs, draw: Draw, return_term_logprobs: bool
) -> BlendSample:
    """`blend_sample` of a backend, as a call of the registered op."""
    numbers = functools.partial(_row_tensor, inputs.logits[0], torch.float32)
    integers = functools.partial(_row_tensor, inputs.logits[0], torch.int64)
    tokens, logprobs, sampled, terms = torch.ops.crossfade.blend_sample(
        *_as_arguments(inputs),
        backend,
        numbers(draw.temperature),
        integers(draw.top_k),
        numbers(draw.top_p),
        numbers(draw.min_p),
        draw.do_sample,
        integers(draw.seed),
        integers(draw.stream),
        integers(draw.step),
        return_term_logprobs,
    )
    return BlendSample(tokens, logprobs, sampled, terms if return_term_logprobs else None)


def _as_arguments(i: Inputs) -> tuple[Any, ...]:
    """What is blended, as the schema has it."""
    s, like = i.support, i.logits[0]
    return (
        list(i.logits),
        _weight_tensor(i.weights, like),
        list(i.values),
        _weight_tensor(i.value_weights, like),
        i.power,
        None if s is None else [float(s.term), float(s.top_k), s.top_p, s.min_p],
        i.mask,
        i.vocab_size,
    )


def _row_tensor(like: Tensor, dtype: torch.dtype, x: Any) -> Tensor:
    if isinstance(x, Tensor):
        return x
    if isinstance(x, int) and x >= 2**63:
        x -= 2**64
    return like.new_full((like.shape[0],), x, dtype=dtype)


def _weight_tensor(w: Any, like: Tensor) -> Tensor:
    if isinstance(w, Tensor):
        return w
    if not w:
        return like.new_full((0,), 0, dtype=torch.float32)
    return torch.stack([like.new_full((), x, dtype=torch.float32) for x in w])
