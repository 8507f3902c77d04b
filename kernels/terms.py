"""The terms of a blend in Triton: how a program reads them, and their sum or power mean in a tile.

`term_tiles` finds the normalisers that a power mean needs, and `support_threshold` where one term's
own distribution is cut.
"""

import triton
import triton.language as tl

from .noise import log1m
from .threshold import truncation

NEG_INF = tl.constexpr(float("-inf"))
WEIGHT_SUM_TOLERANCE = tl.constexpr(1e-3)


# ---- Small parts ---------------------------------------------------------------------------------


@triton.jit
def setting(x, row):
    """A row's setting. `x` is a number for all rows, or a pointer to [B]."""
    if isinstance(x, float):  # under the interpreter
        return tl.full((), x, tl.float32)
    elif x.dtype.is_ptr():
        return tl.load(x + row)
    else:
        return x


@triton.jit
def weight_of(weights, stride, row, k: tl.constexpr):
    """Weight k of a row. `weights` are numbers (no stride), or a pointer with a row stride."""
    if stride is None:
        return tl.full((), weights[k], tl.float32)
    else:
        return tl.load(weights + row.to(tl.int64) * stride + k)


@triton.jit
def load_row(x, stride, row, cols, vocab):
    """Columns of a row of [B, V] as float32, -inf past the vocabulary."""
    at = x + row.to(tl.int64) * stride + cols
    return tl.load(at, mask=cols < vocab, other=NEG_INF).to(tl.float32)


@triton.jit
def combine(partials, size, index: tl.constexpr, tiles, TILES: tl.constexpr):
    """The largest of a row's tiles' maxima (plane `index`) and the sum of exponentials below it."""
    t = tl.arange(0, TILES)
    tops = tl.load(partials + size * index + t, mask=t < tiles, other=NEG_INF)
    totals = tl.load(partials + size * (index + 1) + t, mask=t < tiles, other=0.0)
    top = tl.max(tops)
    return top, tl.sum(totals * tl.exp(tops - tl.where(top == NEG_INF, 0.0, top)))


@triton.jit
def store_term(z, partials, size, k: tl.constexpr):
    """Planes 2 k and 2 k + 1: a term's maximum in a tile, and its sum of exponentials below it."""
    top = tl.max(tl.where(z == z, z, NEG_INF))
    tl.store(partials + size * (2 * k), top)
    total = tl.sum(tl.exp(z - tl.where(top == NEG_INF, 0.0, top)))  # -inf - (-inf) would be NaN
    tl.store(partials + size * (2 * k + 1), total)


# ---- Blending ------------------------------------------------------------------------------------


@triton.jit
def support_threshold(
    x, stride, thresholds, vocab, top_k, top_p, min_p, BLOCKS: tl.constexpr, BLOCK: tl.constexpr
):
    """Each row's threshold for one term's logits; NaN if they are no distribution. Grid (B,)."""
    row = tl.program_id(0)
    x += row.to(tl.int64) * stride
    largest = tl.full([BLOCK], NEG_INF, tl.float32)
    odd = tl.zeros([BLOCK], tl.int32)
    for block in range(BLOCKS):
        cols = block * BLOCK + tl.arange(0, BLOCK)
        z = tl.load(x + cols, mask=cols < vocab, other=NEG_INF).to(tl.float32)
        odd |= (z != z).to(tl.int32)
        largest = tl.maximum(largest, tl.where(z == z, z, NEG_INF))
    top = tl.max(largest)
    threshold = top * float("nan")  # if the term is no distribution, nothing is kept
    if (tl.max(odd) == 0) & (tl.abs(top) < float("inf")):
        threshold = truncation(x, vocab, top, 1.0, top_k, top_p, min_p, BLOCKS, BLOCK)
    tl.store(thresholds + row, threshold)


