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
//   Byte<kSigned>(v, at)     byte `at` of each 32-bit number
//   AddProducts<kBits, kVectors, kTokens, kFours>
//                            total[v][t] += the products of 4 kFours codes with as many activations; unsigned codes of
//                            kBits bits, or signed ones where kBits is 8 and kSignedOffset 0
#pragma once

#include "kernels/linear/linear_avx2-inl.h"

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

// Scales in 32 elements.
constexpr size_t ScaleGroups(DType type) {
  return type == DType::kQ2_K || type == DType::kQ3_K || type == DType::kQ6_K ? 2 : 1;
}

template <typename Simd>
constexpr int PanelOffset(DType type) {
  return HasSignedCodes(type) ? Simd::kSignedOffset : CodeOffset(type);
}

// --- Weights ---

// Eight rows of eight 32-bit numbers become eight columns, `stride` bytes apart.
inline void StoreTransposed(const __m256i rows[8], uint8_t* out, size_t stride) {
  __m256i a[8], b[8];
#pragma GCC unroll 4
  for (size_t i = 0; i < 8; i += 2) {
    a[i] = _mm256_unpacklo_epi32(rows[i], rows[i + 1]);
    a[i + 1] = _mm256_unpackhi_epi32(rows[i], rows[i + 1]);
  }
#pragma GCC unroll 2
  for (size_t i = 0; i < 8; i += 4) {  // b[i + j]: columns j and j + 4 of four rows
    b[i] = _mm256_unpacklo_epi64(a[i], a[i + 2]);
    b[i + 1] = _mm256_unpackhi_epi64(a[i], a[i + 2]);
    b[i + 2] = _mm256_unpacklo_epi64(a[i + 1], a[i + 3]);
    b[i + 3] = _mm256_unpackhi_epi64(a[i + 1], a[i + 3]);
  }
#pragma GCC unroll 4
  for (size_t j = 0; j < 4; ++j) {
    const __m256i low = _mm256_permute2x128_si256(b[j], b[j + 4], 0x20);
    const __m256i high = _mm256_permute2x128_si256(b[j], b[j + 4], 0x31);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + j * stride), low);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + (j + 4) * stride), high);
  }
}

// Eight rows, the first of them row `row` of its group.
template <typename Simd, DType kType>
inline void UnpackEight(const uint8_t* const* rows, size_t row, size_t n_blocks, const Int8Panel& out) {
  constexpr size_t kRows = kGroupVectors * Simd::kLanes, kGroups = ScaleGroups(kType);
  const __m256i flip = _mm256_set1_epi8(static_cast<char>(HasSignedCodes(kType) ? Simd::kSignedOffset : 0));
  Reader<kType> readers[8];
  for (size_t b = 0; b < n_blocks; ++b) {
    __m256i codes[8];
    float* scale = out.scale + b * kGroups * kRows + row;
    float* minimum = out.minimum + b * kGroups * kRows + row;
#pragma GCC unroll 8
    for (size_t r = 0; r < 8; ++r) {
      const Codes32 c = readers[r].At(rows[r], b);
      codes[r] = _mm256_xor_si256(c.codes, flip);
      for (size_t g = 0; g < kGroups; ++g) {
        scale[g * kRows + r] = c.scale[g];
        if constexpr (HasMinimum(kType)) minimum[g * kRows + r] = c.minimum[g];
      }
    }
    StoreTransposed(codes, out.codes + b * 32 * kRows + row * 4, kRows * 4);
  }
}

template <typename Simd>
void UnpackInt8(const RowBlock& block, const Int8Panel& out) {
  constexpr size_t kRows = kGroupVectors * Simd::kLanes;
  SwitchQuantized(block.type, [&]<DType kType>() {
    for (size_t row = 0; row < kRows; row += 8) {
      const uint8_t* rows[8];
      for (size_t r = 0; r < 8; ++r) {
        const size_t at = row + r < block.n_rows ? row + r : block.n_rows - 1;
        rows[r] = block.rows + at * block.row_bytes;
      }
      UnpackEight<Simd, kType>(rows, row, block.n / 32, out);
    }
  });
}

// --- Activations ---

