"""Blend and sample in Triton: tiles of a row in parallel, then one program a row.

`blend_tiles` reads every input once and leaves, for each tile of a row, its largest score, its sum
of exponentials and (without truncation) the best candidate under the noise. `choose` puts the tiles
of a row together. With truncation the scores go through scratch, and `choose` searches it for the
threshold without a sort. Power means need each term's normaliser first: `term_tiles`, one more read.
"""

import triton
import triton.language as tl

from .noise import log1m, tile_noise

NEG_INF = tl.constexpr(float("-inf"))
NAN = tl.constexpr(float("nan"))
WEIGHT_SUM_TOLERANCE = tl.constexpr(1e-3)
LOWEST_KEY = tl.constexpr(-2139095041)  # key_of(-inf)
INT_MIN = tl.constexpr(-(2**31))
INT_MAX = tl.constexpr(2**31 - 1)

# Planes of `partials` [PLANES, B, tiles] float32.
PLANES = 6
TOP = tl.constexpr(0)  # the tile's largest score
SUM = tl.constexpr(1)  # of exp(score - TOP); NaN where the row is bad
TEMPERED = tl.constexpr(2)  # of exp((score - TOP) / temperature)
VALUE = tl.constexpr(3)  # the best candidate's (score - TOP) / temperature + noise
SCORE = tl.constexpr(4)  # its score
INDEX = tl.constexpr(5)  # its place in the tile

# Numbers that change from call to call: as plain arguments they must not compile a new kernel.
PER_CALL = ["seed", "seed_high", "stream", "stream_high", "step", "top_k"]


# ---- Small parts ---------------------------------------------------------------------------------


@triton.jit
def setting(x, row):
    """A row's setting: a number, or a pointer to [B]."""
    if x.dtype.is_ptr():
        return tl.load(x + row)
    else:
        return x


@triton.jit
def weight_of(weights, stride, row, k: tl.constexpr):
    """Weight k of a row: numbers (no stride), or a pointer with a row stride."""
    if stride is None:
        return weights[k]
    else:
        return tl.load(weights + row.to(tl.int64) * stride + k)


@triton.jit
def load_row(x, stride, row, cols, vocab):
    """Columns of a row of [B, V] as float32, -inf past the vocabulary."""
    at = x + row.to(tl.int64) * stride + cols
    return tl.load(at, mask=cols < vocab, other=NEG_INF).to(tl.float32)


@triton.jit
def finite_or_zero(top):
    """A value to subtract from scores whose largest is `top`: -inf - (-inf) would be NaN."""
    return tl.where(top == NEG_INF, 0.0, top)


@triton.jit
def plane(partials, index, row, rows, tiles):
    return partials + (index * rows + row).to(tl.int64) * tiles


@triton.jit
def combine(partials, index, row, rows, tiles, TILES: tl.constexpr):
    """The largest of a row's tiles' maxima (plane `index`) and the sum of exponentials below it."""
    t = tl.arange(0, TILES)
    top = tl.load(plane(partials, index, row, rows, tiles) + t, mask=t < tiles, other=NEG_INF)
    total = tl.load(plane(partials, index + 1, row, rows, tiles) + t, mask=t < tiles, other=0.0)
    best = tl.max(top)
    return best, tl.sum(total * tl.exp(top - finite_or_zero(best)))


@triton.jit
def store_term(z, term_partials, k: tl.constexpr, row, rows, tile, tiles):
    top = tl.max(tl.where(z == z, z, NEG_INF))
    total = tl.sum(tl.exp(z - finite_or_zero(top)))
    tl.store(plane(term_partials, 2 * k, row, rows, tiles) + tile, top)
    tl.store(plane(term_partials, 2 * k + 1, row, rows, tiles) + tile, total)


# ---- Truncation: a threshold without a sort ------------------------------------------------------


