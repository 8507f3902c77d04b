// Finds the score below which top-k, top-p and min-p remove tokens where the lists do not tell, by
// a radix search over the keys of all scores. It reads the inputs again in each round.
#pragma once
#include "shortlist.cuh"

namespace crossfade {
namespace cuda {

// Adds a score with weight w to this block's histogram.
__device__ __forceinline__ void count(ThresholdMemory& m, uint32_t digit, uint64_t w) {
  atomicAdd(&m.low[digit], static_cast<uint32_t>(w & 0xFFFu));
  if (w >> 12) atomicAdd(&m.high[digit], static_cast<uint32_t>(w >> 12));
}

// Called before a histogram is filled.
__device__ __forceinline__ void clear_histogram(ThresholdMemory& m) {
  Team::sync();  // until then members read what lies there
  for (uint32_t d = threadIdx.x; d < RadixSearch::kBins; d += blockDim.x) m.low[d] = m.high[d] = 0;
  __syncthreads();
}

// Fills m.team: each member adds up its part of the digits and copies the parts of the others.
__device__ __forceinline__ void merge_histograms(ThresholdMemory& m, uint32_t bins) {
  Team::sync();
  const uint32_t part = bins / Team::size(), first = Team::rank() * part;
  for (uint32_t d = first + threadIdx.x; d < first + part; d += blockDim.x) {
    uint64_t sum = 0;
#pragma unroll 4
    for (uint32_t r = 0; r < Team::size(); ++r) {
      const ThresholdMemory& from = Team::at(r, m);
      sum += (static_cast<uint64_t>(from.high[d]) << 12) + from.low[d];
    }
    m.team[d] = sum;
  }
  Team::sync();
  for (uint32_t d = threadIdx.x; d < part * Team::size(); d += blockDim.x) {
    if (d / part != Team::rank()) m.team[d] = Team::at(d / part, m).team[d];
  }
  __syncthreads();
}

// Merges the team's histograms, and finds the first digit from the top at which the sum of their
// digits reaches target(sum of all). One thread calls found(digit, sum of the digits above), if
// there is such a digit. It is a barrier for the block's shared memory.
template <class Target, class Found>
__device__ __forceinline__ void find_digit(ThresholdMemory& m, uint32_t bins, Target target,
                                           Found found) {
  merge_histograms(m, bins);
  // Each thread takes `per` digits, from the top.
  const uint32_t per = (bins + blockDim.x - 1) / blockDim.x, first = threadIdx.x * per;
  const auto bin = [&](uint32_t i) { return m.team[bins - 1 - i]; };
  uint64_t own = 0;
  for (uint32_t i = first; i < first + per && i < bins; ++i) own += bin(i);
  unsigned long long up_to =
      own;  // running sum over the block up to this thread's digits, which it includes
#pragma unroll 1
  for (uint32_t lanes = 1; lanes < 32; lanes *= 2) {
    const unsigned long long other = __shfl_up_sync(kAllLanes, up_to, lanes);
    if (lane_id() >= lanes) up_to += other;
  }
  if (lane_id() == 31) m.warp_total[warp_id()] = up_to;
  __syncthreads();
  uint64_t before = up_to - own, total = 0;
#pragma unroll 1
  for (uint32_t w = 0; w < warp_count(); ++w) {
    if (w < warp_id()) before += m.warp_total[w];
    total += m.warp_total[w];
  }
  const double goal = target(static_cast<double>(total));
  if (static_cast<double>(before) < goal && static_cast<double>(before + own) >= goal) {
    uint32_t i = first;
    uint64_t sum = before, here = bin(i);
    while (static_cast<double>(sum + here) < goal) {
      sum += here;
      here = bin(++i);
    }
    found(bins - 1 - i, sum);
  }
  __syncthreads();
}

// Does one round of m.search on the team's histograms. Returns false if the search has no result,
// as fewer tokens than its target are left.
__device__ __forceinline__ bool descend(ThresholdMemory& m, bool weigh) {
  const bool new_search = m.search.round == 0;
  const double above = m.search.above;
  double target = m.search.target;
  bool reached = true;
  const auto missing = [&](double total) {
    if (new_search) {
      if (weigh) target = fmax(1.0, target * total);
      reached = total >= target;
    }
    return reached ? target - above : INFINITY;
  };
  find_digit(m, 1u << m.search.bits(), missing, [&](uint32_t digit, uint64_t over) {
    m.search.target = target;
    m.search.descend_to(digit, static_cast<double>(over));
  });
  return reached;
}

// The largest score x such that the tokens of scores at least x reach the target; -inf if none do.
// Only scores of at least `least` count. The target is a number of tokens or, with `weigh`, a part
// of all mass.
template <class Scores>
__device__ __forceinline__ float radix_threshold(const Slice& slice, const Scores& scores,
                                                 ThresholdMemory& m, bool weigh, float least,
                                                 double target) {
  __syncthreads();  // until then threads read the last search
  if (threadIdx.x == 0) m.search = RadixSearch(target);
  do {
    clear_histogram(m);
    sweep(slice, scores, [&](uint32_t, uint32_t, const Eight& s, float top) {
      if (!(top >= least)) return;
      uint32_t in_play = which([&](uint32_t i) {
        return s[i] >= least && s[i] > -INFINITY && m.search.in_play(key_of(s[i]));
      });
      for (; in_play; in_play &= in_play - 1) {
        const float x = pick(s, __ffs(in_play) - 1);
        count(m, m.search.digit(key_of(x)), weigh ? m.mass.of(x) : 1);
      }
    });
    if (!descend(m, weigh)) return -INFINITY;
  } while (!m.search.done());
  return float_of_key(m.search.threshold());
}

// Finds the threshold where the lists do not give it.
template <class Scores>
__device__ __forceinline__ float threshold(const Slice& slice, const Scores& scores,
                                           ThresholdMemory& m, const Cut& cut) {
  float cutoff = -INFINITY;
#pragma unroll 1
  for (int nucleus = 0; nucleus < 2; ++nucleus) {
    if (nucleus ? cut.top_p >= 1 : cut.top_k == 0) continue;
    const double target = nucleus ? cut.top_p : static_cast<double>(cut.top_k);
    cutoff = fmaxf(cutoff, radix_threshold(slice, scores, m, nucleus, cutoff, target));
  }
  return fmaxf(cutoff, m.least);
}

}  // namespace cuda
}  // namespace crossfade
