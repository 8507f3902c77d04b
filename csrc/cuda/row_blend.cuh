// The blend of one row: which inputs to read, and the scores of eight tokens at once:
//   power = 0: s(v) = sum_k w_k z_k(v)                   + sum_m l_m Q_m(v)
//   else:      s(v) = log (sum_k w_k p_k(v)^r)^(1/r)     + sum_m l_m Q_m(v)
// A token is removed (-inf) by the mask, by the support, or by a -inf in a term or value that has
// weight; any other score that is not finite spoils the row.
#pragma once
#include <cfloat>

#include "../blend_math.h"
#include "../crossfade.h"
#include "team.cuh"

namespace crossfade {
namespace cuda {

constexpr uint32_t kWidth = Slice::kWidth;
typedef float Eight[kWidth];

__device__ __forceinline__ bool is_finite(float x) { return fabsf(x) < INFINITY; }

// A word whose bit i says whether test(i), for each i below kWidth.
template <class Test>
__device__ __forceinline__ uint32_t which(Test test) {
  uint32_t bits = 0;
#pragma unroll
  for (uint32_t i = 0; i < kWidth; ++i) bits |= (test(i) ? 1u : 0u) << i;
  return bits;
}

// x[i] for an i that the compiler does not know. x stays in registers.
template <class T>
__device__ __forceinline__ T pick(const T (&x)[kWidth], uint32_t i) {
  T found = x[0];
#pragma unroll
  for (uint32_t j = 1; j < kWidth; ++j) found = j == i ? x[j] : found;
  return found;
}

// 2^x. Results below the smallest normal number are 0, which saves the instructions for them.
__device__ __forceinline__ float exp2_of(float x) {
#ifdef CF_EMULATED
  return exp2f(x);
#else
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

constexpr float kLog2E = 1.4426950408889634f;

// e^x
__device__ __forceinline__ float exp_of(float x) { return exp2_of(x * kLog2E); }

// What a kernel knows of the inputs when it is compiled: that all have this dtype and are aligned
// to 16 bytes, or nothing (`any`). The first three have the numbers of DType.
enum class Format : int { f32, bf16, f16, any };

// One row of a term or value.
struct alignas(16) Input {
  const void* row;
  float weight;
  uint16_t term;  // the number of the term, if it is one
  uint8_t dtype;
  bool aligned;  // to 16 bytes, so that eight tokens are one or two vector loads

  __device__ bool wide() const { return dtype == static_cast<uint8_t>(DType::f32); }
  __device__ bool narrow() const { return !wide() && aligned; }
};

__device__ __forceinline__ Input input_of(const Matrix& m, int64_t row, float weight, int term) {
  const int64_t bytes = m.dtype == DType::f32 ? 4 : 2;
  const char* data = static_cast<const char*>(m.data) + row * m.row_stride * bytes;
  return {data, weight, static_cast<uint16_t>(term), static_cast<uint8_t>(m.dtype),
          reinterpret_cast<uintptr_t>(data) % 16 == 0};
}

// Eight numbers as they lie in memory: four float32 in each of a and b, or eight 16-bit numbers in
// a. Loading and unpacking are two functions, so that several loads can be under way.
struct Raw {
  uint4 a, b;
};

// Past the last token, the last one is read again.
__device__ __forceinline__ Raw load(const Input& in, uint32_t v, uint32_t vocab) {
  Raw raw{};
  if (in.aligned && v + kWidth <= vocab) {
    const uint4* p = static_cast<const uint4*>(in.row) + v / (in.wide() ? 4 : 8);
    raw.a = __ldg(p);
    if (in.wide()) raw.b = __ldg(p + 1);
    return raw;
  }
  uint32_t w[kWidth];
  const uint32_t last = vocab - 1;
  if (in.wide()) {
#pragma unroll
    for (uint32_t i = 0; i < kWidth; ++i)
      w[i] = __ldg(static_cast<const uint32_t*>(in.row) + min(v + i, last));
    return {{w[0], w[1], w[2], w[3]}, {w[4], w[5], w[6], w[7]}};
  }
#pragma unroll
  for (uint32_t i = 0; i < kWidth; ++i)
    w[i] = __ldg(static_cast<const uint16_t*>(in.row) + min(v + i, last));
  raw.a = {w[0] | w[1] << 16, w[2] | w[3] << 16, w[4] | w[5] << 16, w[6] | w[7] << 16};
  return raw;
}

__device__ __forceinline__ float from_f16(uint32_t bits) {
  return __half2float(__ushort_as_half(static_cast<unsigned short>(bits)));
}

template <Format kFormat>
__device__ __forceinline__ void unpack(const Raw& raw, Eight& x) {
  const uint32_t words[kWidth] = {raw.a.x, raw.a.y, raw.a.z, raw.a.w,
                                  raw.b.x, raw.b.y, raw.b.z, raw.b.w};
#pragma unroll
  for (uint32_t i = 0; i < kWidth; ++i) {
    const uint32_t pair = words[i / 2];
    if (kFormat == Format::f32) x[i] = float_of(words[i]);
    if (kFormat == Format::bf16) x[i] = float_of(i % 2 ? pair & 0xFFFF0000u : pair << 16);
    if (kFormat == Format::f16) x[i] = from_f16(i % 2 ? pair >> 16 : pair & 0xFFFFu);
  }
}

__device__ __forceinline__ void unpack(const Input& in, const Raw& raw, Eight& x) {
  if (in.wide()) return unpack<Format::f32>(raw, x);
  if (in.dtype == static_cast<uint8_t>(DType::bf16)) return unpack<Format::bf16>(raw, x);
  unpack<Format::f16>(raw, x);
}

__device__ __forceinline__ float number_at(const Input& in, uint32_t v) {
  if (in.wide()) return __ldg(static_cast<const float*>(in.row) + v);
  const uint32_t bits = __ldg(static_cast<const uint16_t*>(in.row) + v);
  return in.dtype == static_cast<uint8_t>(DType::bf16) ? float_of(bits << 16) : from_f16(bits);
}

// The sum of 2^((x - max) * rate). `max` is at least as large as all x.
__device__ __forceinline__ float sum_of_exp(const Eight& x, float max, float rate) {
  const float from = fmaxf(max, -FLT_MAX);  // so that x - from is -inf where all are
  float sum = exp2_of((x[0] - from) * rate);
#pragma unroll
  for (uint32_t i = 1; i < kWidth; ++i) sum += exp2_of((x[i] - from) * rate);
  return sum;
}

// log of a running sum of exp(scale * x), as scale * max + log(sum of exp(scale * (x - max))).
// NaN and +inf make the sum NaN.
struct LogSum {
  float max = -INFINITY, sum = 0;

  // `top` is at least as large as all x.
  __device__ void add(const Eight& x, float top) {
    if (top > max) {
      sum *= exp_of(max - top);
      max = top;
    }
    sum += sum_of_exp(x, max, kLog2E);
  }

  // Adds other > 0 numbers' sum.
  __device__ void add(const LogSum& other, float scale) {
    const float most = fmaxf(max, other.max);
    sum = sum * exp_of((max - most) * scale) + other.sum * exp_of((other.max - most) * scale);
    max = most;
  }

  // The sum over all lanes.
  __device__ LogSum over_warp(float scale = 1) const {
    LogSum all;
    all.max = warp_reduce(max, [](float a, float b) { return fmaxf(a, b); });
    const float own = max == all.max ? sum : sum * exp_of((max - all.max) * scale);
    all.sum = warp_reduce(own, [](float a, float b) { return a + b; });
    return all;
  }

  __device__ float log_sum() const { return logf(sum); }
  __device__ bool finite() const { return is_finite(max) && is_finite(sum); }
};

// A term's normaliser: log p = (z - max) - log_sum. It is NaN if the logits are no distribution.
struct LogZ {
  float max, log_sum;

  __device__ bool finite() const { return is_finite(log_sum); }
  __device__ float log_p(float z) const { return (z - max) - log_sum; }
};

// What the threads of a block share of their row.
struct RowBlend {
  Input term[kMaxTerms];          // all terms, for their own log-probs and the support
  Input weighted[2 * kMaxTerms];  // inputs with a weight: a power mean's terms, then what is added
  LogZ log_z[kMaxTerms];          // of terms, if a power mean or their log-probs need it
  uint32_t means, inputs;
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
    if (exists) in = input_of(is_term ? b.term[i] : b.value[i], row, w, i);
    if (exists && is_term) term[i] = in;

    const bool mean = is_term && b.power != 0;
    const float total = warp_reduce(mean ? w : 0.0f, [](float x, float y) { return x + y; });
    const bool bad_weight = !is_finite(w) || (mean && w < 0);
    const bool bad_total = b.power != 0 && !(fabsf(total - 1) <= kWeightSumTolerance);
    const uint32_t used = __ballot_sync(kAllLanes, w != 0);
    const bool any_bad = __ballot_sync(kAllLanes, bad_weight || bad_total) != 0;
    if (w != 0) {
      if (mean) in.weight = w / total;
      weighted[__popc(used & ((1u << lane) - 1))] = in;
    }
    if (lane == 0) {
      means = b.power != 0 ? __popc(used & 0xFFFFu) : 0;
      inputs = __popc(used);
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
    means = 0;
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

// The blend's scores: a weighted sum and, with kPower, a power mean that it is added to.
template <bool kPower, Format kFormat>
class BlendScores {
 public:
  RowBlend& row;

  __device__ BlendScores(RowBlend& row, uint32_t vocab, float power)
      : row(row), vocab_(vocab), power_(power), all_(!row.mask && !row.has_support) {}

  __device__ void operator()(uint32_t v, Eight& s) const {
    const bool whole = v + kWidth <= vocab_;
    if (kFormat != Format::any && whole && row.inputs > 0) {
      sum_of_few<kFormat>(row, v, s);
    } else {
#pragma unroll
      for (float& x : s) x = 0;
      if (kPower && row.means > 0) means(v, s);
      for (uint32_t n = kPower ? row.means : 0; n < row.inputs; ++n) {
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
      const LogZ z = row.log_z[in.term];
      Eight x;
      unpack(in, load(in, v, vocab_), x);
#pragma unroll
      for (uint32_t i = 0; i < kWidth; ++i) mean[i].add(z.log_p(x[i]), in.weight, before, power_);
      before += in.weight;
    }
#pragma unroll
    for (uint32_t i = 0; i < kWidth; ++i) s[i] = mean[i].result(power_);
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
    if (kPower && row.means > 0) {
      PowerMean<float> mean;
      float before = 0;
      for (uint32_t n = 0; n < row.means; ++n) {
        const Input& in = row.weighted[n];
        mean.add(row.log_z[in.term].log_p(number_at(in, v)), in.weight, before, power_);
        before += in.weight;
      }
      massless = mean.bound == -INFINITY;
    }
    for (uint32_t n = kPower ? row.means : 0; n < row.inputs; ++n)
      massless |= number_at(row.weighted[n], v) == -INFINITY;
    return massless;
  }

  const uint32_t vocab_;
  const float power_;
  const bool all_;  // all tokens are allowed
};

}  // namespace cuda
}  // namespace crossfade
