// What attention and log-probs compute with: numbers of three dtypes as vectors of float32, and
// small matrix products in the two forms that read keys and values in the order of their memory.
#pragma once
#include <algorithm>
#include <utility>

#include "simd.h"

namespace crossfade {
inline namespace CF_ISA {

constexpr float kInf = __builtin_inff(), kNan = __builtin_nanf("");
constexpr float kLowest = -3.4028235e38f;  // below all scores, and finite, so that differences are

// ---- Numbers ----------------------------------------------------------------------------------

struct Bf16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};

inline F32 load(const Bf16* p) { return load_bf16(&p->bits); }
inline F32 load(const F16* p) { return load_f16(&p->bits); }

// The first `count` numbers at p, followed by zeros.
template <class T>
inline F32 load_up_to(const T* p, int64_t count) {
  if (count >= kLanes) return load(p);
  T part[kLanes] = {};
  std::copy_n(p, std::max<int64_t>(count, 0), part);
  return load(part);
}

inline void store(Bf16* p, F32 v) {
  const U32 bits = bit_cast<U32>(v);
  const U32 rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  const U32 result = (bits & 0x7FFFFFFFu) > 0x7F800000u ? U32{} + 0x7FC0u : rounded;
  const U16 narrow = __builtin_convertvector(result, U16);
  std::memcpy(p, &narrow, sizeof narrow);
}

inline void store(F16* p, F32 v) {
#if defined(__AVX512F__)
  const auto narrow = _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__AVX2__)
  const auto narrow = _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  const U32 bits = bit_cast<U32>(v), sign = bits & 0x80000000u, x = bits ^ sign;
  const U32 normal = (x - (112u << 23) + 0xFFFu + ((x >> 13) & 1u)) >> 13;
  const U32 denormal = bit_cast<U32>(bit_cast<F32>(x) + 0.5f) - 0x3F000000u;  // adding rounds
  const U32 special = x > 0x7F800000u ? U32{} + 0x7E00u : U32{} + 0x7C00u;
  const U32 small = x < 0x38800000u ? denormal : normal;
  const U32 result = (x >= 0x47800000u ? special : small) | (sign >> 16);
  const U16 narrow = __builtin_convertvector(result, U16);
#endif
  static_assert(sizeof narrow == 2 * kLanes, "one number a lane");
  std::memcpy(p, &narrow, sizeof narrow);
}

template <class T>
inline void store_up_to(T* p, F32 v, int64_t count) {
  if (count >= kLanes) return store(p, v);
  T part[kLanes];
  store(part, v);
  std::copy_n(part, count, p);
}

// cap * tanh(x / cap); NaN stays NaN.
inline F32 soft_capped(F32 x, float cap) {
  const F32 y = x * (2.0f / cap);
  const F32 e = exp(-max(-y, splat(-30.0f)));  // past 30, tanh is 1 in float32
  const F32 capped = cap - (2.0f * cap) / (e + 1.0f);
  return x == x ? capped : x;
}

// Which of the lanes that stand for s, s + 1, ... are within [begin, end).
inline I32 inside(int64_t s, int64_t begin, int64_t end) {
  I32 lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  const auto clamped = [](int64_t x) {
    return static_cast<int32_t>(std::max<int64_t>(std::min<int64_t>(x, kLanes), 0));
  };
  return (lane >= clamped(begin - s)) & (lane < clamped(end - s));
}

// ---- Transposing ------------------------------------------------------------------------------

// One step of a transposition: lanes j and j ^ H of `a` and `b` change places crosswise.
template <int H, int... J>
inline void exchange(F32& a, F32& b, std::integer_sequence<int, J...>) {
  const F32 low = __builtin_shufflevector(a, b, ((J & H) ? kLanes + J - H : J)...);
  b = __builtin_shufflevector(a, b, ((J & H) ? kLanes + J : J + H)...);
  a = low;
}

using Lanes = std::make_integer_sequence<int, kLanes>;

template <int H = 1>
inline void transpose(F32* v) {
  if constexpr (H < kLanes) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i)
      if (!(i & H)) exchange<H>(v[i], v[i + H], Lanes{});
    transpose<2 * H>(v);
  }
}

// Lane i of the result is the sum of vector i. The vectors are overwritten.
template <int H = 1>
inline F32 sums_of(F32* v) {
  if constexpr (H == kLanes) {
    return v[0];
  } else {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; i += 2 * H) {
      exchange<H>(v[i], v[i + H], Lanes{});
      v[i] += v[i + H];
    }
    return sums_of<2 * H>(v);
  }
}

// ---- Products ---------------------------------------------------------------------------------

template <class T>
struct Strided {
  const T* data;
  int64_t stride;
};

// Scores as dot products, for R query rows: scores[r][s] = query[r] . keys[s]. The keys are read in
// the order in which they lie, which hardware prefetching needs.
template <int R, class T>
inline void dots_of(const float* query, int64_t query_stride, const T* const* keys, int64_t size,
                    float* scores, int64_t scores_stride) {
  F32 sum[R][kLanes];
  for (int s = 0; s < kLanes; ++s) {
    F32 part[R] = {};
    int64_t d = 0;
    for (; d + kLanes <= size; d += kLanes) {
      const F32 k = load(keys[s] + d);
      for (int r = 0; r < R; ++r) part[r] += load(query + r * query_stride + d) * k;
    }
    if (d < size) {
      const F32 k = load_up_to(keys[s] + d, size - d);
      for (int r = 0; r < R; ++r) part[r] += load(query + r * query_stride + d) * k;
    }
    for (int r = 0; r < R; ++r) sum[r][s] = part[r];
  }
  for (int r = 0; r < R; ++r) store(scores + r * scores_stride, sums_of(sum[r]));
}

