// Finds a number in a list by rank or by mass, without a sort.
#pragma once
#include <algorithm>

#include "workspace.h"

namespace crossfade {
inline namespace CF_ISA {

// The largest x such that the numbers of a list that are at least x reach the target: by how many
// they are, or by their masses where these are given. If all do not reach it, the smallest number.
// The list ends with a vector of -inf, which counts for nothing.
//
// It halves the range in which x lies, and looks only at the numbers within that range. Halving the
// numbers' range is soon done, unless they lie very unevenly; then halving that of their keys is.
inline float select(const float* numbers, const float* masses, int64_t n, double target,
                    Workspace& w) {
  F32 less_than_all = splat(-kInf), most = splat(-kInf);
  for (int64_t i = 0; i < n; i += kLanes) {
    const F32 x = load(numbers + i);
    less_than_all = max(less_than_all, x > -kInf ? -x : splat(-kInf));
    most = max(most, x);
  }
  uint32_t low = key_of(-max_of(less_than_all)), high = key_of(max_of(most));
  double above = 0;  // of the numbers that are known to be larger than x
  for (int round = 0; low < high && n > 0; ++round) {
    const float half = float_of_key(low) / 2 + float_of_key(high) / 2;
    const uint32_t middle =
        round < 16 ? std::min(std::max(key_of(half), low + 1), high) : high - (high - low) / 2;
    const F32 pivot = splat(float_of_key(middle));
    double over = 0;
    for (int64_t i = 0; i < n;) {
      F32 sum = {};
      for (const int64_t end = std::min(n, i + 64 * kLanes); i < end; i += kLanes)
        sum += load(numbers + i) >= pivot ? (masses ? load(masses + i) : splat(1)) : F32{};
      over += sum_of(sum);
    }
    const bool reached = above + over >= target;
    int64_t kept = 0;
    for (int64_t i = 0; i < n; i += kLanes) {
      const F32 x = load(numbers + i);
      const uint32_t lanes = (reaches(x, pivot) ^ (reached ? 0 : kAllLanes)) & first_lanes(n - i);
      if (masses) compress(load(masses + i), lanes, w.left_mass + kept);
      kept += compress(x, lanes, w.left + kept);
    }
    store(w.left + kept, splat(-kInf));
    if (!reached) above += over;
    (reached ? low : high) = reached ? middle : middle - 1;
    numbers = w.left;
    if (masses) masses = w.left_mass;
    n = kept;
  }
  return float_of_key(low);
}

}  // namespace CF_ISA
}  // namespace crossfade
