// csrc/cuda/search.cu compiled for the CPU, with a C interface for the tests.
#include "cuda_on_cpu.h"

#include "../../csrc/cuda/search.cu"

extern "C" {

void shuffle_threads(unsigned seed) { cuda_on_cpu::machine().random.seed(seed); }

const char* emulated_chunk_select(const crossfade::Selection* selection) {
  return crossfade::chunk_select_cuda(*selection, 0, nullptr);
}

const char* emulated_fork_cache(const crossfade::Fork* fork) {
  return crossfade::fork_cache_cuda(*fork, 0, nullptr);
}

size_t selection_bytes() { return sizeof(crossfade::Selection); }
size_t cache_bytes() { return sizeof(crossfade::Cache); }
size_t fork_bytes() { return sizeof(crossfade::Fork); }
}
