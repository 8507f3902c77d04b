"""Top-k, top-p and min-p of one row in Triton: a threshold without a sort.

The rules are those of `keep` in ops/reference.py; ties are kept.
"""

import triton
import triton.language as tl

NEG_INF = tl.constexpr(float("-inf"))
LOWEST_KEY = tl.constexpr(-2139095041)  # key_of(-inf)
INT_MIN = tl.constexpr(-(2**31))
INT_MAX = tl.constexpr(2**31 - 1)


@triton.jit
def key_of(x):
    """float32 numbers as int32 keys that sort in the same order. -0 and +0 share a key."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def float_of_key(key):
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def search(
    x,
    vocab,
    top,
    temperature,
    lo,
    target,
    COUNT: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The largest key, from `lo` on, such that the tokens from it up reach the target.

    With COUNT the target is a number of tokens, else a share of the mass exp((x - top) /
    temperature) from `lo` up. Each pass narrows [lo, hi) with eight pivots. The lower end always
    reaches the target, and the upper end never does. Both ends move on to scores that exist, so
    that a run of equal scores ends the search at once.
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
        for block in range(BLOCKS):
            cols = block * BLOCK + tl.arange(0, BLOCK)
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
def truncation(
    x, vocab, top, temperature, top_k, top_p, min_p, BLOCKS: tl.constexpr, BLOCK: tl.constexpr
):
    """The score from which top-k, then top-p, then min-p keep the tokens of one row `x`."""
    lo = tl.full((), LOWEST_KEY, tl.int32)
    if (top_k > 0) & (top_k < vocab):
        lo = search(x, vocab, top, temperature, lo, top_k, True, BLOCKS, BLOCK)
    if top_p < 1.0:
        lo = search(x, vocab, top, temperature, lo, top_p, False, BLOCKS, BLOCK)
    log_min_p = tl.where(min_p > 0.0, tl.log(tl.where(min_p > 0.0, min_p, 1.0)), NEG_INF)
    by_min_p = top + temperature * log_min_p
    by_rank = float_of_key(lo)
    return tl.where(by_min_p < by_rank, by_rank, by_min_p)  # NaN stays: nothing is kept
