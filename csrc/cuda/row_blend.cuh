// The blend of one row: which inputs to read, and the scores of eight tokens at once:
//   power = 0: s(v) = sum_k w_k z_k(v)                   + sum_m l_m Q_m(v)
//   else:      s(v) = log (sum_k w_k p_k(v)^r)^(1/r)     + sum_m l_m Q_m(v)
// and in both the pushes of parts. A token is removed (-inf) by the mask, by the support, by a -inf
// in a term or value that has weight, or by a push that is infinite; any other score that is not
// finite spoils the row.
#pragma once
#include "../blend_math.h"
#include "inputs.cuh"

namespace crossfade {
namespace cuda {

// What the threads of a block share of their row.
struct RowBlend {
  Input term[kMaxTerms];          // all terms, for their own log-probs and the support
  Input weighted[2 * kMaxTerms];  // inputs with a weight: a power mean's terms, then what is added
  LogZ log_z[kMaxTerms];          // of terms, if a power mean, a part or their log-probs need it
  uint32_t means, inputs, parts;
  float part_weight[kMaxParts][kMaxTerms];
  uint32_t part_terms[kMaxParts];  // bit k says whether term k has a weight in the part
  uint32_t normalised;             // bit k says whether a power mean or a part needs log_z[k]
  const uint8_t* mask;
  bool mask_aligned, has_support;
  bool bad;          // a weight cannot be used
  uint32_t spoiled;  // a token that is left has a score that is not finite; found while reading
  Input support;
  float support_threshold;

  // Called by one warp, with a lane for each input. A barrier must follow.
  __device__ void set_up(const Blend& b, int64_t row) {
    const uint32_t lane = lane_id();
    const bool is_term = lane < kMaxTerms;
    const int i = is_term ? lane : lane - kMaxTerms;
    const bool exists = i < (is_term ? b.terms : b.values);
    const Weights& weights = is_term ? b.weight : b.value_weight;
    float w = 0;
    if (exists) w = weights.rows ? weights.rows[row * weights.row_stride + i] : weights.all[i];
    Input in{};
    if (exists) in = input_of(is_term ? b.term[i] : b.value[i], row, w, is_term ? i : b.terms + i);
    if (exists && is_term) term[i] = in;

    const bool mean = is_term && b.power != 0;
    const float total = warp_reduce(mean ? w : 0.0f, [](float x, float y) { return x + y; });
    const bool bad_weight = !is_finite(w) || (mean && w < 0);
    const bool bad_total = b.power != 0 && !(fabsf(total - 1) <= kWeightSumTolerance);
    const uint32_t used = __ballot_sync(kAllLanes, w != 0);
    bool any_bad = __ballot_sync(kAllLanes, bad_weight || bad_total) != 0;
    uint32_t in_parts = 0;
    for (int g = 0; g < b.parts; ++g) {
      const Weights& own = b.part[g].weight;
      float u = 0;
      if (exists && is_term) u = own.rows ? own.rows[row * own.row_stride + i] : own.all[i];
      any_bad |= __ballot_sync(kAllLanes, !is_finite(u)) != 0;
      const uint32_t having = __ballot_sync(kAllLanes, u != 0);
      if (is_term) part_weight[g][i] = u;
      if (lane == 0) part_terms[g] = having;
      in_parts |= having;
    }
    if (w != 0) {
      if (mean) in.weight = w / total;
      weighted[__popc(used & ((1u << lane) - 1))] = in;
    }
    if (lane == 0) {
      means = b.power != 0 ? __popc(used & 0xFFFFu) : 0;
      inputs = __popc(used);
      parts = b.parts;
      normalised = in_parts | (b.power != 0 ? used & 0xFFFFu : 0);
      mask = b.mask ? b.mask + row * b.mask_stride : nullptr;
      mask_aligned = reinterpret_cast<uintptr_t>(mask) % 8 == 0;
      bad = any_bad;
      spoiled = 0;
      has_support = b.support.term >= 0;
      if (has_support) support = input_of(b.term[b.support.term], row, 1, b.support.term);
    }
  }

  // Called by one thread, after set_up: makes this the blend of the support's term alone.
  __device__ void set_up_support() {
    weighted[0] = support;
    means = parts = 0;
    inputs = 1;
    mask = nullptr;
    has_support = false;
  }

