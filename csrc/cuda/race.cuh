// Gumbel-max: takes the token with the largest score * inv_t + noise, of a tie the lowest id. Noise
// is made only where a token can still win.
#pragma once
#include <cfloat>

#include "row_blend.cuh"

namespace crossfade {
namespace cuda {

constexpr uint32_t kNoToken = 0xFFFFFFFFu;

struct Best {
  float score = -INFINITY, noise = -INFINITY;
  uint32_t token = kNoToken;

  // It compares differences of scores, so that large scores cost no accuracy. Comparing `a` with
  // `b` and `b` with `a` gives the same winner.
  __device__ bool loses_to(const Best& other, float inv_t) const {
    const float lead = (other.score - score) * inv_t, handicap = noise - other.noise;
    return lead > handicap || (lead == handicap && other.token < token);
  }
  // The best of all lanes.
  __device__ Best over_warp(float inv_t) const {
    return warp_reduce(
        *this, [inv_t](const Best& a, const Best& b) { return a.loses_to(b, inv_t) ? b : a; });
  }
};

// Where a row's noise comes from.
struct Noise {
  uint64_t seed, stream;
  uint32_t step;

  __device__ Words<uint32_t> of_four(uint32_t v) const { return philox(v / 4, step, stream, seed); }
};

// One thread's part in a block's race. The block shares a bar: the key_of a sum of tempered score
// and noise that some token has reached, less a little. What stays below it cannot win. A thread
// may see the bar raised sooner or later; this changes what is computed, but never the result.
class Race {
 public:
  Best best;

  __device__ Race(const Noise& noise, const float& inv_t, uint32_t* bar)
      : noise_(noise), inv_t_(inv_t), bar_(bar) {}

  // Enters tokens v .. v + 7, which must ascend within a thread; those of score -inf take no part.
  // In the first round all threads of the block must call it: each enters its best token, and these
  // set a bar for the rest.
  __device__ void enter(uint32_t v, const Eight& s, float top, bool first_round) {
    uint32_t words[kWidth] = {};
    uint32_t open = can_win(top);
    if (open) {
      const Words<uint32_t> low = noise_.of_four(v), high = noise_.of_four(v + 4);
#pragma unroll
      for (uint32_t i = 0; i < 4; ++i) {
        words[i] = low.w[i];
        words[i + 4] = high.w[i];
      }
    }
    if (first_round) {
      const uint32_t leader = __ffs(which([&](uint32_t i) { return s[i] == top; })) - 1;
      if (open) take(v + leader, top, pick(words, leader));
      const uint32_t reached = warp_reduce(bar(), [](uint32_t a, uint32_t b) { return max(a, b); });
      if (lane_id() == 0) atomicMax(bar_, reached);
      __syncthreads();
      open = can_win(top);
    }
    if (!open) return;
    uint32_t most = words[0];
#pragma unroll
    for (uint32_t i = 1; i < kWidth; ++i) most = words[i] > most ? words[i] : most;
    if (~most >= open) return;  // nearly always no token can win
    uint32_t starters = which([&](uint32_t i) { return s[i] > -INFINITY && ~words[i] < open; });
    for (; starters; starters &= starters - 1) {
      const uint32_t i = __ffs(starters) - 1;
      enter(v + i, pick(s, i), pick(words, i));
    }
  }

  // Enters one token with its word of noise.
  __device__ void enter(uint32_t token, float score, uint32_t word) {
    if (take(token, score, word)) atomicMax(bar_, bar());
  }

  __device__ void enter(uint32_t token, float score) {
    const Words<uint32_t> words = noise_.of_four(token);
    const uint32_t i = token % 4;
    enter(token, score, i < 2 ? (i ? words.w[1] : words.w[0]) : (i == 3 ? words.w[3] : words.w[2]));
  }

 private:
  // Whether the token is the thread's best so far; if so, it is kept as such.
  __device__ bool take(uint32_t token, float score, uint32_t word) {
    const Best other{score, gumbel(word), token};
    if (!best.loses_to(other, inv_t_)) return false;
    best = other;
    return true;
  }

  // The bar that the thread's best token sets.
  __device__ uint32_t bar() const {
    const float x = tempered(best.score);
    return key_of(x + best.noise - (fabsf(x) * 1e-6f + 1e-5f));
  }

  // Kept far from infinity, whatever the temperature, as differences are taken of two of these.
  __device__ float tempered(float score) const {
    return fminf(fmaxf(score * inv_t_, -1e30f), 1e30f);
  }

  // A token that scores `top` or less can win only if its word h has ~h below this. 0: none can
  // win. The noise -log E exceeds the gap where E < e^-gap, and E >= 1 - u = (~h + 1/2) / 2^32.
  __device__ uint32_t can_win(float top) const {
    if (top == -INFINITY) return 0;
    const float bar = float_of_key(*static_cast<volatile uint32_t*>(bar_));
    const float gap = bar - tempered(top);
    if (!(gap > 0)) return 0xFFFFFFFFu;  // all but ~h = 2^32 - 1, the least noise there is
    if (gap > kNoiseMax) return 0;
    return static_cast<uint32_t>(
        fminf(exp_of(-gap) * (4294967296.0f * 1.0001f) + 2, 4294967040.0f));
  }

  // These lie in shared memory.
  const Noise& noise_;
  const float& inv_t_;
  uint32_t* const bar_;
};

}  // namespace cuda
}  // namespace crossfade
