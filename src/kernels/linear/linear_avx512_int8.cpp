// Products of quantised rows with int8 activations, for few tokens, with AVX-512 and VNNI. Built with those flags; see
// linear_avx512.cpp for the rules.
#if defined(__x86_64__)

#include "kernels/linear/linear_avx512-inl.h"
#include "kernels/linear/linear_kernels.h"

namespace lesskv::internal {
namespace {

// vpdpbusd multiplies unsigned codes with signed activations and adds four neighbours into an int32 lane. Codes are
// stored with an offset (4, 8, 12, 16, 32, or 128 after flipping the sign bit of Q8_0 and of the IQ4 table); the
// accumulator starts from minus the offset times the activations' sum, kept in `init`, so the integer result is exact
// and costs no correction.
//
// Element order of the activations:
//   Q4_0, Q4_1, Q5_0, Q5_1,   per 128: elements 0..15 of four blocks, then elements 16..31 of the four; the two vectors
//   IQ4_NL, IQ4_XS, MXFP4     of codes then share one accumulator, whose lanes 4 b .. 4 b + 3 belong to block b
//   Q4_K, Q5_K                per 256: sub-blocks 0, 2, 1, 3, 4, 6, 5, 7, as 64 code bytes split into nibbles
//   Q8_0, Q2_K, Q3_K, Q6_K    natural

constexpr bool IsMerged(DType type) {
  switch (type) {
    case DType::kQ4_0:
    case DType::kQ4_1:
    case DType::kQ5_0:
    case DType::kQ5_1:
    case DType::kIQ4_NL:
    case DType::kIQ4_XS:
    case DType::kMXFP4:
      return true;
    default:
      return false;
  }
}
constexpr bool IsK45(DType type) { return type == DType::kQ4_K || type == DType::kQ5_K; }

constexpr int CodeOffset(DType type) {
  switch (type) {
    case DType::kQ3_K:
      return 4;
    case DType::kQ4_0:
      return 8;
    case DType::kMXFP4:
      return 12;
    case DType::kQ5_0:
      return 16;
    case DType::kQ6_K:
      return 32;
    case DType::kQ8_0:
    case DType::kIQ4_NL:
    case DType::kIQ4_XS:
      return 128;
    default:
      return 0;
  }
}

// Where the 16 elements from `i` (a multiple of 16) go.
inline size_t Int8Place(DType type, size_t i) {
  if (IsMerged(type)) return i / 128 * 128 + (i % 32) * 4 + (i % 128) / 32 * 16;
  if (IsK45(type)) {
    const size_t sub_block = i / 32;
    const size_t swapped = (sub_block & ~size_t{3}) | (sub_block & 1) << 1 | (sub_block & 2) >> 1;
    return swapped * 32 + i % 32;
  }
  return i;
}

// The exact sum of small integers. Added as floats: integers that stand for no number would overflow.
inline float Sum(__m512i v) { return _mm512_reduce_add_ps(_mm512_cvtepi32_ps(v)); }

void Quantize(DType type, const float* x, size_t n, size_t token, const Int8Activations& out) {
  int8_t* q = out.q + token * out.n_padded;
  float* scale = out.scale + token * out.n_padded / 16;
  float* sum = out.sum + token * out.n_padded / 16;
  for (size_t b = 0; b < out.n_padded / 32; ++b) {
    const size_t first = b * 32, left = first < n ? n - first : 0;
    const uint32_t mask = left >= 32 ? ~0u : (1u << left) - 1;
    const __m512 v0 = _mm512_maskz_loadu_ps(static_cast<__mmask16>(mask), x + first);
    const __m512 v1 = _mm512_maskz_loadu_ps(static_cast<__mmask16>(mask >> 16), x + first + 16);
    const float largest = _mm512_reduce_max_ps(_mm512_max_ps(_mm512_abs_ps(v0), _mm512_abs_ps(v1)));
    const __m512 inverse = _mm512_set1_ps(largest > 0 ? 127.0f / largest : 0.0f);
    const __m512i q0 = _mm512_cvtps_epi32(_mm512_mul_ps(v0, inverse));
    const __m512i q1 = _mm512_cvtps_epi32(_mm512_mul_ps(v1, inverse));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(q + Int8Place(type, first)), _mm512_cvtsepi32_epi8(q0));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(q + Int8Place(type, first + 16)), _mm512_cvtsepi32_epi8(q1));
    const float block_scale = largest / 127.0f;
    if (ScaleGroups(type) == 2) {
      scale[2 * b] = scale[2 * b + 1] = block_scale;
      sum[2 * b] = block_scale * Sum(q0);
      sum[2 * b + 1] = block_scale * Sum(q1);
    } else {
      scale[b] = block_scale;
      sum[b] = block_scale * Sum(_mm512_add_epi32(q0, q1));
    }
  }
  const __m512i offset = _mm512_set1_epi8(static_cast<char>(CodeOffset(type)));
  int32_t* init = out.init + token * out.n_padded / 4;
  const size_t step = IsMerged(type) ? 128 : 64;
  for (size_t i = 0; i < out.n_padded; i += step, init += 16) {
    __m512i total = _mm512_dpbusd_epi32(_mm512_setzero_si512(), offset, _mm512_loadu_si512(q + i));
    if (step == 128) total = _mm512_dpbusd_epi32(total, offset, _mm512_loadu_si512(q + i + 64));
    _mm512_storeu_si512(init, _mm512_sub_epi32(_mm512_setzero_si512(), total));
  }
}

