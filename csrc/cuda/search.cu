// Selects the slots that a search keeps, and forks the rows of caches, on CUDA GPUs.
//
// In a fork, a block owns some columns of a cache; a column is one vector of every row. Its threads
// read into registers what the rows become, meet at a barrier, and write. So no row is overwritten
// before its children have read it, whatever permutation or repetition the parents are, and each
// row is read from memory and written to it once (a parent's other children find it in the cache).
// Parents and ranges stay on the device: a launch follows from shapes alone, and a CUDA graph can
// hold it.
#include <cuda_runtime.h>

#include "../search_math.h"
#include "launch.cuh"

namespace crossfade {
namespace cuda {

// ---- Selecting ---------------------------------------------------------------------------------

// A block takes a prompt. A slot's rank is the number of slots that beat it, so that every thread
// knows where its slot goes without a sort.
__global__ void __launch_bounds__(1024) select_kernel(const __grid_constant__ Selection s) {
  const int64_t first = blockIdx.x * s.slots, samples = s.slots / s.width;
  const float* const scores = s.scores + first;
  for (int64_t slot = threadIdx.x; slot < s.slots; slot += blockDim.x) {
    int64_t rank = 0;
    for (int64_t other = 0; other < s.slots; ++other) rank += beats(scores, other, slot);
    if (rank >= s.width) continue;
    const bool finished = s.finished[first + slot];
    int64_t* const parents = s.parents + first + rank * samples;
    for (int64_t n = 0; n < samples; ++n) parents[n] = finished && n > 0 ? -1 : slot;
  }
}

// ---- Forking -----------------------------------------------------------------------------------

constexpr uint32_t kForkThreads = 256;
constexpr uint32_t kHeld = 8;  // vectors that a thread holds: 32 KB for a block
constexpr uint32_t kMostRows = kForkThreads * kHeld;
constexpr uint32_t kMostCaches = 64;  // caches of a launch, whose arguments have room in 4 KB

struct ForkedCache {
  char* data;
  int64_t row_stride, head_stride, token_stride;  // in bytes
  int64_t length;
  uint32_t vectors, vector_bytes;  // vectors of a token, and bytes of a vector
  uint32_t first_block, slabs;     // a block takes a slab of a head's columns
};

struct ForkLaunch {
  Fork fork;      // without its caches
  int64_t first;  // position of the first column
  uint32_t lanes, count;
  ForkedCache caches[kMostCaches];
};
static_assert(sizeof(ForkLaunch) <= 4096, "more takes other limits of a kernel's arguments");

// The row that a row's position is copied from, or -1 if it stays. There is no branch, so that all
// reads are under way at once.
__device__ __forceinline__ int64_t source_of(const Fork& fork, int64_t row, int64_t position,
                                             int64_t length) {
  const int64_t inside = row < fork.rows ? row : 0;
  const int64_t parent = fork.parents[inside];
  const Span span = span_of(fork, inside, length);
  const bool moves = (row < fork.rows) & (parent >= 0) & (parent < fork.rows) & (parent != row) &
                     (span.begin <= position) & (position < span.end);
  return moves ? parent : -1;
}

template <class Vector>
__device__ __forceinline__ void fork_slab(const ForkLaunch& launch, const ForkedCache& cache,
                                          uint32_t head, uint32_t slab) {
  // Neighbouring lanes take neighbouring columns; then comes the next row.
  const uint32_t column = slab * launch.lanes + threadIdx.x % launch.lanes;
  const uint32_t first_row = threadIdx.x / launch.lanes, step = blockDim.x / launch.lanes;
  const int64_t position = launch.first + column / cache.vectors;
  char* const at = cache.data + head * cache.head_stride + position * cache.token_stride +
                   column % cache.vectors * sizeof(Vector);
  const auto of_row = [&](int64_t row) {
    return reinterpret_cast<Vector*>(at + row * cache.row_stride);
  };
  int64_t source[kHeld];
#pragma unroll
  for (uint32_t n = 0; n < kHeld; ++n)
    source[n] = source_of(launch.fork, first_row + n * step, position, cache.length);
  Vector held[kHeld];
#pragma unroll
  for (uint32_t n = 0; n < kHeld; ++n)
    if (source[n] >= 0) held[n] = *of_row(source[n]);
  __syncthreads();
#pragma unroll
  for (uint32_t n = 0; n < kHeld; ++n)
    if (source[n] >= 0) *of_row(first_row + n * step) = held[n];
}

__global__ void __launch_bounds__(kForkThreads)
    fork_kernel(const __grid_constant__ ForkLaunch launch) {
  uint32_t k = 0;  // the last cache that begins at this block or before it
  for (uint32_t more = kMostCaches / 2; more > 0; more /= 2)
    if (k + more < launch.count && launch.caches[k + more].first_block <= blockIdx.x) k += more;
  const ForkedCache& cache = launch.caches[k];
  const uint32_t head = (blockIdx.x - cache.first_block) / cache.slabs;
  const uint32_t slab = (blockIdx.x - cache.first_block) % cache.slabs;
  switch (cache.vector_bytes) {
    case 16:
      return fork_slab<uint4>(launch, cache, head, slab);
    case 8:
      return fork_slab<uint2>(launch, cache, head, slab);
    case 4:
      return fork_slab<uint32_t>(launch, cache, head, slab);
    default:
      return fork_slab<uint16_t>(launch, cache, head, slab);
  }
}

// Gathers up to kMostCaches caches for a launch.
class ForkLauncher {
 public:
  ForkLauncher(const Fork& fork, void* stream) : stream_(stream) {
    launch_.fork = fork;
    launch_.first = fork.start.rows ? 0 : fork.start.all;
    launch_.lanes = kForkThreads;
    while (launch_.lanes * fork.rows > kMostRows) launch_.lanes /= 2;
  }

