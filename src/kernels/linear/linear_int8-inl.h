// Products of many tokens in 8-bit numbers, one body for every instruction set that has them: quantised rows are
// unpacked to panels of codes, a group of rows side by side, so that a lane of a sum is a row of weights; four
// activations of a token are broadcast to all of them. A block of 32 adds up in integers and meets its scales once, as
// a whole vector of rows. Everything is in an anonymous namespace, so that each translation unit keeps its own copy,
// built with its own flags.
//
// Each unit brings a struct Simd:
//   kLanes                   32-bit numbers in a vector, and rows of weights
//   kSignedOffset            what is added to signed codes to make them unsigned; 0: AddProducts takes them signed
//   Int, Float               vectors, and a few functions that are named after what they do
//   EveryFourthRow(rows, at) sixteen bytes of rows 0, 4, 8, ...; LowWords, LowPairs and the like: unpack 32 and 64 bits
//   AddProducts<kBits, kVectors, kTokens, kFours>
//                            total[v][t] += the products of 4 kFours codes with as many activations; unsigned codes of
//                            kBits bits, or signed ones where kBits is 8 and kSignedOffset 0
#pragma once

#include "kernels/linear/linear_columns-inl.h"

namespace lesskv::internal {
namespace {

constexpr size_t kGroupVectors = 2;  // vectors of rows multiplied at once,
constexpr size_t kTokensAtOnce = 4;  // with so many tokens: sums for half of AVX2's registers
constexpr size_t kFoursInBlock = 8;

constexpr size_t CodeBits(DType type) {
  switch (type) {
    case DType::kQ5_0:
    case DType::kQ5_1:
    case DType::kQ5_K:
    case DType::kMXFP4:
      return 5;
    case DType::kQ6_K:
      return 6;
    default:
      return HasSignedCodes(type) ? 8 : 4;
  }
}

template <typename Simd>
constexpr int PanelOffset(DType type) {
  return HasSignedCodes(type) ? Simd::kSignedOffset : CodeOffset(type);
}

// What AVX2 and AVX-VNNI have in common.
struct Simd256 {
  using Int = __m256i;
  using Float = __m256;
  static constexpr size_t kLanes = 8;
  static constexpr int kSignedOffset = 0;

  static inline Float Zero() { return _mm256_setzero_ps(); }
  static inline Int ZeroInt() { return _mm256_setzero_si256(); }
  static inline Int Broadcast(int32_t v) { return _mm256_set1_epi32(v); }
  static inline Float Broadcast(float v) { return _mm256_set1_ps(v); }
  static inline Int BroadcastFour(const int8_t* p) {
    return _mm256_set1_epi32(static_cast<int>(Load32(reinterpret_cast<const uint8_t*>(p))));
  }
  static inline Int LoadInt(const uint8_t* p) { return Load32Bytes(p); }
  static inline Float Load(const float* p) { return _mm256_loadu_ps(p); }
  static inline void Store(float* p, Float v) { _mm256_storeu_ps(p, v); }
  static inline Float Add(Float a, Float b) { return _mm256_add_ps(a, b); }
  static inline Float Mul(Float a, Float b) { return _mm256_mul_ps(a, b); }
  static inline Float MulAdd(Float a, Float b, Float c) { return _mm256_fmadd_ps(a, b, c); }
  static inline Float ToFloat(Int v) { return _mm256_cvtepi32_ps(v); }
  static inline Float AsFloat(Int bits) { return _mm256_castsi256_ps(bits); }
  static inline Float HalvesToFloat(Int v) {
    return _mm256_cvtph_ps(_mm_packus_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1)));
  }
  static inline Int Sub(Int a, Int b) { return _mm256_sub_epi32(a, b); }