  // A word whose bit i says whether mask, support and vocabulary allow token v + i.
  __device__ uint32_t allowed(uint32_t v, uint32_t vocab) const {
    uint32_t left = v + kWidth <= vocab ? 0xFFu : (1u << (vocab - v)) - 1;
    if (mask && mask_aligned && v + kWidth <= vocab) {
      const uint2 bytes = __ldg(reinterpret_cast<const uint2*>(mask + v));
      left &= which(
          [&](uint32_t i) { return ((i < 4 ? bytes.x : bytes.y) >> (8 * (i % 4)) & 0xFFu) != 0; });
    } else if (mask) {
      left &= which([&](uint32_t i) { return __ldg(mask + min(v + i, vocab - 1)) != 0; });
    }
    if (has_support) {
      Eight z;
      unpack(support, load(support, v, vocab), z);
      left &= which([&](uint32_t i) { return z[i] >= support_threshold; });
    }
    return left;
  }
};

constexpr uint32_t kFew = 4;  // at most so many inputs of one format have code of their own

// Adds kCount inputs of one format from `in` on to s(v) .. s(v + 7), which are 0 if they are the
// `first`. All eight tokens must be within the vocabulary.
template <Format kFormat, uint32_t kCount, bool kFirst>
__device__ __forceinline__ void add_inputs(const Input* in, uint32_t v, Eight& s) {
  constexpr uint32_t kVectors = kFormat == Format::f32 ? 2 : 1;  // vectors of eight tokens
  Raw raw[kCount]{};
#pragma unroll
  for (uint32_t j = 0; j < kCount; ++j) {
    const uint4* at = static_cast<const uint4*>(in[j].row) + v / kWidth * kVectors;
    raw[j].a = __ldg(at);
    if (kVectors == 2) raw[j].b = __ldg(at + 1);
  }
#pragma unroll
  for (uint32_t j = 0; j < kCount; ++j) {
    const float weight = in[j].weight;
    Eight x;
    unpack<kFormat>(raw[j], x);
#pragma unroll
    for (uint32_t i = 0; i < kWidth; ++i)
      s[i] = kFirst && j == 0 ? weight * x[i] : fmaf(weight, x[i], s[i]);
  }
}

// The sum of a row's inputs, of which there are 1 to kFew. As many are loaded at once as there are
// registers for.
template <Format kFormat>
__device__ __forceinline__ void sum_of_few(const RowBlend& row, uint32_t v, Eight& s) {
  const Input* in = row.weighted;
  if (kFormat != Format::f32) {
    if (row.inputs == 4) return add_inputs<kFormat, 4, true>(in, v, s);
    if (row.inputs == 3) return add_inputs<kFormat, 3, true>(in, v, s);
  }
  if (row.inputs == 1) return add_inputs<kFormat, 1, true>(in, v, s);
  add_inputs<kFormat, 2, true>(in, v, s);
  if (kFormat != Format::f32) return;
  if (row.inputs == 4) add_inputs<kFormat, 2, false>(in + 2, v, s);
  if (row.inputs == 3) add_inputs<kFormat, 1, false>(in + 2, v, s);
}

template <>
__device__ __forceinline__ void sum_of_few<Format::any>(const RowBlend&, uint32_t, Eight&) {}

// The blend's scores: a weighted sum and, with kNormed, the power mean and the parts that it is
// added to, whose terms are normalised.
template <bool kNormed, Format kFormat>
class BlendScores {
 public:
  RowBlend& row;

  __device__ BlendScores(RowBlend& row, const Blend& blend)
      : row(row),
        vocab_(static_cast<uint32_t>(blend.vocab)),
        power_(blend.power),
        parts_(blend.part),
        all_(!row.mask && !row.has_support) {}

