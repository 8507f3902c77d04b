// Linear layers of few rows on CPUs, with low-rank deltas. Compiled once for each instruction set;
// dispatch.cpp chooses.
#include <algorithm>

#include "tiles.h"

namespace crossfade {
inline namespace CF_ISA {

namespace {

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

typedef uint16_t U16x4 __attribute__((vector_size(8)));
typedef uint32_t U32x4 __attribute__((vector_size(16)));

template <DType kType>
F32x4 four_numbers(const void* data, int64_t i) {
  if constexpr (kType == DType::f32) return load_bits<F32x4>(static_cast<const float*>(data) + i);
  const auto bits = load_bits<U16x4>(static_cast<const uint16_t*>(data) + i);
  if constexpr (kType == DType::bf16)
    return bit_cast<F32x4>(__builtin_convertvector(bits, U32x4) << 16);
#ifdef __AVX2__
  return _mm_cvtph_ps(_mm_cvtsi64_si128(bit_cast<int64_t>(bits)));
#else
  return F32x4{number<kType>(data, i), number<kType>(data, i + 1), number<kType>(data, i + 2),
               number<kType>(data, i + 3)};
#endif
}

template <DType kType>
void put_number(void* data, int64_t i, F32x4 x) {
  if constexpr (kType == DType::f32) {
    std::memcpy(static_cast<float*>(data) + i, &x, sizeof x);
  } else {
    U16x4 y;
    if constexpr (kType == DType::bf16) {
      const U32x4 bits = bit_cast<U32x4>(x);
      const U32x4 rounded = (bits + 0x7FFFu + (bits >> 16 & 1)) >> 16;
      y = __builtin_convertvector(x == x ? rounded : bits >> 16 | 0x40, U16x4);
    } else {
#ifdef __AVX2__
      y = bit_cast<U16x4>(_mm_cvtsi128_si64(_mm_cvtps_ph(x, 0)));
#else
      y = U16x4{to_f16(x[0]), to_f16(x[1]), to_f16(x[2]), to_f16(x[3])};
#endif
    }
    std::memcpy(static_cast<uint16_t*>(data) + i, &y, sizeof y);
  }
}

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
  float* x;       // [rows, in] x as float32, where the weights are multiplied as such
  float* t;       // [rows, vectors * kLanes] x a^T times scale, padded with zeros
  uint8_t* used;  // [rows, vectors] which vectors of t are not all 0
  int64_t vectors, bytes;

  Scratch(const Linear& l, void* at) {
    vectors = (l.rank + kLanes - 1) / kLanes;
    const int64_t numbers = widened(l.x.dtype) ? l.rows * l.in : 0;
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

template <DType kType>
void run_part(const Linear& l, const Scratch& scratch, int rank, int size) {
  typedef typename Numbers<kType>::X X;
  constexpr bool kWiden = kWidened<kType>;
  if constexpr (kWiden) {
    const int64_t vectors = (l.in + kLanes - 1) / kLanes;
    widen<kType>(l, scratch, vectors * rank / size, vectors * (rank + 1) / size);
  }
  start_deltas(l, scratch, scratch.vectors * rank / size, scratch.vectors * (rank + 1) / size);
  if (kWiden || l.rank > 0) meet(size);

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
  run<kType>(y, l.rows, share(l.out, rank, size), share(l.out, rank + 1, size), PutY<kType>{l});
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
