"""The sampling noise in Triton: Philox-4x32-10 and Gumbel's distribution.

The layout of counters and words is that of ops/reference.py and csrc/blend_math.h.
"""

import triton
import triton.language as tl

TOKENS, GROUPS = tl.constexpr(0), tl.constexpr(0x80000000)


@triton.jit
def philox(c0, c1, c2, c3, k0, k1):
    """Four uint32 words for each counter (c0, c1, c2, c3) under the key (k0, k1), all uint32.

    Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
    """
    m0 = tl.full(c0.shape, 0xD2511F53, tl.uint32)
    m1 = tl.full(c0.shape, 0xCD9E8D57, tl.uint32)
    for _ in tl.static_range(10):
        hi0, lo0 = tl.umulhi(c0, m0), tl.mul(c0, m0, sanitize_overflow=False)
        hi1, lo1 = tl.umulhi(c2, m1), tl.mul(c2, m1, sanitize_overflow=False)
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0 = tl.add(k0, 0x9E3779B9, sanitize_overflow=False)
        k1 = tl.add(k1, 0xBB67AE85, sanitize_overflow=False)
    return c0, c1, c2, c3


@triton.jit
def log1m(y):
    """log(1 - y) for y within [0, 1/2], to a relative error of a few float32 steps.

    The log of the rounded 1 - y is scaled by y over the y that was left of it.
    """
    u = 1.0 - y
    left = tl.where(u == 1.0, 1.0, 1.0 - u)
    return tl.where(u == 1.0, -y, tl.log(u) * (y / left))


@triton.jit
def gumbel(h):
    """-log(-log u) of uint32 words h, with u = (h + 1/2) / 2^32. It is exact near u = 1 too."""
    low = h < 0x80000000
    y = (
        tl.where(low, h, h ^ 0xFFFFFFFF).to(tl.float32) + 0.5
    ) * 2.3283064365386963e-10  # within (0, 1/2]
    return -tl.log(-tl.where(low, tl.log(y), log1m(y)))


@triton.jit
def words(x, high, row):
    """A row's 64-bit setting as two uint32 words, from a pointer to [B] int64 or two numbers."""
    if x.dtype.is_ptr():
        both = tl.load(x + row)
        return both.to(tl.uint32), (both >> 32).to(tl.uint32)
    else:
        return x.to(tl.uint32), high.to(tl.uint32)


@triton.jit
def noise_of(
    LEVEL: tl.constexpr, first, seed, seed_high, stream, stream_high, step, row,
    COUNT: tl.constexpr, ANY: tl.constexpr = False,
):  # fmt: skip
    """A row's Gumbel noise [COUNT] of its tokens, or of its groups, from `first` on.

    Token v has word v % 4 of counter TOKENS | v // 4, and group j word j % 4 of GROUPS | j // 4.
    `first` is a multiple of 4 unless ANY: then each takes its word of a counter that it does not
    share, which is four times the work.
    """
    k0, k1 = words(seed, seed_high, row)
    c2, c3 = words(stream, stream_high, row)
    c1, _ = words(step, step, row)
    COUNTERS: tl.constexpr = COUNT if ANY else COUNT // 4
    n = tl.arange(0, COUNTERS)
    c0 = ((n + first) // 4 if ANY else n + first // 4).to(tl.uint32) | LEVEL
    same = tl.zeros([COUNTERS], tl.uint32)
    w0, w1, w2, w3 = philox(c0, same + c1, same + c2, same + c3, k0, k1)
    if ANY:
        nth = (n + first) % 4
        h = tl.where(nth < 2, tl.where(nth == 0, w0, w1), tl.where(nth == 2, w2, w3))
    else:
        h = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
    return gumbel(h)
