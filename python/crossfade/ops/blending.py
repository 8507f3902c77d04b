"""`blend` and `blend_sample`: check the arguments, choose a backend, stay visible to compilers."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import backends, check, memory
from .shards import Partial
from .types import BlendSample, Draw, Inputs, Part, Support


def blend(
    logits: Sequence[Tensor],
    weights: Sequence[float] | Tensor,
    values: Sequence[Tensor] = (),
    value_weights: Sequence[float] | Tensor | None = None,
    *,
    power: float = 0.0,
    parts: Sequence[Part] = (),
    support: Support | None = None,
    mask: Tensor | None = None,
    vocab_size: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """Blend next-token distributions: the normalised log of their power mean, plus values.

    The same in torch, with ``log_p = [z.log_softmax(-1) for z in logits]``::

        if power == 0:   # the geometric blend: weights of any sign and sum
            score = sum(w * lp for w, lp in zip(weights, log_p))
        else:            # 1 is the mixture, -1 the harmonic mean
            score = sum(w * (power * lp).exp() for w, lp in zip(weights, log_p)).log() / power
                         # with power = inf the largest log_p, with power = -inf the smallest
        for part in parts:  # with power 0; with another one see Part
            push = sum(u * lp for u, lp in zip(part.weights, log_p))
            score = score + push.clamp(part.min, part.max)
        score = score + sum(w * q for w, q in zip(value_weights, values))
        score = score.masked_fill(~(mask & inside_support), -inf)
        return score.log_softmax(-1)

    Args:
        logits: K tensors ``[B, V_k]`` (1 <= K <= 16), float32, bfloat16 or float16 (float64 is
            rounded to float32 first). Each holds the unnormalised log-probs of a term. Columns must
            be contiguous; row strides may be any, 0 too (one row for all).
        weights: ``[K]`` numbers or tensor, or a tensor ``[B, K]``. A term with weight 0 is left
            out. With ``power != 0`` they must not be negative and must sum to 1.
        values: up to 16 tensors ``[B, V_m]`` like `logits`: values of each next token.
        value_weights: like `weights`, one for each value; required with `values`.
        power: r of the power mean; 0 is the geometric blend, inf the union, -inf the intersection.
        parts: up to 8 `Part`: terms that are joined, and clamped, before they are added.
        support: removes tokens by one term's own distribution, before the blend.
        mask: bool ``[V]`` or ``[B, V]``, True where a token is allowed.
        vocab_size: how many columns to use; those after them are padding. By default, all columns
            that every tensor has are used.
        backend: "native", "triton", "reference", or None for the fastest one for the device.

    Returns:
        ``[B, V]`` float32 log-probs in nats, -inf where a token is removed: by `support`, by
        `mask`, by a part, or by a -inf in a term or value whose weight is not 0. A bad row is NaN
        throughout: a row in which a token that is left has a NaN or infinite score, in which no
        token is left, or whose weights in a tensor are bad. There is no derivative: a backward pass
        that reaches this op raises.

    Raises:
        TypeError, ValueError: names the argument, what it was and what it must be.

    Source: the geometric blend is EFT's (Mitchell et al., arXiv:2310.12962) and, over experts,
    MOD's (Shi et al., arXiv:2406.18853), which gives the power means for other divergences. Union
    and intersection are those of language-model arithmetic (Dekoninck et al., arXiv:2311.14479).
    """
    inputs = Inputs(logits, weights, values, value_weights, power, support, mask, vocab_size, parts)
    if memory.unobserved() or not _observed("blend", inputs):
        try:
            return backends.select(backend, inputs.device).blend(inputs)
        except memory.NotPlain:
            pass
    return _recorded_blend(backend, inputs)


def blend_sample(
    logits: Sequence[Tensor],
    weights: Sequence[float] | Tensor,
    values: Sequence[Tensor] = (),
    value_weights: Sequence[float] | Tensor | None = None,
    *,
    power: float = 0.0,
    parts: Sequence[Part] = (),
    temperature: float | Tensor = 1.0,
    top_k: int | Tensor = 0,
    top_p: float | Tensor = 1.0,
    min_p: float | Tensor = 0.0,
    do_sample: bool = True,
    seed: int | Tensor,
    stream: int | Tensor = 0,
    step: int | Tensor,
    support: Support | None = None,
    mask: Tensor | None = None,
    vocab_size: int | None = None,
    return_term_logprobs: bool = False,
    return_pushes: bool = False,
    first_token: int = 0,
    return_partial: bool = False,
    backend: str | None = None,
) -> BlendSample:
    """Blend next-token distributions as `blend` does, and draw one token a row, in one pass.

    The same in torch, for one row, with Gumbel noise of its groups of 256 tokens and of the tokens
    of one of them::

        log_p = blend(logits, weights, values, value_weights, ...)
        score = MinP(TopP(TopK(log_p / temperature)))  # Hugging Face's processors
        groups = pad(score, (0, -V % 256), value=-inf).view(-1, 256)
        group = (groups.logsumexp(-1) + noise_of_groups).argmax()
        token = 256 * group + (groups[group] + noise_of_tokens).argmax()
        logprob, sampled_logprob = log_p[token], score.log_softmax(-1)[token]

    That draws from ``score.softmax(-1)`` exactly: the group comes with its probability, and the
    token with the one it has within its group, as the noises are independent. Ties go to the lower
    index.

    The noise is counter-based: four 32-bit words h of Philox-4x32-10, whose key is the seed, are
    those of the counter ``(c, step, low word of stream, high word of stream)``. Token v has word
    v % 4 of ``c = v // 4``, and group j word j % 4 of ``c = 2**31 | j // 4``. Its noise is
    ``-log(-log((h + 0.5) / 2**32))``. So, given equal logits, a token depends on its row's seed,
    stream and step alone, not on the backend, the batch or the row's place in it. (Before there
    were groups each token had noise of its own: the tokens that a seed gave then are others.)

    Nothing is differentiable (a backward pass that reaches this op raises), and nothing waits for
    the device.

    Args:
        logits, weights, values, value_weights, power, parts, support, mask, vocab_size, backend: as
            in `blend`.
        temperature: 0 or above; a number or ``[B]``, as all settings down to `step` are, on the
            device of the logits where they are tensors. A row of temperature 0 is greedy: its
            result is the one it has with ``do_sample=False``, whatever the other rows do.
        top_k: keep the `top_k` best tokens and those that tie with the last of them; 0 keeps all.
        top_p: of what top-k leaves, keep the smallest set of the best tokens with mass `top_p`, and
            those that tie with the last of them.
        min_p: keep tokens with at least `min_p` times the best one's probability.
        do_sample: False makes every row greedy: it takes the best token (the lowest id of a tie),
            and neither its settings above nor its noise are used.
        seed: within [0, 2^64) (a tensor's int64 bits are taken as they are).
        stream: within [0, 2^64): which sequence of draws of this seed.
        step: within [0, 2^32): which draw of the stream.
        return_term_logprobs: also return each term's own log-prob of the token.
        return_pushes: also return what each term and each value did for the token, with power 0 and
            without parts: see `BlendSample`. The inputs are read once more for it.
        first_token: with `return_partial`: the token of the vocabulary that the first column is.
        return_partial: the columns are a part of the vocabulary, as a rank with a shard of a head
            has them. The result is a `Partial`, from which `merge` draws.

    Returns:
        `BlendSample`, or with `return_partial` a `Partial`. A bad row (as in `blend`, or with a bad
        setting in a tensor) has token -1 and NaN log-probs; the other rows are as they would be
        without it.

    Raises:
        TypeError, ValueError: names the argument, what it was and what it must be.
        NotImplementedError: `return_pushes` with another power than 0, with parts, or with
            `return_partial`; `return_partial` with an input that wants a gradient.

    Source: Gumbel-max sampling (Maddison et al., arXiv:1411.0030), here first among groups and then
    within one; Philox is Salmon et al., SC 2011.
    """
    inputs = Inputs(logits, weights, values, value_weights, power, support, mask, vocab_size, parts)
    draw = Draw(
        inputs,
        temperature,
        top_k,
        top_p,
        min_p,
        do_sample,
        seed=seed,
        stream=stream,
        step=step,
        first_token=first_token,
    )
    check.flag("return_term_logprobs", return_term_logprobs)
    if return_partial is not False or first_token != 0:
        check.shard(return_partial, first_token, return_pushes)
        partial = Partial(inputs, draw, return_term_logprobs, backend)
        return partial  # type: ignore[return-value]
    if check.flag("return_pushes", return_pushes):
        check.pushes_exist(inputs.power, inputs.parts)
    if memory.unobserved() or not _observed("blend_sample", inputs):
        run = backends.select(backend, inputs.device).blend_sample
        try:
            return run(inputs, draw, return_term_logprobs, return_pushes)
        except memory.NotPlain:
            pass
    return _recorded_sample(backend, inputs, draw, return_term_logprobs, return_pushes)


def _observed(op: str, inputs: Inputs) -> bool:
    """Whether a call is recorded, or a backward pass may come to it, which the op then refuses."""
    if memory.recorded():
        return True
    weights = inputs.weights, inputs.value_weights, inputs.part_weights
    tensors = [*inputs.logits, *inputs.values, *(w for w in weights if isinstance(w, Tensor))]
    memory.check_no_tangents(op, "detach its inputs", *tensors)
    return memory.want_gradient(*tensors)


# ---- As the dispatcher of torch sees them: one schema an op, of tensors and plain numbers --------
#
# Eager calls of plain tensors never come here: a trip through the dispatcher costs more than the
# rest of the call. `memory.py` says which calls do.

_INPUTS = (
    "Tensor[] logits, Tensor weights, Tensor[] values, Tensor value_weights, float power, "
    "float[]? support, Tensor? mask, SymInt vocab_size, Tensor part_weights, float[] parts, "
    "str? backend"
)
_DRAW = (
    "Tensor temperature, Tensor top_k, Tensor top_p, Tensor min_p, bool do_sample, Tensor seed, "
    "Tensor stream, Tensor step, bool return_term_logprobs, bool return_pushes"
)
torch.library.define("crossfade::blend", f"({_INPUTS}) -> Tensor")
torch.library.define(
    "crossfade::blend_sample", f"({_INPUTS}, {_DRAW}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def _inputs(
    logits, weights, values, value_weights, power, support, mask, vocab_size, part_weights, parts
):
    if support is not None:
        support = Support(int(support[0]), int(support[1]), support[2], support[3])
    each = part_weights.split(len(logits), dim=-1) if parts else ()
    parts = [Part(w, *parts[3 * g : 3 * g + 3]) for g, w in enumerate(each)]
    return Inputs(logits, weights, values, value_weights, power, support, mask, vocab_size, parts)


@torch.library.impl("crossfade::blend", "CompositeExplicitAutograd")
def _blend(*arguments):
    *given, backend = arguments
    inputs = _inputs(*given)
    return backends.select(backend, inputs.device).blend(inputs)


@torch.library.register_fake("crossfade::blend")
def _blend_fake(logits, weights, values, value_weights, power, support, mask, vocab_size, *_):
    return logits[0].new_empty(logits[0].shape[0], vocab_size, dtype=torch.float32)


@torch.library.impl("crossfade::blend_sample", "CompositeExplicitAutograd")
def _blend_sample(*arguments):
    *given, backend = arguments[:11]
    *settings, seed, stream, step, return_term_logprobs, return_pushes = arguments[11:]
    inputs = _inputs(*given)
    draw = Draw(inputs, *settings, seed=seed, stream=stream, step=step)
    run = backends.select(backend, inputs.device).blend_sample
    drawn = run(inputs, draw, return_term_logprobs, return_pushes)
    on_demand = (drawn.term_logprobs, drawn.pushes)
    return *drawn[:3], *(_empty_rows(inputs) if x is None else x for x in on_demand)


def _empty_rows(i: Inputs) -> Tensor:
    return torch.empty(i.rows, 0, dtype=torch.float32, device=i.device)


@torch.library.register_fake("crossfade::blend_sample")
def _blend_sample_fake(logits, weights, values, *args):
    rows, terms = logits[0].shape[0], len(logits)
    *_, return_term_logprobs, return_pushes = args
    return (
        logits[0].new_empty(rows, dtype=torch.int64),
        logits[0].new_empty(rows, dtype=torch.float32),
        logits[0].new_empty(rows, dtype=torch.float32),
        logits[0].new_empty(rows, terms if return_term_logprobs else 0, dtype=torch.float32),
        logits[0].new_empty(rows, terms + len(values) if return_pushes else 0, dtype=torch.float32),
    )


# ---- Nothing here is differentiable: a backward pass raises -------------------------------

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
    """Keeps of each input a tensor without numbers, of the shape that its gradient would have."""
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


# Numbers become tensors by `new_full`, whose results are of the kind of `like`: fake, or on meta.


def _recorded_blend(backend: str | None, inputs: Inputs) -> Tensor:
    """`blend` of a backend, as a call of the registered op."""
    return torch.ops.crossfade.blend(*_as_arguments(inputs), backend)


def _recorded_sample(
    backend: str | None,
    inputs: Inputs,
    draw: Draw,
    return_term_logprobs: bool,
    return_pushes: bool,
) -> BlendSample:
    """`blend_sample` of a backend, as a call of the registered op."""
    numbers = functools.partial(_row_tensor, inputs.logits[0], torch.float32)
    integers = functools.partial(_row_tensor, inputs.logits[0], torch.int64)
    tokens, logprobs, sampled, terms, pushes = torch.ops.crossfade.blend_sample(
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
        return_pushes,
    )
    return BlendSample(
        tokens,
        logprobs,
        sampled,
        terms if return_term_logprobs else None,
        pushes if return_pushes else None,
    )


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
        _weight_tensor(i.part_weights, like),
        [x for part in i.parts for x in part],
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
