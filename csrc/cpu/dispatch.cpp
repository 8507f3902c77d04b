// The CPU kernels are built for several instruction sets. This file chooses those that this CPU
// runs.
#include <omp.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "../crossfade.h"
#include "tape.h"

namespace crossfade {

#define CF_DECLARE_LINEAR(isa)                           \
  namespace isa {                                        \
  int64_t linear_rows_scratch(const Linear&);            \
  void linear_rows_part(const Linear&, void*, int, int); \
  }
#define CF_DECLARE(isa)                                                        \
  CF_DECLARE_LINEAR(isa)                                                       \
  namespace isa {                                                              \
  void blend_rows(const Blend&, float*, bool, int);                            \
  void blend_sample_rows(const Blend&, const Sampling&, int);                  \
  void attention_rows(const Attention&, int);                                  \
  void logp_forward_rows(const LogpTile&, LogpSums*, const LogpMoments&, int); \
  void logp_backward_rows(const LogpTile&, const LogpGradient*, int);          \
  void tape_run(const Tape&, char* const*, int64_t, int64_t, int);             \
  }
CF_DECLARE(baseline)
#ifdef __x86_64__
CF_DECLARE(avx2)
CF_DECLARE(avx512)
CF_DECLARE_LINEAR(avx512_vnni)
CF_DECLARE_LINEAR(avx512_bf16)
#endif
#undef CF_DECLARE
#undef CF_DECLARE_LINEAR

namespace {

constexpr int64_t kProductsPerThread = 32768;  // of a layer: fewer are not worth another thread

struct LinearKernels {
  decltype(&baseline::linear_rows_scratch) scratch;
  decltype(&baseline::linear_rows_part) part;
};

struct Kernels {
  const char* isa;
  decltype(&baseline::blend_rows) blend;
  decltype(&baseline::blend_sample_rows) blend_sample;
  decltype(&baseline::attention_rows) attention;
  LinearKernels linear;
  decltype(&baseline::logp_forward_rows) logp_forward;
  decltype(&baseline::logp_backward_rows) logp_backward;
  decltype(&baseline::tape_run) tape_run;
};

#define CF_LINEAR(isa) \
  LinearKernels { isa::linear_rows_scratch, isa::linear_rows_part }
#define CF_KERNELS(isa)                                                                 \
  Kernels {                                                                             \
    #isa, isa::blend_rows, isa::blend_sample_rows, isa::attention_rows, CF_LINEAR(isa), \
        isa::logp_forward_rows, isa::logp_backward_rows, isa::tape_run                  \
  }

#ifdef __x86_64__
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c");
}

bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
}
#endif

// Tests set CROSSFADE_ISA to run a lesser instruction set than the CPU has.
Kernels choose() {
#ifdef __x86_64__
  // A level holds those before it.
  constexpr const char* kOrder[] = {"baseline", "avx2", "avx512", "avx512_vnni", "avx512_bf16"};
  const char* wanted = std::getenv("CROSSFADE_ISA");
  const auto may = [&](const char* isa) {
    bool held = false;
    for (const char* level : kOrder) {
      held |= !std::strcmp(level, isa);
      if (wanted && !std::strcmp(level, wanted)) return held;
    }
    return !wanted;
  };
  __builtin_cpu_init();
  if (may("avx512") && has_avx512()) {
    Kernels kernels = CF_KERNELS(avx512);
    // Linear layers alone have instructions of their own.
    if (may("avx512_vnni") && __builtin_cpu_supports("avx512vnni")) {
      kernels.isa = "avx512_vnni";
      kernels.linear = CF_LINEAR(avx512_vnni);
    }
    if (may("avx512_bf16") && __builtin_cpu_supports("avx512vnni") &&
        __builtin_cpu_supports("avx512bf16")) {
      kernels.isa = "avx512_bf16";
      kernels.linear = CF_LINEAR(avx512_bf16);
    }
    return kernels;
  }
  if (may("avx2") && has_avx2()) return CF_KERNELS(avx2);
#endif
  return CF_KERNELS(baseline);
}

const Kernels& kernels() {
  static const Kernels chosen = choose();
  return chosen;
}

}  // namespace

void blend_cpu(const Blend& blend, float* out, bool raw, int threads) {
  if (blend.rows > 0) kernels().blend(blend, out, raw, threads);
}

void blend_sample_cpu(const Blend& blend, const Sampling& sampling, int threads) {
  if (blend.rows > 0) kernels().blend_sample(blend, sampling, threads);
}

void attention_cpu(const Attention& attention, int threads) {
  if (attention.rows > 0 && attention.tokens > 0) kernels().attention(attention, threads);
}

int64_t linear_scratch(const Linear& linear) { return kernels().linear.scratch(linear); }

void linear_part(const Linear& linear, void* scratch, int rank, int size) {
  if (linear.rows > 0 && linear.out > 0) kernels().linear.part(linear, scratch, rank, size);
}

void linear_cpu(const Linear& linear, int threads) {
  // Memory is kept from call to call: to allocate it anew costs more than a small product.
  static thread_local std::vector<char> own;
  const auto needed = static_cast<size_t>(linear_scratch(linear));
  if (own.size() < needed) own.resize(needed);
  void* const scratch = own.data();
  const int64_t worth = linear.rows * linear.in * (linear.out + linear.rank) / kProductsPerThread;
  threads = static_cast<int>(std::min<int64_t>(threads, worth));
  if (threads <= 1) return linear_part(linear, scratch, 0, 1);  // without OpenMP's overhead
#pragma omp parallel num_threads(threads)
  linear_part(linear, scratch, omp_get_thread_num(), omp_get_num_threads());
}

void logp_forward_cpu(const LogpTile& tile, LogpSums* sums, const LogpMoments& moments,
                      int threads) {
  kernels().logp_forward(tile, sums, moments, threads);
}

void logp_backward_cpu(const LogpTile& tile, const LogpGradient* gradients, int threads) {
  kernels().logp_backward(tile, gradients, threads);
}

void tape_run_cpu(const Tape& tape, char* const* bases, int64_t begin, int64_t end, int threads) {
  kernels().tape_run(tape, bases, begin, end, threads);
}

const char* cpu_isa() { return kernels().isa; }

}  // namespace crossfade
