// Products of quantised rows with int8 activations, for few tokens, with AVX2: rows in blocks of 32 elements here,
// those in blocks of 256 in linear_avx2_superblocks.cpp. Built with those flags; see linear_avx512.cpp for the rules.
//
// Two blocks are multiplied at once: a vector has elements 0..15 of both, another one elements 16..31, which are those
// that share bytes, and activations are in the same order. A lane sums products of one block then, as do four. Eight
// blocks share what they can: their scales become floats together, and one product with the activations' sums is all
// that minima, or the offset of codes, cost. Spikes meet the codes and scales of their elements, gathered eight at a
// time.
#if defined(__x86_64__)

#include "kernels/linear/linear_avx2-inl.h"
#include "kernels/linear/linear_kernels.h"

namespace lesskv::internal {
namespace {

// --- Activations ---

inline __m256i LoadCodes(const int8_t* q) { return Load32Bytes(reinterpret_cast<const uint8_t*>(q)); }
inline void StoreCodes(int8_t* q, __m256i codes) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(q), codes); }

// Scales and sums have an entry for each block, up to whole 256 elements. Sums have the spikes in them, and the factor
// minus the offset where codes have one. The spikes themselves stand behind the scales.
void Quantize(DType type, const float* x, size_t n, size_t token, const Int8Activations& out) {
  RoundRowToInt8(x, n, token, out);
  int8_t* q = out.q + token * out.n_padded;
  float* scale = out.scale + token * out.n_padded / 16;
  float* sum = out.sum + token * out.n_padded / 16;
  const uint32_t* spike = out.spike + token * out.n_padded / 32;
  const size_t n_blocks = n / 32, spikes_at = (n + 255) / 256 * 8;
  for (size_t b = 0; b < n_blocks; ++b) {
    int totals[2];
    SumHalves(SumsOfFour(q + b * 32), totals);
    sum[b] = scale[b] * static_cast<float>(totals[0] + totals[1]);
  }
  for (size_t b = n_blocks; b < spikes_at; ++b) scale[b] = sum[b] = 0;
  for (size_t b = 0; b < n_blocks; b += 2) {
    const __m256i a = LoadCodes(q + b * 32), c = LoadCodes(q + b * 32 + 32);
    StoreCodes(q + b * 32, _mm256_permute2x128_si256(a, c, 0x20));
    StoreCodes(q + b * 32 + 32, _mm256_permute2x128_si256(a, c, 0x31));
  }
  for (size_t e = 0; e < out.n_spikes; ++e) {
    scale[spikes_at + e] = x[spike[e]];
    sum[spike[e] / 32] += x[spike[e]];
  }
  if (CodeOffset(type) == 0) return;
  for (size_t b = 0; b < n_blocks; ++b) sum[b] *= static_cast<float>(-CodeOffset(type));
}

// --- Scales ---

// Those of eight blocks, and where the type HasMinimum what is added to their elements.
struct EightScales {
  __m256 scale, minimum;
};

// The 16 bits at the beginning of the eight blocks at p, zeros for those behind the n_blocks-th. General registers put
// them together: vector units have the codes to do.
template <size_t kBytes>
inline __m128i EightWords(const uint8_t* p, size_t n_blocks) {
  const auto words = [](uint64_t low, uint64_t high) {
    return _mm_insert_epi64(_mm_cvtsi64_si128(static_cast<long long>(low)), static_cast<long long>(high), 1);
  };
  if (n_blocks < 8) {
    uint64_t some[2] = {};
#pragma GCC unroll 1
    for (size_t b = 0; b < n_blocks; ++b) some[b / 4] |= uint64_t{Load16(p + b * kBytes)} << (16 * (b % 4));
    return words(some[0], some[1]);
  }
  uint64_t low = Load16(p), high = Load16(p + 4 * kBytes);
  Unrolled<3>([&](auto i) __attribute__((always_inline)) {
    constexpr size_t b = i + 1;
    low |= uint64_t{Load16(p + b * kBytes)} << (16 * b);
    high |= uint64_t{Load16(p + (4 + b) * kBytes)} << (16 * b);
  });
  return words(low, high);
}