@triton.jit
def key_of(x):
    """float32 as int32 that sorts alike; -0 and +0 share a key."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def float_of_key(key):
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def search(x, vocab, top, temperature, lo, target, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """The largest key, from `lo` on, such that the tokens from it up reach the target.

    With COUNT that is `target` tokens; else a share `target` of the mass
    exp((x - top) / temperature) from `lo` up. Eight pivots a pass narrow [lo, hi), whose lower end
    always reaches the target and whose upper end never does; both ends snap to scores in use, so a
    run of equal scores ends the search at once.
    """
    j = tl.arange(0, 8)
    pivot = tl.where(j < 7, top - temperature * 0.25 * tl.exp2(j.to(tl.float32)), NEG_INF)
    pivots = tl.maximum(key_of(pivot), lo)
    lo = lo.to(tl.int64)
    hi = key_of(top).to(tl.int64) + 1
    total = 0.0
    while hi - lo > 1:
        first, last = lo.to(tl.int32), (hi - 1).to(tl.int32)
        above = tl.zeros([8, BLOCK], tl.int32 if COUNT else tl.float32)
        low = tl.full([BLOCK], INT_MAX, tl.int32)
        high = tl.full([BLOCK], INT_MIN, tl.int32)
        for start in range(0, vocab, BLOCK):
            cols = start + tl.arange(0, BLOCK)
            score = tl.load(x + cols, mask=cols < vocab, other=NEG_INF).to(tl.float32)
            key = key_of(score)
            reaches = key[None, :] >= pivots[:, None]
            if COUNT:
                above += reaches.to(tl.int32)
            else:
                mass = tl.exp((score - top) / temperature)
                above += tl.where(reaches, mass[None, :], 0.0)
            inside = (key >= first) & (key <= last)
            low = tl.minimum(low, tl.where(inside, key, INT_MAX))
            high = tl.maximum(high, tl.where(inside, key, INT_MIN))
        reached = tl.sum(above, axis=1)
        if COUNT:
            enough = reached >= target
        else:  # the first pass has a pivot at `lo`, so `total` is right from there on
            total = tl.maximum(total, tl.max(reached))
            enough = reached >= tl.maximum(target * total, 1e-30)
        at_least = tl.max(tl.where(enough, pivots, INT_MIN))
        below = tl.min(tl.where(enough, INT_MAX, pivots))
        lo = tl.maximum(lo, tl.maximum(at_least, tl.min(low)).to(tl.int64))
        hi = tl.minimum(hi, tl.minimum(below.to(tl.int64), tl.max(high).to(tl.int64) + 1))
        pivots = (lo + (hi - lo) * (j + 1) // 9).to(tl.int32)
    return lo.to(tl.int32)


@triton.jit
def truncation(x, vocab, top, temperature, top_k, top_p, min_p, BLOCK: tl.constexpr):
    """The score from which top-k, then top-p, then min-p keep the tokens of one row `x`."""
    lo = tl.full((), LOWEST_KEY, tl.int32)
    if (top_k > 0) & (top_k < vocab):
        lo = search(x, vocab, top, temperature, lo, top_k, True, BLOCK)
    if top_p < 1.0:
        lo = search(x, vocab, top, temperature, lo, top_p, False, BLOCK)
    by_min_p = top + temperature * tl.log(min_p + 0.0)
    by_rank = float_of_key(lo)
    return tl.where(by_min_p < by_rank, by_rank, by_min_p)  # NaN stays: nothing is kept


@triton.jit
def support_threshold(x, stride, thresholds, vocab, top_k, top_p, min_p, BLOCK: tl.constexpr):
    """Each row's threshold for one term's own logits; NaN where they hold a NaN. Grid (B,)."""
    row = tl.program_id(0)
    x += row.to(tl.int64) * stride
    largest = tl.full([BLOCK], NEG_INF, tl.float32)
    odd = tl.zeros([BLOCK], tl.int32)
    for start in range(0, vocab, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        z = tl.load(x + cols, mask=cols < vocab, other=NEG_INF).to(tl.float32)
        odd |= (z != z).to(tl.int32)
        largest = tl.maximum(largest, tl.where(z == z, z, NEG_INF))
    top = tl.max(largest)
    threshold = top
    if tl.max(odd) > 0:
        threshold = NAN
    elif top > NEG_INF:
        threshold = truncation(x, vocab, top, 1.0, top_k, top_p, min_p, BLOCK)
    tl.store(thresholds + row, threshold)


# ---- Blending ------------------------------------------------------------------------------------


@triton.jit
def geometric(terms, strides, weights, weight_stride, row, cols, vocab, score, removed, ok):
    """Adds sum_k w_k z_k: the geometric blend, or values. A term with weight 0 is left out."""
    for k in tl.static_range(len(terms)):
        w = weight_of(weights, weight_stride, row, k)
        ok &= tl.abs(w) < float("inf")
        z = load_row(terms[k], strides[k], row, cols, vocab)
        score += tl.where(w != 0.0, w * z, 0.0)
        removed |= (w != 0.0) & (z == NEG_INF)
    return score, removed, ok


@triton.jit
def expm1_of_negative(x):
    """exp(x) - 1 for x <= 0: its series near 0, where the difference would lose digits."""
    s = x * (1 + x / 2 * (1 + x / 3 * (1 + x / 4 * (1 + x / 5 * (1 + x / 6 * (1 + x / 7))))))
    return tl.where(x > -0.3, s, tl.exp(x) - 1.0)


@triton.jit
def power_mean(
    terms,
    strides,
    weights,
    weight_stride,
    term_partials,
    power,
    row,
    rows,
    tiles,
    cols,
    vocab,
    TILES: tl.constexpr,
):
    """log (sum_k w_k p_k^r)^(1/r), from one read of the terms, each log-normalised.

    With the term of the largest w-free a_k = r log p_k as the reference `ref`, and weights that sum
    to one, it is ref + log1p(sum_k w_k expm1(a_k - a_ref)) / r: right for small r too, where a
    plain log-sum-exp divides its rounding error by r.
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
    excess = nothing  # sum_k w_k expm1(a_k - a_ref)
    sums = nothing  # sum_k w_k exp(a_k - a_ref), which keeps digits where excess nears -1
    weight = 0.0
    for k in tl.static_range(len(terms)):
        w = weight_of(weights, weight_stride, row, k) / total
        if w > 0.0:
            top, mass = combine(term_partials, 2 * k, row, rows, tiles, TILES)
            z = load_row(terms[k], strides[k], row, cols, vocab)
            log_p = (z - top) - tl.log(mass)
            empty = z == NEG_INF
            removed |= empty & (power < 0)
            a = power * (log_p - ref)
            a = tl.where(empty, tl.where(power > 0, NEG_INF, 0.0), a)
            rises = a > 0.0
            e = tl.exp(-tl.abs(a))
            em1 = expm1_of_negative(-tl.abs(a))
            excess = tl.where(rises, excess * e + weight * em1, excess + w * em1)
            sums = tl.where(rises, sums * e + w, sums + w * e)
            ref = tl.where(rises, log_p, ref)
            weight += w
    log_sum = tl.where(excess > -0.5, log1m(-excess), tl.log(sums))
    return ref + log_sum / power, removed | (ref == NEG_INF), ok