  static inline Int EveryFourthRow(const uint8_t* const* rows, size_t at) {
    return _mm256_set_m128i(Load16Bytes(rows[4] + at), Load16Bytes(rows[0] + at));
  }
  static inline Int LowWords(Int a, Int b) { return _mm256_unpacklo_epi32(a, b); }
  static inline Int HighWords(Int a, Int b) { return _mm256_unpackhi_epi32(a, b); }
  static inline Int LowPairs(Int a, Int b) { return _mm256_unpacklo_epi64(a, b); }
  static inline Int HighPairs(Int a, Int b) { return _mm256_unpackhi_epi64(a, b); }
  static inline Int And(Int a, Int b) { return _mm256_and_si256(a, b); }
  static inline Int Or(Int a, Int b) { return _mm256_or_si256(a, b); }
  static inline Int Xor(Int a, Int b) { return _mm256_xor_si256(a, b); }
  static inline Int ShiftRight(Int v, int bits) { return _mm256_srl_epi16(v, _mm_cvtsi32_si128(bits)); }
  static inline Int ShiftRight32(Int v, int bits) { return _mm256_srl_epi32(v, _mm_cvtsi32_si128(bits)); }
  static inline Int ShiftLeft32(Int v, int bits) { return _mm256_sll_epi32(v, _mm_cvtsi32_si128(bits)); }
  static inline Int LookUp(const int8_t table[16], Int at) {
    const __m128i entries = Load16Bytes(reinterpret_cast<const uint8_t*>(table));
    return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(entries), at);
  }
  static inline void StoreInt(uint8_t* p, Int v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v); }
};

// --- Weights ---

// The scales of block b of as many rows as a vector has lanes, the first of them row `row` of its group; those of
// blocks of 256 all at once, with the first of their eight.
template <typename Simd, DType kType>
__attribute__((always_inline)) inline void UnpackScalesOfRows(const uint8_t* const* rows, size_t row, size_t b,
                                                              const Int8Panel& out) {
  constexpr size_t kLanes = Simd::kLanes, kRows = kGroupVectors * kLanes, kGroups = ScaleGroups(kType);
  float* scale = out.scale + b * kGroups * kRows + row;
  float* minimum = out.minimum + b * kGroups * kRows + row;
  if constexpr (IsOf256(kType)) {
    if (b % 8 == 0) ReadScales256<Simd, kType>(rows, b / 8 * BytesOf256(kType), scale, minimum, kRows);
  } else if constexpr (kType == DType::kMXFP4) {
    // 2^(e - 128), which may be too small for a float's exponent, as the product of two powers that are not.
    const auto power = [](typename Simd::Int n) {
      return Simd::AsFloat(Simd::ShiftLeft32(Simd::Sub(n, Simd::Broadcast(-63)), 23));
    };
    const auto e = Simd::And(LoadWords<Simd>(rows, b * 17), Simd::Broadcast(255)), half = Simd::ShiftRight32(e, 1);
    Simd::Store(scale, Simd::Mul(power(half), power(Simd::Sub(e, half))));
  } else {  // halves at the beginning of a block
    const auto halves = LoadWords<Simd>(rows, b * (BytesOf256(kType) / 8));
    Simd::Store(scale, LowHalves<Simd>(halves));
    if constexpr (HasMinimum(kType)) Simd::Store(minimum, HighHalves<Simd>(halves));
  }
}

