// Finds the score below which truncation removes tokens: top-k, top-p and min-p without a sort.
//
//   1. `range_of` says between which two scores the threshold lies, from what is known of the
//   groups
//      and, for top-p, from a sample of the row.
//   2. `gather` reads the row's scores, which lie in the cache, once: the tokens within the range
//      are listed, and the mass of those above it, which stay for sure, is summed by groups.
//   3. `settle` finds the threshold on the list.
//
// A sample may mislead. What was gathered shows it, and then all tokens are listed.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <limits>

#include "groups.h"

namespace crossfade {
inline namespace CF_ISA {

struct Truncation {
  int64_t top_k;
  float top_p, min_p;

  bool any() const { return top_k > 0 || top_p < 1 || min_p > 0; }
  bool ranks(int64_t vocab) const { return top_k > 0 && top_k < vocab; }
};

// Memory that a thread keeps from one row to the next.
struct Workspace {
  float* scores = nullptr;  // of each token
  // Lists of tokens. Vectors that are written to one may reach past its end: see list_at.
  float *listed, *listed_mass, *left, *left_mass;
  // For each group.
  float *group_max, *group_sum, *group_tempered, *group_sure, *group_reach;
  float* lane_max;             // for each lane of each group
  float *term_max, *term_sum;  // for each group of each term
  int32_t* group_listed;
  uint32_t* words;  // for each group or token of a group
  int64_t groups = 0;

  Workspace() = default;
  Workspace(const Workspace&) = delete;
  ~Workspace() { std::free(scores); }

  // Where a list of the tokens from a group on may begin, so that no list runs into the next one.
  static int64_t list_at(int64_t group) { return group * (kGroup + kLanes); }

  // False: out of memory.
  bool reserve(int64_t vocab) {
    const int64_t needed = groups_of(vocab);
    if (needed <= groups) return true;
    std::free(scores);
    scores = nullptr;
    groups = (needed + 15) / 16 * 16;
    const int64_t tokens = list_at(groups + 1);
    float** const of_tokens[] = {&listed, &listed_mass, &left, &left_mass};
    float** const of_groups[] = {&group_max, &group_sum, &group_tempered, &group_sure,
                                 &group_reach};
    const int64_t numbers = 5 * tokens + (7 + kLanes + 2 * kMaxTerms) * groups + kGroup;
    float* at = scores = static_cast<float*>(std::aligned_alloc(64, numbers * sizeof(float)));
    if (!scores) {
      groups = 0;
      return false;
    }
    at += tokens;
    for (float** list : of_tokens) *list = at, at += tokens;
    for (float** list : of_groups) *list = at, at += groups;
    lane_max = at, at += kLanes * groups;
    term_max = at, at += kMaxTerms * groups;
    term_sum = at, at += kMaxTerms * groups;
    group_listed = reinterpret_cast<int32_t*>(at), at += groups;
    words = reinterpret_cast<uint32_t*>(at);
    return true;
  }
};

// A row whose scores are stored, at a temperature.
struct Row {
  int64_t vocab, groups;
  float max, inv_t;
  double mass;            // the sum of exp((s - max) * inv_t)
  const float* tempered;  // [groups]: the same of each group, below its own maximum
};

// Where the threshold lies: low <= threshold < high.
struct Range {
  float low, high;
};
constexpr int64_t kWorthNarrowing = 8192;  // tokens
constexpr float kLowest = -std::numeric_limits<float>::max();

// The largest x such that the numbers of a list that are at least x reach the target: by how many
// they are, or by their masses where these are given. If all do not reach it, the smallest number.
// The list ends with a vector of -inf, which counts for nothing.
//
// It halves the range of keys in which x lies, and looks only at the numbers within that range.
inline float select(const float* numbers, const float* masses, int64_t n, double target,
                    Workspace& w) {
  F32 less_than_all = splat(-kInf), most = splat(-kInf);
  for (int64_t i = 0; i < n; i += kLanes) {
    const F32 x = load(numbers + i);
    less_than_all = max(less_than_all, x > -kInf ? -x : splat(-kInf));
    most = max(most, x);
  }
  uint32_t low = key_of(-max_of(less_than_all)), high = key_of(max_of(most));
  double above = 0;  // of the numbers that are known to be larger than x
  while (low < high && n > 0) {
    const uint32_t middle = high - (high - low) / 2;
    const F32 pivot = splat(float_of_key(middle));
    double over = 0;
    for (int64_t i = 0; i < n;) {
      F32 sum = {};
      for (const int64_t end = std::min(n, i + 64 * kLanes); i < end; i += kLanes)
        sum += load(numbers + i) >= pivot ? (masses ? load(masses + i) : splat(1)) : F32{};
      over += sum_of(sum);
    }
    const bool reached = above + over >= target;
    int64_t kept = 0;
    for (int64_t i = 0; i < n; i += kLanes) {
      const F32 x = load(numbers + i);
      const uint32_t lanes = (reaches(x, pivot) ^ (reached ? 0 : kAllLanes)) & first_lanes(n - i);
      if (masses) compress(load(masses + i), lanes, w.left_mass + kept);
      kept += compress(x, lanes, w.left + kept);
    }
    store(w.left + kept, splat(-kInf));
    if (!reached) above += over;
    (reached ? low : high) = reached ? middle : middle - 1;
    numbers = w.left;
    if (masses) masses = w.left_mass;
    n = kept;
  }
  return float_of_key(low);
}

// ---- 1. The range
// --------------------------------------------------------------------------------

// If k of these numbers reach a bound, so do k tokens: they are maxima of sets of tokens.
inline float bound_of_rank(const float* maxima, int64_t n, int64_t k, Workspace& w) {
  int64_t some = 0;  // those that are not -inf
  for (int64_t i = 0; i < n; i += kLanes)
    some += __builtin_popcount(reaches(load(maxima + i), splat(kLowest)));
  return some < k ? kLowest : select(maxima, nullptr, n, static_cast<double>(k), w);
}

// p = 0 keeps the best token.
inline double nucleus(float top_p, double mass) {
  return top_p > 0 ? top_p * mass : std::numeric_limits<double>::min();
}

// All tokens with at most (1 - p) / V of the mass hold at most 1 - p of it: none is kept.
inline float lowest_in_nucleus(const Row& row, float top_p) {
  const double share = (1.0 - top_p) * row.mass / static_cast<double>(row.vocab);
  const float bound = row.max + (static_cast<float>(std::log(share)) - 1e-3f) / row.inv_t;
  return std::max(bound < row.max ? bound : row.max, kLowest);
}

// Looks at one vector of each group. The mass below a score x, which is that of many small tokens,
// is known from such a sample within some standard deviations; the mass above x would not be.
inline Range nucleus_range(const Row& row, float top_p, Workspace& w) {
  const float low = lowest_in_nucleus(row, top_p);
  double rest = 0;  // the mass of the groups that are all below `low`
  int64_t n = 0;
  for (int64_t j = 0; j < row.groups; j += kLanes) {
    const F32 top = load(w.group_max + j);
    const F32 mass = load(row.tempered + j) * exp((top - row.max) * row.inv_t);
    rest += sum_of(top >= low ? F32{} : mass);
  }
  for (int64_t j = 0; j < row.groups; ++j) {
    if (!(w.group_max[j] >= low)) continue;
    const F32 s = load(w.scores + j * kGroup + (j * 5 + 3) % kVectors * kLanes);
    store(w.listed_mass + n, exp((s - row.max) * row.inv_t));
    store(w.listed + n, s);
    n += kLanes;
  }
  const Range whole{low, kInf};
  if (n * kVectors < kWorthNarrowing) return whole;

  // Tokens of -s from the top are tokens of s from the bottom.
  int64_t sampled = 0;
  for (int64_t i = 0; i < n; i += kLanes) {
    const F32 s = load(w.listed + i);
    const uint32_t lanes = reaches(s, splat(kLowest));
    compress(load(w.listed_mass + i), lanes, w.listed_mass + sampled);
    sampled += compress(-s, lanes, w.listed + sampled);
  }
  store(w.listed + sampled, splat(-kInf));
  const double tail = ((1 - top_p) * row.mass - rest) / kVectors;
  if (!(tail > 0)) return whole;
  const F32 edge = splat(select(w.listed, w.listed_mass, sampled, tail, w));
  double squares = 0, total = 0;
  for (int64_t i = 0; i < sampled; i += kLanes) {
    const F32 m = load(w.listed + i) > -kInf ? load(w.listed_mass + i) : F32{};
    total += sum_of(m);
    squares += sum_of(load(w.listed + i) >= edge ? m * m : F32{});
  }
  const double deviations = 4 * std::sqrt(squares);
  Range range = whole;
  if (tail - deviations > 0)
    range.low = std::max(low, -select(w.listed, w.listed_mass, sampled, tail - deviations, w));
  if (tail + deviations < total) {
    const float high = -select(w.listed, w.listed_mass, sampled, tail + deviations, w);
    range.high = float_of_key(key_of(high) + 1);
  }
  return range;
}

// The lowest score that min-p keeps.
inline float least_of(const Row& row, const Truncation& cut) {
  return cut.min_p > 0 ? row.max + std::log(cut.min_p) / row.inv_t : -kInf;
}

// With `sampled` it may be wrong, else it is sure.
inline Range range_of(const Row& row, const Truncation& cut, bool sampled, Workspace& w) {
  if (cut.ranks(row.vocab)) {
    const bool few = 2 * cut.top_k <= row.groups;
    return {few ? bound_of_rank(w.group_max, row.groups, cut.top_k, w)
                : bound_of_rank(w.lane_max, row.groups * kLanes, cut.top_k, w),
            kInf};
  }
  const float least = std::max(least_of(row, cut), kLowest);
  if (cut.top_p >= 1) return {least, least};
  const Range range =
      sampled ? nucleus_range(row, cut.top_p, w) : Range{lowest_in_nucleus(row, cut.top_p), kInf};
  return {std::max(range.low, least), std::max(range.high, least)};
}

// ---- 2. Gathering
// --------------------------------------------------------------------------------

// The mass of a group's tokens from `high` up, below the group's maximum: from those above or from
// those below, whichever are fewer. So a difference loses no digits. `over` are the lanes above.
inline float sure_mass(const float* s, const uint32_t* over, int count, float top, float whole,
                       float inv_t) {
  if (count == 0) return 0;
  alignas(64) float few[kGroup + kLanes];
  const bool above = 2 * count <= kGroup;
  int n = 0;
  for (int v = 0; v < kVectors; ++v)
    n += compress(load(s + v * kLanes), over[v] ^ (above ? 0 : kAllLanes), few + n);
  store(few + n, splat(-kInf));
  const float sum = exp_sum(few, (n + kLanes - 1) / kLanes, top, inv_t);
  return above ? sum : whole - sum;
}

// Lists the tokens of some groups that lie within the range, and their masses below the row's
// maximum. Leaves how many each group has, their mass and the mass that is above the range. Returns
// how many are listed.
inline int64_t gather(const Row& row, Range range, int64_t begin, int64_t end, Workspace& w) {
  const F32 low = splat(range.low), high = splat(range.high);
  float* const to = w.listed + w.list_at(begin);
  float* const mass = w.listed_mass + w.list_at(begin);
  int64_t n = 0;
  for (int64_t j = begin; j < end; ++j) {
    w.group_sure[j] = w.group_reach[j] = 0;
    w.group_listed[j] = 0;
    if (!(w.group_max[j] >= range.low)) continue;
    const float* s = w.scores + j * kGroup;
    const int64_t first = n;
    uint32_t over[kVectors];
    int count = 0;
    for (int v = 0; v < kVectors; ++v) {
      const F32 x = load(s + v * kLanes);
      over[v] = reaches(x, high);
      count += __builtin_popcount(over[v]);
      n += compress(x, reaches(x, low) & ~over[v], to + n);
    }
    w.group_sure[j] = sure_mass(s, over, count, w.group_max[j], row.tempered[j], row.inv_t);
    if (n == first) continue;
    w.group_listed[j] = static_cast<int32_t>(n - first);
    store(to + n, splat(-kInf));
    F32 sum = {};
    for (int64_t i = first; i < n; i += kLanes) {
      const F32 m = exp((load(to + i) - row.max) * row.inv_t);
      store(mass + i, m);
      sum += m;
    }
    w.group_reach[j] = total_of(sum);
  }
  return n;
}

// Moves a member's list to the end of the others', of which there are n.
inline void append(int64_t begin, int64_t listed, int64_t n, Workspace& w) {
  std::memmove(w.listed + n, w.listed + w.list_at(begin), listed * sizeof(float));
  std::memmove(w.listed_mass + n, w.listed_mass + w.list_at(begin), listed * sizeof(float));
}

// ---- 3. The threshold
// ----------------------------------------------------------------------------

// The mass above the range, and that from its low end up.
struct Reach {
  double sure, all;
};

inline Reach reach_of(const Row& row, const Workspace& w) {
  Reach reach{0, 0};
  for (int64_t j = 0; j < row.groups; j += kLanes) {
    const F32 below = exp((load(w.group_max + j) - row.max) * row.inv_t);
    reach.sure += sum_of(load(w.group_sure + j) * below);
    reach.all += sum_of(load(w.group_reach + j));
  }
  reach.all += reach.sure;
  return reach;
}

// Whether what was gathered holds the threshold.
inline bool holds(const Row& row, const Truncation& cut, Range range, const Reach& reach) {
  if (cut.ranks(row.vocab) || cut.top_p >= 1) return true;
  const double target = nucleus(cut.top_p, row.mass);
  return reach.sure < target &&
         (reach.all >= target || range.low <= lowest_in_nucleus(row, cut.top_p) ||
          range.low <= least_of(row, cut));
}

// The threshold, of which the list of n tokens holds all that decides it.
inline float settle(const Row& row, const Truncation& cut, int64_t n, double sure, Workspace& w) {
  store(w.listed + n, splat(-kInf));
  float threshold = -kInf;
  double mass = row.mass;
  if (cut.ranks(row.vocab)) {
    threshold = select(w.listed, nullptr, n, static_cast<double>(cut.top_k), w);
    mass = 0;
    for (int64_t i = 0; i < n; i += kLanes)
      mass += sum_of(load(w.listed + i) >= threshold ? load(w.listed_mass + i) : F32{});
  }
  if (cut.top_p < 1 && n > 0)
    threshold =
        std::max(threshold, select(w.listed, w.listed_mass, n, nucleus(cut.top_p, mass) - sure, w));
  return std::max(threshold, least_of(row, cut));
}

// Writes the mass of each group, below the row's maximum.
inline void all_masses(const Row& row, float* masses, const Workspace& w) {
  for (int64_t j = 0; j < row.groups; j += kLanes)
    store(masses + j, load(row.tempered + j) * exp((load(w.group_max + j) - row.max) * row.inv_t));
}

// The same of the tokens that stay. Returns their sum.
inline double kept_masses(const Row& row, float threshold, float* kept, Workspace& w) {
  double all = 0;
  for (int64_t j = 0; j < row.groups; j += kLanes)
    store(kept + j, load(w.group_sure + j) * exp((load(w.group_max + j) - row.max) * row.inv_t));
  int64_t i = 0;
  for (int64_t j = 0; j < row.groups; ++j) {
    const int64_t end = i + w.group_listed[j];
    if (i < end) {
      F32 sum = {};
      for (; i < end; i += kLanes) {
        const uint32_t lanes = reaches(load(w.listed + i), splat(threshold));
        sum += only(lanes & first_lanes(end - i), load(w.listed_mass + i));
      }
      kept[j] += total_of(sum);
      i = end;
    }
    all += kept[j];
  }
  return all;
}

}  // namespace CF_ISA
}  // namespace crossfade
