// Runs a tape: a model's step as a list of instructions over the memory of its tensors. Compiled
// once for each instruction set; dispatch.cpp chooses.
//
// All threads walk through the list together. Of an instruction over rows each thread computes the
// rows that are its own, and goes on without looking at the others; products and attention are
// shared out otherwise. Whoever wrote the tape knows where one thread reads what another has
// written, and marks the instructions before which they wait for each other.
#include "tape.h"

#include <omp.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <exception>
#include <stdexcept>

#include "vectors.h"

namespace crossfade {
inline namespace CF_ISA {

void attention_part(const Attention&, int rank, int size);

namespace {

// ---- Numbers ------------------------------------------------------------------------------------

constexpr int64_t kBytes[] = {4, 2, 2, 8, 1};  // of a number of each kind
int64_t bytes_of(Kind kind) { return kBytes[static_cast<int>(kind)]; }

// Numbers of an operand along the innermost dimension.
struct Line {
  char* at;
  Kind kind;
  int64_t stride;
};

float number(const Line& line, int64_t k) {
  const char* at = line.at + k * line.stride * bytes_of(line.kind);
  switch (line.kind) {
    case Kind::i64:
      return static_cast<float>(*reinterpret_cast<const int64_t*>(at));
    case Kind::boolean:
      return *at != 0;
    default:
      return load_first(static_cast<DType>(line.kind), at, 0, 1)[0];
  }
}

void put_number(const Line& line, int64_t k, float x) {
  char* at = line.at + k * line.stride * bytes_of(line.kind);
  switch (line.kind) {
    case Kind::f32:
      *reinterpret_cast<float*>(at) = x;
      return;
    case Kind::bf16:
      *reinterpret_cast<uint16_t*>(at) = to_bf16(x);
      return;
    case Kind::boolean:
      *at = x != 0;
      return;
    default:
      *reinterpret_cast<uint16_t*>(at) = to_f16(x);
  }
}

// Up to kLanes numbers from place k on; what is past `count` means nothing.
inline F32 fetch(const Line& line, int64_t k, int64_t count) {
  if (line.stride == 1 && line.kind <= Kind::f16) {
    const auto dtype = static_cast<DType>(line.kind);
    return count >= kLanes ? load_as(dtype, line.at, k) : load_first(dtype, line.at, k, count);
  }
  if (line.stride == 0) return splat(number(line, 0));
  float x[kLanes] = {};
  for (int64_t i = 0; i < std::min<int64_t>(count, kLanes); ++i) x[i] = number(line, k + i);
  return load(x);
}

inline void put(const Line& line, int64_t k, int64_t count, F32 x) {
  if (line.stride == 1 && line.kind <= Kind::f16) {
    if (line.kind == Kind::f32) return store_up_to(reinterpret_cast<float*>(line.at) + k, x, count);
    if (line.kind == Kind::bf16) return store_up_to(reinterpret_cast<Bf16*>(line.at) + k, x, count);
    return store_up_to(reinterpret_cast<F16*>(line.at) + k, x, count);
  }
  for (int64_t i = 0; i < std::min<int64_t>(count, kLanes); ++i) put_number(line, k + i, x[i]);
}

// ---- Functions ----------------------------------------------------------------------------------

template <class F>
inline F32 lane_by_lane(F32 x, F f) {
  for (int i = 0; i < kLanes; ++i) x[i] = f(x[i]);
  return x;
}

inline F32 sigmoid(F32 x) { return 1.0f / (1.0f + exp(-max(x, splat(-87.0f)))); }

// Near 0, where 1 - 2 / (1 + e^2x) would lose digits, the series of tanh to x^9: to 2e-7.
inline F32 tanh(F32 x) {
  const F32 x2 = x * x;
  F32 p = splat(62.0f / 2835);
  p = fma(p, x2, splat(-17.0f / 315));
  p = fma(p, x2, splat(2.0f / 15));
  p = fma(p, x2, splat(-1.0f / 3));
  const F32 small = fma(p * x2, x, x);
  const F32 far = soft_capped(x, 1.0f);
  return x2 < 0.0625f ? small : far;
}

// Abramowitz and Stegun, 7.1.26: the error is at most 1.5e-7.
inline F32 erf(F32 x) {
  const F32 size = bit_cast<F32>(bit_cast<U32>(x) & 0x7FFFFFFFu);
  const F32 t = 1.0f / fma(size, splat(0.3275911f), splat(1.0f));
  F32 p = splat(1.061405429f);
  p = fma(p, t, splat(-1.453152027f));
  p = fma(p, t, splat(1.421413741f));
  p = fma(p, t, splat(-0.284496736f));
  p = fma(p, t, splat(0.254829592f));
  const F32 y = 1.0f - p * t * exp(-size * size);
  return x < 0.0f ? -y : y;
}

inline F32 power(F32 x, float exponent) {
  if (exponent == 2.0f) return x * x;
  if (exponent == 3.0f) return x * x * x;
  return lane_by_lane(x, [&](float v) { return std::pow(v, exponent); });
}

inline F32 root(F32 x) {
  return lane_by_lane(x, [](float v) { return std::sqrt(v); });
}

// ---- Loops --------------------------------------------------------------------------------------

using Bases = char* const*;

// Calls f(lines) for each line of an instruction whose first index is within [begin, end): with the
// result's line, and then the operands'.
template <class F>
void for_lines(const TapeInstruction& i, Bases bases, int64_t begin, int64_t end, F f) {
  const int count = 1 + i.inputs;
  Line line[1 + kTapeInputs];
  char* start[1 + kTapeInputs];
  for (int n = 0; n < count; ++n) {
    const TapeTensor& t = n == 0 ? i.out : i.in[n - 1];
    start[n] = bases[t.base] + t.offset;
    line[n] = {nullptr, t.kind, t.stride[kTapeDims - 1]};
  }
  for (int64_t a = begin; a < end; ++a)
    for (int64_t b = 0; b < i.shape[1]; ++b)
      for (int64_t c = 0; c < i.shape[2]; ++c)
        for (int64_t d = 0; d < i.shape[3]; ++d) {
          for (int n = 0; n < count; ++n) {
            const int64_t* s = n == 0 ? i.out.stride : i.in[n - 1].stride;
            line[n].at =
                start[n] + (a * s[0] + b * s[1] + c * s[2] + d * s[3]) * bytes_of(line[n].kind);
          }
          f(line);
        }
}

template <int kInputs, class F>
void each(const TapeInstruction& i, Bases bases, int64_t begin, int64_t end, F f) {
  const int64_t n = i.shape[kTapeDims - 1];
  for_lines(i, bases, begin, end, [&](const Line* line) {
    for (int64_t k = 0; k < n; k += kLanes) {
      const int64_t count = n - k;
      if constexpr (kInputs == 1)
        put(line[0], k, count, f(fetch(line[1], k, count)));
      else if constexpr (kInputs == 2)
        put(line[0], k, count, f(fetch(line[1], k, count), fetch(line[2], k, count)));
      else
        put(line[0], k, count,
            f(fetch(line[1], k, count), fetch(line[2], k, count), fetch(line[3], k, count)));
    }
  });
}

// Copies between numbers of one kind, bit by bit.
void copy(const TapeInstruction& i, Bases bases, int64_t begin, int64_t end) {
  const int64_t n = i.shape[kTapeDims - 1], bytes = bytes_of(i.out.kind);
  for_lines(i, bases, begin, end, [&](const Line* line) {
    if (line[0].stride == 1 && line[1].stride == 1) {
      std::memcpy(line[0].at, line[1].at, n * bytes);
      return;
    }
    for (int64_t k = 0; k < n; ++k)
      std::memcpy(line[0].at + k * line[0].stride * bytes, line[1].at + k * line[1].stride * bytes,
                  bytes);
  });
}

// The sum of f(x) over a line, in float32 lanes and then in double.
template <class F>
double sum_over(const Line& x, int64_t n, F f) {
  F32 sum[2] = {};
  int64_t k = 0;
  for (; k + 2 * kLanes <= n; k += 2 * kLanes) {
    sum[0] += f(fetch(x, k, kLanes));
    sum[1] += f(fetch(x, k + kLanes, kLanes));
  }
  double total = 0;
  for (; k < n; k += kLanes) {
    const F32 last = f(fetch(x, k, n - k));
    for (int64_t j = 0; j < std::min<int64_t>(kLanes, n - k); ++j) total += last[j];
  }
  for (int j = 0; j < kLanes; ++j) total += static_cast<double>(sum[0][j]) + sum[1][j];
  return total;
}

void sum(const TapeInstruction& i, Bases bases, int64_t begin, int64_t end) {
  const int64_t n = i.shape[kTapeDims - 1];
  for_lines(i, bases, begin, end, [&](const Line* line) {
    const double total = sum_over(line[1], n, [](F32 x) { return x; });
    put_number(line[0], 0, static_cast<float>(total * i.number[0]));
  });
}

// (x - mean) / sqrt(variance + eps) * weight + bias
void layer_norm(const TapeInstruction& i, Bases bases, int64_t begin, int64_t end) {
  const int64_t n = i.shape[kTapeDims - 1];
  for_lines(i, bases, begin, end, [&](const Line* line) {
    const float mean = sum_over(line[1], n, [](F32 x) { return x; }) / n;
    const double squares = sum_over(line[1], n, [&](F32 x) { return (x - mean) * (x - mean); });
    const float scale = 1.0 / std::sqrt(squares / n + i.number[0]);
    for (int64_t k = 0; k < n; k += kLanes) {
      const F32 y = (fetch(line[1], k, n - k) - mean) * scale;
      put(line[0], k, n - k, fma(y, fetch(line[2], k, n - k), fetch(line[3], k, n - k)));
    }
  });
}

// Rows of a table, by their numbers. Its rows are stride[0] numbers apart; there are `index`.
void embedding(const TapeInstruction& i, Bases bases, int64_t begin, int64_t end) {
  const TapeTensor& table = i.in[1];
  const int64_t n = i.shape[kTapeDims - 1], bytes = bytes_of(table.kind);
  TapeInstruction by_id = i;
  by_id.inputs = 1;
  for_lines(by_id, bases, begin, end, [&](const Line* line) {
    const int64_t id = *reinterpret_cast<const int64_t*>(line[1].at);
    if (id < 0 || id >= i.index)
      throw std::out_of_range("token " + std::to_string(id) + " is not within [0, " +
                              std::to_string(i.index) + ")");
    std::memcpy(line[0].at, bases[table.base] + table.offset + id * table.stride[0] * bytes,
                n * bytes);
  });
}

// Computes the rows [begin, end) of an instruction that is neither a product nor attention.
void run_rows(const TapeInstruction& i, Bases bases, int64_t begin, int64_t end) {
  const float p = i.number[0], q = i.number[1];
#define CF_UNARY(name, result) \
  case TapeOp::name:           \
    return each<1>(i, bases, begin, end, [&](F32 x) { return result; });
#define CF_BINARY(name, result) \
  case TapeOp::name:            \
    return each<2>(i, bases, begin, end, [&](F32 x, F32 y) { return result; });
  switch (i.op) {
    CF_UNARY(convert, x)
    CF_UNARY(neg, -x)
    CF_UNARY(abs, bit_cast<F32>(bit_cast<U32>(x) & 0x7FFFFFFFu))
    CF_UNARY(pow, power(x, p))
    CF_UNARY(sqrt, root(x))
    CF_UNARY(rsqrt, 1.0f / root(x))
    CF_UNARY(reciprocal, 1.0f / x)
    CF_UNARY(exp, lane_by_lane(x, [](float v) { return std::exp(v); }))
    CF_UNARY(cos, lane_by_lane(x, [](float v) { return std::cos(v); }))
    CF_UNARY(sin, lane_by_lane(x, [](float v) { return std::sin(v); }))
    CF_UNARY(tanh, tanh(x))
    CF_UNARY(erf, erf(x))
    CF_UNARY(sigmoid, sigmoid(x))
    CF_UNARY(silu, x * sigmoid(x))
    CF_UNARY(relu, x > 0.0f ? x : (x == x ? F32{} : x))
    CF_UNARY(gelu, 0.5f * x * (1.0f + erf(x * 0.70710678f)))
    CF_UNARY(gelu_tanh, 0.5f * x * (1.0f + tanh(0.79788456f * fma(x * x * x, splat(0.044715f), x))))
    CF_UNARY(clamp, x < p ? splat(p) : (x > q ? splat(q) : x))
    CF_BINARY(add, fma(y, splat(p), x))
    CF_BINARY(sub, fma(y, splat(-p), x))
    CF_BINARY(mul, x * y)
    CF_BINARY(div, x / y)
    CF_BINARY(maximum, x != x ? x : (y != y ? y : (x > y ? x : y)))
    CF_BINARY(minimum, x != x ? x : (y != y ? y : (x < y ? x : y)))
    CF_BINARY(equal, x == y ? splat(1.0f) : F32{})
    CF_BINARY(less, x < y ? splat(1.0f) : F32{})
    CF_BINARY(at_most, x <= y ? splat(1.0f) : F32{})
    case TapeOp::where:
      return each<3>(i, bases, begin, end, [](F32 c, F32 x, F32 y) { return c != 0.0f ? x : y; });
    case TapeOp::copy:
      return copy(i, bases, begin, end);
    case TapeOp::sum:
      return sum(i, bases, begin, end);
    case TapeOp::layer_norm:
      return layer_norm(i, bases, begin, end);
    case TapeOp::embedding:
      return embedding(i, bases, begin, end);
    default:
      return;
  }
#undef CF_UNARY
#undef CF_BINARY
}

// ---- Products and attention ---------------------------------------------------------------------

template <class T>
T* address(Bases bases, const TapeTensor& t) {
  return reinterpret_cast<T*>(bases[t.base] + t.offset);
}

void run_linear(const Tape& tape, const TapeInstruction& i, Bases bases, int rank, int size) {
  Linear l = tape.linears[i.index];
  l.x.data = address<void>(bases, i.in[0]);
  l.y = address<void>(bases, i.out);
  if (l.rank > 0) l.scale = address<float>(bases, i.in[1]);
  linear_part(l, address<void>(bases, i.in[2]), rank, size);
}

constexpr int64_t kBlock = kProductVectors * kLanes;  // columns that a product takes at a time

// y = x weight + bias for a weight [in, out], whose rows are read one after the other.
template <class T>
void run_columns(const Linear& l, int rank, int size) {
  const int64_t blocks = (l.out + kBlock - 1) / kBlock;
  const int64_t first = blocks * rank / size * kBlock;
  const int64_t end = std::min(blocks * (rank + 1) / size * kBlock, l.out);
  const T *x = static_cast<const T*>(l.x.data), *bias = static_cast<const T*>(l.bias);
  static thread_local std::vector<float> wide, sums;
  wide.resize(l.rows * l.in);
  sums.resize(l.rows * kBlock);
  for (int64_t r = 0; r < l.rows; ++r)
    for (int64_t k = 0; k < l.in; k += kLanes)
      store_up_to(wide.data() + r * l.in + k, load_up_to(x + r * l.x.row_stride + k, l.in - k),
                  l.in - k);
  for (int64_t column = first; column < end; column += kBlock) {
    const int64_t count = std::min(kBlock, end - column);
    product(Strided<float>{wide.data(), l.in}, l.rows,
            Strided<T>{static_cast<const T*>(l.weight.data) + column, l.weight.row_stride}, l.in,
            count, sums.data(), kBlock, false);
    for (int64_t r = 0; r < l.rows; ++r)
      for (int64_t k = 0; k < count; k += kLanes) {
        F32 y = load(sums.data() + r * kBlock + k);
        if (bias) y += load_up_to(bias + column + k, count - k);
        store_up_to(static_cast<T*>(l.y) + r * l.out + column + k, y, count - k);
      }
  }
}

void run_columns(const Tape& tape, const TapeInstruction& i, Bases bases, int rank, int size) {
  Linear l = tape.linears[i.index];
  l.x.data = address<void>(bases, i.in[0]);
  l.y = address<void>(bases, i.out);
  switch (l.weight.dtype) {
    case DType::f32:
      return run_columns<float>(l, rank, size);
    case DType::bf16:
      return run_columns<Bf16>(l, rank, size);
    default:
      return run_columns<F16>(l, rank, size);
  }
}

void run_attention(const Tape& tape, const TapeInstruction& i, Bases bases, int rank, int size) {
  Attention a = tape.attentions[i.index];
  a.query.data = address<void>(bases, i.in[0]);
  a.key.data = address<void>(bases, i.in[1]);
  a.value.data = address<void>(bases, i.in[2]);
  a.lengths = address<int64_t>(bases, i.in[3]);
  if (i.inputs > 4) a.cache_row = address<int64_t>(bases, i.in[4]);
  a.out.data = address<void>(bases, i.out);
  attention_part(a, rank, size);
}

// The rows of `count` that a thread computes.
int64_t share(int64_t count, int64_t rank, int64_t size) {
  return (count * rank + size - 1) / size;
}

void run(const Tape& tape, const TapeInstruction& i, Bases bases, int rank, int size) {
  switch (i.op) {
    case TapeOp::linear:
      return run_linear(tape, i, bases, rank, size);
    case TapeOp::linear_columns:
      return run_columns(tape, i, bases, rank, size);
    case TapeOp::attention:
      return run_attention(tape, i, bases, rank, size);
    default:
      run_rows(i, bases, share(i.shape[0], rank, size), share(i.shape[0], rank + 1, size));
  }
}

}  // namespace

void tape_run(const Tape& tape, char* const* bases, int64_t begin, int64_t end, int threads) {
  std::atomic<bool> failed{false};
  std::exception_ptr thrown;
  const auto walk = [&](int rank, int size) {
    for (int64_t n = begin; n < end; ++n) {
      const TapeInstruction& i = tape.instructions[n];
      if (i.wait && size > 1) {
#pragma omp barrier
      }
      // No exception may leave a thread. The others go on, as they will wait for this one.
      try {
        run(tape, i, bases, rank, size);
      } catch (...) {
        if (!failed.exchange(true)) thrown = std::current_exception();
      }
    }
  };
  if (threads <= 1) {
    walk(0, 1);
  } else {
#pragma omp parallel num_threads(threads)
    walk(omp_get_thread_num(), omp_get_num_threads());
  }
  if (thrown) std::rethrow_exception(thrown);
}

}  // namespace CF_ISA
}  // namespace crossfade
