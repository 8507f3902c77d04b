// Blends and samples rows on CUDA GPUs, in one launch. A team of threads takes each row:
//   1. With power != 0, or where log-probs of the terms are asked for, it reads the terms for their
//      normalisers.
//   2. With a support, it reads the support's term for the threshold.
//   3. It reads the inputs for the maximum and the sums of exponentials. Without truncation the sum
//      of each group takes part in the race of groups, see race.cuh. With truncation each block
//      lists the tokens that may stay.
//   4. With truncation, the race of groups is run over the listed tokens that stay. Where the lists
//      do not hold all of those, more readings find the threshold, see threshold.cuh and edge.cuh,
//      and run the race.
//   5. It reads the group that won once more and draws the token.
// Scores are never stored but made anew from the inputs wherever they are needed. So neither shared
// memory nor registers limit how many rows are under way, and no scratch memory is needed.
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "edge.cuh"
#include "launch.cuh"

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

// Step 1: the log-sum-exp of the terms that have a weight, or of `all` terms.
__device__ __forceinline__ void sum_terms(Team& team, const Slice& slice, RowBlend& row,
                                          uint32_t terms, uint32_t vocab, bool all) {
  for (uint32_t n = 0; n < terms; n += 4) {
    FourSums sums;
    const auto wanted = [&](uint32_t k) { return k < terms && (all || row.term[k].weight != 0); };
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

// The group that holds a row's token, and the lowest score that the token may have.
struct Winner {
  Best group;
  float from = -INFINITY;
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
// same in all threads of the team, and no group if the row is bad.
template <bool kPower, Format kFormat>
__device__ __forceinline__ Winner read_row(Team& team, Shared& shared, const Blend& blend,
                                           bool all_terms) {
  const uint32_t vocab = static_cast<uint32_t>(blend.vocab);
  const Slice& slice = shared.slice;
  ThresholdMemory& m = shared.threshold;
  const Settings& own = shared.own;
  if (warp_id() == warp_count() - 1) shared.row.set_up(blend, Team::row());
  if (threadIdx.x == 0) {
    shared.own.cut.min_p_gap = min_p_gap(own.min_p, own.temperature);
    shared.slice = Slice(vocab);
    begin(shared, blend, blend.support.term >= 0 ? kSupport : kBlend, -INFINITY, -INFINITY);
  }
  __syncthreads();
  if (shared.row.bad || own.bad) return Winner();

  if (kPower || all_terms) sum_terms(team, slice, shared.row, blend.terms, vocab, all_terms);
  if (kPower) {
    for (uint32_t n = 0; n < shared.row.means; ++n)
      if (!shared.row.log_z[shared.row.weighted[n].term].finite()) return Winner();
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
    const auto scores = [&] {
      return BlendScores<kPower, kFormat>(shared.row, vocab, blend.power);
    };
    Shortlist list(m, cut);
    const Totals totals = read(team, slice, scores(), list, own.draw, task);
    if ((totals.flags & kBad) || (step != kEdge && !totals.at_one.finite())) return Winner();
    if (threadIdx.x == 0 && step != kEdge) {
      if (step != kRest) shared.result = {totals.at_one.max, totals.at_one.log_sum()};
      shared.result.log_kept = totals.at_t.log_sum();
    }
    if (task.races && step != kEdge) return {totals.best, task.from};

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
      const bool races = true;
      Groups groups(own.draw, races, cut.inv_t);
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
      return {raced.group, raced.from};
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
template <bool kPower, Format kFormat>
__device__ __forceinline__ Best draw_token(Team& team, Shared& shared, const Blend& blend,
                                           const Winner& winner) {
  const uint32_t vocab = static_cast<uint32_t>(blend.vocab);
  const float inv_t = shared.own.cut.inv_t;
  const uint32_t v = winner.group.index * kGroup + lane_id() * kWidth;
  const BlendScores<kPower, kFormat> scores(shared.row, vocab, blend.power);
  Eight s;
  read_group(scores, winner.group.index, winner.from, vocab, s);
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

template <class T>
__device__ __forceinline__ T setting(const PerRow<T>& setting, int64_t row) {
  return setting.rows ? setting.rows[row] : setting.all;
}

template <bool kPower, Format kFormat>
__global__ void __launch_bounds__(kMostThreads<kPower>, 1)
    sample_kernel(const __grid_constant__ Blend blend, const __grid_constant__ Sampling out) {
  Shared& shared = shared_memory();
  Team team(shared.exchange);
  if (threadIdx.x == 0) {
    const int64_t row = Team::row();
    // It is filled in place: nvcc 13.0 would store the bytes of `out` in place of a local Settings.
    Settings& own = shared.own;
    own = Settings{};
    own.temperature = out.sample ? setting(out.temperature, row) : 0.0f;
    own.draw.greedy = own.temperature == 0;
    if (!own.draw.greedy) {
      own.min_p = setting(out.min_p, row);
      own.cut = {setting(out.top_k, row), setting(out.top_p, row),
                 fminf(1 / own.temperature, FLT_MAX)};
      own.draw.seed = static_cast<uint64_t>(setting(out.seed, row));
      own.draw.stream = static_cast<uint64_t>(setting(out.stream, row));
      own.draw.step = static_cast<uint32_t>(setting(out.step, row));
      own.bad = !(own.temperature > 0 && own.temperature < INFINITY && own.cut.top_k >= 0 &&
                  own.cut.top_p >= 0 && own.cut.top_p <= 1 && own.min_p >= 0 && own.min_p <= 1);
    }
  }
  const bool all_terms = out.term_logprobs != nullptr;
  const Winner winner = read_row<kPower, kFormat>(team, shared, blend, all_terms);

  if (Team::rank() == 0) {
    const bool good = winner.group.index != kNone;
    const Best best = good ? draw_token<kPower, kFormat>(team, shared, blend, winner) : Best();
    const int64_t row = Team::row();
    if (threadIdx.x == 0) {
      const Result& r = shared.result;
      const Settings& own = shared.own;
      const float below = best.score - r.max;
      out.tokens[row] = good ? static_cast<int64_t>(best.index) : -1;
      out.logprobs[row] = good ? below - r.log_sum : NAN;
      const float sampled = own.draw.greedy ? 0.0f : below * own.cut.inv_t - r.log_kept;
      out.sampled_logprobs[row] = good ? sampled : NAN;
    }
    if (all_terms && threadIdx.x < static_cast<uint32_t>(blend.terms)) {
      const Input& term = shared.row.term[threadIdx.x];
      out.term_logprobs[row * blend.terms + threadIdx.x] =
          good ? shared.row.log_z[threadIdx.x].log_p(number_at(term, best.index)) : NAN;
    }
  }
  Team::sync();  // no member leaves while another reads its shared memory
}

template <bool kPower>
__global__ void __launch_bounds__(kMostThreads<kPower>, 1)
    blend_kernel(const __grid_constant__ Blend blend, float* __restrict__ out) {
  Shared& shared = shared_memory();
  Team team(shared.exchange);
  if (threadIdx.x == 0) {
    shared.own = Settings{};
    shared.own.draw.greedy = true;
  }
  const bool good = read_row<kPower, Format::any>(team, shared, blend, false).group.index != kNone;
  __syncthreads();
  const float max = shared.result.max, log_sum = shared.result.log_sum;

  const Slice& slice = shared.slice;
  const uint32_t vocab = static_cast<uint32_t>(blend.vocab);
  float* const to = out + Team::row() * blend.vocab;
  const bool aligned = reinterpret_cast<uintptr_t>(to) % 16 == 0;
  const BlendScores<kPower, Format::any> scores(shared.row, vocab, blend.power);
  sweep(slice, scores, [&](uint32_t, uint32_t v, Eight& s, float) {
    if (v >= slice.end) return;
#pragma unroll
    for (float& x : s) x = good ? (x - max) - log_sum : NAN;
    if (aligned && v + kWidth <= vocab) {
      reinterpret_cast<float4*>(to + v)[0] = {s[0], s[1], s[2], s[3]};
      reinterpret_cast<float4*>(to + v)[1] = {s[4], s[5], s[6], s[7]};
      return;
    }
#pragma unroll
    for (uint32_t i = 0; i < kWidth; ++i)
      if (v + i < vocab) to[v + i] = s[i];
  });
  Team::sync();  // no member leaves while another reads its shared memory
}

// The format that all of a blend's terms and values share, if they are few enough to be read at
// once.
inline Format format_of(const Blend& b) {
  if (b.terms + b.values > static_cast<int>(kFew)) return Format::any;
  const DType dtype = b.term[0].dtype;
  const int64_t bytes = dtype == DType::f32 ? 4 : 2;
  for (int i = 0; i < b.terms + b.values; ++i) {
    const Matrix& m = i < b.terms ? b.term[i] : b.value[i - b.terms];
    const bool aligned = reinterpret_cast<uintptr_t>(m.data) % 16 == 0 &&
                         (b.rows == 1 || m.row_stride * bytes % 16 == 0);
    if (m.dtype != dtype || !aligned) return Format::any;
  }
  return static_cast<Format>(dtype);
}

}  // namespace cuda

const char* blend_cuda(const Blend& blend, float* out, int device, void* stream) {
  const auto run = blend.power != 0 ? cuda::run<cuda::blend_kernel<true>, Blend, float*>
                                    : cuda::run<cuda::blend_kernel<false>, Blend, float*>;
  return run(blend.rows, blend.vocab, device, stream, blend, out);
}

const char* blend_sample_cuda(const Blend& blend, const Sampling& sampling, int device,
                              void* stream) {
  using cuda::Format;
  const auto run = [&]() {
    if (blend.power != 0) return cuda::run<cuda::sample_kernel<true, Format::any>, Blend, Sampling>;
    switch (cuda::format_of(blend)) {
      case Format::f32:
        return cuda::run<cuda::sample_kernel<false, Format::f32>, Blend, Sampling>;
      case Format::bf16:
        return cuda::run<cuda::sample_kernel<false, Format::bf16>, Blend, Sampling>;
      case Format::f16:
        return cuda::run<cuda::sample_kernel<false, Format::f16>, Blend, Sampling>;
      default:
        return cuda::run<cuda::sample_kernel<false, Format::any>, Blend, Sampling>;
    }
  }();
  return run(blend.rows, blend.vocab, device, stream, blend, sampling);
}

}  // namespace crossfade