// As many rows as a vector has lanes, the first of them row `row` of its group. So many streams are more than a
// processor fetches ahead by itself: the rows behind these, at `next`, are fetched meanwhile, one line after the other.
// A function of each type's own, or the compiler, which would make one of all, calls parts of it.
template <typename Simd, DType kType>
__attribute__((noinline)) void UnpackRows(const uint8_t* const* rows, size_t row, size_t n_blocks, const uint8_t* next,
                                          size_t next_bytes, const Int8Panel& out) {
  constexpr size_t kLanes = Simd::kLanes, kRows = kGroupVectors * kLanes;
  constexpr size_t kBlocks = BlocksAtOnce(kType);
  const auto flip =
      Simd::Broadcast(static_cast<int32_t>(HasSignedCodes(kType) ? Simd::kSignedOffset * 0x01010101u : 0));
  const size_t ahead = next_bytes / (n_blocks / kBlocks) + 1;
  for (size_t b = 0; b < n_blocks; b += kBlocks) {
    for (size_t i = 0; i < ahead; i += 64) __builtin_prefetch(next + b / kBlocks * ahead + i, 0, 2);
    typename Simd::Int codes[kBlocks][kFoursInBlock];
    ReadColumns<Simd, kType>(rows, b, codes);
    // The compiler may not bring loads behind the stores, which they would wait for where addresses look alike.
    __asm__ volatile("" ::: "memory");
    for (size_t i = 0; i < kBlocks; ++i) {
      uint8_t* to = out.codes + ((b + i) * 32 * kRows + row * 4);
#pragma GCC unroll 8
      for (size_t f = 0; f < kFoursInBlock; ++f) Simd::StoreInt(to + f * kRows * 4, Simd::Xor(codes[i][f], flip));
    }
    UnpackScalesOfRows<Simd, kType>(rows, row, b, out);
  }
}

template <typename Simd>
void UnpackInt8(const RowBlock& block, const Int8Panel& out) {
  constexpr size_t kLanes = Simd::kLanes, kRows = kGroupVectors * kLanes;
  SwitchQuantized(block.type, [&]<DType kType>() {
    for (size_t row = 0; row < kRows; row += kLanes) {
      const uint8_t* rows[kLanes];
      for (size_t r = 0; r < kLanes; ++r) {
        const size_t at = row + r < block.n_rows ? row + r : block.n_rows - 1;
        rows[r] = block.rows + at * block.row_bytes;
      }
      UnpackRows<Simd, kType>(rows, row, block.n / 32, block.rows + (row + kLanes) * block.row_bytes,
                              kLanes * block.row_bytes, out);
    }
  });
}

// --- Activations ---

// A token's row in natural order, its spikes behind it. init and sum have one entry for each scale of the weights: what
// integer sums start from, and what a minimum is multiplied with.
template <typename Simd>
void QuantizeRowInt8(DType type, const float* x, size_t n, size_t token, const Int8Activations& out) {
  const size_t n_blocks = RoundRowToInt8(x, n, token, out);
  const int8_t* q = out.q + token * out.n_padded;
  const float* scale = out.scale + token * out.n_padded / 16;
  int32_t* init = out.init + token * out.n_padded / 4;
  float* sum = out.sum + token * out.n_padded / 16;
  const int offset = PanelOffset<Simd>(type);
  const bool two = ScaleGroups(type) == 2;
  for (size_t b = 0; b < n_blocks; ++b) {
    int totals[2];
    SumHalves(SumsOfFour(q + b * 32), totals);
    if (!two) totals[0] += totals[1];
    for (size_t g = 0; g < (two ? 2 : 1); ++g) {
      const size_t at = two ? 2 * b + g : b;
      init[at] = -offset * totals[g];
      sum[at] = scale[b] * static_cast<float>(totals[g]);
    }
  }
}

// --- Products ---

