// Quantised rows and rounded activations with AVX2, 32 elements at a time, shared by the translation units that
// multiply their codes as 8-bit numbers. Everything is in an anonymous namespace, so that each unit keeps its own copy,
// built with its own flags. Block layouts are described in quants.h.
#pragma once

#include <immintrin.h>

#include "kernels/linear/linear_rounding-inl.h"
#include "kernels/linear/linear_rows-inl.h"
#include "kernels/linear/unrolled-inl.h"
#include "kernels/quants/code_tables.h"

namespace lesskv::internal {
namespace {

inline float HalfAt(const uint8_t* p) { return _cvtsh_ss(Load16(p)); }

inline __m256i Load32Bytes(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
inline __m128i Load16Bytes(const uint8_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }

// --- x[i] = scale[i] * code[i] + offset, codes as signed bytes ---

struct Codes32 {
  __m256i codes;     // Q8_0 and the IQ4 types: -128..127; others: 0..63, without their offset
  float scale[2];    // of elements 0..15 and 16..31
  float minimum[2];  // added to these elements (Q4_1 and Q5_1, and minus the minimum of the K types)
};

inline Codes32 OneScale(__m256i codes, float scale, float minimum = 0) {
  return {codes, {scale, scale}, {minimum, minimum}};
}

inline __m256i SplitNibbles(__m128i v) {
  const __m256i shifted = _mm256_srlv_epi32(_mm256_broadcastsi128_si256(v), _mm256_set_epi32(4, 4, 4, 4, 0, 0, 0, 0));
  return _mm256_and_si256(shifted, _mm256_set1_epi8(15));
}

// Bit `from` of every byte, and those above it in `mask`, moved to bit `to`.
inline __m256i MoveBits(__m256i v, int from, int to, int mask) {
  const __m256i moved = from == to ? v : from < to ? _mm256_slli_epi16(v, to - from) : _mm256_srli_epi16(v, from - to);
  return _mm256_and_si256(moved, _mm256_set1_epi8(static_cast<char>(mask)));
}

// The entries of a table that nibbles, a byte each, stand for.
inline __m256i LookUp(const int8_t table[16], __m256i nibbles) {
  const __m128i entries = Load16Bytes(reinterpret_cast<const uint8_t*>(table));
  return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(entries), nibbles);
}

// Sixteen in every byte whose bit of `bits` is set.
inline __m256i FifthBits(uint32_t bits) {
  const __m256i spread =
      _mm256_shuffle_epi8(_mm256_set1_epi32(static_cast<int>(bits)),
                          _mm256_set_epi64x(0x0303030303030303, 0x0202020202020202, 0x0101010101010101, 0));
  const __m256i one_bit = _mm256_set1_epi64x(static_cast<long long>(0x8040201008040201));
  const __m256i set = _mm256_cmpeq_epi8(_mm256_and_si256(spread, one_bit), one_bit);
  return _mm256_and_si256(set, _mm256_set1_epi8(16));
}

// Elements 32 g .. 32 g + 31 of a Q4_K or Q5_K block.
inline __m256i K45Nibbles(const uint8_t* codes, size_t g) {
  return MoveBits(Load32Bytes(codes + g / 2 * 32), g % 2 == 0 ? 0 : 4, 0, 15);
}

// How many blocks of 32 share packed bytes, and are read at once.
constexpr size_t BlocksAtOnce(DType type) {
  switch (type) {
    case DType::kQ4_K:
    case DType::kQ5_K:
      return 2;
    case DType::kQ2_K:
    case DType::kQ3_K:
    case DType::kQ6_K:
      return 4;
    default:
      return 1;
  }
}

constexpr bool IsSuperBlock(DType type) { return BlocksAtOnce(type) > 1; }

// Rows are a multiple of 256 elements long.
constexpr bool IsOf256(DType type) { return IsSuperBlock(type) || type == DType::kIQ4_XS; }

// Bytes of 256 elements.
constexpr size_t BytesOf256(DType type) {
  switch (type) {
    case DType::kQ2_K:
      return 84;
    case DType::kQ3_K:
      return 110;
    case DType::kIQ4_XS:
    case DType::kMXFP4:
      return 136;
    case DType::kQ4_K:
    case DType::kQ4_0:
    case DType::kIQ4_NL:
      return 144;
    case DType::kQ4_1:
      return 160;
    case DType::kQ5_K:
    case DType::kQ5_0:
      return 176;
    case DType::kQ5_1:
      return 192;
    case DType::kQ6_K:
      return 210;
    default:  // kQ8_0
      return 272;
  }
}

constexpr bool HasSignedCodes(DType type) {
  return type == DType::kQ8_0 || type == DType::kIQ4_NL || type == DType::kIQ4_XS;
}

// Where the sixteen bytes of nibbles of block b of 32 elements begin, low ones first.
constexpr size_t NibblesAt(DType type, size_t b) {
  switch (type) {
    case DType::kQ4_0:
    case DType::kIQ4_NL:
      return b * 18 + 2;
    case DType::kQ4_1:
      return b * 20 + 4;
    case DType::kQ5_0:
      return b * 22 + 6;
    case DType::kQ5_1:
      return b * 24 + 8;
    case DType::kMXFP4:
      return b * 17 + 1;
    default:  // kIQ4_XS
      return b / 8 * 136 + 8 + 16 * (b % 8);
  }
}

template <DType kType>
struct Format;  // kOffset is subtracted from every code; At(row, b) gives the b-th 32 elements of a row (Codes of the
                // types that Reader has scales of)

template <>
struct Format<DType::kQ8_0> {
  static constexpr int kOffset = 0;
  static inline Codes32 At(const uint8_t* row, size_t b) {
    const uint8_t* block = row + b * 34;
    return OneScale(Load32Bytes(block + 2), HalfAt(block));
  }
};

template <>
struct Format<DType::kQ4_0> {
  static constexpr int kOffset = 8;
  static inline Codes32 At(const uint8_t* row, size_t b) {
    const uint8_t* block = row + b * 18;
    return OneScale(SplitNibbles(Load16Bytes(block + 2)), HalfAt(block));
  }
};

template <>
struct Format<DType::kQ4_1> {
  static constexpr int kOffset = 0;
  static inline Codes32 At(const uint8_t* row, size_t b) {
    const uint8_t* block = row + b * 20;
    return OneScale(SplitNibbles(Load16Bytes(block + 4)), HalfAt(block), HalfAt(block + 2));
  }
};

template <>
struct Format<DType::kIQ4_NL> {
  static constexpr int kOffset = 0;
  static inline Codes32 At(const uint8_t* row, size_t b) {
    const uint8_t* block = row + b * 18;
    return OneScale(LookUp(kIq4Codes, SplitNibbles(Load16Bytes(block + 2))), HalfAt(block));
  }
};

template <>
struct Format<DType::kIQ4_XS> {
  static constexpr int kOffset = 0;
  static inline Codes32 At(const uint8_t* row, size_t b) {
    const uint8_t* block = row + b / 8 * 136;
    const size_t g = b % 8;
    const int low = (block[4 + g / 2] >> (4 * (g % 2))) & 15, high = (Load16(block + 2) >> (2 * g)) & 3;
    const float scale = HalfAt(block) * static_cast<float>((low | high << 4) - 32);
    return OneScale(LookUp(kIq4Codes, SplitNibbles(Load16Bytes(block + 8 + 16 * g))), scale);
  }
};

// The codes of MXFP4 plus twelve, so that they are not negative.
constexpr int8_t kShiftedMxfp4Codes[16] = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};

template <>
struct Format<DType::kMXFP4> {
  static constexpr int kOffset = 12;
  static inline Codes32 At(const uint8_t* row, size_t b) {
    const uint8_t* block = row + b * 17;
    return OneScale(LookUp(kShiftedMxfp4Codes, SplitNibbles(Load16Bytes(block + 1))), Mxfp4Scale(block[0]));
  }
};

template <>
struct Format<DType::kQ5_0> {
  static constexpr int kOffset = 16;
  static inline Codes32 At(const uint8_t* row, size_t b) {
    const uint8_t* block = row + b * 22;
    const __m256i codes = _mm256_or_si256(SplitNibbles(Load16Bytes(block + 6)), FifthBits(Load32(block + 2)));
    return OneScale(codes, HalfAt(block));
  }
};

template <>
struct Format<DType::kQ5_1> {
  static constexpr int kOffset = 0;
  static inline Codes32 At(const uint8_t* row, size_t b) {
    const uint8_t* block = row + b * 24;
    const __m256i codes = _mm256_or_si256(SplitNibbles(Load16Bytes(block + 8)), FifthBits(Load32(block + 4)));
    return OneScale(codes, HalfAt(block), HalfAt(block + 2));
  }
};

template <>
struct Format<DType::kQ4_K> {
  static constexpr int kOffset = 0;
  static inline __m256i Codes(const uint8_t* row, size_t b) {
    return K45Nibbles(row + b / 8 * BytesOf256(DType::kQ4_K) + 16, b % 8);
  }
};

template <>
struct Format<DType::kQ5_K> {
  static constexpr int kOffset = 0;
  static inline __m256i Codes(const uint8_t* row, size_t b) {
    const uint8_t* block = row + b / 8 * BytesOf256(DType::kQ5_K);
    const size_t g = b % 8;
    return _mm256_or_si256(K45Nibbles(block + 48, g), MoveBits(Load32Bytes(block + 16), static_cast<int>(g), 4, 16));
  }
};

// The two-bit numbers of the b-th 32 elements of a Q2_K or Q3_K block.
inline __m256i TwoBits(const uint8_t* codes, size_t g) {
  return MoveBits(Load32Bytes(codes + 32 * (g / 4)), static_cast<int>(2 * (g % 4)), 0, 3);
}

template <>
struct Format<DType::kQ2_K> {
  static constexpr int kOffset = 0;
  static inline Codes32 At(const uint8_t* row, size_t b) {
    const uint8_t* block = row + b / 8 * 84;
    const size_t g = b % 8;
    const float d = HalfAt(block + 80), dmin = -HalfAt(block + 82);
    const int first = block[2 * g], second = block[2 * g + 1];
    return {TwoBits(block + 16, g),
            {d * static_cast<float>(first & 15), d * static_cast<float>(second & 15)},
            {dmin * static_cast<float>(first >> 4), dmin * static_cast<float>(second >> 4)}};
  }
};

template <>
struct Format<DType::kQ3_K> {
  static constexpr int kOffset = 4;
  // Scales 2 g and 2 g + 1, in the two bytes of a number.
  static inline int TwoScales(const uint8_t* packed, size_t g) {
    const int low = (Load16(packed + 2 * g % 8) >> (g / 4 * 4)) & 0x0f0f;
    const int high = (Load16(packed + 8 + 2 * g % 4) >> (g / 2 * 2)) & 0x0303;
    return low | high << 4;
  }
  static inline Codes32 At(const uint8_t* row, size_t b) {
    const uint8_t* block = row + b / 8 * 110;
    const size_t g = b % 8;
    const __m256i third = MoveBits(Load32Bytes(block), static_cast<int>(g), 2, 4);
    const __m256i codes = _mm256_or_si256(TwoBits(block + 32, g), third);
    const float d = HalfAt(block + 108);
    const int scales = TwoScales(block + 96, g);
    const float first = d * static_cast<float>((scales & 63) - 32), second = d * static_cast<float>((scales >> 8) - 32);
    return {codes, {first, second}, {0, 0}};
  }
};

template <>
struct Format<DType::kQ6_K> {
  static constexpr int kOffset = 32;
  static inline Codes32 At(const uint8_t* row, size_t b) {
    const uint8_t* block = row + b / 8 * 210;
    const size_t half = b % 8 / 4, s = b % 4;  // s: which 32 of the half's 128
    const __m256i nibbles = MoveBits(Load32Bytes(block + 64 * half + 32 * (s % 2)), s < 2 ? 0 : 4, 0, 15);
    const __m256i two_bits = MoveBits(Load32Bytes(block + 128 + 32 * half), 2 * static_cast<int>(s), 4, 0x30);
    const int8_t* scales = reinterpret_cast<const int8_t*>(block + 192) + 2 * (b % 8);
    const float d = HalfAt(block + 208);
    return {_mm256_or_si256(nibbles, two_bits), {d * scales[0], d * scales[1]}, {0, 0}};
  }
};

// --- Rows ---

// The codes of the b-th 32 elements.
template <DType kType>
inline __m256i CodesAt(const uint8_t* row, size_t b) {
  if constexpr (kType == DType::kQ4_K || kType == DType::kQ5_K)
    return Format<kType>::Codes(row, b);
  else
    return Format<kType>::At(row, b).codes;
}

// Reads a row 32 elements after the other, from its first.
template <DType kType>
struct Reader {
  inline Codes32 At(const uint8_t* row, size_t b) { return Format<kType>::At(row, b); }
};

inline __m256 EightBytes(uint64_t bytes, float factor) {
  const __m256i numbers = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(static_cast<long long>(bytes)));
  return _mm256_mul_ps(_mm256_cvtepi32_ps(numbers), _mm256_set1_ps(factor));
}

