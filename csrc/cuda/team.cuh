// The threads that work on one row: a thread-block cluster where the GPU has them (sm_90 and
// later), else one block. They meet at barriers and read each other's shared memory.
#pragma once
#include <cstdint>
#include <cstring>

#include "../blend_math.h"

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define CF_CLUSTERS 1
#endif

namespace crossfade {
namespace cuda {

constexpr uint32_t kAllLanes = 0xFFFFFFFFu;

__device__ __forceinline__ uint32_t lane_id() { return threadIdx.x % 32; }
__device__ __forceinline__ uint32_t warp_id() { return threadIdx.x / 32; }
__device__ __forceinline__ uint32_t warp_count() { return blockDim.x / 32; }

template <class T>
__device__ __forceinline__ T shuffle_xor(const T& x, int lanes) {
  static_assert(sizeof(T) % 4 == 0, "shuffles move 32-bit words");
  uint32_t words[sizeof(T) / 4];
  memcpy(words, &x, sizeof x);
#pragma unroll
  for (uint32_t& w : words) w = __shfl_xor_sync(kAllLanes, w, lanes);
  T result;
  memcpy(&result, words, sizeof result);
  return result;
}

// Merges the values of all lanes, and gives the result to all. merge(a, b) and merge(b, a) must be
// the same.
template <class T, class Merge>
__device__ __forceinline__ T warp_reduce(T x, Merge merge) {
#pragma unroll(sizeof(T) == 4 ? 5 : 1)  // large values would fill the instruction cache
  for (int lanes = 16; lanes > 0; lanes /= 2) x = merge(x, shuffle_xor(x, lanes));
  return x;
}

// The largest x of all lanes, where none is NaN.
__device__ __forceinline__ float warp_max(float x) {
#if defined(CF_EMULATED) || __CUDA_ARCH__ >= 800
  // One instruction finds the largest of integers. These sort as the numbers do.
  const auto ordered = [](int32_t i) { return i ^ (i >> 31 & 0x7FFFFFFF); };  // its own inverse
  const int32_t most = __reduce_max_sync(kAllLanes, ordered(static_cast<int32_t>(bits_of(x))));
  return float_of(static_cast<uint32_t>(ordered(most)));
#else
  return warp_reduce(x, [](float a, float b) { return fmaxf(a, b); });
#endif
}

// A value on its way through shared memory. It is moved by words of 32 bits, as a byte takes as
// long as a word. Bytes of other members, which the cluster's network moves one by one, took some
// 70 us.
struct alignas(8) Parcel {
  uint32_t words[10];

  template <class T>
  __device__ __forceinline__ void put(const T& x) {
    static_assert(sizeof(T) <= sizeof words && sizeof(T) % 4 == 0, "make parcels larger");
    uint32_t of_x[sizeof(T) / 4];
    memcpy(of_x, &x, sizeof x);
#pragma unroll
    for (uint32_t i = 0; i < sizeof(T) / 4; ++i) words[i] = of_x[i];
  }

  template <class T>
  __device__ __forceinline__ T get() const {
    uint32_t of_x[sizeof(T) / 4];
#pragma unroll
    for (uint32_t i = 0; i < sizeof(T) / 4; ++i) of_x[i] = words[i];
    T x;
    memcpy(&x, of_x, sizeof x);
    return x;
  }
};

// Where the values of warps and blocks are exchanged, in each block's shared memory.
struct Exchange {
  Parcel warp[32], block[2], all;
  uint32_t turn;  // which of block[2] is next; known to the first warp
};

class Team {
 public:
  __device__ explicit Team(Exchange& exchange) : exchange_(exchange) {
    if (threadIdx.x == 0) exchange.turn = 0;
  }

#ifdef CF_CLUSTERS
  __device__ static uint32_t rank() { return __clusterRelativeBlockRank(); }
  __device__ static uint32_t size() { return __clusterSizeInBlocks(); }
#else
  __device__ static uint32_t rank() { return 0; }
  __device__ static uint32_t size() { return 1; }
#endif
  __device__ static int64_t row() { return blockIdx.x / size(); }

  __device__ static void sync() {
#ifdef CF_CLUSTERS
    if (size() > 1) {
      __cluster_barrier_arrive();
      __cluster_barrier_wait();
      return;
    }
#endif
    __syncthreads();
  }

