// Runs CUDA kernels on a CPU, for tests: enough of the language and of the runtime to compile
// csrc/cuda with a C++ compiler and execute its logic, thread by thread, where there is no GPU.
//
// The threads of a thread-block cluster are fibers of one OS thread. A fiber runs until it waits:
// at a barrier of its warp (every shuffle and vote is one), block or cluster. Waiting fibers go on
// in a shuffled order, so that a missing barrier shows up as a wrong result, and so does a read of
// memory that nothing wrote, as shared memory starts out full of NaN. A thread that leaves while
// others wait for it, or waits at another barrier than they do, is an error.
#pragma once
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <vector>

#define CF_EMULATED 1
#define __device__
#define __host__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

using std::max;
using std::min;

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

inline dim3 threadIdx, blockIdx, blockDim;  // of the fiber that runs

namespace cuda_on_cpu {

constexpr unsigned kWarp = 32;
constexpr size_t kStack = 128 * 1024;

// A barrier that some fibers meet at. Those that wait leave with the generation.
struct Barrier {
  unsigned members = 0, waiting = 0, generation = 0;
  int line = 0;
};

struct Warp {
  Barrier barrier;
  uint32_t posted[2][kWarp];  // two sets take turns: one is read while the other is written
};

struct Block {
  std::unique_ptr<uint64_t[]> shared;
  Barrier barrier;
  std::vector<Warp> warps;
};

struct Fiber {
  dim3 thread;
  unsigned rank;  // of its block in the cluster
  Block* block;
  jmp_buf jump;
  std::unique_ptr<char[]> stack{new char[kStack]};
  bool started = false, done = false;
  Barrier* waits_for = nullptr;
  unsigned waits_since = 0;
  uint32_t turn = 0;
};

struct Machine {
  std::vector<std::unique_ptr<Fiber>> fibers;  // reused from launch to launch
  std::vector<Block> blocks;
  Barrier cluster_barrier;
  Fiber* current = nullptr;
  jmp_buf scheduler;
  ucontext_t start;
  std::function<void()> kernel;
  std::mt19937 random{1};
  std::string error;

