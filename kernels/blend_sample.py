"""Blend and sample in Triton: tiles of a row in parallel, then one program for each row.

`blend_tiles` reads every input once and leaves, for each group of tokens, its largest score and its
sums of exponentials. `choose` takes the group with the largest log-mass under the noise of groups,
and of its tokens, whose scores it makes again, the one with the largest score under the noise of
tokens. With truncation the scores are written to scratch memory, in which `choose` finds their
threshold without a sort, and then the sums of what is left in each group. A power mean takes one
more read, by `term_tiles` of terms.py, and so do parts, and what terms pushed, by `push_tiles`.
"""

import triton
import triton.language as tl

from .noise import GROUPS, TOKENS, noise_of
from .terms import (
    NEG_INF,
    blend_scores,
    combine,
    load_row,
    normaliser,
    place_of,
    setting,
    weight_of,
)
from .threshold import exp_over, inverse_of, key_of, list_groups, load_listed, truncation

# Planes of `partials` [PLANES, B, groups] float32.
PLANES = 3
TOP = tl.constexpr(0)  # the group's largest score
SUM = tl.constexpr(1)  # the sum of exp(score - TOP); NaN where the row is bad
TEMPERED = tl.constexpr(2)  # the sum of exp((score - TOP) / temperature)

# Numbers that change from call to call. Triton must not compile a new kernel for each value.
SIZES = ["rows", "tiles", "groups"]
PER_CALL = ["seed", "seed_high", "stream", "stream_high", "step", "first_token", "top_k", *SIZES]

FACTS = tl.constexpr(7)  # what is told of a shard's draw


@triton.jit
def temperature_of(temperature, row):
    """Whether a row is greedy, as temperature 0 says, and its temperature, or else 1."""
    t = setting(temperature, row)
    return t == 0.0, tl.where(t == 0.0, 1.0, t)


@triton.jit
def sum_of_exp(x, top, t):
    """The sums of exp((x - top) / t) of groups x [groups, GROUP], whose largest are `top`."""
    return tl.sum(exp_over(x - tl.where(top == NEG_INF, 0.0, top)[:, None], t), axis=1)


@triton.jit(do_not_specialize=SIZES)
def blend_tiles(
    partials,  # [PLANES, B, groups] float32
    scores,  # [B, V] float32 scratch for the blend, -inf where a token is removed; or None
    term_partials,  # [2 K, B, tiles] float32, or None
    blend,  # a Blend of terms.py
    temperature,
    rows,
    vocab,
    tiles,
    MEAN: tl.constexpr,  # whether it is a power mean
    NORMED: tl.constexpr,  # whether term_partials are an input: of a power mean or of parts
    SAMPLE: tl.constexpr,  # whether to fill the plane TEMPERED
    GROUP: tl.constexpr,  # tokens of a group
    BLOCK: tl.constexpr,  # tokens of a tile
    TILES: tl.constexpr,  # the tiles that a loop takes at once
):
    """Computes the scores of one tile of one row. Grid (B, tiles)."""
    row, tile = place_of()
    size = rows.to(tl.int64) * tiles
    if term_partials is not None:
        term_partials += row.to(tl.int64) * tiles
    score, ok = blend_scores(
        blend, term_partials, size, tiles, TILES, row, tile * BLOCK, vocab, MEAN, NORMED, BLOCK
    )
    if scores is not None:
        cols = tile * BLOCK + tl.arange(0, BLOCK)
        tl.store(scores + row.to(tl.int64) * vocab + cols, score, mask=cols < vocab)

    COUNT: tl.constexpr = BLOCK // GROUP
    size *= COUNT
    partials += (row.to(tl.int64) * tiles + tile) * COUNT + tl.arange(0, COUNT)
    x = tl.reshape(score, [COUNT, GROUP])
    top = tl.max(x, axis=1)
    total = sum_of_exp(x, top, 1.0)
    tl.store(partials + size * TOP, top)
    tl.store(partials + size * SUM, tl.where(ok, total, float("nan")))
    if SAMPLE:
        _, t = temperature_of(temperature, row)
        mass = total
        if t != 1.0:
            mass = sum_of_exp(x, top, t)
        tl.store(partials + size * TEMPERED, mass)


