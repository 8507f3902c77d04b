// Selects the slots that a search keeps, and forks the rows of caches, on CPUs. It is compiled
// once, for any instruction set: it compares and copies, which the C++ library does as fast as can
// be.
#include <omp.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

#include "../search_math.h"

namespace crossfade {

namespace {

constexpr int64_t kBytesPerThread = 1 << 17;  // fewer are not worth another thread
constexpr int64_t kAside = -1;                // the place of a row that is set aside

// One copy: row `to` becomes what row `from` is, at the positions that row `positions_of` takes.
struct Move {
  int64_t from, to, positions_of;
};

// The parent of each row, or -1 where the row stays as it is.
std::vector<int64_t> parents_of(const Fork& fork) {
  std::vector<int64_t> parents(fork.parents, fork.parents + fork.rows);
  for (int64_t row = 0; row < fork.rows; ++row) {
    int64_t& parent = parents[row];
    if (parent < -1 || parent >= fork.rows)
      throw std::invalid_argument("parents[" + std::to_string(row) + "] is " +
                                  std::to_string(parent) + "; it must be within [-1, " +
                                  std::to_string(fork.rows) + ")");
    if (parent == row) parent = -1;
  }
  return parents;
}

// Finds an order in which every row is read by all its children before it is overwritten. Rows
// without children come first, and each is followed by its parent if that has no other child left.
// What remains then are cycles, each of which sets one row aside.
std::vector<Move> moves_of(const Fork& fork) {
  std::vector<int64_t> parents = parents_of(fork), children(fork.rows);
  for (int64_t parent : parents)
    if (parent >= 0) ++children[parent];

  std::vector<Move> moves;
  const auto take = [&](int64_t row) {  // copies from the row's parent, and returns it
    const int64_t parent = parents[row];
    moves.push_back({parent, row, row});
    parents[row] = -1;
    return parent;
  };
  for (int64_t first = 0; first < fork.rows; ++first)
    for (int64_t row = first; children[row] == 0 && parents[row] >= 0;) {
      row = take(row);
      --children[row];
    }
  for (int64_t first = 0; first < fork.rows; ++first) {
    if (parents[first] < 0) continue;
    int64_t last = first;  // ends as the child of `first`
    while (parents[last] != first) last = parents[last];
    moves.push_back({first, kAside, last});
    for (int64_t row = first; row != last;) row = take(row);
    parents[last] = kAside;
    take(last);
  }
  return moves;
}

struct Bytes {
  char* at;
  int64_t token_stride;
};

void copy(const Bytes& to, const Bytes& from, int64_t tokens, int64_t token_bytes) {
  if (to.token_stride == token_bytes && from.token_stride == token_bytes) {
    std::memcpy(to.at, from.at, tokens * token_bytes);
    return;
  }
  for (int64_t i = 0; i < tokens; ++i)
    std::memcpy(to.at + i * to.token_stride, from.at + i * from.token_stride, token_bytes);
}

int64_t token_bytes(const Cache& cache) { return cache.size * cache.item_bytes; }

// Does all copies within one head of a cache.
void fork_head(const Fork& fork, const std::vector<Move>& moves, const Cache& cache, int64_t head,
               char* aside) {
  const int64_t token = token_bytes(cache);
  for (const Move& move : moves) {
    const Span span = span_of(fork, move.positions_of, cache.length);
    if (span.begin >= span.end) continue;
    const auto row = [&](int64_t i) -> Bytes {
      if (i == kAside) return {aside, token};
      const Heads& x = cache.data;
      const int64_t first = i * x.row_stride + head * x.head_stride + span.begin * x.token_stride;
      return {static_cast<char*>(x.data) + first * cache.item_bytes,
              x.token_stride * cache.item_bytes};
    };
    copy(row(move.to), row(move.from), span.end - span.begin, token);
  }
}

}  // namespace

void chunk_select_cpu(const Selection& s) {
  std::vector<int64_t> order(s.slots);
  const int64_t samples = s.slots / s.width;
  for (int64_t prompt = 0; prompt < s.prompts; ++prompt) {
    const float* scores = s.scores + prompt * s.slots;
    const uint8_t* finished = s.finished + prompt * s.slots;
    int64_t* parents = s.parents + prompt * s.slots;
    std::iota(order.begin(), order.end(), 0);
    std::partial_sort(order.begin(), order.begin() + s.width, order.end(),
                      [&](int64_t i, int64_t j) { return beats(scores, i, j); });
    for (int64_t i = 0; i < s.slots; ++i) {
      const int64_t kept = order[i / samples];
      parents[i] = finished[kept] && i % samples ? -1 : kept;
    }
  }
}

void fork_cache_cpu(const Fork& fork, int threads) {
  const std::vector<Move> moves = moves_of(fork);
  struct Item {
    const Cache* cache;
    int64_t head;
  };
  std::vector<Item> items;
  int64_t bytes = 0, most = 0;  // how many are copied in all, and are set aside at once
  for (int64_t i = 0; i < fork.count; ++i) {
    const Cache& cache = fork.caches[i];
    for (int64_t head = 0; head < cache.heads; ++head) items.push_back({&cache, head});
    for (const Move& move : moves) {
      const Span span = span_of(fork, move.positions_of, cache.length);
      const int64_t each = std::max<int64_t>(0, span.end - span.begin) * token_bytes(cache);
      bytes += cache.heads * each;
      if (move.to == kAside) most = std::max(most, each);
    }
  }
  const int64_t count = static_cast<int64_t>(items.size());
  threads = static_cast<int>(
      std::max<int64_t>(1, std::min<int64_t>({threads, count, bytes / kBytesPerThread})));

  // Nothing is allocated here, as no exception may leave a parallel region.
  const std::unique_ptr<char[]> aside(new char[threads * most]);
  const auto run = [&](int64_t i, int thread) {
    fork_head(fork, moves, *items[i].cache, items[i].head, aside.get() + thread * most);
  };
  if (threads == 1) {
    for (int64_t i = 0; i < count; ++i) run(i, 0);
    return;
  }
#pragma omp parallel for num_threads(threads) schedule(dynamic)
  for (int64_t i = 0; i < count; ++i) run(i, omp_get_thread_num());
}

}  // namespace crossfade
