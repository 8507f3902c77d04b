// What the CPU and the CUDA kernels both compute: the sampling noise, the power mean, and the search
// for a truncation threshold. Compiles for host and device; the CPU tests cover both.
//
// Functions are templates over the word or number type where the CPU runs them on vectors: cpu/simd.h
// declares mulhilo, exp and log for those before it includes this file.
#pragma once
#include <math.h>
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define CF_HD __host__ __device__ __forceinline__
#else
#define CF_HD inline
#endif

// The CPU kernels are compiled once for each instruction set. A namespace of its own keeps each
// one's inline functions from standing in for another's at link time.
#ifndef CF_ISA
#define CF_ISA baseline
#endif

namespace crossfade {
inline namespace CF_ISA {

// ---- Noise: Philox-4x32-10 (Salmon et al., SC 2011) and Gumbel's distribution --------------------

CF_HD void mulhilo(uint32_t a, uint32_t b, uint32_t& hi, uint32_t& lo) {
  const uint64_t product = static_cast<uint64_t>(a) * b;
  hi = static_cast<uint32_t>(product >> 32);
  lo = static_cast<uint32_t>(product);
}

// Four words of noise. Token v of a row takes word v % 4 of the counter
// (v / 4, step, low word of stream, high word of stream) under the key (low, high word of seed).
template <class U>
struct Words {
  U w[4];
};

template <class U>
CF_HD Words<U> philox(U token_div_4, uint32_t step, uint64_t stream, uint64_t seed) {
  Words<U> c{{token_div_4, U{} + step, U{} + static_cast<uint32_t>(stream),
              U{} + static_cast<uint32_t>(stream >> 32)}};
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
#ifdef __CUDACC__
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

// Gumbel noise -log E of one word, E = -log((h + 1/2) / 2^32): within [kNoiseMin, kNoiseMax], and
// exact near u = 1, where h + 1/2 has no float32 of its own.
constexpr float kNoiseMin = -3.14f, kNoiseMax = 22.88f;

CF_HD float gumbel(uint32_t h) {
  constexpr float ulp = 1.0f / 4294967296.0f;
  const float e = h < 0x80000000u ? -logf((static_cast<float>(h) + 0.5f) * ulp)
                                  : -log1pf(-(static_cast<float>(~h) + 0.5f) * ulp);
  return -logf(e);
}

// ---- Order: float32 as integers that sort alike --------------------------------------------------

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

// ---- Threshold: top-k and top-p without a sort ---------------------------------------------------

// Finds the largest key x with W{key >= x} >= target, digit by digit from the top: W counts tokens
// (top-k) or adds up their mass (top-p). Every token equal to the threshold is kept. Each round
// fills a histogram over digit() of the keys in_play(), then descend() picks a digit.
struct RadixSearch {
  static constexpr int kBits[3] = {11, 11, 10};
  static constexpr int kBins = 1 << 11;

  double target;      // > 0
  double above = 0;   // W of the keys known to lie above the threshold
  uint32_t prefix = 0;
  int round = 0, shift = 32;

  CF_HD explicit RadixSearch(double target) : target(target) { shift -= bits(); }
  CF_HD int bits() const { return round < 2 ? 11 : 10; }
  CF_HD bool done() const { return round == 3; }
  CF_HD bool in_play(uint32_t key) const {
    return round == 0 || (key ^ prefix) >> (shift + bits()) == 0;
  }
  CF_HD uint32_t digit(uint32_t key) const { return (key >> shift) & ((1u << bits()) - 1); }
  CF_HD uint32_t threshold() const { return prefix; }

  // `digit` is the first from the top at which W reaches the target, `over` is W of the digits
  // above it in this round's histogram.
  CF_HD void descend_to(uint32_t digit, double over) {
    above += over;
    prefix |= digit << shift;
    if (++round < 3) shift -= bits();
  }

  // The same from the histogram itself. Rounding may leave the total just under the target: then
  // the lowest digit in use is the one.
  template <class T>
  CF_HD void descend(const T* histogram) {
    double over = 0, over_found = 0;
    uint32_t found = 0;
    for (uint32_t d = 1u << bits(); d-- > 0;) {
      if (histogram[d] == T{0}) continue;
      found = d;
      over_found = over;
      over += static_cast<double>(histogram[d]);
      if (above + over >= target) break;
    }
    descend_to(found, over_found);
  }
};

// ---- Power mean ----------------------------------------------------------------------------------

// log of (sum_k w_k p_k^r)^(1/r), r != 0, from log_p[k] = log p_k and log_w[k] = log w_k (-inf for
// a term without weight). A token without mass in some term has none in the blend for r < 0.
template <class F>
CF_HD F log_power_mean(const F* log_p, const float* log_w, int terms, float r) {
  const float none = -INFINITY;
  F top = F{} + none;
  for (int k = 0; k < terms; ++k) {
    if (log_w[k] == none) continue;
    const F a = log_p[k] * r + log_w[k];
    top = a > top ? a : top;
  }
  F sum = F{};
  for (int k = 0; k < terms; ++k) {
    if (log_w[k] == none) continue;
    const F a = log_p[k] * r + log_w[k];
    sum += exp(a - top);
  }
  const F mean = (top + log(sum)) * (1.0f / r);
  // top is -inf where every term is without mass (r > 0), +inf where one is (r < 0)
  return top > none ? (top < -none ? mean : F{} + none) : F{} + none;
}

// Weights of a power mean: none negative, and a sum of one.
constexpr float kWeightSumTolerance = 1e-3f;

}  // namespace CF_ISA
}  // namespace crossfade