// Adds to the sums of kTokens tokens kFours fours of codes, from `four` of block `b`, which share a scale, times the
// same fours of block `x_block` of the activations.
template <typename Simd, DType kType, size_t kTokens, size_t kFours>
__attribute__((always_inline)) inline void AddFours(const Int8Panel& panel, size_t b, size_t four,
                                                    const Int8Activations& x, size_t token, size_t x_block,
                                                    typename Simd::Float acc[][kTokens]) {
  using Int = typename Simd::Int;
  using Float = typename Simd::Float;
  constexpr size_t kLanes = Simd::kLanes, kRows = kGroupVectors * kLanes, kGroups = ScaleGroups(kType);
  const size_t apart = x.n_padded / 16, group = four * kGroups / kFoursInBlock;
  const size_t part = b * kGroups + group, x_part = x_block * kGroups + group;
  Int total[kGroupVectors][kTokens];
  Unrolled<kTokens>([&](auto t) __attribute__((always_inline)) {
    const int32_t* first = x.init + (token + t) * x.n_padded / 4 + x_part;
    const Int start = PanelOffset<Simd>(kType) == 0 ? Simd::ZeroInt() : Simd::Broadcast(*first);
    Unrolled<kGroupVectors>([&](auto v) __attribute__((always_inline)) { total[v][t] = start; });
  });
  Simd::template AddProducts<CodeBits(kType), kGroupVectors, kTokens, kFours>(
      panel.codes + (b * 32 + four * 4) * kRows, x.q + token * x.n_padded + x_block * 32 + four * 4, x.n_padded, total);
  Unrolled<kGroupVectors>([&](auto v) __attribute__((always_inline)) {
    const Float scale = Simd::Load(panel.scale + part * kRows + v * kLanes);
    Unrolled<kTokens>([&](auto t) __attribute__((always_inline)) {
      const Float both = Simd::Mul(scale, Simd::Broadcast(x.scale[(token + t) * apart + x_block]));
      acc[v][t] = Simd::MulAdd(Simd::ToFloat(total[v][t]), both, acc[v][t]);
    });
    if constexpr (HasMinimum(kType)) {
      const Float minimum = Simd::Load(panel.minimum + part * kRows + v * kLanes);
      Unrolled<kTokens>([&](auto t) __attribute__((always_inline)) {
        acc[v][t] = Simd::MulAdd(minimum, Simd::Broadcast(x.sum[(token + t) * apart + x_part]), acc[v][t]);
      });
    }
  });
}

// A token's spikes within the range: of each the four that it is in, where its block is otherwise zero.
template <typename Simd, DType kType>
__attribute__((always_inline)) inline void AddSpikes(const Int8Panel& panel, const Int8Activations& x,
                                                     const Int8Range& range, size_t token,
                                                     typename Simd::Float sums[kGroupVectors][1]) {
  const uint32_t* spike = x.spike + token * x.n_padded / 32;
  size_t e = 0;
  while (spike[e] < range.first_block * 32) ++e;
  typename Simd::Float acc[kGroupVectors][1];
  Unrolled<kGroupVectors>([&](auto v) __attribute__((always_inline)) { acc[v][0] = sums[v][0]; });
  for (; spike[e] < (range.first_block + range.n_blocks) * 32; ++e)
    AddFours<Simd, kType, 1, 1>(panel, spike[e] / 32, spike[e] % 32 / 4, x, token, range.all_blocks + e, acc);
  Unrolled<kGroupVectors>([&](auto v) __attribute__((always_inline)) { sums[v][0] = acc[v][0]; });
}

template <typename Simd, DType kType, size_t kTokens, bool kFetch = false>
__attribute__((noinline)) void MultiplySome(const Int8Panel& panel, size_t n_rows, const Int8Activations& x,
                                            const Int8Range& range, size_t token, float* y, size_t y_stride) {
  using Float = typename Simd::Float;
  constexpr size_t kLanes = Simd::kLanes, kRows = kGroupVectors * kLanes;
  Float acc[kGroupVectors][kTokens];
#pragma GCC unroll 2
  for (size_t v = 0; v < kGroupVectors; ++v) {
#pragma GCC unroll 4
    for (size_t t = 0; t < kTokens; ++t) acc[v][t] = Simd::Zero();
  }
  constexpr size_t kFours = kFoursInBlock / ScaleGroups(kType);
  for (size_t b = range.first_block; b < range.first_block + range.n_blocks; ++b) {
    if constexpr (kFetch) {
      for (size_t i = 0; i < range.ahead_bytes; i += 64)
        __builtin_prefetch(range.ahead + b * range.ahead_bytes + i, 0, 2);
    }
#pragma GCC unroll 2
    for (size_t four = 0; four < kFoursInBlock; four += kFours)
      AddFours<Simd, kType, kTokens, kFours>(panel, b, four, x, token, b, acc);
  }
  Float sums[kTokens][kGroupVectors][1];  // in memory
  Unrolled<kTokens>([&](auto t) __attribute__((always_inline)) {
    Unrolled<kGroupVectors>([&](auto v) __attribute__((always_inline)) { sums[t][v][0] = acc[v][t]; });
  });
  const bool add = range.first_block > 0;
  for (size_t t = 0; t < kTokens; ++t) {
    AddSpikes<Simd, kType>(panel, x, range, token + t, sums[t]);
    float* row = y + t * y_stride;
    float last[kRows];
    float* out = n_rows == kRows ? row : last;
    if (add && out == last) __builtin_memcpy(last, row, n_rows * sizeof(float));
#pragma GCC unroll 2
    for (size_t v = 0; v < kGroupVectors; ++v) {
      const Float sum = add ? Simd::Add(Simd::Load(out + v * kLanes), sums[t][v][0]) : sums[t][v][0];
      Simd::Store(out + v * kLanes, sum);
    }
    if (out == last) __builtin_memcpy(row, last, n_rows * sizeof(float));
  }
}

