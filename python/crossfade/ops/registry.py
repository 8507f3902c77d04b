"""Blending as torch's dispatcher sees it: one schema an op, of tensors and plain numbers.

Eager calls of plain tensors never come here: a trip through the dispatcher costs more than the rest
of the call. `memory.py` says which calls do.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import backends, check
from .types import BlendSample, Support

_BLEND = (
    "Tensor[] logits, Tensor weights, Tensor[] values, Tensor value_weights, float power, "
    "float[]? support, Tensor? mask, SymInt vocab_size, str? backend"
)
_DRAWING = (
    *("temperature", "top_k", "top_p", "min_p", "do_sample"),
    *("seed", "stream", "step", "return_term_logprobs"),
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


def _named(inputs: check.Inputs) -> dict[str, Any]:
    return dict(zip(("power", "support", "mask", "vocab_size"), inputs[4:], strict=True))


@torch.library.impl("crossfade::blend", "CompositeExplicitAutograd")
def _blend(logits, weights, values, value_weights, power, support, mask, vocab_size, backend):
    inputs = check.inputs(
        logits, weights, values, value_weights, power, _support_of(support), mask, vocab_size
    )
    run = backends.select(backend, logits[0].device).blend
    return run(*inputs[:4], **_named(inputs))


@torch.library.register_fake("crossfade::blend")
def _blend_fake(logits, weights, values, value_weights, power, support, mask, vocab_size, backend):
    return logits[0].new_empty(logits[0].shape[0], vocab_size, dtype=torch.float32)


@torch.library.impl("crossfade::blend_sample", "CompositeExplicitAutograd")
def _blend_sample(
    logits, weights, values, value_weights, power, support, mask, vocab_size, backend, *drawing
):
    inputs = check.inputs(
        logits, weights, values, value_weights, power, _support_of(support), mask, vocab_size
    )
    rows, device = logits[0].shape[0], logits[0].device
    run = backends.select(backend, device).blend_sample
    checked = {
        name: check.setting(name, x, rows, device) if name in check.RANGES else x
        for name, x in zip(_DRAWING, drawing, strict=True)
    }
    drawn = run(*inputs[:4], **_named(inputs), **checked)
    terms = drawn.term_logprobs
    return *drawn[:3], drawn.logprobs.new_empty(rows, 0) if terms is None else terms


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


def _row_tensor(x: Any, like: Tensor, dtype: torch.dtype) -> Tensor:
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


def _support_numbers(s: Support | None) -> list[float] | None:
    return None if s is None else [float(s.term), float(s.top_k), s.top_p, s.min_p]


def blend(backend: str | None, inputs: check.Inputs) -> Tensor:
    """`blend` of a backend, as a call of the registered op."""
    return torch.ops.crossfade.blend(*_blend_arguments(backend, inputs))


def blend_sample(
    backend: str | None, inputs: check.Inputs, drawing: tuple[Any, ...]
) -> BlendSample:
    """`blend_sample` of a backend, as a call of the registered op."""
    like = inputs[0][0]
    dtypes = dict.fromkeys(("temperature", "top_p", "min_p"), torch.float32)
    dtypes |= dict.fromkeys(("top_k", "seed", "stream", "step"), torch.int64)
    given = [
        _row_tensor(x, like, dtypes[name]) if name in dtypes else x
        for name, x in zip(_DRAWING, drawing, strict=True)
    ]
    blended = _blend_arguments(backend, inputs)
    tokens, logprobs, sampled, terms = torch.ops.crossfade.blend_sample(*blended, *given)
    return BlendSample(tokens, logprobs, sampled, terms if drawing[-1] else None)


def _blend_arguments(backend: str | None, inputs: check.Inputs) -> tuple[Any, ...]:
    """In the order of the schema's."""
    logits, weights, values, value_weights, power, support, mask, vocab = inputs
    return (
        list(logits),
        _weight_tensor(weights, logits[0]),
        list(values),
        _weight_tensor(value_weights, logits[0]),
        power,
        _support_numbers(support),
        mask,
        vocab,
        backend,
    )