  // Of the emulated GPU, and of the launches: 0 leaves the choice to the code under test.
  int multiprocessors = 4, compute_capability = 9;
  unsigned force_cluster = 0, force_threads = 0;
};

inline Machine& machine() {
  static Machine m;
  return m;
}
inline Fiber& self() { return *machine().current; }

inline unsigned lane() { return self().thread.x % kWarp; }

inline void fail(const std::string& what) {
  if (machine().error.empty()) machine().error = what;
}

inline void run_fiber() {
  Machine& m = machine();
  m.kernel();
  m.current->done = true;
  _longjmp(m.scheduler, 1);
}

// Waits until all members of the barrier do.
inline void wait(Barrier& barrier, int line) {
  Fiber& me = self();
  if (barrier.waiting == 0) barrier.line = line;
  if (barrier.line != line)
    fail("threads wait at different barriers, of lines " + std::to_string(barrier.line) + " and " +
         std::to_string(line));
  me.waits_for = &barrier;
  me.waits_since = barrier.generation;
  if (++barrier.waiting == barrier.members) {
    barrier.waiting = 0;
    ++barrier.generation;
  }
  if (!_setjmp(me.jump)) _longjmp(machine().scheduler, 1);
}

// Runs one cluster to its end.
inline void run_cluster(unsigned first_block, unsigned cluster, unsigned threads,
                        size_t shared_bytes) {
  Machine& m = machine();
  const unsigned count = cluster * threads;
  m.blocks.clear();
  m.blocks.resize(cluster);
  m.cluster_barrier = {count};
  for (Block& block : m.blocks) {
    const size_t words = (shared_bytes + 7) / 8;
    block.shared.reset(new uint64_t[words]);
    std::memset(block.shared.get(), 0xFF, words * 8);
    block.barrier = {threads};
    block.warps.resize(threads / kWarp);
    for (Warp& warp : block.warps) warp.barrier = {kWarp};
  }
  while (m.fibers.size() < count) m.fibers.emplace_back(new Fiber);
  std::vector<Fiber*> live;
  for (unsigned i = 0; i < count; ++i) {
    Fiber& f = *m.fibers[i];
    f.thread = dim3(i % threads, 0, 0);
    f.rank = i / threads;
    f.block = &m.blocks[f.rank];
    f.started = f.done = false;
    f.waits_for = nullptr;
    f.turn = 0;
    live.push_back(&f);
  }
  const auto ready = [](const Fiber* f) {
    return !f->waits_for || f->waits_since != f->waits_for->generation;
  };
  std::vector<unsigned> left(cluster, threads);  // of each block
  unsigned block = 0, warp = 0;                  // the ones that go on; past the last: all do
  while (!live.empty() && m.error.empty()) {
    std::vector<Fiber*> turn;
    for (Fiber* f : live) {
      const bool favoured = (block >= cluster || f->rank == block) &&
                            (warp >= threads / kWarp || f->thread.x / kWarp == warp);
      if (favoured && ready(f)) turn.push_back(f);
    }
    if (turn.empty()) {
      if (std::none_of(live.begin(), live.end(), ready))
        return fail("threads wait at a barrier that others have left behind");
      block = m.random() % (cluster + 1);
      warp = m.random() % (threads / kWarp * 2);
      continue;
    }
    std::shuffle(turn.begin(), turn.end(), m.random);
    for (Fiber* f : turn) {
      m.current = f;
      threadIdx = f->thread;
      blockIdx = dim3(first_block + f->rank);
      f->waits_for = nullptr;
      if (_setjmp(m.scheduler)) continue;  // the fiber waits or is done
      if (f->started) _longjmp(f->jump, 1);
      f->started = true;
      getcontext(&m.start);
      m.start.uc_stack.ss_sp = f->stack.get();
      m.start.uc_stack.ss_size = kStack;
      m.start.uc_link = nullptr;
      makecontext(&m.start, run_fiber, 0);
      setcontext(&m.start);
    }
    for (const Fiber* f : turn)
      if (f->done && --left[f->rank] == 0) std::memset(f->block->shared.get(), 0xFF, shared_bytes);
    live.erase(std::remove_if(live.begin(), live.end(), [](Fiber* f) { return f->done; }),
               live.end());
  }
}

// Every lane posts a word and gets to see those of all.
inline const uint32_t* exchange(uint32_t word, int line) {
  Fiber& me = self();
  Warp& warp = me.block->warps[me.thread.x / kWarp];
  uint32_t* posted = warp.posted[me.turn ^= 1];
  posted[me.thread.x % kWarp] = word;
  wait(warp.barrier, line);
  return posted;
}

template <class T>
T shuffle(T x, unsigned from, int line) {
  uint32_t words[sizeof(T) / 4];
  std::memcpy(words, &x, sizeof x);
  for (uint32_t& w : words) w = exchange(w, line)[from];
  std::memcpy(&x, words, sizeof x);
  return x;
}

inline uint32_t ballot(bool vote, int line) {
  const uint32_t* votes = exchange(vote, line);
  uint32_t bits = 0;
  for (unsigned i = 0; i < kWarp; ++i) bits |= votes[i] << i;
  return bits;
}

inline int32_t reduce_max(int32_t x, int line) {
  const uint32_t* posted = exchange(static_cast<uint32_t>(x), line);
  for (unsigned i = 0; i < kWarp; ++i) x = std::max(x, static_cast<int32_t>(posted[i]));
  return x;
}

}  // namespace cuda_on_cpu

// ---- The language
// --------------------------------------------------------------------------------

#define __syncthreads() cuda_on_cpu::wait(cuda_on_cpu::self().block->barrier, __LINE__)
#define __shfl_xor_sync(mask, value, lanes) \
  cuda_on_cpu::shuffle(value, cuda_on_cpu::lane() ^ (lanes), __LINE__)
#define __shfl_up_sync(mask, value, lanes)                                                         \
  cuda_on_cpu::shuffle(value, cuda_on_cpu::lane() - (cuda_on_cpu::lane() < (lanes) ? 0 : (lanes)), \
                       __LINE__)
#define __ballot_sync(mask, vote) cuda_on_cpu::ballot(vote, __LINE__)
#define __reduce_max_sync(mask, value) cuda_on_cpu::reduce_max(value, __LINE__)

