// Unpacking of weight rows and multiplying tiles with AVX-512, shared by the AVX-512 translation units. Everything is
// in an anonymous namespace, so that each unit keeps its own copy, built with its own flags. Block layouts are
// described in quants.h.
#pragma once

#include <immintrin.h>

#include "kernels/linear/linear_rows-inl.h"
#include "kernels/quants/code_tables.h"

namespace lesskv::internal {
namespace {

inline float HalfAt(const uint8_t* p) { return _cvtsh_ss(Load16(p)); }

inline __m128i LoadCodes16(const uint8_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }
inline __m128i LowNibbles(__m128i v) { return _mm_and_si128(v, _mm_set1_epi8(15)); }
inline __m128i HighNibbles(__m128i v) { return _mm_and_si128(_mm_srli_epi16(v, 4), _mm_set1_epi8(15)); }

inline __m512 UnsignedToFloat(__m128i codes) { return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(codes)); }
inline __m512 SignedToFloat(__m128i codes) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(codes)); }

inline __m256 BytesToFloat8(uint64_t bytes) {
  return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_cvtsi64_si128(static_cast<long long>(bytes))));
}

// The entries of a table that sixteen nibbles, or four times sixteen, stand for.
inline __m128i LoadTable(const int8_t table[16]) { return LoadCodes16(reinterpret_cast<const uint8_t*>(table)); }
inline __m128i LookUp(__m128i table, __m128i nibbles) { return _mm_shuffle_epi8(table, nibbles); }
inline __m512i LookUp(__m128i table, __m512i nibbles) {
  return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(table), nibbles);
}

// The eight scales of an IQ4_XS block, times its d. Four low and two upper bits each are spread over the bytes of a
// word by halves, quarters and so on.
inline __m256 Iq4XsScales(const uint8_t* block) {
  uint64_t low = Load32(block + 4), high = Load16(block + 2);
  low = (low | low << 16) & 0x0000ffff0000ffffu;
  low = (low | low << 8) & 0x00ff00ff00ff00ffu;
  low = (low | low << 4) & 0x0f0f0f0f0f0f0f0fu;
  high = (high | high << 24) & 0x000000ff000000ffu;
  high = (high | high << 12) & 0x000f000f000f000fu;
  high = (high | high << 6) & 0x0303030303030303u;
  const __m256 scales = _mm256_sub_ps(BytesToFloat8(low | high << 4), _mm256_set1_ps(32));
  return _mm256_mul_ps(scales, _mm256_set1_ps(HalfAt(block)));
}

// The sixteen scales of a Q3_K block, times its d.
inline __m512 Q3Scales(const uint8_t* block) {
  const uint8_t* packed = block + 96;
  const uint64_t low = Load32(packed) | uint64_t{Load32(packed + 4)} << 32;
  const uint64_t high = Load32(packed + 8);  // bits 2 i and 2 i + 1 of byte b: scale 4 i + b
  const uint64_t first = (high | (high >> 2) << 32) & 0x0303030303030303u;
  const uint64_t second = (high >> 4 | (high >> 6) << 32) & 0x0303030303030303u;
  const uint64_t nibbles = 0x0f0f0f0f0f0f0f0fu;
  const __m128i scales = _mm_set_epi64x(static_cast<long long>(((low >> 4) & nibbles) | second << 4),
                                        static_cast<long long>((low & nibbles) | first << 4));
  return _mm512_mul_ps(SignedToFloat(_mm_sub_epi8(scales, _mm_set1_epi8(32))), _mm512_set1_ps(HalfAt(block + 108)));
}

// The sixteen scales of a Q2_K block, times its d, and its sixteen minimums, times its dmin.
inline __m512 Q2Scales(const uint8_t* block) {
  return _mm512_mul_ps(UnsignedToFloat(LowNibbles(LoadCodes16(block))), _mm512_set1_ps(HalfAt(block + 80)));
}
inline __m512 Q2Mins(const uint8_t* block) {
  return _mm512_mul_ps(UnsignedToFloat(HighNibbles(LoadCodes16(block))), _mm512_set1_ps(HalfAt(block + 82)));
}

