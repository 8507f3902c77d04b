// Finds the score below which truncation removes tokens: top-k, top-p and min-p, which keep ties,
// without a sort.
//
// Most rows keep few tokens. While a row is read, each block lists the tokens that may be among its
// best: those that reach a floor, which is the j-th largest of the maxima of its quads of threads.
// As j quads reach it, at least j tokens do. The floor rises as more is read, and some 2 j tokens
// end up on the list. Each is then ranked among the lists of the whole team: how many tokens and
// how much mass lie above it says whether it stays.
//
// The lists may lack tokens that stay: in a flat row under top-p, for which see edge.cuh, with a
// large k, with very many ties, in a row sorted ascending. Then a radix search over the keys of all
// scores finds the threshold. It reads the inputs again in each round.
#pragma once
#include "race.cuh"

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
      if (lane_id() == count % 32) mine = group;
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

// Adds a score with weight w to this block's histogram.
__device__ __forceinline__ void count(ThresholdMemory& m, uint32_t digit, uint64_t w) {
  atomicAdd(&m.low[digit], static_cast<uint32_t>(w & 0xFFFu));
  if (w >> 12) atomicAdd(&m.high[digit], static_cast<uint32_t>(w >> 12));
}

// Called before a histogram is filled.
__device__ __forceinline__ void clear_histogram(ThresholdMemory& m) {
  Team::sync();  // until then members read what lies there
  for (uint32_t d = threadIdx.x; d < RadixSearch::kBins; d += blockDim.x) m.low[d] = m.high[d] = 0;
  __syncthreads();
}

// Fills m.team: each member adds up its part of the digits and copies the parts of the others.
__device__ __forceinline__ void merge_histograms(ThresholdMemory& m, uint32_t bins) {
  Team::sync();
  const uint32_t part = bins / Team::size(), first = Team::rank() * part;
  for (uint32_t d = first + threadIdx.x; d < first + part; d += blockDim.x) {
    uint64_t sum = 0;
#pragma unroll 4
    for (uint32_t r = 0; r < Team::size(); ++r) {
      const ThresholdMemory& from = Team::at(r, m);
      sum += (static_cast<uint64_t>(from.high[d]) << 12) + from.low[d];
    }
    m.team[d] = sum;
  }
  Team::sync();
  for (uint32_t d = threadIdx.x; d < part * Team::size(); d += blockDim.x) {
    if (d / part != Team::rank()) m.team[d] = Team::at(d / part, m).team[d];
  }
  __syncthreads();
}

// Merges the team's histograms, and finds the first digit from the top at which the sum of their
// digits reaches target(sum of all). One thread calls found(digit, sum of the digits above), if
// there is such a digit. It is a barrier for the block's shared memory.
template <class Target, class Found>
__device__ __forceinline__ void find_digit(ThresholdMemory& m, uint32_t bins, Target target,
                                           Found found) {
  merge_histograms(m, bins);
  // Each thread takes `per` digits, from the top.
  const uint32_t per = (bins + blockDim.x - 1) / blockDim.x, first = threadIdx.x * per;
  const auto bin = [&](uint32_t i) { return m.team[bins - 1 - i]; };
  uint64_t own = 0;
  for (uint32_t i = first; i < first + per && i < bins; ++i) own += bin(i);
  unsigned long long up_to =
      own;  // running sum over the block up to this thread's digits, which it includes
#pragma unroll 1
  for (uint32_t lanes = 1; lanes < 32; lanes *= 2) {
    const unsigned long long other = __shfl_up_sync(kAllLanes, up_to, lanes);
    if (lane_id() >= lanes) up_to += other;
  }
  if (lane_id() == 31) m.warp_total[warp_id()] = up_to;
  __syncthreads();
  uint64_t before = up_to - own, total = 0;
#pragma unroll 1
  for (uint32_t w = 0; w < warp_count(); ++w) {
    if (w < warp_id()) before += m.warp_total[w];
    total += m.warp_total[w];
  }
  const double goal = target(static_cast<double>(total));
  if (static_cast<double>(before) < goal && static_cast<double>(before + own) >= goal) {
    uint32_t i = first;
    uint64_t sum = before, here = bin(i);
    while (static_cast<double>(sum + here) < goal) {
      sum += here;
      here = bin(++i);
    }
    found(bins - 1 - i, sum);
  }
  __syncthreads();
}

// Does one round of m.search on the team's histograms. Returns false if the search has no result,
// as fewer tokens than its target are left.
__device__ __forceinline__ bool descend(ThresholdMemory& m, bool weigh) {
  const bool new_search = m.search.round == 0;
  const double above = m.search.above;
  double target = m.search.target;
  bool reached = true;
  const auto missing = [&](double total) {
    if (new_search) {
      if (weigh) target = fmax(1.0, target * total);
      reached = total >= target;
    }
    return reached ? target - above : INFINITY;
  };
  find_digit(m, 1u << m.search.bits(), missing, [&](uint32_t digit, uint64_t over) {
    m.search.target = target;
    m.search.descend_to(digit, static_cast<double>(over));
  });
  return reached;
}

// The largest score x such that the tokens of scores at least x reach the target; -inf if none do.
// Only scores of at least `least` count. The target is a number of tokens or, with `weigh`, a part
// of all mass.
template <class Scores>
__device__ __forceinline__ float radix_threshold(const Slice& slice, const Scores& scores,
                                                 ThresholdMemory& m, bool weigh, float least,
                                                 double target) {
  __syncthreads();  // until then threads read the last search
  if (threadIdx.x == 0) m.search = RadixSearch(target);
  do {
    clear_histogram(m);
    sweep(slice, scores, [&](uint32_t, uint32_t, const Eight& s, float top) {
      if (!(top >= least)) return;
      uint32_t in_play = which([&](uint32_t i) {
        return s[i] >= least && s[i] > -INFINITY && m.search.in_play(key_of(s[i]));
      });
      for (; in_play; in_play &= in_play - 1) {
        const float x = pick(s, __ffs(in_play) - 1);
        count(m, m.search.digit(key_of(x)), weigh ? m.mass.of(x) : 1);
      }
    });
    if (!descend(m, weigh)) return -INFINITY;
  } while (!m.search.done());
  return float_of_key(m.search.threshold());
}

// Finds the threshold where the lists do not give it.
template <class Scores>
__device__ __forceinline__ float threshold(const Slice& slice, const Scores& scores,
                                           ThresholdMemory& m, const Cut& cut) {
  float cutoff = -INFINITY;
#pragma unroll 1
  for (int nucleus = 0; nucleus < 2; ++nucleus) {
    if (nucleus ? cut.top_p >= 1 : cut.top_k == 0) continue;
    const double target = nucleus ? cut.top_p : static_cast<double>(cut.top_k);
    cutoff = fmaxf(cutoff, radix_threshold(slice, scores, m, nucleus, cutoff, target));
  }
  return fmaxf(cutoff, m.least);
}

}  // namespace cuda
}  // namespace crossfade
