// The blend of one row: which inputs to read, and the scores of a group of tokens:
//   power = 0: s(v) = sum_k w_k z_k(v)                   + sum_m l_m Q_m(v)
//   else:      s(v) = log (sum_k w_k p_k(v)^r)^(1/r)     + sum_m l_m Q_m(v)
// A token is removed (-inf) by the mask, by the support, or by a -inf in a term or value that has
// weight; any other score that is not finite spoils the row.
#pragma once
#include <cmath>

#include "log_sum.h"

namespace crossfade {
inline namespace CF_ISA {

// One row of an input, and its weight.
struct Stream {
  const void* data;
  DType dtype;
  float weight;

  F32 vector(int64_t i) const { return load_as(dtype, data, i); }
  void group(int64_t i, F32* x) const {
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) x[v] = vector(i + v * kLanes);
  }
  size_t bytes(int64_t tokens) const { return tokens * (dtype == DType::f32 ? 4 : 2); }
  const void* at(int64_t i) const { return static_cast<const char*>(data) + bytes(i); }
  float number(int64_t i) const {
    alignas(64) char last[kLanes * 4] = {};
    std::memcpy(last, at(i), bytes(1));
    return load_as(dtype, last, 0)[0];
  }
};

inline Stream stream_of(const Matrix& m, int64_t row, float weight) {
  const Stream base{m.data, m.dtype, weight};
  return {
      static_cast<const char*>(m.data) + row * static_cast<int64_t>(base.bytes(1)) * m.row_stride,
      m.dtype, weight};
}

inline float weight_of(const Weights& w, int64_t row, int k) {
  return w.rows ? w.rows[row * w.row_stride + k] : w.all[k];
}

// A copy of the row's last tokens, in a buffer that may be read past their end.
struct PaddedGroup {
  alignas(64) char data[kBlock * 4];
  Stream of(const Stream& s, int64_t first, int64_t tokens) {
    std::memset(data, 0, sizeof data);
    std::memcpy(data, s.at(first), s.bytes(tokens));
    return {data, s.dtype, s.weight};
  }
};

struct RowBlend {
  int64_t vocab;
  float power;
  int sums = 0, means = 0;
  Stream sum[2 * kMaxTerms];  // added with their weights: terms where power = 0, and values
  Stream mean[kMaxTerms];     // terms of a power mean
  float max[kMaxTerms], log_total[kMaxTerms];  // of mean[k]: log p = z - max - log_total
  const uint8_t* mask;
  bool has_support;
  Stream support;
  float support_threshold = -kInf;
  bool bad = false;  // a weight is not finite, or not one that a power mean takes
  bool simple;       // no power mean, mask or support: scores are weighted sums alone
  bool one_dtype;    // all inputs of the sum have the same dtype

  RowBlend(const Blend& b, int64_t row)
      : vocab(b.vocab),
        power(b.power),
        mask(b.mask ? b.mask + row * b.mask_stride : nullptr),
        has_support(b.support.term >= 0),
        support(stream_of(b.term[has_support ? b.support.term : 0], row, 1)) {
    float weight_sum = 0;
    for (int k = 0; k < b.terms; ++k) {
      const float w = weight_of(b.weight, row, k);
      bad |= !std::isfinite(w) || (power != 0 && w < 0);
      weight_sum += w;
      if (w == 0) continue;
      (power == 0 ? sum[sums++] : mean[means++]) = stream_of(b.term[k], row, w);
    }
    for (int k = 0; k < means; ++k) mean[k].weight /= weight_sum;
    bad |= power != 0 && !(std::fabs(weight_sum - 1) <= kWeightSumTolerance);
    for (int m = 0; m < b.values; ++m) {
      const float w = weight_of(b.value_weight, row, m);
      bad |= !std::isfinite(w);
      if (w != 0) sum[sums++] = stream_of(b.value[m], row, w);
    }
    simple = power == 0 && !mask && !has_support;
    one_dtype = sums > 0;
    for (int k = 1; k < sums; ++k) one_dtype &= sum[k].dtype == sum[0].dtype;
  }

  // Sets the normaliser of a power mean's term, once that has been read.
  void normalise(int k, const LogSum& z) {
    bad |= !z.finite();
    max[k] = z.max;
    log_total[k] = z.log_total();
  }