// One token's share of Int8Activations.
struct Int8Row {
  const int8_t* q;
  const int32_t* init;
  const float* scale;
  const float* sum;
};

inline Int8Row TokenRow(const Int8Activations& x, size_t token) {
  return {x.q + token * x.n_padded, x.init + token * x.n_padded / 4, x.scale + token * x.n_padded / 16,
          x.sum + token * x.n_padded / 16};
}

// Four halves `stride` bytes apart, as floats.
inline __m128 FourHalves(const uint8_t* p, size_t stride) {
  __m128i halves = _mm_cvtsi32_si128(Load16(p));
  halves = _mm_insert_epi16(halves, Load16(p + stride), 1);
  halves = _mm_insert_epi16(halves, Load16(p + 2 * stride), 2);
  halves = _mm_insert_epi16(halves, Load16(p + 3 * stride), 3);
  return _mm_cvtph_ps(halves);
}

// Sixteen bytes of each of four blocks.
inline __m512i FourCodes16(const uint8_t* p, size_t stride) {
  __m512i v = _mm512_castsi128_si512(LoadCodes16(p));
  v = _mm512_inserti32x4(v, LoadCodes16(p + stride), 1);
  v = _mm512_inserti32x4(v, LoadCodes16(p + 2 * stride), 2);
  return _mm512_inserti32x4(v, LoadCodes16(p + 3 * stride), 3);
}

inline __m512i AddFifthBits(__m512i nibbles, uint64_t fifth) {
  return _mm512_mask_add_epi8(nibbles, fifth, nibbles, _mm512_set1_epi8(16));
}

// Lane i takes lane i / 4 + 4 g of a vector; lanes of two 8-lane halves take `low` and `high`.
inline __m512i QuarterLanes(int g) {
  return _mm512_add_epi32(_mm512_set_epi32(3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0), _mm512_set1_epi32(4 * g));
}
inline __m512i HalfLanes(int low, int high) { return _mm512_mask_set1_epi32(_mm512_set1_epi32(low), 0xff00, high); }

inline void SplitNibbles(__m512i v, __m512i codes[2]) {
  const __m512i nibble = _mm512_set1_epi8(15);
  codes[0] = _mm512_and_si512(v, nibble);
  codes[1] = _mm512_and_si512(_mm512_srli_epi16(v, 4), nibble);
}

