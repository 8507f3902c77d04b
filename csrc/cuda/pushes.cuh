// What pushed a row's token y, as crossfade.h says: w E[x(y) - x] with x = z_k - z_0 for a term and
// x = Q_m for a value, and with E the expectation under the blend. One more reading of the row
// finds those of four terms and values.
#pragma once
#include "read_row.cuh"

namespace crossfade {
namespace cuda {

struct FourPushes {
  float mass = 0;       // sum of e(v) = e^(s(v) - max)
  float ahead[4] = {};  // for each of the four: sum of e(v) (x(y) - x(v))
};

// Called by all threads of the team, which know the row's token, or kNone if the row is bad.
template <Format kFormat>
__device__ __forceinline__ void write_pushes(Team& team, Shared& shared, const Blend& blend,
                                             uint32_t token, float* out) {
  const RowBlend& row = shared.row;
  const Slice& slice = shared.slice;
  const uint32_t vocab = static_cast<uint32_t>(blend.vocab);
  const uint32_t terms = blend.terms, columns = terms + blend.values;
  const bool writes = Team::rank() == 0, good = token != kNone;
  if (writes && threadIdx.x < columns) out[threadIdx.x] = good ? 0.0f : NAN;
  if (!good) return;

  const BlendScores<false, kFormat> scores(shared.row, blend);
  const float max = shared.result.max;
  const Input& first = row.term[0];
  const bool skips = row.inputs > 0 && row.weighted[0].column == 0;  // the first term's push is 0
  for (uint32_t n = skips ? 1 : 0; n < row.inputs; n += 4) {
    float own[4] = {};  // x(y)
#pragma unroll
    for (uint32_t j = 0; j < 4; ++j) {
      if (n + j >= row.inputs) break;
      const Input& in = row.weighted[n + j];
      own[j] = number_at(in, token) - (in.column < terms ? number_at(first, token) : 0.0f);
    }
    FourPushes sums;
    sweep(slice, scores, [&](uint32_t, uint32_t v, const Eight& s, float top) {
      if (!(top > -INFINITY)) return;
      Eight e, base;
#pragma unroll
      for (uint32_t i = 0; i < kWidth; ++i) {
        e[i] = exp_of(s[i] - max);
        sums.mass += e[i];
      }
      unpack(first, load(first, v, vocab), base);
#pragma unroll
      for (uint32_t j = 0; j < 4; ++j) {
        if (n + j >= row.inputs) break;
        const Input& in = row.weighted[n + j];
        const bool is_term = in.column < terms;
        Eight x;
        unpack(in, load(in, v, vocab), x);
#pragma unroll
        for (uint32_t i = 0; i < kWidth; ++i) {
          const float ahead = own[j] - (is_term ? x[i] - base[i] : x[i]);
          sums.ahead[j] += e[i] > 0 ? e[i] * ahead : 0.0f;
        }
      }
    });
    sums = team.reduce(sums, [](FourPushes x) {
      const auto add = [](float a, float b) { return a + b; };
      x.mass = warp_reduce(x.mass, add);
#pragma unroll
      for (float& one : x.ahead) one = warp_reduce(one, add);
      return x;
    });
    if (writes && threadIdx.x == 0) {
#pragma unroll
      for (uint32_t j = 0; j < 4; ++j) {
        if (n + j >= row.inputs) break;
        const Input& in = row.weighted[n + j];
        const float push = in.weight * (sums.ahead[j] / sums.mass);
        out[in.column] = is_finite(push) ? push : NAN;
      }
    }
  }
}

}  // namespace cuda
}  // namespace crossfade
