// Blends and samples rows on CUDA GPUs, a row a team of threads, in one launch:
//   1. power != 0, or log-probs of the terms are asked for: read the terms for their normalisers
//   2. support: read its term for the threshold
//   3. read the inputs for max and sum of exponentials. Without truncation the Gumbel-max race is
//      run on the way and the row is done; else each block lists the tokens that may stay
//   4. truncation: settle the lists and race what stays; where they do not settle it, find the
//      threshold by a radix search and race in one more reading
// Scores are never stored: they are made anew from the inputs where needed, so that shared memory
// and registers do not limit how many rows are under way, and no scratch memory is needed.
//
// How rows are spread. Three bfloat16 terms at V = 151,936 are 912 KB a row. An H100 reads some
// 3.0 TB/s at best, 23 bytes a nanosecond and multiprocessor; with 0.8 us of latency under load that
// takes 18 KB under way in each. 64 registers a thread (the launch bounds) let 1,024 threads live
// there, 48 bytes under way each: 48 KB, of which arithmetic (some 40 instructions a token with
// noise, 60 are the time of reading it) may cost the larger part. As two blocks of 512, one block's
// barriers and last steps are hidden by the other's reading. 132 multiprocessors then hold 264
// blocks: 256 rows are one wave of single blocks, 64 rows one of clusters of 4. Few rows take
// clusters of 16 (the most there is) and 1,024 threads a block: nothing else is there to hide the
// latency. Between those, spread_of() takes what wastes least in the last wave.
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <atomic>

#include "threshold.cuh"