// The scales of Q4_K and Q5_K are unpacked eight at a time.
template <DType kType>
struct K45Reader {
  alignas(32) float scale[8], minimum[8];

  inline Codes32 At(const uint8_t* row, size_t b) {
    if (b % 8 == 0) {
      const uint8_t* block = row + b / 8 * BytesOf256(kType);
      const PackedScales packed = UnpackScales(block);
      _mm256_store_ps(scale, EightBytes(packed.scales, HalfAt(block)));
      _mm256_store_ps(minimum, EightBytes(packed.minima, -HalfAt(block + 2)));
    }
    return OneScale(Format<kType>::Codes(row, b), scale[b % 8], minimum[b % 8]);
  }
};

template <>
struct Reader<DType::kQ4_K> : K45Reader<DType::kQ4_K> {};
template <>
struct Reader<DType::kQ5_K> : K45Reader<DType::kQ5_K> {};

constexpr int CodeOffset(DType type) {
  switch (type) {
    case DType::kQ4_0:
      return Format<DType::kQ4_0>::kOffset;
    case DType::kQ5_0:
      return Format<DType::kQ5_0>::kOffset;
    case DType::kQ3_K:
      return Format<DType::kQ3_K>::kOffset;
    case DType::kQ6_K:
      return Format<DType::kQ6_K>::kOffset;
    case DType::kMXFP4:
      return Format<DType::kMXFP4>::kOffset;
    default:
      return 0;
  }
}

