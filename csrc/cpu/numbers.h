// Single numbers of a dtype, and four at once.
#pragma once
#include "tiles.h"

namespace crossfade {
inline namespace CF_ISA {

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

}  // namespace CF_ISA
}  // namespace crossfade
