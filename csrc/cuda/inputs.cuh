// The rows that a blend reads: eight numbers at once of any of three dtypes, and the normalisers of
// terms.
#pragma once
#include <cfloat>

#include "../crossfade.h"
#include "team.cuh"

namespace crossfade {
namespace cuda {

constexpr uint32_t kWidth = Slice::kWidth;
typedef float Eight[kWidth];

__device__ __forceinline__ bool is_finite(float x) { return fabsf(x) < INFINITY; }

// A word whose bit i says whether test(i), for each i below kWidth.
template <class Test>
__device__ __forceinline__ uint32_t which(Test test) {
  uint32_t bits = 0;
#pragma unroll
  for (uint32_t i = 0; i < kWidth; ++i) bits |= (test(i) ? 1u : 0u) << i;
  return bits;
}

// x[i] for an i that the compiler does not know. x stays in registers.
template <class T>
__device__ __forceinline__ T pick(const T (&x)[kWidth], uint32_t i) {
  T found = x[0];
#pragma unroll
  for (uint32_t j = 1; j < kWidth; ++j) found = j == i ? x[j] : found;
  return found;
}

// 2^x. Results below the smallest normal number are 0, which saves the instructions for them.
__device__ __forceinline__ float exp2_of(float x) {
#ifdef CF_EMULATED
  return exp2f(x);
#else
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

constexpr float kLog2E = 1.4426950408889634f;

// e^x
__device__ __forceinline__ float exp_of(float x) { return exp2_of(x * kLog2E); }

// What a kernel knows of the inputs when it is compiled: that all have this dtype and are aligned
// to 16 bytes, or nothing (`any`). The first three have the numbers of DType.
enum class Format : int { f32, bf16, f16, any };

// One row of a term or value.
struct alignas(16) Input {
  const void* row;
  float weight;
  uint16_t column;  // its number among the terms and then the values
  uint8_t dtype;
  bool aligned;  // to 16 bytes, so that eight tokens are one or two vector loads

  __device__ bool wide() const { return dtype == static_cast<uint8_t>(DType::f32); }
  __device__ bool narrow() const { return !wide() && aligned; }
};

__device__ __forceinline__ Input input_of(const Matrix& m, int64_t row, float weight, int column) {
  const int64_t bytes = m.dtype == DType::f32 ? 4 : 2;
  const char* data = static_cast<const char*>(m.data) + row * m.row_stride * bytes;
  return {data, weight, static_cast<uint16_t>(column), static_cast<uint8_t>(m.dtype),
          reinterpret_cast<uintptr_t>(data) % 16 == 0};
}

// Eight numbers as they lie in memory: four float32 in each of a and b, or eight 16-bit numbers in
// a. Loading and unpacking are two functions, so that several loads can be under way.
struct Raw {
  uint4 a, b;
};

// Past the last token, the last one is read again.
__device__ __forceinline__ Raw load(const Input& in, uint32_t v, uint32_t vocab) {
  Raw raw{};
  if (in.aligned && v + kWidth <= vocab) {
    const uint4* p = static_cast<const uint4*>(in.row) + v / (in.wide() ? 4 : 8);
    raw.a = __ldg(p);
    if (in.wide()) raw.b = __ldg(p + 1);
    return raw;
  }
  uint32_t w[kWidth];
  const uint32_t last = vocab - 1;
  if (in.wide()) {
#pragma unroll
    for (uint32_t i = 0; i < kWidth; ++i)
      w[i] = __ldg(static_cast<const uint32_t*>(in.row) + min(v + i, last));
    return {{w[0], w[1], w[2], w[3]}, {w[4], w[5], w[6], w[7]}};
  }
#pragma unroll
  for (uint32_t i = 0; i < kWidth; ++i)
    w[i] = __ldg(static_cast<const uint16_t*>(in.row) + min(v + i, last));
  raw.a = {w[0] | w[1] << 16, w[2] | w[3] << 16, w[4] | w[5] << 16, w[6] | w[7] << 16};
  return raw;
}

__device__ __forceinline__ float from_f16(uint32_t bits) {
  return __half2float(__ushort_as_half(static_cast<unsigned short>(bits)));
}

template <Format kFormat>
__device__ __forceinline__ void unpack(const Raw& raw, Eight& x) {
  const uint32_t words[kWidth] = {raw.a.x, raw.a.y, raw.a.z, raw.a.w,
                                  raw.b.x, raw.b.y, raw.b.z, raw.b.w};
#pragma unroll
  for (uint32_t i = 0; i < kWidth; ++i) {
    const uint32_t pair = words[i / 2];
    if (kFormat == Format::f32) x[i] = float_of(words[i]);
    if (kFormat == Format::bf16) x[i] = float_of(i % 2 ? pair & 0xFFFF0000u : pair << 16);
    if (kFormat == Format::f16) x[i] = from_f16(i % 2 ? pair >> 16 : pair & 0xFFFFu);
  }
}

__device__ __forceinline__ void unpack(const Input& in, const Raw& raw, Eight& x) {
  if (in.wide()) return unpack<Format::f32>(raw, x);
  if (in.dtype == static_cast<uint8_t>(DType::bf16)) return unpack<Format::bf16>(raw, x);
  unpack<Format::f16>(raw, x);
}

__device__ __forceinline__ float number_at(const Input& in, uint32_t v) {
  if (in.wide()) return __ldg(static_cast<const float*>(in.row) + v);
  const uint32_t bits = __ldg(static_cast<const uint16_t*>(in.row) + v);
  return in.dtype == static_cast<uint8_t>(DType::bf16) ? float_of(bits << 16) : from_f16(bits);
}

// The sum of 2^((x - max) * rate). `max` is at least as large as all x.
__device__ __forceinline__ float sum_of_exp(const Eight& x, float max, float rate) {
  const float from = fmaxf(max, -FLT_MAX);  // so that x - from is -inf where all are
  float sum = exp2_of((x[0] - from) * rate);
#pragma unroll
  for (uint32_t i = 1; i < kWidth; ++i) sum += exp2_of((x[i] - from) * rate);
  return sum;
}

// log of a running sum of exp(scale * x), as scale * max + log(sum of exp(scale * (x - max))).
// NaN and +inf make the sum NaN.
struct LogSum {
  float max = -INFINITY, sum = 0;

  // `top` is at least as large as all x.
  __device__ void add(const Eight& x, float top) {
    if (top > max) {
      sum *= exp_of(max - top);
      max = top;
    }
    sum += sum_of_exp(x, max, kLog2E);
  }

  // Adds other > 0 numbers' sum.
  __device__ void add(const LogSum& other, float scale) {
    const float most = fmaxf(max, other.max);
    sum = sum * exp_of((max - most) * scale) + other.sum * exp_of((other.max - most) * scale);
    max = most;
  }

  // The sum over all lanes.
  __device__ LogSum over_warp(float scale = 1) const {
    LogSum all;
    all.max = warp_reduce(max, [](float a, float b) { return fmaxf(a, b); });
    const float own = max == all.max ? sum : sum * exp_of((max - all.max) * scale);
    all.sum = warp_reduce(own, [](float a, float b) { return a + b; });
    return all;
  }

  __device__ float log_sum() const { return logf(sum); }
  __device__ bool finite() const { return is_finite(max) && is_finite(sum); }
};

// A term's normaliser: log p = (z - max) - log_sum. It is NaN if the logits are no distribution.
struct LogZ {
  float max, log_sum;

  __device__ bool finite() const { return is_finite(log_sum); }
  __device__ float log_p(float z) const { return (z - max) - log_sum; }
};

}  // namespace cuda
}  // namespace crossfade
