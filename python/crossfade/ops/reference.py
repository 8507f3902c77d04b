"""The truth for every kernel, in short torch: sums are float64, and what is copied keeps its bits.

Arguments are those that the public ops have checked, and hand to every backend.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import check
from .check import WEIGHT_SUM_TOLERANCE
from .noise import NEG_INF, Noise, gumbel_max
from .types import BlendSample, Draw, Inputs, ShardDraw

if TYPE_CHECKING:
    from .attention import Attention


def per_row(setting: float | Tensor, rows: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """A setting as `[B]`, whether it is one number or has one for each row."""
    return torch.as_tensor(setting, dtype=dtype, device=device).expand(rows)


def weights_of(weights: Sequence[float] | Tensor, rows: int, device: torch.device) -> Tensor:
    """Weights `[K]` or `[B, K]` as float64 `[B, K]`, rounded to float32 as kernels do."""
    w = torch.as_tensor(weights, dtype=torch.float32, device=device).double()
    return w.expand(rows, w.shape[-1])


def keep(scores: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """The tokens `[B, V]` that top-k, top-p and min-p leave, in this order; ties are kept.

    A token stays if fewer than `top_k` tokens score higher, if the tokens that score higher hold
    less than `top_p` of the mass that top-k left, and if it has `min_p` of the top probability.
    """
    vocab = scores.shape[1]
    ordered, _ = scores.sort(dim=-1, descending=True)
    k = torch.where(top_k > 0, top_k, vocab).clamp(max=vocab)
    kth = ordered.gather(1, k[:, None] - 1)
    mass = (ordered.masked_fill(ordered < kth, NEG_INF)).softmax(dim=-1)
    before = mass.cumsum(dim=-1) - mass  # mass of what sorts higher
    inside = (before < top_p[:, None]) | (top_p >= 1.0)[:, None]
    inside[:, 0] = True  # the best token stays, whatever top_p is
    pth = ordered.gather(1, inside.long().cumprod(dim=-1).sum(dim=-1, keepdim=True) - 1)
    mth = ordered[:, :1] + min_p.log()[:, None]
    return (scores >= kth) & (scores >= pth) & (scores >= mth)


def blend_scores(i: Inputs) -> tuple[Tensor, Tensor]:
    """Unnormalised log-probs `[B, V]` in float64, -inf where removed, and which rows are bad.

    A row in which no token is left is not among these: a shard of a vocabulary may have none.
    """
    rows, device, vocab, power = i.rows, i.device, i.vocab_size, i.power
    check.columns("logits", i.logits)  # as the kernels do, though torch could
    check.columns("values", i.values)
    z = [t[:, :vocab].double() for t in i.logits]
    w = weights_of(i.weights, rows, device)
    bad = ~w.isfinite().all(dim=1)
    removed = torch.zeros(rows, vocab, dtype=torch.bool, device=device)
    score = torch.zeros(rows, vocab, dtype=torch.float64, device=device)

    if power == 0.0:  # sum_k w_k z_k: normalisers cancel
        for k, z_k in enumerate(z):
            on = w[:, k : k + 1] != 0
            removed |= on & (z_k == NEG_INF)
            score += torch.where(on, w[:, k : k + 1] * z_k, 0.0)
    else:  # log (sum_k w_k p_k^r)^(1/r)
        bad |= (w < 0).any(dim=1) | ((w.sum(dim=1) - 1).abs() > WEIGHT_SUM_TOLERANCE)
        log_p = term_log_probs(i, z)
        on = (w > 0)[:, None, :]
        bad |= (on & log_p.isnan()).any(dim=-1).any(dim=-1)
        score = power_mean(log_p, torch.where(w > 0, w / w.sum(dim=1, keepdim=True), 0), power)
        removed |= score == NEG_INF

    if i.parts:
        log_p = term_log_probs(i, z)
        each = weights_of(i.part_weights, rows, device).unflatten(1, (len(i.parts), len(z)))
        for u, (of_part, least, most) in zip(each.unbind(1), i.parts, strict=True):
            bad |= ~u.isfinite().all(dim=1)
            bad |= ((u != 0)[:, None, :] & log_p.isnan()).any(dim=-1).any(dim=-1)
            push = part_push(log_p, u, of_part).clamp(least, most)
            removed |= ~push.isfinite()
            score = score + push.where(push.isfinite(), 0.0)

    if i.values:
        v = weights_of(i.value_weights, rows, device)
        bad |= ~v.isfinite().all(dim=1)
        for m, q in enumerate(i.values):
            q_m, on = q[:, :vocab].double(), v[:, m : m + 1] != 0
            removed |= on & (q_m == NEG_INF)
            score = score + torch.where(on, v[:, m : m + 1] * q_m, 0.0)

    if i.support is not None:
        cut = i.support
        top_k = per_row(cut.top_k, rows, device, torch.int64)
        top_p, min_p = (
            per_row(s, rows, device, torch.float32).double() for s in (cut.top_p, cut.min_p)
        )
        removed |= ~keep(z[cut.term], top_k, top_p, min_p)
        bad |= ~z[cut.term].logsumexp(dim=-1).isfinite()  # no distribution to cut from
    if i.mask is not None:
        removed |= ~i.mask

    # The kernels' scores are float32: where a score overflows that, the row is bad here too.
    bad |= (~removed & ~score.float().isfinite()).any(dim=1)
    return score.masked_fill(removed, NEG_INF), bad


def term_log_probs(i: Inputs, z: Sequence[Tensor]) -> Tensor:
    """`[B, V, K]` of the terms' logits, normalised over these columns or as `i.log_z` says."""
    if i.log_z is None:
        return torch.stack([z_k.log_softmax(dim=-1) for z_k in z], dim=-1)
    return torch.stack(list(z), dim=-1) - i.log_z[:, None, :].double()