// A sink receives a row 32 elements at a time; it is passed by value and returned, so that its accumulators stay in
// registers: Put(i, elements i..i+15, elements i+16..i+31), and for the types without
// blocks a last PutTail(i, ..., count) with count < 32 and zeros beyond.
template <DType kType>
struct Unpacker;

// Sixteen elements of a row from element i, those of the mask; zeros elsewhere.
template <DType kType>
inline __m512 LoadFloats(const uint8_t* row, size_t i, __mmask16 mask) {
  if constexpr (kType == DType::kF32) return _mm512_maskz_loadu_ps(mask, row + i * 4);
  const __m256i halves = _mm256_maskz_loadu_epi16(mask, row + i * 2);
  if constexpr (kType == DType::kF16) return _mm512_cvtph_ps(halves);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}

template <DType kType>
struct FloatUnpacker {
  template <typename Sink>
  static inline Sink Row(const uint8_t* row, size_t n, Sink sink) {
    size_t i = 0;
    for (; i + 32 <= n; i += 32) sink.Put(i, LoadFloats<kType>(row, i, 0xffff), LoadFloats<kType>(row, i + 16, 0xffff));
    if (i == n) return sink;
    const uint32_t mask = (1u << (n - i)) - 1;
    sink.PutTail(i, LoadFloats<kType>(row, i, static_cast<__mmask16>(mask)),
                 LoadFloats<kType>(row, i + 16, static_cast<__mmask16>(mask >> 16)), n - i);
    return sink;
  }
};

template <>
struct Unpacker<DType::kF32> : FloatUnpacker<DType::kF32> {};
template <>
struct Unpacker<DType::kF16> : FloatUnpacker<DType::kF16> {};
template <>
struct Unpacker<DType::kBF16> : FloatUnpacker<DType::kBF16> {};

template <>
struct Unpacker<DType::kQ8_0> {
  template <typename Sink>
  static inline Sink Row(const uint8_t* row, size_t n, Sink sink) {
    for (size_t i = 0; i < n; i += 32, row += 34) {
      const __m512 d = _mm512_set1_ps(HalfAt(row));
      sink.Put(i, _mm512_mul_ps(d, SignedToFloat(LoadCodes16(row + 2))),
               _mm512_mul_ps(d, SignedToFloat(LoadCodes16(row + 18))));
    }
    return sink;
  }
};

template <>
struct Unpacker<DType::kQ4_0> {
  template <typename Sink>
  static inline Sink Row(const uint8_t* row, size_t n, Sink sink) {
    for (size_t i = 0; i < n; i += 32, row += 18) {
      const float scale = HalfAt(row);
      const __m512 d = _mm512_set1_ps(scale), offset = _mm512_set1_ps(-8 * scale);
      const __m128i codes = LoadCodes16(row + 2);
      sink.Put(i, _mm512_fmadd_ps(UnsignedToFloat(LowNibbles(codes)), d, offset),
               _mm512_fmadd_ps(UnsignedToFloat(HighNibbles(codes)), d, offset));
    }
    return sink;
  }
};

template <>
struct Unpacker<DType::kQ4_1> {
  template <typename Sink>
  static inline Sink Row(const uint8_t* row, size_t n, Sink sink) {
    for (size_t i = 0; i < n; i += 32, row += 20) {
      const __m512 d = _mm512_set1_ps(HalfAt(row)), offset = _mm512_set1_ps(HalfAt(row + 2));
      const __m128i codes = LoadCodes16(row + 4);
      sink.Put(i, _mm512_fmadd_ps(UnsignedToFloat(LowNibbles(codes)), d, offset),
               _mm512_fmadd_ps(UnsignedToFloat(HighNibbles(codes)), d, offset));
    }
    return sink;
  }
};

// Thirty-two entries of a table, times a scale.
template <typename Sink>
inline void PutEntries(size_t i, __m128i table, __m128i nibbles, float scale, Sink& sink) {
  const __m512 d = _mm512_set1_ps(scale);
  sink.Put(i, _mm512_mul_ps(d, SignedToFloat(LookUp(table, LowNibbles(nibbles)))),
           _mm512_mul_ps(d, SignedToFloat(LookUp(table, HighNibbles(nibbles)))));
}