  // What lies where `mine` does, but in the shared memory of the member `rank`.
  template <class T>
  __device__ static const T& at(uint32_t rank, const T& mine) {
#ifdef CF_CLUSTERS
    if (size() > 1) return *static_cast<const T*>(__cluster_map_shared_rank(&mine, rank));
#endif
    return mine;
  }

  // Merges the values of the block's threads, and gives the result to its first warp.
  // over_warp(x) merges a warp's values and gives the result to all its lanes; T{} must be the
  // neutral element. It is a barrier for all of the block's shared memory.
  template <class T, class OverWarp>
  __device__ T reduce_block(T x, OverWarp over_warp) {
    const uint32_t lane = lane_id();
    x = over_warp(x);
    if (lane == 0) exchange_.warp[warp_id()].put(x);
    __syncthreads();
    if (warp_id() == 0) {
      x = lane < warp_count() ? exchange_.warp[lane].template get<T>() : T{};
      x = over_warp(x);
    }
    return x;
  }

  // Merges the values of all threads, and gives the result to all. It is a barrier for all of
  // shared memory. The first warp alone merges the values of blocks. These have two places, which
  // take turns: so a barrier lies between the last read of a place and the next write to it.
  template <class T, class OverWarp>
  __device__ T reduce(T x, OverWarp over_warp) {
    const uint32_t lane = lane_id();
    x = reduce_block(x, over_warp);
    if (size() > 1) {
      if (threadIdx.x == 0) exchange_.block[exchange_.turn].put(x);
      sync();
      if (warp_id() == 0) {
        const uint32_t turn = exchange_.turn;
        x = lane < size() ? at(lane, exchange_).block[turn].template get<T>() : T{};
        x = over_warp(x);
        if (lane == 0) exchange_.turn = turn ^ 1;
      }
    }
    if (threadIdx.x == 0) exchange_.all.put(x);
    __syncthreads();
    return exchange_.all.template get<T>();
  }

 private:
  Exchange& exchange_;
};

// The part of a row of `vocab` tokens that the member reads, and in how many rounds. In each round
// a warp reads one group of tokens, as every part begins where a group does. The last parts may
// begin past the vocabulary's end: those are empty. Groups are counted on from `first_group`, that
// of the first token, which is not 0 in a shard of a larger vocabulary.
struct Slice {
  static constexpr uint32_t kWidth = 8;  // tokens a thread reads at once
  static_assert(kGroup == 32 * kWidth, "a warp reads a group in a round");

  uint32_t begin, end, rounds;
  uint32_t group;  // the one at `begin`

  __device__ Slice(uint32_t vocab, uint32_t first_group) {
    const uint32_t groups = (vocab + kGroup - 1) / kGroup;
    const uint32_t own = (groups + Team::size() - 1) / Team::size();
    begin = Team::rank() * own * kGroup;
    end = min(begin + own * kGroup, vocab);
    group = first_group + begin / kGroup;
    rounds = (own + warp_count() - 1) / warp_count();
  }

  // The group that this thread's warp reads in a round.
  __device__ uint32_t group_of(uint32_t round) const {
    return group + round * warp_count() + warp_id();
  }
};

// Calls visit(round, v, s, top) in all threads for every round of the slice. s holds the scores of
// tokens v .. v + 7, which are -inf past the end, and top is their maximum. As all threads call it,
// visit may hold barriers.
template <class Scores, class Visit>
__device__ __forceinline__ void sweep(const Slice& slice, const Scores& scores, Visit visit) {
  for (uint32_t round = 0; round < slice.rounds; ++round) {
    const uint32_t v = slice.begin + (round * blockDim.x + threadIdx.x) * Slice::kWidth;
    float s[Slice::kWidth];
    if (v < slice.end) {
      scores(v, s);
    } else {
#pragma unroll
      for (float& x : s) x = -INFINITY;
    }
    float top = s[0];
#pragma unroll
    for (uint32_t i = 1; i < Slice::kWidth; ++i) top = fmaxf(top, s[i]);
    visit(round, v, s, top);
  }
}

}  // namespace cuda
}  // namespace crossfade
