// Lists the tokens that top-k, top-p and min-p, which keep ties, leave in most rows: few.
//
// While a row is read, each block lists the tokens that may be among its best: those that reach a
// floor, which is the j-th largest of the maxima of its quads of threads. As j quads reach it, at
// least j tokens do. The floor rises as more is read, and some 2 j tokens end up on the list. Each
// is then ranked among the lists of the whole team: how many tokens and how much mass lie above it
// says whether it stays.
//
// The lists may lack tokens that stay: in a flat row under top-p, with a large k, with very many
// ties, in a row sorted ascending. See edge.cuh and threshold.cuh for those.
#pragma once
#include "race.cuh"
#include "radix_search.cuh"

namespace crossfade {
namespace cuda {

constexpr uint32_t kListed = 1920;  // as many as 48 KB of shared memory have room for
// A token's share of the row's mass is a number in fixed point, so that sums are exact, whatever
// their order.
constexpr double kWholeMass = 1ll << 43;

struct Cut {
  int64_t top_k = 0;  // 0: off
  float top_p = 1;
  float inv_t = 1;
  double min_p_gap = -INFINITY;  // log(min_p) / inv_t: how far below the best a token may score

  __device__ bool any() const { return top_k > 0 || top_p < 1 || min_p_gap > -INFINITY; }
};

// A row of which max and mass are known.
struct RowMass {
  float max, inv_t, share;  // share: 1 / sum of exp((s - max) * inv_t)

  __device__ uint64_t of(float s) const {
    return static_cast<uint64_t>(exp_of((s - max) * inv_t) * share *
                                 static_cast<float>(kWholeMass));
  }
};

// The scores among which the threshold of top-p lies, see edge.cuh: tokens of at least `high` stay,
// and hold the mass `above`; those below `low` do not stay.
struct Edge {
  float low, high;
  bool found;
  uint64_t above;
};

// What a block keeps in shared memory to find a threshold.
struct ThresholdMemory {
  RowMass mass;
  float least;  // the lowest score that min-p keeps
  RadixSearch search;
  Edge edge;
  float quad_max[256];
  float floor;
  uint32_t listed, pulled, owned;
  union {
    struct {
      float score[kListed];
      uint32_t token[kListed];
      float all[kListed];       // scores of the team's candidates
      uint16_t own[kListed];    // which of the listed are candidates
      uint64_t above[kListed];  // for each candidate, the mass that scores higher
    };
    struct {
      // A value is high * 2^12 + low, as shared memory adds 32 bits at a time. Counts have no high
      // part.
      uint32_t low[RadixSearch::kBins], high[RadixSearch::kBins];
      uint64_t team[RadixSearch::kBins];  // the sums of all members' values
      uint64_t warp_total[32];
    };
  };
};

__device__ __forceinline__ uint64_t add(uint64_t a, uint64_t b) { return a + b; }

// A token stays under top-p if the mass above it is less than this, or none.
__device__ __forceinline__ uint64_t nucleus(float top_p, double whole) {
  return static_cast<uint64_t>(ceil(top_p * whole));
}

class Shortlist {
 public:
  __device__ Shortlist(ThresholdMemory& memory, const Cut& cut) : m_(memory), cut_(cut) {}

  // Called by all threads of the block in every round of a sweep.
  __device__ void offer(uint32_t round, uint32_t v, const Eight& s, float top) {
    thread_max_ = fmaxf(thread_max_, top);
    if ((round & (round + 1)) == 0) raise_floor();  // rounds 0, 1, 3, 7 ...
    const float floor = m_.floor;
    if (!(top >= floor)) return;
    list(v, s, [&](float x) { return x >= floor && x > -INFINITY; });
  }

  // Lists those of the tokens v .. v + 7 whose scores pass the test.
  template <class Test>
  __device__ void list(uint32_t v, const Eight& s, Test test) {
    uint32_t some = which([&](uint32_t i) { return test(s[i]); });
    for (; some; some &= some - 1) {
      const uint32_t i = __ffs(some) - 1;
      const uint32_t slot = atomicAdd(&m_.listed, 1u);
      if (slot >= kListed) return;
      m_.score[slot] = pick(s, i);
      m_.token[slot] = v + i;
    }
  }