def without_tokens(score: Tensor) -> Tensor:
    """The rows `[B]` in which no token is left."""
    return (score == NEG_INF).all(dim=1)


def power_mean(log_p: Tensor, w: Tensor, power: float) -> Tensor:
    """log (sum_k w_k p_k^r)^(1/r) of ``log_p`` [B, V, K] and weights [B, K] with a sum of one.

    It is ``ref + log1p(sum_k w_k expm1(r (log p_k - ref))) / r``, which stays right for small r:
    there a log-sum-exp is next to 0, and its rounding would be divided by r. For r = inf it is the
    largest log p_k, and for r = -inf the smallest.
    """
    on = (w > 0)[:, None, :]
    if power > 0:  # the term with the largest r log p
        ref = log_p.masked_fill(~on, NEG_INF).amax(dim=-1, keepdim=True)
    else:
        ref = log_p.masked_fill(~on, -NEG_INF).amin(dim=-1, keepdim=True)
    if math.isinf(power):
        return ref[..., 0]
    a = power * (log_p - ref.where(ref.isfinite(), 0)).masked_fill(~on, 0)
    excess = (w[:, None, :] * a.expm1()).sum(dim=-1)
    far = (w[:, None, :] * a.exp()).sum(dim=-1).log()
    mean = ref[..., 0] + torch.where(excess > -0.5, excess.log1p(), far) / power
    return mean.masked_fill(ref[..., 0] == NEG_INF, NEG_INF)


def part_push(log_p: Tensor, u: Tensor, power: float) -> Tensor:
    """sum_k u_k log p_k of ``log_p`` [B, V, K] and weights [B, K], or with power inf or -inf
    sum_k u_k times the largest or the smallest log p_k."""
    on = (u != 0)[:, None, :]
    if power == 0:
        return torch.where(on, u[:, None, :] * log_p, 0.0).sum(dim=-1)
    if power > 0:
        extreme = log_p.masked_fill(~on, NEG_INF).amax(dim=-1)
    else:
        extreme = log_p.masked_fill(~on, -NEG_INF).amin(dim=-1)
    return torch.where(on.any(dim=-1), u.sum(dim=-1, keepdim=True) * extreme, 0.0)


@torch.no_grad()
def blend(inputs: Inputs, raw: bool = False) -> Tensor:
    score, bad = blend_scores(inputs)
    if not raw:
        bad |= without_tokens(score)
        score = score.log_softmax(dim=-1)
    return score.masked_fill(bad[:, None], float("nan")).float()


def pushes_of(i: Inputs, score: Tensor, tokens: Tensor) -> Tensor:
    """What pushed the token y of each row, ``[B, K + M]`` in float64: of term k it is
    w_k E[x(y) - x] with x = z_k - z_0, and of value m it is the same with x = Q_m.

    The expectation is under softmax(score), in which tokens that are removed have no part.
    """
    p = score.softmax(dim=-1)
    z = [t[:, : i.vocab_size].double() for t in i.logits]
    departures = [z_k - z[0] for z_k in z] + [q[:, : i.vocab_size].double() for q in i.values]
    weights = [weights_of(w, i.rows, i.device) for w in (i.weights, i.value_weights)]
    pushes = []
    for w, x in zip(torch.cat(weights, dim=1).unbind(1), departures, strict=True):
        ahead = x.gather(1, tokens[:, None]) - x
        mean = torch.where(p > 0, p * ahead, 0.0).sum(dim=-1)
        mean = mean.where(mean.isfinite(), float("nan"))
        pushes.append(torch.where(w != 0, w * mean, 0.0))
    return torch.stack(pushes, dim=1)


