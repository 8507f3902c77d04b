// Products of few rows of x with rows of a matrix, which is used as it lies in memory, once: a tile
// of some of the matrix's rows and of all rows of x keeps one vector of partial sums for each pair,
// which steps along `in`. Every sum is taken in the same order whatever the tile, so that a row
// does not depend on the others of its batch.
#pragma once
#include <algorithm>

#include "simd.h"

namespace crossfade {
inline namespace CF_ISA {

#if defined(__AVX512F__) || defined(__aarch64__)  // 32 registers
constexpr int kTileRows = 6;
constexpr int kNarrowRows = 3;  // with up to so many rows, tiles are twice as wide
#else
constexpr int kTileRows = 3;
constexpr int kNarrowRows = 0;  // the sums of wider tiles would not stay in registers
#endif
constexpr int kStreamRows = 1;               // with up to so many rows, weights are read in streams
constexpr int kWidth = 4;                    // columns of y in a tile
constexpr int kWide = 2 * kWidth;            // columns of y in a tile of few rows
constexpr int64_t kLine = 64;                // bytes of a cache line
constexpr int64_t kAhead = 24 * 1024;        // bytes between what is fetched and what is used
constexpr int64_t kCachedNumbers = 1 << 17;  // of x that stay in the second-level cache

// Which vectors of a row's scale have a number other than 0: [rows, vectors].
struct Used {
  const uint8_t* flags;
  int64_t vectors;

  bool operator()(int64_t row, int64_t column) const {
    return flags[row * vectors + column / kLanes];
  }
};

// How numbers of a dtype are multiplied: kStep of a row at once, by x of type X.
template <DType kType>
struct Numbers {
  typedef float X;
  typedef F32 Vector;
  static constexpr int kStep = kLanes;
  static constexpr int64_t kSize = kType == DType::f32 ? 4 : 2;  // bytes of a weight

  static Vector x(const X* p) { return load(p); }
  static Vector first_x(const X* p, int64_t count) { return load_first(DType::f32, p, 0, count); }
  static Vector w(const void* data, int64_t i) { return load_as(kType, data, i); }
  static Vector first_w(const void* data, int64_t i, int64_t count) {
    return load_first(kType, data, i, count);
  }
  static F32 add(Vector w, Vector x, F32 sum) { return fma(w, x, sum); }
};

#ifdef __AVX512BF16__
// Two products a lane, in one instruction. It takes numbers below 2^-126 for zeros.
template <>
struct Numbers<DType::bf16> {
  typedef uint16_t X;
  typedef __m512bh Vector;
  static constexpr int kStep = 2 * kLanes;
  static constexpr int64_t kSize = 2;

  static Vector x(const X* p) { return load_bits<Vector>(p); }
  static Vector first_x(const X* p, int64_t count) {
    return bit_cast<Vector>(_mm512_maskz_loadu_epi16((1u << count) - 1, p));
  }
  static Vector w(const void* data, int64_t i) { return x(static_cast<const X*>(data) + i); }
  static Vector first_w(const void* data, int64_t i, int64_t count) {
    return first_x(static_cast<const X*>(data) + i, count);
  }
  static F32 add(Vector w, Vector x, F32 sum) { return _mm512_dpbf16_ps(sum, w, x); }
};
#endif

// Products of rows of x with rows of w. Where `wanted` is set, those that it does not name are left
// out. Where `t` is set, products of rows of t with rows of b are added.
template <DType kType>
struct Product {
  const typename Numbers<kType>::X* x = nullptr;
  int64_t x_stride = 0, length = 0;
  Matrix w = {};
  const Used* wanted = nullptr;
  const float* t = nullptr;  // [rows, rank], rows padded with zeros to whole vectors
  int64_t t_stride = 0, rank = 0;
  Matrix b = {};
  const Used* used = nullptr;  // which vectors of t are not all 0

  const char* weights(int64_t column) const {
    return static_cast<const char*>(w.data) + column * w.row_stride * Numbers<kType>::kSize;
  }
  bool dense() const { return length > 0 && w.row_stride == length; }
};

// The part of the weights that a tile fetches for the tiles after it. It is fetched in order and
// into the second-level cache, which can wait for more lines at once than the first-level cache.
struct Ahead {
  const char* at = nullptr;
  const char* end = nullptr;
  int64_t bytes = 0;  // how many are fetched at each step

  inline void step() {
    const char* stop = std::min(at + bytes, end);
    for (; at < stop; at += kLine) __builtin_prefetch(at, 0, 2);
  }
};

// The columns of a tile: neighbours, or equally far apart.
struct Columns {
  int64_t first, apart;

  int64_t operator[](int n) const { return first + n * apart; }
};

template <DType kType, int kRows, int kColumns>
struct Tile {
  typedef Numbers<kType> N;
  typedef typename N::Vector Vector;

  F32 sum[kRows][kColumns] = {};

  template <class LoadX, class LoadW>
  inline __attribute__((always_inline)) void step(LoadX x, LoadW w) {
    Vector column[kColumns];
#pragma GCC unroll 16
    for (int n = 0; n < kColumns; ++n) column[n] = w(n);
#pragma GCC unroll 16
    for (int m = 0; m < kRows; ++m) {
      const Vector row = x(m);
#pragma GCC unroll 16
      for (int n = 0; n < kColumns; ++n) sum[m][n] = N::add(column[n], row, sum[m][n]);
    }
  }

  inline void add_weights(const Product<kType>& p, int64_t row, Columns columns, Ahead ahead) {
    const typename N::X* x = p.x + row * p.x_stride;
    const int64_t w = columns.first * p.w.row_stride, apart = columns.apart * p.w.row_stride;
    int64_t k = 0;
    for (; k + N::kStep <= p.length; k += N::kStep) {
      ahead.step();
      step([&](int m) { return N::x(x + m * p.x_stride + k); },
           [&](int n) { return N::w(p.w.data, w + n * apart + k); });
    }
    const int64_t rest = p.length - k;
    if (rest > 0)
      step([&](int m) { return N::first_x(x + m * p.x_stride + k, rest); },
           [&](int n) { return N::first_w(p.w.data, w + n * apart + k, rest); });
  }

  inline void add_deltas(const Product<kType>& p, int64_t row, Columns columns) {
    const float* t = p.t + row * p.t_stride;
    for (int64_t k = 0; k < p.rank; k += kLanes) {
      const int64_t rest = p.rank - k;
#pragma GCC unroll 16
      for (int m = 0; m < kRows; ++m) {
        if (!(*p.used)(row + m, k)) continue;
        const F32 numbers = load(t + m * p.t_stride + k);
#pragma GCC unroll 16
        for (int n = 0; n < kColumns; ++n) {
          const int64_t b = columns[n] * p.b.row_stride + k;
          const F32 w =
              rest < kLanes ? load_first(kType, p.b.data, b, rest) : load_as(kType, p.b.data, b);
          sum[m][n] = fma(w, numbers, sum[m][n]);
        }
      }
    }
  }

  // Calls put(row, column, sums) for each number of the tile, or for four at once.
  template <class Put>
  inline void put_sums(int64_t row, Columns columns, Put put) const {
#pragma GCC unroll 16
    for (int m = 0; m < kRows; ++m) {
      if constexpr (kColumns == 1) {
        put(row + m, columns.first, total_of(sum[m][0]));
      } else {
#pragma GCC unroll 4
        for (int n = 0; n < kColumns; n += 4) {
          const F32x4 sums = sums_of(sum[m][n], sum[m][n + 1], sum[m][n + 2], sum[m][n + 3]);
          if (columns.apart == 1)
            put(row + m, columns[n], sums);
          else
            for (int i = 0; i < 4; ++i) put(row + m, columns[n + i], sums[i]);
        }
      }
    }
  }
};

template <DType kType, int kRows, int kColumns, class Put>
void run_tile(const Product<kType>& p, int64_t row, Columns columns, const Ahead& ahead, Put put) {
  if (p.wanted) {
    bool any = false;
    for (int m = 0; m < kRows; ++m)
      for (int n = 0; n < kColumns; n += kWidth) any |= (*p.wanted)(row + m, columns[n]);
    if (!any) return;
  }
  Tile<kType, kRows, kColumns> tile;
  tile.add_weights(p, row, columns, ahead);
  if (p.t) tile.add_deltas(p, row, columns);
  tile.put_sums(row, columns, put);
}

constexpr int most_rows(int columns) {
  return columns == kWide ? std::max(kNarrowRows, 1) : kTileRows;
}

template <DType kType, int kColumns, int kRows = most_rows(kColumns), class Put>
void run_rows(const Product<kType>& p, int64_t row, int64_t rows, Columns columns,
              const Ahead& ahead, Put put) {
  if constexpr (kRows > 1)
    if (rows < kRows)
      return run_rows<kType, kColumns, kRows - 1>(p, row, rows, columns, ahead, put);
  run_tile<kType, kRows, kColumns>(p, row, columns, ahead, put);
}

// Computes columns [begin, end) of so few rows that one tile has them all, and gives the first
// column that is left. The columns of a tile are far apart, and so are those of the next one, right
// behind: all of memory is read in a few streams, each without a gap, which the processor itself
// fetches ahead as fast as the memory gives.
template <DType kType, class Put>
int64_t run_streams(const Product<kType>& p, int64_t first, int64_t rows, int64_t begin,
                    int64_t end, Put put) {
  const int64_t apart = (end - begin) / kWidth;
  for (int64_t i = 0; i < apart; ++i)
    run_rows<kType, kWidth>(p, first, rows, {begin + i, apart}, Ahead{}, put);
  return begin + apart * kWidth;
}

// Computes some columns of all rows, in tiles of equally many rows. Each tile fetches its part of
// what comes later, so that memory is never idle.
template <DType kType, int kColumns, class Put>
void run_columns(const Product<kType>& p, int64_t first, int64_t rows, int64_t column, int64_t end,
                 Put put) {
  const int64_t tiles = (rows + kTileRows - 1) / kTileRows;
  const char* const from = p.weights(column) + kAhead;
  const int64_t left = p.dense() ? p.weights(end) - from : 0;
  const int64_t bytes = std::min(p.weights(column + kColumns) - p.weights(column), left);
  const int64_t lines = (bytes + kLine - 1) / kLine;
  constexpr int64_t kStepLines = kColumns * Numbers<kType>::kStep * Numbers<kType>::kSize / kLine;
  const int64_t each = (kStepLines + tiles - 1) / tiles * kLine;
  for (int64_t i = 0; i < tiles; ++i) {
    const Ahead ahead{from + lines * i / tiles * kLine, from + lines * (i + 1) / tiles * kLine,
                      each};
    const int64_t row = rows * i / tiles, count = rows * (i + 1) / tiles - row;
    run_rows<kType, kColumns>(p, first + row, count, {column, 1}, ahead, put);
  }
}

// Computes columns [begin, end) of some rows.
template <DType kType, class Put>
void run_block(const Product<kType>& p, int64_t first, int64_t rows, int64_t begin, int64_t end,
               Put put) {
  int64_t column = begin;
  for (; column + kWidth <= end; column += kWidth)
    run_columns<kType, kWidth>(p, first, rows, column, end, put);
  for (; column < end; ++column) run_columns<kType, 1>(p, first, rows, column, end, put);
}

// Computes columns [begin, end) of all rows.
template <DType kType, class Put>
void run(const Product<kType>& p, int64_t rows, int64_t begin, int64_t end, Put put) {
  const int64_t most = std::max<int64_t>(kCachedNumbers / p.length, kTileRows);
  const int64_t parts = (rows + most - 1) / most;
  const bool streams = rows <= kStreamRows && p.dense() && !p.wanted;
  if (p.dense() && !streams && begin < end) {
    const int64_t bytes = std::min(kAhead, p.weights(end) - p.weights(begin));
    Ahead{p.weights(begin), p.weights(begin) + bytes, bytes}.step();
  }
  for (int64_t i = 0; i < parts; ++i) {
    const int64_t first = rows * i / parts, count = rows * (i + 1) / parts - first;
    int64_t column = begin;
    if (streams) column = run_streams<kType>(p, first, count, begin, end, put);
    if (count <= kNarrowRows)
      for (; column + kWide <= end; column += kWide)
        run_columns<kType, kWide>(p, first, count, column, end, put);
    run_block<kType>(p, first, count, column, end, put);
  }
}

// The share of `count` columns that a thread computes, in whole tiles.
int64_t share(int64_t count, int64_t rank, int64_t threads) {
  const int64_t tiles = (count + kWide - 1) / kWide;
  return std::min(tiles * rank / threads * kWide, count);
}

}  // namespace CF_ISA
}  // namespace crossfade