@triton.jit
def term_tiles(term_partials, terms, strides, rows, vocab, tiles, BLOCK: tl.constexpr):
    """Each term's maximum and sum of exponentials in one tile. Grid (B, tiles)."""
    row, tile = tl.program_id(0), tl.program_id(1)
    cols = tile * BLOCK + tl.arange(0, BLOCK)
    for k in tl.static_range(len(terms)):
        z = load_row(terms[k], strides[k], row, cols, vocab)
        store_term(z, term_partials, k, row, rows, tile, tiles)


@triton.jit(do_not_specialize=PER_CALL)
def blend_tiles(
    partials,  # [PLANES, B, tiles] float32
    scores,  # [B, V] float32 scratch for the blend, -inf where a token is removed; or None
    term_partials,  # [2 K, B, tiles] float32, or None
    terms,  # tuple of K [B, V_k]
    strides,
    weights,  # tuple of K numbers with weight_stride None, or a pointer to [K] or [B, K]
    weight_stride,
    values,  # like terms, or None
    value_strides,
    value_weights,
    value_weight_stride,
    mask,  # [V] or [B, V] bool, or None
    mask_stride,
    supported,  # the term that `thresholds` [B] belongs to, or None
    supported_stride,
    thresholds,
    power,
    temperature,
    seed,
    seed_high,
    stream,
    stream_high,
    step,
    rows,
    vocab,
    tiles,
    MEAN: tl.constexpr,  # a power mean; term_partials are its input
    PICK: tl.constexpr,  # find the tile's best candidate
    SAMPLE: tl.constexpr,  # ... under the noise, else the best score
    BLOCK: tl.constexpr,
    TILES: tl.constexpr,
):
    """Scores of one tile of one row. Grid (B, tiles)."""
    row, tile = tl.program_id(0), tl.program_id(1)
    cols = tile * BLOCK + tl.arange(0, BLOCK)
    if MEAN:
        score, removed, ok = power_mean(
            terms,
            strides,
            weights,
            weight_stride,
            term_partials,
            power,
            row,
            rows,
            tiles,
            cols,
            vocab,
            TILES,
        )
    else:
        score = tl.zeros([BLOCK], tl.float32)
        removed = cols >= vocab
        ok = tl.full((), 1, tl.int1)
        for k in tl.static_range(len(terms)):
            w = weight_of(weights, weight_stride, row, k)
            ok &= tl.abs(w) < float("inf")
            z = load_row(terms[k], strides[k], row, cols, vocab)
            score += tl.where(w != 0.0, w * z, 0.0)
            removed |= (w != 0.0) & (z == NEG_INF)
            if term_partials is not None:
                store_term(z, term_partials, k, row, rows, tile, tiles)
    if values is not None:
        pass