template <DType kType>
struct Int8Group;  // four blocks of 32: their codes, scales and, where there are any, minimums

// Scales that are the halves at the start of a block, and minimums that are the halves behind them.
template <size_t kBytes, bool kMin>
struct HalfScales {
  static constexpr size_t kBlockBytes = kBytes;
  static constexpr bool kHasMin = kMin;
  static inline __m128 Scales(const uint8_t* p) { return FourHalves(p, kBytes); }
  static inline __m128 Mins(const uint8_t* p) { return FourHalves(p + 2, kBytes); }
};

template <>
struct Int8Group<DType::kQ4_0> : HalfScales<18, false> {
  static inline void Codes(const uint8_t* p, __m512i codes[2]) { SplitNibbles(FourCodes16(p + 2, 18), codes); }
};

template <>
struct Int8Group<DType::kQ4_1> : HalfScales<20, true> {
  static inline void Codes(const uint8_t* p, __m512i codes[2]) { SplitNibbles(FourCodes16(p + 4, 20), codes); }
};

// The table of the IQ4 types with flipped sign bits: its entries plus 128.
inline __m128i ShiftedIq4Table() { return _mm_xor_si128(LoadTable(kIq4Codes), _mm_set1_epi8(static_cast<char>(0x80))); }

template <>
struct Int8Group<DType::kIQ4_NL> : HalfScales<18, false> {
  static inline void Codes(const uint8_t* p, __m512i codes[2]) {
    SplitNibbles(FourCodes16(p + 2, 18), codes);
    for (size_t v = 0; v < 2; ++v) codes[v] = LookUp(ShiftedIq4Table(), codes[v]);
  }
};

template <>
struct Int8Group<DType::kMXFP4> {
  static constexpr size_t kBlockBytes = 17;
  static constexpr bool kHasMin = false;
  static inline __m128 Scales(const uint8_t* p) {
    return _mm_set_ps(Mxfp4Scale(p[51]), Mxfp4Scale(p[34]), Mxfp4Scale(p[17]), Mxfp4Scale(p[0]));
  }
  static inline void Codes(const uint8_t* p, __m512i codes[2]) {
    const __m128i table = _mm_add_epi8(LoadTable(kMxfp4Codes), _mm_set1_epi8(12));
    SplitNibbles(FourCodes16(p + 1, 17), codes);
    for (size_t v = 0; v < 2; ++v) codes[v] = LookUp(table, codes[v]);
  }
};

template <size_t kBytes>
inline void FiveBitCodes(const uint8_t* codes_at, const uint8_t* fifth_at, __m512i codes[2]) {
  uint64_t low = 0, high = 0;
  for (size_t b = 0; b < 4; ++b) {
    low |= uint64_t{Load16(fifth_at + b * kBytes)} << (16 * b);
    high |= uint64_t{Load16(fifth_at + b * kBytes + 2)} << (16 * b);
  }
  SplitNibbles(FourCodes16(codes_at, kBytes), codes);
  codes[0] = AddFifthBits(codes[0], low);
  codes[1] = AddFifthBits(codes[1], high);
}

template <>
struct Int8Group<DType::kQ5_0> : HalfScales<22, false> {
  static inline void Codes(const uint8_t* p, __m512i codes[2]) { FiveBitCodes<22>(p + 6, p + 2, codes); }
};

template <>
struct Int8Group<DType::kQ5_1> : HalfScales<24, true> {
  static inline void Codes(const uint8_t* p, __m512i codes[2]) { FiveBitCodes<24>(p + 8, p + 4, codes); }
};

