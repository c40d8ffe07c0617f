// Products of rows in blocks of 256 elements (the K types and IQ4_XS) with int8 activations, for few tokens, with AVX2.
// Built with those flags; see linear_avx512.cpp for the rules.
#if defined(__x86_64__)

#include "kernels/linear/linear_avx2-inl.h"
#include "kernels/linear/linear_kernels.h"

namespace lesskv::internal {
namespace {

// The scales of such a block are small integers times one half. If those of the activations are, too, a block adds up
// in integers and becomes a float once: of 256 activations each 32 have a step that is `ratio` 40ths of the largest
// one, ratios and scales are multiplied with each other in 16 bits, and their products with sums of two codes in 32.
//
// A 32-bit sum is that of four products in each of eight blocks. Q6_K, whose codes and scales are the largest, comes to
// 32 * 63 * 127 * 128 * 40 and, for the offset of its codes, to half of that once more.
constexpr int kMostRatio = 40;

// What a unit of 256 activations has beside its codes: of each block of 32 its ratio, in both halves of a vector, and
// the sums of its codes: of types with two scales in 32 elements, those of the first 16 in the low half and of the
// others in the high one; of types with one and a minimum, in the high one.
struct Unit {
  int16_t ratio[16], sum[16];
};

// A token's share of Int8Activations.
struct Int8Units {
  const int8_t* q;
  const Unit* unit;
  const float* step;  // the largest step of a unit, over kMostRatio
};

static_assert(sizeof(Unit) <= 256);  // of `init`, which has a byte an element and more

inline Int8Units TokenUnits(const Int8Activations& x, size_t token) {
  const size_t at = token * x.n_padded;
  return {x.q + at, reinterpret_cast<const Unit*>(x.init + at / 4), x.scale + at / 16};
}

inline int Clamp(int v, int low, int high) { return v < low ? low : v > high ? high : v; }

void QuantizeUnit(DType type, const float* x, int8_t* q, Unit& unit, float& step) {
  float largest[8];
  for (size_t b = 0; b < 8; ++b) largest[b] = LargestSize(x + b * 32, 0);
  const float most = LargestLane(_mm256_loadu_ps(largest));
  const float in_ratios = most > 0 ? kMostRatio / most : 0.0f;
  step = most / (127.0f * kMostRatio);
  for (size_t b = 0; b < 8; ++b) {
    const int ratio = Clamp(_mm_cvtss_si32(_mm_set_ss(__builtin_ceilf(largest[b] * in_ratios))), 1, kMostRatio);
    Quantize32(x + b * 32, step * 127.0f * static_cast<float>(ratio), q + b * 32);
    int totals[2];
    SumHalves(SumsOfFour(q + b * 32), totals);
    unit.ratio[b] = unit.ratio[b + 8] = static_cast<int16_t>(ratio);
    unit.sum[b] = static_cast<int16_t>(ScaleGroups(type) == 2 ? totals[0] : 0);
    unit.sum[b + 8] = static_cast<int16_t>(ScaleGroups(type) == 2 ? totals[1] : totals[0] + totals[1]);
  }
}

// --- Weights ---

// The scales of types with two in 32 elements, a byte each, [8 i, 8 i + 8) of them; those of Q3_K plus 32.
template <DType kType>
inline uint64_t ScaleBytes(const uint8_t* p, size_t i) {
  constexpr uint64_t kNibbles = 0x0f0f0f0f0f0f0f0f;
  if constexpr (kType == DType::kQ6_K) return Load64(p + 192 + 8 * i);
  if constexpr (kType == DType::kQ2_K) return Load64(p + 8 * i) & kNibbles;
  const uint32_t high = Load32(p + 104);
  const uint64_t two_bits = (high >> (4 * i) & 0x03030303) | uint64_t{high >> (4 * i + 2) & 0x03030303} << 32;
  return (Load64(p + 96) >> (4 * i) & kNibbles) | two_bits << 4;
}

// A byte each in a lane of 16 bits, those with even numbers in the low half.
inline __m256i EvenAndOdd(__m128i bytes) {
  const __m128i order = _mm_set_epi8(15, 13, 11, 9, 7, 5, 3, 1, 14, 12, 10, 8, 6, 4, 2, 0);
  return _mm256_cvtepi8_epi16(_mm_shuffle_epi8(bytes, order));
}

// The scales of a block of 256, a lane of 16 bits each: that of block b of 32 in lane b of both halves, or, where there
// are two, the first in the low half and the second in the high one. Q4_K and Q5_K have the minima in the high half.
template <DType kType>
inline __m256i ScaleNumbers(const uint8_t* p) {
  if constexpr (kType == DType::kQ4_K || kType == DType::kQ5_K) {
    // As UnpackScales, but with vectors: scales are a & 63, then c & 15 and bits of a; minima b & 63, then c >> 4 and
    // bits of b.
    const __m128i block = Load16Bytes(p);                                   // two halves, a, b, c
    const __m128i low = _mm_shuffle_epi32(block, _MM_SHUFFLE(3, 2, 3, 1));  // a, c, b, c
    const __m128i low_bits = _mm_and_si128(_mm_srlv_epi32(low, _mm_set_epi32(4, 0, 0, 0)),
                                           _mm_set_epi32(0x0f0f0f0f, 0x3f3f3f3f, 0x0f0f0f0f, 0x3f3f3f3f));
    const __m128i high = _mm_srli_epi32(_mm_shuffle_epi32(block, _MM_SHUFFLE(2, 2, 1, 1)), 2);
    const __m128i high_bits = _mm_and_si128(high, _mm_set_epi32(0x30303030, 0, 0x30303030, 0));
    return _mm256_cvtepu8_epi16(_mm_or_si128(low_bits, high_bits));
  } else if constexpr (kType == DType::kIQ4_XS) {
    const auto fields = [](uint32_t packed, int bits) {
      const __m256i shifts = _mm256_mullo_epi32(_mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0), _mm256_set1_epi32(bits));
      const __m256i spread = _mm256_srlv_epi32(_mm256_set1_epi32(static_cast<int>(packed)), shifts);
      return _mm256_and_si256(spread, _mm256_set1_epi32((1 << bits) - 1));
    };
    const __m256i packed = _mm256_or_si256(fields(Load32(p + 4), 4), _mm256_slli_epi32(fields(Load16(p + 2), 2), 4));
    const __m256i numbers = _mm256_sub_epi32(packed, _mm256_set1_epi32(32));
    return _mm256_permute4x64_epi64(_mm256_packs_epi32(numbers, numbers), 0x88);
  } else {
    const __m256i numbers = EvenAndOdd(_mm_set_epi64x(static_cast<long long>(ScaleBytes<kType>(p, 1)),
                                                      static_cast<long long>(ScaleBytes<kType>(p, 0))));
    return kType == DType::kQ3_K ? _mm256_sub_epi16(numbers, _mm256_set1_epi16(32)) : numbers;
  }
}

// The minima of Q2_K, as its scales.
inline __m256i Q2MinimumNumbers(const uint8_t* p) {
  return EvenAndOdd(_mm_and_si128(_mm_srli_epi16(Load16Bytes(p), 4), _mm_set1_epi8(15)));
}

// What the scales of a block are multiples of, and behind it what its minima are.
template <DType kType>
inline __m128 Halves(const uint8_t* p) {
  if constexpr (kType == DType::kQ4_K || kType == DType::kQ5_K || kType == DType::kQ2_K)
    return _mm_cvtph_ps(_mm_cvtsi32_si128(static_cast<int>(Load32(p + (kType == DType::kQ2_K ? 80 : 0)))));
  else
    return _mm_set_ss(HalfAt(p + (kType == DType::kIQ4_XS ? 0 : BytesOf256(kType) - 2)));
}

// --- Products ---

inline __m256i Load(const int16_t p[16]) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }

// What a block's scales become with a unit's ratios.
struct Scaled {
  __m256i scales[2];  // of four blocks of 32 each, in pairs of lanes
  __m256i start;      // what the block's sums start from: minus the offset of the codes
  __m256i minima;     // times the activations
};

template <DType kType>
__attribute__((always_inline)) inline Scaled Scale(const uint8_t* block, __m256i numbers, const Unit& unit) {
  Scaled out;
  __m256i scales = _mm256_mullo_epi16(numbers, Load(unit.ratio));
  out.start = _mm256_setzero_si256();
  if constexpr (CodeOffset(kType) != 0) {
    const __m256i sums = _mm256_madd_epi16(scales, Load(unit.sum));
    out.start = _mm256_sub_epi32(out.start, _mm256_slli_epi32(sums, __builtin_ctz(CodeOffset(kType))));
  }
  if constexpr (kType == DType::kQ2_K) {
    const __m256i minima = _mm256_mullo_epi16(Q2MinimumNumbers(block), Load(unit.ratio));
    out.minima = _mm256_madd_epi16(minima, Load(unit.sum));
  } else if constexpr (HasMinimum(kType)) {
    out.minima = _mm256_madd_epi16(scales, Load(unit.sum));
    scales = _mm256_permute4x64_epi64(scales, 0x44);
  }
  out.scales[0] = _mm256_unpacklo_epi16(scales, scales);
  out.scales[1] = _mm256_unpackhi_epi16(scales, scales);
  return out;
}

