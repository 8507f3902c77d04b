// csrc/cuda compiled for the CPU, with a C interface for the tests.
#include "cuda_on_cpu.h"

// before the kernels, which use it
namespace crossfade {
namespace cuda {
struct Shared;
inline Shared& shared_memory() {
  return *reinterpret_cast<Shared*>(cuda_on_cpu::self().block->shared.get());
}
}  // namespace cuda
}  // namespace crossfade

#include "../../csrc/cuda/blend_sample.cu"

extern "C" {

void configure(unsigned cluster, unsigned threads, unsigned seed, int compute_capability) {
  cuda_on_cpu::Machine& m = cuda_on_cpu::machine();
  m.force_cluster = cluster;
  m.force_threads = threads;
  m.random.seed(seed);
  m.compute_capability = compute_capability;
}

const char* emulated_blend(const crossfade::Blend* blend, float* out, const bool* raw) {
  return crossfade::blend_cuda(*blend, out, *raw, 0, nullptr);
}

const char* emulated_blend_sample(const crossfade::Blend* blend,
                                  const crossfade::Sampling* sampling) {
  return crossfade::blend_sample_cuda(*blend, *sampling, 0, nullptr);
}

size_t blend_bytes() { return sizeof(crossfade::Blend); }
size_t sampling_bytes() { return sizeof(crossfade::Sampling); }
}
