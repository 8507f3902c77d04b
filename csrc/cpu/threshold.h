// Finds the score below which truncation removes tokens: top-k, top-p and min-p without a sort.
//
//   1. `range_of` says between which two scores the threshold lies, from what is known of the
//      row's groups and, for top-p, from a sample of its tokens.
//   2. `pack` reads the row's scores, which lie in the cache, and lists what may matter. `weigh`
//      sums the mass of the tokens above the range, which stay for sure, and lists those within it.
//   3. `settle` finds the threshold among these, and `keep` the mass that stays of each group.
//
// A sample may mislead. What was weighed shows it, and then all tokens are listed.
#pragma once
#include <algorithm>
#include <cmath>
#include <limits>

#include "select.h"

namespace crossfade {
inline namespace CF_ISA {

struct Truncation {
  int64_t top_k;
  float top_p, min_p;

  bool any() const { return top_k > 0 || top_p < 1 || min_p > 0; }
  bool ranks(int64_t vocab) const { return top_k > 0 && top_k < vocab; }
  // Whether only few groups can hold tokens that stay.
  bool few(int64_t vocab) const { return ranks(vocab) && 2 * top_k <= groups_of(vocab); }
};

// A row at a temperature. Masses are of exp((s - max) * inv_t), for the row's maximum.
struct Row {
  int64_t vocab, groups;
  float max, inv_t;
  double mass;            // the sum of exp((s - max) * inv_t)
  const float* tempered;  // [groups]: the mass of each, but below its own maximum
};

// Writes the mass of each group.
inline void all_masses(const Row& row, Workspace& w) {
  for (int64_t j = 0; j < row.groups; j += kLanes) {
    const F32 below = exp((load(w.group_max + j) - row.max) * row.inv_t);
    store(w.group_mass + j, load(row.tempered + j) * below);
  }
}

// Where the threshold lies: low <= threshold < high.
struct Range {
  float low, high;
};
constexpr int64_t kWorthNarrowing = 8192;  // tokens
constexpr float kLowest = -std::numeric_limits<float>::max();

// ---- 1. The range -------------------------------------------------------------------------------

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

// Looks at one token in 32. The mass below a score x, which is that of many small tokens, is known
// from such a sample within some standard deviations; the mass above x would not be.
inline Range nucleus_range(const Row& row, float top_p, Workspace& w) {
  constexpr int kEvery = std::max(1, 32 / kVectors);  // groups, of each of which we take a vector
  constexpr double kRate = kEvery * kVectors;
  const Range whole{lowest_in_nucleus(row, top_p), kInf};
  const F32 low = splat(whole.low);
  F32 below = {}, squares = {};  // of what is below `low`
  // We list -s: from its top, such a list is the row from its bottom.
  int64_t n = 0;
  for (int64_t j = 0; j < row.groups; j += kEvery) {
    const F32 s = load(w.scores + j * kGroup + (j * 5 + 3) % kVectors * kLanes);
    const F32 m = exp((s - row.max) * row.inv_t);
    const uint32_t lanes = reaches(s, low);
    below += only(~lanes & kAllLanes, m);
    squares += only(~lanes & kAllLanes, m * m);
    compress(m, lanes, w.listed_mass + n);
    n += compress(-s, lanes, w.listed + n);
  }
  store(w.listed + n, splat(-kInf));
  const double tail = (1 - top_p) * row.mass / kRate - sum_of(below);
  if (n * kRate < kWorthNarrowing || !(tail > 0)) return whole;

  const F32 edge = splat(select(w.listed, w.listed_mass, n, tail, w));
  F32 all = {};
  for (int64_t i = 0; i < n; i += kLanes) {
    const F32 x = load(w.listed + i), m = load(w.listed_mass + i);
    all += x > -kInf ? m : F32{};
    squares += x >= edge ? m * m : F32{};
  }
  const double deviations = 4 * std::sqrt(sum_of(squares));
  Range range = whole;
  if (tail - deviations > 0)
    range.low = std::max(range.low, -select(w.listed, w.listed_mass, n, tail - deviations, w));
  if (tail + deviations < sum_of(all)) {
    const float high = -select(w.listed, w.listed_mass, n, tail + deviations, w);
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
    return {cut.few(row.vocab) ? bound_of_rank(w.group_max, row.groups, cut.top_k, w)
                               : bound_of_rank(w.lane_max, row.groups * kLanes, cut.top_k, w),
            kInf};
  }
  const float least = std::max(least_of(row, cut), kLowest);
  if (cut.top_p >= 1) return {least, least};
  const Range range =
      sampled ? nucleus_range(row, cut.top_p, w) : Range{lowest_in_nucleus(row, cut.top_p), kInf};
  return {std::max(range.low, least), std::max(range.high, least)};
}

// ---- 2. Gathering -------------------------------------------------------------------------------

// Of each group it packs the tokens from `low` up into a list or, if they are fewer, those below
// `high`. In the second case most tokens stay, so that the group's mass less that of some packed
// tokens loses no digits. scores(j) are those of group j.
template <class Scores>
inline void pack(Range range, int64_t begin, int64_t end, Workspace& w, Scores scores) {
  const F32 low = splat(range.low), high = splat(range.high);
  float* to = w.listed + w.list_at(begin);
  bool below = false;
  for (int64_t j = begin; j < end; ++j) {
    w.packed[j] = {};
    if (!(w.group_max[j] >= range.low)) continue;
    const float* const s = scores(j);
    const auto take = [&] {
      const F32 least = below ? high : low;
      const uint32_t flip = below ? kAllLanes : 0;
      int count = 0;
      for (int v = 0; v < kVectors; ++v) {
        const F32 x = load(s + v * kLanes);
        count += compress(x, reaches(x, least) ^ flip, to + count);
      }
      return count;
    };
    int count = take();
    if (2 * count > kGroup && range.high < kInf) {
      below = !below;  // the groups that follow are likely alike
      count = take();
      if (2 * count > kGroup && below) {
        below = false;
        count = take();
      }
    }
    w.packed[j] = {static_cast<uint16_t>(count), below};
    to += count;
  }
}

// What a member finds about the range.
struct Found {
  int64_t near = 0;                // tokens within it
  double near_mass = 0, sure = 0;  // their mass, and the mass above them
};

// Writes the masses of the packed tokens, and lists those within the range.
inline Found weigh(const Row& row, Range range, int64_t begin, int64_t end, Workspace& w) {
  const F32 low = splat(range.low), high = splat(range.high);
  const int64_t at = w.list_at(begin);
  const float* const x = w.listed + at;
  Found found;
  int64_t i = 0;
  for (int64_t j = begin; j < end;) {
    const bool below = w.packed[j].below;
    int64_t to = i;  // where a run of groups of one kind ends
    for (; j < end && w.packed[j].below == below && to - i < 1024; ++j) {
      to += w.packed[j].count;
      if (below) found.sure += w.group_mass[j];
    }
    F32 near = {}, others = {};
    for (; i < to; i += kLanes) {
      const F32 s = load(x + i), m = exp((s - row.max) * row.inv_t);
      const uint32_t valid = first_lanes(to - i), over = reaches(s, high);
      const uint32_t inside = reaches(s, low) & ~over & valid;
      store(w.listed_mass + at + i, m);
      near += only(inside, m);
      others += only((below ? kAllLanes : over) & valid, m);
      compress(m, inside, w.near_mass + at + found.near);
      found.near += compress(s, inside, w.near + at + found.near);
    }
    i = to;
    found.near_mass += total_of(near);
    found.sure += below ? -total_of(others) : total_of(others);
  }
  return found;
}

// Puts together what the members found, and their lists. begin(i) is member i's first group.
template <class Begin>
Found together(const Found* of, int members, Begin begin, Workspace& w) {
  Found all = of[0];
  for (int i = 1; i < members; ++i) {
    const int64_t from = w.list_at(begin(i)), bytes = of[i].near * sizeof(float);
    std::memmove(w.near + all.near, w.near + from, bytes);
    std::memmove(w.near_mass + all.near, w.near_mass + from, bytes);
    all.near += of[i].near;
    all.near_mass += of[i].near_mass;
    all.sure += of[i].sure;
  }
  store(w.near + all.near, splat(-kInf));
  return all;
}

// ---- 3. The threshold ---------------------------------------------------------------------------

// Whether the threshold lies within the range.
inline bool holds(const Row& row, const Truncation& cut, Range range, double sure, double near) {
  if (cut.ranks(row.vocab) || cut.top_p >= 1) return true;
  const double target = nucleus(cut.top_p, row.mass);
  return sure < target &&
         (sure + near >= target || range.low <= lowest_in_nucleus(row, cut.top_p) ||
          range.low <= least_of(row, cut));
}

inline float settle(const Row& row, const Truncation& cut, const Found& found, Workspace& w) {
  float threshold = -kInf;
  double mass = row.mass;
  if (cut.ranks(row.vocab)) {
    threshold = select(w.near, nullptr, found.near, static_cast<double>(cut.top_k), w);
    mass = 0;
    for (int64_t i = 0; i < found.near; i += kLanes)
      mass += total_of(load(w.near + i) >= threshold ? load(w.near_mass + i) : F32{});
  }
  if (cut.top_p < 1 && found.near > 0)
    threshold = std::max(threshold, select(w.near, w.near_mass, found.near,
                                           nucleus(cut.top_p, mass) - found.sure, w));
  return std::max(threshold, least_of(row, cut));
}

// Leaves in w.group_mass the mass of the groups' tokens that stay.
inline void keep(float threshold, int64_t begin, int64_t end, Workspace& w) {
  int64_t i = w.list_at(begin);
  for (int64_t j = begin; j < end; ++j) {
    const Packed packed = w.packed[j];
    F32 sum = {};
    for (const int64_t to = i + packed.count; i < to;) {
      const uint32_t over = reaches(load(w.listed + i), splat(threshold));
      sum += only((packed.below ? ~over : over) & first_lanes(to - i), load(w.listed_mass + i));
      i = std::min<int64_t>(i + kLanes, to);
    }
    w.group_mass[j] = packed.below ? w.group_mass[j] - total_of(sum) : total_of(sum);
  }
}

}  // namespace CF_ISA
}  // namespace crossfade