#define __cluster_barrier_arrive()
#define __cluster_barrier_wait() cuda_on_cpu::wait(cuda_on_cpu::machine().cluster_barrier, __LINE__)
inline unsigned __clusterRelativeBlockRank() { return cuda_on_cpu::self().rank; }
inline unsigned __clusterSizeInBlocks() { return cuda_on_cpu::machine().blocks.size(); }
inline const void* __cluster_map_shared_rank(const void* mine, unsigned rank) {
  const char* own = reinterpret_cast<const char*>(cuda_on_cpu::self().block->shared.get());
  const char* other =
      reinterpret_cast<const char*>(cuda_on_cpu::machine().blocks[rank].shared.get());
  return other + (static_cast<const char*>(mine) - own);
}

template <class T>
T __ldg(const T* p) {
  if (reinterpret_cast<uintptr_t>(p) % alignof(T) != 0) cuda_on_cpu::fail("an unaligned load");
  return *p;
}
template <class T>
T atomicAdd(T* p, T x) {
  const T before = *p;
  *p += x;
  return before;
}
inline uint32_t atomicMax(uint32_t* p, uint32_t x) {
  const uint32_t before = *p;
  *p = std::max(before, x);
  return before;
}
inline uint32_t atomicOr(uint32_t* p, uint32_t x) {
  const uint32_t before = *p;
  *p |= x;
  return before;
}
inline int __popc(uint32_t x) { return __builtin_popcount(x); }
inline int __ffs(uint32_t x) { return __builtin_ffs(x); }
inline float __expf(float x) { return std::exp(x); }
inline unsigned short __ushort_as_half(unsigned short x) { return x; }
inline float __half2float(unsigned short h) {
  const uint32_t sign = (h & 0x8000u) << 16, magnitude = h & 0x7FFFu;
  float x;
  uint32_t bits = magnitude < 0x7C00u ? 0 : 0x7F800000u | (magnitude & 0x3FFu) << 13;
  if (bits == 0)
    return (sign ? -1.0f : 1.0f) *
           std::ldexp((magnitude < 0x400u ? 0 : 1024.0f) + (magnitude & 0x3FFu),
                      std::max<int>(magnitude >> 10, 1) - 25);
  bits |= sign;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// ---- The runtime
// ---------------------------------------------------------------------------------

enum cudaError_t { cudaSuccess, cudaErrorUnknown };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount, cudaDevAttrComputeCapabilityMajor };
enum cudaFuncAttribute { cudaFuncAttributeNonPortableClusterSizeAllowed };
enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension };
typedef void* cudaStream_t;
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    struct {
      unsigned x, y, z;
    } clusterDim;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

inline const char* cudaGetErrorString(cudaError_t) { return cuda_on_cpu::machine().error.c_str(); }
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount ? cuda_on_cpu::machine().multiprocessors
                                                       : cuda_on_cpu::machine().compute_capability;
  return cudaSuccess;
}
struct cudaFuncAttributes {
  int maxThreadsPerBlock;
};
inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  attributes->maxThreadsPerBlock = 512;
  return cudaSuccess;
}
inline cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }
inline cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void*, int,
                                                                 size_t) {
  *blocks = 1;
  return cudaSuccess;
}
inline cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, const void*,
                                                  const cudaLaunchConfig_t* config) {
  *clusters = 16 / config->attrs[0].val.clusterDim.x;
  return *clusters > 1 ? cudaSuccess : cudaErrorUnknown;
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }

template <class... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Args...),
                               const Args&... args) {
  cuda_on_cpu::Machine& m = cuda_on_cpu::machine();
  unsigned cluster = config->numAttrs ? config->attrs[0].val.clusterDim.x : 1;
  const unsigned rows = config->gridDim.x / cluster;
  if (m.force_cluster) cluster = m.force_cluster;
  blockDim = m.force_threads ? dim3(m.force_threads) : config->blockDim;
  m.kernel = [&] { kernel(args...); };
  m.error.clear();
  for (unsigned row = 0; row < rows && m.error.empty(); ++row)
    cuda_on_cpu::run_cluster(row * cluster, cluster, blockDim.x, 48 * 1024);
  return m.error.empty() ? cudaSuccess : cudaErrorUnknown;
}
