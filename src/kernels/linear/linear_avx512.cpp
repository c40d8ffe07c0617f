// Products with AVX-512 (F, BW, DQ, VL, VNNI). Built with those flags: nothing here may be called before cpu.h has seen
// that the processor has them, and nothing but the table at the end is visible outside.
#if defined(__x86_64__)

#include "kernels/linear/linear_avx512-inl.h"
#include "kernels/linear/linear_floats-inl.h"
#include "kernels/linear/linear_kernels.h"

namespace lesskv::internal {
namespace {

// --- Unpack ---

struct StoreSink {
  float* out;
  inline void Put(size_t i, __m512 a, __m512 b) const {
    _mm512_storeu_ps(out + i, a);
    _mm512_storeu_ps(out + i + 16, b);
  }
  inline void PutTail(size_t i, __m512 a, __m512 b, size_t count) const {
    const uint32_t mask = (1u << count) - 1;
    _mm512_mask_storeu_ps(out + i, static_cast<__mmask16>(mask), a);
    _mm512_mask_storeu_ps(out + i + 16, static_cast<__mmask16>(mask >> 16), b);
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

struct Floats512 {
  using Vec = __m512;
  static constexpr size_t kLanes = 16, kMostTokens = kKernelTokens;
  static constexpr size_t Rows(size_t tokens) { return tokens <= 4 ? 4 : 3; }
  static Vec Zero() { return _mm512_setzero_ps(); }
  static Vec Load(const float* p) { return _mm512_loadu_ps(p); }
  static Vec AddProduct(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
  static float Sum(Vec v) { return _mm512_reduce_add_ps(v); }
  template <DType kType>
  static Vec LoadRow(const uint8_t* row, size_t i) {
    return LoadFloats<kType>(row, i, 0xffff);
  }
};

template <size_t kTokens>
struct DotSink {
  const float* x;
  size_t x_stride;
  __m512 acc[kTokens][2];

  inline void Put(size_t i, __m512 a, __m512 b) {
#pragma GCC unroll 4
    for (size_t t = 0; t < kTokens; ++t) {
      acc[t][0] = _mm512_fmadd_ps(a, _mm512_loadu_ps(x + t * x_stride + i), acc[t][0]);
      acc[t][1] = _mm512_fmadd_ps(b, _mm512_loadu_ps(x + t * x_stride + i + 16), acc[t][1]);
    }
  }
};

template <DType kType>
struct FloatRowDot {
  template <size_t kTokens>
  static inline void Row(const uint8_t* row, size_t n, const float* x, size_t x_stride, float* y, size_t y_stride) {
    DotSink<kTokens> sink;
    sink.x = x;
    sink.x_stride = x_stride;
#pragma GCC unroll 4
    for (size_t t = 0; t < kTokens; ++t) sink.acc[t][0] = sink.acc[t][1] = _mm512_setzero_ps();
    sink = Unpacker<kType>::Row(row, n, sink);
#pragma GCC unroll 4
    for (size_t t = 0; t < kTokens; ++t) {
      y[t * y_stride] = _mm512_reduce_add_ps(_mm512_add_ps(sink.acc[t][0], sink.acc[t][1]));
    }
  }
};

template <DType kType, size_t kTokens>
void DotF32Rows(const RowBlock& block, const float* x, size_t x_stride, float* y, size_t y_stride) {
  for (size_t r = 0; r < block.n_rows; ++r) {
    FloatRowDot<kType>::template Row<kTokens>(block.rows + r * block.row_bytes, block.n, x, x_stride, y + r, y_stride);
  }
}

void DotF32(const RowBlock& block, const float* x, size_t x_stride, size_t n_tokens, float* y, size_t y_stride) {
  SwitchType(block.type, [&]<DType kType>() {
    if constexpr (IsFloat(kType)) {
      DotFloatTokens<Floats512, kType>(block, x, x_stride, n_tokens, y, y_stride);
    } else {
      ForTokens<2>(block, n_tokens, [&]<size_t kTokens>(const RowBlock& rows, size_t t, size_t r) {
        DotF32Rows<kType, kTokens>(rows, x + t * x_stride, x_stride, y + t * y_stride + r, y_stride);
      });
    }
  });
}

// --- Many tokens, float32 ---

// In-register transposition of 16 rows of 16 32-bit values.
inline void Transpose16(__m512i v[16]) {
  __m512i t[16];
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_epi32(v[2 * i], v[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(v[2 * i], v[2 * i + 1]);
  }
  for (int i = 0; i < 4; ++i) {
    v[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    v[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    v[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    v[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(v[i], v[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(v[i], v[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(v[i + 8], v[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(v[i + 8], v[i + 12], 0xdd);
  }
  for (int i = 0; i < 4; ++i) {
    v[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    v[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    v[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
    v[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
  }
}

void PackF32(const float* x, size_t x_stride, size_t n_tokens, size_t n, size_t vectors, float* out) {
  const size_t width = vectors * kTokenLanes;
  for (size_t v = 0; v < vectors; ++v) {
    for (size_t i = 0; i < n; i += 16) {
      const size_t count = n - i < 16 ? n - i : 16;
      const __mmask16 mask = static_cast<__mmask16>((1u << count) - 1);
      __m512i tile[16];
      for (size_t t = 0; t < 16; ++t) {
        const size_t token = v * kTokenLanes + t;
        tile[t] = token < n_tokens ? _mm512_maskz_loadu_epi32(mask, x + token * x_stride + i) : _mm512_setzero_si512();
      }
      Transpose16(tile);
      for (size_t j = 0; j < count; ++j) _mm512_storeu_si512(out + (i + j) * width + v * kTokenLanes, tile[j]);
    }
  }
}

struct FloatLanes {
  using Element = float;
  using Vec = __m512;
  static constexpr size_t kElements = 1;
  static Vec Load(const float* p) { return _mm512_loadu_ps(p); }
  static Vec Broadcast(const float* p) { return _mm512_set1_ps(*p); }
  static __m512 AddProduct(Vec a, Vec b, __m512 c) { return _mm512_fmadd_ps(a, b, c); }
};

// 16 rows of 16 tokens become 16 tokens of 16 rows: pairs, fours and then 128-bit lanes change places.
void StoreSquare(const float* acc, size_t width, size_t n_tokens, float* y, size_t y_stride) {
  __m512 x[16], z[16];
#pragma GCC unroll 16
  for (size_t r = 0; r < 16; ++r) x[r] = _mm512_loadu_ps(acc + r * width);
#pragma GCC unroll 8
  for (size_t r = 0; r < 16; r += 2) {
    z[r] = _mm512_unpacklo_ps(x[r], x[r + 1]);
    z[r + 1] = _mm512_unpackhi_ps(x[r], x[r + 1]);
  }
#pragma GCC unroll 4
  for (size_t r = 0; r < 16; r += 4) {  // x[r + i]: tokens i, i + 4, i + 8, i + 12 of four rows
    x[r] = _mm512_shuffle_ps(z[r], z[r + 2], 0x44);
    x[r + 1] = _mm512_shuffle_ps(z[r], z[r + 2], 0xee);
    x[r + 2] = _mm512_shuffle_ps(z[r + 1], z[r + 3], 0x44);
    x[r + 3] = _mm512_shuffle_ps(z[r + 1], z[r + 3], 0xee);
  }
  for (size_t i = 0; i < 4; ++i) {
    const __m512 a = _mm512_shuffle_f32x4(x[i], x[i + 4], 0x44), b = _mm512_shuffle_f32x4(x[i], x[i + 4], 0xee);
    const __m512 c = _mm512_shuffle_f32x4(x[i + 8], x[i + 12], 0x44), d = _mm512_shuffle_f32x4(x[i + 8], x[i + 12], 0xee);
    const __m512 tokens[4] = {_mm512_shuffle_f32x4(a, c, 0x88), _mm512_shuffle_f32x4(a, c, 0xdd),
                              _mm512_shuffle_f32x4(b, d, 0x88), _mm512_shuffle_f32x4(b, d, 0xdd)};
    for (size_t j = 0; j < 4 && i + 4 * j < n_tokens; ++j) _mm512_storeu_ps(y + (i + 4 * j) * y_stride, tokens[j]);
  }
}

void Store(const float* acc, size_t width, size_t n_rows, size_t n_tokens, float* y, size_t y_stride) {
  const size_t squares = n_rows / 16 * 16;
  for (size_t t = 0; t < n_tokens; t += 16) {
    const size_t count = n_tokens - t < 16 ? n_tokens - t : 16;
    for (size_t r = 0; r < squares; r += 16)
      StoreSquare(acc + r * width + t, width, count, y + t * y_stride + r, y_stride);
  }
  ScalarStore(acc + squares * width, width, n_rows - squares, n_tokens, y + squares, y_stride);
}

}  // namespace

const LinearKernels& Avx512LinearKernels() {
  static const LinearKernels kKernels = {
      .unpack_f32 = UnpackF32,
      .unpack_bf16 = nullptr,
      .dot_f32 = DotF32,
      .quantize = Avx512QuantizeActivations,
      .dot_int8 = Avx512DotInt8,
      .pack_f32 = PackF32,
      .pack_bf16 = nullptr,
      .tile_f32 = Tile<FloatLanes>,
      .tile_bf16 = nullptr,
      .shape_f32 = {.group_vectors = kMaxGroupVectors, .rows = {kTileRows[0], kTileRows[1], kTileRows[2], kTileRows[3]}},
      .shape_bf16 = {},
      .int8 = &Avx512Int8Kernels(),
      .store = Store,
      .few_float = 12,
  };
  return kKernels;
}

}  // namespace lesskv::internal

#endif  // defined(__x86_64__)