// kRows rows, `apart` rows from each other: two streams come faster. Shuffles by constants bring a block's scale to the
// lanes of its products: loads, such as of a shuffle's order, are what these products wait for.
template <DType kType, size_t kTokens, size_t kRows>
inline void DotRows(const uint8_t* first, size_t row_bytes, size_t apart, size_t n_units, const Int8Units* x, float* y,
                    size_t y_stride) {
  __m256 acc[kRows][kTokens], min_acc[kRows][kTokens];
  Unrolled<kRows>([&](auto r) __attribute__((always_inline)) {
    Unrolled<kTokens>([&](auto t) __attribute__((always_inline)) { acc[r][t] = min_acc[r][t] = _mm256_setzero_ps(); });
  });
  for (size_t unit = 0; unit < n_units; ++unit) {
    Unrolled<kRows>([&](auto r) __attribute__((always_inline)) {
      const uint8_t* block = first + r * apart * row_bytes + unit * BytesOf256(kType);
      FetchAhead<kType>(block);
      const __m256i numbers = ScaleNumbers<kType>(block);
      Scaled scaled[kTokens];
      __m256i total[kTokens];
      Unrolled<kTokens>([&](auto t) __attribute__((always_inline)) {
        scaled[t] = Scale<kType>(block, numbers, x[t].unit[unit]);
        total[t] = scaled[t].start;
      });
      Unrolled<8>([&](auto b) __attribute__((always_inline)) {
        const __m256i codes = CodesAt<kType>(block, b);
        Unrolled<kTokens>([&](auto t) __attribute__((always_inline)) {
          const __m256i scale = _mm256_shuffle_epi32(scaled[t].scales[b / 4], 0x55 * (b % 4));
          const __m256i pairs = PairProducts<kType>(codes, x[t].q + unit * 256 + b * 32);
          total[t] = _mm256_add_epi32(total[t], _mm256_madd_epi16(pairs, scale));
        });
      });
      const __m128 halves = Halves<kType>(block);
      Unrolled<kTokens>([&](auto t) __attribute__((always_inline)) {
        const __m128 steps = _mm_mul_ps(halves, _mm_set1_ps(x[t].step[unit]));
        acc[r][t] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(total[t]), _mm256_broadcastss_ps(steps), acc[r][t]);
        if constexpr (HasMinimum(kType)) {
          const __m256 step = _mm256_broadcastss_ps(_mm_movehdup_ps(steps));
          min_acc[r][t] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(scaled[t].minima), step, min_acc[r][t]);
        }
      });
    });
  }
  Unrolled<kRows>([&](auto r) __attribute__((always_inline)) {
    Unrolled<kTokens>([&](auto t) __attribute__((always_inline)) {
      y[t * y_stride + r * apart] = SumLanes(_mm256_sub_ps(acc[r][t], min_acc[r][t]));
    });
  });
}

template <DType kType, size_t kTokens>
void DotAllRows(const RowBlock& block, const Int8Activations& x, size_t token, float* y, size_t y_stride) {
  Int8Units tokens[kTokens];
  for (size_t t = 0; t < kTokens; ++t) tokens[t] = TokenUnits(x, token + t);
  size_t r = 0;
  const auto run = [&]<size_t kRows>(size_t apart) {
    DotRows<kType, kTokens, kRows>(block.rows + r * block.row_bytes, block.row_bytes, apart, block.n / 256, tokens,
                                   y + r, y_stride);
  };
  if constexpr (kTokens == 1) {
    const size_t apart = block.n_rows / 2;
    for (; r < apart; ++r) run.template operator()<2>(apart);
    r = 2 * apart;
  }
  for (; r < block.n_rows; ++r) run.template operator()<1>(0);
}

}  // namespace

void Avx2QuantizeSuperBlocks(DType type, const float* x, size_t n, size_t token, const Int8Activations& out) {
  const size_t at = token * out.n_padded;
  auto* unit = reinterpret_cast<Unit*>(out.init + at / 4);
  for (size_t u = 0; u < n / 256; ++u)
    QuantizeUnit(type, x + u * 256, out.q + at + u * 256, unit[u], out.scale[at / 16 + u]);
}

void Avx2DotSuperBlocks(const RowBlock& block, const Int8Activations& x, size_t n_tokens, float* y, size_t y_stride) {
  SwitchQuantized(block.type, [&]<DType kType>() {
    if constexpr (IsOf256(kType)) {
      ForTokens<1>(block, n_tokens, [&]<size_t kTokens>(const RowBlock& rows, size_t t, size_t r) {
        DotAllRows<kType, kTokens>(rows, x, t, y + t * y_stride + r, y_stride);
      });
    }
  });
}

}  // namespace lesskv::internal

#endif  // defined(__x86_64__)
