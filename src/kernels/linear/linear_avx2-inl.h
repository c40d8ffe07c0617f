// Quantised rows and rounded activations with AVX2, 32 elements at a time, shared by the translation units that
// multiply their codes as 8-bit numbers. Everything is in an anonymous namespace, so that each unit keeps its own copy,
// built with its own flags. Block layouts are described in quants.h.
#pragma once

#include <immintrin.h>

#include <utility>

#include "kernels/linear/linear_kernels.h"
#include "kernels/linear/linear_rounding-inl.h"
#include "kernels/quants/code_tables.h"

namespace lesskv::internal {
namespace {

inline uint16_t Load16(const uint8_t* p) {
  uint16_t value;
  __builtin_memcpy(&value, p, sizeof value);
  return value;
}

inline uint32_t Load32(const uint8_t* p) {
  uint32_t value;
  __builtin_memcpy(&value, p, sizeof value);
  return value;
}

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
  const __m256i both = _mm256_set_m128i(_mm_srli_epi16(v, 4), v);
  return _mm256_and_si256(both, _mm256_set1_epi8(15));
}

// The entries of a table that sixteen bytes of nibbles stand for.
inline __m256i LookUp(const int8_t table[16], __m128i nibbles) {
  const __m128i entries = Load16Bytes(reinterpret_cast<const uint8_t*>(table));
  return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(entries), SplitNibbles(nibbles));
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
  const __m256i v = Load32Bytes(codes + g / 2 * 32);
  return _mm256_and_si256(g % 2 == 0 ? v : _mm256_srli_epi16(v, 4), _mm256_set1_epi8(15));
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

constexpr size_t SuperBlockBytes(DType type) {
  switch (type) {
    case DType::kQ2_K:
      return 84;
    case DType::kQ3_K:
      return 110;
    case DType::kQ4_K:
      return 144;
    case DType::kQ5_K:
      return 176;
    default:  // kQ6_K
      return 210;
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
    return OneScale(LookUp(kIq4Codes, Load16Bytes(block + 2)), HalfAt(block));
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
    return OneScale(LookUp(kIq4Codes, Load16Bytes(block + 8 + 16 * g)), scale);
  }
};

// The codes of MXFP4 plus twelve, so that they are not negative.
constexpr int8_t kShiftedMxfp4Codes[16] = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};

template <>
struct Format<DType::kMXFP4> {
  static constexpr int kOffset = 12;
  // 2^(e - 128); the two smallest are subnormal.
  static inline float Scale(uint32_t e) {
    return _mm_cvtss_f32(_mm_castsi128_ps(_mm_cvtsi32_si128(static_cast<int>(e < 2 ? 0x200000u << e : (e - 1) << 23))));
  }
  static inline Codes32 At(const uint8_t* row, size_t b) {
    const uint8_t* block = row + b * 17;
    return OneScale(LookUp(kShiftedMxfp4Codes, Load16Bytes(block + 1)), Scale(block[0]));
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
    return K45Nibbles(row + b / 8 * SuperBlockBytes(DType::kQ4_K) + 16, b % 8);
  }
};

template <>
struct Format<DType::kQ5_K> {
  static constexpr int kOffset = 0;
  static inline __m256i Codes(const uint8_t* row, size_t b) {
    const uint8_t* block = row + b / 8 * SuperBlockBytes(DType::kQ5_K);
    const size_t g = b % 8;
    const __m256i bit = _mm256_set1_epi8(static_cast<char>(1 << g));
    const __m256i set = _mm256_cmpeq_epi8(_mm256_and_si256(Load32Bytes(block + 16), bit), bit);
    return _mm256_or_si256(K45Nibbles(block + 48, g), _mm256_and_si256(set, _mm256_set1_epi8(16)));
  }
};