  // Returns null, or what went wrong.
  const char* add(const Cache& cache) {
    const Fork& fork = launch_.fork;
    const Heads& x = cache.data;
    const int64_t bytes = cache.item_bytes, token = cache.size * bytes;
    const int64_t strides[] = {x.row_stride * bytes, x.head_stride * bytes, x.token_stride * bytes};
    int64_t vector = 16;  // becomes the largest size for which all vectors are aligned
    for (int64_t n : {strides[0], strides[1], strides[2], token,
                      static_cast<int64_t>(reinterpret_cast<uintptr_t>(x.data))})
      while (n % vector) vector /= 2;
    const int64_t last = fork.end.rows ? cache.length : within(fork.end.all, cache.length);
    const int64_t columns = (last - launch_.first) * (token / vector);
    if (last <= launch_.first || columns == 0 || cache.heads == 0) return nullptr;
    const int64_t slabs = (columns + launch_.lanes - 1) / launch_.lanes;
    if (columns > INT32_MAX || slabs > INT32_MAX / cache.heads)
      return "crossfade's CUDA kernel forks caches of at most 2^31 vectors a head and slabs in all";
    if (launch_.count == kMostCaches || blocks_ > INT32_MAX - slabs * cache.heads)
      if (const char* error = run()) return error;
    launch_.caches[launch_.count++] = {static_cast<char*>(x.data),
                                       strides[0],
                                       strides[1],
                                       strides[2],
                                       cache.length,
                                       static_cast<uint32_t>(token / vector),
                                       static_cast<uint32_t>(vector),
                                       static_cast<uint32_t>(blocks_),
                                       static_cast<uint32_t>(slabs)};
    blocks_ += slabs * cache.heads;
    return nullptr;
  }

  const char* run() {
    if (launch_.count == 0) return nullptr;
    const cudaError_t error = launch(fork_kernel, {1, kForkThreads}, blocks_, stream_, launch_);
    launch_.count = 0;
    blocks_ = 0;
    return error ? cudaGetErrorString(error) : nullptr;
  }

 private:
  ForkLaunch launch_{};
  int64_t blocks_ = 0;
  void* stream_;
};

}  // namespace cuda

const char* chunk_select_cuda(const Selection& selection, int device, void* stream) {
  if (selection.prompts == 0) return nullptr;
  if (selection.prompts > INT32_MAX)
    return "crossfade's CUDA kernel takes at most 2^31 - 1 prompts";
  const cuda::DeviceGuard guard(device);
  const int64_t threads = std::min<int64_t>(1024, (selection.slots + 31) / 32 * 32);
  cudaError_t error = guard.error;
  if (!error)
    error = cuda::launch(cuda::select_kernel, {1, static_cast<unsigned>(threads)},
                         selection.prompts, stream, selection);
  return error ? cudaGetErrorString(error) : nullptr;
}

const char* fork_cache_cuda(const Fork& fork, int device, void* stream) {
  if (fork.rows > cuda::kMostRows) return "crossfade's CUDA kernel forks at most 2,048 rows";
  const cuda::DeviceGuard guard(device);
  if (guard.error) return cudaGetErrorString(guard.error);
  cuda::ForkLauncher launcher(fork, stream);
  for (int64_t i = 0; i < fork.count; ++i)
    if (const char* error = launcher.add(fork.caches[i])) return error;
  return launcher.run();
}

}  // namespace crossfade
