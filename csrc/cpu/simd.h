// One vector of floats for the instruction set that this file is compiled for: AVX-512, AVX2, or
// whatever the compiler makes of four lanes (SSE2, NEON). The arithmetic is written with the vector
// extensions of GCC and Clang; intrinsics stand only where those have no word for it.
#pragma once
#include <cstdint>
#include <cstring>

#ifdef __AVX2__
#include <immintrin.h>
#endif

#include "../crossfade.h"

// Every instruction set has a namespace of its own, so that the linker never takes one's inline
// function for another's.
#ifndef CF_ISA
#define CF_ISA baseline
#endif

namespace crossfade {
inline namespace CF_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float F32 __attribute__((vector_size(kLanes * 4)));
typedef int32_t I32 __attribute__((vector_size(kLanes * 4)));
typedef uint32_t U32 __attribute__((vector_size(kLanes * 4)));
typedef uint16_t U16 __attribute__((vector_size(kLanes * 2)));
typedef uint64_t U64 __attribute__((vector_size(kLanes * 4)));  // kLanes / 2 lanes

template <class To, class From>
inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

template <class V>
inline V load_bits(const void* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

inline F32 splat(float x) { return F32{} + x; }
inline F32 load(const float* p) { return load_bits<F32>(p); }
inline void store(float* p, F32 v) { std::memcpy(p, &v, sizeof v); }

// GCC's own conversions take four shuffles where there is an instruction.
inline U32 widen(const uint16_t* p) {
#if defined(__AVX512F__)
  return bit_cast<U32>(
      _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
#elif defined(__AVX2__)
  return bit_cast<U32>(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#else
  return __builtin_convertvector(load_bits<U16>(p), U32);
#endif
}

inline I32 widen(const uint8_t* p) {
#if defined(__AVX512F__)
  return bit_cast<I32>(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#elif defined(__AVX2__)
  return bit_cast<I32>(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
#else
  typedef uint8_t U8 __attribute__((vector_size(kLanes)));
  return __builtin_convertvector(load_bits<U8>(p), I32);
#endif
}

inline F32 load_bf16(const uint16_t* p) { return bit_cast<F32>(widen(p) << 16); }

inline F32 load_f16(const uint16_t* p) {
#if defined(__AVX512F__)
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__AVX2__)
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  const U32 h = widen(p);
  const U32 sign = (h & 0x8000u) << 16, exponent = h & 0x7C00u, mantissa = h & 0x03FFu;
  const U32 normal = ((h & 0x7FFFu) << 13) + (112u << 23);
  const U32 special = (mantissa << 13) | 0x7F800000u;
  const F32 denormal = __builtin_convertvector(bit_cast<I32>(mantissa), F32) * 0x1p-24f;
  const U32 large = exponent == 0x7C00u ? special : normal;
  return bit_cast<F32>((exponent == 0u ? bit_cast<U32>(denormal) : large) | sign);
#endif
}

// kLanes numbers of a matrix from element `i` of `data` on, as float32.
inline F32 load_as(DType dtype, const void* data, int64_t i) {
  switch (dtype) {
    case DType::f32:
      return load(static_cast<const float*>(data) + i);
    case DType::bf16:
      return load_bf16(static_cast<const uint16_t*>(data) + i);
    default:
      return load_f16(static_cast<const uint16_t*>(data) + i);
  }
}

// The first `count` < kLanes numbers from element `i` of `data` on, then zeros.
inline F32 load_first(DType dtype, const void* data, int64_t i, int64_t count) {
  const size_t size = dtype == DType::f32 ? 4 : 2;
  const char* from = static_cast<const char*>(data) + i * size;
#if defined(__AVX512F__)
  const __mmask16 lanes = (1u << count) - 1;
  if (dtype == DType::f32) return _mm512_maskz_loadu_ps(lanes, from);
  const __m256i numbers = _mm256_maskz_loadu_epi16(lanes, from);
#else
  float numbers[kLanes] = {};
  std::memcpy(numbers, from, count * size);
#endif
  return load_as(dtype, &numbers, 0);
}

// a * b + c, rounded once where the instruction set can do that.
inline F32 fma(F32 a, F32 b, F32 c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__AVX2__)
  return _mm256_fmadd_ps(a, b, c);
#else
  return a * b + c;
#endif
}

inline F32 max(F32 a, F32 b) {
#if defined(__AVX512F__)
  return _mm512_max_ps(a, b);
#elif defined(__AVX2__)
  return _mm256_max_ps(a, b);
#else
  return a > b ? a : b;
#endif
}

inline bool any(I32 mask) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask(bit_cast<__m512i>(mask), bit_cast<__m512i>(mask)) != 0;
#elif defined(__AVX2__)
  return _mm256_movemask_ps(bit_cast<__m256>(mask)) != 0;
#else
  int32_t set = 0;
  for (int i = 0; i < kLanes; ++i) set |= mask[i];
  return set != 0;
#endif
}

// Bit i says whether a[i] >= b[i].
inline uint32_t reaches(F32 a, F32 b) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ);
#elif defined(__AVX2__)
  return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GE_OQ));