// The two-bit numbers of the b-th 32 elements of a Q2_K or Q3_K block.
inline __m256i TwoBits(const uint8_t* codes, size_t g) {
  const __m128i shift = _mm_cvtsi32_si128(static_cast<int>(2 * (g % 4)));
  return _mm256_and_si256(_mm256_srl_epi16(Load32Bytes(codes + 32 * (g / 4)), shift), _mm256_set1_epi8(3));
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
    const __m256i bit = _mm256_set1_epi8(static_cast<char>(1 << g));
    const __m256i set = _mm256_cmpeq_epi8(_mm256_and_si256(Load32Bytes(block), bit), bit);
    const __m256i codes = _mm256_or_si256(TwoBits(block + 32, g), _mm256_and_si256(set, _mm256_set1_epi8(4)));
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
    const __m256i low = Load32Bytes(block + 64 * half + 32 * (s % 2));
    const __m256i nibbles = _mm256_and_si256(s < 2 ? low : _mm256_srli_epi16(low, 4), _mm256_set1_epi8(15));
    const __m256i high =
        _mm256_srl_epi16(Load32Bytes(block + 128 + 32 * half), _mm_cvtsi32_si128(2 * static_cast<int>(s)));
    const __m256i two_bits = _mm256_slli_epi16(_mm256_and_si256(high, _mm256_set1_epi8(3)), 4);
    const int8_t* scales = reinterpret_cast<const int8_t*>(block + 192) + 2 * (b % 8);
    const float d = HalfAt(block + 208);
    return {_mm256_or_si256(nibbles, two_bits), {d * scales[0], d * scales[1]}, {0, 0}};
  }
};

// Calls f with 0, 1, ... kN - 1 as constants, so that arrays they index stay in registers whatever f holds.
template <size_t kN, typename F>
__attribute__((always_inline)) inline void Unrolled(F&& f) {
  [&]<size_t... kI>(std::index_sequence<kI...>) __attribute__((always_inline)) {
    (f(std::integral_constant<size_t, kI>{}), ...);
  }
  (std::make_index_sequence<kN>{});
}

// Reads a row 32 elements after the other, from its first.
template <DType kType>
struct Reader {
  inline Codes32 At(const uint8_t* row, size_t b) { return Format<kType>::At(row, b); }
};

// The eight scales and minima of a Q4_K or Q5_K block, 0 to 63, a byte each.
struct PackedScales {
  uint64_t scales, minima;
};

inline PackedScales UnpackScales(const uint8_t* block) {
  const uint32_t a = Load32(block + 4), b = Load32(block + 8), c = Load32(block + 12);
  const uint32_t scales_high = (c & 0x0f0f0f0fu) | ((a >> 2) & 0x30303030u);
  const uint32_t minima_high = ((c >> 4) & 0x0f0f0f0fu) | ((b >> 2) & 0x30303030u);
  return {(a & 0x3f3f3f3fu) | uint64_t{scales_high} << 32, (b & 0x3f3f3f3fu) | uint64_t{minima_high} << 32};
}

// The scales of a block of 256, and what is added to their elements: eight of each, or sixteen.
template <DType kType>
inline void SuperBlockScales(const uint8_t* block, float* scale, [[maybe_unused]] float* minimum) {
  const auto store = [](float* out, uint64_t bytes, int subtract, float factor) {
    const __m256i numbers = _mm256_cvtepi8_epi32(_mm_cvtsi64_si128(static_cast<long long>(bytes)));
    const __m256 v = _mm256_cvtepi32_ps(_mm256_sub_epi32(numbers, _mm256_set1_epi32(subtract)));
    _mm256_storeu_ps(out, _mm256_mul_ps(v, _mm256_set1_ps(factor)));
  };
  const auto load = [&](size_t at) { return Load32(block + at) | uint64_t{Load32(block + at + 4)} << 32; };
  if constexpr (kType == DType::kQ4_K || kType == DType::kQ5_K) {
    const PackedScales packed = UnpackScales(block);
    store(scale, packed.scales, 0, HalfAt(block));
    store(minimum, packed.minima, 0, -HalfAt(block + 2));
  } else if constexpr (kType == DType::kQ6_K) {
    for (size_t i = 0; i < 2; ++i) store(scale + 8 * i, load(192 + 8 * i), 0, HalfAt(block + 208));
  } else if constexpr (kType == DType::kQ2_K) {
    constexpr uint64_t kNibbles = 0x0f0f0f0f0f0f0f0f;
    for (size_t i = 0; i < 2; ++i) {
      store(scale + 8 * i, load(8 * i) & kNibbles, 0, HalfAt(block + 80));
      store(minimum + 8 * i, load(8 * i) >> 4 & kNibbles, 0, -HalfAt(block + 82));
    }
  } else {  // kQ3_K
    const uint64_t low = load(96);
    const uint32_t high = Load32(block + 104);
    for (size_t i = 0; i < 2; ++i) {
      const uint64_t two_bits = (high >> (4 * i) & 0x03030303) | uint64_t{high >> (4 * i + 2) & 0x03030303} << 32;
      store(scale + 8 * i, (low >> (4 * i) & 0x0f0f0f0f0f0f0f0f) | two_bits << 4, 32, HalfAt(block + 108));
    }
  }
}

