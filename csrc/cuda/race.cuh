// Gumbel-max on two levels, see ../blend_math.h: the group with the largest log-sum-exp of tempered
// scores + noise wins, and of its tokens the one with the largest tempered score + noise.
#pragma once
#include <cfloat>

#include "row_blend.cuh"

namespace crossfade {
namespace cuda {

constexpr uint32_t kNone = 0xFFFFFFFFu;

// The best of some tokens, or of some groups: the one with the largest score * inv_t + noise, of a
// tie the lowest index. A group's score is its best token's. The rest of its log-sum-exp,
//   log sum of e^(inv_t x) over its scores x = inv_t max x + log sum of e^(inv_t (x - max x)),
// counts as noise.
struct Best {
  float score = -INFINITY, noise = -INFINITY;
  uint32_t index = kNone;

  // It compares differences of scores, so that large scores cost no accuracy. Comparing `a` with
  // `b` and `b` with `a` gives the same winner.
  __device__ bool loses_to(const Best& other, float inv_t) const {
    const float lead = (other.score - score) * inv_t, handicap = noise - other.noise;
    return lead > handicap || (lead == handicap && other.index < index);
  }
  // The best of all lanes.
  __device__ Best over_warp(float inv_t) const {
    return warp_reduce(
        *this, [inv_t](const Best& a, const Best& b) { return a.loses_to(b, inv_t) ? b : a; });
  }
};

// How a row's token is drawn.
struct Draw {
  bool greedy;  // without noise, and groups count as much as their best tokens
  uint64_t seed, stream;
  uint32_t step;
  uint32_t first_token;  // the token that the first column is

  // Groups are counted as their noise is: on from that of the first token.
  __device__ uint32_t first_group() const { return first_token / kGroup; }

  // The noise of the group `index`.
  __device__ float group_noise(uint32_t index) const {
    return greedy ? 0 : noise(kGroupNoise, index);
  }

  // The group `index`, where `rest` is the sum of e^(inv_t (x - max)) over its scores x.
  __device__ Best group(uint32_t index, float max, float rest) const {
    if (greedy) return {max, 0, index};
    return {max, logf(rest) + noise(kGroupNoise, index), index};
  }

  // The token of the column `index`.
  __device__ Best token(uint32_t index, float score) const {
    return {score, greedy ? 0 : noise(0, first_token + index), index};
  }

 private:
  __device__ float noise(uint32_t level, uint32_t index) const {
    const Words<uint32_t> words = philox(level | index / 4, step, stream, seed);
    const uint32_t i = index % 4;
    return gumbel(i < 2 ? (i ? words.w[1] : words.w[0]) : (i == 3 ? words.w[3] : words.w[2]));
  }
};

// A lane's part of what its warp finds out about groups. The warp sums up one group after the
// other, and of 32 each lane keeps one. Then all lanes at once add theirs to `mass` and enter them
// in the race, which takes as long as it would for one.
class Groups {
 public:
  LogSum mass;  // of e^(inv_t x) over all scores x
  Best best;    // of the groups

  __device__ Groups(const Draw& draw, bool races, float inv_t)
      : draw_(draw), races_(races), inv_t_(inv_t), rate_(fminf(inv_t * kLog2E, FLT_MAX)) {}

  __device__ uint32_t first() const { return draw_.first_group(); }

  // All lanes must call it: they hold a group's scores, in the order of tokens, and `max` of them.
  // So the sum depends on the group alone. Lane n % 32 keeps it.
  __device__ void add(uint32_t n, const Eight& s, float max) {
    float sum = sum_of_exp(s, max, rate_);
    sum = warp_reduce(sum, [](float a, float b) { return a + b; });
    if (lane_id() == n % 32) kept_ = {max, sum};
  }

  // After 32 groups, and after the last: `index` is the group that the lane keeps, if it has one.
  __device__ void enter(uint32_t index) {
    if (!(kept_.sum > 0)) return;  // no group, or none of its tokens is left
    mass.add(kept_, inv_t_);
    if (races_) {
      const Best other = draw_.group(index, kept_.max, kept_.sum);
      if (best.loses_to(other, inv_t_)) best = other;
    }
    kept_ = LogSum();
  }

 private:
  const Draw& draw_;  // in shared memory
  const bool races_;
  const float inv_t_, rate_;
  LogSum kept_;
};

}  // namespace cuda
}  // namespace crossfade