// scores [rows, count, padded] = query [rows, size, padded with zeros] keys^T
template <class T>
inline void dots(const float* query, int64_t query_stride, int64_t rows, Strided<T> keys,
                 int64_t count, int64_t size, float* scores, int64_t scores_stride) {
  for (int64_t s = 0; s < count; s += kLanes) {
    const T* key[kLanes];
    for (int i = 0; i < kLanes; ++i)  // past the end, the last one is read again
      key[i] = keys.data + std::min(s + i, count - 1) * keys.stride;
    for (int64_t r = 0; r < rows; r += 4) {
      const float* from = query + r * query_stride;
      float* to = scores + r * scores_stride + s;
      switch (std::min<int64_t>(rows - r, 4)) {
        case 1:
          dots_of<1>(from, query_stride, key, size, to, scores_stride);
          break;
        case 2:
          dots_of<2>(from, query_stride, key, size, to, scores_stride);
          break;
        case 3:
          dots_of<3>(from, query_stride, key, size, to, scores_stride);
          break;
        default:
          dots_of<4>(from, query_stride, key, size, to, scores_stride);
      }
    }
  }
}

// to [size, padded][count, padded with zeros] = from [count, size]^T
template <class T>
inline void transpose(Strided<T> from, int64_t count, int64_t size, float* to, int64_t to_stride) {
  for (int64_t s = 0; s < count; s += kLanes)
    for (int64_t d = 0; d < size; d += kLanes) {
      F32 v[kLanes];
      for (int i = 0; i < kLanes; ++i)
        v[i] = s + i < count ? load_up_to(from.data + (s + i) * from.stride + d, size - d) : F32{};
      transpose(v);
      for (int i = 0; i < kLanes; ++i) store(to + (d + i) * to_stride + s, v[i]);
    }
}

// C [R, V vectors] (+)= A [R, inner] B [inner, V vectors]. The last vector of B may have only
// `left` numbers.
template <int R, int V, bool kPart, class T>
inline void product_of(const float* a, int64_t a_stride, Strided<T> b, int64_t inner, float* c,
                       int64_t c_stride, bool add, int64_t left) {
  F32 sum[R][V];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) sum[r][v] = add ? load(c + r * c_stride + v * kLanes) : F32{};
  for (int64_t k = 0; k < inner; ++k) {
    const T* from = b.data + k * b.stride;
    F32 x[V];
    for (int v = 0; v < V; ++v)
      x[v] = kPart ? load_up_to(from + v * kLanes, left) : load(from + v * kLanes);
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < V; ++v) sum[r][v] += a[r * a_stride + k] * x[v];
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) store(c + r * c_stride + v * kLanes, sum[r][v]);
}

#if defined(__AVX512F__)
constexpr int kProductVectors = 4;  // 6 x 4 sums of 32 registers
#else
constexpr int kProductVectors = 2;  // 6 x 2 sums of 16
#endif

template <int V, bool kPart, class T>
inline void product_of_columns(Strided<float> a, int64_t rows, Strided<T> b, int64_t inner,
                               float* c, int64_t c_stride, bool add, int64_t left) {
  for (int64_t r = 0; r < rows; r += 6) {
    const float* from = a.data + r * a.stride;
    float* to = c + r * c_stride;
    switch (std::min<int64_t>(rows - r, 6)) {
      case 1:
        product_of<1, V, kPart>(from, a.stride, b, inner, to, c_stride, add, left);
        break;
      case 2:
        product_of<2, V, kPart>(from, a.stride, b, inner, to, c_stride, add, left);
        break;
      case 3:
        product_of<3, V, kPart>(from, a.stride, b, inner, to, c_stride, add, left);
        break;
      case 4:
        product_of<4, V, kPart>(from, a.stride, b, inner, to, c_stride, add, left);
        break;
      case 5:
        product_of<5, V, kPart>(from, a.stride, b, inner, to, c_stride, add, left);
        break;
      default:
        product_of<6, V, kPart>(from, a.stride, b, inner, to, c_stride, add, left);
    }
  }
}

// c [rows, columns, padded] (+)= a [rows, inner] b [inner, columns]
template <class T>
inline void product(Strided<float> a, int64_t rows, Strided<T> b, int64_t inner, int64_t columns,
                    float* c, int64_t c_stride, bool add) {
  constexpr int V = kProductVectors;
  for (int64_t v = 0; v < columns;) {
    const Strided<T> strip{b.data + v, b.stride};
    const int64_t left = columns - v;
    if (left >= V * kLanes) {
      product_of_columns<V, false>(a, rows, strip, inner, c + v, c_stride, add, left);
      v += V * kLanes;
    } else if (left >= kLanes) {
      product_of_columns<1, false>(a, rows, strip, inner, c + v, c_stride, add, left);
      v += kLanes;
    } else {
      product_of_columns<1, true>(a, rows, strip, inner, c + v, c_stride, add, left);
      v += kLanes;
    }
  }
}

}  // namespace CF_ISA
}  // namespace crossfade