// --- Activations ---

inline float SumLanes(__m256 v) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps(s, s, 1)));
}

inline float LargestLane(__m256 v) {
  __m128 m = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  m = _mm_max_ps(m, _mm_movehl_ps(m, m));
  return _mm_cvtss_f32(_mm_max_ss(m, _mm_shuffle_ps(m, m, 1)));
}

// The sizes of values [8 i, 8 i + 8), 0 for those in `without`.
inline __m256 SizesBut(const float* x, uint32_t without, size_t i) {
  const __m256 sizes = _mm256_andnot_ps(_mm256_set1_ps(-0.0f), _mm256_loadu_ps(x + 8 * i));
  if (__builtin_constant_p(without) && without == 0) return sizes;
  const __m256i bits = _mm256_sllv_epi32(_mm256_set1_epi32(1 << 8 * i), _mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0));
  const __m256i out = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(static_cast<int>(without)), bits), bits);
  return _mm256_andnot_ps(_mm256_castsi256_ps(out), sizes);
}

// Of 32 values but for those in `without`.
inline float LargestSize(const float* x, uint32_t without) {
  return LargestLane(_mm256_max_ps(_mm256_max_ps(SizesBut(x, without, 0), SizesBut(x, without, 1)),
                                   _mm256_max_ps(SizesBut(x, without, 2), SizesBut(x, without, 3))));
}

