// The state of a search for the threshold of top-k or top-p, without a sort: threshold.cuh runs it.
#pragma once
#include <cstdint>

namespace crossfade {
namespace cuda {

// Finds the largest key x such that the tokens whose keys are at least x reach the target, by their
// count W (top-k) or their mass W (top-p). Every token whose key equals the threshold is kept. The
// key is found digit by digit from the top: each round fills a histogram over digit() of the keys
// that are in_play(), then descend_to() takes a digit.
struct RadixSearch {
  static constexpr int kBins = 1 << 11;

  double target;     // > 0
  double above = 0;  // W of the keys known to lie above the threshold
  uint32_t prefix = 0;
  int round = 0, shift = 32;

  __device__ explicit RadixSearch(double target) : target(target) { shift -= bits(); }
  __device__ int bits() const { return round < 2 ? 11 : 10; }
  __device__ bool done() const { return round == 3; }
  __device__ bool in_play(uint32_t key) const {
    return round == 0 || (key ^ prefix) >> (shift + bits()) == 0;
  }
  __device__ uint32_t digit(uint32_t key) const { return (key >> shift) & ((1u << bits()) - 1); }
  __device__ uint32_t threshold() const { return prefix; }

  // `digit` is the first from the top at which W reaches the target. `over` is the W of the digits
  // above it in this round's histogram.
  __device__ void descend_to(uint32_t digit, double over) {
    above += over;
    prefix |= digit << shift;
    if (++round < 3) shift -= bits();
  }
};

}  // namespace cuda
}  // namespace crossfade
