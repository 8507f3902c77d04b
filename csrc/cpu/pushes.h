// What pushed a row's token y, as crossfade.h says: w E[x(y) - x] with x = z_k - z_0 for a term and
// x = Q_m for a value, and with E the expectation under the blend. The row was read before, so that
// the sums of its groups' exponentials are known; now its inputs are read once more.
#pragma once
#include "row_blend.h"

namespace crossfade {
inline namespace CF_ISA {

// The x of one term or value, whose push is to be found in this column.
struct Departure {
  int column;
  Stream of, base;  // x is `of` without `base`, if that has data
  float own;        // x(y)

  static Departure of_term(const Blend& b, int64_t row, int k, int64_t token) {
    return make(k, stream_of(b.term[k], row, weight_of(b.weight, row, k)),
                stream_of(b.term[0], row, 1), token);
  }
  static Departure of_value(const Blend& b, int64_t row, int m, int64_t token) {
    return make(b.terms + m, stream_of(b.value[m], row, weight_of(b.value_weight, row, m)),
                Stream{}, token);
  }

  // sum of e(v) (x(y) - x(v)) over the tokens v of group j whose e is not 0.
  float sum(int64_t j, int64_t vocab, const float* e) const {
    alignas(64) float x[kGroup], from[kGroup] = {};
    read_group(of, j, vocab, x);
    if (base.data) read_group(base, j, vocab, from);
    F32 total = {};
    for (int v = 0; v < kGroup; v += kLanes) {
      const F32 share = load(e + v), ahead = own - (load(x + v) - load(from + v));
      total += share > 0.0f ? share * ahead : F32{};
    }
    return total_of(total);
  }

 private:
  static Departure make(int column, const Stream& of, const Stream& base, int64_t token) {
    const float own = of.number(token) - (base.data ? base.number(token) : 0.0f);
    return {column, of, base, own};
  }
};

constexpr float kLeastLog = -87.0f;  // what is less likely by this has no part in a mean

// e(v) = e^(s(v) - max) of a group's scores s, whose largest is `max`; 0 where the token is
// removed.
inline void exponentials(const float* s, float max, float* e) {
  for (int v = 0; v < kGroup; v += kLanes) {
    const F32 below = load(s + v) - max;
    store(e + v, below > kLeastLog ? exp(below) : F32{});
  }
}

}  // namespace CF_ISA
}  // namespace crossfade