@torch.no_grad()
def blend_sample(
    inputs: Inputs, draw: Draw, return_term_logprobs: bool, return_pushes: bool
) -> BlendSample:
    score, bad = blend_scores(inputs)
    bad |= without_tokens(score)
    (rows, vocab), nan = score.shape, float("nan")
    own = RowDraws.of(draw, inputs)
    greedy, t, k, p, m = own.greedy, own.temperature, own.top_k, own.top_p, own.min_p
    bad = bad | own.bad
    score = torch.where(bad[:, None], 0.0, score)  # or any numbers: a bad row's results are NaN

    tokens = score.argmax(dim=-1)  # greedy: ties go to the lowest id
    sampled = score.new_zeros(rows)
    if not greedy.all():
        # Where a temperature is tiny, noise would be lost beside the best score divided by it.
        tempered = (score - score.amax(dim=-1, keepdim=True)) / t[:, None]
        tempered = tempered.masked_fill(~keep(tempered, k, p, m), NEG_INF)
        drawn = gumbel_max(tempered, own.noise).token
        tokens = torch.where(greedy, tokens, drawn)
        log_p = tempered.log_softmax(dim=-1).gather(1, tokens[:, None])[:, 0]
        sampled = torch.where(greedy, sampled, log_p)

    def at_token(log_p: Tensor) -> Tensor:
        return log_p.gather(1, tokens[:, None])[:, 0].masked_fill(bad, nan).float()

    return BlendSample(
        tokens=tokens.masked_fill(bad, -1),
        logprobs=at_token(score.log_softmax(dim=-1)),
        sampled_logprobs=sampled.masked_fill(bad, nan).float(),
        term_logprobs=torch.stack(
            [at_token(z[:, :vocab].double().log_softmax(dim=-1)) for z in inputs.logits], dim=1
        )
        if return_term_logprobs
        else None,
        pushes=pushes_of(inputs, score, tokens).masked_fill(bad[:, None], nan).float()
        if return_pushes
        else None,
    )


@dataclass(frozen=True)
class RowDraws:
    """The settings of each row `[B]`; 1 where the row is greedy or has a bad one."""

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    greedy: Tensor
    bad: Tensor
    noise: Noise

    @classmethod
    def of(cls, draw: Draw, inputs: Inputs) -> RowDraws:
        rows, device = inputs.rows, inputs.device
        t, p, m = (
            per_row(s, rows, device, torch.float32).double()
            for s in (draw.temperature, draw.top_p, draw.min_p)
        )
        k = per_row(draw.top_k, rows, device, torch.int64)
        greedy = (t == 0) | (not draw.do_sample)
        usable = (t > 0) & t.isfinite() & (k >= 0) & (p >= 0) & (p <= 1) & (m >= 0) & (m <= 1)
        bad = ~(greedy | usable)
        t, p, m, k = (torch.where(bad | greedy, s.new_ones(()), s) for s in (t, p, m, k))
        seed, stream, step = (
            per_row(signed(s), rows, device, torch.int64)
            for s in (draw.seed, draw.stream, draw.step)
        )
        return cls(t, k, p, m, greedy, bad, Noise(seed, stream, step, draw.first_token))


@torch.no_grad()
def draw_shard(inputs: Inputs, draw: Draw) -> ShardDraw:
    score, bad = blend_scores(inputs)
    own = RowDraws.of(draw, inputs)
    bad = bad | own.bad
    empty = without_tokens(score)
    score = torch.where((bad | empty)[:, None], 0.0, score)
    best = score.argmax(dim=-1)
    top = score.amax(dim=-1)
    x = (score - top[:, None]) / own.temperature[:, None]
    race = gumbel_max(x, own.noise)
    token = torch.where(own.greedy, best, race.token)
    below = score.gather(1, token[:, None])[:, 0] - top
    drawn = [
        top,
        (score - top[:, None]).logsumexp(dim=-1),
        x.logsumexp(dim=-1),
        torch.where(own.greedy, below, race.group_mass),
        race.group_noise.masked_fill(own.greedy, 0.0),
        below,
        race.token_noise.masked_fill(own.greedy, 0.0),
    ]
    rest = torch.stack(drawn, dim=1).float()
    rest[empty] = rest.new_tensor([NEG_INF, NEG_INF, NEG_INF, NEG_INF, 0.0, NEG_INF, 0.0])
    rest[bad] = float("nan")
    tokens = (token + draw.first_token).masked_fill(bad | empty, -1)
    return ShardDraw(tokens, rest)