template <>
struct Int8Group<DType::kQ8_0> : HalfScales<34, false> {
  static inline __m512i TwoBlocks(const uint8_t* p) {
    const __m256i a = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 2));
    const __m256i b = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 36));
    const __m512i v = _mm512_inserti64x4(_mm512_castsi256_si512(a), b, 1);
    return _mm512_xor_si512(v, _mm512_set1_epi8(static_cast<char>(0x80)));
  }
  static inline void Codes(const uint8_t* p, __m512i codes[2]) {
    codes[0] = TwoBlocks(p);
    codes[1] = TwoBlocks(p + 68);
  }
};

// Codes of Q4_K: vectors of sub-blocks (0, 2), (1, 3), (4, 6), (5, 7).
template <DType kType>
inline void K45Codes(const uint8_t* block, __m512i codes[4]) {
  const uint8_t* at = block + (kType == DType::kQ4_K ? 16 : 48);
  for (size_t p = 0; p < 2; ++p) SplitNibbles(_mm512_loadu_si512(at + 64 * p), codes + 2 * p);
  if constexpr (kType == DType::kQ5_K) {
    // Bit s of byte l is the fifth bit of element 32 s + l: rotated to bit 4 in both halves of each vector. A rotation
    // of 64-bit words moves neighbours' bits in as well; the mask leaves those that came from the same byte.
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(block + 16));
    const __m512i fifth = _mm512_broadcast_i64x4(bits), bit = _mm512_set1_epi8(16);
    const auto rotation = [](long long low, long long high) {
      return _mm512_set_epi64(high, high, high, high, low, low, low, low);
    };
    const __m512i turns[4] = {rotation(4, 2), rotation(3, 1), rotation(0, 62), rotation(63, 61)};
    for (size_t v = 0; v < 4; ++v) {
      codes[v] = _mm512_or_si512(codes[v], _mm512_and_si512(_mm512_rolv_epi64(fifth, turns[v]), bit));
    }
  }
}

// How a step of a format multiplies: Load unpacks kElements weights, Multiply adds their product with step s of a token
// to sixteen partial sums, and what a format's minimums contribute to eight more.
template <DType kType>
struct Step {
  using Group = Int8Group<kType>;
  static constexpr size_t kElements = 128;
  static constexpr size_t kBytes = 4 * Group::kBlockBytes;
  static constexpr bool kHasMin = Group::kHasMin;
  __m512i codes[2];
  __m128 d, m;

  __attribute__((always_inline)) inline void Load(const uint8_t* p) {
    Group::Codes(p, codes);
    d = Group::Scales(p);
    if constexpr (kHasMin) m = Group::Mins(p);
  }

  // Of the four blocks only the first ones count.
  __attribute__((always_inline)) inline void Keep(size_t n_blocks) {
    const auto kept = static_cast<__mmask8>((1u << n_blocks) - 1);
    d = _mm_maskz_mov_ps(kept, d);
    if constexpr (kHasMin) m = _mm_maskz_mov_ps(kept, m);
  }

  __attribute__((always_inline)) inline void Multiply(const Int8Row& x, size_t s, __m512& acc, __m256& min_acc) const {
    const __m512i x0 = _mm512_loadu_si512(x.q + s * 128), x1 = _mm512_loadu_si512(x.q + s * 128 + 64);
    const __m512 scale = _mm512_castps128_ps512(_mm_mul_ps(d, _mm_loadu_ps(x.scale + s * 4)));
    if constexpr (IsMerged(kType)) {
      __m512i total = kHasMin ? _mm512_setzero_si512() : _mm512_loadu_si512(x.init + s * 16);
      total = _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(total, codes[0], x0), codes[1], x1);
      acc = _mm512_fmadd_ps(_mm512_cvtepi32_ps(total), _mm512_permutexvar_ps(QuarterLanes(0), scale), acc);
    } else {
      const __m512i a = _mm512_dpbusd_epi32(_mm512_loadu_si512(x.init + s * 32), codes[0], x0);
      const __m512i b = _mm512_dpbusd_epi32(_mm512_loadu_si512(x.init + s * 32 + 16), codes[1], x1);
      acc = _mm512_fmadd_ps(_mm512_cvtepi32_ps(a), _mm512_permutexvar_ps(HalfLanes(0, 1), scale), acc);
      acc = _mm512_fmadd_ps(_mm512_cvtepi32_ps(b), _mm512_permutexvar_ps(HalfLanes(2, 3), scale), acc);
    }
    if constexpr (kHasMin) {
      const __m128 term = _mm_mul_ps(m, _mm_loadu_ps(x.sum + s * 4));
      min_acc = _mm256_add_ps(_mm256_zextps128_ps256(term), min_acc);
    }
  }
};