// The scales of Q4_K and Q5_K are unpacked eight at a time.
template <DType kType>
struct K45Reader {
  alignas(32) float scale[8], minimum[8];

  inline Codes32 At(const uint8_t* row, size_t b) {
    if (b % 8 == 0) SuperBlockScales<kType>(row + b / 8 * SuperBlockBytes(kType), scale, minimum);
    return OneScale(Format<kType>::Codes(row, b), scale[b % 8], minimum[b % 8]);
  }
};

template <>
struct Reader<DType::kQ4_K> : K45Reader<DType::kQ4_K> {};
template <>
struct Reader<DType::kQ5_K> : K45Reader<DType::kQ5_K> {};

constexpr bool HasSignedCodes(DType type) {
  return type == DType::kQ8_0 || type == DType::kIQ4_NL || type == DType::kIQ4_XS;
}

constexpr bool HasMinimum(DType type) {
  return type == DType::kQ4_1 || type == DType::kQ5_1 || type == DType::kQ2_K || type == DType::kQ4_K ||
         type == DType::kQ5_K;
}

// Types whose two groups of 16 in 32 elements have a minimum each; their sums are of 16 codes.
constexpr bool HasTwoMinima(DType type) { return type == DType::kQ2_K; }

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

// Scales in 32 elements.
constexpr size_t ScaleGroups(DType type) {
  return type == DType::kQ2_K || type == DType::kQ3_K || type == DType::kQ6_K ? 2 : 1;
}

// Calls f.template operator()<type>() for a quantised type.
template <typename F>
inline void SwitchQuantized(DType type, F&& f) {
  switch (type) {
    case DType::kQ8_0:
      return f.template operator()<DType::kQ8_0>();
    case DType::kQ4_0:
      return f.template operator()<DType::kQ4_0>();
    case DType::kQ4_1:
      return f.template operator()<DType::kQ4_1>();
    case DType::kIQ4_NL:
      return f.template operator()<DType::kIQ4_NL>();
    case DType::kIQ4_XS:
      return f.template operator()<DType::kIQ4_XS>();
    case DType::kMXFP4:
      return f.template operator()<DType::kMXFP4>();
    case DType::kQ2_K:
      return f.template operator()<DType::kQ2_K>();
    case DType::kQ3_K:
      return f.template operator()<DType::kQ3_K>();
    case DType::kQ5_0:
      return f.template operator()<DType::kQ5_0>();
    case DType::kQ5_1:
      return f.template operator()<DType::kQ5_1>();
    case DType::kQ4_K:
      return f.template operator()<DType::kQ4_K>();
    case DType::kQ5_K:
      return f.template operator()<DType::kQ5_K>();
    case DType::kQ6_K:
      return f.template operator()<DType::kQ6_K>();
    default:
      return;  // Linear refused it
  }
}

// --- Activations ---

inline float LargestLane(__m256 v) {
  __m128 m = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  m = _mm_max_ps(m, _mm_movehl_ps(m, m));
  return _mm_cvtss_f32(_mm_max_ss(m, _mm_shuffle_ps(m, m, 1)));
}

// Of 32 values.
inline float LargestSize(const float* x) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  __m256 most = _mm256_setzero_ps();
#pragma GCC unroll 4
  for (size_t i = 0; i < 32; i += 8) most = _mm256_max_ps(most, _mm256_andnot_ps(sign, _mm256_loadu_ps(x + i)));
  return LargestLane(most);
}

// Rounds 32 values to 127 steps of the largest; the same numbers as the scalar reference's. Returns the scale.
inline float Quantize32(const float* x, int8_t* q) {
  const float largest = LargestSize(x);
  const __m256 inverse = _mm256_set1_ps(largest > 0 ? 127.0f / largest : 0.0f);
  __m256i rounded[4];
#pragma GCC unroll 4
  for (size_t i = 0; i < 4; ++i) rounded[i] = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + 8 * i), inverse));
  const __m256i bytes =
      _mm256_packs_epi16(_mm256_packs_epi32(rounded[0], rounded[1]), _mm256_packs_epi32(rounded[2], rounded[3]));
  const __m256i order = _mm256_set_epi32(7, 3, 6, 2, 5, 1, 4, 0);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(q), _mm256_permutevar8x32_epi32(bytes, order));
  return largest / 127.0f;
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

}  // namespace
}  // namespace lesskv::internal