  __device__ void operator()(uint32_t v, Eight& s) const {
    const bool whole = v + kWidth <= vocab_;
    if (kFormat != Format::any && whole && row.inputs > 0) {
      sum_of_few<kFormat>(row, v, s);
    } else {
#pragma unroll
      for (float& x : s) x = 0;
      if (kNormed && row.means > 0) means(v, s);
      if (kNormed) add_parts(v, s);
      for (uint32_t n = kNormed ? row.means : 0; n < row.inputs; ++n) {
        const Input& in = row.weighted[n];
        Eight x;
        unpack(in, load(in, v, vocab_), x);
#pragma unroll
        for (uint32_t i = 0; i < kWidth; ++i) s[i] = fmaf(in.weight, x[i], s[i]);
      }
    }

    uint32_t left = all_ && whole ? 0xFFu : row.allowed(v, vocab_);
    float probe = 0;  // becomes NaN where a score is not finite
#pragma unroll
    for (uint32_t i = 0; i < kWidth; ++i) probe = fmaf(s[i], 0.0f, probe);
    if (probe != 0) left = sort_out(v, s, left);
    if (left != 0xFFu) {
#pragma unroll
      for (uint32_t i = 0; i < kWidth; ++i) s[i] = left >> i & 1 ? s[i] : -INFINITY;
    }
  }

 private:
  __device__ void means(uint32_t v, Eight& s) const {
    PowerMean<float> mean[kWidth];
    float before = 0;
    for (uint32_t n = 0; n < row.means; ++n) {
      const Input& in = row.weighted[n];
      const LogZ z = row.log_z[in.column];
      Eight x;
      unpack(in, load(in, v, vocab_), x);
#pragma unroll
      for (uint32_t i = 0; i < kWidth; ++i) mean[i].add(z.log_p(x[i]), in.weight, before, power_);
      before += in.weight;
    }
#pragma unroll
    for (uint32_t i = 0; i < kWidth; ++i) s[i] = mean[i].result(power_);
  }

  __device__ void add_parts(uint32_t v, Eight& s) const {
    for (uint32_t g = 0; g < row.parts; ++g) {
      const Part& part = parts_[g];
      Push<float> push[kWidth];
      for (uint32_t left = row.part_terms[g]; left; left &= left - 1) {
        const uint32_t k = __ffs(left) - 1;
        const Input& in = row.term[k];
        Eight x;
        unpack(in, load(in, v, vocab_), x);
#pragma unroll
        for (uint32_t i = 0; i < kWidth; ++i)
          push[i].add(row.log_z[k].log_p(x[i]), row.part_weight[g][k], part.power);
      }
#pragma unroll
      for (uint32_t i = 0; i < kWidth; ++i) s[i] += push[i].result(part.power, part.min, part.max);
    }
  }

  // Finds out which scores are not finite because the token is removed (a -inf with a weight) and
  // which spoil the row. Returns the tokens that are left.
  __device__ uint32_t sort_out(uint32_t v, const Eight& s, uint32_t left) const {
    uint32_t odd = left & which([&](uint32_t i) { return !is_finite(s[i]); });
    for (; odd; odd &= odd - 1) {
      const uint32_t i = __ffs(odd) - 1;
      if (!removed(v + i)) atomicOr(&row.spoiled, 1u);
      left &= ~(1u << i);
    }
    return left;
  }

  __device__ bool removed(uint32_t v) const {
    bool massless = false;  // the power mean is 0: for r > 0 if all terms are, for r < 0 if one is
    if (kNormed && row.means > 0) {
      PowerMean<float> mean;
      float before = 0;
      for (uint32_t n = 0; n < row.means; ++n) {
        const Input& in = row.weighted[n];
        mean.add(row.log_z[in.column].log_p(number_at(in, v)), in.weight, before, power_);
        before += in.weight;
      }
      massless = mean.bound == -INFINITY;
    }
    for (uint32_t g = 0; kNormed && g < row.parts; ++g) {
      const Part& part = parts_[g];
      Push<float> push;
      for (uint32_t left = row.part_terms[g]; left; left &= left - 1) {
        const uint32_t k = __ffs(left) - 1;
        push.add(row.log_z[k].log_p(number_at(row.term[k], v)), row.part_weight[g][k], part.power);
      }
      massless |= push.result(part.power, part.min, part.max) == -INFINITY;
    }
    for (uint32_t n = kNormed ? row.means : 0; n < row.inputs; ++n)
      massless |= number_at(row.weighted[n], v) == -INFINITY;
    return massless;
  }

  const uint32_t vocab_;
  const float power_;
  const Part* const parts_;
  const bool all_;  // all tokens are allowed
};

}  // namespace cuda
}  // namespace crossfade
