"""The public ops: check the arguments, choose a backend, and stay visible to `torch.compile`."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from . import backends, check, memory, registry
from .types import BlendSample, Draw, Inputs, Support


def blend(
    logits: Sequence[Tensor],
    weights: Sequence[float] | Tensor,
    values: Sequence[Tensor] = (),
    value_weights: Sequence[float] | Tensor | None = None,
    *,
    power: float = 0.0,
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
        score = score + sum(w * q for w, q in zip(value_weights, values))
        score = score.masked_fill(~(mask & inside_support), -inf)
        return score.log_softmax(-1)

    Args:
        logits: K tensors ``[B, V_k]`` (1 <= K <= 16), float32, bfloat16 or float16 (float64 is
            rounded to float32 first), any row stride (0 too: one row for all), columns contiguous.
            Unnormalised log-probs of each term.
        weights: ``[K]`` numbers or tensor, or a tensor ``[B, K]``. A term with weight 0 is left
            out. With ``power != 0`` they must not be negative and must sum to 1.
        values: up to 16 tensors ``[B, V_m]`` like `logits`: values of each next token.
        value_weights: like `weights`, one a value; required with `values`.
        power: r of the power mean; 0 is the geometric blend.
        support: removes tokens by one term's own distribution, before the blend.
        mask: bool ``[V]`` or ``[B, V]``, True where a token is allowed.
        vocab_size: columns to use; those after it are padding. By default, those all tensors have.
        backend: "native", "triton", "reference", or None for the fastest one for the device.

    Returns:
        ``[B, V]`` float32 log-probs in nats, -inf where a token is removed: by `support`, by
        `mask`, or by a -inf in a term or value whose weight is not 0. A bad row is NaN: one with a
        NaN or infinite score left, with no token left, or with a bad weight in a tensor. There is
        no derivative: a backward pass that comes here raises.

    Raises:
        TypeError, ValueError: names the argument, what it was and what it must be.

    Source: the geometric blend is EFT's (Mitchell et al., arXiv:2310.12962) and, over experts,
    MOD's (Shi et al., arXiv:2406.18853), which gives the power means for other divergences.
    """
    inputs = Inputs(logits, weights, values, value_weights, power, support, mask, vocab_size)
    if memory.unobserved() or not _observed("blend", inputs):
        try:
            return backends.select(backend, inputs.device).blend(inputs)
        except memory.NotPlain:
            pass
    return registry.blend(backend, inputs)


def blend_sample(
    logits: Sequence[Tensor],
    weights: Sequence[float] | Tensor,
    values: Sequence[Tensor] = (),
    value_weights: Sequence[float] | Tensor | None = None,
    *,
    power: float = 0.0,
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
    backend: str | None = None,
) -> BlendSample:
    """Blend next-token distributions as `blend` does, and draw one token a row, in one pass.

    The same in torch, with ``noise`` the Gumbel noise of (seed, stream, step, token)::

        log_p = blend(logits, weights, values, value_weights, ...)
        score = MinP(TopP(TopK(log_p / temperature)))  # Hugging Face's processors
        token = (score + noise).argmax(-1)
        logprob, sampled_logprob = log_p[token], score.log_softmax(-1)[token]

    The noise is counter-based (Philox-4x32-10): given equal logits, a token depends on its row's
    seed, stream and step alone, not on the backend, the batch or the row's place in it. Nothing is
    differentiable (a backward pass that comes here raises), nothing waits for the device.

    Args:
        logits, weights, values, value_weights, power, support, mask, vocab_size, backend: as in
            `blend`.
        temperature: 0 or above; a number or ``[B]``, as all settings down to `step` are, on the
            device of the logits where they are tensors. A row of temperature 0 is greedy: its
            result is the one it has with ``do_sample=False``, whatever the other rows do.
        top_k: keep the `top_k` best tokens and ties with the last; 0 keeps all.
        top_p: keep the smallest set of the best tokens with mass `top_p` after top-k, and ties.
        min_p: keep tokens with at least `min_p` times the best one's probability.
        do_sample: False makes every row greedy: it takes the best token (the lowest id of a tie),
            and neither its settings above nor its noise are used.
        seed: within [0, 2^64) (a tensor's int64 bits are taken as they are).
        stream: within [0, 2^64): which sequence of draws of this seed.
        step: within [0, 2^32): which draw of the stream.
        return_term_logprobs: also give each term's own log-prob of the token.

    Returns:
        `BlendSample`. A bad row (as in `blend`, or with a bad setting in a tensor) has token -1 and
        NaN log-probs; the other rows are as they would be without it.

    Raises:
        TypeError, ValueError: names the argument, what it was and what it must be.

    Source: Gumbel-max sampling with the counter layout of the project's documentation; Philox is
    Salmon et al., SC 2011.
    """
    inputs = Inputs(logits, weights, values, value_weights, power, support, mask, vocab_size)
    draw = Draw(
        inputs, temperature, top_k, top_p, min_p, do_sample, seed=seed, stream=stream, step=step
    )
    check.flag("return_term_logprobs", return_term_logprobs)
    if memory.unobserved() or not _observed("blend_sample", inputs):
        run = backends.select(backend, inputs.device).blend_sample
        try:
            return run(inputs, draw, return_term_logprobs)
        except memory.NotPlain:
            pass
    return registry.blend_sample(backend, inputs, draw, return_term_logprobs)


def _observed(op: str, inputs: Inputs) -> bool:
    """Whether a call is recorded, or a backward pass may come to it, which the op then refuses."""
    if memory.recorded():
        return True
    weights = inputs.weights, inputs.value_weights
    tensors = [*inputs.logits, *inputs.values, *(w for w in weights if isinstance(w, Tensor))]
    memory.check_no_tangents(op, "detach its inputs", *tensors)
    return memory.want_gradient(*tensors)