// n_blocks: how many of the eight blocks there are; the scales of others are zero, or mean nothing.
template <DType kType>
inline EightScales ScalesAt(const uint8_t* p, size_t n_blocks) {
  EightScales out;
  if constexpr (kType == DType::kMXFP4) {
    // As Mxfp4Scale.
    const __m256i words = _mm256_cvtepu16_epi32(EightWords<17>(p, n_blocks));
    const __m256i e = _mm256_and_si256(words, _mm256_set1_epi32(255));
    const __m256i normal = _mm256_slli_epi32(_mm256_sub_epi32(e, _mm256_set1_epi32(1)), 23);
    const __m256i subnormal = _mm256_sllv_epi32(_mm256_set1_epi32(0x200000), e);
    const __m256i small = _mm256_cmpgt_epi32(_mm256_set1_epi32(2), e);
    out.scale = _mm256_castsi256_ps(_mm256_blendv_epi8(normal, subnormal, small));
  } else {
    constexpr size_t kBytes = BytesOf256(kType) / 8;
    out.scale = _mm256_cvtph_ps(EightWords<kBytes>(p, n_blocks));
    if constexpr (HasMinimum(kType)) out.minimum = _mm256_cvtph_ps(EightWords<kBytes>(p + 2, n_blocks));
  }
  return out;
}

// --- Spikes ---

// Where a row has the code of an element: its low bits in one byte, for some types a fifth in another.
struct CodePlace {
  size_t low_byte, low_shift, fifth_byte, fifth_shift;
};

constexpr int LowBits(DType type) { return type == DType::kQ8_0 ? 8 : 4; }
constexpr bool HasFifthBit(DType type) { return type == DType::kQ5_0 || type == DType::kQ5_1; }

template <DType kType>
inline CodePlace PlaceOf(size_t i) {
  const size_t j = i % 32;
  if constexpr (kType == DType::kQ8_0) return {i / 32 * 34 + 2 + j, 0, 0, 0};
  const size_t nibbles = NibblesAt(kType, i / 32);
  return {nibbles + j % 16, j / 16 * 4, nibbles - 4 + j / 8, j % 8};
}

// Codes with their sign from the bits of eight elements: those of a type with a table are its entries.
template <DType kType>
inline __m256i CodesOfBits(__m256i bits) {
  if constexpr (kType == DType::kIQ4_NL) bits = LookUp(kIq4Codes, bits);
  if constexpr (kType == DType::kMXFP4) bits = LookUp(kShiftedMxfp4Codes, bits);
  if constexpr (HasSignedCodes(kType) || kType == DType::kMXFP4)
    bits = _mm256_srai_epi32(_mm256_slli_epi32(bits, 24), 24);
  return bits;
}

// A token's spikes, and where every row has their codes (as in CodePlace) and scales. Zeros fill the last eight.
struct SpikePlan {
  static constexpr size_t kMost = kAvx2LongestDotInt8 / kElementsOfSpike;
  size_t n = 0;
  float value[kMost];
  uint32_t scale[kMost];
  uint32_t low_byte[kMost], low_shift[kMost], fifth_byte[kMost], fifth_shift[kMost];
};

template <DType kType>
inline void MakePlan(const Int8Activations& x, size_t n, size_t token, SpikePlan& plan) {
  const uint32_t* spike = x.spike + token * x.n_padded / 32;
  const float* value = x.scale + token * x.n_padded / 16 + (n + 255) / 256 * 8;
  for (plan.n = 0; plan.n < x.n_spikes || plan.n % 8 != 0; ++plan.n) {
    const size_t e = plan.n, i = e < x.n_spikes ? spike[e] : 0;
    const CodePlace place = PlaceOf<kType>(i);
    plan.value[e] = e < x.n_spikes ? value[e] : 0;
    plan.scale[e] = static_cast<uint32_t>(i / 32);
    plan.low_byte[e] = static_cast<uint32_t>(place.low_byte);
    plan.low_shift[e] = static_cast<uint32_t>(place.low_shift);
    plan.fifth_byte[e] = static_cast<uint32_t>(place.fifth_byte);
    plan.fifth_shift[e] = static_cast<uint32_t>(place.fifth_shift);
  }
}