  // Makes the scores of the group of tokens from `first` on, -inf past the vocabulary. Returns
  // false if the row is bad.
  bool scores(int64_t first, F32* s) const {
    if (simple && first + kBlock <= vocab) {
      weighted_sum(first, s);
      F32 zero = s[0] * 0.0f;  // NaN where a score is not finite
#pragma GCC unroll 8
      for (int v = 1; v < kVectors; ++v) zero += s[v] * 0.0f;
      if (!any(zero != zero)) return true;
    }
    // s stays in registers above because its address is not taken here
    F32 careful[kVectors];
    const bool good =
        first + kBlock <= vocab ? full_group(first, careful) : last_group(first, careful);
    for (int v = 0; v < kVectors; ++v) s[v] = careful[v];
    return good;
  }

 private:
  __attribute__((noinline)) bool full_group(int64_t i, F32* s) const {
    weighted_sum(i, s);
    I32 left[kVectors];
    for (int v = 0; v < kVectors; ++v) left[v] = allowed_tokens(i + v * kLanes);
    if (means) {
      for (int v = 0; v < kVectors; ++v) {
        const F32 mean_score = power_mean(i + v * kLanes);
        left[v] &= mean_score != -kInf;
        s[v] += mean_score;
      }
    }
    I32 spoilt = {};
    for (int v = 0; v < kVectors; ++v) {
      for (int k = 0; k < sums; ++k) left[v] &= sum[k].vector(i + v * kLanes) != -kInf;
      spoilt |= left[v] & not_finite(s[v]);
      s[v] = left[v] ? s[v] : splat(-kInf);
    }
    return !any(spoilt);
  }

  __attribute__((noinline)) bool last_group(int64_t first, F32* s) const {
    const int64_t tokens = vocab - first;
    PaddedGroup copies[2 * kMaxTerms + 1];
    uint8_t allowed[kBlock] = {};
    RowBlend last = *this;
    for (int k = 0; k < means; ++k) last.mean[k] = copies[k].of(mean[k], first, tokens);
    for (int k = 0; k < sums; ++k) last.sum[k] = copies[means + k].of(sum[k], first, tokens);
    if (has_support) last.support = copies[2 * kMaxTerms].of(support, first, tokens);
    for (int64_t v = 0; v < tokens; ++v) allowed[v] = mask ? mask[first + v] : 1;
    last.mask = allowed;
    return last.full_group(0, s);
  }

  // s = sum_k w_k x_k. Inputs of one dtype are added up in registers.
  void weighted_sum(int64_t i, F32* s) const {
    F32 total[kVectors] = {};
    const auto add = [&](const Stream* x, int count, auto load) {
      for (int k = 0; k < count; ++k) {
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v)
          total[v] += x[k].weight * load(x[k].data, i + v * kLanes);
      }
    };
    if (one_dtype && sum[0].dtype == DType::f32) {
      add(sum, sums, [](const void* p, int64_t j) { return load_as(DType::f32, p, j); });
    } else if (one_dtype && sum[0].dtype == DType::bf16) {
      add(sum, sums, [](const void* p, int64_t j) { return load_as(DType::bf16, p, j); });
    } else {
      for (int k = 0; k < sums; ++k) {
        const DType dtype = sum[k].dtype;
        add(sum + k, 1, [dtype](const void* p, int64_t j) { return load_as(dtype, p, j); });
      }
    }
    for (int v = 0; v < kVectors; ++v) s[v] = total[v];
  }

  F32 power_mean(int64_t i) const {
    PowerMean<F32> result;
    float before = 0;
    for (int k = 0; k < means; ++k) {
      result.add((mean[k].vector(i) - max[k]) - log_total[k], mean[k].weight, before, power);
      before += mean[k].weight;
    }
    return result.result(power);
  }

  I32 allowed_tokens(int64_t i) const {
    I32 allowed = I32{} - 1;
    if (mask) {
      typedef uint8_t U8 __attribute__((vector_size(kLanes)));
      allowed &= __builtin_convertvector(load_bits<U8>(mask + i), I32) != 0;
    }
    if (has_support) allowed &= support.vector(i) >= support_threshold;
    return allowed;
  }
};

}  // namespace CF_ISA
}  // namespace crossfade
