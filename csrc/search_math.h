// What the CPU and the CUDA kernels of searches both compute: the order of slots, and which
// positions of a cache a row takes from its parent.
#pragma once
#include <cstdint>

#include "blend_math.h"
#include "crossfade.h"

namespace crossfade {
inline namespace CF_ISA {

// Whether slot i is kept before slot j. The higher score comes first, NaN comes after all others,
// and of a tie the lower slot comes first.
CF_HD bool beats(const float* scores, int64_t i, int64_t j) {
  const float a = scores[i], b = scores[j];
  const bool a_is_nan = a != a, b_is_nan = b != b;
  if (a_is_nan != b_is_nan) return b_is_nan;
  if (a > b || a < b) return a > b;
  return i < j;
}

struct Span {
  int64_t begin, end;
};

CF_HD int64_t within(int64_t position, int64_t length) {
  return position < 0 ? 0 : position < length ? position : length;
}

// The positions that a row takes from its parent, in a cache of this length.
CF_HD Span span_of(const Fork& fork, int64_t row, int64_t length) {
  const int64_t start = fork.start.rows ? fork.start.rows[row] : fork.start.all;
  const int64_t end = fork.end.rows ? fork.end.rows[row] : fork.end.all;
  return {within(start, length), within(end, length)};
}

}  // namespace CF_ISA
}  // namespace crossfade
