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
def inverse_of(t):
    """1 / t, which is finite: 0 times it must be 0 for the lowest temperatures too."""
    return tl.minimum(tl.div_rn(1.0, t), 3.4e38)


@triton.jit
def exp_over(x, t):
    """exp(x / t), as 2^(x / (t ln 2)): a GPU has an instruction for powers of two."""
    return tl.exp2(x * inverse_of(t * 0.6931471805599453))


@triton.jit
def list_groups(listed, tops, groups, lo, CHUNK: tl.constexpr):
    """Lists the groups that have a key from `lo` on, in their order, and counts them."""
    count = 0
    tl.debug_barrier()  # all threads have read the list that was there
    for first in range(0, groups, CHUNK):
        j = tl.arange(0, CHUNK) + first
        top = tl.load(tops + j, mask=j < groups, other=NEG_INF)
        on = ((key_of(top) >= lo) & (j < groups)).to(tl.int32)
        tl.store(listed + count + tl.cumsum(on, axis=0) - 1, j, mask=on > 0)
        count += tl.sum(on)
    tl.debug_barrier()
    return count


@triton.jit
def load_listed(x, vocab, listed, count, block, GROUP: tl.constexpr, BLOCK: tl.constexpr):
    """A block's share of the listed groups: their scores [BLOCK / GROUP, GROUP], and which they
    are, -1 after the last one."""
    n = tl.arange(0, BLOCK // GROUP) + block * (BLOCK // GROUP)
    j = tl.load(listed + n, mask=n < count, other=-1)
    cols = j[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    inside = (j >= 0)[:, None] & (cols < vocab)
    return tl.load(x + cols, mask=inside, other=NEG_INF).to(tl.float32), j


@triton.jit
def search(
    x,
    vocab,
    tops,
    listed,
    groups,
    top,
    temperature,
    lo,
    target,
    COUNT: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """The largest key, from `lo` on, such that the tokens from it up reach the target.

    With COUNT the target is a number of tokens, else a share of the mass exp((x - top) /
    temperature) from `lo` up. Each pass narrows [lo, hi) with eight pivots. The lower end always
    reaches the target, and the upper end never does. Both ends move on to scores that exist, so
    that a run of equal scores ends the search at once.

    With `tops`, the largest scores of groups of x, a pass reads only the groups that reach `lo`.
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
        blocks = (vocab - 1) // BLOCK + 1
        count = 0
        if tops is not None:
            count = list_groups(listed, tops, groups, first, CHUNK)
            blocks = tl.cdiv(count, BLOCK // GROUP)
        for block in range(blocks):
            if tops is not None:
                score, _ = load_listed(x, vocab, listed, count, block, GROUP, BLOCK)
                score = tl.reshape(score, [BLOCK])
            else:
                cols = tl.arange(0, BLOCK) + block * BLOCK
                score = tl.load(x + cols, mask=cols < vocab, other=NEG_INF)
            key = key_of(score)
            reaches = key[None, :] >= pivots[:, None]
            if COUNT:
                above += reaches.to(tl.int32)
            else:
                mass = exp_over(score - top, temperature)
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
    x, vocab, tops, listed, groups, top, temperature, top_k, top_p, min_p,
    GROUP: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """The score from which top-k, then top-p, then min-p keep the tokens of one row `x`.

    `tops` are the largest scores of its `groups`, and `listed` has room for as many int32.
    """
    lo = tl.full((), LOWEST_KEY, tl.int32)
    if (top_k > 0) & (top_k < vocab):
        # The k-th largest of `tops` bounds the threshold from below, as k groups reach it.
        if top_k < groups:
            lo = search(
                tops, groups, None, listed, groups, top, temperature, lo, top_k, True,
                GROUP, BLOCK, CHUNK,
            )  # fmt: skip
        lo = search(
            x, vocab, tops, listed, groups, top, temperature, lo, top_k, True, GROUP, BLOCK, CHUNK
        )
    if top_p < 1.0:
        lo = search(
            x, vocab, tops, listed, groups, top, temperature, lo, top_p, False, GROUP, BLOCK, CHUNK
        )
    log_min_p = tl.where(min_p > 0.0, tl.log(tl.where(min_p > 0.0, min_p, 1.0)), NEG_INF)
    by_min_p = top + temperature * log_min_p
    by_rank = float_of_key(lo)
    return tl.where(by_min_p < by_rank, by_rank, by_min_p)  # NaN stays: nothing is kept