#else
  const I32 is = a >= b;
  uint32_t bits = 0;
  for (int i = 0; i < kLanes; ++i) bits |= (is[i] & 1u) << i;
  return bits;
#endif
}

// The first `count` lanes, or all.
constexpr uint32_t kAllLanes = (1u << kLanes) - 1;
inline uint32_t first_lanes(int64_t count) {
  return count < kLanes ? (1u << count) - 1 : kAllLanes;
}

// x in the lanes whose bit is set, else 0.
inline F32 only(uint32_t lanes, F32 x) {
#if defined(__AVX512F__)
  return _mm512_maskz_mov_ps(static_cast<__mmask16>(lanes), x);
#else
  I32 bit;
  for (int i = 0; i < kLanes; ++i) bit[i] = 1 << i;
  return ((I32{} + static_cast<int32_t>(lanes)) & bit) != 0 ? x : F32{};
#endif
}

#if defined(__AVX2__) && !defined(__AVX512F__)
// order[lanes]: the numbers of the lanes that are set, in their order, a byte each.
struct LaneOrders {
  uint64_t order[256] = {};
  constexpr LaneOrders() {
    for (int lanes = 0; lanes < 256; ++lanes)
      for (uint64_t i = 0, at = 0; i < 8; ++i)
        if (lanes >> i & 1) order[lanes] |= i << 8 * at++;
  }
};
constexpr LaneOrders kLaneOrders;
#endif

// Writes those of x whose bit is set, one after the other. Whatever lies within a vector's length
// of `to` is overwritten. Returns how many there are.
inline int compress(F32 x, uint32_t lanes, float* to) {
#if defined(__AVX512F__)
  _mm512_storeu_ps(to, _mm512_maskz_compress_ps(static_cast<__mmask16>(lanes), x));
  return __builtin_popcount(lanes);
#elif defined(__AVX2__)
  const __m128i order = _mm_cvtsi64_si128(static_cast<int64_t>(kLaneOrders.order[lanes]));
  _mm256_storeu_ps(to, _mm256_permutevar8x32_ps(x, _mm256_cvtepu8_epi32(order)));
  return __builtin_popcount(lanes);
#else
  int count = 0;
  for (int i = 0; i < kLanes; ++i) {
    to[count] = x[i];
    count += lanes >> i & 1;
  }
  return count;
#endif
}

inline float max_of(F32 v) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps(v);
#else
  float m = v[0];
  for (int i = 1; i < kLanes; ++i) m = v[i] > m ? v[i] : m;
  return m;
#endif
}

inline double sum_of(F32 v) {
  double s = 0;
  for (int i = 0; i < kLanes; ++i) s += v[i];
  return s;
}

// The sums of four vectors. Each is taken in the same order: the two halves of the vector are
// added, then the two halves of the result, and so on.
typedef float F32x4 __attribute__((vector_size(16)));

inline F32x4 sums_of(F32 a, F32 b, F32 c, F32 d) {
#define CF_ADD(v, w, low, high) \
  __builtin_shufflevector(v, w, CF_LANES low) + __builtin_shufflevector(v, w, CF_LANES high)
#define CF_LANES(...) __VA_ARGS__
#if defined(__AVX512F__)
  const auto halves = [](F32 v, F32 w) {
    return CF_ADD(v, w, (0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23),
                  (8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31));
  };
  const F32 ab = halves(a, b), cd = halves(c, d);
  const F32 s = CF_ADD(ab, cd, (0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27),
                       (4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31));
  const F32 t = CF_ADD(s, s, (0, 1, 0, 1, 4, 5, 4, 5, 8, 9, 8, 9, 12, 13, 12, 13),
                       (2, 3, 2, 3, 6, 7, 6, 7, 10, 11, 10, 11, 14, 15, 14, 15));
  return CF_ADD(t, t, (0, 4, 8, 12), (1, 5, 9, 13));
#elif defined(__AVX2__)
  const auto halves = [](F32 v, F32 w) {
    return CF_ADD(v, w, (0, 1, 2, 3, 8, 9, 10, 11), (4, 5, 6, 7, 12, 13, 14, 15));
  };
  const F32 ab = halves(a, b), cd = halves(c, d);
  const F32 s = CF_ADD(ab, cd, (0, 1, 8, 9, 4, 5, 12, 13), (2, 3, 10, 11, 6, 7, 14, 15));
  return CF_ADD(s, s, (0, 4, 2, 6), (1, 5, 3, 7));
#else
  const F32 ab = CF_ADD(a, b, (0, 1, 4, 5), (2, 3, 6, 7));
  const F32 cd = CF_ADD(c, d, (0, 1, 4, 5), (2, 3, 6, 7));
  return CF_ADD(ab, cd, (0, 2, 4, 6), (1, 3, 5, 7));
#endif
#undef CF_LANES
#undef CF_ADD
}

inline float total_of(F32 v) {
  const F32x4 sums = sums_of(v, v, v, v);
  return sums[0];
}