inline uint32_t OfSize(const float* x, float size) {
  uint32_t found = 0;
#pragma GCC unroll 4
  for (size_t i = 0; i < 4; ++i) {
    const __m256 same = _mm256_cmp_ps(SizesBut(x, 0, i), _mm256_set1_ps(size), _CMP_EQ_OQ);
    found |= static_cast<uint32_t>(_mm256_movemask_ps(same)) << 8 * i;
  }
  return found;
}

// Rounds 32 values to 127 steps of the largest; the same numbers as the scalar reference's.
inline void Quantize32(const float* x, float largest, int8_t* q) {
  const __m256 inverse = _mm256_set1_ps(largest > 0 ? 127.0f / largest : 0.0f);
  __m256i rounded[4];
#pragma GCC unroll 4
  for (size_t i = 0; i < 4; ++i) rounded[i] = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + 8 * i), inverse));
  const __m256i bytes =
      _mm256_packs_epi16(_mm256_packs_epi32(rounded[0], rounded[1]), _mm256_packs_epi32(rounded[2], rounded[3]));
  const __m256i order = _mm256_set_epi32(7, 3, 6, 2, 5, 1, 4, 0);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(q), _mm256_permutevar8x32_epi32(bytes, order));
}

inline __m256i SumsOfFour(const int8_t* q) {
  const __m256i codes = Load32Bytes(reinterpret_cast<const uint8_t*>(q));
  return _mm256_madd_epi16(_mm256_maddubs_epi16(_mm256_set1_epi8(1), codes), _mm256_set1_epi16(1));
}

