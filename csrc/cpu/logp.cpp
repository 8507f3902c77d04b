// What linear_logp does to a tile of logits between two matrix products: the sums of the forward
// pass and the gradient of the backward pass. Compiled once for each instruction set; dispatch.cpp
// chooses.
//
// A row of a tile is read once from wherever the product left it, as the second walk through it
// finds it in the first-level cache. Every sum of a product is written with fma(). Else the
// compiler might fuse the two in one variant of a pass and not in another, and their results would
// differ.
#include <algorithm>
#include <cmath>

#include "vectors.h"

namespace crossfade {
inline namespace CF_ISA {

namespace {

constexpr int64_t kLogitsPerThread = 1 << 14;  // fewer are not worth another thread
constexpr int kSums = 4;          // how many are added to in turn, to hide their latency
constexpr float kLeast = -87.0f;  // e^x of lower x would not be a normal number

// e^x for -88 <= x <= 88 with a relative error of 2e-7, also far from 0, where exp() is worse.
inline F32 exact_exp(F32 x) {
  const F32 magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const F32 shifted = fma(x, splat(1.44269502f), magic), n = shifted - magic;
  const F32 f = fma(x, splat(1.92596299e-8f), fma(x, splat(1.44269502f), -n));
  F32 p = splat(1.535336188e-4f);  // the polynomial of Cephes for 2^f
  p = fma(p, f, splat(1.339887440e-3f));
  p = fma(p, f, splat(9.618437358e-3f));
  p = fma(p, f, splat(5.550332471e-2f));
  p = fma(p, f, splat(2.402264791e-1f));
  p = fma(p, f, splat(6.931472029e-1f));
  p = fma(p, f, splat(1.0f));
  return p * bit_cast<F32>((bit_cast<I32>(shifted) - bit_cast<I32>(magic) + 127) << 23);
}

// tanh x with a relative error of 2e-7; NaN stays NaN.
inline F32 tanh(F32 x) {
  const U32 sign = bit_cast<U32>(x) & 0x80000000u;
  const F32 size = bit_cast<F32>(bit_cast<U32>(x) ^ sign);
  const F32 e = exact_exp(-max(-2.0f * size, splat(-20.0f)));  // past 10, tanh is 1 in float32
  const F32 far = 1.0f - 2.0f / (e + 1.0f);
  const F32 square = x * x;
  F32 p = splat(-5.70498872745e-3f);  // as in Cephes
  p = fma(p, square, splat(2.06390887954e-2f));
  p = fma(p, square, splat(-5.37397155531e-2f));
  p = fma(p, square, splat(1.33314422036e-1f));
  p = fma(p, square, splat(-3.33332819422e-1f));
  const F32 near = fma(p * square, x, x);
  const F32 result = size < 0.625f ? near : bit_cast<F32>(bit_cast<U32>(far) | sign);
  return x == x ? result : x;
}

// A row of a tile. With kPlain its scores are its logits already.
template <bool kPlain>
class Row {
 public:
  Row(const LogpTile& tile, int64_t r)
      : tile_(tile),
        scores_(tile.scores + r * tile.columns),
        target_(tile.targets[r] - tile.first) {}

  int64_t columns() const { return tile_.columns; }
  bool has_target() const { return target_ >= 0 && target_ < tile_.columns; }
  int64_t target() const { return target_; }

  struct Logits {
    F32 z;      // -inf past the end
    F32 slope;  // dz/dx * temperature
  };

  // A vector of logits, from column c on.
  Logits logits(int64_t c) const {
    const int64_t left = tile_.columns - c;
    F32 x = load_up_to(scores_ + c, left), slope = splat(1.0f);
    if constexpr (!kPlain) {
      if (tile_.bias) x += load_up_to(tile_.bias + c, left);
      if (tile_.softcap > 0) {
        const F32 t = tanh(x / tile_.softcap);
        x = t * tile_.softcap;
        slope = 1.0f - t * t;
      }
      if (tile_.temperature != 1) x /= tile_.temperature;
    }
    return {padded(x, left), slope};
  }
  // A vector of what put() left, from column c on; -inf past the end.
  F32 get(int64_t c) const { return padded(load_up_to(scores_ + c, columns() - c), columns() - c); }
  void put(int64_t c, F32 x) { store_up_to(scores_ + c, x, columns() - c); }
  float& operator[](int64_t c) { return scores_[c]; }
  void fill(float x) { std::fill_n(scores_, columns(), x); }

  // dz/dx * temperature of logits
  F32 slope(F32 z) const {
    if (kPlain || !(tile_.softcap > 0)) return splat(1.0f);
    const F32 t = z * (tile_.temperature / tile_.softcap);
    return 1.0f - t * t;
  }

 private:
  static F32 padded(F32 x, int64_t left) {
    if (left >= kLanes) return x;
    return inside(0, 0, left) ? x : splat(-kInf);
  }

  const LogpTile& tile_;
  float* scores_;
  int64_t target_;
};

// Rescales what a row has summed so far to a new maximum.
void shrink(LogpSums& sums, float top, const LogpMoments& moments, int64_t r) {
  const double factor = std::exp(sums.max - top);
  const double step = factor == 0 ? 0 : sums.max - top;  // before the first tile it would be -inf
  sums.max = top;
  sums.weighted = (sums.weighted + step * sums.total) * factor;
  sums.total *= factor;
  if (moments.count == 0) return;
  const float by = static_cast<float>(factor), far = static_cast<float>(step);
  float* first = moments.first + r * moments.size;
  if (moments.count == 2) {
    float* second = moments.second + r * moments.size;
    for (int64_t i = 0; i < moments.size; ++i) second[i] = (second[i] + far * first[i]) * by;
  }
  for (int64_t i = 0; i < moments.size; ++i) first[i] *= by;
}

template <bool kPlain, int kMoments>
void add_row(const LogpTile& tile, int64_t r, LogpSums& sums, const LogpMoments& moments) {
  Row<kPlain> row(tile, r);
  float* second = kMoments == 2 ? moments.second_scores + r * tile.columns : nullptr;
  const auto leave = [&](float x) {
    if (kMoments > 0) row.fill(x);
    if (kMoments == 2) std::fill_n(second, tile.columns, x);
  };

  F32 tops = splat(-kInf);
  I32 odd = {};
  for (int64_t c = 0; c < tile.columns; c += kLanes) {
    const F32 z = row.logits(c).z;
    if (!kPlain) row.put(c, z);
    odd |= ~(z < kInf);
    tops = max(z, tops);
  }
  if (row.has_target()) sums.target = row[row.target()];
  if (any(odd)) {
    sums.total = kNan;
    return leave(kNan);
  }
  const float top = max_of(tops);
  if (top > sums.max) shrink(sums, top, moments, r);
  if (sums.max == -kInf) return leave(0);

  const float most = static_cast<float>(sums.max);
  F32 total[kSums] = {}, weighted[kSums] = {};
  for (int64_t begin = 0; begin < tile.columns; begin += kSums * kLanes)
#pragma GCC unroll 4
    for (int i = 0; i < kSums; ++i) {
      const int64_t c = begin + i * kLanes;
      const F32 z = row.get(c), x = max(z - most, splat(kLeast - 1.0f));
      const F32 p = x > kLeast ? exact_exp(x) : F32{};
      total[i] += p;
      weighted[i] = fma(p, x, weighted[i]);
      if (kMoments > 0) {
        const F32 moment = p * row.slope(z);
        row.put(c, moment);
        if (kMoments == 2) store_up_to(second + c, moment * x, tile.columns - c);
      }
    }
  for (int i = 0; i < kSums; ++i) {
    sums.total += sum_of(total[i]);
    sums.weighted += sum_of(weighted[i]);
  }
}

template <bool kPlain>
void differentiate_row(const LogpTile& tile, int64_t r, const LogpGradient& g) {
  Row<kPlain> row(tile, r);
  if (g.pick == 0 && g.share == 0 && g.tilt == 0) return row.fill(0);
  if (!std::isfinite(g.max) || !std::isfinite(g.log_total)) return row.fill(kNan);
  float at_target = 0;
  if (row.has_target()) {
    const int64_t lane = row.target() % kLanes;
    at_target = g.pick * row.logits(row.target() - lane).slope[lane];
  }
  for (int64_t c = 0; c < tile.columns; c += kLanes) {
    const auto [z, slope] = row.logits(c);
    const F32 x = max(z - g.max - g.log_total, splat(kLeast - 1.0f));
    const F32 p = x > kLeast ? exact_exp(x) : F32{};
    row.put(c, p * (g.share - g.tilt * x) * slope);
  }
  if (row.has_target()) row[row.target()] += at_target;
}

template <class Work>
void for_rows(const LogpTile& tile, int threads, Work work) {
  threads =
      static_cast<int>(std::min<int64_t>(threads, 1 + tile.rows * tile.columns / kLogitsPerThread));
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t r = 0; r < tile.rows; ++r) work(r);
}

bool is_plain(const LogpTile& tile) {
  return !tile.bias && !(tile.softcap > 0) && tile.temperature == 1;
}

template <bool kPlain, int kMoments>
void add_rows(const LogpTile& tile, LogpSums* sums, const LogpMoments& moments, int threads) {
  for_rows(tile, threads, [&](int64_t r) { add_row<kPlain, kMoments>(tile, r, sums[r], moments); });
}

template <bool kPlain>
void add_rows(const LogpTile& tile, LogpSums* sums, const LogpMoments& moments, int threads) {
  switch (moments.count) {
    case 0:
      return add_rows<kPlain, 0>(tile, sums, moments, threads);
    case 1:
      return add_rows<kPlain, 1>(tile, sums, moments, threads);
    default:
      return add_rows<kPlain, 2>(tile, sums, moments, threads);
  }
}

}  // namespace

void logp_forward_rows(const LogpTile& tile, LogpSums* sums, const LogpMoments& moments,
                       int threads) {
  if (is_plain(tile)) return add_rows<true>(tile, sums, moments, threads);
  add_rows<false>(tile, sums, moments, threads);
}

void logp_backward_rows(const LogpTile& tile, const LogpGradient* gradients, int threads) {
  const bool plain = is_plain(tile);
  for_rows(tile, threads, [&](int64_t r) {
    if (plain)
      differentiate_row<true>(tile, r, gradients[r]);
    else
      differentiate_row<false>(tile, r, gradients[r]);
  });
}

}  // namespace CF_ISA
}  // namespace crossfade
