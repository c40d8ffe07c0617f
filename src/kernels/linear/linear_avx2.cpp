// Products with AVX2, FMA and F16C. Built with those flags; see linear_avx512.cpp for the rules.
#if defined(__x86_64__)

#include <immintrin.h>

#include "kernels/linear/linear_kernels.h"
#include "kernels/quants/code_tables.h"

namespace lesskv::internal {
namespace {

constexpr size_t kDotTokens = 4;  // tokens multiplied with a row in one pass over it

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

inline float SumLanes(__m256 v) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps(s, s, 1)));
}

// --- Quantised rows, 32 elements at a time: x[i] = scale[i] * code[i] + offset, codes as signed bytes ---

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

// Scale and minimum of group g of a Q4_K or Q5_K block.
inline void K45Scale(const uint8_t* block, size_t g, Codes32& out) {
  const uint8_t* packed = block + 4;
  const int scale = g < 4 ? packed[g] & 63 : (packed[g + 4] & 15) | (packed[g - 4] >> 6) << 4;
  const int minimum = g < 4 ? packed[g + 4] & 63 : (packed[g + 4] >> 4) | (packed[g] >> 6) << 4;
  out.scale[0] = out.scale[1] = HalfAt(block) * static_cast<float>(scale);
  out.minimum[0] = out.minimum[1] = -HalfAt(block + 2) * static_cast<float>(minimum);
}

// Elements 32 g .. 32 g + 31 of a Q4_K or Q5_K block.
inline __m256i K45Nibbles(const uint8_t* codes, size_t g) {
  const __m256i v = Load32Bytes(codes + g / 2 * 32);
  return _mm256_and_si256(g % 2 == 0 ? v : _mm256_srli_epi16(v, 4), _mm256_set1_epi8(15));
}

template <DType kType>
struct Format;  // kOffset is subtracted from every code; At(row, b) gives the b-th 32 elements of a row

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
  static inline Codes32 At(const uint8_t* row, size_t b) {
    const uint8_t* block = row + b / 8 * 144;
    Codes32 out;
    K45Scale(block, b % 8, out);
    out.codes = K45Nibbles(block + 16, b % 8);
    return out;
  }
};