// The sums of codes 0..15 and 16..31 from those of four.
inline void SumHalves(__m256i fours, int totals[2]) {
  __m128i low = _mm256_castsi256_si128(fours), high = _mm256_extracti128_si256(fours, 1);
  low = _mm_hadd_epi32(low, high);
  low = _mm_hadd_epi32(low, low);
  totals[0] = _mm_cvtsi128_si32(low);
  totals[1] = _mm_extract_epi32(low, 1);
}

// --- Products ---

// The products of 32 codes, in sixteen sums of two. vpmaddubsw adds two products of an unsigned code and a signed
// activation in 16 bits: codes up to 63 cannot saturate it, and signed codes pass their sign to the activation.
template <DType kType>
inline __m256i PairProducts(__m256i codes, const int8_t* q) {
  __m256i x = Load32Bytes(reinterpret_cast<const uint8_t*>(q));
  if constexpr (HasSignedCodes(kType)) {
    x = _mm256_sign_epi8(x, codes);
    codes = _mm256_abs_epi8(codes);
  }
  return _mm256_maddubs_epi16(codes, x);
}

// Types bound by arithmetic come fastest with the first cache filled a few units ahead; Q8_0, which is bound by memory,
// with the second one filled further ahead.
template <DType kType>
inline void FetchAhead(const uint8_t* unit) {
  for (size_t i = 0; i < BytesOf256(kType); i += 64)
    kType == DType::kQ8_0 ? __builtin_prefetch(unit + 4096 + i, 0, 2) : __builtin_prefetch(unit + 2048 + i);
}

}  // namespace
}  // namespace lesskv::internal
