// Products with AVX2, FMA and F16C. Built with those flags; see linear_avx512.cpp for the rules.
#if defined(__x86_64__)

#include "kernels/linear/linear_avx2-inl.h"
#include "kernels/linear/linear_floats-inl.h"
#include "kernels/linear/linear_kernels.h"

namespace lesskv::internal {
namespace {

// --- Unpack: a sink receives 32 elements as four vectors; float types may end with fewer, given as floats in memory
// ---

inline __m256 EightFloats(__m128i codes) { return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(codes)); }

template <DType kType>
struct Unpacker {
  template <typename Sink>
  static inline Sink Row(const uint8_t* row, size_t n, Sink sink) {
    using F = Format<kType>;
    Reader<kType> reader;
    for (size_t b = 0; b < n / 32; ++b) {
      const Codes32 c = reader.At(row, b);
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

struct Floats256 {
  using Vec = __m256;
  static constexpr size_t kLanes = 8, kMostTokens = 4;
  static constexpr size_t Rows(size_t tokens) { return tokens <= 2 ? 4 : 2; }
  static Vec Zero() { return _mm256_setzero_ps(); }
  static Vec Load(const float* p) { return _mm256_loadu_ps(p); }
  static Vec AddProduct(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
  static float Sum(Vec v) { return SumLanes(v); }
  template <DType kType>
  static Vec LoadRow(const uint8_t* row, size_t i) {
    if constexpr (kType == DType::kF32) return _mm256_castsi256_ps(Load32Bytes(row + i * 4));
    const __m128i halves = Load16Bytes(row + i * 2);
    if constexpr (kType == DType::kF16) return _mm256_cvtph_ps(halves);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
  }
};

template <DType kType>
requires(IsFloat(kType)) struct Unpacker<kType> {
  template <typename Sink>
  static inline Sink Row(const uint8_t* row, size_t n, Sink sink) {
    size_t i = 0;
    for (; i + 32 <= n; i += 32) {
      sink.Put(i, Floats256::LoadRow<kType>(row, i), Floats256::LoadRow<kType>(row, i + 8),
               Floats256::LoadRow<kType>(row, i + 16), Floats256::LoadRow<kType>(row, i + 24));
    }
    if (i == n) return sink;
    alignas(32) float last[32];
    for (size_t j = i; j < n; j += 8) _mm256_store_ps(last + (j - i), LoadSome<Floats256, kType>(row, j, n - j));
    sink.PutTail(i, last, n - i);
    return sink;
  }
};

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

void DotF32(const RowBlock& block, const float* x, size_t x_stride, size_t n_tokens, float* y, size_t y_stride) {
  SwitchType(block.type, [&]<DType kType>() {
    if constexpr (IsFloat(kType)) {
      DotFloatTokens<Floats256, kType>(block, x, x_stride, n_tokens, y, y_stride);
    } else {
      ForTokens<1>(block, n_tokens, [&]<size_t kTokens>(const RowBlock& rows, size_t t, size_t r) {
        DotF32Rows<kType, kTokens>(rows, x + t * x_stride, x_stride, y + t * y_stride + r, y_stride);
      });
    }
  });
}

// --- Many tokens ---

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
  static const LinearKernels kKernels = {
      .unpack_f32 = UnpackF32,
      .unpack_bf16 = nullptr,
      .dot_f32 = DotF32,
      .quantize = Avx2QuantizeActivations,
      .dot_int8 = Avx2DotInt8,
      .pack_f32 = ScalarPackF32,
      .pack_bf16 = nullptr,
      .tile_f32 = TileF32,
      .tile_bf16 = nullptr,
      .shape_f32 = {.group_vectors = 1, .rows = {kTileRows}},
      .shape_bf16 = {},
      .int8 = &Avx2Int8Kernels(),
      .dots_take_spikes = true,
      .store = ScalarStore,
      .few_float = 12,
      .few_panel = 3,
      .longest_few_int8 = kAvx2LongestDotInt8,
  };
  return kKernels;
}

const LinearKernels& AvxVnniLinearKernels() {
  static const LinearKernels kernels = [] {
    LinearKernels k = Avx2LinearKernels();
    k.int8 = &AvxVnniInt8Kernels();
    return k;
  }();
  return kernels;
}

}  // namespace lesskv::internal

#endif  // defined(__x86_64__)