template <>
struct Format<DType::kQ5_K> {
  static constexpr int kOffset = 0;
  static inline Codes32 At(const uint8_t* row, size_t b) {
    const uint8_t* block = row + b / 8 * 176;
    const size_t g = b % 8;
    Codes32 out;
    K45Scale(block, g, out);
    const __m256i bit = _mm256_set1_epi8(static_cast<char>(1 << g));
    const __m256i set = _mm256_cmpeq_epi8(_mm256_and_si256(Load32Bytes(block + 16), bit), bit);
    out.codes = _mm256_or_si256(K45Nibbles(block + 48, g), _mm256_and_si256(set, _mm256_set1_epi8(16)));
    return out;
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

// --- Unpack: a sink receives 32 elements as four vectors; float types may end with fewer, given as floats in memory
// ---

inline __m256 EightFloats(__m128i codes) { return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(codes)); }

template <DType kType>
struct Unpacker {
  template <typename Sink>
  static inline Sink Row(const uint8_t* row, size_t n, Sink sink) {
    using F = Format<kType>;
    for (size_t b = 0; b < n / 32; ++b) {
      const Codes32 c = F::At(row, b);
      const __m256i codes = _mm256_sub_epi8(c.codes, _mm256_set1_epi8(F::kOffset));
      const __m128i low = _mm256_castsi256_si128(codes), high = _mm256_extracti128_si256(codes, 1);
      const __m256 d0 = _mm256_set1_ps(c.scale[0]), d1 = _mm256_set1_ps(c.scale[1]);
      const __m256 m0 = _mm256_set1_ps(c.minimum[0]), m1 = _mm256_set1_ps(c.minimum[1]);
      sink.Put(b * 32, _mm256_fmadd_ps(EightFloats(low), d0, m0),
               _mm256_fmadd_ps(EightFloats(_mm_srli_si128(low, 8)), d0, m0), _mm256_fmadd_ps(EightFloats(high), d1, m1),
               _mm256_fmadd_ps(EightFloats(_mm_srli_si128(high, 8)), d1, m1));
    }
    return sink;
  }
};

template <typename Eight, typename One, typename Sink>
inline Sink UnpackFloats(size_t n, const Eight& eight, const One& one, Sink sink) {
  size_t i = 0;
  for (; i + 32 <= n; i += 32) sink.Put(i, eight(i), eight(i + 8), eight(i + 16), eight(i + 24));
  if (i == n) return sink;
  alignas(32) float last[32] = {};
  for (size_t j = i; j < n; ++j) last[j - i] = one(j);
  sink.PutTail(i, last, n - i);
  return sink;
}

template <>
struct Unpacker<DType::kF32> {
  template <typename Sink>
  static inline Sink Row(const uint8_t* row, size_t n, Sink sink) {
    const auto one = [row](size_t i) {
      float value;
      __builtin_memcpy(&value, row + i * 4, 4);
      return value;
    };
    return UnpackFloats(
        n, [row](size_t i) { return _mm256_castsi256_ps(Load32Bytes(row + i * 4)); }, one, sink);
  }
};

template <>
struct Unpacker<DType::kF16> {
  template <typename Sink>
  static inline Sink Row(const uint8_t* row, size_t n, Sink sink) {
    return UnpackFloats(
        n, [row](size_t i) { return _mm256_cvtph_ps(Load16Bytes(row + i * 2)); },
        [row](size_t i) { return HalfAt(row + i * 2); }, sink);
  }
};

template <>
struct Unpacker<DType::kBF16> {
  template <typename Sink>
  static inline Sink Row(const uint8_t* row, size_t n, Sink sink) {
    const auto eight = [row](size_t i) {
      return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(Load16Bytes(row + i * 2)), 16));
    };
    const auto one = [row](size_t i) {
      const uint32_t bits = static_cast<uint32_t>(Load16(row + i * 2)) << 16;
      float value;
      __builtin_memcpy(&value, &bits, 4);
      return value;
    };
    return UnpackFloats(n, eight, one, sink);
  }
};