template <>
struct Unpacker<DType::kIQ4_NL> {
  template <typename Sink>
  static inline Sink Row(const uint8_t* row, size_t n, Sink sink) {
    const __m128i table = LoadTable(kIq4Codes);
    for (size_t i = 0; i < n; i += 32, row += 18) PutEntries(i, table, LoadCodes16(row + 2), HalfAt(row), sink);
    return sink;
  }
};

template <>
struct Unpacker<DType::kMXFP4> {
  template <typename Sink>
  static inline Sink Row(const uint8_t* row, size_t n, Sink sink) {
    const __m128i table = LoadTable(kMxfp4Codes);
    for (size_t i = 0; i < n; i += 32, row += 17) PutEntries(i, table, LoadCodes16(row + 1), Mxfp4Scale(row[0]), sink);
    return sink;
  }
};

template <>
struct Unpacker<DType::kIQ4_XS> {
  template <typename Sink>
  static inline Sink Row(const uint8_t* row, size_t n, Sink sink) {
    const __m128i table = LoadTable(kIq4Codes);
    for (size_t i = 0; i < n; i += 256, row += 136) {
      alignas(32) float scale[8];
      _mm256_store_ps(scale, Iq4XsScales(row));
      for (size_t g = 0; g < 8; ++g) PutEntries(i + 32 * g, table, LoadCodes16(row + 8 + 16 * g), scale[g], sink);
    }
    return sink;
  }
};

// Q5_0 and Q5_1: the fifth bits of all 32 elements are one word, elements 0 to 15 (the low nibbles) first.
template <typename Sink>
inline void PutFiveBits(size_t i, __m128i nibbles, uint32_t fifth, __m512 d, __m512 offset, Sink& sink) {
  const __m128i bit = _mm_set1_epi8(16);
  const __m128i low = LowNibbles(nibbles), high = HighNibbles(nibbles);
  const __m128i a = _mm_mask_add_epi8(low, static_cast<__mmask16>(fifth), low, bit);
  const __m128i b = _mm_mask_add_epi8(high, static_cast<__mmask16>(fifth >> 16), high, bit);
  sink.Put(i, _mm512_fmadd_ps(UnsignedToFloat(a), d, offset), _mm512_fmadd_ps(UnsignedToFloat(b), d, offset));
}

template <>
struct Unpacker<DType::kQ5_0> {
  template <typename Sink>
  static inline Sink Row(const uint8_t* row, size_t n, Sink sink) {
    for (size_t i = 0; i < n; i += 32, row += 22) {
      const float scale = HalfAt(row);
      PutFiveBits(i, LoadCodes16(row + 6), Load32(row + 2), _mm512_set1_ps(scale), _mm512_set1_ps(-16 * scale), sink);
    }
    return sink;
  }
};

template <>
struct Unpacker<DType::kQ5_1> {
  template <typename Sink>
  static inline Sink Row(const uint8_t* row, size_t n, Sink sink) {
    for (size_t i = 0; i < n; i += 32, row += 24) {
      PutFiveBits(i, LoadCodes16(row + 8), Load32(row + 4), _mm512_set1_ps(HalfAt(row)),
                  _mm512_set1_ps(HalfAt(row + 2)), sink);
    }
    return sink;
  }
};

// The eight scale * d and -minimum * dmin of a Q4_K or Q5_K block.
struct FloatScales {
  alignas(32) float scale[8];
  alignas(32) float offset[8];

  inline explicit FloatScales(const uint8_t* block) {
    const PackedScales packed = UnpackScales(block);
    _mm256_store_ps(scale, _mm256_mul_ps(BytesToFloat8(packed.scales), _mm256_set1_ps(HalfAt(block))));
    _mm256_store_ps(offset, _mm256_mul_ps(BytesToFloat8(packed.minima), _mm256_set1_ps(-HalfAt(block + 2))));
  }

  template <typename Sink>
  inline void Put(size_t i, size_t sub_block, __m128i a, __m128i b, Sink& sink) const {
    const __m512 d = _mm512_set1_ps(scale[sub_block]), m = _mm512_set1_ps(offset[sub_block]);
    sink.Put(i + 32 * sub_block, _mm512_fmadd_ps(UnsignedToFloat(a), d, m), _mm512_fmadd_ps(UnsignedToFloat(b), d, m));
  }
};

