// What the CPU and the CUDA kernels both compute: the sampling noise, keys that sort as numbers do,
// the power mean and the pushes of parts. It compiles for the host and for the device.
//
// Where the CPU runs a function on vectors, it is a template over the type of word or number:
// cpu/simd.h declares mulhilo, exp and log of vectors before it includes this file.
#pragma once
#include <math.h>
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define CF_HD __host__ __device__ __forceinline__
#else
#define CF_HD inline
#endif

// The CPU kernels are compiled once for each instruction set, each in a namespace of its own. Else
// the linker would take one set's inline functions for another's.
#ifndef CF_ISA
#define CF_ISA baseline
#endif

namespace crossfade {
inline namespace CF_ISA {

// ---- Noise: Philox-4x32-10 (Salmon et al., SC 2011) and Gumbel's distribution ------------------
//
// A token is drawn on two levels. With x_v the tempered scores of the tokens that are left, and
// M_j = log sum of e^x_v over group j, the group is argmax_j M_j + g_j, and the token is
// argmax_v x_v + n_v of that group. Ties go to the lower index. That is exact, as the noises g of
// groups and n of tokens are independent.

constexpr int kGroup = 256;  // group j holds the tokens from 256 j to 256 j + 255

CF_HD void mulhilo(uint32_t a, uint32_t b, uint32_t& hi, uint32_t& lo) {
#ifdef __CUDA_ARCH__
  // If the product is written in C++, ptxas 13.0 adds a zero to each high word.
  asm("{ .reg .u64 product; mul.wide.u32 product, %2, %3; mov.b64 {%1, %0}, product; }"
      : "=r"(hi), "=r"(lo)
      : "r"(a), "r"(b));
#else
  const uint64_t product = static_cast<uint64_t>(a) * b;
  hi = static_cast<uint32_t>(product >> 32);
  lo = static_cast<uint32_t>(product);
#endif
}

// Four words of noise, from the counter (c, step, low word of stream, high word of stream) under
// the key (low, high word of seed). Token v takes word v % 4 of c = v / 4, and group j takes word
// j % 4 of c = kGroupNoise | j / 4.
constexpr uint32_t kGroupNoise = 0x80000000u;

template <class U>
struct Words {
  U w[4];
};

template <class U>
CF_HD Words<U> philox(U counter, uint32_t step, uint64_t stream, uint64_t seed) {
  Words<U> c{{counter, U{} + step, U{} + static_cast<uint32_t>(stream),
              U{} + static_cast<uint32_t>(stream >> 32)}};
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
#ifdef __CUDA_ARCH__
#pragma unroll
#endif
  for (int round = 0; round < 10; ++round) {
    U hi0, lo0, hi1, lo1;
    mulhilo(c.w[0], 0xD2511F53u, hi0, lo0);
    mulhilo(c.w[2], 0xCD9E8D57u, hi1, lo1);
    c = {{hi1 ^ c.w[1] ^ k0, lo1, hi0 ^ c.w[3] ^ k1, lo0}};
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return c;
}

// Gumbel noise -log E of one word, E = -log((h + 1/2) / 2^32): within [-3.14, 22.88], and exact
// near u = 1, where h + 1/2 has no float32 of its own.
CF_HD float gumbel(uint32_t h) {
  constexpr float ulp = 1.0f / 4294967296.0f;
  const float e = h < 0x80000000u ? -logf((static_cast<float>(h) + 0.5f) * ulp)
                                  : -log1pf(-(static_cast<float>(~h) + 0.5f) * ulp);
  return -logf(e);
}

// ---- Order: float32 as integers that sort alike ------------------------------------------------

CF_HD uint32_t bits_of(float x) {
#ifdef __CUDA_ARCH__
  return __float_as_uint(x);
#else
  uint32_t u;
  std::memcpy(&u, &x, sizeof u);
  return u;
#endif
}

CF_HD float float_of(uint32_t u) {
#ifdef __CUDA_ARCH__
  return __uint_as_float(u);
#else
  float x;
  std::memcpy(&x, &u, sizeof x);
  return x;
#endif
}

// key_of(a) < key_of(b) where a < b; -0 and +0 share a key, as they compare equal.
CF_HD uint32_t key_of(float x) {
  const uint32_t u = bits_of(x + 0.0f);
  return u & 0x80000000u ? ~u : u | 0x80000000u;
}

CF_HD float float_of_key(uint32_t key) {
  return float_of(key & 0x80000000u ? key & 0x7FFFFFFFu : ~key);
}

// ---- Power mean --------------------------------------------------------------------------------

// e^x - 1 for x <= 0, to a few float32 steps. Near 0 the difference would lose its digits: there a
// series gives s = e^(x / 4) - 1, and (1 + s)^2 - 1 = s (s + 2), applied twice, the result.
template <class F>
CF_HD F expm1_of_negative(F x) {
  const F y = x * 0.25f;
  F s = y *
        (1.0f + y * (1.0f / 2 + y * (1.0f / 6 + y * (1.0f / 24 + y * (1.0f / 120 + y / 720.0f)))));
  s = s * (s + 2.0f);
  s = s * (s + 2.0f);
  return x > -1.4f ? s : exp(x) - 1.0f;
}

// log(1 + x) for x >= -1/2. The log of the rounded 1 + x is scaled by x over what is left of x.
template <class F>
CF_HD F log1p_of(F x) {
  const F u = 1.0f + x, one = F{} + 1.0f;
  return u == 1.0f ? x : log(u) * (x / (u == 1.0f ? one : u - 1.0f));
}

// log (sum_k w_k p_k^r)^(1/r) for r != 0 and weights with a sum of one, a term at a time. With a_k
// = r log p_k and `ref` the log p_k of the largest a_k, it is
//   ref + log1p(sum_k w_k expm1(a_k - r ref)) / r,
// which stays right for small r, where a log-sum-exp's rounding would be divided by r. For r = inf
// it is the largest log p_k, and for r = -inf the smallest.
template <class F>
struct PowerMean {
  F bound{};  // r > 0: the largest log p_k, r < 0: the smallest; -inf: no mass in the blend
  F ref{}, excess{}, sum{};  // sum_k w_k expm1(a_k - r ref) and sum_k w_k exp(a_k - r ref)

  // `before` is the sum of the weights of the terms that were added before.
  CF_HD void add(F log_p, float w, float before, float r) {
    const F p =
        log_p > -1e30f ? log_p : F{} - 1e30f;  // finite, for the arithmetic; `bound` knows better
    if (before == 0) {
      bound = log_p;
      ref = p;
      sum = F{} + w;
      return;
    }
    bound = (r > 0 ? log_p > bound : log_p < bound) ? log_p : bound;
    if (fabsf(r) == INFINITY) return;
    const F a = (p - ref) * r, d = a > 0.0f ? -a : a;
    const F e = exp(d), m = expm1_of_negative(d);
    excess = a > 0.0f ? excess * e + before * m : excess + w * m;
    sum = a > 0.0f ? sum * e + w : sum + w * e;
    ref = a > 0.0f ? p : ref;
  }

  CF_HD F result(float r) const {
    if (fabsf(r) == INFINITY) return bound;
    const F mean = ref + (excess > -0.5f ? log1p_of(excess) : log(sum)) / r;
    return bound > -INFINITY ? mean : F{} - INFINITY;
  }
};

// The push of a part (see crossfade.h), a term at a time.
template <class F>
struct Push {
  F sum{}, extreme{};
  float weights = 0;  // their sum
  bool any = false;

  CF_HD void add(F log_p, float u, float power) {
    if (power == 0) {
      sum = sum + log_p * u;
    } else {
      extreme = !any || (power > 0 ? log_p > extreme : log_p < extreme) ? log_p : extreme;
    }
    weights += u;
    any = true;
  }

  // -inf where the token is removed: where nothing clamps a push that is infinite, and where it is
  // the difference of two infinities.
  CF_HD F result(float power, float min, float max) const {
    F push = power == 0 ? sum : extreme * weights;
    push = push < min ? F{} + min : push;
    push = push > max ? F{} + max : push;
    return (push > -INFINITY) & (push < INFINITY) ? push : F{} - INFINITY;
  }
};

// How far from one the weights of a power mean may sum to.
constexpr float kWeightSumTolerance = 1e-3f;

}  // namespace CF_ISA
}  // namespace crossfade
