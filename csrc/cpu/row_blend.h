// The blend of one row: which inputs to read, and the scores of a group of 256 tokens:
//   power = 0: s(v) = sum_k w_k z_k(v)                   + sum_m l_m Q_m(v)
//   else:      s(v) = log (sum_k w_k p_k(v)^r)^(1/r)     + sum_m l_m Q_m(v)
// and in both the pushes of parts. A token is removed (-inf) by the mask, by the support, by a -inf
// in a term or value that has weight, or by a push that is infinite; any other score that is not
// finite spoils the row.
#pragma once
#include <algorithm>
#include <cmath>

#include "groups.h"

namespace crossfade {
inline namespace CF_ISA {

// One row of an input, and its weight.
struct Stream {
  const void* data;
  DType dtype;
  float weight;

  F32 vector(int64_t i) const { return load_as(dtype, data, i); }
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

// A copy of the row's last tokens, in a buffer that holds a whole group.
struct PaddedGroup {
  alignas(64) char data[kGroup * 4];
  Stream of(const Stream& s, int64_t first, int64_t tokens) {
    std::memset(data, 0, sizeof data);
    std::memcpy(data, s.at(first), s.bytes(tokens));
    return {data, s.dtype, s.weight};
  }
};

// Writes group j of an input as float32, with -inf past the vocabulary. Returns false if there is
// NaN or +inf among them.
inline bool read_group(const Stream& x, int64_t j, int64_t vocab, float* out) {
  const int64_t first = j * kGroup, tokens = std::min<int64_t>(vocab - first, kGroup);
  PaddedGroup copy;
  const bool whole = tokens == kGroup;
  const Stream from = whole ? x : copy.of(x, first, tokens);
  I32 odd = {};
  for (int v = 0; v < kVectors; ++v) {
    const F32 z = from.vector((whole ? first : 0) + v * kLanes);
    odd |= ~(z < kInf);
    store(out + v * kLanes, z);
  }
  std::fill(out + tokens, out + kGroup, -kInf);
  return !any(odd);
}

// A part of one row: the weights of its RowBlend's normalised terms.
struct RowPart {
  float weight[kMaxTerms];
  float power, min, max;
};

struct RowBlend {
  int64_t vocab;
  float power;
  int sums = 0, terms = 0, parts;
  Stream sum[2 * kMaxTerms];     // added with their weights: terms where power = 0, and values
  Stream term[kMaxTerms];        // of a power mean, with their weights in it, and of parts
  const float* log_z = nullptr;  // of each of the blend's terms, where they are known
  int nth_term[kMaxTerms];       // term[k] is this one of the blend's
  float top[kMaxTerms], log_total[kMaxTerms];  // of term[k]: log p = z - top - log_total
  RowPart part[kMaxParts];
  const uint8_t* mask;
  bool has_support;
  Stream support;
  float support_threshold = -kInf;
  bool bad = false;  // a weight is not finite, or not one that a power mean takes
  bool one_dtype;    // all inputs of the sum have the same dtype

  RowBlend(const Blend& b, int64_t row)
      : vocab(b.vocab),
        power(b.power),
        parts(b.parts),
        mask(b.mask ? b.mask + row * b.mask_stride : nullptr),
        log_z(b.log_z ? b.log_z + row * b.terms : nullptr),
        has_support(b.support.term >= 0),
        support(stream_of(b.term[has_support ? b.support.term : 0], row, 1)) {
    float weight_sum = 0;
    for (int k = 0; k < b.terms; ++k) {
      const float w = weight_of(b.weight, row, k);
      bad |= !std::isfinite(w) || (power != 0 && w < 0);
      weight_sum += w;
      if (w != 0 && power == 0) sum[sums++] = stream_of(b.term[k], row, w);
      bool normalised = w != 0 && power != 0;
      for (int g = 0; g < parts; ++g) {
        const float u = weight_of(b.part[g].weight, row, k);
        bad |= !std::isfinite(u);
        part[g].weight[terms] = u;
        normalised |= u != 0;
      }
      if (!normalised) continue;
      nth_term[terms] = k;
      term[terms++] = stream_of(b.term[k], row, power == 0 ? 0 : w);
    }
    for (int k = 0; k < terms; ++k) term[k].weight /= power == 0 ? 1 : weight_sum;
    for (int g = 0; g < parts; ++g) {
      part[g].power = b.part[g].power;
      part[g].min = b.part[g].min;
      part[g].max = b.part[g].max;
    }
    bad |= power != 0 && !(std::fabs(weight_sum - 1) <= kWeightSumTolerance);
    for (int m = 0; m < b.values; ++m) {
      const float w = weight_of(b.value_weight, row, m);
      bad |= !std::isfinite(w);
      if (w != 0) sum[sums++] = stream_of(b.value[m], row, w);
    }
    one_dtype = sums > 0;
    for (int k = 1; k < sums; ++k) one_dtype &= sum[k].dtype == sum[0].dtype;
  }

  // Sets the normaliser of a term, once that has been read.
  void normalise(int k, const LogSum& z) {
    bad |= !z.finite();
    top[k] = z.max;
    log_total[k] = z.log_total();
  }

  // Sets the normalisers that are known already.
  void normalise() {
    for (int k = 0; k < terms; ++k) {
      top[k] = log_z[nth_term[k]];
      log_total[k] = 0;
      bad |= !std::isfinite(top[k]);
    }
  }

  // Writes the scores of group j, -inf past the vocabulary, and the largest of each lane. Returns
  // false if they spoil the row.
  bool scores(int64_t j, float* s, F32& largest) const {
    const int64_t first = j * kGroup;
    const bool whole = first + kGroup <= vocab;
    if (whole && mask && none(mask + first)) {
      std::fill_n(s, kGroup, -kInf);
      largest = splat(-kInf);
      return true;
    }
    if (whole && !terms && weighted_sums(first, s, largest)) {
      if (mask || has_support) largest = remove(first, s);
      return true;
    }
    const bool good = whole ? careful(first, s) : last_group(first, s);
    largest = lane_max(s);
    return good;
  }

 private:
  static constexpr int kAtOnce = 8;  // sums that are under way in registers

  // Whether a group's mask allows no token.
  static bool none(const uint8_t* allowed) {
    uint64_t any = 0;
    for (int i = 0; i < kGroup; i += 8) {
      uint64_t eight;
      std::memcpy(&eight, allowed + i, 8);
      any |= eight;
    }
    return any == 0;
  }

  // Removes the tokens that are not allowed. Returns the largest score left of each lane.
  F32 remove(int64_t i, float* s) const {
    F32 largest = splat(-kInf);
    for (int v = 0; v < kGroup; v += kLanes) {
      const F32 x = allowed_tokens(i + v) ? load(s + v) : splat(-kInf);
      store(s + v, x);
      largest = max(largest, x);
    }
    return largest;
  }

  __attribute__((noinline)) bool careful(int64_t i, float* out) const {
    F32 unused;
    weighted_sums(i, out, unused);
    I32 spoilt = {};
    for (int v = 0; v < kVectors; ++v) {
      const int64_t at = i + v * kLanes;
      F32 s = load(out + v * kLanes);
      I32 left = allowed_tokens(at);
      F32 log_p[kMaxTerms];
      for (int k = 0; k < terms; ++k) log_p[k] = (term[k].vector(at) - top[k]) - log_total[k];
      if (power != 0) {
        const F32 mean = power_mean(log_p);
        left &= mean != -kInf;
        s += mean;
      }
      for (int g = 0; g < parts; ++g) {
        const F32 push = push_of(part[g], log_p);
        left &= push != -kInf;
        s += push;
      }
      for (int k = 0; k < sums; ++k) left &= sum[k].vector(at) != -kInf;
      spoilt |= left & not_finite(s);
      store(out + v * kLanes, left ? s : splat(-kInf));
    }
    return !any(spoilt);
  }

  __attribute__((noinline)) bool last_group(int64_t first, float* s) const {
    const int64_t tokens = vocab - first;
    PaddedGroup copies[3 * kMaxTerms + 1];
    uint8_t allowed[kGroup] = {};
    RowBlend last = *this;
    for (int k = 0; k < terms; ++k) last.term[k] = copies[k].of(term[k], first, tokens);
    for (int k = 0; k < sums; ++k) last.sum[k] = copies[kMaxTerms + k].of(sum[k], first, tokens);
    if (has_support) last.support = copies[3 * kMaxTerms].of(support, first, tokens);
    for (int64_t v = 0; v < tokens; ++v) allowed[v] = mask ? mask[first + v] : 1;
    last.mask = allowed;
    return last.careful(0, s);
  }

  // s = sum_k w_k x_k, for a group from token i on, and the largest of each lane. Returns whether
  // all are finite.
  bool weighted_sums(int64_t i, float* s, F32& largest) const {
    const auto one = [](auto load) {
      return [load](const Stream& x, int64_t j, F32 weight, F32* total) {
        for (int v = 0; v < 2; ++v) total[v] = fma(weight, load(x, j + v * kLanes), total[v]);
      };
    };
    const auto as_they_are = [](F32*) {};
    if (!one_dtype)
      return weighted_sums(i, s, largest, as_they_are,
                           one([](const Stream& x, int64_t j) { return x.vector(j); }));
    switch (sum[0].dtype) {
      case DType::f32:
        return weighted_sums(i, s, largest, as_they_are, one([](const Stream& x, int64_t j) {
                               return load_as(DType::f32, x.data, j);
                             }));
      case DType::f16:
        return weighted_sums(i, s, largest, as_they_are, one([](const Stream& x, int64_t j) {
                               return load_as(DType::f16, x.data, j);
                             }));
      default:
        // A word holds two tokens. The sums of the first and of the second take turns at the end.
        return weighted_sums(
            i, s, largest, [](F32* total) { interleave(total[0], total[1], total[0], total[1]); },
            [](const Stream& x, int64_t j, F32 weight, F32* total) {
              const U32 two = load_bits<U32>(static_cast<const uint16_t*>(x.data) + j);
              total[0] = fma(weight, bit_cast<F32>(two << 16), total[0]);
              total[1] = fma(weight, bit_cast<F32>(two & 0xFFFF0000u), total[1]);
            });
    }
  }

  // Asks for what follows soon in the first cache and for what follows later in the second. A core
  // waits for few lines in the first at once, and its own foresight ends with a page.
  static void prefetch(const Stream& x, int64_t i) {
    const char* const at = static_cast<const char*>(x.at(i));
    for (size_t byte = 0; byte < x.bytes(kAtOnce * kLanes); byte += 64) {
      __builtin_prefetch(at + byte + 1024, 0, 3);
      __builtin_prefetch(at + byte + 8192, 0, 2);
    }
  }

  // add(x, j, weight, total) adds an input's tokens from j on to two vectors, and order(total) puts
  // the sums into the tokens' order.
  template <class Order, class Add>
  bool weighted_sums(int64_t i, float* s, F32& largest, Order order, Add add) const {
    F32 zero = {};  // becomes NaN where a score is not finite
    largest = splat(-kInf);
    for (int64_t from = 0; from < kGroup; from += kAtOnce * kLanes) {
      F32 total[kAtOnce] = {};
      for (int k = 0; k < sums; ++k) {
        const F32 weight = splat(sum[k].weight);
        prefetch(sum[k], i + from);
#pragma GCC unroll 8
        for (int v = 0; v < kAtOnce; v += 2) add(sum[k], i + from + v * kLanes, weight, total + v);
      }
#pragma GCC unroll 8
      for (int v = 0; v < kAtOnce; ++v) {
        zero = fma(total[v], F32{}, zero);
        largest = max(largest, total[v]);
      }
#pragma GCC unroll 8
      for (int v = 0; v < kAtOnce; v += 2) {
        order(total + v);
        store(s + from + v * kLanes, total[v]);
        store(s + from + (v + 1) * kLanes, total[v + 1]);
      }
    }
    return !any(zero != zero);
  }

  F32 power_mean(const F32* log_p) const {
    PowerMean<F32> result;
    float before = 0;
    for (int k = 0; k < terms; ++k) {
      if (term[k].weight == 0) continue;
      result.add(log_p[k], term[k].weight, before, power);
      before += term[k].weight;
    }
    return result.result(power);
  }

  F32 push_of(const RowPart& p, const F32* log_p) const {
    Push<F32> push;
    for (int k = 0; k < terms; ++k)
      if (p.weight[k] != 0) push.add(log_p[k], p.weight[k], p.power);
    return push.result(p.power, p.min, p.max);
  }

  I32 allowed_tokens(int64_t i) const {
    I32 allowed = I32{} - 1;
    if (mask) allowed &= widen(mask + i) != 0;
    if (has_support) allowed &= support.vector(i) >= support_threshold;
    return allowed;
  }
};

}  // namespace CF_ISA
}  // namespace crossfade