template <>
struct Unpacker<DType::kQ4_K> {
  template <typename Sink>
  static inline Sink Row(const uint8_t* row, size_t n, Sink sink) {
    for (size_t i = 0; i < n; i += 256, row += 144) {
      const FloatScales scales(row);
      for (size_t j = 0; j < 4; ++j) {
        const __m128i a = LoadCodes16(row + 16 + 32 * j), b = LoadCodes16(row + 32 + 32 * j);
        scales.Put(i, 2 * j, LowNibbles(a), LowNibbles(b), sink);
        scales.Put(i, 2 * j + 1, HighNibbles(a), HighNibbles(b), sink);
      }
    }
    return sink;
  }
};

template <>
struct Unpacker<DType::kQ5_K> {
  template <typename Sink>
  static inline Sink Row(const uint8_t* row, size_t n, Sink sink) {
    const __m128i one = _mm_set1_epi8(1), bit = _mm_set1_epi8(16);
    for (size_t i = 0; i < n; i += 256, row += 176) {
      const FloatScales scales(row);
      __m128i fifth_a = LoadCodes16(row + 16), fifth_b = LoadCodes16(row + 32);  // bit s of byte l: element 32 s + l
      const auto with_fifth = [&](__m128i nibbles, __m128i fifth) {
        return _mm_mask_add_epi8(nibbles, _mm_test_epi8_mask(fifth, one), nibbles, bit);
      };
      for (size_t j = 0; j < 4; ++j) {
        const __m128i a = LoadCodes16(row + 48 + 32 * j), b = LoadCodes16(row + 64 + 32 * j);
        scales.Put(i, 2 * j, with_fifth(LowNibbles(a), fifth_a), with_fifth(LowNibbles(b), fifth_b), sink);
        fifth_a = _mm_srli_epi16(fifth_a, 1);
        fifth_b = _mm_srli_epi16(fifth_b, 1);
        scales.Put(i, 2 * j + 1, with_fifth(HighNibbles(a), fifth_a), with_fifth(HighNibbles(b), fifth_b), sink);
        fifth_a = _mm_srli_epi16(fifth_a, 1);
        fifth_b = _mm_srli_epi16(fifth_b, 1);
      }
    }
    return sink;
  }
};

// The 256 six-bit codes of a Q6_K block, 0 to 63, in element order: four vectors of 64.
inline void Q6Codes(const uint8_t* block, __m512i codes[4]) {
  const __m512i nibble = _mm512_set1_epi8(15), high = _mm512_set1_epi8(0x30);
  const __m512i left = _mm512_set_epi64(2, 2, 2, 2, 4, 4, 4, 4), right = _mm512_set_epi64(2, 2, 2, 2, 0, 0, 0, 0);
  for (size_t half = 0; half < 2; ++half) {
    const __m512i low4 = _mm512_loadu_si512(block + 64 * half);
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(block + 128 + 32 * half));
    const __m512i high2 = _mm512_broadcast_i64x4(bits);  // two bits of elements l, l + 32, l + 64, l + 96 in byte l
    codes[2 * half] =
        _mm512_or_si512(_mm512_and_si512(low4, nibble), _mm512_and_si512(_mm512_sllv_epi64(high2, left), high));
    codes[2 * half + 1] = _mm512_or_si512(_mm512_and_si512(_mm512_srli_epi16(low4, 4), nibble),
                                          _mm512_and_si512(_mm512_srlv_epi64(high2, right), high));
  }
}

inline __m512 Q6Scales(const uint8_t* block) {
  return _mm512_mul_ps(SignedToFloat(LoadCodes16(block + 192)), _mm512_set1_ps(HalfAt(block + 208)));
}

