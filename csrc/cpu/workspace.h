// Memory that a thread keeps from one row to the next.
#pragma once
#include <cstdlib>

#include "groups.h"

namespace crossfade {
inline namespace CF_ISA {

// How many of a group's tokens are packed into a list: those from a score up, or those below one.
struct Packed {
  uint16_t count, below;
};

struct Workspace {
  float* scores = nullptr;  // of each token
  // Lists of tokens. Vectors that are written to one may reach past its end: see list_at.
  float *listed, *listed_mass, *near, *near_mass, *left, *left_mass;
  // For each group: what its reading left, its mass, and what is packed of it.
  float *group_max, *group_sum, *group_tempered, *group_mass;
  Packed* packed;
  float* lane_max;             // for each lane of each group
  float *term_max, *term_sum;  // for each group of each term
  float* push_sum;             // for each group of each term and value
  uint32_t* words;             // of noise, for each group, or each token of one
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
    groups = (needed + 15) / 16 * 16;
    const int64_t tokens = list_at(groups + 1);
    float** const lists[] = {&listed, &listed_mass, &near, &near_mass, &left, &left_mass};
    float** const of_groups[] = {&group_max, &group_sum, &group_tempered, &group_mass};
    const int64_t numbers = 7 * tokens + (6 + kLanes + 4 * kMaxTerms) * groups + 2 * kGroup;
    // Of a size that is no multiple of the alignment, sanitizers and some libraries give nothing.
    const size_t bytes = (numbers * sizeof(float) + 63) / 64 * 64;
    float* at = scores = static_cast<float*>(std::aligned_alloc(64, bytes));
    if (!scores) {
      groups = 0;
      return false;
    }
    at += tokens;
    for (float** list : lists) *list = at, at += tokens;
    for (float** list : of_groups) *list = at, at += groups;
    lane_max = at, at += kLanes * groups;
    term_max = at, at += kMaxTerms * groups;
    term_sum = at, at += kMaxTerms * groups;
    push_sum = at, at += 2 * kMaxTerms * groups;
    packed = reinterpret_cast<Packed*>(at), at += groups;
    words = reinterpret_cast<uint32_t*>(at);
    return true;
  }
};

}  // namespace CF_ISA
}  // namespace crossfade