// a[0], b[0], a[1], b[1] ..., in two vectors.
inline void interleave(F32 a, F32 b, F32& first, F32& second) {
#if defined(__AVX512F__)
  first = __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  second =
      __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
#elif defined(__AVX2__)
  first = __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
  second = __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
#else
  first = __builtin_shufflevector(a, b, 0, 4, 1, 5);
  second = __builtin_shufflevector(a, b, 2, 6, 3, 7);
#endif
}

inline uint16_t to_bf16(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  if (x != x) return (bits >> 16) | 0x40;
  return (bits + 0x7FFFu + (bits >> 16 & 1)) >> 16;
}

inline uint16_t to_f16(float x) {
#if defined(__AVX2__)
  return _cvtss_sh(x, 0);
#else
  const uint32_t bits = bit_cast<uint32_t>(x), size = bits & 0x7FFFFFFFu;
  const uint32_t sign = (bits ^ size) >> 16;
  if (size > 0x7F800000u) return sign | 0x7E00u;
  if (size >= 0x47800000u) return sign | 0x7C00u;  // 2^16 and more
  // below 2^-14 the sum with 1/2 rounds to multiples of 2^-24, the denormals
  if (size < 0x38800000u)
    return sign | (bit_cast<uint32_t>(bit_cast<float>(size) + 0.5f) - 0x3F000000u);
  return sign | ((size - (112u << 23) + 0xFFFu + (size >> 13 & 1)) >> 13);
#endif
}

// True in the lanes that are +-inf or NaN.
inline I32 not_finite(F32 v) {
  const U32 exponent = bit_cast<U32>(v) & 0x7F800000u;
  return exponent == 0x7F800000u;
}

// Replaces some x by e^x, for x <= 88, as 2^n 2^f, |f| <= 1/2, with a minimax polynomial that gives
// 1 at 0: relative error 3e-7 for |x| < 5, growing with |x| to 4e-6. For x below -87, and for -inf,
// it is 1.6e-38. Each step is done for all of them, as it must wait for the one before.
template <int count>
inline void exp(F32 (&x)[count]) {
  constexpr float log2_e = 1.44269504f, magic = 12582912.0f;  // 1.5 * 2^23
  constexpr float series[] = {0.00967151264f, 0.0555073374f, 0.240222421f, 0.693146978f, 1.0f};
  F32 shifted[count], f[count], p[count];
#define CF_EACH _Pragma("GCC unroll 8") for (int i = 0; i < count; ++i)
  CF_EACH x[i] = max(x[i], splat(-87.0f));
  CF_EACH shifted[i] = fma(x[i], splat(log2_e), splat(magic));  // so it rounds to an integer
  CF_EACH f[i] = fma(x[i], splat(log2_e), magic - shifted[i]);
  CF_EACH p[i] = splat(0.00132647271f);
#pragma GCC unroll 5
  for (const float c : series) {
    CF_EACH p[i] = fma(p[i], f[i], splat(c));
  }
  CF_EACH x[i] = bit_cast<F32>(bit_cast<U32>(p[i]) + (bit_cast<U32>(shifted[i]) << 23));
#undef CF_EACH
}

inline F32 exp(F32 x) {
  F32 one[1] = {x};
  exp(one);
  return one[0];
}

// log x of normal x > 0, to the last two float32 steps; log 0 is -inf.
inline F32 log(F32 x) {
  const I32 bits = bit_cast<I32>(x);
  const I32 e = ((bits - 0x3F3504F3) >> 23);  // x = 2^e * m, m within [sqrt(1/2), sqrt(2))
  const F32 m = bit_cast<F32>(bits - (e << 23)) - 1.0f;
  const F32 n = __builtin_convertvector(e, F32), m2 = m * m;
  F32 p = splat(7.0376836292e-2f);
  p = p * m - 1.1514610310e-1f;
  p = p * m + 1.1676998740e-1f;
  p = p * m - 1.2420140846e-1f;
  p = p * m + 1.4249322787e-1f;
  p = p * m - 1.6668057665e-1f;
  p = p * m + 2.0000714765e-1f;
  p = p * m - 2.4999993993e-1f;
  p = p * m + 3.3333331174e-1f;
  const F32 y = p * m * m2 - n * 2.12194440e-4f - 0.5f * m2;
  const F32 result = (m + y) + n * 0.693359375f;
  return x > 0.0f ? result : splat(-__builtin_inff());
}

// Philox on vectors keeps its words in 64-bit lanes. Their upper halves hold leftovers.
inline void mulhilo(U64 a, uint32_t b, U64& hi, U64& lo) {
#if defined(__AVX512F__)
  lo = bit_cast<U64>(_mm512_mul_epu32(bit_cast<__m512i>(a), _mm512_set1_epi64(b)));
#elif defined(__AVX2__)
  lo = bit_cast<U64>(_mm256_mul_epu32(bit_cast<__m256i>(a), _mm256_set1_epi64x(b)));
#else
  lo = (a & 0xFFFFFFFFu) * static_cast<uint64_t>(b);
#endif
  hi = lo >> 32;
}

}  // namespace CF_ISA
}  // namespace crossfade

#include "../blend_math.h"  // comes last, as its templates use the functions above