@triton.jit
def weighted_sum(
    terms,
    strides,
    weights,
    weight_stride,
    term_partials,
    size,
    row,
    cols,
    vocab,
    score,
    removed,
    ok,
):
    """Adds sum_k w_k z_k: a geometric blend, or values. A term with weight 0 is left out."""
    for k in tl.static_range(len(terms)):
        w = weight_of(weights, weight_stride, row, k)
        ok &= tl.abs(w) < float("inf")
        z = load_row(terms[k], strides[k], row, cols, vocab)
        if term_partials is not None:
            store_term(z, term_partials, size, k)
        z = tl.where(w != 0.0, z, 0.0)
        removed |= z == NEG_INF
        score += w * tl.where(z == NEG_INF, 0.0, z)
    return score, removed, ok


@triton.jit
def expm1_of_negative(x):
    """exp(x) - 1 for x <= 0. Near 0, where the difference would lose digits, it is the series."""
    s = x * (1 + x / 2 * (1 + x / 3 * (1 + x / 4 * (1 + x / 5 * (1 + x / 6 * (1 + x / 7))))))
    return tl.where(x > -0.3, s, tl.exp(x) - 1.0)


@triton.jit
def power_mean(
    terms, strides, weights, weight_stride, term_partials, size, tiles, TILES: tl.constexpr,
    power, row, cols, vocab,
):  # fmt: skip
    """log (sum_k w_k p_k^r)^(1/r), from one read of the terms, which it normalises.

    With a_k = r log p_k, `ref` the log p_k of the largest a_k, and weights that sum to one, it is
    ref + log1p(sum_k w_k expm1(a_k - r ref)) / r. That is right for small r too, where the rounding
    error of a plain log-sum-exp would be divided by r.
    """
    total = 0.0
    ok = tl.full((), 1, tl.int1)
    for k in tl.static_range(len(terms)):
        w = weight_of(weights, weight_stride, row, k)
        ok &= (w >= 0.0) & (w < float("inf"))
        total += w
    ok &= tl.abs(total - 1.0) <= WEIGHT_SUM_TOLERANCE

    nothing = tl.zeros_like(cols).to(tl.float32)
    ref = nothing + tl.where(power > 0, NEG_INF, float("inf"))
    removed = nothing != 0.0
    excess = nothing  # sum_k w_k expm1(a_k - r ref)
    sums = nothing  # sum_k w_k exp(a_k - r ref), which keeps its digits where excess nears -1
    weight = 0.0
    for k in tl.static_range(len(terms)):
        w = weight_of(weights, weight_stride, row, k) / total
        if w > 0.0:
            top, mass = combine(term_partials, size, 2 * k, tiles, TILES)
            ok &= (top > NEG_INF) & (mass < float("inf"))  # else no log-probs
            z = load_row(terms[k], strides[k], row, cols, vocab)
            removed |= tl.where(power < 0, z, 0.0) == NEG_INF
            log_p = tl.where(z == NEG_INF, 0.0, (z - top) - tl.log(mass))
            a = power * (log_p - ref)
            a = tl.where(z == NEG_INF, tl.where(power > 0, NEG_INF, 0.0), a)
            rises = a > 0.0
            e = tl.exp(-tl.abs(a))
            em1 = expm1_of_negative(-tl.abs(a))
            excess = tl.where(rises, excess * e + weight * em1, excess + w * em1)
            sums = tl.where(rises, sums * e + w, sums + w * e)
            ref = tl.where(rises, log_p, ref)
            weight += w
    near = excess > -0.5
    log_near = log1m(tl.where(near, -excess, 0.0))
    log_far = tl.log(tl.where(near, 1.0, tl.maximum(sums, 1e-37)))
    return ref + tl.where(near, log_near, log_far) / power, removed | (ref == NEG_INF), ok


@triton.jit(do_not_specialize=["rows", "tiles"])
def term_tiles(term_partials, terms, strides, rows, vocab, tiles, BLOCK: tl.constexpr):
    """Each term's maximum and sum of exponentials in one tile. Grid (B, tiles)."""
    row, tile = tl.program_id(0), tl.program_id(1)
    cols = tile * BLOCK + tl.arange(0, BLOCK)
    size = rows.to(tl.int64) * tiles
    term_partials += row.to(tl.int64) * tiles + tile
    for k in tl.static_range(len(terms)):
        z = load_row(terms[k], strides[k], row, cols, vocab)
        store_term(z, term_partials, size, k)
