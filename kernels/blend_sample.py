"""Blend and sample in Triton: tiles of a row in parallel, then one program for each row.

`blend_tiles` reads every input once and leaves, for each tile of a row, its largest score, its sum
of exponentials and (without truncation) the best candidate under the noise; `choose` puts the tiles
of a row together. With truncation the scores are written to scratch memory, in which `choose` finds
their threshold without a sort. A power mean takes one more read: `term_tiles` finds the
normalisers.
"""

import triton
import triton.language as tl

from .noise import log1m, tile_noise
from .threshold import truncation

NEG_INF = tl.constexpr(float("-inf"))
WEIGHT_SUM_TOLERANCE = tl.constexpr(1e-3)

# Planes of `partials` [PLANES, B, tiles] float32.
PLANES = 6
TOP = tl.constexpr(0)  # the tile's largest score
SUM = tl.constexpr(1)  # the sum of exp(score - TOP); NaN where the row is bad
TEMPERED = tl.constexpr(2)  # the sum of exp((score - TOP) / temperature)
VALUE = tl.constexpr(3)  # the best candidate's (score - TOP) / temperature + noise; greedy: score
SCORE = tl.constexpr(4)  # its score
INDEX = tl.constexpr(5)  # its place in the tile

# Numbers that change from call to call. Triton must not compile a new kernel for each value.
PER_CALL = ["seed", "seed_high", "stream", "stream_high", "step", "rows", "tiles"]


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
def temperature_of(temperature, row):
    """Whether a row is greedy, as temperature 0 says, and what to divide its scores by."""
    t = setting(temperature, row)
    return t == 0.0, tl.where(t == 0.0, 1.0, t)


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
    MEAN: tl.constexpr,  # whether it is a power mean, of which term_partials are an input
    PICK: tl.constexpr,  # whether to find the tile's best candidate
    SAMPLE: tl.constexpr,  # whether that is the best with noise, or the best score
    BLOCK: tl.constexpr,
    TILES: tl.constexpr,
):
    """Computes the scores of one tile of one row. Grid (B, tiles)."""
    row, tile = tl.program_id(0), tl.program_id(1)
    cols = tile * BLOCK + tl.arange(0, BLOCK)
    size = rows.to(tl.int64) * tiles
    here = row.to(tl.int64) * tiles + tile
    if MEAN:
        score, removed, ok = power_mean(
            terms, strides, weights, weight_stride, term_partials + row.to(tl.int64) * tiles, size,
            tiles, TILES, power, row, cols, vocab,
        )  # fmt: skip
    else:
        if term_partials is not None:
            term_partials += here
        score, removed, ok = weighted_sum(
            terms, strides, weights, weight_stride, term_partials, size, row, cols, vocab,
            tl.zeros([BLOCK], tl.float32), cols >= vocab, tl.full((), 1, tl.int1),
        )  # fmt: skip
    if values is not None:
        score, removed, ok = weighted_sum(
            values, value_strides, value_weights, value_weight_stride, None, size, row, cols, vocab,
            score, removed, ok,
        )  # fmt: skip
    if supported is not None:
        z = load_row(supported, supported_stride, row, cols, vocab)
        removed |= ~(z >= tl.load(thresholds + row))
    if mask is not None:
        at = mask + row.to(tl.int64) * mask_stride + cols
        removed |= tl.load(at, mask=cols < vocab, other=0) == 0
    removed |= cols >= vocab

    wrong = ~removed & ~(tl.abs(score) < float("inf"))
    score = tl.where(removed | wrong, NEG_INF, score)
    if scores is not None:
        at = scores + row.to(tl.int64) * vocab + cols
        tl.store(at, score, mask=cols < vocab)

    partials += here
    top = tl.max(score)
    below = score - tl.where(top == NEG_INF, 0.0, top)
    total = tl.sum(tl.where(wrong, float("nan"), tl.exp(below)))
    tl.store(partials + size * TOP, top)
    tl.store(partials + size * SUM, tl.where(ok, total, float("nan")))
    if PICK:
        value = score
        if SAMPLE:
            greedy, temper = temperature_of(temperature, row)
            tempered = below / temper
            tl.store(partials + size * TEMPERED, tl.sum(tl.exp(tempered)))
            noise = tile_noise(tile * BLOCK, seed, seed_high, stream, stream_high, step, row, BLOCK)
            value = tl.where(greedy, score, tempered + noise)
        index = tl.argmax(value, axis=0)
        chosen = tl.max(tl.where(tl.arange(0, BLOCK) == index, score, NEG_INF))
        tl.store(partials + size * VALUE, tl.max(value))
        tl.store(partials + size * SCORE, chosen)
        tl.store(partials + size * INDEX, index.to(tl.float32))