// The 256 two-bit codes of a Q2_K or Q3_K block, in element order: four vectors of 64.
inline void TwoBitCodes(const uint8_t* at, __m512i codes[4]) {
  const __m512i mask = _mm512_set1_epi8(3);
  const __m512i shifts[2] = {_mm512_set_epi64(2, 2, 2, 2, 0, 0, 0, 0), _mm512_set_epi64(6, 6, 6, 6, 4, 4, 4, 4)};
  for (size_t v = 0; v < 4; ++v) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at + 32 * (v / 2)));
    codes[v] = _mm512_and_si512(_mm512_srlv_epi64(_mm512_broadcast_i64x4(bits), shifts[v % 2]), mask);
  }
}

inline void Q2Codes(const uint8_t* block, __m512i codes[4]) { TwoBitCodes(block + 16, codes); }

// 0 to 7. Bit s of byte l of the mask is the third bit of element 32 s + l: turned left to bit 2 in both halves of each
// vector. A turn of 64-bit words moves neighbours' bits in as well; none of them comes to bit 2 of a byte.
inline void Q3Codes(const uint8_t* block, __m512i codes[4]) {
  TwoBitCodes(block + 32, codes);
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(block));
  const __m512i third = _mm512_broadcast_i64x4(bits), bit = _mm512_set1_epi8(4);
  const __m512i turns[4] = {_mm512_set_epi64(1, 1, 1, 1, 2, 2, 2, 2), _mm512_set_epi64(63, 63, 63, 63, 0, 0, 0, 0),
                            _mm512_set_epi64(61, 61, 61, 61, 62, 62, 62, 62),
                            _mm512_set_epi64(59, 59, 59, 59, 60, 60, 60, 60)};
  for (size_t v = 0; v < 4; ++v) {
    codes[v] = _mm512_or_si512(codes[v], _mm512_and_si512(_mm512_rolv_epi64(third, turns[v]), bit));
  }
}

// A block of 16 groups of 16: value(bytes, g) makes the floats of the sixteen codes of group g.
template <typename Value, typename Sink>
inline void PutSixteens(size_t i, const __m512i codes[4], int offset, const Value& value, Sink& sink) {
  for (size_t v = 0; v < 4; ++v) {
    const __m512i c = _mm512_sub_epi8(codes[v], _mm512_set1_epi8(static_cast<char>(offset)));
    sink.Put(i + 64 * v, value(_mm512_castsi512_si128(c), 4 * v), value(_mm512_extracti32x4_epi32(c, 1), 4 * v + 1));
    sink.Put(i + 64 * v + 32, value(_mm512_extracti32x4_epi32(c, 2), 4 * v + 2),
             value(_mm512_extracti32x4_epi32(c, 3), 4 * v + 3));
  }
}

// The same with values that are a scale times a code.
template <typename Sink>
inline void PutScaledSixteens(size_t i, const __m512i codes[4], int offset, __m512 scales, Sink& sink) {
  alignas(64) float scale[16];
  _mm512_store_ps(scale, scales);
  const auto value = [&](__m128i bytes, size_t g) {
    return _mm512_mul_ps(SignedToFloat(bytes), _mm512_set1_ps(scale[g]));
  };
  PutSixteens(i, codes, offset, value, sink);
}

template <>
struct Unpacker<DType::kQ2_K> {
  template <typename Sink>
  static inline Sink Row(const uint8_t* row, size_t n, Sink sink) {
    for (size_t i = 0; i < n; i += 256, row += 84) {
      __m512i codes[4];
      Q2Codes(row, codes);
      alignas(64) float scale[16], minimum[16];
      _mm512_store_ps(scale, Q2Scales(row));
      _mm512_store_ps(minimum, Q2Mins(row));
      const auto value = [&](__m128i bytes, size_t g) {
        return _mm512_fmsub_ps(SignedToFloat(bytes), _mm512_set1_ps(scale[g]), _mm512_set1_ps(minimum[g]));
      };
      PutSixteens(i, codes, 0, value, sink);
    }
    return sink;
  }
};

template <>
struct Unpacker<DType::kQ3_K> {
  template <typename Sink>
  static inline Sink Row(const uint8_t* row, size_t n, Sink sink) {
    for (size_t i = 0; i < n; i += 256, row += 110) {
      __m512i codes[4];
      Q3Codes(row, codes);
      PutScaledSixteens(i, codes, 4, Q3Scales(row), sink);
    }
    return sink;
  }
};