// `bits` bits of each of eight bytes of a row.
inline __m256i EightFields(const uint8_t* row, const uint32_t* at, const uint32_t* shift, int bits) {
  uint64_t packed = 0;
  Unrolled<8>([&](auto i) __attribute__((always_inline)) { packed |= uint64_t{row[at[i]]} << (8 * i); });
  const __m128i bytes = _mm_cvtsi64_si128(static_cast<long long>(packed));
  const __m256i shifts = Load32Bytes(reinterpret_cast<const uint8_t*>(shift));
  return _mm256_and_si256(_mm256_srlv_epi32(_mm256_cvtepu8_epi32(bytes), shifts), _mm256_set1_epi32((1 << bits) - 1));
}

// Eight spikes, from spike e, times the weights of a row, whose scales are at `scale`.
template <DType kType>
__attribute__((always_inline)) inline __m256 AddSpikes(const SpikePlan& plan, size_t e, const uint8_t* row,
                                                       const float* scale, __m256 sum) {
  __m256i bits = EightFields(row, plan.low_byte + e, plan.low_shift + e, LowBits(kType));
  if constexpr (HasFifthBit(kType)) {
    const __m256i fifth = EightFields(row, plan.fifth_byte + e, plan.fifth_shift + e, 1);
    bits = _mm256_or_si256(bits, _mm256_slli_epi32(fifth, 4));
  }
  const uint32_t* at = plan.scale + e;
  const __m256 scales = _mm256_setr_ps(scale[at[0]], scale[at[1]], scale[at[2]], scale[at[3]], scale[at[4]],
                                       scale[at[5]], scale[at[6]], scale[at[7]]);
  const __m256 weights = _mm256_mul_ps(_mm256_cvtepi32_ps(CodesOfBits<kType>(bits)), scales);
  return _mm256_fmadd_ps(weights, _mm256_loadu_ps(plan.value + e), sum);
}

// --- Products ---

inline __m256i SixteenOfBoth(const uint8_t* first, const uint8_t* second) {
  return _mm256_inserti128_si256(_mm256_castsi128_si256(Load16Bytes(first)), Load16Bytes(second), 1);
}

// Elements 0..15 and then 16..31 of blocks b and `second`.
template <DType kType>
inline void TwoBlocks(const uint8_t* row, size_t b, size_t second, __m256i codes[2]) {
  if constexpr (kType == DType::kQ8_0) {
    for (size_t i = 0; i < 2; ++i) codes[i] = SixteenOfBoth(row + b * 34 + 2 + i * 16, row + second * 34 + 2 + i * 16);
    return;
  }
  const uint8_t *at = row + NibblesAt(kType, b), *at_second = row + NibblesAt(kType, second);
  const __m256i nibbles = SixteenOfBoth(at, at_second);
  codes[0] = _mm256_and_si256(nibbles, _mm256_set1_epi8(15));
  codes[1] = _mm256_and_si256(_mm256_srli_epi16(nibbles, 4), _mm256_set1_epi8(15));
  if constexpr (kType == DType::kIQ4_NL || kType == DType::kMXFP4) {
    for (size_t i = 0; i < 2; ++i) codes[i] = LookUp(kType == DType::kMXFP4 ? kShiftedMxfp4Codes : kIq4Codes, codes[i]);
  } else if constexpr (HasFifthBit(kType)) {
    const uint64_t bits = Load32(at - 4) | uint64_t{Load32(at_second - 4)} << 32;
    const __m256i all = _mm256_set1_epi64x(static_cast<long long>(bits));
    const __m256i one_bit = _mm256_set1_epi64x(static_cast<long long>(0x8040201008040201));
    for (long long i = 0; i < 2; ++i) {
      const long long first = 0x0202020202020202 * i, apart = 0x0101010101010101, four = 0x0404040404040404;
      const __m256i spread =
          _mm256_shuffle_epi8(all, _mm256_set_epi64x(first + four + apart, first + four, first + apart, first));
      const __m256i set = _mm256_cmpeq_epi8(_mm256_and_si256(spread, one_bit), one_bit);
      codes[i] = _mm256_or_si256(codes[i], _mm256_and_si256(set, _mm256_set1_epi8(16)));
    }
  }
}