@triton.jit(do_not_specialize=["rows", "tiles"])
def normalise(scores, partials, rows, vocab, tiles, BLOCK: tl.constexpr, TILES: tl.constexpr):
    """Turns scores into log-probs in place, NaN in a bad row. Grid (B, tiles)."""
    row, tile = tl.program_id(0), tl.program_id(1)
    cols = tile * BLOCK + tl.arange(0, BLOCK)
    partials += row.to(tl.int64) * tiles
    top, total = combine(partials, rows.to(tl.int64) * tiles, TOP, tiles, TILES)
    good = total > 0.0
    log_total = tl.log(tl.where(good, total, 1.0))
    at = scores + row.to(tl.int64) * vocab + cols
    log_p = (tl.load(at, mask=cols < vocab) - tl.where(good, top, 0.0)) - log_total
    tl.store(at, tl.where(good, log_p, float("nan")), mask=cols < vocab)


# ---- Sampling ------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=[*PER_CALL, "top_k"])
def choose(
    tokens,  # [B] int64
    logprobs,  # [B] float32
    sampled_logprobs,  # [B] float32
    term_logprobs,  # [B, K] float32, or None
    partials,
    scores,  # with TRUNCATE
    term_partials,
    terms,
    strides,
    temperature,
    top_k,
    top_p,
    min_p,
    seed,
    seed_high,
    stream,
    stream_high,
    step,
    rows,
    vocab,
    tiles,
    SAMPLE: tl.constexpr,
    TRUNCATE: tl.constexpr,
    BLOCKS: tl.constexpr,  # with TRUNCATE: ceil(vocab / BLOCK)
    BLOCK: tl.constexpr,  # tokens of a tile, or with TRUNCATE those that a loop here takes at once
    TILES: tl.constexpr,
):
    """Takes one token for each row, from the tiles' candidates or, with TRUNCATE, from the scores.
    Grid (B,)."""
    row = tl.program_id(0)
    size = rows.to(tl.int64) * tiles
    partials += row.to(tl.int64) * tiles
    top, total = combine(partials, size, TOP, tiles, TILES)
    good = total > 0.0
    greedy, temper = tl.full((), 1, tl.int1), 1.0
    if SAMPLE:
        greedy, temper = temperature_of(temperature, row)
        k, p, m = setting(top_k, row), setting(top_p, row), setting(min_p, row)
        usable = (temper > 0.0) & (temper < float("inf")) & (k >= 0)
        usable &= (p >= 0.0) & (p <= 1.0) & (m >= 0.0) & (m <= 1.0)
        good &= greedy | usable
        k, p, m = tl.where(greedy, 0, k), tl.where(greedy, 1.0, p), tl.where(greedy, 0.0, m)

    token = 0
    score = 0.0
    tempered = 1.0
    if TRUNCATE:
        if good:
            x = scores + row.to(tl.int64) * vocab
            threshold = truncation(x, vocab, top, temper, k, p, m, BLOCKS, BLOCK)
            best = NEG_INF + 0.0
            tempered = 0.0
            for block in range(BLOCKS):
                cols = block * BLOCK + tl.arange(0, BLOCK)
                s = tl.load(x + cols, mask=cols < vocab, other=NEG_INF)
                s = tl.where(s >= threshold, s, NEG_INF)
                if tl.max(s) > NEG_INF:
                    below = (s - top) / temper
                    tempered += tl.sum(tl.exp(below))
                    noise = tile_noise(
                        block * BLOCK, seed, seed_high, stream, stream_high, step, row, BLOCK
                    )
                    value = tl.where(greedy, s, below + noise)
                    leader = tl.max(value)
                    if leader > best:  # not on a tie: the lower id wins
                        best = leader
                        index = tl.argmax(value, axis=0)
                        token = block * BLOCK + index
                        score = tl.max(tl.where(cols == token, s, NEG_INF))
    else:
        t = tl.arange(0, TILES)
        value = tl.load(partials + size * VALUE + t, mask=t < tiles, other=NEG_INF)
        if SAMPLE:
            tops = tl.load(partials + size * TOP + t, mask=t < tiles, other=NEG_INF)
            parts = tl.load(partials + size * TEMPERED + t, mask=t < tiles, other=0.0)
            below = (tops - tl.where(good, top, 0.0)) / temper
            tempered = tl.sum(parts * tl.exp(below))
            value += tl.where(greedy, 0.0, below)
        tile = tl.minimum(tl.argmax(value, axis=0), tiles - 1)  # a bad row may hold anything
        score = tl.load(partials + size * SCORE + tile)
        token = tile * BLOCK + tl.load(partials + size * INDEX + tile).to(tl.int32)

    tl.store(tokens + row, tl.where(good, token, -1).to(tl.int64))
    below = tl.where(good, score - top, float("nan"))
    tl.store(logprobs + row, below - tl.log(tl.where(good, total, 1.0)))
    sampled = below / temper - tl.log(tl.where(good, tempered, 1.0))
    tl.store(sampled_logprobs + row, tl.where(greedy, below - below, sampled))  # 0, or NaN
    if term_logprobs is not None:
        term_partials += row.to(tl.int64) * tiles
        for n in tl.static_range(len(terms)):
            term_top, mass = combine(term_partials, size, 2 * n, tiles, TILES)
            log_p = (load_row(terms[n], strides[n], row, token, vocab) - term_top) - tl.log(mass)
            tl.store(term_logprobs + row * len(terms) + n, tl.where(good, log_p, float("nan")))