namespace crossfade {
namespace cuda {

constexpr int kMaxThreads = 1024;

// All of a block's shared memory.
struct Shared {
  Exchange exchange;
  RowBlend row;
  uint32_t bar;  // of the race
  double min_p_gap;
  ThresholdMemory threshold;
};
static_assert(sizeof(Shared) <= 48 * 1024, "more takes an attribute of the kernel");

#ifndef CF_EMULATED
__device__ __forceinline__ Shared& shared_memory() {
  __shared__ Shared shared;
  return shared;
}
#endif

// What a sweep over the blend's scores finds out.
struct Totals {
  LogSum at_one, at_t;  // at temperature 1, and at the row's where that is another
  Best best;
  float floor = -INFINITY;
  uint32_t flags = 0;
};
constexpr uint32_t kBad = 1, kListOverflows = 2;

struct Drawn {
  Best best;
  uint64_t kept = 0;  // mass
};

struct FourSums {
  LogSum of[4];
};

// Step 1: the log-sum-exp of terms, of those without weight only for `all`.
__device__ void sum_terms(Team& team, const Slice& slice, RowBlend& row, uint32_t terms,
                          uint32_t vocab, bool all) {
  for (uint32_t n = 0; n < terms; n += 4) {
    FourSums sums;
    const auto wanted = [&](uint32_t k) { return k < terms && (all || row.term[k].weight != 0); };
    for (uint32_t round = 0; round < slice.rounds; ++round) {
      const uint32_t v = slice.begin + (round * blockDim.x + threadIdx.x) * kWidth;
      if (v >= slice.end) break;
      Raw raw[4];
#pragma unroll
      for (uint32_t j = 0; j < 4; ++j)
        if (wanted(n + j)) raw[j] = load(row.term[n + j], v, vocab);
#pragma unroll
      for (uint32_t j = 0; j < 4; ++j) {
        if (!wanted(n + j)) continue;
        Eight z;
        unpack(row.term[n + j], raw[j], z);
        float top = -INFINITY;
#pragma unroll
        for (uint32_t i = 0; i < kWidth; ++i) {
          if (v + i >= vocab) z[i] = -INFINITY;
          top = fmaxf(top, z[i]);
        }
        sums.of[j].add(z, top);
      }
    }
    sums = team.reduce(sums, [](const FourSums& a, const FourSums& b) {
      FourSums m;
#pragma unroll
      for (int j = 0; j < 4; ++j) m.of[j] = LogSum::merge(a.of[j], b.of[j]);
      return m;
    });
    if (threadIdx.x == 0) {
#pragma unroll
      for (uint32_t j = 0; j < 4; ++j)
        if (n + j < terms) row.term_sum[n + j] = sums.of[j];
    }
  }
  __syncthreads();
}

// The score at which min-p cuts: s >= max + log(min_p) / inv_t in exact arithmetic.
__device__ float min_p_threshold(float max, double gap) {
  const double least = static_cast<double>(max) + gap;
  const float rounded = static_cast<float>(least);
  return static_cast<double>(rounded) < least ? nextafterf(rounded, INFINITY) : rounded;
}

// A sweep for max, sums and the shortlist; `visit` sees every round too.
template <class Scores, class Visit>
__device__ Totals first_sweep(Team& team, const Slice& slice, Scores& scores, Shortlist* list,
                              float inv_t, Visit visit) {
  Totals mine;
  sweep(slice, scores, [&](uint32_t round, uint32_t v, const Eight& s, float top) {
    mine.at_one.add(s, top);
    if (inv_t != 1) mine.at_t.add(s, top, inv_t);
    if (list) list->offer(round, v, s, top, mine.at_one.max);
    visit(round, v, s, top, mine.best);
  });
  if (list) mine.floor = list->floor();
  __syncthreads();  // the list is complete
  mine.flags = (scores.bad ? kBad : 0) | (list && list->overflows() ? kListOverflows : 0);
  return team.reduce(mine, [inv_t](const Totals& a, const Totals& b) {
    Totals m;
    m.at_one = LogSum::merge(a.at_one, b.at_one);
    m.at_t = LogSum::merge(a.at_t, b.at_t, inv_t);
    m.best = Best::merge(a.best, b.best, inv_t);
    m.floor = fmaxf(a.floor, b.floor);
    m.flags = a.flags | b.flags;
    return m;
  });
}

// Step 2: the logit below which the support's term removes tokens.
__device__ float find_support(Team& team, const Slice& slice, Shared& shared, const Support& support,
                              uint32_t vocab) {
  ThresholdMemory& m = shared.threshold;
  Cut cut;
  cut.top_k = support.top_k;
  cut.top_p = support.top_p;
  cut.min_p_gap = shared.min_p_gap;
  TermScores scores{shared.row.support, vocab};
  Shortlist list(team, m, cut);
  const Totals z = first_sweep(team, slice, scores, cut.top_k > 0 || cut.top_p < 1 ? &list : nullptr,
                               1.0f, [](uint32_t, uint32_t, const Eight&, float, Best&) {});
  if ((z.flags & kBad) || !z.at_one.finite()) return INFINITY;  // no distribution: no token is left
  const float least = min_p_threshold(z.at_one.max, cut.min_p_gap);
  if (cut.top_k == 0 && cut.top_p >= 1) return least;
  const RowMass mass{z.at_one.max, 1.0f, 1.0f / z.at_one.sum};
  if (!(z.flags & kListOverflows) && list.settle(team, z.floor, mass, least)) {
    if (list.spares_all()) return -INFINITY;
    float lowest = INFINITY;
    list.for_each_kept(least, [&](uint32_t, float s) { lowest = fminf(lowest, s); });
    struct Lowest {
      float x = INFINITY;
    };
    return team.reduce(Lowest{lowest}, [](Lowest a, Lowest b) { return Lowest{fminf(a.x, b.x)}; }).x;
  }
  return threshold(team, slice, scores, m, mass, cut, least);
}

// Steps 1 and 2. Returns false for a bad row; the same in all threads.
template <bool kPower>
__device__ bool prepare(Team& team, const Slice& slice, Shared& shared, const Blend& blend,
                        int64_t row, bool all_terms) {
  const uint32_t vocab = static_cast<uint32_t>(blend.vocab);
  if (warp_id() == 0) shared.row.set_up(blend, row);
  if (threadIdx.x == 32 % blockDim.x) shared.min_p_gap = log(static_cast<double>(blend.support.min_p));
  Shortlist::clear(shared.threshold);
  __syncthreads();
  bool bad = shared.row.bad;
  if (kPower || all_terms) sum_terms(team, slice, shared.row, blend.terms, vocab, all_terms);
  if (kPower) {
    for (uint32_t n = 0; n < shared.row.means; ++n)
      bad |= !shared.row.term_sum[shared.row.weighted[n].term].finite();
  }
  if (!bad && shared.row.has_support) {
    const float threshold = find_support(team, slice, shared, blend.support, vocab);
    team.sync();  // no member still reads another's lists
    if (threadIdx.x == 0) shared.row.support_threshold = threshold;
    Shortlist::clear(shared.threshold);
    __syncthreads();
  }
  return !bad;
}

template <class T>
__device__ T setting(const PerRow<T>& setting, int64_t row) {
  return setting.rows ? setting.rows[row] : setting.all;
}

template <bool kPower>
__global__ void __launch_bounds__(kMaxThreads, 1)
    sample_kernel(const __grid_constant__ Blend blend, const __grid_constant__ Sampling out) {
  Shared& shared = shared_memory();
  Team team(shared.exchange);
  const int64_t row = blockIdx.x / team.size();
  const uint32_t vocab = static_cast<uint32_t>(blend.vocab);
  const Slice slice(team, vocab);

  Cut cut;
  Noise noise{};
  float temperature = 1, min_p = 0;
  bool good = true;
  if (out.sample) {
    temperature = setting(out.temperature, row);
    min_p = setting(out.min_p, row);
    cut.top_k = setting(out.top_k, row);
    cut.top_p = setting(out.top_p, row);
    cut.inv_t = fminf(1 / temperature, FLT_MAX);
    noise = {static_cast<uint64_t>(setting(out.seed, row)),
             static_cast<uint64_t>(setting(out.stream, row)),
             static_cast<uint32_t>(setting(out.step, row))};
    good = temperature > 0 && temperature < INFINITY && cut.top_k >= 0 && cut.top_p >= 0 &&
           cut.top_p <= 1 && min_p >= 0 && min_p <= 1;
  }
  if (threadIdx.x == 0) shared.bar = key_of(-INFINITY);
  good &= prepare<kPower>(team, slice, shared, blend, row, out.term_logprobs != nullptr);

  Totals totals;
  Drawn drawn;
  float log_kept = 0;
  if (good) {
    if (min_p > 0) {  // double arithmetic is slow on most GPUs: by one thread
      if (threadIdx.x == 0) shared.min_p_gap = temperature * log(static_cast<double>(min_p));
      __syncthreads();
      cut.min_p_gap = shared.min_p_gap;
    }
    BlendScores<kPower> scores{shared.row, vocab, blend.power};
    Race race(noise, cut.inv_t, &shared.bar);
    Shortlist list(team, shared.threshold, cut);
    const bool truncated = cut.any();
    totals = first_sweep(
        team, slice, scores, truncated ? &list : nullptr, cut.inv_t,
        [&](uint32_t round, uint32_t v, const Eight& s, float top, Best& best) {
          if (truncated) return;
          if (out.sample) {
            race.enter(v, s, top, round == 0);
            best = race.best;
          } else if (top > best.score) {  // greedy: the lowest id of a tie
            best = {top, 0, kNoToken};
#pragma unroll
            for (int i = kWidth - 1; i >= 0; --i) best.token = s[i] == top ? v + i : best.token;
          }
        });
    good = !(totals.flags & kBad) && totals.at_one.finite();
    drawn.best = totals.best;
    if (good && truncated) {
      const float max = totals.at_one.max;
      const float sum = cut.inv_t != 1 ? totals.at_t.sum : totals.at_one.sum;
      const RowMass mass{max, cut.inv_t, 1 / sum};
      const float least = min_p > 0 ? min_p_threshold(max, cut.min_p_gap) : -INFINITY;
      uint64_t kept = 0;
      if (!(totals.flags & kListOverflows) && list.settle(team, totals.floor, mass, least)) {
        list.for_each_kept(least, [&](uint32_t token, float s) {
          race.enter(token, s);
          kept += mass.of(s);
        });
      } else {
        const float from = threshold(team, slice, scores, shared.threshold, mass, cut, least);
        sweep(slice, scores, [&](uint32_t round, uint32_t v, const Eight& s, float top) {
          Eight left;
#pragma unroll
          for (uint32_t i = 0; i < kWidth; ++i) {
            const bool stays = s[i] >= from && s[i] > -INFINITY;
            left[i] = stays ? s[i] : -INFINITY;
            if (stays) kept += mass.of(s[i]);
          }
          race.enter(v, left, top >= from ? top : -INFINITY, round == 0);
        });
      }
      drawn = team.reduce(Drawn{race.best, kept}, [&](const Drawn& a, const Drawn& b) {
        return Drawn{Best::merge(a.best, b.best, cut.inv_t), a.kept + b.kept};
      });
      log_kept = logf(static_cast<float>(drawn.kept) * static_cast<float>(1 / kWholeMass));
    }
  }

  if (team.rank() == 0 && threadIdx.x < 32) {  // a lane a term
    const float below = drawn.best.score - totals.at_one.max;
    if (threadIdx.x == 0) {
      const float log_sum = totals.at_one.log_sum();
      const float log_sum_t = cut.inv_t != 1 ? totals.at_t.log_sum() : log_sum;
      out.tokens[row] = good ? static_cast<int64_t>(drawn.best.token) : -1;
      out.logprobs[row] = good ? below - log_sum : NAN;
      out.sampled_logprobs[row] =
          !good ? NAN : out.sample ? below * cut.inv_t - log_sum_t - log_kept : 0;
    }
    if (out.term_logprobs && threadIdx.x < blend.terms) {
      const LogSum& z = shared.row.term_sum[threadIdx.x];
      float log_p = NAN;
      if (good && z.finite())
        log_p = (number_at(shared.row.term[threadIdx.x], drawn.best.token) - z.max) - z.log_sum();
      out.term_logprobs[row * blend.terms + threadIdx.x] = log_p;
    }
  }
  team.sync();  // no member leaves while another reads its shared memory
}

template <bool kPower>
__global__ void __launch_bounds__(kMaxThreads, 1)
    blend_kernel(const __grid_constant__ Blend blend, float* __restrict__ out) {
  Shared& shared = shared_memory();
  Team team(shared.exchange);
  const int64_t row = blockIdx.x / team.size();
  const uint32_t vocab = static_cast<uint32_t>(blend.vocab);
  const Slice slice(team, vocab);
  bool good = prepare<kPower>(team, slice, shared, blend, row, false);
  BlendScores<kPower> scores{shared.row, vocab, blend.power};
  Totals totals;
  if (good) {
    totals = first_sweep(team, slice, scores, nullptr, 1.0f,
                         [](uint32_t, uint32_t, const Eight&, float, Best&) {});
    good = !(totals.flags & kBad) && totals.at_one.finite();
  }
  const float max = totals.at_one.max, log_sum = totals.at_one.log_sum();
  float* const to = out + row * blend.vocab;
  const bool aligned = reinterpret_cast<uintptr_t>(to) % 16 == 0;
  sweep(slice, scores, [&](uint32_t, uint32_t v, const Eight& s, float) {
    if (v >= slice.end) return;
    Eight log_p;
#pragma unroll
    for (uint32_t i = 0; i < kWidth; ++i) log_p[i] = good ? (s[i] - max) - log_sum : NAN;
    if (aligned && v + kWidth <= vocab) {
      reinterpret_cast<float4*>(to + v)[0] = {log_p[0], log_p[1], log_p[2], log_p[3]};
      reinterpret_cast<float4*>(to + v)[1] = {log_p[4], log_p[5], log_p[6], log_p[7]};
      return;
    }
#pragma unroll
    for (uint32_t i = 0; i < kWidth; ++i)
      if (v + i < vocab) to[v + i] = log_p[i];
  });
  team.sync();
}

// ---- Launching -----------------------------------------------------------------------------------

struct Spread {
  unsigned cluster, threads;  // powers of two
};

// What limits it on one device.
struct Limits {
  int multiprocessors;
  int cluster;  // largest, 1 without clusters
};

// Blocks a row and threads a block. Blocks of 512 fit twice on a multiprocessor; a wave of them takes
// as long as a block's tokens, and as some 4,096 more for its barriers and last steps.
Spread spread_of(int64_t rows, int64_t vocab, const Limits& limits) {
  const int64_t at_once = 2 * limits.multiprocessors;
  Spread best{1, 512};
  int64_t least = INT64_MAX;
  for (int cluster = 1; cluster <= limits.cluster; cluster *= 2) {
    const int64_t waves = (rows * cluster + at_once - 1) / at_once;
    const int64_t cost = waves * (vocab / cluster + 4096);
    if (cost < least) {
      least = cost;
      best.cluster = cluster;
    }
  }
  if (rows * best.cluster <= limits.multiprocessors) best.threads = kMaxThreads;
  return best;
}

// Makes `device` current, and the one that was again in the end.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    error = cudaGetDevice(&before_);
    if (error == cudaSuccess && before_ != device) {
      error = cudaSetDevice(device);
      changed_ = error == cudaSuccess;
    }
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  cudaError_t error;

