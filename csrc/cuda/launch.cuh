// Launches kernels: those in which a thread-block cluster takes a row, or a block where there are
// none, and plain grids.
//
// How rows are spread. Three bfloat16 terms at V = 151,936 are 912 KB a row. An H100 reads some
// 3.0 TB/s at best, 23 bytes a nanosecond and multiprocessor; with 0.8 us of latency under load
// that takes 18 KB under way in each. 64 registers a thread (the launch bounds) let 1,024 threads
// live there, 48 bytes under way each: 48 KB, of which arithmetic (some 40 instructions a token
// with noise, 60 are the time of reading it) may cost the larger part. As two blocks of 512, one
// block's barriers and last steps are hidden by the other's reading. 132 multiprocessors then hold
// 264 blocks: 256 rows are one wave of single blocks, 64 rows one of clusters of 4. Few rows take
// clusters of 16 (the most there is) and 1,024 threads a block: nothing else is there to hide the
// latency. Between those, spread_of() takes what wastes least in the last wave.
#pragma once
#include <cuda_runtime.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace crossfade {
namespace cuda {

// Threads of a block. Eight tokens' power means take more registers than 1,024 threads have.
template <bool kPower>
constexpr int kMostThreads = kPower ? 512 : 1024;

struct Spread {
  unsigned cluster, threads;  // powers of two
};

// What one device allows one kernel.
struct alignas(8) Limits {
  uint16_t multiprocessors;
  uint16_t cluster;  // largest, 1 without clusters
  uint16_t threads;  // of a block
};

// Blocks a row and threads a block. Where a block may have 1,024, two of 512 fit on a
// multiprocessor. A wave of them takes as long as a block's tokens, and as some 4,096 more for its
// barriers and last steps.
inline Spread spread_of(int64_t rows, int64_t vocab, const Limits& limits) {
  const int64_t at_once = limits.multiprocessors * (limits.threads / 512);
  Spread best{1, 512};
  int64_t least = INT64_MAX;
  for (unsigned cluster = 1; cluster <= limits.cluster; cluster *= 2) {
    const int64_t waves = (rows * cluster + at_once - 1) / at_once;
    const int64_t cost = waves * (vocab / cluster + 4096);
    if (cost < least) {
      least = cost;
      best.cluster = cluster;
    }
  }
  if (rows * best.cluster <= limits.multiprocessors) best.threads = limits.threads;
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

// Asks the current device; lets the kernel use clusters of 16.
inline cudaError_t query(const void* kernel, int device, Limits& limits) {
  int multiprocessors = 0, major = 0, largest = 1;
  cudaFuncAttributes attributes{};
  cudaError_t error =
      cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (!error) error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (!error) error = cudaFuncGetAttributes(&attributes, kernel);
  const int threads = attributes.maxThreadsPerBlock;
  if (!error && major >= 9) {
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(16);
    config.blockDim = dim3(threads);
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    if (!error) error = cudaOccupancyMaxPotentialClusterSize(&largest, kernel, &config);
  }
  uint16_t cluster = 1;
  while (cluster * 2 <= std::min(largest, 16)) cluster *= 2;
  limits = {static_cast<uint16_t>(multiprocessors), cluster, static_cast<uint16_t>(threads)};
  return error;
}

// The same, asked once.
template <auto kernel>
cudaError_t limits_of(int device, Limits& limits) {
  static std::atomic<Limits> known[64];  // of device 0, 1, ...
  const bool remember = device < 64;
  if (remember) limits = known[device].load();
  if (remember && limits.threads != 0) return cudaSuccess;
  const cudaError_t error = query(reinterpret_cast<const void*>(kernel), device, limits);
  if (remember && !error) known[device].store(limits);
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

// Launches kernel(args...) for all rows; a row's blocks follow one another.
template <auto kernel, class... Args>
const char* run(int64_t rows, int64_t vocab, int device, void* stream, const Args&... args) {
  if (rows == 0) return nullptr;
  constexpr int64_t kMost = INT32_MAX / 16;  // of rows times blocks a row; of tokens, plus a round
  if (rows > kMost || vocab > kMost)
    return "crossfade's CUDA kernels take at most 134,217,727 rows and as many tokens";
  const DeviceGuard guard(device);
  cudaError_t error = guard.error;
  Limits limits{};
  if (!error) error = limits_of<kernel>(device, limits);
  if (!error) {
    const Spread spread = spread_of(rows, vocab, limits);
    error = launch(kernel, spread, rows, stream, args...);
  }
  return error ? cudaGetErrorString(error) : nullptr;
}

}  // namespace cuda
}  // namespace crossfade