// Calls f.template operator()<type>() for the type.
template <typename F>
inline void SwitchType(DType type, F&& f) {
  switch (type) {
    case DType::kF32:
      return f.template operator()<DType::kF32>();
    case DType::kF16:
      return f.template operator()<DType::kF16>();
    case DType::kBF16:
      return f.template operator()<DType::kBF16>();
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

struct StoreSink {
  float* out;
  inline void Put(size_t i, __m256 a, __m256 b, __m256 c, __m256 d) const {
    _mm256_storeu_ps(out + i, a);
    _mm256_storeu_ps(out + i + 8, b);
    _mm256_storeu_ps(out + i + 16, c);
    _mm256_storeu_ps(out + i + 24, d);
  }
  inline void PutTail(size_t i, const float* last, size_t count) const {
    __builtin_memcpy(out + i, last, count * sizeof(float));
  }
};

void UnpackF32(const RowBlock& block, float* out, size_t out_stride) {
  SwitchType(block.type, [&]<DType kType>() {
    for (size_t r = 0; r < block.n_rows; ++r) {
      Unpacker<kType>::Row(block.rows + r * block.row_bytes, block.n, StoreSink{out + r * out_stride});
    }
  });
}

// --- Few tokens, float32 ---

template <size_t kTokens>
struct DotSink {
  const float* x;
  size_t x_stride;
  __m256 acc[kTokens][2];

  inline void Put(size_t i, __m256 a, __m256 b, __m256 c, __m256 d) {
#pragma GCC unroll 4
    for (size_t t = 0; t < kTokens; ++t) {
      const float* row = x + t * x_stride + i;
      acc[t][0] = _mm256_fmadd_ps(a, _mm256_loadu_ps(row), acc[t][0]);
      acc[t][1] = _mm256_fmadd_ps(b, _mm256_loadu_ps(row + 8), acc[t][1]);
      acc[t][0] = _mm256_fmadd_ps(c, _mm256_loadu_ps(row + 16), acc[t][0]);
      acc[t][1] = _mm256_fmadd_ps(d, _mm256_loadu_ps(row + 24), acc[t][1]);
    }
  }
  inline void PutTail(size_t i, const float* last, size_t count) {
#pragma GCC unroll 4
    for (size_t t = 0; t < kTokens; ++t) {
      alignas(32) float padded[32] = {};
      __builtin_memcpy(padded, x + t * x_stride + i, count * sizeof(float));
      for (size_t j = 0; j < 32; j += 8) {
        acc[t][0] = _mm256_fmadd_ps(_mm256_load_ps(last + j), _mm256_load_ps(padded + j), acc[t][0]);
      }
    }
  }
};

template <DType kType, size_t kTokens>
void DotF32Rows(const RowBlock& block, const float* x, size_t x_stride, float* y, size_t y_stride) {
  for (size_t r = 0; r < block.n_rows; ++r) {
    DotSink<kTokens> sink;
    sink.x = x;
    sink.x_stride = x_stride;
#pragma GCC unroll 4
    for (size_t t = 0; t < kTokens; ++t) sink.acc[t][0] = sink.acc[t][1] = _mm256_setzero_ps();
    sink = Unpacker<kType>::Row(block.rows + r * block.row_bytes, block.n, sink);
#pragma GCC unroll 4
    for (size_t t = 0; t < kTokens; ++t) {
      y[t * y_stride + r] = SumLanes(_mm256_add_ps(sink.acc[t][0], sink.acc[t][1]));
    }
  }
}

template <DType kType>
void DotF32Some(const RowBlock& block, const float* x, size_t x_stride, size_t n_tokens, float* y, size_t y_stride) {
  switch (n_tokens) {
    case 1:
      return DotF32Rows<kType, 1>(block, x, x_stride, y, y_stride);
    case 2:
      return DotF32Rows<kType, 2>(block, x, x_stride, y, y_stride);
    case 3:
      return DotF32Rows<kType, 3>(block, x, x_stride, y, y_stride);
    default:
      return DotF32Rows<kType, 4>(block, x, x_stride, y, y_stride);
  }
}

// More than kDotTokens: row by row, so that the second pass finds the row in the cache.
template <typename Some>
inline void ByRow(const RowBlock& block, size_t n_tokens, const Some& some) {
  if (n_tokens <= kDotTokens) return some(block, size_t{0}, n_tokens, size_t{0});
  RowBlock row = block;
  row.n_rows = 1;
  for (size_t r = 0; r < block.n_rows; ++r, row.rows += row.row_bytes) {
    for (size_t t = 0; t < n_tokens; t += kDotTokens) {
      some(row, t, n_tokens - t < kDotTokens ? n_tokens - t : kDotTokens, r);
    }
  }
}

void DotF32(const RowBlock& block, const float* x, size_t x_stride, size_t n_tokens, float* y, size_t y_stride) {
  SwitchType(block.type, [&]<DType kType>() {
    ByRow(block, n_tokens, [&](const RowBlock& rows, size_t t, size_t count, size_t r) {
      DotF32Some<kType>(rows, x + t * x_stride, x_stride, count, y + t * y_stride + r, y_stride);
    });
  });
}

// --- Few tokens, int8 activations in natural order ---
//
// vpmaddubsw adds two products of an unsigned code and a signed activation in 16 bits: codes up to 63 cannot saturate
// it, and signed codes pass their sign to the activation. Offsets are taken off in integers, as in the AVX-512 path.

constexpr bool HasSignedCodes(DType type) {
  return type == DType::kQ8_0 || type == DType::kIQ4_NL || type == DType::kIQ4_XS;
}

// Types whose two groups of 16 in 32 elements have a minimum each; their sums are of 16 codes.
constexpr bool HasTwoMinima(DType type) { return type == DType::kQ2_K; }

inline void QuantizeBlock(const float* x, size_t count, int8_t* q, float* scale) {
  float largest = 0;
  for (size_t i = 0; i < count; ++i) {
    const float magnitude = x[i] < 0 ? -x[i] : x[i];
    largest = magnitude > largest ? magnitude : largest;
  }
  const __m128 inverse = _mm_set_ss(largest > 0 ? 127.0f / largest : 0.0f);
  for (size_t i = 0; i < 32; ++i) {
    q[i] = i < count ? static_cast<int8_t>(_mm_cvtss_si32(_mm_mul_ss(_mm_set_ss(x[i]), inverse))) : int8_t{0};
  }
  *scale = largest / 127.0f;
}

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

void Quantize(DType type, const float* x, size_t n, size_t token, const Int8Activations& out) {
  int8_t* q = out.q + token * out.n_padded;
  int32_t* init = out.init + token * out.n_padded / 4;
  float* scale = out.scale + token * out.n_padded / 16;
  float* sum = out.sum + token * out.n_padded / 16;
  for (size_t b = 0; b < n / 32; ++b) {
    QuantizeBlock(x + b * 32, 32, q + b * 32, scale + b);
    int totals[2] = {};
    for (size_t i = 0; i < 8; ++i) {
      const int8_t* four = q + b * 32 + i * 4;
      const int part = four[0] + four[1] + four[2] + four[3];
      init[b * 8 + i] = -CodeOffset(type) * part;
      totals[i / 4] += part;
    }
    if (HasTwoMinima(type)) {
      for (size_t i = 0; i < 2; ++i) sum[2 * b + i] = scale[b] * static_cast<float>(totals[i]);
    } else {
      sum[b] = scale[b] * static_cast<float>(totals[0] + totals[1]);
    }
  }
}

template <DType kType, size_t kTokens>
void DotInt8Rows(const RowBlock& block, const Int8Activations& x, size_t token, float* y, size_t y_stride) {
  const __m256i ones = _mm256_set1_epi16(1);
  for (size_t r = 0; r < block.n_rows; ++r) {
    const uint8_t* row = block.rows + r * block.row_bytes;
    __m256 acc[kTokens];
    float min_acc[kTokens];
#pragma GCC unroll 4
    for (size_t t = 0; t < kTokens; ++t) acc[t] = _mm256_setzero_ps(), min_acc[t] = 0;
    for (size_t b = 0; b < block.n / 32; ++b) {
      const Codes32 c = Format<kType>::At(row, b);
      const __m256i codes = HasSignedCodes(kType) ? _mm256_abs_epi8(c.codes) : c.codes;
      const __m256 d = _mm256_set_m128(_mm_set1_ps(c.scale[1]), _mm_set1_ps(c.scale[0]));
#pragma GCC unroll 4
      for (size_t t = 0; t < kTokens; ++t) {
        const size_t at = (token + t) * x.n_padded;
        __m256i q = Load32Bytes(reinterpret_cast<const uint8_t*>(x.q + at + b * 32));
        if constexpr (HasSignedCodes(kType)) q = _mm256_sign_epi8(q, c.codes);
        __m256i total = _mm256_madd_epi16(_mm256_maddubs_epi16(codes, q), ones);
        if constexpr (CodeOffset(kType) != 0) {
          const int32_t* init = x.init + at / 4 + b * 8;
          total = _mm256_add_epi32(total, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(init)));
        }
        const __m256 scale = _mm256_mul_ps(d, _mm256_set1_ps(x.scale[at / 16 + b]));
        acc[t] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(total), scale, acc[t]);
        if constexpr (HasTwoMinima(kType)) {
          min_acc[t] += c.minimum[0] * x.sum[at / 16 + 2 * b] + c.minimum[1] * x.sum[at / 16 + 2 * b + 1];
        } else {
          min_acc[t] += c.minimum[0] * x.sum[at / 16 + b];
        }
      }
    }
#pragma GCC unroll 4
    for (size_t t = 0; t < kTokens; ++t) y[t * y_stride + r] = SumLanes(acc[t]) + min_acc[t];
  }
}

