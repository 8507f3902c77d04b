// Reads a row as often as its settings need, and draws its token: steps 1 to 5 of blend_sample.cu.
#pragma once
#include "edge.cuh"

namespace crossfade {
namespace cuda {

// A row's settings.
struct Settings {
  bool bad;
  float temperature, min_p;
  Cut cut;
  Draw draw;
};

// What is known of a row in the end. A token of score s has log pi = s - max - log_sum.
struct Result {
  float max, log_sum;
  float log_kept;  // log of the sum of exp((s - max) / temperature) over the tokens that stay
};

enum Step { kSupport, kBlend, kEdge, kRest };

// What one reading of the row does besides the sums.
struct Task {
  bool lists, races;
  float inv_t;
  float from, listed_from;  // scores below `from` are left out, but listed from listed_from on
};

// All of a block's shared memory. It also holds what is the same in all threads, to leave registers
// to the sweeps.
struct Shared {
  Exchange exchange;
  Slice slice;
  RowBlend row;
  Settings own;
  Step step;  // the step under way
  Cut cut;    // the truncation that this step does
  Task task;
  Result result;
  uint32_t token;  // in the team's first member: the row's, where its pushes are asked for
  ThresholdMemory threshold;
};
static_assert(sizeof(Shared) <= 48 * 1024, "more takes an attribute of the kernel");

#ifndef CF_EMULATED
__device__ __forceinline__ Shared& shared_memory() {
  __shared__ alignas(16) unsigned char bytes[sizeof(Shared)];
  return *reinterpret_cast<Shared*>(bytes);
}
#endif

// What one reading of a row's scores finds out.
struct Totals {
  LogSum at_one, at_t;  // at temperature 1, and at the task's
  Best best;
  float floor = -INFINITY;
  uint32_t flags = 0;
};
constexpr uint32_t kBad = 1, kListOverflows = 2;

struct FourSums {
  LogSum of[4];
};

// Step 1: the normalisers of the terms that need them, or of `all` terms. Where they are not given,
// the terms are read for their log-sum-exp.
__device__ __forceinline__ void normalise_terms(Team& team, const Slice& slice, RowBlend& row,
                                                const Blend& blend, bool all) {
  const uint32_t terms = blend.terms, vocab = static_cast<uint32_t>(blend.vocab);
  if (blend.log_z) {
    if (threadIdx.x < terms)
      row.log_z[threadIdx.x] = {0, blend.log_z[Team::row() * terms + threadIdx.x]};
    __syncthreads();
    return;
  }
  for (uint32_t n = 0; n < terms; n += 4) {
    FourSums sums;
    const auto wanted = [&](uint32_t k) { return k < terms && (all || row.normalised >> k & 1); };
    for (uint32_t round = 0; round < slice.rounds; ++round) {
      const uint32_t v = slice.begin + (round * blockDim.x + threadIdx.x) * kWidth;
      if (v >= slice.end) break;
#pragma unroll
      for (uint32_t j = 0; j < 4; ++j) {
        if (!wanted(n + j)) continue;
        const Input& in = row.term[n + j];
        Eight z;
        unpack(in, load(in, v, vocab), z);
        float top = -INFINITY;
#pragma unroll
        for (uint32_t i = 0; i < kWidth; ++i) {
          if (v + i >= vocab) z[i] = -INFINITY;
          top = fmaxf(top, z[i]);
        }
        sums.of[j].add(z, top);
      }
    }
    sums = team.reduce(sums, [](FourSums x) {
#pragma unroll
      for (LogSum& one : x.of) one = one.over_warp();
      return x;
    });
    if (threadIdx.x == 0) {
#pragma unroll
      for (uint32_t j = 0; j < 4; ++j)
        if (n + j < terms)
          row.log_z[n + j] = {sums.of[j].max, sums.of[j].finite() ? sums.of[j].log_sum() : NAN};
    }
  }
  __syncthreads();
}

// The lowest score that min-p keeps: s >= max + log(min_p) / inv_t.
__device__ __forceinline__ float min_p_threshold(float max, double gap) {
  if (gap == -INFINITY) return -INFINITY;
  const double least = static_cast<double>(max) + gap;
  const float rounded = static_cast<float>(least);
  return static_cast<double>(rounded) < least ? float_of_key(key_of(rounded) + 1) : rounded;
}

// Reads the row once and does `task`.
template <class Scores>
__device__ __forceinline__ Totals read(Team& team, const Slice& slice, const Scores& scores,
                                       Shortlist& list, const Draw& draw, const Task& task) {
  Totals mine;
  Groups groups(draw, task.races, task.inv_t);
  sweep(slice, scores, [&](uint32_t round, uint32_t v, Eight& s, float top) {
    if (task.from > -INFINITY) {
      if (task.listed_from < task.from && top >= task.listed_from)
        list.list(v, s, [&](float x) { return x >= task.listed_from && x < task.from; });
#pragma unroll
      for (float& x : s) x = x >= task.from ? x : -INFINITY;
      top = top >= task.from ? top : -INFINITY;
    }
    const float max = warp_max(top);
    if (task.inv_t != 1) mine.at_one.add(s, max);
    groups.add(round, s, max);
    if (task.lists) list.offer(round, v, s, top);
    if (round % 32 == 31 || round == slice.rounds - 1)
      groups.enter(slice.group_of(round / 32 * 32 + lane_id()));
  });
  mine.at_t = groups.mass;
  mine.best = groups.best;
  mine.floor = task.lists ? list.floor() : -INFINITY;
  // The threads that made the list overflow or the row bad see it for sure, and tell the others.
  mine.flags = (scores.row.spoiled ? kBad : 0) | (list.overflows() ? kListOverflows : 0);
  mine = team.reduce(mine, [&task](Totals x) {
    if (task.inv_t != 1) x.at_one = x.at_one.over_warp();
    x.at_t = x.at_t.over_warp(task.inv_t);
    x.best = x.best.over_warp(task.inv_t);
    x.floor = warp_reduce(x.floor, [](float a, float b) { return fmaxf(a, b); });
    x.flags = warp_reduce(x.flags, [](uint32_t a, uint32_t b) { return a | b; });
    return x;
  });
  if (task.inv_t == 1) mine.at_one = mine.at_t;
  return mine;
}

// What the race of groups over listed tokens finds out.
struct Raced {
  Best group;
  float from = INFINITY;  // the lowest score that stays
  uint64_t kept = 0;      // the mass of the tokens that stay, in fixed point
};

// The group that holds a row's token, and the lowest score that the token may have. Without a group
// the row is bad, or else no token is left in it.
struct Winner {
  Best group;
  float from = -INFINITY;
  bool empty = false;
};

// How far below the best a token may score. One thread computes it, as logarithms of doubles are
// slow on most GPUs.
__device__ __forceinline__ double min_p_gap(float min_p, float temperature) {
  return min_p > 0 ? temperature * log(static_cast<double>(min_p)) : -INFINITY;
}

// The lane's eight scores of a group, -inf below `from`, and their maximum.
template <class Scores>
__device__ __forceinline__ float read_group(const Scores& scores, uint32_t group, float from,
                                            uint32_t vocab, Eight& s) {
  const uint32_t v = group * kGroup + lane_id() * kWidth;
#pragma unroll
  for (float& x : s) x = -INFINITY;
  if (v < vocab) scores(v, s);
  float top = -INFINITY;
#pragma unroll
  for (float& x : s) {
    x = x >= from ? x : -INFINITY;
    top = fmaxf(top, x);
  }
  return top;
}

// Called by one thread: what the row's next step does. A barrier must follow.
__device__ __forceinline__ void begin(Shared& shared, const Blend& blend, Step step, float from,
                                      float listed_from) {
  ThresholdMemory& m = shared.threshold;
  m.listed = m.pulled = m.owned = 0;
  shared.step = step;
  shared.cut = shared.own.cut;
  if (step == kSupport) {
    const Support& cut = blend.support;
    shared.cut = {cut.top_k, cut.top_p, 1.0f, min_p_gap(cut.min_p, 1.0f)};
  }
  const bool lists = step <= kBlend && shared.cut.any();
  shared.task = {lists, step != kSupport && !lists, shared.cut.inv_t, from, listed_from};
}

// Does steps 1 to 4 for one row, whose `shared.own` is set, and fills shared.result. Returns the
// same in all threads of the team.
template <bool kNormed, Format kFormat>
__device__ __forceinline__ Winner read_row(Team& team, Shared& shared, const Blend& blend,
                                           bool all_terms) {
  const uint32_t vocab = static_cast<uint32_t>(blend.vocab);
  const Slice& slice = shared.slice;
  ThresholdMemory& m = shared.threshold;
  const Settings& own = shared.own;
  if (warp_id() == warp_count() - 1) shared.row.set_up(blend, Team::row());
  if (threadIdx.x == 0) {
    shared.own.cut.min_p_gap = min_p_gap(own.min_p, own.temperature);
    shared.slice = Slice(vocab, own.draw.first_group());
    begin(shared, blend, blend.support.term >= 0 ? kSupport : kBlend, -INFINITY, -INFINITY);
  }
  __syncthreads();
  if (shared.row.bad || own.bad) return Winner();

  if (kNormed || all_terms) normalise_terms(team, slice, shared.row, blend, all_terms);
  if (kNormed) {
    for (uint32_t left = shared.row.normalised; left; left &= left - 1)
      if (!shared.row.log_z[__ffs(left) - 1].finite()) return Winner();
  }
  if (shared.step == kSupport) {
    __syncthreads();  // until then threads read the row's means
    if (threadIdx.x == 0) shared.row.set_up_support();
    __syncthreads();
  }

  for (;;) {
    const Step step = shared.step;
    const Cut& cut = shared.cut;
    const Task task = shared.task;
    const auto scores = [&] { return BlendScores<kNormed, kFormat>(shared.row, blend); };
    Shortlist list(m, cut);
    const Totals totals = read(team, slice, scores(), list, own.draw, task);
    if (totals.flags & kBad) return Winner();
    if (step != kEdge && !totals.at_one.finite()) return {Best(), -INFINITY, step == kBlend};
    if (threadIdx.x == 0 && step != kEdge) {
      if (step != kRest) shared.result = {totals.at_one.max, totals.at_one.log_sum()};
      shared.result.log_kept = totals.at_t.log_sum();
    }
    if (task.races && step != kEdge) return {totals.best, task.from, false};

    bool settled = !(totals.flags & kListOverflows);
    if (step == kEdge) {
      settled = settled && list.settle_edge(team);
    } else {
      if (threadIdx.x == 0) {
        m.mass = {totals.at_one.max, cut.inv_t, 1 / totals.at_t.sum};
        m.least = min_p_threshold(m.mass.max, cut.min_p_gap);
      }
      __syncthreads();
      settled = settled && list.settle(team, totals.floor);
    }
    if (settled && step != kSupport) {
      Raced raced;
      if (step == kEdge) {
        raced.group = totals.best;
        raced.from = fminf(list.lowest_kept(team), task.from);
      }
      Groups groups(own.draw, true, cut.inv_t);
      list.add_groups(groups, [&](uint32_t group, uint32_t i, Eight& s) {
        if (step != kEdge) return list.fetch(group, i, s);
        return warp_max(read_group(scores(), group, raced.from, vocab, s));
      });
      if (raced.group.loses_to(groups.best, cut.inv_t)) raced.group = groups.best;
      list.for_each_kept([&](float s) {
        raced.from = fminf(raced.from, s);
        raced.kept += m.mass.of(s);
      });
      raced = team.reduce(raced, [&](const Raced& x) {
        const auto lower = [](float a, float b) { return fminf(a, b); };
        return Raced{x.group.over_warp(cut.inv_t), warp_reduce(x.from, lower),
                     warp_reduce(x.kept, add)};
      });
      if (threadIdx.x == 0) {
        const uint64_t kept = raced.kept + (step == kEdge ? m.edge.above : 0);
        shared.result.log_kept +=
            logf(static_cast<float>(kept) * static_cast<float>(1 / kWholeMass));
      }
      return {raced.group, raced.from, false};
    }

    const bool top_p_alone = cut.top_k == 0 && cut.top_p < 1 && cut.min_p_gap == -INFINITY;
    const bool edge =
        step == kBlend && top_p_alone && find_edge(slice, scores(), m, cut.top_p, vocab);
    float from = -INFINITY;
    if (!edge) from = settled ? list.lowest_kept(team) : threshold(slice, scores(), m, cut);
    Team::sync();  // until then members read each other's lists, and threads the step
    if (step == kSupport && warp_id() == 0) shared.row.set_up(blend, Team::row());
    if (threadIdx.x == 0) {
      if (step == kSupport) {
        shared.row.support_threshold = from;
        begin(shared, blend, kBlend, -INFINITY, -INFINITY);
      } else if (edge) {
        begin(shared, blend, kEdge, m.edge.high, m.edge.low);
      } else {
        begin(shared, blend, kRest, from, from);
      }
    }
    __syncthreads();
  }
}

// Step 5, done by one block. The result is for its first warp. Every warp has the group's scores:
// each thread those of eight tokens, of which it enters only those of its warp's turn, as noise
// takes much longer than scores.
template <bool kNormed, Format kFormat>
__device__ __forceinline__ Best draw_token(Team& team, Shared& shared, const Blend& blend,
                                           const Winner& winner) {
  const uint32_t vocab = static_cast<uint32_t>(blend.vocab);
  const float inv_t = shared.own.cut.inv_t;
  const uint32_t group = winner.group.index - shared.own.draw.first_group();
  const uint32_t v = group * kGroup + lane_id() * kWidth;
  const BlendScores<kNormed, kFormat> scores(shared.row, blend);
  Eight s;
  read_group(scores, group, winner.from, vocab, s);
  Best best;
#pragma unroll 1
  for (uint32_t i = warp_id(); i < kWidth; i += warp_count()) {
    const float score = pick(s, i);
    if (score == -INFINITY) continue;
    const Best other = shared.own.draw.token(v + i, score);
    if (best.loses_to(other, inv_t)) best = other;
  }
  return team.reduce_block(best, [inv_t](const Best& x) { return x.over_warp(inv_t); });
}

}  // namespace cuda
}  // namespace crossfade