template <DType kType>
struct StepK45 {
  static constexpr size_t kElements = 256;
  static constexpr size_t kBytes = kType == DType::kQ4_K ? 144 : 176;
  static constexpr bool kHasMin = true;
  __m512i codes[4];
  __m256 d, m;

  __attribute__((always_inline)) inline void Load(const uint8_t* p) {
    K45Codes<kType>(p, codes);
    const PackedScales packed = UnpackScales(p);
    d = _mm256_mul_ps(BytesToFloat8(packed.scales), _mm256_set1_ps(HalfAt(p)));
    m = _mm256_mul_ps(BytesToFloat8(packed.minima), _mm256_set1_ps(HalfAt(p + 2)));
  }

  __attribute__((always_inline)) inline void Multiply(const Int8Row& x, size_t s, __m512& acc, __m256& min_acc) const {
    const __m512i lanes[4] = {HalfLanes(0, 2), HalfLanes(1, 3), HalfLanes(4, 6), HalfLanes(5, 7)};
    const __m512 scale = _mm512_castps256_ps512(_mm256_mul_ps(d, _mm256_loadu_ps(x.scale + s * 8)));
    min_acc = _mm256_fnmadd_ps(m, _mm256_loadu_ps(x.sum + s * 8), min_acc);
#pragma GCC unroll 4
    for (size_t v = 0; v < 4; ++v) {
      const __m512i total =
          _mm512_dpbusd_epi32(_mm512_setzero_si512(), codes[v], _mm512_loadu_si512(x.q + s * 256 + v * 64));
      acc = _mm512_fmadd_ps(_mm512_cvtepi32_ps(total), _mm512_permutexvar_ps(lanes[v], scale), acc);
    }
  }
};

template <>
struct Step<DType::kQ4_K> : StepK45<DType::kQ4_K> {};
template <>
struct Step<DType::kQ5_K> : StepK45<DType::kQ5_K> {};

template <>
struct Step<DType::kIQ4_XS> {
  static constexpr size_t kElements = 256;
  static constexpr size_t kBytes = 136;
  static constexpr bool kHasMin = false;
  __m512i codes[4];
  __m256 d;

  __attribute__((always_inline)) inline void Load(const uint8_t* p) {
    for (size_t v = 0; v < 2; ++v) SplitNibbles(_mm512_loadu_si512(p + 8 + 64 * v), codes + 2 * v);
    for (size_t v = 0; v < 4; ++v) codes[v] = LookUp(ShiftedIq4Table(), codes[v]);
    d = Iq4XsScales(p);
  }

  __attribute__((always_inline)) inline void Multiply(const Int8Row& x, size_t s, __m512& acc, __m256&) const {
    const __m512 scale = _mm512_castps256_ps512(_mm256_mul_ps(d, _mm256_loadu_ps(x.scale + s * 8)));
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) {
      const int8_t* q = x.q + s * 256 + v * 128;
      __m512i total = _mm512_loadu_si512(x.init + s * 32 + v * 16);
      total = _mm512_dpbusd_epi32(total, codes[2 * v], _mm512_loadu_si512(q));
      total = _mm512_dpbusd_epi32(total, codes[2 * v + 1], _mm512_loadu_si512(q + 64));
      acc = _mm512_fmadd_ps(_mm512_cvtepi32_ps(total), _mm512_permutexvar_ps(QuarterLanes(v), scale), acc);
    }
  }
};

