// Blends and samples rows on CPUs. Compiled once for each instruction set; dispatch.cpp chooses.
//
// A row is worked on by a team of threads. Where there are enough rows a team is one thread, else
// it is all threads, each with a slice of the row's groups of 256 tokens:
//   1. The inputs are read once. Each group leaves its largest score and its sum of exponentials.
//   2. With truncation the scores are stored, and the threshold is found: see threshold.h. Else no
//      score is stored.
//   3. One thread draws a group by the masses, then a token among the group's scores, which are
//      made again where they were not stored.
//   4. Where its pushes are asked for, all read the inputs once more: see pushes.h.
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <new>
#include <vector>

#include "draw.h"
#include "pushes.h"
#include "row_blend.h"

namespace crossfade {
inline namespace CF_ISA {

namespace {

constexpr int64_t kTokensPerThread = 8192;  // fewer are not worth another thread

// What a team shares. Each member reads and gathers a slice of the row's groups.
struct Team {
  int rank, size;
  Workspace* workspace;
  Range* range;
  float* threshold;
  Found* found;  // [size]

  void sync() const {
    if (size > 1) {
#pragma omp barrier
    }
  }
  int64_t begin(int64_t groups, int of) const { return groups * of / size; }
  int64_t begin(int64_t groups) const { return begin(groups, rank); }
  int64_t end(int64_t groups) const { return begin(groups, rank + 1); }

  // Calls find() on the first member and gives its result to all.
  template <class T, class Find>
  T agree(T* shared, Find find) const {
    if (rank == 0) *shared = find();
    sync();
    return *shared;
  }
};

// What a row's reading needs besides the scores' sums.
struct Reading {
  bool terms;   // the sums of each term
  bool scores;  // the scores, to be stored
  float inv_t;  // if it is not 1: the sums at this temperature
};

// Writes a group's largest number and its sum, which is NaN if the group is spoilt.
void sum_group(const float* numbers, float top, bool good, float* max, float* sum) {
  *max = top;
  *sum = good ? group_sum(numbers, top, 1) : __builtin_nanf("");
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
        w_(*team.workspace),
        row_blend_(blend, row) {}

  // Returns false if the row is bad.
  bool read(const Reading& wanted) {
    if (row_blend_.terms > 0 && !row_blend_.bad) normalise_terms();
    if (row_blend_.bad) return false;
    if (row_blend_.has_support) find_support();
    if (row_blend_.bad) return false;
    if (team_.rank == 0) pad();
    stored_ = wanted.scores;
    alignas(64) float unstored[2][kGroup];
    const auto at = [&](int64_t j) {
      return wanted.scores ? w_.scores + j * kGroup : unstored[j % 2];
    };
    // The exponentials of a group follow the next group's scores: else they would wait for the
    // maximum, and the processor with them.
    const auto sum = [&](int64_t j) {
      w_.group_sum[j] = group_sum(at(j), w_.group_max[j], 1);
      if (wanted.inv_t != 1) w_.group_tempered[j] = group_sum(at(j), w_.group_max[j], wanted.inv_t);
    };
    bool spoilt = false;
    for (int64_t j = begin_; j < end_; ++j) {
      F32 largest;
      spoilt |= !row_blend_.scores(j, at(j), largest);
      w_.group_max[j] = max_of(largest);
      if (wanted.scores) store(w_.lane_max + j * kLanes, largest);
      if (j > begin_) sum(j - 1);
      if (wanted.terms)
        for (int k = 0; k < blend_.terms; ++k)
          sum_numbers(stream_of(blend_.term[k], row_, 1), j, term_max(k), term_sum(k));
    }
    if (begin_ < end_) sum(end_ - 1);
    if (spoilt) w_.group_sum[begin_] = __builtin_nanf("");
    team_.sync();
    sum_ = log_sum(w_.group_max, w_.group_sum, groups_);
    return sum_.finite();
  }

  // The row at a temperature.
  Row at(float inv_t) const {
    const float* sums = inv_t == 1 ? w_.group_sum : w_.group_tempered;
    const double mass = inv_t == 1 ? sum_.total : log_sum(w_.group_max, sums, groups_, inv_t).total;
    return {blend_.vocab, groups_, sum_.max, inv_t, mass, sums};
  }

  // Finds where a row is cut. All members get the threshold.
  float cut(const Row& row, const Truncation& cut) const {
    for (bool sampled = true;; sampled = false) {
      const Range range = team_.agree(team_.range, [&] {
        all_masses(row, w_);
        return range_of(row, cut, sampled, w_);
      });
      alignas(64) float made[kGroup];
      pack(range, begin_, end_, w_, [&](int64_t j) { return scores(j, made); });
      team_.found[team_.rank] = weigh(row, range, begin_, end_, w_);
      team_.sync();
      double sure = 0, near = 0;
      for (int i = 0; i < team_.size; ++i) {
        sure += team_.found[i].sure;
        near += team_.found[i].near_mass;
      }
      if (!sampled || holds(row, cut, range, sure, near)) break;
      team_.sync();
    }
    return team_.agree(team_.threshold, [&] {
      const auto begin = [&](int i) { return team_.begin(groups_, i); };
      return settle(row, cut, together(team_.found, team_.size, begin, w_), w_);
    });
  }

  // Leaves the mass of each group that stays, and returns its sum, whatever the team's size.
  double keep(float threshold) const {
    CF_ISA::keep(threshold, begin_, end_, w_);
    team_.sync();
    double all = 0;
    for (int64_t j = 0; j < groups_; j += kLanes) all += total_of(load(w_.group_mass + j));
    return all;
  }

  // The scores of group j: as they are stored, or made again.
  const float* scores(int64_t j, float* made) const {
    if (stored_) return w_.scores + j * kGroup;
    F32 largest;
    row_blend_.scores(j, made, largest);
    return made;
  }

  // Writes the pushes of a token that all members know.
  void push(int64_t token, float* out) const {
    Departure from[2 * kMaxTerms];
    int count = 0;
    for (int k = 1; k < blend_.terms; ++k)
      if (weight_of(blend_.weight, row_, k) != 0)
        from[count++] = Departure::of_term(blend_, row_, k, token);
    for (int m = 0; m < blend_.values; ++m)
      if (weight_of(blend_.value_weight, row_, m) != 0)
        from[count++] = Departure::of_value(blend_, row_, m, token);
    const auto sums = [&](int n) { return w_.push_sum + n * w_.groups; };

    alignas(64) float made[kGroup], e[kGroup];
    for (int64_t j = begin_; j < end_; ++j) {
      const bool counts = w_.group_max[j] - sum_.max > kLeastLog;
      if (counts) exponentials(scores(j, made), w_.group_max[j], e);
      for (int n = 0; n < count; ++n) sums(n)[j] = counts ? from[n].sum(j, blend_.vocab, e) : 0;
    }
    team_.sync();
    if (team_.rank != 0) return;
    std::fill_n(out, blend_.terms + blend_.values, 0.0f);
    for (int n = 0; n < count; ++n) {
      for (int64_t j = groups_; j % kLanes != 0; ++j) sums(n)[j] = 0;
      const double mean = log_sum(w_.group_max, sums(n), groups_).total / sum_.total;
      out[from[n].column] =
          std::isfinite(mean) ? static_cast<float>(from[n].of.weight * mean) : __builtin_nanf("");
    }
  }

  // Whether the row is not bad, but no token is left.
  bool empty() const { return !row_blend_.bad && sum_.empty(); }

  LogSum term_sum_of(int k) const { return log_sum(term_max(k), term_sum(k), groups_); }
  const LogSum& sum() const { return sum_; }
  int64_t groups() const { return groups_; }
  int64_t begin() const { return begin_; }
  int64_t end() const { return end_; }

 private:
  float* term_max(int k) const { return w_.term_max + k * w_.groups; }
  float* term_sum(int k) const { return w_.term_sum + k * w_.groups; }

  void sum_numbers(const Stream& x, int64_t j, float* max, float* sum) const {
    alignas(64) float z[kGroup];
    const bool good = read_group(x, j, blend_.vocab, z);
    sum_group(z, max_of(lane_max(z)), good, max + j, sum + j);
  }

  // Fills the arrays of groups up to whole vectors.
  void pad() const {
    for (int64_t j = groups_; j % kLanes != 0; ++j) {
      w_.group_max[j] = -kInf;
      w_.group_sum[j] = w_.group_tempered[j] = w_.group_mass[j] = 0;
      for (int k = 0; k < blend_.terms; ++k) {
        term_max(k)[j] = -kInf;
        term_sum(k)[j] = 0;
      }
    }
  }

  void normalise_terms() {
    if (row_blend_.log_z) return row_blend_.normalise();
    if (team_.rank == 0) pad();
    for (int k = 0; k < row_blend_.terms; ++k)
      for (int64_t j = begin_; j < end_; ++j)
        sum_numbers(row_blend_.term[k], j, term_max(k), term_sum(k));
    team_.sync();
    for (int k = 0; k < row_blend_.terms; ++k) row_blend_.normalise(k, term_sum_of(k));
    team_.sync();
  }

  void find_support() {
    if (team_.rank == 0) pad();
    stored_ = true;
    for (int64_t j = begin_; j < end_; ++j) {
      float* const z = w_.scores + j * kGroup;
      const bool good = read_group(row_blend_.support, j, blend_.vocab, z);
      const F32 largest = lane_max(z);
      store(w_.lane_max + j * kLanes, largest);
      sum_group(z, max_of(largest), good, w_.group_max + j, w_.group_sum + j);
    }
    team_.sync();
    sum_ = log_sum(w_.group_max, w_.group_sum, groups_);
    row_blend_.bad = !sum_.finite();  // what is no distribution leaves no token
    const Truncation support{blend_.support.top_k, blend_.support.top_p, blend_.support.min_p};
    if (!row_blend_.bad && support.any()) row_blend_.support_threshold = cut(at(1), support);
    team_.sync();
  }

  const Blend& blend_;
  const int64_t row_;
  const Team& team_;
  const int64_t groups_, begin_, end_;
  Workspace& w_;
  RowBlend row_blend_;
  bool stored_ = false;
  LogSum sum_;
};

// Of a row from which nothing is drawn: it is bad, or else, as a shard may be, empty.
void write_none(const Sampling& out, int64_t row, int terms, int values, bool empty) {
  const float nan = __builtin_nanf("");
  out.tokens[row] = -1;
  if (out.shard) {
    const float none = empty ? -kInf : nan, noise = empty ? 0 : nan;
    out.shard[row] = {none, none, none, none, noise, none, noise};
    return;
  }
  out.logprobs[row] = out.sampled_logprobs[row] = nan;
  if (out.term_logprobs) std::fill_n(out.term_logprobs + row * terms, terms, nan);
  const int both = terms + values;
  if (out.pushes) std::fill_n(out.pushes + row * both, both, nan);
}

void sample_row(const Blend& blend, const Sampling& out, int64_t row, const Team& team) {
  const RowSampling own(out, row);
  RowReader reader(blend, row, team);
  Workspace& w = *team.workspace;
  const bool cuts = own.cut.any();
  const bool stores = cuts && !own.cut.few(blend.vocab);
  if (!reader.read({out.term_logprobs != nullptr, stores, own.inv_t}) || own.bad) {
    if (team.rank == 0) write_none(out, row, blend.terms, blend.values, reader.empty() && !own.bad);
    return;
  }
  const LogSum& sum = reader.sum();
  const Row at_t = reader.at(own.inv_t);
  const float threshold = cuts ? reader.cut(at_t, own.cut) : -kInf;
  const double mass = cuts ? reader.keep(threshold) : at_t.mass;

  if (team.rank == 0) {
    if (!cuts) all_masses(at_t, w);
    const Drawn group = own.greedy ? first_of_the_best(w.group_max, reader.groups())
                                   : draw_group(own, w.group_mass, reader.groups(), w.words);
    alignas(64) float made[kGroup];
    const float* const s = reader.scores(group.index, made);
    const Drawn nth = own.greedy ? first_of_the_best(s, kGroup)
                                 : draw_token(own, s, group.index, sum.max, threshold, w.words);
    const int64_t token = group.index * kGroup + nth.index;
    const float below = s[nth.index] - sum.max, log_mass = static_cast<float>(std::log(mass));
    out.tokens[row] = out.first_token + token;
    if (out.shard) {
      const float of_group = own.greedy ? below : std::log(w.group_mass[group.index]);
      out.shard[row] = {sum.max,     sum.log_total(), log_mass, of_group,
                        group.noise, below,           nth.noise};
      return;
    }
    out.logprobs[row] = below - sum.log_total();
    out.sampled_logprobs[row] = own.greedy ? 0.0f : below * own.inv_t - log_mass;
    for (int k = 0; out.term_logprobs && k < blend.terms; ++k) {
      const LogSum z = reader.term_sum_of(k);
      const float own_logit = stream_of(blend.term[k], row, 1).number(token);
      out.term_logprobs[row * blend.terms + k] =
          z.finite() ? (own_logit - z.max) - z.log_total() : __builtin_nanf("");
    }
  }
  if (out.pushes) {
    team.sync();  // then all know the token
    reader.push(out.tokens[row], out.pushes + row * (blend.terms + blend.values));
  }
}

void blend_row(const Blend& blend, float* out, bool raw, int64_t row, const Team& team) {
  RowReader reader(blend, row, team);
  const bool good = reader.read({false, true, 1}) || (raw && reader.empty());
  const float max = raw ? 0 : reader.sum().max;
  const float log_total = good && !raw ? reader.sum().log_total() : 0;
  const int64_t end = std::min(reader.end() * kGroup, blend.vocab);
  const float* scores = team.workspace->scores;
  float* to = out + row * blend.vocab;
  for (int64_t v = reader.begin() * kGroup; v < end; ++v)
    to[v] = good ? (scores[v] - max) - log_total : __builtin_nanf("");
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
  std::vector<Found> found(threads);
  Range range;
  float threshold;
  Workspace& first = own_workspace();
  bool out_of_memory = !first.reserve(blend.vocab);  // no exception may leave a parallel region
#pragma omp parallel num_threads(threads)
  {
    const int rank = omp_get_thread_num();
    if (whole > 0) {
      Range own_range;
      float own_threshold;
      Found own_found;
      Workspace& own = own_workspace();
      const Team alone{0, 1, &own, &own_range, &own_threshold, &own_found};
      const bool enough = own.reserve(blend.vocab);
      if (!enough) {
#pragma omp atomic write
        out_of_memory = true;
      }
#pragma omp for schedule(static) nowait
      for (int64_t row = 0; row < whole; ++row)
        if (enough) work(row, alone);
    }
    const Team all{rank, omp_get_num_threads(), &first, &range, &threshold, found.data()};
    if (whole > 0 && whole < blend.rows) all.sync();  // all know now whether memory ran out
    for (int64_t row = whole; row < blend.rows && !out_of_memory; ++row) {
      if (row > whole) all.sync();  // until then the memory that the team shares is in use
      work(row, all);
    }
  }
  if (out_of_memory) throw std::bad_alloc();
}

}  // namespace

void blend_rows(const Blend& blend, float* out, bool raw, int threads) {
  for_rows(blend, threads,
           [&](int64_t row, const Team& team) { blend_row(blend, out, raw, row, team); });
}

void blend_sample_rows(const Blend& blend, const Sampling& sampling, int threads) {
  for_rows(blend, threads,
           [&](int64_t row, const Team& team) { sample_row(blend, sampling, row, team); });
}

}  // namespace CF_ISA
}  // namespace crossfade
