"""Blend and sample in Triton: tiles of a row in parallel, then one program for each row.

`blend_tiles` reads every input once and leaves, for each tile of a row, its largest score, its sum
of exponentials and (without truncation) the best candidate under the noise; `choose` puts the tiles
of a row together. With truncation the scores are written to scratch memory, in which `choose` finds
their threshold without a sort. A power mean takes one more read, by `term_tiles` of terms.py.
"""

import triton
import triton.language as tl

from .noise import tile_noise
from .terms import NEG_INF, combine, load_row, power_mean, setting, weighted_sum
from .threshold import truncation

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


@triton.jit
def temperature_of(temperature, row):
    """Whether a row is greedy, as temperature 0 says, and what to divide its scores by."""
    t = setting(temperature, row)
    return t == 0.0, tl.where(t == 0.0, 1.0, t)


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
