// Gumbel-max: takes the token with the largest sum of tempered score and noise, of a tie the lowest
// id. Noise is made only where a token can still win.
#pragma once
#include <algorithm>
#include <cmath>
#include <limits>

#include "threshold.h"

namespace crossfade {
inline namespace CF_ISA {

struct Best {
  float score = -kInf;
  int64_t token = -1;

  void offer(float other_score, int64_t other_token) {
    if (other_score > score || (other_score == score && other_token < token)) {
      score = other_score;
      token = other_token;
    }
  }
};

// The settings of one row.
struct RowSampling {
  float inv_t;
  Truncation cut;
  uint64_t seed, stream;
  uint32_t step;
  bool greedy;  // nothing else of this struct is used then
  bool bad;

  RowSampling(const Sampling& s, int64_t row)
      : cut{at(s.top_k, row), at(s.top_p, row), at(s.min_p, row)},
        seed(at(s.seed, row)),
        stream(at(s.stream, row)),
        step(static_cast<uint32_t>(at(s.step, row))) {
    const float t = at(s.temperature, row);
    inv_t = std::min(1.0f / t, std::numeric_limits<float>::max());  // 1 / t may be infinite
    greedy = !s.sample || t == 0;
    bad = !greedy && !(t > 0 && t < kInf && cut.top_k >= 0 && cut.top_p >= 0 && cut.top_p <= 1 &&
                       cut.min_p >= 0 && cut.min_p <= 1);
  }

 private:
  template <class T>
  static T at(const PerRow<T>& setting, int64_t row) {
    return setting.rows ? setting.rows[row] : setting.all;
  }
};

// The smallest word whose noise can lift a token by `gap`, or a somewhat smaller one. The noise
// -log E is at least `gap` where E <= e^-gap, and word / 2^32 = e^-E >= 1 - E.
inline uint64_t least_word(float gap) {
  const double e = std::exp(-gap) * 1.0001;
  return e < 1 ? static_cast<uint64_t>(std::max(0.0, (1 - e) * 4294967296.0 - 1024)) : 0;
}

// The token with the largest tempered score plus noise among those of a slice with s >= least.
inline Best gumbel_max(const RowScores& row, const RowSampling& settings, float least,
                       int64_t begin, int64_t end) {
  Best best;
  U64 lanes;
  for (int i = 0; i < kLanes / 2; ++i) lanes[i] = i;
  least = std::max(least, row.max - (kNoiseMax - kNoiseMin + 0.1f) / settings.inv_t);
  for (int64_t g = begin; g < end; ++g) {
    if (!(row.group_max[g] >= least)) continue;
    const float* s = row.scores + g * kBlock;
    const uint64_t word = least_word(best.score - (row.group_max[g] - row.max) * settings.inv_t);
    for (int c = 0; c < kBlock / 4; c += kLanes / 2) {
      if (!any(max(load(s + c * 4), load(s + c * 4 + kLanes)) >= least)) continue;
      const Words<U64> noise = philox(lanes + static_cast<uint64_t>(g * (kBlock / 4) + c),
                                      settings.step, settings.stream, settings.seed);
      U64 words[4];
      for (int j = 0; j < 4; ++j) words[j] = noise.w[j] & 0xFFFFFFFFu;
      const U64 largest = max(max(words[0], words[1]), max(words[2], words[3]));
      if (!any(bit_cast<I32>(largest >= word))) continue;
      for (int j = 0; j < 4; ++j) {
        for (int i = 0; i < kLanes / 2; ++i) {
          const int t = (c + i) * 4 + j;
          if (words[j][i] < word || !(s[t] >= least)) continue;
          best.offer((s[t] - row.max) * settings.inv_t + gumbel(static_cast<uint32_t>(words[j][i])),
                     g * kBlock + t);
        }
      }
    }
  }
  return best;
}

// The best token without noise, of a tie the lowest id; none, if the slice lacks the row's maximum.
inline Best first_of_the_best(const RowScores& row, int64_t begin, int64_t end) {
  for (int64_t g = begin; g < end; ++g) {
    if (row.group_max[g] != row.max) continue;
    for (int t = 0; t < kBlock; ++t)
      if (row.scores[g * kBlock + t] == row.max) return {0, g * kBlock + t};
  }
  return {};
}

}  // namespace CF_ISA
}  // namespace crossfade