template <DType kType>
void DotInt8Some(const RowBlock& block, const Int8Activations& x, size_t token, size_t n_tokens, float* y,
                 size_t y_stride) {
  switch (n_tokens) {
    case 1:
      return DotInt8Rows<kType, 1>(block, x, token, y, y_stride);
    case 2:
      return DotInt8Rows<kType, 2>(block, x, token, y, y_stride);
    case 3:
      return DotInt8Rows<kType, 3>(block, x, token, y, y_stride);
    default:
      return DotInt8Rows<kType, 4>(block, x, token, y, y_stride);
  }
}

void DotInt8(const RowBlock& block, const Int8Activations& x, size_t n_tokens, float* y, size_t y_stride) {
  SwitchType(block.type, [&]<DType kType>() {
    if constexpr (kType != DType::kF32 && kType != DType::kF16 && kType != DType::kBF16) {
      ByRow(block, n_tokens, [&](const RowBlock& rows, size_t t, size_t count, size_t r) {
        DotInt8Some<kType>(rows, x, t, count, y + t * y_stride + r, y_stride);
      });
    }
  });
}

// --- Many tokens ---

void PackF32(const float* x, size_t x_stride, size_t n_tokens, size_t n, size_t vectors, float* out) {
  const size_t width = vectors * kTokenLanes;
  for (size_t i = 0; i < n; ++i) {
    for (size_t t = 0; t < n_tokens; ++t) out[i * width + t] = x[t * x_stride + i];
    for (size_t t = n_tokens; t < width; ++t) out[i * width + t] = 0;
  }
}