  __device__ float floor() const { return m_.floor; }
  __device__ bool overflows() const { return m_.listed > kListed; }

  // Whether the lists hold all tokens that stay, the same in all threads. Called after the sweep,
  // once its results are merged, if no list overflows. `floor` is the highest floor of the team.
  __device__ bool settle(Team& team, float floor) {
    pull(floor);
    __syncthreads();
    if (m_.pulled > kListed) return false;
    uint64_t covered = rank();
    if (cut_.top_p < 1) {
      covered = team.reduce(covered, [](uint64_t x) { return warp_reduce(x, add); });
      // the mass of which top-p keeps a part
      const double whole = cut_.top_k > 0 ? static_cast<double>(covered) : kWholeMass;
      nucleus_ = nucleus(cut_.top_p, whole);
    } else {
      __syncthreads();
    }
    if (floor == -INFINITY) return true;  // every token is listed
    if (cut_.top_k > 0) return m_.pulled >= cut_.top_k;
    if (cut_.top_p < 1 && covered >= nucleus_) return true;
    return floor <= m_.least;
  }

  // Calls visit(score) for the listed tokens that stay, for each in one thread of the team.
  template <class Visit>
  __device__ void for_each_kept(Visit visit) const {
    for (uint32_t i = threadIdx.x; i < m_.owned; i += blockDim.x)
      if (stays(i)) visit(m_.score[m_.own[i]]);
  }

  // Adds every group that has a listed token that stays to the `groups` of one warp of the team:
  // the warp of the group's first candidate that stays. fetch(group, i, s) fills the lane's eight
  // scores of the group, and returns the group's maximum.
  template <class Fetch>
  __device__ void add_groups(Groups& groups, Fetch fetch) const {
    uint32_t count = 0, mine = 0;
    for (uint32_t i = warp_id(); i < m_.owned; i += warp_count()) {
      if (!stays(i)) continue;
      const uint32_t group = group_of(i);
      uint32_t before = 0;
      for (uint32_t first = 0; first < i && !before; first += 32) {
        const uint32_t j = first + lane_id();
        before = __ballot_sync(kAllLanes, j < i && group_of(j) == group && stays(j));
      }
      if (before) continue;
      Eight s;
      const float max = fetch(group, i, s);
      groups.add(count, s, max);
      if (lane_id() == count % 32) mine = groups.first() + group;
      if (++count % 32 == 0) groups.enter(mine);
    }
    groups.enter(mine);
  }

  // Fetches a group from the list. Candidate `from` is the first of its tokens that stay.
  __device__ float fetch(uint32_t group, uint32_t from, Eight& s) const {
#pragma unroll
    for (float& x : s) x = -INFINITY;
    float max = -INFINITY;
    for (uint32_t first = from; first < m_.owned; first += 32) {
      const uint32_t j = first + lane_id();
      uint32_t rest = __ballot_sync(kAllLanes, j < m_.owned && group_of(j) == group && stays(j));
      for (; rest; rest &= rest - 1) {
        const uint32_t e = m_.own[first + __ffs(rest) - 1], place = m_.token[e] % kGroup;
        const float score = m_.score[e];
        max = fmaxf(max, score);
        if (place / kWidth != lane_id()) continue;
#pragma unroll
        for (uint32_t k = 0; k < kWidth; ++k) s[k] = k == place % kWidth ? score : s[k];
      }
    }
    return max;
  }

  // Finds out which tokens of the edge stay, see Edge. False if the lists cannot tell.
  __device__ bool settle_edge(Team& team) {
    pull(-INFINITY);
    __syncthreads();
    if (m_.pulled > kListed) return false;
    rank(m_.edge.above);
    nucleus_ = nucleus(cut_.top_p, kWholeMass);
    __syncthreads();
    return true;
  }

  // The lowest score that stays; -inf where nothing is cut.
  __device__ float lowest_kept(Team& team) const {
    struct Lowest {
      float score = INFINITY;
    } lowest;
    for_each_kept([&](float s) { lowest.score = fminf(lowest.score, s); });
    lowest = team.reduce(lowest, [](const Lowest& x) {
      return Lowest{warp_reduce(x.score, [](float a, float b) { return fminf(a, b); })};
    });
    const bool k_spares_all = cut_.top_k == 0 || m_.pulled < cut_.top_k;
    const bool spares_all = k_spares_all && cut_.top_p >= 1 && cut_.min_p_gap == -INFINITY;
    return spares_all ? -INFINITY : lowest.score;
  }