def signed(word: int | Tensor) -> int | Tensor:
    """An integer below 2^64 as the int64 of the same bits. Tensors are int64 already."""
    return word - 2**64 if isinstance(word, int) and word >= 2**63 else word


def attend_(given: Attention) -> Tensor:
    batch, tokens, heads, kv_heads, _, _, _, capacity = given.sizes
    query, rows, window, softcap = given.query, given.rows, given.window, given.softcap
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32  # of scores and sums
    if rows is None:
        rows = torch.arange(batch, device=query.device)
    slot = torch.arange(capacity, device=query.device)
    nth = slot - given.lengths[:, None]  # [B, C], which of the new tokens a slot is for
    is_new = ((nth >= 0) & (nth < tokens))[:, None, :, None]
    live = (nth < tokens)[:, None, :, None]  # a cache may hold anything past its tokens

    def appended(cache: Tensor, new: Tensor) -> Tensor:
        index = nth.clamp(0, tokens - 1)[:, None, :, None].expand(-1, kv_heads, -1, new.shape[3])
        cache[rows] = torch.where(is_new, new.gather(2, index), cache[rows])
        return cache[rows].masked_fill(~live, 0.0).to(dtype)[:, :, None]  # [B, Hkv, 1, C, D]

    k, v = appended(given.keys, given.key), appended(given.values, given.value)
    q = query.to(dtype).unflatten(1, (kv_heads, heads // kv_heads))
    scores = given.scale * q @ k.mT  # [B, Hkv, Hq / Hkv, n, C]
    if softcap > 0:
        scores = softcap * (scores / softcap).tanh()
    behind = torch.arange(tokens, device=query.device)[:, None] - nth[:, None]  # [B, n, C]
    seen = (behind >= 0) & (behind < window) if window > 0 else behind >= 0
    weights = scores.masked_fill(~seen[:, None, None], NEG_INF).softmax(dim=-1)
    return (weights @ v).flatten(1, 2).transpose(1, 2).to(query.dtype).contiguous()


def chunk_select(scores: Tensor, finished: Tensor, width: int) -> Tensor:
    kept = (-scores).sort(dim=1, stable=True).indices[:, :width]  # NaN is last
    nth = torch.arange(scores.shape[1] // width, device=scores.device)
    idle = finished.gather(1, kept)[:, :, None] & (nth > 0)
    return torch.where(idle, -1, kept[:, :, None]).flatten(1)


@torch.no_grad()
def fork_cache_(
    tensors: Sequence[Tensor], parents: Tensor, start: int | Tensor, end: int | Tensor
) -> None:
    rows = torch.arange(len(parents), device=parents.device)
    source = torch.where((parents >= 0) & (parents < len(parents)), parents, rows)
    begin, stop = (x[:, None, None, None] if isinstance(x, Tensor) else x for x in (start, end))
    for x in tensors:
        position = torch.arange(x.shape[2], device=x.device)[:, None]
        x.copy_(torch.where((position >= begin) & (position < stop), x[source], x))


def linear_logp(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    softcap: float,
    temperature: float,
    ignore_index: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """logp, lse and entropy ``[T]`` in float64; softcap 0 is off."""
    z = hidden.double() @ weight.double().T
    if bias is not None:
        z = z + bias.double()
    if softcap > 0:
        z = softcap * (z / softcap).tanh()
    z = z / temperature
    lse = z.logsumexp(-1)
    counts, finite = targets != ignore_index, lse.isfinite()
    logp = z.gather(-1, targets.where(counts, 0)[:, None]).squeeze(-1) - lse
    removed = z == -torch.inf
    entropy = lse - (z.softmax(-1) * z.masked_fill(removed, 0)).sum(-1)
    logp, lse, entropy = (x.where(finite, torch.nan) for x in (logp, lse, entropy))
    return logp.where(counts, 0), lse, entropy