template <>
struct Step<DType::kQ2_K> {
  static constexpr size_t kElements = 256;
  static constexpr size_t kBytes = 84;
  static constexpr bool kHasMin = true;
  __m512i codes[4];
  __m512 d, m;

  __attribute__((always_inline)) inline void Load(const uint8_t* p) {
    Q2Codes(p, codes);
    d = Q2Scales(p);
    m = Q2Mins(p);
  }

  __attribute__((always_inline)) inline void Multiply(const Int8Row& x, size_t s, __m512& acc, __m256& min_acc) const {
    const __m512 scale = _mm512_mul_ps(d, _mm512_loadu_ps(x.scale + s * 16));
    min_acc = _mm256_fnmadd_ps(_mm512_castps512_ps256(m), _mm256_loadu_ps(x.sum + s * 16), min_acc);
    min_acc = _mm256_fnmadd_ps(_mm512_extractf32x8_ps(m, 1), _mm256_loadu_ps(x.sum + s * 16 + 8), min_acc);
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) {
      const __m512i total =
          _mm512_dpbusd_epi32(_mm512_setzero_si512(), codes[v], _mm512_loadu_si512(x.q + s * 256 + v * 64));
      acc = _mm512_fmadd_ps(_mm512_cvtepi32_ps(total), _mm512_permutexvar_ps(QuarterLanes(v), scale), acc);
    }
  }
};

template <DType kType>
struct StepQ36 {
  static constexpr size_t kElements = 256;
  static constexpr size_t kBytes = kType == DType::kQ3_K ? 110 : 210;
  static constexpr bool kHasMin = false;
  __m512i codes[4];
  __m512 d;

  __attribute__((always_inline)) inline void Load(const uint8_t* p) {
    if constexpr (kType == DType::kQ3_K) {
      Q3Codes(p, codes);
      d = Q3Scales(p);
    } else {
      Q6Codes(p, codes);
      d = Q6Scales(p);
    }
  }

  __attribute__((always_inline)) inline void Multiply(const Int8Row& x, size_t s, __m512& acc, __m256&) const {
    const __m512 scale = _mm512_mul_ps(d, _mm512_loadu_ps(x.scale + s * 16));
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) {
      const __m512i total = _mm512_dpbusd_epi32(_mm512_loadu_si512(x.init + s * 64 + v * 16), codes[v],
                                                _mm512_loadu_si512(x.q + s * 256 + v * 64));
      acc = _mm512_fmadd_ps(_mm512_cvtepi32_ps(total), _mm512_permutexvar_ps(QuarterLanes(v), scale), acc);
    }
  }
};

template <>
struct Step<DType::kQ3_K> : StepQ36<DType::kQ3_K> {};
template <>
struct Step<DType::kQ6_K> : StepQ36<DType::kQ6_K> {};

// kRows rows times kTokens tokens. The activations of a step are loaded once for all its rows: with four tokens the
// loads, not the arithmetic, are what a single row would wait for.
template <DType kType, size_t kTokens, size_t kRows>
struct RowProduct {
  using S = Step<kType>;
  __m512 acc[kRows][kTokens];
  __m256 min_acc[kRows][kTokens];

  // Of the step's blocks of 32 the first n_blocks.
  __attribute__((always_inline)) inline void Add(const uint8_t* const* at, size_t s, size_t n_blocks, const Int8Row* x) {
    S step[kRows];
#pragma GCC unroll 2
    for (size_t r = 0; r < kRows; ++r) {
      step[r].Load(at[r]);
      if constexpr (S::kElements == 128) {
        if (n_blocks < 4) step[r].Keep(n_blocks);
      }
    }
#pragma GCC unroll 4
    for (size_t t = 0; t < kTokens; ++t) {
#pragma GCC unroll 2
      for (size_t r = 0; r < kRows; ++r) step[r].Multiply(x[t], s, acc[r][t], min_acc[r][t]);
    }
  }