 private:
  int before_ = 0;
  bool changed_ = false;
};

// The limits of one kernel on the current device; lets it use clusters of 16.
cudaError_t limits_of(const void* kernel, int device, Limits& limits) {
  int major = 0;
  limits.cluster = 1;
  cudaError_t error =
      cudaDeviceGetAttribute(&limits.multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (error != cudaSuccess || major < 9) return error;
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  if (error != cudaSuccess) return error;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(16);
  config.blockDim = dim3(kMaxThreads);
  int largest = 1;
  error = cudaOccupancyMaxPotentialClusterSize(&largest, kernel, &config);
  while (limits.cluster * 2 <= std::min(largest, 16)) limits.cluster *= 2;
  return error;
}

template <class... Args>
cudaError_t launch(void (*kernel)(Args...), const Spread& spread, int64_t rows, void* stream,
                   const Args&... args) {
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {spread.cluster, 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(rows * spread.cluster));
  config.blockDim = dim3(spread.threads);
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &cluster;
  config.numAttrs = spread.cluster > 1 ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, args...);
}

// Launches kernel(args...) on all rows.
template <class... Args>
const char* run(void (*kernel)(Args...), const Blend& blend, int device, void* stream,
                const Args&... args) {
  if (blend.rows == 0) return nullptr;
  constexpr int64_t kMost = INT32_MAX / 16;  // of rows times blocks a row; of tokens, plus a round
  if (blend.rows > kMost || blend.vocab > kMost)
    return "crossfade's CUDA kernels take at most 134,217,727 rows and tokens";
  const DeviceGuard guard(device);
  if (guard.error != cudaSuccess) return cudaGetErrorString(guard.error);
  Limits limits;
  cudaError_t error = limits_of(reinterpret_cast<const void*>(kernel), device, limits);
  if (error == cudaSuccess)
    error = launch(kernel, spread_of(blend.rows, blend.vocab, limits), blend.rows, stream, args...);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace cuda

size_t scratch_bytes_cuda(const Blend&, int) { return 0; }

const char* blend_cuda(const Blend& blend, float* out, void*, int device, void* stream) {
  return cuda::run(blend.power != 0 ? cuda::blend_kernel<true> : cuda::blend_kernel<false>, blend,
                   device, stream, blend, out);
}

const char* blend_sample_cuda(const Blend& blend, const Sampling& sampling, void*, int device,
                              void* stream) {
  return cuda::run(blend.power != 0 ? cuda::sample_kernel<true> : cuda::sample_kernel<false>, blend,
                   device, stream, blend, sampling);
}

}  // namespace crossfade