@triton.jit(do_not_specialize=SIZES)
def normalise(
    scores, partials, rows, vocab, tiles,
    RAW: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Turns scores into log-probs in place, NaN in a bad row. With RAW other rows stay as they are,
    and one in which no token is left is not bad. Its groups are tiles. Grid (B, tiles)."""
    row, tile = place_of()
    cols = tile * BLOCK + tl.arange(0, BLOCK)
    partials += row.to(tl.int64) * tiles
    top, total = combine(partials, rows.to(tl.int64) * tiles, TOP, tiles, TILES)
    at = scores + row.to(tl.int64) * vocab + cols
    x = tl.load(at, mask=cols < vocab)
    if RAW:
        good = total >= 0.0
    else:
        good = total > 0.0
        log_total = tl.log(tl.where(good, total, 1.0))
        x = (x - tl.where(good, top, 0.0)) - log_total
    tl.store(at, tl.where(good, x, float("nan")), mask=cols < vocab)


# ---- Sampling ------------------------------------------------------------------------------------


@triton.jit
def store_fact(at, good, empty, fact, NONE: tl.constexpr):
    """Stores what a shard knows of a row: NONE where no token is left, and NaN where it is bad."""
    tl.store(at, tl.where(good, fact, tl.where(empty, NONE, float("nan"))))


@triton.jit(do_not_specialize=PER_CALL)
def choose(
    tokens,  # [B] int64
    logprobs,  # [B] float32, or None with shards, as the next two are
    sampled_logprobs,  # [B] float32
    term_logprobs,  # [B, K] float32, or None
    shards,  # [B, FACTS] float32, a crossfade::Shard of csrc/crossfade.h each; or None
    partials,
    scores,  # with TRUNCATE
    listed,  # [B, groups] int32 scratch, with TRUNCATE
    term_partials,
    blend,
    temperature,
    top_k,
    top_p,
    min_p,
    seed,
    seed_high,
    stream,
    stream_high,
    step,
    first_token,  # with shards: the token that the first column is
    rows,
    vocab,
    tiles,
    groups,
    MEAN: tl.constexpr,
    NORMED: tl.constexpr,
    SAMPLE: tl.constexpr,
    TRUNCATE: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,  # with TRUNCATE: the tokens that a loop takes at once
    CHUNK: tl.constexpr,  # the groups that a loop takes at once
    TILES: tl.constexpr,  # the tiles that a loop takes at once
):
    """Takes one token for each row: a group of tokens by its mass, then one of its tokens. With
    TRUNCATE both are of what truncation leaves. With shards the columns are one of a vocabulary's,
    and what it knows of the draw is told. Grid (B,)."""
    row = tl.program_id(0)
    size = rows.to(tl.int64) * groups
    partials += row.to(tl.int64) * groups
    term_size = rows.to(tl.int64) * tiles
    if term_partials is not None:
        term_partials += row.to(tl.int64) * tiles
    top, total = combine(partials, size, TOP, groups, CHUNK)
    good = total > 0.0
    empty = total == 0.0
    greedy, temper = tl.full((), 1, tl.int1), tl.full((), 1.0, tl.float32)
    if SAMPLE:
        greedy, temper = temperature_of(temperature, row)
        k, p, m = setting(top_k, row), setting(top_p, row), setting(min_p, row)
        usable = (temper > 0.0) & (temper < float("inf")) & (k >= 0)
        usable &= (p >= 0.0) & (p <= 1.0) & (m >= 0.0) & (m <= 1.0)
        good &= greedy | usable
        empty &= greedy | usable
        k, p, m = tl.where(greedy, 0, k), tl.where(greedy, 1.0, p), tl.where(greedy, 0.0, m)

    SHARD: tl.constexpr = shards is not None
    from_token = first_token if SHARD else 0
    token = -1
    score = 0.0
    tempered = 1.0
    group_mass = 0.0  # with shards: the log of the winning group's, its noise and its token's
    group_noise = 0.0
    token_noise = 0.0
    if good:
        threshold = top * 0.0 + NEG_INF
        if TRUNCATE:  # finds the masses of what is left
            x = scores + row.to(tl.int64) * vocab
            listed += row.to(tl.int64) * groups
            at_top = partials + size * TOP
            threshold = truncation(
                x, vocab, at_top, listed, groups, top, temper, k, p, m, GROUP, BLOCK, CHUNK
            )
            count = list_groups(listed, at_top, groups, key_of(threshold), CHUNK)
            for block in range(tl.cdiv(count, BLOCK // GROUP)):
                s, j = load_listed(x, vocab, listed, count, block, GROUP, BLOCK)
                s = tl.where(s >= threshold, s, NEG_INF)
                mass = sum_of_exp(s, tl.max(s, axis=1), temper)
                tl.store(partials + size * TEMPERED + j, mass, mask=j >= 0)
            tl.debug_barrier()

        inverse = inverse_of(temper)
        best = NEG_INF + 0.0
        group = 0
        tempered = 0.0
        for first in range(0, groups, CHUNK):
            j = tl.arange(0, CHUNK) + first
            tops = tl.load(partials + size * TOP + j, mask=j < groups, other=NEG_INF)
            tops = tl.where(tops >= threshold, tops, NEG_INF)
            value = tops
            if SAMPLE:
                # A group of which nothing is left is out by its -inf; else its mass is >= 1.
                left = tops > NEG_INF
                masses = tl.load(partials + size * TEMPERED + j, mask=left, other=1.0)
                below = (tops - top) * inverse
                tempered += tl.sum(masses * tl.exp(below))
                logs = below + tl.log(masses)
                noise = noise_of(
                    GROUPS, from_token // GROUP + first, seed, seed_high, stream, stream_high, step,
                    row, CHUNK, SHARD,
                )  # fmt: skip
                value = tl.where(greedy, tops, logs + noise)
            leader = tl.max(value)
            if leader > best:  # not on a tie: the lower group wins
                best = leader
                group = tl.argmax(value, axis=0) + first
                if SHARD and SAMPLE:
                    group_mass = tl.where(greedy, 0.0, tl.max(tl.where(j == group, logs, NEG_INF)))
                    group_noise = tl.max(tl.where(j == group, noise, NEG_INF))

        first = group * GROUP
        if TRUNCATE:
            cols = first + tl.arange(0, GROUP)
            s = tl.load(x + cols, mask=cols < vocab, other=NEG_INF)
            s = tl.where(s >= threshold, s, NEG_INF)
        else:
            s, _ = blend_scores(
                blend, term_partials if NORMED else None, term_size, tiles, TILES, row, first,
                vocab, MEAN, NORMED, GROUP,
            )  # fmt: skip
        value = s
        if SAMPLE:
            noise = noise_of(
                TOKENS, from_token + first, seed, seed_high, stream, stream_high, step, row,
                GROUP, SHARD,
            )  # fmt: skip
            value = tl.where(greedy, s, (s - tl.max(s)) * inverse + noise)
        index = tl.argmax(value, axis=0)
        token = first + index
        score = tl.max(tl.where(tl.arange(0, GROUP) == index, s, NEG_INF))
        if SHARD and SAMPLE:
            token_noise = tl.max(tl.where(tl.arange(0, GROUP) == index, noise, NEG_INF))

    below = tl.where(good, score - top, float("nan"))
    if SHARD:
        tl.store(tokens + row, tl.where(good, token + first_token, -1).to(tl.int64))
        log_sum = tl.log(tl.where(good, total, 1.0))
        shards += row.to(tl.int64) * FACTS
        store_fact(shards, good, empty, top, NEG_INF)
        store_fact(shards + 1, good, empty, log_sum, NEG_INF)
        store_fact(shards + 2, good, empty, tl.log(tempered) if SAMPLE else log_sum, NEG_INF)
        store_fact(shards + 3, good, empty, group_mass, NEG_INF)
        store_fact(shards + 4, good, empty, tl.where(greedy, 0.0, group_noise), 0.0)
        store_fact(shards + 5, good, empty, below, NEG_INF)
        store_fact(shards + 6, good, empty, tl.where(greedy, 0.0, token_noise), 0.0)
    else:
        tl.store(tokens + row, token.to(tl.int64))
        tl.store(logprobs + row, below - tl.log(tl.where(good, total, 1.0)))
        sampled = below - below  # 0, or NaN
        if SAMPLE:
            sampled = tl.where(greedy, sampled, below / temper - tl.log(tempered))
        tl.store(sampled_logprobs + row, sampled)
    if term_logprobs is not None:
        for n in tl.static_range(len(blend.terms)):
            term_top, mass = normaliser(blend, term_partials, term_size, n, row, tiles, TILES)
            z = load_row(blend.terms[n], blend.strides[n], row, tl.maximum(token, 0), vocab)
            log_p = (z - term_top) - tl.log(mass)
            at = term_logprobs + row.to(tl.int64) * len(blend.terms) + n
            tl.store(at, tl.where(good, log_p, float("nan")))


# ---- What pushed the token -----------------------------------------------------------------------


@triton.jit
def push_of(w, p, x, at_token):
    """w E[x(token) - x] of a tile's x, with the probabilities p; NaN if it is not finite."""
    push = w * tl.sum(tl.where(p > 0.0, p * (at_token - x), 0.0))
    return tl.where(tl.abs(push) < float("inf"), push, float("nan"))


@triton.jit
def departure(blend, k: tl.constexpr, row, cols, vocab):
    """What a term's logits are above the first term's."""
    z = load_row(blend.terms[k], blend.strides[k], row, cols, vocab)
    return z - load_row(blend.terms[0], blend.strides[0], row, cols, vocab)


@triton.jit(do_not_specialize=SIZES)
def push_tiles(
    pushes,  # [B, K + M, tiles] float32: to be summed over the tiles
    tokens,  # [B] int64
    partials,
    blend,  # without a power mean and parts
    rows,
    vocab,
    tiles,
    groups,
    BLOCK: tl.constexpr,  # tokens of a tile
    CHUNK: tl.constexpr,  # the groups that a loop takes at once
    TILES: tl.constexpr,  # the tiles that a loop takes at once
):
    """Each term's and each value's push, as far as it is of one tile of a row. Grid (B, tiles)."""
    row, tile = place_of()
    size = rows.to(tl.int64) * groups
    top, total = combine(partials + row.to(tl.int64) * groups, size, TOP, groups, CHUNK)
    score, _ = blend_scores(
        blend, None, size, tiles, TILES, row, tile * BLOCK, vocab, False, False, BLOCK
    )
    p = tl.exp(score - top) / total
    token = tl.load(tokens + row)
    good = token >= 0
    nothing = tl.where(good, 0.0, float("nan"))
    token = tl.maximum(token, 0)
    cols = tile * BLOCK + tl.arange(0, BLOCK)

    K: tl.constexpr = len(blend.terms)
    M: tl.constexpr = 0 if blend.value_terms is None else len(blend.value_terms)
    pushes += row.to(tl.int64) * (K + M) * tiles + tile
    tl.store(pushes, nothing)  # the first term's
    for k in tl.static_range(1, K):
        w, push = weight_of(blend.weights, blend.weight_stride, row, k), nothing
        if good & (w != 0.0):
            at_token = departure(blend, k, row, token, vocab)
            push = push_of(w, p, departure(blend, k, row, cols, vocab), at_token)
        tl.store(pushes + k * tiles, push)
    for m in tl.static_range(M):
        w, push = weight_of(blend.value_weights, blend.value_weight_stride, row, m), nothing
        if good & (w != 0.0):
            q, stride = blend.value_terms[m], blend.value_strides[m]
            at_token = load_row(q, stride, row, token, vocab)
            push = push_of(w, p, load_row(q, stride, row, cols, vocab), at_token)
        tl.store(pushes + (K + m) * tiles, push)
