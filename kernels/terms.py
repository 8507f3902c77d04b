"""The terms of a blend in Triton: how a program reads them, and their sum or power mean in a tile.

`term_tiles` finds the normalisers that a power mean needs, and `support_threshold` where one term's
own distribution is cut.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .noise import log1m
from .threshold import truncation

NEG_INF = tl.constexpr(float("-inf"))
WEIGHT_SUM_TOLERANCE = tl.constexpr(1e-3)


class Blend(NamedTuple):
    """What is blended, as kernels take it: the `Inputs` of ops/types.py."""

    terms: Any  # tuple of K [B, V_k]
    strides: Any  # those of their rows
    weights: Any  # tuple of K numbers with weight_stride None, or a pointer to [K] or [B, K]
    weight_stride: Any
    value_terms: Any  # like terms, or None
    value_strides: Any
    value_weights: Any
    value_weight_stride: Any
    mask: Any  # [V] or [B, V] bool, or None
    mask_stride: Any
    supported: Any  # the term that `thresholds` [B] belongs to, or None
    supported_stride: Any
    thresholds: Any
    power: Any
    parts: Any  # of each part its power, min and max, one after the other; or None
    part_weights: Any  # like weights, with those of a part after those of the part before it
    part_stride: Any
    log_z: Any  # [B, K] normalisers of the terms, or None where they are found in these columns


# ---- Small parts ---------------------------------------------------------------------------------


@triton.jit
def place_of():
    """The row and the tile of a program. A grid's second axis ends at 65,535, so a third helps."""
    return tl.program_id(0), tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)


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
def load_each(
    terms, strides, weights, weight_stride, row, first, vocab,
    MASKED: tl.constexpr, ALL: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    """`load_terms`, with masks or without."""
    n = tl.arange(0, COUNT)
    zs = ()
    for k in tl.static_range(len(terms)):
        at = terms[k] + row.to(tl.int64) * strides[k] + first + n
        if MASKED:
            inside = n < vocab - first
            w = tl.zeros([COUNT], tl.float32) + weight_of(weights, weight_stride, row, k)
            read = inside if ALL else inside & (w != 0.0)
            zs += (tl.load(at, mask=read, other=tl.where(inside, 0.0, NEG_INF)),)
        else:
            zs += (tl.load(at),)
    return zs


@triton.jit
def load_terms(
    terms, strides, weights, weight_stride, row, first, vocab,
    ALL: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    """A row of each term from token `first` on, in its own dtype, -inf past the vocabulary.

    Terms without weight are 0 and not read, unless ALL. Where there is no such term and no such
    token, the loads need no mask, which would take an instruction for each number. All are loaded
    before one is looked at, so that a program waits for memory once.
    """
    whole = first <= vocab - COUNT
    if not ALL:
        for k in tl.static_range(len(terms)):
            whole &= weight_of(weights, weight_stride, row, k) != 0.0
    if whole:
        zs = load_each(terms, strides, weights, weight_stride, row, first, vocab, False, ALL, COUNT)
    else:
        zs = load_each(terms, strides, weights, weight_stride, row, first, vocab, True, ALL, COUNT)
    return zs


@triton.jit
def combine(partials, size, index: tl.constexpr, count, CHUNK: tl.constexpr):
    """The largest of a row's maxima (plane `index`), and the sum of exponentials below it."""
    top = tl.full((), NEG_INF, tl.float32)
    total = tl.zeros((), tl.float32)
    for start in range(0, count, CHUNK):
        t = tl.arange(0, CHUNK) + start
        tops = tl.load(partials + size * index + t, mask=t < count, other=NEG_INF)
        totals = tl.load(partials + size * (index + 1) + t, mask=t < count, other=0.0)
        new_top = tl.maximum(top, tl.max(tops))
        base = tl.where(new_top == NEG_INF, 0.0, new_top)  # -inf - (-inf) would be NaN
        total = total * tl.exp(top - base) + tl.sum(totals * tl.exp(tops - base))
        top = new_top
    return top, total


@triton.jit
def normaliser(blend, term_partials, size, k: tl.constexpr, row, tiles, TILES: tl.constexpr):
    """A term's top and mass, with log p = (z - top) - log mass: as given, or of the tiles."""
    if blend.log_z is not None:
        top = tl.load(blend.log_z + row.to(tl.int64) * len(blend.terms) + k)
        mass = tl.full((), 1.0, tl.float32)
    else:
        top, mass = combine(term_partials, size, 2 * k, tiles, TILES)
    return top, mass


@triton.jit
def store_term(z, partials, size, k: tl.constexpr):
    """Planes 2 k and 2 k + 1: a term's maximum in a tile, and its sum of exponentials below it."""
    top = tl.max(tl.where(z == z, z, NEG_INF))
    tl.store(partials + size * (2 * k), top)
    total = tl.sum(tl.exp(z - tl.where(top == NEG_INF, 0.0, top)))  # -inf - (-inf) would be NaN
    tl.store(partials + size * (2 * k + 1), total)


# ---- Blending ------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["groups"])
def support_threshold(
    x, stride, thresholds, tops, listed, vocab, groups, top_k, top_p, min_p,
    GROUP: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Each row's threshold for one term's logits; NaN if they are no distribution. Grid (B,).

    `tops` and `listed` [B, groups] are scratch memory, of float32 and of int32.
    """
    row = tl.program_id(0)
    x += row.to(tl.int64) * stride
    tops += row.to(tl.int64) * groups
    listed += row.to(tl.int64) * groups
    largest = tl.full([BLOCK // GROUP], NEG_INF, tl.float32)
    odd = tl.zeros([BLOCK], tl.int32)
    for block in range((vocab - 1) // BLOCK + 1):
        cols = tl.arange(0, BLOCK) + block * BLOCK
        z = tl.load(x + cols, mask=cols < vocab, other=NEG_INF).to(tl.float32)
        odd |= (z != z).to(tl.int32)
        z = tl.reshape(tl.where(z == z, z, NEG_INF), [BLOCK // GROUP, GROUP])
        j = tl.arange(0, BLOCK // GROUP) + block * (BLOCK // GROUP)
        tl.store(tops + j, tl.max(z, axis=1), mask=j < groups)
        largest = tl.maximum(largest, tl.max(z, axis=1))
    tl.debug_barrier()
    top = tl.max(largest)
    threshold = top * float("nan")  # if the term is no distribution, nothing is kept
    if (tl.max(odd) == 0) & (tl.abs(top) < float("inf")):
        threshold = truncation(
            x, vocab, tops, listed, groups, top, 1.0, top_k, top_p, min_p, GROUP, BLOCK, CHUNK
        )
    tl.store(thresholds + row, threshold)


@triton.jit
def blend_scores(
    blend, term_partials, size, tiles, TILES: tl.constexpr, row, first, vocab,
    MEAN: tl.constexpr, NORMED: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    """A row's scores [COUNT] from token `first` on, and whether the row's weights can be used.

    A score is -inf where the token is removed, and NaN where a row is bad that has this token.
    `term_partials` of the row are an input of a power mean and of parts, as NORMED says, if the
    blend has no `log_z`; else they are written, unless None.
    """
    cols = first + tl.arange(0, COUNT)
    if MEAN:
        score, lowest, ok = power_mean(blend, term_partials, size, tiles, TILES, row, cols, vocab)
    else:
        written = None if NORMED else term_partials
        if written is not None:
            written += first // COUNT
        score, lowest, ok = weighted_sum(
            blend.terms, blend.strides, blend.weights, blend.weight_stride, written, size,
            row, first, vocab, None, None, tl.full((), 1, tl.int1), COUNT,
        )  # fmt: skip
    if blend.parts is not None:
        score, lowest, ok = add_pushes(
            blend, term_partials, size, tiles, TILES, row, cols, vocab, score, lowest, ok
        )
    if blend.value_terms is not None:
        score, lowest, ok = weighted_sum(
            blend.value_terms, blend.value_strides, blend.value_weights, blend.value_weight_stride,
            None, size, row, first, vocab, score, lowest, ok, COUNT,
        )  # fmt: skip

    score = tl.where(tl.abs(score) < float("inf"), score, float("nan"))
    score = tl.where(lowest == NEG_INF, NEG_INF, score)
    if blend.supported is not None:
        z = load_row(blend.supported, blend.supported_stride, row, cols, vocab)
        threshold = tl.load(blend.thresholds + row)
        ok &= threshold == threshold
        score = tl.where(z >= threshold, score, NEG_INF)
    if blend.mask is not None:
        at = blend.mask + row.to(tl.int64) * blend.mask_stride + cols
        score = tl.where(tl.load(at, mask=cols < vocab, other=0) != 0, score, NEG_INF)
    return score, ok


@triton.jit
def weighted_sum(
    terms, strides, weights, weight_stride, term_partials, size, row, first, vocab,
    score, lowest, ok, COUNT: tl.constexpr,
):  # fmt: skip
    """Adds sum_k w_k z_k to `score`, if there is one: a geometric blend, or values.

    A term with weight 0 is left out. A token with a z_k of -inf is removed, whatever its sum is:
    so `lowest` tells, the least z_k.
    """
    zs = load_terms(
        terms, strides, weights, weight_stride, row, first, vocab, term_partials is not None, COUNT
    )
    for k in tl.static_range(len(terms)):
        w, z = weight_of(weights, weight_stride, row, k), zs[k].to(tl.float32)
        ok &= tl.abs(w) < float("inf")
        if term_partials is not None:
            store_term(z, term_partials, size, k)
            z = tl.where(w != 0.0, z, tl.where(tl.arange(0, COUNT) < vocab - first, 0.0, NEG_INF))
        score = w * z if score is None else tl.fma(tl.zeros_like(z) + w, z, score)
        lowest = z if lowest is None else tl.minimum(lowest, z)
    return score, lowest, ok


@triton.jit
def add_pushes(
    blend, term_partials, size, tiles, TILES: tl.constexpr, row, cols, vocab, score, lowest, ok,
):  # fmt: skip
    """Adds the pushes of the parts to `score`.

    With weights u_k in a part it is sum_k u_k log p_k or, with a power of inf or -inf, sum_k u_k
    times the largest or the smallest log p_k, clamped. `lowest` becomes -inf where it is infinite
    even so: there the token is removed.
    """
    K: tl.constexpr = len(blend.terms)
    for g in tl.static_range(len(blend.parts) // 3):
        power, least, most = blend.parts[3 * g], blend.parts[3 * g + 1], blend.parts[3 * g + 2]
        push = tl.zeros_like(score)
        extreme = push + tl.where(power > 0, NEG_INF, float("inf"))
        total = 0.0
        empty = tl.full((), 1, tl.int1)
        for k in tl.static_range(K):
            u = weight_of(blend.part_weights, blend.part_stride, row, g * K + k)
            ok &= tl.abs(u) < float("inf")
            if u != 0.0:
                top, mass = normaliser(blend, term_partials, size, k, row, tiles, TILES)
                ok &= (tl.abs(top) < float("inf")) & (mass < float("inf"))  # else no log-probs
                z = load_row(blend.terms[k], blend.strides[k], row, cols, vocab)
                log_p = (z - top) - tl.log(mass)
                push += u * log_p
                larger = tl.where(log_p > extreme, log_p, extreme)
                extreme = tl.where(power > 0, larger, tl.where(log_p < extreme, log_p, extreme))
                total += u
                empty = tl.full((), 0, tl.int1)
        push = tl.where(power == 0.0, push, total * tl.where(empty, 0.0, extreme))
        push = tl.where(push < least, least, push)
        push = tl.where(push > most, most, push)
        finite = tl.abs(push) < float("inf")
        score += tl.where(finite, push, 0.0)
        lowest = tl.where(finite, lowest, NEG_INF)
    return score, lowest, ok


@triton.jit
def expm1_of_negative(x):
    """exp(x) - 1 for x <= 0. Near 0, where the difference would lose digits, it is the series."""
    s = x * (1 + x / 2 * (1 + x / 3 * (1 + x / 4 * (1 + x / 5 * (1 + x / 6 * (1 + x / 7))))))
    return tl.where(x > -0.3, s, tl.exp(x) - 1.0)


@triton.jit
def power_mean(blend, term_partials, size, tiles, TILES: tl.constexpr, row, cols, vocab):
    """log (sum_k w_k p_k^r)^(1/r), from one read of the terms, which it normalises.

    As of `weighted_sum`, a second result is -inf where a token is removed.

    With a_k = r log p_k, `ref` the log p_k of the largest a_k, and weights that sum to one, it is
    ref + log1p(sum_k w_k expm1(a_k - r ref)) / r. That is right for small r too, where the rounding
    error of a plain log-sum-exp would be divided by r. For r = inf it is the largest log p_k, and
    for r = -inf the smallest, which are `ref`.
    """
    power = blend.power
    total = 0.0
    ok = tl.full((), 1, tl.int1)
    for k in tl.static_range(len(blend.terms)):
        w = weight_of(blend.weights, blend.weight_stride, row, k)
        ok &= (w >= 0.0) & (w < float("inf"))
        total += w
    ok &= tl.abs(total - 1.0) <= WEIGHT_SUM_TOLERANCE

    nothing = tl.zeros_like(cols).to(tl.float32)
    ref = nothing + tl.where(power > 0, NEG_INF, float("inf"))
    removed = nothing != 0.0
    excess = nothing  # sum_k w_k expm1(a_k - r ref)
    sums = nothing  # sum_k w_k exp(a_k - r ref), which keeps its digits where excess nears -1
    weight = 0.0
    for k in tl.static_range(len(blend.terms)):
        w = weight_of(blend.weights, blend.weight_stride, row, k) / total
        if w > 0.0:
            top, mass = normaliser(blend, term_partials, size, k, row, tiles, TILES)
            ok &= (tl.abs(top) < float("inf")) & (mass < float("inf"))  # else no log-probs
            z = load_row(blend.terms[k], blend.strides[k], row, cols, vocab)
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
    mean = ref + tl.where(near, log_near, log_far) / power
    score = tl.where(tl.abs(power) == float("inf"), ref, mean)
    return score, tl.where(removed | (ref == NEG_INF), NEG_INF, nothing), ok


@triton.jit(do_not_specialize=["rows", "tiles"])
def term_tiles(term_partials, terms, strides, rows, vocab, tiles, BLOCK: tl.constexpr):
    """Each term's maximum and sum of exponentials in one tile. Grid (B, tiles)."""
    row, tile = place_of()
    cols = tile * BLOCK + tl.arange(0, BLOCK)
    size = rows.to(tl.int64) * tiles
    term_partials += row.to(tl.int64) * tiles + tile
    for k in tl.static_range(len(terms)):
        z = load_row(terms[k], strides[k], row, cols, vocab)
        store_term(z, term_partials, size, k)
