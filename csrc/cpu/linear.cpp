// Linear layers of few rows on CPUs, with low-rank deltas. Compiled once for each instruction set;
// dispatch.cpp chooses.
//
// Weights are used as they lie in memory, once: a tile of some of their rows and of all rows of x
// keeps one vector of partial sums for each pair, which steps along `in`. Every sum is taken in the
// same order whatever the tile, so that a row does not depend on the others of its batch.
#include <algorithm>

#include "simd.h"

namespace crossfade {
inline namespace CF_ISA {

namespace {

#if defined(__AVX512F__) || defined(__aarch64__)  // 32 registers
constexpr int kTileRows = 6;
constexpr int kNarrowRows = 3;  // with up to so many rows, tiles are twice as wide
#else
constexpr int kTileRows = 3;
constexpr int kNarrowRows = 1;
#endif
constexpr int kWidth = 4;                    // columns of y in a tile
constexpr int kWide = 2 * kWidth;            // columns of y in a tile of few rows
constexpr int64_t kLine = 64;                // bytes of a cache line
constexpr int64_t kCachedNumbers = 1 << 17;  // of x that stay in the second-level cache

// Which vectors of a row's scale have a number other than 0: [rows, vectors].
struct Used {
  const uint8_t* flags;
  int64_t vectors;

  bool operator()(int64_t row, int64_t column) const {
    return flags[row * vectors + column / kLanes];
  }
};

// Products of rows of x with rows of w. Where `wanted` is set, those that it does not name are left
// out. Where `t` is set, products of rows of t with rows of b are added.
struct Product {
  const float* x = nullptr;
  int64_t x_stride = 0, length = 0;
  Matrix w = {};
  const Used* wanted = nullptr;
  const float* t = nullptr;  // [rows, rank], rows padded with zeros to whole vectors
  int64_t t_stride = 0, rank = 0;
  Matrix b = {};
  const Used* used = nullptr;  // which vectors of t are not all 0
};

// The part of the weights that a tile fetches for the tiles after it. It is fetched in order and
// into the second-level cache, which can wait for more lines at once than the first-level cache.
struct Ahead {
  const char* at;
  const char* end;
  int64_t bytes;  // how many are fetched at each step
};

inline void fetch(const char* p) { __builtin_prefetch(p, 0, 2); }

template <DType kType, int kRows, int kColumns>
struct Tile {
  F32 sum[kRows][kColumns] = {};

  template <class LoadX, class LoadW>
  inline __attribute__((always_inline)) void step(LoadX x, LoadW w) {
    F32 column[kColumns];
#pragma GCC unroll 8
    for (int n = 0; n < kColumns; ++n) column[n] = w(n);
#pragma GCC unroll 8
    for (int m = 0; m < kRows; ++m) {
      const F32 row = x(m);
#pragma GCC unroll 8
      for (int n = 0; n < kColumns; ++n) sum[m][n] = fma(column[n], row, sum[m][n]);
    }
  }

  inline void add_weights(const Product& p, int64_t row, int64_t column, Ahead ahead) {
    const float* x = p.x + row * p.x_stride;
    const int64_t w = column * p.w.row_stride;
    int64_t k = 0;
    for (; k + kLanes <= p.length; k += kLanes) {
      const char* stop = std::min(ahead.at + ahead.bytes, ahead.end);
      for (; ahead.at < stop; ahead.at += kLine) fetch(ahead.at);
      step([&](int m) { return load(x + m * p.x_stride + k); },
           [&](int n) { return load_as(kType, p.w.data, w + n * p.w.row_stride + k); });
    }
    const int64_t rest = p.length - k;
    if (rest > 0)
      step([&](int m) { return load_first(DType::f32, x, m * p.x_stride + k, rest); },
           [&](int n) { return load_first(kType, p.w.data, w + n * p.w.row_stride + k, rest); });
  }

  inline void add_deltas(const Product& p, int64_t row, int64_t column) {
    const float* t = p.t + row * p.t_stride;
    for (int64_t k = 0; k < p.rank; k += kLanes) {
      const int64_t rest = p.rank - k;
#pragma GCC unroll 8
      for (int m = 0; m < kRows; ++m) {
        if (!(*p.used)(row + m, k)) continue;
        const F32 numbers = load(t + m * p.t_stride + k);
#pragma GCC unroll 8
        for (int n = 0; n < kColumns; ++n) {
          const int64_t b = (column + n) * p.b.row_stride + k;
          const F32 w =
              rest < kLanes ? load_first(kType, p.b.data, b, rest) : load_as(kType, p.b.data, b);
          sum[m][n] = fma(w, numbers, sum[m][n]);
        }
      }
    }
  }

  // Calls put(row, column, sum) for each number of the tile.
  template <class Put>
  inline void put_sums(int64_t row, int64_t column, Put put) const {
    constexpr int kSums = std::min(4, kColumns);  // sums that are made at once
#pragma GCC unroll 8
    for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 8
      for (int n = 0; n < kColumns; n += kSums) {
        const auto of = [&](int i) { return i < kColumns ? sum[m][i < kColumns ? i : 0] : F32{}; };
        const F32x4 sums = sums_of(of(n), of(n + 1), of(n + 2), of(n + 3));
        for (int i = 0; i < kSums; ++i) put(row + m, column + n + i, sums[i]);
      }
    }
  }
};

template <DType kType, int kRows, int kColumns, class Put>
void run_tile(const Product& p, int64_t row, int64_t column, const Ahead& ahead, Put put) {
  if (p.wanted) {
    bool any = false;
    for (int m = 0; m < kRows; ++m)
      for (int n = 0; n < kColumns; n += kWidth) any |= (*p.wanted)(row + m, column + n);
    if (!any) return;
  }
  Tile<kType, kRows, kColumns> tile;
  tile.add_weights(p, row, column, ahead);
  if (p.t) tile.add_deltas(p, row, column);
  tile.put_sums(row, column, put);
}

template <DType kType, int kColumns, int kRows = (kColumns > kWidth ? kNarrowRows : kTileRows),
          class Put>
void run_rows(const Product& p, int64_t row, int64_t rows, int64_t column, const Ahead& ahead,
              Put put) {
  if constexpr (kRows > 1)
    if (rows < kRows) return run_rows<kType, kColumns, kRows - 1>(p, row, rows, column, ahead, put);
  run_tile<kType, kRows, kColumns>(p, row, column, ahead, put);
}

// Computes some columns of all rows, in tiles of equally many rows. Each tile fetches a part of the
// columns that come next, so that memory is never idle.
template <DType kType, int kColumns, class Put>
void run_columns(const Product& p, int64_t first, int64_t rows, int64_t column, int64_t end,
                 Put put) {
  constexpr int64_t kSize = kType == DType::f32 ? 4 : 2;
  const int64_t tiles = (rows + kTileRows - 1) / kTileRows;
  const int64_t next = column + kColumns, columns = std::min<int64_t>(kColumns, end - next);
  const bool dense = p.w.row_stride == p.length;
  const int64_t lines = dense ? columns * p.length * kSize / kLine : 0;
  const char* from = static_cast<const char*>(p.w.data) + next * p.w.row_stride * kSize;
  const int64_t each = (kColumns * kLanes * kSize / tiles + kLine - 1) / kLine * kLine;
  for (int64_t i = 0; i < tiles; ++i) {
    const Ahead ahead{from + lines * i / tiles * kLine, from + lines * (i + 1) / tiles * kLine,
                      each};
    const int64_t row = rows * i / tiles, count = rows * (i + 1) / tiles - row;
    run_rows<kType, kColumns>(p, first + row, count, column, ahead, put);
  }
}

// Computes columns [begin, end) of all rows.
template <DType kType, class Put>
void run(const Product& p, int64_t rows, int64_t begin, int64_t end, Put put) {
  const int64_t most = std::max<int64_t>(kCachedNumbers / p.length, kTileRows);
  const int64_t parts = (rows + most - 1) / most;
  for (int64_t i = 0; i < parts; ++i) {
    const int64_t first = rows * i / parts, count = rows * (i + 1) / parts - first;
    int64_t column = begin;
    if (count <= kNarrowRows)
      for (; column + kWide <= end; column += kWide)
        run_columns<kType, kWide>(p, first, count, column, end, put);
    for (; column + kWidth <= end; column += kWidth)
      run_columns<kType, kWidth>(p, first, count, column, end, put);
    for (; column < end; ++column) run_columns<kType, 1>(p, first, count, column, end, put);
  }
}

// The share of `count` columns that a thread computes, in whole wide tiles.
int64_t share(int64_t count, int64_t rank, int64_t threads) {
  const int64_t tiles = (count + kWide - 1) / kWide;
  return std::min(tiles * rank / threads * kWide, count);
}

template <DType kType>
float number(const void* data, int64_t i) {
  if constexpr (kType == DType::f32) return static_cast<const float*>(data)[i];
  return load_first(kType, data, i, 1)[0];
}

template <DType kType>
void put_number(void* data, int64_t i, float x) {
  if constexpr (kType == DType::f32)
    static_cast<float*>(data)[i] = x;
  else
    static_cast<uint16_t*>(data)[i] = kType == DType::bf16 ? to_bf16(x) : to_f16(x);
}

// What the threads of a team share while they compute a layer.
struct Scratch {
  float* x;       // [rows, in] x as float32, unless it is that already
  float* t;       // [rows, vectors * kLanes] x a^T times scale, padded with zeros
  uint8_t* used;  // [rows, vectors] which vectors of t are not all 0
  int64_t vectors, bytes;

  Scratch(const Linear& l, void* at) {
    vectors = (l.rank + kLanes - 1) / kLanes;
    const int64_t numbers = l.x.dtype == DType::f32 ? 0 : l.rows * l.in;
    x = static_cast<float*>(at);
    t = x + numbers;
    used = reinterpret_cast<uint8_t*>(t + l.rows * vectors * kLanes);
    bytes = (numbers + l.rows * vectors * kLanes) * 4 + l.rows * vectors;
  }
};

const float* scale_of(const Linear& l, int64_t row) {
  return l.scale + row / l.scale_rows * l.scale_stride;
}

// Waits until the whole team is here.
void meet(int size) {
  if (size > 1) {
#pragma omp barrier
  }
}

// Converts vectors [begin, end) of each row of x to float32 once, as every column of y reads them.
template <DType kType>
void widen(const Linear& l, const Scratch& scratch, int64_t begin, int64_t end) {
  for (int64_t row = 0; row < l.rows; ++row) {
    const int64_t from = row * l.x.row_stride;
    float* to = scratch.x + row * l.in;
    for (int64_t k = begin * kLanes; k < std::min(end * kLanes, l.in); k += kLanes) {
      if (k + kLanes <= l.in) {
        store(to + k, load_as(kType, l.x.data, from + k));
        continue;
      }
      for (int64_t i = k; i < l.in; ++i) to[i] = number<kType>(l.x.data, from + i);
    }
  }
}

// Finds which vectors [begin, end) of each row's scale are used, and clears the sums.
void start_deltas(const Linear& l, const Scratch& scratch, int64_t begin, int64_t end) {
  for (int64_t row = 0; row < l.rows; ++row)
    for (int64_t v = begin; v < end; ++v) {
      uint8_t any = 0;
      for (int64_t k = v * kLanes; k < std::min((v + 1) * kLanes, l.rank); ++k)
        any |= scale_of(l, row)[k] != 0;
      scratch.used[row * scratch.vectors + v] = any;
      store(scratch.t + (row * scratch.vectors + v) * kLanes, F32{});
    }
}

template <DType kType>
void run_part(const Linear& l, const Scratch& scratch, int rank, int size) {
  constexpr bool kWiden = kType != DType::f32;
  if constexpr (kWiden) {
    const int64_t vectors = (l.in + kLanes - 1) / kLanes;
    widen<kType>(l, scratch, vectors * rank / size, vectors * (rank + 1) / size);
  }
  start_deltas(l, scratch, scratch.vectors * rank / size, scratch.vectors * (rank + 1) / size);
  if (kWiden || l.rank > 0) meet(size);

  Product y, down;
  y.x = kWiden ? scratch.x : static_cast<const float*>(l.x.data);
  y.x_stride = kWiden ? l.in : l.x.row_stride;
  y.length = l.in;
  down = y;
  y.w = l.weight;
  down.w = l.a;
  const Used used{scratch.used, scratch.vectors};
  if (l.rank > 0) {
    down.wanted = y.used = &used;
    y.t = scratch.t;
    y.t_stride = scratch.vectors * kLanes;
    y.rank = l.rank;
    y.b = l.b;
    run<kType>(down, l.rows, share(l.rank, rank, size), share(l.rank, rank + 1, size),
               [&](int64_t row, int64_t column, float sum) {
                 const float scale = scale_of(l, row)[column];
                 scratch.t[row * y.t_stride + column] = scale == 0 ? 0.0f : sum * scale;
               });
    meet(size);
  }
  run<kType>(y, l.rows, share(l.out, rank, size), share(l.out, rank + 1, size),
             [&](int64_t row, int64_t column, float sum) {
               if (l.bias) sum += number<kType>(l.bias, column);
               put_number<kType>(l.y, row * l.out + column, sum);
             });
}

}  // namespace

int64_t linear_rows_scratch(const Linear& linear) { return Scratch(linear, nullptr).bytes; }

void linear_rows_part(const Linear& linear, void* at, int rank, int size) {
  const Scratch scratch(linear, at);
  switch (linear.weight.dtype) {
    case DType::f32:
      return run_part<DType::f32>(linear, scratch, rank, size);
    case DType::bf16:
      return run_part<DType::bf16>(linear, scratch, rank, size);
    default:
      return run_part<DType::f16>(linear, scratch, rank, size);
  }
}

}  // namespace CF_ISA
}  // namespace crossfade
