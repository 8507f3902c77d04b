// Blends and samples rows on CUDA GPUs, in one launch. A team of threads takes each row:
//   1. With power != 0 or parts, or where log-probs of the terms are asked for, it reads the terms
//      for their normalisers, unless these are given.
//   2. With a support, it reads the support's term for the threshold.
//   3. It reads the inputs for the maximum and the sums of exponentials. Without truncation the sum
//      of each group takes part in the race of groups, see race.cuh. With truncation each block
//      lists the tokens that may stay.
//   4. With truncation, the race of groups is run over the listed tokens that stay. Where the lists
//      do not hold all of those, more readings find the threshold, see edge.cuh and threshold.cuh,
//      and run the race.
//   5. It reads the group that won once more and draws the token.
//   6. Where its pushes are asked for, it reads the inputs for these, see pushes.cuh.
// Scores are never stored but made anew from the inputs wherever they are needed. So neither shared
// memory nor registers limit how many rows are under way, and no scratch memory is needed.
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "launch.cuh"
#include "pushes.cuh"

namespace crossfade {
namespace cuda {

template <class T>
__device__ __forceinline__ T setting(const PerRow<T>& setting, int64_t row) {
  return setting.rows ? setting.rows[row] : setting.all;
}

// What a shard of a vocabulary knows of its draw, of which there may be none.
__device__ __forceinline__ Shard shard_of(const Shared& shared, const Winner& winner,
                                          const Best& token) {
  const float nothing = winner.empty ? -INFINITY : NAN, noiseless = winner.empty ? 0 : NAN;
  if (winner.group.index == kNone)
    return {nothing, nothing, nothing, nothing, noiseless, nothing, noiseless};
  const Result& r = shared.result;
  const Settings& own = shared.own;
  const float noise = own.draw.group_noise(winner.group.index);
  const float lead = (winner.group.score - r.max) * own.cut.inv_t;
  const float rest = winner.group.noise - noise;  // a group's mass is counted as noise, too
  return {r.max, r.log_sum, r.log_kept, lead + rest, noise, token.score - r.max, token.noise};
}

// What a kernel has code for besides a token and its log-probs. Most calls have a kernel without,
// whose registers they need.
enum class Extra { none, pushes, shard };

template <bool kNormed, Format kFormat, Extra kExtra>
__global__ void __launch_bounds__(kMostThreads<kNormed || kExtra == Extra::pushes>, 1)
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
    own.draw.first_token = static_cast<uint32_t>(out.first_token);
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
  const Winner winner = read_row<kNormed, kFormat>(team, shared, blend, all_terms);

  if (Team::rank() == 0) {
    const bool good = winner.group.index != kNone;
    const Best best = good ? draw_token<kNormed, kFormat>(team, shared, blend, winner) : Best();
    const int64_t row = Team::row();
    if (threadIdx.x == 0) out.tokens[row] = good ? out.first_token + best.index : -1;
    if (kExtra == Extra::shard) {
      if (threadIdx.x == 0) out.shard[row] = shard_of(shared, winner, best);
    } else if (threadIdx.x == 0) {
      const Result& r = shared.result;
      const Settings& own = shared.own;
      const float below = best.score - r.max;
      out.logprobs[row] = good ? below - r.log_sum : NAN;
      const float sampled = own.draw.greedy ? 0.0f : below * own.cut.inv_t - r.log_kept;
      out.sampled_logprobs[row] = good ? sampled : NAN;
    }
    if (all_terms && threadIdx.x < static_cast<uint32_t>(blend.terms)) {
      const Input& term = shared.row.term[threadIdx.x];
      out.term_logprobs[row * blend.terms + threadIdx.x] =
          good ? shared.row.log_z[threadIdx.x].log_p(number_at(term, best.index)) : NAN;
    }
    if (kExtra == Extra::pushes && threadIdx.x == 0) shared.token = best.index;
  }
  Team::sync();  // no member leaves while another reads its shared memory
  if (kExtra == Extra::pushes) {
    const int64_t both = blend.terms + blend.values;
    const uint32_t token = Team::at(0, shared.token);
    write_pushes<kFormat>(team, shared, blend, token, out.pushes + Team::row() * both);
    Team::sync();
  }
}

template <bool kNormed>
__global__ void __launch_bounds__(kMostThreads<kNormed>, 1)
    blend_kernel(const __grid_constant__ Blend blend, float* __restrict__ out, bool raw) {
  Shared& shared = shared_memory();
  Team team(shared.exchange);
  if (threadIdx.x == 0) {
    shared.own = Settings{};
    shared.own.draw.greedy = true;
  }
  const Winner winner = read_row<kNormed, Format::any>(team, shared, blend, false);
  const bool good = winner.group.index != kNone || (raw && winner.empty);
  __syncthreads();
  const float max = raw ? 0 : shared.result.max, log_sum = raw ? 0 : shared.result.log_sum;

  const Slice& slice = shared.slice;
  const uint32_t vocab = static_cast<uint32_t>(blend.vocab);
  float* const to = out + Team::row() * blend.vocab;
  const bool aligned = reinterpret_cast<uintptr_t>(to) % 16 == 0;
  const BlendScores<kNormed, Format::any> scores(shared.row, blend);
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

// Whether a blend takes the normalisers of terms.
inline bool normalises(const Blend& b) { return b.power != 0 || b.parts > 0; }

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

// What launches the kernel for a blend.
template <Extra kExtra>
auto sampler(const Blend& blend) {
  if (normalises(blend)) return run<sample_kernel<true, Format::any, kExtra>, Blend, Sampling>;
  switch (format_of(blend)) {
    case Format::f32:
      return run<sample_kernel<false, Format::f32, kExtra>, Blend, Sampling>;
    case Format::bf16:
      return run<sample_kernel<false, Format::bf16, kExtra>, Blend, Sampling>;
    case Format::f16:
      return run<sample_kernel<false, Format::f16, kExtra>, Blend, Sampling>;
    default:
      return run<sample_kernel<false, Format::any, kExtra>, Blend, Sampling>;
  }
}

}  // namespace cuda

const char* blend_cuda(const Blend& blend, float* out, bool raw, int device, void* stream) {
  const auto run = cuda::normalises(blend)
                       ? cuda::run<cuda::blend_kernel<true>, Blend, float*, bool>
                       : cuda::run<cuda::blend_kernel<false>, Blend, float*, bool>;
  return run(blend.rows, blend.vocab, device, stream, blend, out, raw);
}

const char* blend_sample_cuda(const Blend& blend, const Sampling& sampling, int device,
                              void* stream) {
  using cuda::Extra, cuda::Format;
  const auto run =
      sampling.shard ? cuda::sampler<Extra::shard>(blend)
      : sampling.pushes
          ? cuda::run<cuda::sample_kernel<false, Format::any, Extra::pushes>, Blend, Sampling>
          : cuda::sampler<Extra::none>(blend);
  return run(blend.rows, blend.vocab, device, stream, blend, sampling);
}

}  // namespace crossfade
