// Appends to key and value caches and attends to them. Compiled once for each instruction set;
// dispatch.cpp chooses.
//
// An item of work is a kv head of a row, a tile of its new tokens and a split of its slots. The
// query heads that share the kv head are taken together, so an item reads its keys and values once.
// It walks through its slots in chunks with an online softmax and leaves a partial result; whoever
// finishes a tile's last split puts its partials together, in the order of the slots. Chunks and
// splits lie at fixed slots, and an item sees nothing but its own row: a result depends on neither
// the batch, the capacity nor the threads.
#include <omp.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "vectors.h"

namespace crossfade {
inline namespace CF_ISA {

namespace {

constexpr int64_t kChunk = 128;        // slots from one step of the online softmax to the next
constexpr int64_t kTileRows = 96;      // query rows of a tile: tokens times heads of a group
constexpr int64_t kDotRows = 8;        // scores of more query rows come from a matrix product
constexpr int64_t kRowsPerSplit = 16;  // query rows for which a split has one more chunk
constexpr int64_t kWorkPerThread = 1 << 17;  // products that are worth another thread

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t padded(int64_t size) { return ceil_div(size, kLanes) * kLanes; }

// Slots [begin, end).
struct Range {
  int64_t begin, end;
};

// A partial result of a query row: the weighted sum of the values [value_size, padded], and behind
// it these two numbers.
struct Stats {
  float max, total;
};

template <class T>
class Attend {
 public:
  explicit Attend(const Attention& a)
      : a_(a),
        group_(a.heads / a.kv_heads),
        tile_(std::max<int64_t>(1, std::min(a.tokens, kTileRows / group_))),
        tiles_(ceil_div(a.tokens, tile_)),
        rows_(tile_ * group_),
        size_(padded(a.size)),
        value_size_(padded(a.value_size)),
        split_(tiles_ == 1 ? kChunk * ceil_div(rows_, kRowsPerSplit) : INT64_MAX) {}

  void run(int threads) {
    int64_t work = 0;
    for (int64_t b = 0; b < a_.rows; ++b) {
      const Range r = splits_of(b, 0), last = slots_of(b, tiles_ - 1);
      splits_ = std::max(splits_, r.end - r.begin);
      work += (last.end - (tiles_ == 1 ? slots_of(b, 0).begin : 0)) * a_.tokens * a_.heads;
    }
    work *= size_ + value_size_;
    const int64_t teams = a_.rows * a_.kv_heads * tiles_, items = teams * splits_;
    threads = static_cast<int>(
        std::max<int64_t>(1, std::min<int64_t>({threads, items, work / kWorkPerThread})));

    // Nothing is allocated here, as no exception may leave a parallel region.
    const int64_t own = rows_ * (size_ + kChunk) + (rows_ > kDotRows ? size_ * kChunk : 0);
    const int64_t partials = (splits_ > 1 ? items : threads) * partial_size();
    static thread_local std::vector<float> memory;
    static thread_local std::vector<int32_t> left;
    memory.resize(std::max<size_t>(memory.size(), partials + threads * own + kLanes));
    float* aligned = memory.data();
    while (reinterpret_cast<uintptr_t>(aligned) % (kLanes * 4)) ++aligned;
    partials_ = aligned;
    scratch_ = aligned + partials;
    scratch_size_ = own;
    if (splits_ > 1) left.resize(std::max<size_t>(left.size(), teams));
    for (int64_t i = 0; splits_ > 1 && i < teams; ++i) {
      const Range r = splits_of(i / (a_.kv_heads * tiles_), 0);
      left[i] = static_cast<int32_t>(r.end - r.begin);
    }
    left_ = left.data();

    if (threads == 1) {
      for (int64_t i = 0; tiles_ > 1 && i < a_.rows * a_.kv_heads; ++i) append_all(i);
      for (int64_t i = 0; i < items; ++i) item(i, 0);
      return;
    }
#pragma omp parallel num_threads(threads)
    {
      if (tiles_ > 1) {
#pragma omp for schedule(static)
        for (int64_t i = 0; i < a_.rows * a_.kv_heads; ++i) append_all(i);
      }
#pragma omp for schedule(dynamic)
      for (int64_t i = 0; i < items; ++i) item(i, omp_get_thread_num());
    }
  }

 private:
  static T* at(const Heads& x, int64_t row, int64_t head, int64_t token) {
    return static_cast<T*>(x.data) + row * x.row_stride + head * x.head_stride +
           token * x.token_stride;
  }
  // A row whose length has passed its capacity sees and writes nothing.
  int64_t length_of(int64_t b) const { return std::min(a_.lengths[b], a_.capacity); }
  int64_t cache_row(int64_t b) const { return a_.cache_row ? a_.cache_row[b] : b; }
  int64_t partial_size() const { return rows_ * (value_size_ + kLanes); }

  // The slots that a token sees, of a cache that held `length` tokens before the new ones.
  Range slots_of_token(int64_t length, int64_t token) const {
    const int64_t end = length + token + 1;
    return {a_.window > 0 ? std::max<int64_t>(0, end - a_.window) : 0, std::min(end, a_.capacity)};
  }
  // The slots that at least one token of a tile sees.
  Range slots_of(int64_t b, int64_t tile) const {
    const int64_t length = length_of(b), first = tile * tile_;
    const int64_t last = std::min(first + tile_, a_.tokens) - 1;
    return {slots_of_token(length, first).begin, slots_of_token(length, last).end};
  }
  // At least 1: a row that is past the capacity has one split too, which sees nothing.
  Range splits_of(int64_t b, int64_t tile) const {
    if (tiles_ > 1) return {0, 1};
    const Range s = slots_of(b, tile);
    const int64_t last = (s.end - 1) / split_;
    return {std::min(s.begin / split_, last), last + 1};
  }

  // Writes the keys and values of those new tokens of a row whose places are within `slots`.
  void append(int64_t b, int64_t head, Range slots) const {
    const int64_t row = cache_row(b), length = length_of(b);
    const int64_t begin = std::max(length, slots.begin);
    const int64_t end = std::min({length + a_.tokens, slots.end, a_.capacity});
    for (int64_t s = begin; s < end; ++s) {
      std::copy_n(at(a_.key, b, head, s - length), a_.size, at(a_.keys, row, head, s));
      std::copy_n(at(a_.value, b, head, s - length), a_.value_size, at(a_.values, row, head, s));
    }
  }
  void append_all(int64_t i) const { append(i / a_.kv_heads, i % a_.kv_heads, {0, a_.capacity}); }

  void item(int64_t i, int thread) const {
    const int64_t nth = i % splits_, team = i / splits_;
    const int64_t tile = tiles_ - 1 - team % tiles_;  // the last tiles take longest: first
    const int64_t head = team / tiles_ % a_.kv_heads, b = team / tiles_ / a_.kv_heads;
    const Range splits = splits_of(b, tile);
    if (nth >= splits.end - splits.begin) return;
    Range slots = slots_of(b, tile);
    if (tiles_ == 1) {
      const int64_t split = splits.begin + nth;
      const Range all = {split * split_, (split + 1) * split_};
      append(b, head, all);
      slots = {std::max(slots.begin, all.begin), std::min(slots.end, all.end)};
    }
    float* partial = partials_ + (splits_ > 1 ? i : thread) * partial_size();
    attend(b, head, tile, slots, partial, scratch_ + thread * scratch_size_);
    if (splits_ == 1)
      finish(b, head, tile, partial, 1);
    else if (__atomic_sub_fetch(&left_[team], 1, __ATOMIC_ACQ_REL) == 0)
      finish(b, head, tile, partials_ + team * splits_ * partial_size(), splits.end - splits.begin);
  }

  // The partial result of a tile's query rows over `slots`.
  void attend(int64_t b, int64_t head, int64_t tile, Range slots, float* partial,
              float* scratch) const {
    const int64_t first = tile * tile_, tokens = std::min(tile_, a_.tokens - first);
    const int64_t rows = tokens * group_, length = length_of(b), row = cache_row(b);
    float *query = scratch, *scores = query + rows_ * size_, *transposed = scores + rows_ * kChunk;
    for (int64_t r = 0; r < rows; ++r) {
      const T* from = at(a_.query, b, head * group_ + r % group_, first + r / group_);
      for (int64_t d = 0; d < size_; d += kLanes)
        store(query + r * size_ + d, load_up_to(from + d, a_.size - d) * a_.scale);
      Stats* stats = stats_of(partial, r);
      *stats = {kLowest, 0};
      std::fill_n(values_of(partial, r), value_size_, 0.0f);
    }
    for (int64_t begin = slots.begin; begin < slots.end;) {
      const int64_t end = std::min(slots.end, (begin / kChunk + 1) * kChunk), count = end - begin;
      const Strided<T> keys{at(a_.keys, row, head, begin), a_.keys.token_stride};
      const Strided<T> values{at(a_.values, row, head, begin), a_.values.token_stride};
      if (rows_ <= kDotRows) {
        dots(query, size_, rows, keys, count, a_.size, scores, kChunk);
      } else {
        transpose(keys, count, a_.size, transposed, kChunk);
        product({query, size_}, rows, Strided<float>{transposed, kChunk}, a_.size, padded(count),
                scores, kChunk, false);
      }
      for (int64_t r = 0; r < rows; ++r) {
        const Range seen = slots_of_token(length, first + r / group_);
        softmax(scores + r * kChunk, count, seen.begin - begin, std::min(seen.end - begin, count),
                partial, r);
      }
      product({scores, kChunk}, rows, values, count, a_.value_size, partial, value_size_ + kLanes,
              true);
      begin = end;
    }
  }

  float* values_of(float* partial, int64_t r) const { return partial + r * (value_size_ + kLanes); }
  Stats* stats_of(float* partial, int64_t r) const {
    return reinterpret_cast<Stats*>(values_of(partial, r) + value_size_);
  }

  // Turns a chunk's scores into weights, exp(score - the row's maximum so far). They are 0 outside
  // [begin, end).
  void softmax(float* scores, int64_t count, int64_t begin, int64_t end, float* partial,
               int64_t r) const {
    Stats& stats = *stats_of(partial, r);
    F32 top = splat(stats.max);
    I32 odd = {};
    for (int64_t s = 0; s < count; s += kLanes) {
      F32 x = load(scores + s);
      if (a_.softcap > 0) x = soft_capped(x, a_.softcap);
      const I32 seen = inside(s, begin, end);
      odd |= seen & ~(x < kInf);
      x = seen ? x : splat(kLowest);
      store(scores + s, x);
      top = max(x, top);
    }
    const float new_max = max_of(top);
    if (new_max > stats.max) {
      const float shrink = exp(splat(stats.max - new_max))[0];
      float* values = values_of(partial, r);
      for (int64_t d = 0; d < value_size_; d += kLanes)
        store(values + d, load(values + d) * shrink);
      stats.max = new_max;
      stats.total *= shrink;
    }
    F32 total = {};
    for (int64_t s = 0; s < count; s += kLanes) {
      const F32 p = inside(s, begin, end) ? exp(load(scores + s) - new_max) : F32{};
      store(scores + s, p);
      total += p;
    }
    stats.total += any(odd) ? kNan : static_cast<float>(sum_of(total));
  }

  // Puts the partials of a tile's splits together and writes its results.
  void finish(int64_t b, int64_t head, int64_t tile, float* partials, int64_t count) const {
    const int64_t first = tile * tile_, tokens = std::min(tile_, a_.tokens - first);
    for (int64_t r = 0; r < tokens * group_; ++r) {
      float* values = values_of(partials, r);
      Stats all = *stats_of(partials, r);
      for (int64_t k = 1; k < count; ++k) {
        float* more = partials + k * partial_size();
        const Stats other = *stats_of(more, r);
        const float top = std::max(all.max, other.max);
        const float mine = exp(splat(all.max - top))[0], its = exp(splat(other.max - top))[0];
        const float* added = values_of(more, r);
        for (int64_t d = 0; d < value_size_; d += kLanes)
          store(values + d, load(values + d) * mine + load(added + d) * its);
        all = {top, all.total * mine + other.total * its};
      }
      T* to = at(a_.out, b, head * group_ + r % group_, first + r / group_);
      const float inverse = 1.0f / all.total;
      for (int64_t d = 0; d < a_.value_size; d += kLanes)
        store_up_to(to + d, load(values + d) * inverse, a_.value_size - d);
    }
  }

  const Attention& a_;
  const int64_t group_;              // query heads that share a kv head
  const int64_t tile_, tiles_;       // tokens of a tile, and how many tiles there are
  const int64_t rows_;               // query rows of a tile
  const int64_t size_, value_size_;  // padded to whole vectors
  const int64_t split_;              // slots of a split; all slots, where there are several tiles
  int64_t splits_ = 1;               // splits of the row that has most of them
  float *partials_ = nullptr, *scratch_ = nullptr;
  int64_t scratch_size_ = 0;
  int32_t* left_ = nullptr;  // how many splits each tile still waits for
};

void check(const Attention& a) {
  const auto fail = [](const char* name, int64_t b, int64_t found, const std::string& must) {
    throw std::invalid_argument(std::string(name) + "[" + std::to_string(b) + "] is " +
                                std::to_string(found) + "; it must be " + must);
  };
  for (int64_t b = 0; b < a.rows; ++b) {
    if (a.lengths[b] < 0) fail("lengths", b, a.lengths[b], "0 or more");
    if (a.cache_row && (a.cache_row[b] < 0 || a.cache_row[b] >= a.cache_rows))
      fail("rows", b, a.cache_row[b], "within [0, " + std::to_string(a.cache_rows) + ")");
  }
}

void attend(const Attention& attention, int threads) {
  switch (attention.dtype) {
    case DType::f32:
      return Attend<float>(attention).run(threads);
    case DType::bf16:
      return Attend<Bf16>(attention).run(threads);
    default:
      return Attend<F16>(attention).run(threads);
  }
}

// Moves the first row and the first head of a tensor.
Heads from(Heads x, DType dtype, int64_t row, int64_t head) {
  const int64_t bytes = dtype == DType::f32 ? 4 : 2;
  x.data = static_cast<char*>(x.data) + (row * x.row_stride + head * x.head_stride) * bytes;
  return x;
}

// The same attention, of some rows and kv heads alone.
Attention some_of(Attention a, int64_t row, int64_t rows, int64_t head, int64_t heads) {
  const int64_t group = a.heads / a.kv_heads, first = a.cache_row ? 0 : row;
  a.query = from(a.query, a.dtype, row, head * group);
  a.out = from(a.out, a.dtype, row, head * group);
  a.key = from(a.key, a.dtype, row, head);
  a.value = from(a.value, a.dtype, row, head);
  a.keys = from(a.keys, a.dtype, first, head);
  a.values = from(a.values, a.dtype, first, head);
  a.lengths += row;
  if (a.cache_row) a.cache_row += row;
  a.rows = rows;
  a.cache_rows -= first;
  a.kv_heads = heads;
  a.heads = heads * group;
  return a;
}

}  // namespace

void attention_rows(const Attention& attention, int threads) {
  check(attention);
  attend(attention, threads);
}

// What one of `size` threads computes: some of all kv heads of all rows, one row after the other.
void attention_part(const Attention& a, int rank, int size) {
  const int64_t all = a.rows * a.kv_heads;
  int64_t first = all * rank / size;
  const int64_t end = all * (rank + 1) / size;
  while (first < end) {
    const int64_t row = first / a.kv_heads, head = first % a.kv_heads;
    const int64_t rows = head == 0 ? (end - first) / a.kv_heads : 0;
    const int64_t heads = rows ? a.kv_heads : std::min(end - first, a.kv_heads - head);
    attend(some_of(a, row, std::max<int64_t>(rows, 1), head, heads), 1);
    first += std::max<int64_t>(rows, 1) * heads;
  }
}

}  // namespace CF_ISA
}  // namespace crossfade
