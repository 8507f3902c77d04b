// Finds the score below which truncation removes tokens: top-k, top-p and min-p without a sort.
#pragma once
#include <cmath>
#include <cstdlib>

#include "log_sum.h"

namespace crossfade {
inline namespace CF_ISA {

// Memory that a thread keeps from one row to the next.
struct Workspace {
  float* scores = nullptr;      // [groups * kBlock]
  float* group_max = nullptr;   // [groups]
  float* candidates = nullptr;  // [groups * kBlock]
  float* masses = nullptr;      // [groups * kBlock], of candidates
  double histogram[RadixSearch::kBins];
  int64_t groups = 0;

  Workspace() = default;
  Workspace(const Workspace&) = delete;
  ~Workspace() { std::free(scores); }

  // False: out of memory.
  bool reserve(int64_t vocab) {
    const int64_t needed = (vocab + kBlock - 1) / kBlock;
    if (needed <= groups) return true;
    std::free(scores);
    groups = (needed + 15) / 16 * 16;
    scores = static_cast<float*>(std::aligned_alloc(64, groups * (3 * kBlock + 1) * sizeof(float)));
    if (!scores) {
      groups = 0;
      return false;
    }
    candidates = scores + groups * kBlock;
    masses = candidates + groups * kBlock;
    group_max = masses + groups * kBlock;
    return true;
  }
};

// The scores of a row, and their maxima.
struct RowScores {
  const float* scores;     // [groups * kBlock], -inf past the vocabulary
  const float* group_max;  // [groups]
  int64_t groups, vocab;
  float max;
};

// The largest x[i] such that the numbers of at least x[i] reach the target: by their count, or by
// the sum of their `masses` where these are given.
inline float radix_threshold(const float* x, const float* masses, int64_t n, double target,
                             double* histogram) {
  RadixSearch search(target);
  while (!search.done()) {
    std::memset(histogram, 0, sizeof(double) << search.bits());
    uint32_t largest = 0;
    for (int64_t i = 0; i < n; ++i) {
      const uint32_t key = key_of(x[i]);
      if (!search.in_play(key)) continue;
      const uint32_t digit = search.digit(key);
      histogram[digit] += masses ? masses[i] : 1.0;
      largest = digit > largest ? digit : largest;
    }
    search.descend(histogram, largest);
  }
  return float_of_key(search.threshold());
}

// Copies the scores that are at least `bound` to `out`. Returns how many there are.
inline int64_t gather(const RowScores& row, float bound, float* out) {
  int64_t n = 0;
  for (int64_t g = 0; g < row.groups; ++g) {
    if (!(row.group_max[g] >= bound)) continue;
    const float* s = row.scores + g * kBlock;
    for (int i = 0; i < kBlock; ++i) {
      out[n] = s[i];
      n += s[i] >= bound;
    }
  }
  return n;
}

// The scores between `bound`, under which no token is kept, and the maximum fall into many even
// bins. This finds the bin in which top-p's threshold lies: how many tokens it has, which are left
// in w.candidates, and how much mass lies above it.
struct Bracket {
  int64_t n;
  double above;
};

inline Bracket bracket(const RowScores& row, float bound, float inv_t, double target,
                       Workspace& w) {
  // Four histograms side by side, so that neighbours in one bin need not wait for each other.
  constexpr int kWays = 4, kBins = RadixSearch::kBins / kWays;
  const float scale = row.max > bound ? (kBins - 1) / (row.max - bound) : 0;
  // Extreme scores and temperatures make the product infinite, or NaN: it stays within the bins.
  const auto bins = [&](F32 s) {
    const F32 b = max((row.max - max(s, splat(bound))) * scale, F32{}), last = splat(kBins - 1);
    return __builtin_convertvector(b < last ? b : last, I32);
  };
  std::memset(w.histogram, 0, sizeof w.histogram);
  for (int64_t g = 0; g < row.groups; ++g) {
    if (row.group_max[g] < bound) continue;
    float mass[kBlock];
    int32_t bin[kBlock];
    for (int v = 0; v < kVectors; ++v) {
      const F32 s = load(row.scores + g * kBlock + v * kLanes);
      store(mass + v * kLanes, s >= bound ? exp((s - row.max) * inv_t) : F32{});
      const I32 b = bins(s) * kWays;
      std::memcpy(bin + v * kLanes, &b, sizeof b);
    }
    for (int i = 0; i < kBlock; i += kWays)
      for (int way = 0; way < kWays; ++way) w.histogram[bin[i + way] + way] += mass[i + way];
  }

  Bracket found{0, 0};
  int at = 0;
  double above = 0;
  for (int b = 0; b < kBins; ++b) {
    double here = 0;
    for (int way = 0; way < kWays; ++way) here += w.histogram[b * kWays + way];
    if (here == 0) continue;
    at = b;
    found.above = above;
    above += here;
    if (above >= target) break;
  }
  for (int64_t g = 0; g < row.groups; ++g) {
    if (row.group_max[g] < bound) continue;
    for (int v = 0; v < kVectors; ++v) {
      const F32 s = load(row.scores + g * kBlock + v * kLanes);
      const I32 here = (bins(s) == at) & (s >= bound);
      if (!any(here)) continue;
      for (int i = 0; i < kLanes; ++i)
        if (here[i]) w.candidates[found.n++] = s[i];
    }
  }
  return found;
}

struct Truncation {
  int64_t top_k;
  float top_p, min_p;

  bool any() const { return top_k > 0 || top_p < 1 || min_p > 0; }
  bool ranks(int64_t vocab) const { return top_k > 0 && top_k < vocab; }
  bool needs_mass(int64_t vocab) const { return top_p < 1 && !ranks(vocab); }
};

// `inv_t` is 1 / temperature; `mass` is the sum of exp((s - max) * inv_t), where cut.needs_mass().
inline float threshold(const RowScores& row, const Truncation& cut, float inv_t, double mass,
                       Workspace& w) {
  float kth = -kInf, nucleus = -kInf, least = -kInf;
  Bracket in{0, 0};  // top-p's candidates
  const bool top_k = cut.ranks(row.vocab);
  if (top_k) {
    // k groups have a maximum of at least the k-th largest maximum: so have k tokens.
    const float bound =
        cut.top_k <= row.groups
            ? radix_threshold(row.group_max, nullptr, row.groups, cut.top_k, w.histogram)
            : -kInf;
    const int64_t n = gather(row, bound, w.candidates);
    kth = radix_threshold(w.candidates, nullptr, n, cut.top_k, w.histogram);
    for (int64_t i = 0; i < n; ++i) {
      w.candidates[in.n] = w.candidates[i];
      in.n += w.candidates[i] >= kth;
    }
  }
  if (cut.top_p < 1) {
    // p = 0 keeps the best token
    const auto target = [&](double all) {
      return all > 0 && cut.top_p > 0 ? cut.top_p * all : 1e-300;
    };
    if (!top_k) {
      // All tokens with at most (1 - p) / V of the mass hold at most 1 - p of it: none is kept.
      const double share = (1.0 - cut.top_p) * mass / static_cast<double>(row.vocab);
      const float bound = row.max + (static_cast<float>(std::log(share)) - 1e-3f) / inv_t;
      in = bracket(row, bound < row.max ? bound : row.max, inv_t, target(mass), w);
    }
    for (int64_t i = 0; i < in.n; i += kLanes)
      store(w.masses + i, exp((load(w.candidates + i) - row.max) * inv_t));
    if (top_k) {
      mass = 0;
      for (int64_t i = 0; i < in.n; ++i) mass += w.masses[i];
    }
    nucleus = radix_threshold(w.candidates, w.masses, in.n, target(mass) - in.above, w.histogram);
  }
  if (cut.min_p > 0) least = row.max + std::log(cut.min_p) / inv_t;
  return std::fmax(std::fmax(kth, nucleus), least);
}

}  // namespace CF_ISA
}  // namespace crossfade
