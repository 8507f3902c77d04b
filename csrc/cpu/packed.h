// Products of rows of 8-bit numbers with weights of 8 or 4 bits.
//
// Weights are packed by blocks of 16 columns of y, so that they are read in the order in which they
// lie: a line of 64 bytes has four numbers of each of the block's columns, or eight of 4 bits. They
// are unsigned, as the instructions want one of their operands to be: what is subtracted from all
// of them is the same, so a row's sum of x is all that has to be known for it.
#pragma once
#include <algorithm>

#include "tiles.h"

namespace crossfade {
inline namespace CF_ISA {

constexpr int kBlock = 16;  // columns of y whose weights are packed together
constexpr int64_t kMostGroup = 256;
constexpr int kParts = kBlock / kLanes;  // vectors of a number for each of these columns
#if defined(__AVX512F__)
constexpr int kPackedRows = 8, kPackedStreams = 4;
#elif defined(__AVX2__)
constexpr int kPackedRows = 2, kPackedStreams = 2;
#else
constexpr int kPackedRows = 1, kPackedStreams = 1;
#endif

// A row's x, as x = scale * numbers in each group. A group with a number that is not finite has the
// scale NaN.
struct Rounded {
  int8_t* numbers;  // [rows, in]
  float* scale;     // [rows, groups]
  int32_t* sum;     // [rows, groups] of the numbers
};

// Rounds a group of x to the nearest of 255 multiples of its largest number / 127.
inline void round_group(const float* x, int64_t count, int8_t* numbers, float* scale,
                        int32_t* sum) {
  U32 most = {};
  for (int64_t k = 0; k < count; k += kLanes) {
    const U32 size = bit_cast<U32>(load(x + k)) & 0x7FFFFFFFu;
    most = size > most ? size : most;
  }
  uint32_t bits = 0;  // those of the largest magnitude, NaN being larger than any
  for (int i = 0; i < kLanes; ++i) bits = std::max<uint32_t>(bits, most[i]);
  const float largest = bit_cast<float>(bits);
  const bool finite = bits < 0x7F800000u, some = finite && largest > 0x1p-100f;
  const float step = some ? 127.0f / largest : 0.0f;
  *scale = some ? largest / 127.0f : finite ? 0.0f : __builtin_nanf("");
  I32 total = {};
  for (int64_t k = 0; k < count; k += kLanes) {
    constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
    I32 q = {};
    if (some) q = bit_cast<I32>(fma(load(x + k), splat(step), splat(kMagic))) - 0x4B400000;
    total += q;
    for (int i = 0; i < kLanes; ++i) numbers[k + i] = static_cast<int8_t>(q[i]);
  }
  *sum = 0;
  for (int i = 0; i < kLanes; ++i) *sum += total[i];
}

// The sums of 16 columns in int32. `add` adds the products of four numbers of each column, which
// begin at w, with four of x. With kNibbles, the bytes of w are below 16.
#if defined(__AVX512F__)
typedef __m512i Line;
inline Line load_line(const uint8_t* p) { return _mm512_loadu_si512(p); }
inline Line low_halves(Line w) { return _mm512_and_si512(w, _mm512_set1_epi8(15)); }
inline Line high_halves(Line w) { return low_halves(_mm512_srli_epi16(w, 4)); }

struct Sums {
  __m512i v;

  Sums() = default;
  explicit Sums(int32_t from) : v(_mm512_set1_epi32(from)) {}
  template <bool kNibbles>
  inline void add(Line w, int32_t four) {
    const __m512i x = _mm512_set1_epi32(four);
#ifdef __AVX512VNNI__
    v = _mm512_dpbusd_epi32(v, w, x);
#else
    __m512i pairs;
    if constexpr (kNibbles) {
      pairs = _mm512_maddubs_epi16(w, x);
    } else {  // magnitudes of the weights, so that sums of two products fit in 16 bits
      const __m512i from_128 = _mm512_xor_si512(w, _mm512_set1_epi8(-128));
      const __m512i turned =
          _mm512_mask_sub_epi8(x, _mm512_movepi8_mask(from_128), _mm512_setzero_si512(), x);
      pairs = _mm512_maddubs_epi16(_mm512_abs_epi8(from_128), turned);
    }
    v = _mm512_add_epi32(v, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
#endif
  }
  inline F32 part(int) const { return _mm512_cvtepi32_ps(v); }
};
#elif defined(__AVX2__)
struct Line {
  __m256i v[2];
};
inline Line load_line(const uint8_t* p) {
  return {{load_bits<__m256i>(p), load_bits<__m256i>(p + 32)}};
}
inline Line low_halves(Line w) {
  const __m256i mask = _mm256_set1_epi8(15);
  return {{_mm256_and_si256(w.v[0], mask), _mm256_and_si256(w.v[1], mask)}};
}
inline Line high_halves(Line w) {
  return low_halves({{_mm256_srli_epi16(w.v[0], 4), _mm256_srli_epi16(w.v[1], 4)}});
}

struct Sums {
  __m256i v[2];

  Sums() = default;
  explicit Sums(int32_t from) : v{_mm256_set1_epi32(from), _mm256_set1_epi32(from)} {}
  template <bool kNibbles>
  inline void add(Line w, int32_t four) {
    const __m256i x = _mm256_set1_epi32(four);
    for (int i = 0; i < 2; ++i) {
      __m256i pairs;
      if constexpr (kNibbles) {
        pairs = _mm256_maddubs_epi16(w.v[i], x);
      } else {  // magnitudes of the weights, so that sums of two products fit in 16 bits
        const __m256i from_128 = _mm256_xor_si256(w.v[i], _mm256_set1_epi8(-128));
        pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(from_128), _mm256_sign_epi8(x, from_128));
      }
      v[i] = _mm256_add_epi32(v[i], _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
    }
  }
  inline F32 part(int i) const { return _mm256_cvtepi32_ps(v[i]); }
};
#else
struct Line {
  uint8_t v[64];
};
inline Line load_line(const uint8_t* p) { return load_bits<Line>(p); }
inline Line low_halves(Line w) {
  for (uint8_t& byte : w.v) byte &= 15;
  return w;
}
inline Line high_halves(Line w) {
  for (uint8_t& byte : w.v) byte >>= 4;
  return w;
}

struct Sums {
  int32_t v[kBlock];

  Sums() = default;
  explicit Sums(int32_t from) {
    for (int32_t& sum : v) sum = from;
  }
  template <bool>
  inline void add(const Line& w, int32_t four) {
    int8_t x[4];
    std::memcpy(x, &four, 4);
    for (int n = 0; n < kBlock; ++n)
      for (int j = 0; j < 4; ++j) v[n] += w.v[4 * n + j] * x[j];
  }
  inline F32 part(int i) const {
    return __builtin_convertvector(load_bits<I32>(v + i * kLanes), F32);
  }
};
#endif
// What the bytes are above the numbers that they stand for. Without VNNI the sums above take 128
// from bytes themselves.
template <int kBits>
constexpr int32_t kOffset =
#if defined(__AVX2__) && !defined(__AVX512VNNI__)
    kBits == 8 ? 0 : 8;
#else
    kBits == 8 ? 128 : 8;
#endif

// The products of kRows rows with the columns of kBlocks blocks, which are `apart` from each other,
// into sums[row * kBlocks + block][column].
template <int kBits, int kRows, int kBlocks = 1>
void add_blocks(const Packed& p, int64_t in, const Rounded& x, int64_t row, int64_t block,
                int64_t apart, float (*sums)[kBlock], Ahead ahead) {
  constexpr int kPerLine = 32 / kBits;  // numbers of a column in a line
  const int64_t groups = in / p.group, bytes = in / kPerLine * kLine;
  const uint8_t* w = p.numbers + block * bytes;
  F32 sum[kRows][kBlocks][kParts] = {};
  for (int64_t g = 0; g < groups; ++g) {
    const int8_t* numbers = x.numbers + row * in + g * p.group;
    Sums dot[kRows][kBlocks];
    for (int m = 0; m < kRows; ++m)
      for (int b = 0; b < kBlocks; ++b)
        dot[m][b] = Sums(p.minima ? 0 : -kOffset<kBits> * x.sum[(row + m) * groups + g]);
    for (int64_t k = 0; k < p.group; k += kPerLine, w += kLine) {
      ahead.step();
#pragma GCC unroll 4
      for (int b = 0; b < kBlocks; ++b) {
        const Line line = load_line(w + b * apart * bytes);
        const auto add = [&](Line from, int64_t i) {
#pragma GCC unroll 8
          for (int m = 0; m < kRows; ++m)
            dot[m][b].template add<kBits == 4>(from, load_bits<int32_t>(numbers + m * in + i));
        };
        if constexpr (kBits == 8) {
          add(line, k);
        } else {
          add(low_halves(line), k);
          add(high_halves(line), k + 4);
        }
      }
    }
#pragma GCC unroll 4
    for (int b = 0; b < kBlocks; ++b) {
      const int64_t at = ((block + b * apart) * groups + g) * kBlock;
#pragma GCC unroll 4
      for (int i = 0; i < kParts; ++i) {
        const F32 scale = load_f16(p.scales + at + i * kLanes);
#pragma GCC unroll 8
        for (int m = 0; m < kRows; ++m) {
          const int64_t of = (row + m) * groups + g;
          sum[m][b][i] = fma(dot[m][b].part(i), scale * x.scale[of], sum[m][b][i]);
        }
        if (!p.minima) continue;
        const F32 low = load_f16(p.minima + at + i * kLanes);
#pragma GCC unroll 8
        for (int m = 0; m < kRows; ++m) {
          const int64_t of = (row + m) * groups + g;
          const float shift = x.scale[of] * static_cast<float>(x.sum[of]);
          sum[m][b][i] = fma(low, splat(shift), sum[m][b][i]);
        }
      }
    }
  }
  for (int m = 0; m < kRows; ++m)
    for (int b = 0; b < kBlocks; ++b)
      for (int i = 0; i < kParts; ++i) store(sums[m * kBlocks + b] + i * kLanes, sum[m][b][i]);
}

}  // namespace CF_ISA
}  // namespace crossfade
