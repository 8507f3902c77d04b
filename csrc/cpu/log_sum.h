// The log of a running sum of exponentials, to which a group of tokens is added at a time.
#pragma once
#include <cmath>

#include "simd.h"

namespace crossfade {
inline namespace CF_ISA {

constexpr int kVectors = 8;                // enough sums are under way to hide their latency
constexpr int kBlock = kVectors * kLanes;  // tokens; the unit of all loops over a row
constexpr float kInf = __builtin_inff();

inline float max_of_group(const F32* x) {
  F32 m = x[0];
#pragma GCC unroll 16
  for (int v = 1; v < kVectors; ++v) m = max(m, x[v]);
  return max_of(m);
}

struct LogSum {
  float max = -kInf;
  double total = 0;  // sum of exp(x - max), less what `recent` holds
  F32 recent = {};
  int groups = 0;
  bool broken = false;  // the caller saw NaN or +inf

  // Returns the group's maximum. Groups whose tokens have less than e^-40 of the best one's mass
  // are left out: 2^31 such tokens would not move a float32 sum. A row that rises from group to
  // group rescales `total` thousands of times, so it is a double: the roundings would add up.
  float add(const F32* x) {
    const float top = max_of_group(x);
    if (top > max) {
      const double shrink = std::exp(static_cast<double>(max) - top);
      total *= shrink;
      recent *= static_cast<float>(shrink);
      max = top;
    }
    if (top - max > -40.0f) {  // not `top > max - 40`: a large max would absorb the 40
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; ++v) recent += exp(x[v] - max);
      if (++groups % 16 == 0) flush();
    }
    return top;
  }

  void flush() {
    total += sum_of(recent);
    recent = F32{};
  }

  void merge(const LogSum& other) {
    broken |= other.broken;
    const float top = other.max > max ? other.max : max;
    if (top == -kInf) return;
    const double t = top;
    total = total * std::exp(max - t) + other.total * std::exp(other.max - t);
    max = top;
  }

  bool finite() const { return !broken && max > -kInf && max < kInf; }
  float log_total() const { return static_cast<float>(std::log(total)); }
};

}  // namespace CF_ISA
}  // namespace crossfade