// A token's row in natural order. init and sum have one entry for each scale of the weights: what integer sums start
// from, and what a minimum is multiplied with. Behind the scales stand the spikes themselves.
template <typename Simd>
void QuantizeRowInt8(DType type, const float* x, size_t n, size_t token, const Int8Activations& out) {
  const size_t n_blocks = n / 32;
  RoundRowToInt8(x, n, token, out);
  const int8_t* q = out.q + token * out.n_padded;
  float* scale = out.scale + token * out.n_padded / 16;
  const uint32_t* spike = out.spike + token * out.n_padded / 32;
  for (size_t e = 0; e < out.n_spikes; ++e) scale[n_blocks + e] = x[spike[e]];
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

// Adds to the sums of kTokens tokens kFours fours of the range's codes, from `four` of block `b`, which share a scale.
template <typename Simd, DType kType, size_t kTokens, size_t kFours>
__attribute__((always_inline)) inline void AddFours(const Int8Panel& panel, size_t b, size_t four,
                                                    const Int8Activations& x, size_t token,
                                                    typename Simd::Float acc[][kTokens]) {
  using Int = typename Simd::Int;
  using Float = typename Simd::Float;
  constexpr size_t kLanes = Simd::kLanes, kRows = kGroupVectors * kLanes, kGroups = ScaleGroups(kType);
  const size_t apart = x.n_padded / 16, part = b * kGroups + four * kGroups / kFoursInBlock;
  Int total[kGroupVectors][kTokens];
  Unrolled<kTokens>([&](auto t) __attribute__((always_inline)) {
    const int32_t* first = x.init + (token + t) * x.n_padded / 4 + part;
    const Int start = PanelOffset<Simd>(kType) == 0 ? Simd::ZeroInt() : Simd::Broadcast(*first);
    Unrolled<kGroupVectors>([&](auto v) __attribute__((always_inline)) { total[v][t] = start; });
  });
  const size_t at = b * 32 + four * 4;
  Simd::template AddProducts<CodeBits(kType), kGroupVectors, kTokens, kFours>(
      panel.codes + at * kRows, x.q + token * x.n_padded + at, x.n_padded, total);
  Unrolled<kGroupVectors>([&](auto v) __attribute__((always_inline)) {
    const Float scale = Simd::Load(panel.scale + part * kRows + v * kLanes);
    Unrolled<kTokens>([&](auto t) __attribute__((always_inline)) {
      const Float both = Simd::Mul(scale, Simd::Broadcast(x.scale[(token + t) * apart + b]));
      acc[v][t] = Simd::MulAdd(Simd::ToFloat(total[v][t]), both, acc[v][t]);
    });
    if constexpr (HasMinimum(kType)) {
      const Float minimum = Simd::Load(panel.minimum + part * kRows + v * kLanes);
      Unrolled<kTokens>([&](auto t) __attribute__((always_inline)) {
        acc[v][t] = Simd::MulAdd(minimum, Simd::Broadcast(x.sum[(token + t) * apart + part]), acc[v][t]);
      });
    }
  });
}

// A token's spikes within the range, each times its column of weights.
template <typename Simd, DType kType>
inline void AddSpikes(const Int8Panel& panel, const Int8Activations& x, const Int8Range& range, size_t token,
                      typename Simd::Float sums[kGroupVectors]) {
  using Float = typename Simd::Float;
  constexpr size_t kLanes = Simd::kLanes, kRows = kGroupVectors * kLanes, kGroupElements = 32 / ScaleGroups(kType);
  constexpr bool kSigned = HasSignedCodes(kType) && Simd::kSignedOffset == 0;
  const Float offset = Simd::Broadcast(static_cast<float>(-PanelOffset<Simd>(kType)));
  const uint32_t* spike = x.spike + token * x.n_padded / 32;
  const float* value = x.scale + token * x.n_padded / 16 + range.all_blocks;
  size_t e = 0;
  while (spike[e] < range.first_block * 32) ++e;
  Float acc[kGroupVectors];
  Unrolled<kGroupVectors>([&](auto v) __attribute__((always_inline)) { acc[v] = sums[v]; });
  for (; spike[e] < (range.first_block + range.n_blocks) * 32; ++e) {
    const size_t at = spike[e], part = at / kGroupElements;
    const Float factor = Simd::Broadcast(value[e]);
    Unrolled<kGroupVectors>([&](auto v) __attribute__((always_inline)) {
      const auto codes = Simd::LoadInt(panel.codes + (at / 4 * kRows + v * kLanes) * 4);
      const Float code = Simd::Add(Simd::ToFloat(Simd::template Byte<kSigned>(codes, at % 4)), offset);
      Float weight = Simd::Mul(code, Simd::Load(panel.scale + part * kRows + v * kLanes));
      if constexpr (HasMinimum(kType))
        weight = Simd::Add(weight, Simd::Load(panel.minimum + part * kRows + v * kLanes));
      acc[v] = Simd::MulAdd(weight, factor, acc[v]);
    });
  }
  Unrolled<kGroupVectors>([&](auto v) __attribute__((always_inline)) { sums[v] = acc[v]; });
}

template <typename Simd, DType kType, size_t kTokens>
void MultiplySome(const Int8Panel& panel, size_t n_rows, const Int8Activations& x, const Int8Range& range, size_t token,
                  float* y, size_t y_stride) {
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
#pragma GCC unroll 2
    for (size_t four = 0; four < kFoursInBlock; four += kFours)
      AddFours<Simd, kType, kTokens, kFours>(panel, b, four, x, token, acc);
  }
  Float sums[kTokens][kGroupVectors];  // in memory
  Unrolled<kTokens>([&](auto t) __attribute__((always_inline)) {
    Unrolled<kGroupVectors>([&](auto v) __attribute__((always_inline)) { sums[t][v] = acc[v][t]; });
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
      const Float sum = add ? Simd::Add(Simd::Load(out + v * kLanes), sums[t][v]) : sums[t][v];
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
