// A row by its groups of 256 tokens. Of each group, a reading of the row leaves the largest score
// and the sum of the exponentials below it: all that log Z and the draw of a group need.
//
// What is known of a group depends on its own scores alone. So the token that a seed gives does not
// depend on which thread read the group, nor on the rows beside this one.
#pragma once
#include <cmath>

#include "simd.h"

namespace crossfade {
inline namespace CF_ISA {

constexpr float kInf = __builtin_inff();
constexpr int kVectors = kGroup / kLanes;  // of a group

inline int64_t groups_of(int64_t vocab) { return (vocab + kGroup - 1) / kGroup; }

// Of one group's scores or logits: the largest in each lane.
inline F32 lane_max(const float* s) {
  F32 top = load(s);
  for (int v = 1; v < kVectors; ++v) top = max(top, load(s + v * kLanes));
  return top;
}

// sum of exp((s - top) * scale) over a group whose largest score is top.
inline float group_sum(const float* s, float top, float scale) {
  if (!(top > -kInf)) return 0;
  F32 sum = {};
  for (int v = 0; v < kVectors; v += 4) {
    F32 x[4];
    for (int i = 0; i < 4; ++i) x[i] = (load(s + (v + i) * kLanes) - top) * scale;
    exp(x);
    sum += (x[0] + x[1]) + (x[2] + x[3]);
  }
  return total_of(sum);
}

// The log of a row's sum of exponentials is max + log total.
struct LogSum {
  float max = -kInf;
  double total = 0;

  // False where the scores are no distribution: there are none above -inf, or one is +inf or NaN.
  bool finite() const { return max > -kInf && max < kInf && total < kInf; }
  bool empty() const { return max == -kInf && total == 0; }
  float log_total() const { return static_cast<float>(std::log(total)); }
};

// Puts groups together. sum[j] is the sum of exp((s - max[j]) * scale) over group j; it is NaN
// where the group holds NaN or +inf. Both arrays are padded to whole vectors: with -inf, and 0.
inline LogSum log_sum(const float* max_of_group, const float* sum, int64_t groups,
                      float scale = 1) {
  LogSum all;
  F32 top = splat(-kInf);
  for (int64_t j = 0; j < groups; j += kLanes) top = max(top, load(max_of_group + j));
  all.max = max_of(top);
  const float from = all.max > -kInf ? all.max : 0;  // the total of a row without tokens is 0
  for (int64_t j = 0; j < groups; j += kLanes)
    all.total += total_of(load(sum + j) * exp((load(max_of_group + j) - from) * scale));
  return all;
}

}  // namespace CF_ISA
}  // namespace crossfade
