// Blends and samples rows on CPUs. Compiled once for each instruction set; dispatch.cpp chooses.
//
// A row is worked on by a team of threads. Where there are enough rows a team is one thread, else
// it is all threads, each with a slice of the vocabulary. A row goes through three phases, between
// which its scores stay in the cache:
//   1. read the inputs once, for the scores, their maximum and the sum of their exponentials
//   2. find the truncation threshold
//   3. Gumbel-max over the tokens that are left
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <new>
#include <vector>

#include "gumbel.h"
#include "row_blend.h"

namespace crossfade {
inline namespace CF_ISA {

namespace {

constexpr int64_t kTokensPerThread = 8192;  // fewer are not worth another thread

// What each member of a team found in its slice, on cache lines of its own.
struct alignas(64) Share {
  LogSum blend;
  LogSum term[kMaxTerms];
  double mass;
  Best best;
};

struct Team {
  int rank, size;
  Share* shares;         // [size]
  Workspace* workspace;  // shared by the team
  float* threshold;      // shared by the team

  void sync() const {
    if (size > 1) {
#pragma omp barrier
    }
  }
  Share& mine() const { return shares[rank]; }
  int64_t begin(int64_t groups) const { return groups * rank / size; }
  int64_t end(int64_t groups) const { return groups * (rank + 1) / size; }

  template <class Get>
  LogSum merged(Get get) const {
    LogSum all = get(shares[0]);
    for (int i = 1; i < size; ++i) all.merge(get(shares[i]));
    return all;
  }
};

int64_t groups_of(int64_t vocab) { return (vocab + kBlock - 1) / kBlock; }

// Reads a group of one input's numbers as they are; those past the vocabulary are -inf.
void read_group(const Stream& x, int64_t first, int64_t vocab, F32* out) {
  if (first + kBlock <= vocab) return x.group(first, out);
  PaddedGroup copy;
  const int64_t tokens = vocab - first;
  copy.of(x, first, tokens).group(0, out);
  alignas(64) float numbers[kBlock];
  std::memcpy(numbers, out, sizeof numbers);
  std::fill(numbers + tokens, numbers + kBlock, -kInf);
  std::memcpy(out, numbers, sizeof numbers);
}

// Adds a group of logits to their log-sum-exp. NaN or +inf among them marks the sum as broken.
float add_logits(LogSum& sum, const F32* z) {
  I32 odd = {};
  for (int v = 0; v < kVectors; ++v) odd |= ~(z[v] < kInf);
  if (any(odd)) {
    sum.broken = true;
    return -kInf;
  }
  return sum.add(z);
}

// The sum of exp((s - max) * inv_t) over those tokens of a slice that score `least` or more.
double mass_of(const RowScores& row, float least, float inv_t, int64_t begin, int64_t end) {
  const float negligible = row.max - 40.0f / inv_t;
  double total = 0;
  for (int64_t g = begin; g < end; ++g) {
    if (row.group_max[g] < least || row.group_max[g] < negligible) continue;
    F32 sum = {};
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) {
      const F32 s = load(row.scores + g * kBlock + v * kLanes);
      sum += s >= least ? exp((s - row.max) * inv_t) : F32{};
    }
    total += sum_of(sum);
  }
  return total;
}

// The sum of exp((s - max) * inv_t) over the row, by the whole team. Unlike LogSum's total it does
// not depend on the team's size: a token at the edge of the nucleus must not either.
double team_mass(const RowScores& row, float inv_t, int64_t begin, int64_t end, const Team& team) {
  team.mine().mass = mass_of(row, -kInf, inv_t, begin, end);
  team.sync();
  double mass = 0;
  for (int i = 0; i < team.size; ++i) mass += team.shares[i].mass;
  return mass;
}

// Reads a row, as one member of its team: first the normalisers and the support, where they are
// needed, then the scores.
class RowReader {
 public:
  RowReader(const Blend& blend, int64_t row, const Team& team)
      : blend_(blend),
        row_(row),
        team_(team),
        groups_(groups_of(blend.vocab)),
        begin_(team.begin(groups_)),
        end_(team.end(groups_)),
        row_blend_(blend, row) {}

  // Phase 1. Returns false if the row is bad. With `terms` each term's own log-sum-exp is summed
  // too.
  bool read(bool terms) {
    if (row_blend_.power != 0) normalise_means();
    if (row_blend_.has_support) find_support();
    Workspace& w = *team_.workspace;
    Share& mine = team_.mine();
    mine.blend = LogSum();
    Stream own[kMaxTerms];
    for (int k = 0; terms && k < blend_.terms; ++k) {
      mine.term[k] = LogSum();
      own[k] = stream_of(blend_.term[k], row_, 1);
    }
    mine.blend.broken = row_blend_.bad;
    for (int64_t g = begin_; g < end_; ++g) {
      F32 s[kVectors];
      mine.blend.broken |= !row_blend_.scores(g * kBlock, s);
      w.group_max[g] = mine.blend.add(s);
      for (int v = 0; v < kVectors; ++v) store(w.scores + g * kBlock + v * kLanes, s[v]);
      for (int k = 0; terms && k < blend_.terms; ++k) {
        F32 z[kVectors];
        read_group(own[k], g * kBlock, blend_.vocab, z);
        add_logits(mine.term[k], z);
      }
    }
    mine.blend.flush();
    for (int k = 0; terms && k < blend_.terms; ++k) mine.term[k].flush();
    team_.sync();
    sum_ = team_.merged([](const Share& s) { return s.blend; });
    return sum_.finite();
  }

  RowScores scores() const {
    const Workspace& w = *team_.workspace;
    return {w.scores, w.group_max, groups_, blend_.vocab, sum_.max};
  }
  const LogSum& sum() const { return sum_; }
  int64_t begin() const { return begin_; }
  int64_t end() const { return end_; }

  // Calls find() on the team's first member and gives its result to all.
  template <class Find>
  float agree(Find find) const {
    if (team_.rank == 0) *team_.threshold = find();
    team_.sync();
    return *team_.threshold;
  }

 private:
  void normalise_means() {
    for (int k = 0; k < row_blend_.means; ++k) {
      LogSum& z = team_.mine().term[k] = LogSum();
      for (int64_t g = begin_; g < end_; ++g) {
        F32 x[kVectors];
        read_group(row_blend_.mean[k], g * kBlock, blend_.vocab, x);
        add_logits(z, x);
      }
      z.flush();
    }
    team_.sync();
    for (int k = 0; k < row_blend_.means; ++k)
      row_blend_.normalise(k, team_.merged([k](const Share& s) { return s.term[k]; }));
    team_.sync();
  }

  void find_support() {
    Workspace& w = *team_.workspace;
    LogSum& z = team_.mine().blend = LogSum();
    for (int64_t g = begin_; g < end_; ++g) {
      F32 x[kVectors];
      read_group(row_blend_.support, g * kBlock, blend_.vocab, x);
      w.group_max[g] = add_logits(z, x);
      for (int v = 0; v < kVectors; ++v) store(w.scores + g * kBlock + v * kLanes, x[v]);
    }
    z.flush();
    team_.sync();
    const LogSum all = team_.merged([](const Share& s) { return s.blend; });
    const Truncation cut{blend_.support.top_k, blend_.support.top_p, blend_.support.min_p};
    const RowScores term{w.scores, w.group_max, groups_, blend_.vocab, all.max};
    const double mass =
        cut.needs_mass(blend_.vocab) ? team_mass(term, 1.0f, begin_, end_, team_) : 0;
    row_blend_.support_threshold = agree([&] {
      // A support that is no distribution leaves no token, as no score is at least NaN.
      return all.finite() ? threshold(term, cut, 1.0f, mass, w) : __builtin_nanf("");
    });
    team_.sync();
  }

  const Blend& blend_;
  const int64_t row_;
  const Team& team_;
  const int64_t groups_, begin_, end_;
  RowBlend row_blend_;
  LogSum sum_;
};

void write_bad(const Sampling& out, int64_t row, int terms) {
  const float nan = __builtin_nanf("");
  out.tokens[row] = -1;
  out.logprobs[row] = out.sampled_logprobs[row] = nan;
  if (out.term_logprobs) std::fill_n(out.term_logprobs + row * terms, terms, nan);
}

void sample_row(const Blend& blend, const Sampling& out, int64_t row, const Team& team) {
  const RowSampling settings(out, row);
  RowReader reader(blend, row, team);
  const bool good = reader.read(out.term_logprobs) && !settings.bad;
  if (!good) {
    if (team.rank == 0) write_bad(out, row, blend.terms);
    return team.sync();
  }

  const RowScores scores = reader.scores();
  const LogSum& sum = reader.sum();
  Share& mine = team.mine();
  if (!settings.greedy) {
    float least = -kInf;
    const double mass = settings.cut.needs_mass(blend.vocab)
                            ? team_mass(scores, settings.inv_t, reader.begin(), reader.end(), team)
                            : 0;
    if (settings.cut.any())
      least = reader.agree(
          [&] { return threshold(scores, settings.cut, settings.inv_t, mass, *team.workspace); });
    mine.mass = least == -kInf && settings.inv_t == 1
                    ? mine.blend.total * std::exp(mine.blend.max - sum.max)  // summed up already
                    : mass_of(scores, least, settings.inv_t, reader.begin(), reader.end());
    mine.best = gumbel_max(scores, settings, least, reader.begin(), reader.end());
  } else {
    mine.best = first_of_the_best(scores, reader.begin(), reader.end());
  }
  team.sync();

  if (team.rank == 0) {
    Best best;
    double mass = 0;
    for (int i = 0; i < team.size; ++i) {
      if (team.shares[i].best.token >= 0)
        best.offer(team.shares[i].best.score, team.shares[i].best.token);
      mass += team.shares[i].mass;
    }
    const float above_max = scores.scores[best.token] - scores.max;
    out.tokens[row] = best.token;
    out.logprobs[row] = above_max - sum.log_total();
    out.sampled_logprobs[row] =
        settings.greedy ? 0.0f : above_max * settings.inv_t - static_cast<float>(std::log(mass));
    for (int k = 0; out.term_logprobs && k < blend.terms; ++k) {
      const LogSum z = team.merged([k](const Share& s) { return s.term[k]; });
      const float own = stream_of(blend.term[k], row, 1).number(best.token);
      out.term_logprobs[row * blend.terms + k] =
          z.finite() ? (own - z.max) - z.log_total() : __builtin_nanf("");
    }
  }
  team.sync();
}

void blend_row(const Blend& blend, float* out, int64_t row, const Team& team) {
  RowReader reader(blend, row, team);
  const bool good = reader.read(false);
  const RowScores scores = reader.scores();
  const float max = scores.max, log_total = reader.sum().log_total();
  const int64_t end = std::min(reader.end() * kBlock, blend.vocab);
  float* to = out + row * blend.vocab;
  for (int64_t v = reader.begin() * kBlock; v < end; ++v)
    to[v] = good ? (scores.scores[v] - max) - log_total : __builtin_nanf("");
  team.sync();
}

Workspace& own_workspace() {
  static thread_local Workspace own;
  return own;
}

// Calls work(row, team) for all rows. As many rows as the threads divide evenly get a thread each;
// the rest are done one by one, by all threads.
template <class Work>
void for_rows(const Blend& blend, int threads, Work work) {
  const int64_t most = std::max<int64_t>(1, blend.rows * blend.vocab / kTokensPerThread);
  threads = static_cast<int>(std::min<int64_t>(std::max(threads, 1), most));
  const int64_t whole = blend.rows / threads * threads;
  std::vector<Share> shares(threads);
  float threshold;
  Workspace* first = nullptr;
  bool out_of_memory = false;  // no exception may leave a parallel region
#pragma omp parallel num_threads(threads)
  {
    Workspace& own = own_workspace();
    if (!own.reserve(blend.vocab)) {
#pragma omp atomic write
      out_of_memory = true;
    }
    const int rank = omp_get_thread_num();
    if (rank == 0) first = &own;
#pragma omp barrier
    if (!out_of_memory) {
      float own_threshold;
      const Team alone{0, 1, &shares[rank], &own, &own_threshold};
#pragma omp for schedule(static)
      for (int64_t row = 0; row < whole; ++row) work(row, alone);
      const Team all{rank, omp_get_num_threads(), shares.data(), first, &threshold};
      for (int64_t row = whole; row < blend.rows; ++row) work(row, all);
    }
  }
  if (out_of_memory) throw std::bad_alloc();
}

}  // namespace

void blend_rows(const Blend& blend, float* out, int threads) {
  for_rows(blend, threads,
           [&](int64_t row, const Team& team) { blend_row(blend, out, row, team); });
}

void blend_sample_rows(const Blend& blend, const Sampling& sampling, int threads) {
  for_rows(blend, threads,
           [&](int64_t row, const Team& team) { sample_row(blend, sampling, row, team); });
}

}  // namespace CF_ISA
}  // namespace crossfade