// The products of two blocks, four lanes of each.
template <DType kType>
inline __m256 ProductsOfTwo(const __m256i codes[2], const int8_t* q) {
  const __m256i a = PairProducts<kType>(codes[0], q), b = PairProducts<kType>(codes[1], q + 32);
  const __m256i one = _mm256_set1_epi16(1);
  if constexpr (HasSignedCodes(kType))  // 16 bits hold two of their products
    return _mm256_cvtepi32_ps(_mm256_add_epi32(_mm256_madd_epi16(a, one), _mm256_madd_epi16(b, one)));
  else
    return _mm256_cvtepi32_ps(_mm256_madd_epi16(_mm256_add_epi16(a, b), one));
}

// kRows rows, `apart` rows from each other: two streams come faster. Pairs of blocks take turns with two sums, or one
// would wait for itself.
template <DType kType, size_t kTokens, size_t kRows>
inline void DotInt8Row(const uint8_t* first, size_t row_bytes, size_t apart, size_t n, const Int8Activations& x,
                       size_t token, const SpikePlan* plans, float* y, size_t y_stride) {
  const size_t n_units = (n + 255) / 256;  // of 256 elements, the last one perhaps of fewer
  const auto blocks_of = [n](size_t unit) { return unit * 256 + 256 <= n ? 8 : n % 256 / 32; };
  const int8_t* q[kTokens];
  const float *x_scale[kTokens], *x_sum[kTokens];
  Unrolled<kTokens>([&](auto t) __attribute__((always_inline)) {
    const size_t at = (token + t) * x.n_padded;
    q[t] = x.q + at, x_scale[t] = x.scale + at / 16, x_sum[t] = x.sum + at / 16;
  });
  const uint8_t* row[kRows];
  __m256 acc[kRows][kTokens][2], min_acc[kRows][kTokens];
  Unrolled<kRows>([&](auto r) __attribute__((always_inline)) {
    row[r] = first + r * apart * row_bytes;
    Unrolled<kTokens>([&](auto t) __attribute__((always_inline)) {
      acc[r][t][0] = acc[r][t][1] = min_acc[r][t] = _mm256_setzero_ps();
    });
  });
  // The scales of the weights, and those of a unit times those of the activations: read a unit ahead of the codes,
  // which would wait for them.
  alignas(32) float scale[kRows][kAvx2LongestDotInt8 / 32];
  __m256 next[kRows][kTokens];
  const auto read_scales = [&](size_t unit) __attribute__((always_inline)) {
    Unrolled<kRows>([&](auto r) __attribute__((always_inline)) {
      const uint8_t* at = row[r] + unit * BytesOf256(kType);
      FetchAhead<kType>(at);
      const EightScales s = ScalesAt<kType>(at, blocks_of(unit));
      _mm256_store_ps(scale[r] + unit * 8, s.scale);
      Unrolled<kTokens>([&](auto t) __attribute__((always_inline)) {
        next[r][t] = _mm256_mul_ps(s.scale, _mm256_loadu_ps(x_scale[t] + unit * 8));
        if constexpr (HasMinimum(kType) || CodeOffset(kType) != 0) {
          const __m256 added = HasMinimum(kType) ? s.minimum : s.scale;
          min_acc[r][t] = _mm256_fmadd_ps(added, _mm256_loadu_ps(x_sum[t] + unit * 8), min_acc[r][t]);
        }
      });
    });
  };
  read_scales(0);
  for (size_t unit = 0; unit < n_units; ++unit) {
    __m256 scales[kRows][kTokens];
    Unrolled<kRows>([&](auto r) __attribute__((always_inline)) {
      Unrolled<kTokens>([&](auto t) __attribute__((always_inline)) { scales[r][t] = next[r][t]; });
    });
    if (unit + 1 < n_units) read_scales(unit + 1);
    const auto add = [&](int b, size_t second) __attribute__((always_inline)) {
      Unrolled<kRows>([&](auto r) __attribute__((always_inline)) {
        __m256i codes[2];
        TwoBlocks<kType>(row[r] + unit * BytesOf256(kType), static_cast<size_t>(b), second, codes);
        Unrolled<kTokens>([&](auto t) __attribute__((always_inline)) {
          const __m256 own =
              _mm256_permutevar8x32_ps(scales[r][t], _mm256_setr_epi32(b, b, b, b, b + 1, b + 1, b + 1, b + 1));
          __m256& sum = acc[r][t][b / 2 % 2];
          sum = _mm256_fmadd_ps(ProductsOfTwo<kType>(codes, q[t] + unit * 256 + b * 32), own, sum);
        });
      });
    };
    const size_t n_blocks = blocks_of(unit);
    Unrolled<4>([&](auto pair) __attribute__((always_inline)) {
      constexpr size_t b = 2 * pair;
      // A second block that a row does not have is the first once more, times a scale of zero.
      if (n_blocks == 8 || b < n_blocks) add(b, n_blocks == 8 || b + 1 < n_blocks ? b + 1 : b);
    });
  }
  Unrolled<kTokens>([&](auto t) __attribute__((always_inline)) {
    __m256 sum[kRows];
    Unrolled<kRows>([&](auto r) __attribute__((always_inline)) {
      sum[r] = _mm256_add_ps(_mm256_add_ps(acc[r][t][0], acc[r][t][1]), min_acc[r][t]);
    });
    for (size_t e = 0; e < plans[t].n; e += 8) {
      Unrolled<kRows>([&](auto r) __attribute__((always_inline)) {
        sum[r] = AddSpikes<kType>(plans[t], e, row[r], scale[r], sum[r]);
      });
    }
    Unrolled<kRows>([&](auto r) __attribute__((always_inline)) { y[t * y_stride + r * apart] = SumLanes(sum[r]); });
  });
}

