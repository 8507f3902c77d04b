// Draws a row's token on two levels, as blend_math.h says: a group by its mass, then one of the
// group's tokens.
#pragma once
#include <algorithm>
#include <cmath>
#include <limits>

#include "threshold.h"

namespace crossfade {
inline namespace CF_ISA {

// The settings of one row.
struct RowSampling {
  float inv_t;
  Truncation cut;
  uint64_t seed, stream;
  uint32_t step;
  int64_t first_token;
  bool greedy;  // then nothing is cut, at temperature 1, and no noise is made
  bool bad;

  RowSampling(const Sampling& s, int64_t row)
      : cut{at(s.top_k, row), at(s.top_p, row), at(s.min_p, row)},
        seed(at(s.seed, row)),
        stream(at(s.stream, row)),
        step(static_cast<uint32_t>(at(s.step, row))),
        first_token(s.first_token) {
    const float t = at(s.temperature, row);
    inv_t = std::min(1.0f / t, std::numeric_limits<float>::max());  // 1 / t may be infinite
    greedy = !s.sample || t == 0;
    bad = !greedy && !(t > 0 && t < kInf && cut.top_k >= 0 && cut.top_p >= 0 && cut.top_p <= 1 &&
                       cut.min_p >= 0 && cut.min_p <= 1);
    if (greedy) {
      cut = {0, 1, 0};
      inv_t = 1;
    }
  }

 private:
  template <class T>
  static T at(const PerRow<T>& setting, int64_t row) {
    return setting.rows ? setting.rows[row] : setting.all;
  }
};

// The words of noise of n indices of a level from `first` on. There is memory for 32 more, as the
// first may be amid the four of a counter, and counters come in whole vectors.
inline const uint32_t* noise_words(const RowSampling& own, uint32_t level, int64_t first, int64_t n,
                                   uint32_t* words) {
  U64 lanes;
  for (int i = 0; i < kLanes / 2; ++i) lanes[i] = i;
  const uint32_t counter = level + static_cast<uint32_t>(first / 4);
  for (int64_t c = 0; c < (first % 4 + n + 3) / 4; c += kLanes / 2) {
    const Words<U64> noise = philox(lanes + (counter + c), own.step, own.stream, own.seed);
    U64 pairs[2];
    for (int i = 0; i < 2; ++i)
      pairs[i] = (noise.w[2 * i] & 0xFFFFFFFFu) | noise.w[2 * i + 1] << 32;
    for (int i = 0; i < kLanes / 2; ++i) {
      const uint64_t four[2] = {pairs[0][i], pairs[1][i]};
      std::memcpy(words + 4 * (c + i), four, sizeof four);
    }
  }
  return words + first % 4;
}

// Gumbel noise -log E, as `gumbel` of one word: E is -log u of u = (h + 1/2) / 2^32, or
// -log1p(-(1 - u)).
inline F32 gumbel(U32 h) {
  const I32 low = bit_cast<I32>(h) >= 0;  // u < 1/2
  const I32 n = bit_cast<I32>(low ? h : ~h);
  const F32 y = (__builtin_convertvector(n, F32) + 0.5f) * 0x1p-32f;  // u or 1 - u
  return -log(-(low ? log(y) : log1p_of(-y)));
}

// The lowest index at which value() is largest; value(i) gives those of i, i + 1 ... in a vector.
template <class Value>
int64_t argmax(int64_t n, Value value) {
  F32 best = splat(-kInf);
  I32 at = {}, index;
  for (int i = 0; i < kLanes; ++i) index[i] = i;
  for (int64_t i = 0; i < n; i += kLanes) {
    const F32 x = value(i);
    const I32 better = x > best;
    best = better ? x : best;
    at = better ? index + static_cast<int32_t>(i) : at;
  }
  int found = 0;
  for (int i = 1; i < kLanes; ++i)
    if (best[i] > best[found] || (best[i] == best[found] && at[i] < at[found])) found = i;
  return at[found];
}

// What won a race, by its index among the row's groups or the group's tokens, and its noise.
struct Drawn {
  int64_t index;
  float noise;
};

// kept[j] is the mass of group j, padded with zeros to whole vectors.
inline Drawn draw_group(const RowSampling& own, const float* kept, int64_t groups,
                        uint32_t* memory) {
  const uint32_t* const words =
      noise_words(own, kGroupNoise, own.first_token / kGroup, groups, memory);
  const int64_t j = argmax(
      groups, [&](int64_t j) { return log(load(kept + j)) + gumbel(load_bits<U32>(words + j)); });
  return {j, gumbel(words[j])};
}

// One of group j's tokens, whose scores are s, among those of at least the threshold.
inline Drawn draw_token(const RowSampling& own, const float* s, int64_t j, float max,
                        float threshold, uint32_t* memory) {
  const uint32_t* const words = noise_words(own, 0, own.first_token + j * kGroup, kGroup, memory);
  const int64_t v = argmax(kGroup, [&](int64_t v) {
    const F32 x = load(s + v);
    const F32 noisy = (x - max) * own.inv_t + gumbel(load_bits<U32>(words + v));
    return x >= threshold ? noisy : splat(-kInf);
  });
  return {v, gumbel(words[v])};
}

// The first of the largest numbers: what a greedy row takes, of groups and of a group's tokens.
inline Drawn first_of_the_best(const float* numbers, int64_t n) {
  return {argmax(n, [&](int64_t i) { return load(numbers + i); }), 0};
}

}  // namespace CF_ISA
}  // namespace crossfade