constexpr size_t kTileRows = 6;  // times two vectors: twelve of the sixteen registers accumulate

void TileF32(const float* const* rows, size_t n, const float* group, size_t, float* acc, bool first) {
  __m256 sum[kTileRows][2];
  const float* row[kTileRows];
#pragma GCC unroll 6
  for (size_t r = 0; r < kTileRows; ++r) {
    row[r] = rows[r];
    sum[r][0] = first ? _mm256_setzero_ps() : _mm256_loadu_ps(acc + r * kTokenLanes);
    sum[r][1] = first ? _mm256_setzero_ps() : _mm256_loadu_ps(acc + r * kTokenLanes + 8);
  }
  for (size_t i = 0; i < n; ++i) {
    const __m256 x0 = _mm256_loadu_ps(group + i * kTokenLanes), x1 = _mm256_loadu_ps(group + i * kTokenLanes + 8);
#pragma GCC unroll 6
    for (size_t r = 0; r < kTileRows; ++r) {
      const __m256 w = _mm256_broadcast_ss(row[r] + i);
      sum[r][0] = _mm256_fmadd_ps(w, x0, sum[r][0]);
      sum[r][1] = _mm256_fmadd_ps(w, x1, sum[r][1]);
    }
  }
#pragma GCC unroll 6
  for (size_t r = 0; r < kTileRows; ++r) {
    _mm256_storeu_ps(acc + r * kTokenLanes, sum[r][0]);
    _mm256_storeu_ps(acc + r * kTokenLanes + 8, sum[r][1]);
  }
}

}  // namespace

const LinearKernels& Avx2LinearKernels() {
  static constexpr LinearKernels kKernels = {
      .unpack_f32 = UnpackF32,
      .unpack_bf16 = nullptr,
      .dot_f32 = DotF32,
      .quantize = Quantize,
      .dot_int8 = DotInt8,
      .pack_f32 = PackF32,
      .pack_bf16 = nullptr,
      .tile_f32 = TileF32,
      .tile_bf16 = nullptr,
      .shape_f32 = {.group_vectors = 1, .rows = {kTileRows}},
      .shape_bf16 = {},
      .store = ScalarStore,
  };
  return kKernels;
}

}  // namespace lesskv::internal

#endif  // defined(__x86_64__)