 private:
  static constexpr uint64_t kBeyondK = ~uint64_t{0};

  __device__ uint32_t group_of(uint32_t i) const { return m_.token[m_.own[i]] / kGroup; }

  // Whether the block's candidate i stays.
  __device__ bool stays(uint32_t i) const {
    const uint64_t above = m_.above[i];
    return (above == 0 || above < nucleus_) && m_.score[m_.own[i]] >= m_.least;
  }

  __device__ void raise_floor() {
    float quad = fmaxf(thread_max_, __shfl_xor_sync(kAllLanes, thread_max_, 1));
    quad = fmaxf(quad, __shfl_xor_sync(kAllLanes, quad, 2));
    const uint32_t quads = blockDim.x / 4;
    const bool small_k = cut_.top_k > 0 && cut_.top_k < quads / 2;
    const uint32_t enough = small_k ? static_cast<uint32_t>(cut_.top_k) : quads / 2;
    const uint32_t mine = threadIdx.x / 4, share = threadIdx.x % 4;
    if (share == 0) m_.quad_max[mine] = quad;
    __syncthreads();
    uint32_t before = 0;  // quads of higher maxima; each thread of this quad counts a share of them
#pragma unroll 8
    for (uint32_t i = share * quads / 4; i < (share + 1) * quads / 4; ++i) {
      const float other = m_.quad_max[i];
      before += other > quad || (other == quad && i < mine);
    }
    before += __shfl_xor_sync(kAllLanes, before, 1);
    before += __shfl_xor_sync(kAllLanes, before, 2);
    if (share == 0 && before == enough - 1) m_.floor = quad;
    __syncthreads();
  }

  // Copies the scores of all candidates of the team to this block, and notes which are its own.
  // If there are fewer warps than members, each warp reads from several members; else several warps
  // share one. Both numbers are powers of two.
  __device__ void pull(float floor) {
    const uint32_t size = Team::size(), warps = warp_count();
    const uint32_t share = warps > size ? warps / size : 1;
    for (uint32_t r = warp_id() % size; r < size; r += warps) {
      const ThresholdMemory& from = Team::at(r, m_);
      const uint32_t listed = from.listed;
      for (uint32_t i = warp_id() / size * 32 + lane_id(); i < listed; i += share * 32) {
        const float s = from.score[i];
        if (!(s >= floor)) continue;
        const uint32_t slot = atomicAdd(&m_.pulled, 1u);
        if (slot < kListed) m_.all[slot] = s;
        if (r == Team::rank()) m_.own[atomicAdd(&m_.owned, 1u)] = static_cast<uint16_t>(i);
      }
    }
  }

  // Ranks this block's candidates, each with a warp, where tokens that are not listed hold the mass
  // `more` above them. One lane of a warp returns the mass of those candidates of the warp that
  // top-k keeps; the other lanes return 0.
  __device__ uint64_t rank(uint64_t more = 0) {
    uint64_t kept = 0;
    const uint32_t count = m_.pulled;
    for (uint32_t i = warp_id(); i < m_.owned; i += warp_count()) {
      const float mine = m_.score[m_.own[i]];
      uint32_t higher = 0;
      uint64_t above = 0;
      for (uint32_t j = lane_id(); j < count; j += 32) {
        const float other = m_.all[j];
        if (!(other > mine)) continue;
        ++higher;
        above += m_.mass.of(other);
      }
      higher = warp_reduce(higher, [](uint32_t a, uint32_t b) { return a + b; });
      above = warp_reduce(above, add);
      if (lane_id() != 0) continue;
      const bool beyond = cut_.top_k > 0 && higher >= cut_.top_k;
      m_.above[i] = beyond ? kBeyondK : above + more;
      kept += beyond ? 0 : m_.mass.of(mine);
    }
    return kept;
  }

  ThresholdMemory& m_;
  const Cut& cut_;
  float thread_max_ = -INFINITY;
  uint64_t nucleus_ = kBeyondK;  // a token stays if the mass above it is less, or none
};

}  // namespace cuda
}  // namespace crossfade
