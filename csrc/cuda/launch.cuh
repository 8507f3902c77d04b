// Launches kernels. Some are plain grids; in others a thread-block cluster takes each row, or a
// single block where the GPU has no clusters.
//
// How rows are spread: three bfloat16 terms at V = 151,936 are 912 KB a row. A warp takes some 220
// instructions for 256 tokens; an H200 executes 350 while it reads them. So all multiprocessors
// must have equally many tokens, and there must be few waves, as the start and the end of a wave
// take as long as some 40,000 tokens. A block has as many threads as it can, or 512 where two
// blocks then share a multiprocessor: one reads while the other waits at a barrier. How many
// clusters fit at once is asked, not computed, as each must lie within one part of the device.
// Microseconds on an H200, without truncation / with top-k 50 and top-p 0.9, measured when each
// token had noise of its own and a warp took 370 instructions without truncation:
//   256 rows  1 x 512: 108 / 96   1 x 1,024: 115 / 140  2 x 512: 127 / 131
//    64 rows  1 x 1,024: 60 / 70  2 x 1,024: 44 / 58    4 x 512: 65 / 87
//     8 rows  4 x 1,024: 27 / 43  8 x 1,024: 21 / 37    16 x 512: 22 / 43
//     1 row   4 x 1,024: 24 / 40  8 x 1,024: 19 / 34    16 x 1,024: 16 / 34
#pragma once
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <mutex>
#include <unordered_map>

namespace crossfade {
namespace cuda {

// The most threads of a block. The power means and the pushes of eight tokens take more registers
// than 1,024 threads have.
template <bool kLarge>
constexpr int kMostThreads = kLarge ? 512 : 1024;

struct Spread {
  unsigned cluster, threads;  // blocks of a row, and threads of a block: powers of two
};

// What one device allows one kernel.
struct Limits {
  static constexpr int kClusters = 5;  // sizes of clusters: 1, 2, 4, 8 and 16 blocks

  int multiprocessors = 0;
  unsigned threads[2] = {};        // sizes of blocks: 512 threads, and the most
  int at_once[kClusters][2] = {};  // how many such clusters fit on the device; 0: it has none
};

// The spread that takes the least time. A wave takes as long as the tokens of a multiprocessor do,
// and some more.
inline Spread spread_of(int64_t rows, int64_t vocab, const Limits& limits) {
  Spread best{1, limits.threads[1]};
  int64_t least = INT64_MAX;
  for (int i = 0; i < Limits::kClusters; ++i) {
    for (const int full : {1, 0}) {
      const int64_t at_once = limits.at_once[i][full];
      if (at_once == 0) continue;
      const int64_t cluster = int64_t{1} << i, waves = (rows + at_once - 1) / at_once;
      const int64_t blocks = std::min(rows, at_once) * cluster;
      const int64_t shared_by = (blocks + limits.multiprocessors - 1) / limits.multiprocessors;
      if (!full && shared_by == 1) continue;
      const int64_t cost = waves * (shared_by * (vocab / cluster) + 40000);
      if (cost < least) {
        least = cost;
        best = {static_cast<unsigned>(cluster), limits.threads[full]};
      }
    }
  }
  return best;
}

// Makes `device` current, and at the end the device that was current before.
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

// The settings of a launch of `grid` blocks, which point to `cluster`.
inline cudaLaunchConfig_t config_of(const Spread& spread, int64_t grid, void* stream,
                                    cudaLaunchAttribute& cluster) {
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {spread.cluster, 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(grid));
  config.blockDim = dim3(spread.threads);
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &cluster;
  config.numAttrs = spread.cluster > 1 ? 1 : 0;
  return config;
}

// Asks the current device what it allows the kernel, after it has let it use clusters of 16.
inline cudaError_t query(const void* kernel, int device, Limits& limits) {
  int major = 0;
  cudaFuncAttributes attributes{};
  cudaError_t error =
      cudaDeviceGetAttribute(&limits.multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (!error) error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (!error) error = cudaFuncGetAttributes(&attributes, kernel);
  if (!error && major >= 9)
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  limits.threads[0] = 512;
  limits.threads[1] = attributes.maxThreadsPerBlock;
  for (int full = 0; full < 2 && !error; ++full) {
    int blocks = 0;
    error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, limits.threads[full], 0);
    limits.at_once[0][full] = blocks * limits.multiprocessors;
    for (int i = 1; i < Limits::kClusters && !error && major >= 9; ++i) {
      const Spread spread{1u << i, limits.threads[full]};
      cudaLaunchAttribute cluster{};
      const cudaLaunchConfig_t config = config_of(spread, spread.cluster, nullptr, cluster);
      int& at_once = limits.at_once[i][full];
      if (cudaOccupancyMaxActiveClusters(&at_once, kernel, &config) == cudaSuccess) continue;
      cudaGetLastError();  // the device has no clusters of that size
      at_once = 0;
    }
  }
  return error;
}

// The same, but asked only once for each device.
template <auto kernel>
cudaError_t limits_of(int device, Limits& limits) {
  static std::mutex mutex;
  static std::unordered_map<int, Limits> known;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find(device);
  if (found != known.end()) {
    limits = found->second;
    return cudaSuccess;
  }
  const cudaError_t error = query(reinterpret_cast<const void*>(kernel), device, limits);
  if (!error) known[device] = limits;
  return error;
}

template <class... Args>
cudaError_t launch(void (*kernel)(Args...), const Spread& spread, int64_t rows, void* stream,
                   const Args&... args) {
  cudaLaunchAttribute cluster{};
  const cudaLaunchConfig_t config = config_of(spread, rows * spread.cluster, stream, cluster);
  return cudaLaunchKernelEx(&config, kernel, args...);
}

// Launches kernel(args...) for all rows. The blocks of a row follow one another.
template <auto kernel, class... Args>
const char* run(int64_t rows, int64_t vocab, int device, void* stream, const Args&... args) {
  if (rows == 0) return nullptr;
  constexpr int64_t kMost =
      INT32_MAX / 16;  // rows times blocks of a row, and tokens plus a round, stay below 2^31
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
