// Finds where top-p alone cuts a flat row, whose lists do not hold all tokens that stay, in fewer
// readings than a radix search takes.
//
// The scores from the lowest that can stay to the best fall into even bins. One reading adds up the
// mass of each, which tells in which bin the threshold lies: the edge. The next reading runs the
// race of groups over the tokens of higher bins, which all stay, and lists the tokens of the edge.
// Ranking those gives the threshold. Then only the groups to which tokens of the edge belong that
// stay, too, are read and entered once more.
#pragma once
#include "threshold.cuh"

namespace crossfade {
namespace cuda {

// Even bins of scores from `low` to `max`, from the top.
struct Bins {
  static constexpr uint32_t kCount = RadixSearch::kBins;

  float max, low, per_score;

  // All tokens that hold at most (1 - p) / V of the mass hold at most 1 - p together: the others
  // hold p of it, so that none of these stays.
  __device__ Bins(const RowMass& mass, float top_p, uint32_t vocab) : max(mass.max) {
    const float least = logf((1 - top_p) / static_cast<float>(vocab)) - logf(mass.share);
    low = max + (least - 1e-3f) / mass.inv_t;
    per_score = kCount / (max - low);
  }

  // Extreme scores and temperatures leave no room for bins.
  __device__ bool usable() const { return max > low && low > -FLT_MAX && per_score < FLT_MAX; }

  // It never falls where the score rises.
  __device__ uint32_t of(float s) const {
    return min(static_cast<uint32_t>((max - s) * per_score), kCount - 1);
  }

  // The lowest score of the bins before `end`.
  __device__ float lowest_before(uint32_t end) const {
    if (end == 0) return INFINITY;
    uint32_t from = key_of(low), to = key_of(max);
    while (from < to) {
      const uint32_t middle = from + (to - from) / 2;
      if (of(float_of_key(middle)) < end)
        to = middle;
      else
        from = middle + 1;
    }
    return float_of_key(to);
  }
};

// Finds m.edge, from m.mass. Returns whether it has so few tokens that they can be listed, the same
// in all threads of the team.
template <class Scores>
__device__ __forceinline__ bool find_edge(const Slice& slice, const Scores& scores,
                                          ThresholdMemory& m, float top_p, uint32_t vocab) {
  const Bins bins(m.mass, top_p, vocab);
  if (!bins.usable()) return false;
  if (threadIdx.x == 0) m.edge.found = false;
  clear_histogram(m);
  sweep(slice, scores, [&](uint32_t, uint32_t, const Eight& s, float top) {
    if (!(top >= bins.low)) return;
    uint32_t some = which([&](uint32_t i) { return s[i] >= bins.low; });
    for (; some; some &= some - 1) {
      const float x = pick(s, __ffs(some) - 1);
      count(m, Bins::kCount - 1 - bins.of(x), m.mass.of(x));
    }
  });
  const auto target = [&](double) { return static_cast<double>(nucleus(top_p, kWholeMass)); };
  find_digit(m, Bins::kCount, target, [&](uint32_t digit, uint64_t above) {
    const uint32_t bin = Bins::kCount - 1 - digit;
    const float low = bins.lowest_before(bin + 1), high = bins.lowest_before(bin);
    // None of its tokens has more mass than one of its highest score would.
    const double least_tokens = static_cast<double>(m.team[digit]) /
                                fmax(1.0, static_cast<double>(m.mass.of(fminf(high, bins.max))));
    m.edge = {low, high, least_tokens <= kListed, above};
  });
  return m.edge.found;
}

}  // namespace cuda
}  // namespace crossfade
