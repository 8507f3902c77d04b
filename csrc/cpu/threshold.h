// The score below which truncation removes tokens: top-k, top-p and min-p without a sort.
#pragma once
#include <cmath>
#include <cstdlib>
#include <new>

#include "log_sum.h"

namespace crossfade {
inline namespace CF_ISA {

// Memory that a thread keeps from one row to the next.
struct Workspace {
  float* scores = nullptr;      // [groups * kGroup]
  float* group_max = nullptr;   // [groups]
  float* candidates = nullptr;  // [groups * kGroup]
  float* masses = nullptr;      // [groups * kGroup]
  double histogram[RadixSearch::kBins];
  int64_t groups = 0;

  Workspace() = default;
  Workspace(const Workspace&) = delete;
  ~Workspace() { std::free(scores); }

  void reserve(int64_t vocab) {
    const int64_t needed = (vocab + kGroup - 1) / kGroup;
    if (needed <= groups) return;
    std::free(scores);
    groups = (needed + 15) / 16 * 16;
    scores = static_cast<float*>(std::aligned_alloc(64, groups * (3 * kGroup + 1) * sizeof(float)));
    if (!scores) {
      groups = 0;
      throw std::bad_alloc();
    }
    candidates = scores + groups * kGroup;
    masses = candidates + groups * kGroup;
    group_max = masses + groups * kGroup;
  }
};

// The scores of a row and what is known of them.
struct RowScores {
  const float* scores;     // [groups * kGroup], -inf past the vocabulary
  const float* group_max;  // [groups]
  int64_t groups, vocab;
  float max;
};

// The largest x[i] with W{x >= x[i]} >= target: W counts, or adds up `masses` where given.
inline float radix_threshold(const float* x, const float* masses, int64_t n, double target,
                             double* histogram) {
  RadixSearch search(target);
  while (!search.done()) {
    std::memset(histogram, 0, sizeof(double) << search.bits());
    for (int64_t i = 0; i < n; ++i) {
      const uint32_t key = key_of(x[i]);
      if (search.in_play(key)) histogram[search.digit(key)] += masses ? masses[i] : 1.0;
    }
    search.descend(histogram);
  }
  return float_of_key(search.threshold());
}

// Copies the scores of at least `bound` to `out`; returns how many.
inline int64_t gather(const RowScores& row, float bound, float* out) {
  int64_t n = 0;
  for (int64_t g = 0; g < row.groups; ++g) {
    if (!(row.group_max[g] >= bound)) continue;
    const float* s = row.scores + g * kGroup;
    for (int i = 0; i < kGroup; ++i) {
      out[n] = s[i];
      n += s[i] >= bound;
    }
  }
  return n;
}

struct Truncation {
  int64_t top_k;
  float top_p, min_p;

  bool any() const { return top_k > 0 || top_p < 1 || min_p > 0; }
};

// `inv_t` is 1 / temperature; `mass` is the sum of exp((s - max) * inv_t), needed for top-p alone.
inline float threshold(const RowScores& row, const Truncation& cut, float inv_t, double mass,
                       Workspace& w) {
  float result = -kInf;
  int64_t n = -1;  // candidates gathered
  if (cut.top_k > 0 && cut.top_k < row.vocab) {
    // k groups have a maximum of at least the k-th largest maximum: so have k tokens.
    const float bound =
        cut.top_k <= row.groups
            ? radix_threshold(row.group_max, nullptr, row.groups, cut.top_k, w.histogram)
            : -kInf;
    n = gather(row, bound, w.candidates);
    result = radix_threshold(w.candidates, nullptr, n, cut.top_k, w.histogram);
  }
  if (cut.top_p < 1) {
    if (n < 0) {
      // All tokens with at most (1 - p) / V of the mass hold at most 1 - p of it: none is kept.
      const double share = (1.0 - cut.top_p) * mass / static_cast<double>(row.vocab);
      const float bound = row.max + (static_cast<float>(std::log(share)) - 1e-3f) / inv_t;
      n = gather(row, bound < row.max ? bound : row.max, w.candidates);
    } else {
      int64_t kept = 0;
      for (int64_t i = 0; i < n; ++i) {
        w.candidates[kept] = w.candidates[i];
        kept += w.candidates[i] >= result;
      }
      n = kept;
      mass = 0;
    }
    for (int64_t i = 0; i < n; i += kLanes)
      store(w.masses + i, exp((load(w.candidates + i) - row.max) * inv_t));
    if (mass == 0)
      for (int64_t i = 0; i < n; ++i) mass += w.masses[i];
    const double target = cut.top_p * mass;
    const float nucleus = radix_threshold(w.candidates, w.masses, n,
                                          target > 0 ? target : 1e-300, w.histogram);
    result = nucleus > result ? nucleus : result;
  }
  if (cut.min_p > 0) {
    const float least = row.max + std::log(cut.min_p) / inv_t;
    result = least > result ? least : result;
  }
  return result;
}

}  // namespace CF_ISA
}  // namespace crossfade