template <typename Simd>
void MultiplyInt8(DType type, const Int8Panel& panel, size_t n_rows, const Int8Activations& x, const Int8Range& range,
                  float* y, size_t y_stride) {
  SwitchQuantized(type, [&]<DType kType>() {
    size_t t = 0;
    if constexpr (IsSuperBlock(kType)) {  // blocks of 32 are as fast without
      if (range.ahead_bytes > 0 && range.n_tokens >= kTokensAtOnce) {
        MultiplySome<Simd, kType, kTokensAtOnce, true>(panel, n_rows, x, range, range.first_token, y, y_stride);
        t = kTokensAtOnce;
      }
    }
    for (; t + kTokensAtOnce <= range.n_tokens; t += kTokensAtOnce) {
      MultiplySome<Simd, kType, kTokensAtOnce>(panel, n_rows, x, range, range.first_token + t, y + t * y_stride,
                                               y_stride);
    }
    switch (range.n_tokens - t) {
      case 3:
        return MultiplySome<Simd, kType, 3>(panel, n_rows, x, range, range.first_token + t, y + t * y_stride, y_stride);
      case 2:
        return MultiplySome<Simd, kType, 2>(panel, n_rows, x, range, range.first_token + t, y + t * y_stride, y_stride);
      case 1:
        return MultiplySome<Simd, kType, 1>(panel, n_rows, x, range, range.first_token + t, y + t * y_stride, y_stride);
      default:
        return;
    }
  });
}

// What a processor with dot products of four 8-bit numbers needs for Simd::AddProducts.
template <typename Simd, size_t kVectors, size_t kTokens, size_t kFours>
inline void AddDotProducts(const uint8_t* codes, const int8_t* q, size_t q_stride,
                           typename Simd::Int total[kVectors][kTokens]) {
#pragma GCC unroll 8
  for (size_t k = 0; k < kFours; ++k) {
    typename Simd::Int w[kVectors];
#pragma GCC unroll 2
    for (size_t v = 0; v < kVectors; ++v) w[v] = Simd::LoadInt(codes + (k * kVectors + v) * Simd::kLanes * 4);
#pragma GCC unroll 4
    for (size_t t = 0; t < kTokens; ++t) {
      const typename Simd::Int x = Simd::BroadcastFour(q + t * q_stride + k * 4);
#pragma GCC unroll 2
      for (size_t v = 0; v < kVectors; ++v) total[v][t] = Simd::Dot(total[v][t], w[v], x);
    }
  }
}

template <typename Simd>
constexpr Int8Kernels MakeInt8Kernels() {
  return {.rows = kGroupVectors * Simd::kLanes,
          .unpack = UnpackInt8<Simd>,
          .quantize = QuantizeRowInt8<Simd>,
          .multiply = MultiplyInt8<Simd>};
}

}  // namespace
}  // namespace lesskv::internal