template <DType kType, size_t kTokens>
void DotInt8Rows(const RowBlock& block, const Int8Activations& x, size_t token, const SpikePlan* plans, float* y,
                 size_t y_stride) {
  size_t r = 0;
  if constexpr (kTokens == 1) {
    const size_t apart = block.n_rows / 2;
    for (; r < apart; ++r) {
      DotInt8Row<kType, 1, 2>(block.rows + r * block.row_bytes, block.row_bytes, apart, block.n, x, token, plans, y + r,
                              y_stride);
    }
    r = 2 * apart;
  }
  for (; r < block.n_rows; ++r) {
    DotInt8Row<kType, kTokens, 1>(block.rows + r * block.row_bytes, block.row_bytes, 0, block.n, x, token, plans, y + r,
                                  y_stride);
  }
}

}  // namespace

void Avx2QuantizeActivations(DType type, const float* x, size_t n, size_t token, const Int8Activations& out) {
  IsOf256(type) ? Avx2QuantizeSuperBlocks(type, x, n, token, out) : Quantize(type, x, n, token, out);
}

void Avx2DotInt8(const RowBlock& block, const Int8Activations& x, size_t n_tokens, float* y, size_t y_stride) {
  SwitchQuantized(block.type, [&]<DType kType>() {
    if constexpr (IsOf256(kType)) {
      Avx2DotSuperBlocks(block, x, n_tokens, y, y_stride);
    } else {
      SpikePlan plans[kKernelTokens];
      for (size_t t = 0; t < n_tokens; ++t) MakePlan<kType>(x, block.n, t, plans[t]);
      ForTokens<1>(block, n_tokens, [&]<size_t kTokens>(const RowBlock& rows, size_t t, size_t r) {
        DotInt8Rows<kType, kTokens>(rows, x, t, plans + t, y + t * y_stride + r, y_stride);
      });
    }
  });
}

}  // namespace lesskv::internal

#endif  // defined(__x86_64__)