  // Rows `apart` rows from each other, the first at `row`; bytes before `end` may be read.
  inline void Run(const uint8_t* row, const uint8_t* end, size_t row_bytes, size_t apart, size_t n, const Int8Row* x,
                  float* y, size_t y_stride) {
#pragma GCC unroll 2
    for (size_t r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (size_t t = 0; t < kTokens; ++t) acc[r][t] = _mm512_setzero_ps(), min_acc[r][t] = _mm256_setzero_ps();
    }
    const uint8_t* at[kRows];
    size_t s = 0;
    for (; (s + 1) * S::kElements <= n; ++s) {
#pragma GCC unroll 2
      for (size_t r = 0; r < kRows; ++r) {
        at[r] = row + r * apart * row_bytes + s * S::kBytes;
        // Q8_0 is bound by memory, and comes fastest to the second cache, from further ahead.
        if constexpr (kType == DType::kQ8_0) {
          Prefetch<2>(at[r] + 4096, S::kBytes);
        } else {
          Prefetch(at[r] + PrefetchAhead(kRows, row_bytes, apart), S::kBytes);
        }
      }
      Add(at, s, S::kElements / 32, x);
    }
    if (s * S::kElements < n) {
      uint8_t last[kRows][S::kBytes];
      for (size_t r = 0; r < kRows; ++r) {
        at[r] = row + r * apart * row_bytes + s * S::kBytes;
        if (at[r] + S::kBytes <= end) continue;  // what lies behind the row does not count
        __builtin_memcpy(last[r], at[r], row_bytes - s * S::kBytes);
        at[r] = last[r];
      }
      Add(at, s, (n - s * S::kElements) / 32, x);
    }
#pragma GCC unroll 2
    for (size_t r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (size_t t = 0; t < kTokens; ++t) {
        __m512 total = acc[r][t];
        if constexpr (S::kHasMin) total = _mm512_add_ps(total, _mm512_zextps256_ps512(min_acc[r][t]));
        y[t * y_stride + r * apart] = _mm512_reduce_add_ps(total);
      }
    }
  }
};

template <DType kType, size_t kTokens>
void DotRows(const RowBlock& block, const Int8Activations& x, size_t token, float* y, size_t y_stride) {
  Int8Row tokens[kTokens];
  for (size_t t = 0; t < kTokens; ++t) tokens[t] = TokenRow(x, token + t);
  const auto run = [&]<size_t kRows>(size_t r, size_t apart) {
    RowProduct<kType, kTokens, kRows> product;
    product.Run(block.rows + r * block.row_bytes, block.rows + block.n_rows * block.row_bytes, block.row_bytes, apart,
                block.n, tokens, y + r, y_stride);
  };
  const size_t apart = block.n_rows / kStreams;
  for (size_t r = 0; r < apart; ++r) run.template operator()<kStreams>(r, apart);
  for (size_t r = apart * kStreams; r < block.n_rows; ++r) run.template operator()<1>(r, 1);
}

}  // namespace

void Avx512QuantizeActivations(DType type, const float* x, size_t n, size_t token, const Int8Activations& out) {
  Quantize(type, x, n, token, out);
}

void Avx512DotInt8(const RowBlock& block, const Int8Activations& x, size_t n_tokens, float* y, size_t y_stride) {
  SwitchQuantized(block.type, [&]<DType kType>() {
    ForTokens<2>(block, n_tokens, [&]<size_t kTokens>(const RowBlock& rows, size_t t, size_t r) {
      DotRows<kType, kTokens>(rows, x, t, y + t * y_stride + r, y_stride);
    });
  });
}

}  // namespace lesskv::internal

#endif  // defined(__x86_64__)