template <>
struct Unpacker<DType::kQ6_K> {
  template <typename Sink>
  static inline Sink Row(const uint8_t* row, size_t n, Sink sink) {
    for (size_t i = 0; i < n; i += 256, row += 210) {
      __m512i codes[4];
      Q6Codes(row, codes);
      PutScaledSixteens(i, codes, 32, Q6Scales(row), sink);
    }
    return sink;
  }
};

// --- Walking rows ---

// Rows that are read side by side, each the first of a share of a task's rows: memory serves several streams faster
// than one (by 15 % where docs/performance.md was measured).
constexpr size_t kStreams = 2;

// How far ahead of the bytes in use memory is fetched when `n_rows` rows are read side by side, `apart` rows from each
// other: a few KB, and past all of them when they are neighbours.
inline size_t PrefetchAhead(size_t n_rows, size_t row_bytes, size_t apart) {
  constexpr size_t kBytes = 2048;
  const size_t step = n_rows * row_bytes;
  return n_rows == 1 || apart > 1 ? kBytes : (kBytes + step - 1) / step * step;
}

// To the first cache (3) or the second (2).
template <int kLocality = 3>
inline void Prefetch(const uint8_t* p, size_t bytes) {
  for (size_t i = 0; i < bytes; i += 64) __builtin_prefetch(p + i, 0, kLocality);
}

// --- Many tokens ---

constexpr size_t kTileRows[kMaxGroupVectors] = {12, 12, 8, 6};  // with a group of 1, 2, ... vectors

// A tile of float32 or bfloat16. Lanes describes what 32 bits hold:
//   Element, kElements  one number of a row or token, and how many there are in 32 bits
//   Vec, Load(p)        those of sixteen tokens
//   Broadcast(p)        those of a row, beside each of them
//   AddProduct(a, b, c) c + a b
template <typename Lanes, size_t kVectors, size_t kRows>
void TileOfShape(const typename Lanes::Element* const* rows, size_t n, const typename Lanes::Element* group, float* acc,
                 bool first) {
  constexpr size_t kWidth = kVectors * kTokenLanes;
  __m512 sum[kRows][kVectors];
  const typename Lanes::Element* row[kRows];
#pragma GCC unroll 24
  for (size_t r = 0; r < kRows; ++r) {
    row[r] = rows[r];
#pragma GCC unroll 4
    for (size_t v = 0; v < kVectors; ++v) {
      sum[r][v] = first ? _mm512_setzero_ps() : _mm512_loadu_ps(acc + r * kWidth + v * kTokenLanes);
    }
  }
  for (size_t i = 0; i < n; ++i) {
    typename Lanes::Vec x[kVectors];
#pragma GCC unroll 4
    for (size_t v = 0; v < kVectors; ++v) x[v] = Lanes::Load(group + (i * kWidth + v * kTokenLanes) * Lanes::kElements);
#pragma GCC unroll 24
    for (size_t r = 0; r < kRows; ++r) {
      const typename Lanes::Vec w = Lanes::Broadcast(row[r] + i * Lanes::kElements);
#pragma GCC unroll 4
      for (size_t v = 0; v < kVectors; ++v) sum[r][v] = Lanes::AddProduct(w, x[v], sum[r][v]);
    }
  }
#pragma GCC unroll 24
  for (size_t r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (size_t v = 0; v < kVectors; ++v) _mm512_storeu_ps(acc + r * kWidth + v * kTokenLanes, sum[r][v]);
  }
}

template <typename Lanes>
void Tile(const typename Lanes::Element* const* rows, size_t n, const typename Lanes::Element* group, size_t vectors,
          float* acc, bool first) {
  switch (vectors) {
    case 1:
      return TileOfShape<Lanes, 1, kTileRows[0]>(rows, n, group, acc, first);
    case 2:
      return TileOfShape<Lanes, 2, kTileRows[1]>(rows, n, group, acc, first);
    case 3:
      return TileOfShape<Lanes, 3, kTileRows[2]>(rows, n, group, acc, first);
    default:
      return TileOfShape<Lanes, 4, kTileRows[3]>(rows, n, group, acc, first);
  }
}

}  // namespace
}  // namespace lesskv::internal
