// Linear layers of few rows on CPUs, with low-rank deltas. Compiled once for each instruction set;
// dispatch.cpp chooses.
#include <algorithm>

#include "numbers.h"
#include "packed.h"

namespace crossfade {
inline namespace CF_ISA {

namespace {

// What is done with the numbers of y: the bias is added to them, and they are rounded.
template <DType kType>
struct PutY {
  const Linear& l;

  void operator()(int64_t row, int64_t column, float sum) const {
    if (l.bias) sum += number<kType>(l.bias, column);
    put_number<kType>(l.y, row * l.out + column, sum);
  }
  void operator()(int64_t row, int64_t column, F32x4 sums) const {
    if (l.bias) sums += four_numbers<kType>(l.bias, column);
    put_number<kType>(l.y, row * l.out + column, sums);
  }
};

// Whether numbers of a dtype are multiplied as float32.
template <DType kType>
constexpr bool kWidened = kType != DType::f32 && sizeof(typename Numbers<kType>::X) == 4;

bool widened(DType dtype) {
  if (dtype == DType::f32) return false;
  return dtype == DType::bf16 ? kWidened<DType::bf16> : kWidened<DType::f16>;
}

// What the threads of a team share while they compute a layer.
struct Scratch {
  float* x;         // [rows, in] x as float32, where the weights are multiplied as such
  float* t;         // [rows, vectors * kLanes] x a^T times scale, padded with zeros
  Rounded rounded;  // x, where weights are packed
  uint8_t* used;    // [rows, vectors] which vectors of t are not all 0
  int64_t vectors, bytes;

  Scratch(const Linear& l, void* at) {
    vectors = (l.rank + kLanes - 1) / kLanes;
    const bool packs = l.packed.bits > 0;
    const bool widens = widened(l.x.dtype) && (!packs || l.rank > 0);
    const int64_t rounds = packs ? l.rows * l.in : 0;
    const int64_t groups = packs ? l.rows * (l.in / l.packed.group) : 0;
    x = static_cast<float*>(at);
    t = x + (widens ? l.rows * l.in : 0);
    rounded.scale = t + l.rows * vectors * kLanes;
    rounded.sum = reinterpret_cast<int32_t*>(rounded.scale + groups);
    rounded.numbers = reinterpret_cast<int8_t*>(rounded.sum + groups);
    used = reinterpret_cast<uint8_t*>(rounded.numbers + rounds);
    bytes = reinterpret_cast<char*>(used + l.rows * vectors) - static_cast<char*>(at);
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

// What is done with the numbers of x a^T: they are multiplied by the row's scale.
struct PutT {
  const Linear& l;
  const Scratch& scratch;

  void operator()(int64_t row, int64_t column, float sum) const {
    const float scale = scale_of(l, row)[column];
    scratch.t[row * scratch.vectors * kLanes + column] = scale == 0 ? 0.0f : sum * scale;
  }
  void operator()(int64_t row, int64_t column, F32x4 sums) const {
    for (int i = 0; i < 4; ++i) (*this)(row, column + i, sums[i]);
  }
};

// Rounds groups [begin, end) of each row of x, of which there are `groups`.
template <DType kType>
void round_groups(const Linear& l, const Rounded& rounded, int64_t begin, int64_t end) {
  const int64_t group = l.packed.group, groups = l.in / group;
  float wide[kMostGroup];
  for (int64_t row = 0; row < l.rows; ++row)
    for (int64_t g = begin; g < end; ++g) {
      const int64_t from = row * l.x.row_stride + g * group, to = row * groups + g;
      for (int64_t k = 0; k < group; k += kLanes)
        store(wide + k, load_as(kType, l.x.data, from + k));
      round_group(wide, group, rounded.numbers + row * l.in + g * group, rounded.scale + to,
                  rounded.sum + to);
    }
}

// What is done with deltas: they are added to a block's sums.
struct AddToBlock {
  float (*sums)[kBlock];
  int64_t row, column;

  void operator()(int64_t m, int64_t n, float sum) const { sums[m - row][n - column] += sum; }
  void operator()(int64_t m, int64_t n, F32x4 four) const {
    for (int i = 0; i < 4; ++i) (*this)(m, n + i, four[i]);
  }
};

template <int kBits, int kRows = kPackedRows>
void add_rows(const Linear& l, const Rounded& x, int64_t row, int64_t rows, int64_t block,
              float (*sums)[kBlock], const Ahead& ahead) {
  if constexpr (kRows > 1)
    if (rows < kRows) return add_rows<kBits, kRows - 1>(l, x, row, rows, block, sums, ahead);
  add_blocks<kBits, kRows>(l.packed, l.in, x, row, block, 0, sums, ahead);
}

// Adds deltas to the sums of a block, and puts these into y. `deltas` has products of t alone.
template <DType kType>
void finish_block(const Linear& l, const Product<kType>& deltas, int64_t row, int64_t rows,
                  int64_t block, float (*sums)[kBlock]) {
  const PutY<kType> put{l};
  const int64_t column = block * kBlock, columns = std::min<int64_t>(kBlock, l.out - column);
  if (l.rank > 0)
    run_block<kType>(deltas, row, rows, column, column + columns, AddToBlock{sums, row, column});
  for (int64_t m = 0; m < rows; ++m) {
    int64_t n = 0;
    for (; n + 4 <= columns; n += 4) put(row + m, column + n, load_bits<F32x4>(sums[m] + n));
    for (; n < columns; ++n) put(row + m, column + n, sums[m][n]);
  }
}

// Computes blocks [begin, end) of one row, but for a few, and gives the first one that is left.
// They are read in streams, as `run_streams` reads weights that are not packed.
template <DType kType, int kBits>
int64_t run_packed_streams(const Linear& l, const Rounded& x, const Product<kType>& deltas,
                           int64_t begin, int64_t end) {
  const int64_t apart = (end - begin) / kPackedStreams;
  for (int64_t block = begin; block < begin + apart; ++block) {
    float sums[kPackedStreams][kBlock];
    add_blocks<kBits, 1, kPackedStreams>(l.packed, l.in, x, 0, block, apart, sums, Ahead{});
    for (int i = 0; i < kPackedStreams; ++i)
      finish_block<kType>(l, deltas, 0, 1, block + i * apart, sums + i);
  }
  return begin + apart * kPackedStreams;
}

// Computes blocks [begin, end) of all rows.
template <DType kType, int kBits>
void run_packed(const Linear& l, const Rounded& x, const Product<kType>& deltas, int64_t begin,
                int64_t end) {
  if (l.rows == 1) begin = run_packed_streams<kType, kBits>(l, x, deltas, begin, end);
  const int64_t bytes = l.in * kBits / 8 * kBlock, tiles = (l.rows + kPackedRows - 1) / kPackedRows;
  const auto* const numbers = reinterpret_cast<const char*>(l.packed.numbers);
  const char *const first = numbers + begin * bytes, *const last = numbers + end * bytes;
  Ahead{first, std::min(first + kAhead, last), kAhead}.step();
  for (int64_t block = begin; block < end; ++block) {
    const char* const from = numbers + block * bytes + kAhead;
    const int64_t lines = (std::min(bytes, last - from) + kLine - 1) / kLine;
    for (int64_t i = 0; i < tiles; ++i) {
      const int64_t row = l.rows * i / tiles, rows = l.rows * (i + 1) / tiles - row;
      float sums[kPackedRows][kBlock];
      add_rows<kBits>(l, x, row, rows, block, sums,
                      {from + lines * i / tiles * kLine, from + lines * (i + 1) / tiles * kLine,
                       (kLine + tiles - 1) / tiles / kLine * kLine + kLine});
      finish_block<kType>(l, deltas, row, rows, block, sums);
    }
  }
}

template <DType kType>
void run_part(const Linear& l, const Scratch& scratch, int rank, int size) {
  typedef typename Numbers<kType>::X X;
  constexpr bool kWiden = kWidened<kType>;
  const bool packs = l.packed.bits > 0;
  if (kWiden && (!packs || l.rank > 0)) {
    const int64_t vectors = (l.in + kLanes - 1) / kLanes;
    widen<kType>(l, scratch, vectors * rank / size, vectors * (rank + 1) / size);
  }
  start_deltas(l, scratch, scratch.vectors * rank / size, scratch.vectors * (rank + 1) / size);
  if (packs) {
    const int64_t groups = l.in / l.packed.group;
    round_groups<kType>(l, scratch.rounded, groups * rank / size, groups * (rank + 1) / size);
  }
  if (kWiden || packs || l.rank > 0) meet(size);

  Product<kType> y, down;
  y.x = static_cast<const X*>(kWiden ? scratch.x : l.x.data);
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
               PutT{l, scratch});
    meet(size);
  }
  if (!packs)
    return run<kType>(y, l.rows, share(l.out, rank, size), share(l.out, rank + 1, size),
                      PutY<kType>{l});
  y.length = 0;
  const int64_t blocks = (l.out + kBlock - 1) / kBlock;
  const int64_t begin = blocks * rank / size, end = blocks * (rank + 1) / size;
  if (l.packed.bits == 8)
    run_packed<kType, 8>(l, scratch.rounded, y, begin, end);
  else
    run_packed<kType, 4>(l, scratch.rounded, y, begin, end);
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
