// Products with AVX2, FMA and F16C. Built with those flags; see linear_avx512.cpp for the rules.
#if defined(__x86_64__)

#include "kernels/linear/linear_avx2-inl.h"
#include "kernels/linear/linear_kernels.h"

namespace lesskv::internal {
namespace {

constexpr size_t kDotTokens = 4;  // tokens multiplied with a row in one pass over it

inline float SumLanes(__m256 v) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps(s, s, 1)));
}

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
    default:
      return SwitchQuantized(type, f);
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

void Quantize(DType type, const float* x, size_t n, size_t token, const Int8Activations& out) {
  const size_t n_blocks = RoundRowToInt8(x, n, token, out);
  const int8_t* q = out.q + token * out.n_padded;
  const float* scale = out.scale + token * out.n_padded / 16;
  int32_t* init = out.init + token * out.n_padded / 4;
  float* sum = out.sum + token * out.n_padded / 16;
  for (size_t b = 0; b < n_blocks; ++b) {
    const __m256i fours = SumsOfFour(q + b * 32);
    const __m256i start = _mm256_mullo_epi32(fours, _mm256_set1_epi32(-CodeOffset(type)));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(init + b * 8), start);
    int totals[2];
    SumHalves(fours, totals);
    if (HasTwoMinima(type)) {
      for (size_t i = 0; i < 2; ++i) sum[2 * b + i] = scale[b] * static_cast<float>(totals[i]);
    } else {
      sum[b] = scale[b] * static_cast<float>(totals[0] + totals[1]);
    }
  }
}

// Adds a token's block `x_block` times 32 codes.
template <DType kType>
__attribute__((always_inline)) inline void AddInt8Block(const Codes32& c, const Int8Activations& x, size_t token, size_t x_block, __m256& acc,
                         float& min_acc) {
  const size_t at = token * x.n_padded;
  const __m256i codes = HasSignedCodes(kType) ? _mm256_abs_epi8(c.codes) : c.codes;
  __m256i q = Load32Bytes(reinterpret_cast<const uint8_t*>(x.q + at + x_block * 32));
  if constexpr (HasSignedCodes(kType)) q = _mm256_sign_epi8(q, c.codes);
  __m256i total = _mm256_madd_epi16(_mm256_maddubs_epi16(codes, q), _mm256_set1_epi16(1));
  if constexpr (CodeOffset(kType) != 0) {
    const int32_t* init = x.init + at / 4 + x_block * 8;
    total = _mm256_add_epi32(total, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(init)));
  }
  const float x_scale = x.scale[at / 16 + x_block];
  __m256 scale = _mm256_set1_ps(c.scale[0] * x_scale);
  if constexpr (ScaleGroups(kType) == 2)
    scale = _mm256_insertf128_ps(scale, _mm_set1_ps(c.scale[1] * x_scale), 1);
  acc = _mm256_fmadd_ps(_mm256_cvtepi32_ps(total), scale, acc);
  if constexpr (HasTwoMinima(kType)) {
    min_acc += c.minimum[0] * x.sum[at / 16 + 2 * x_block] + c.minimum[1] * x.sum[at / 16 + 2 * x_block + 1];
  } else if constexpr (HasMinimum(kType)) {
    min_acc += c.minimum[0] * x.sum[at / 16 + x_block];
  }
}

// kRows rows, `apart` rows from each other: a token's product would wait for its own sums, and two streams come faster.
template <DType kType, size_t kTokens, size_t kRows>
inline void DotInt8Row(const uint8_t* first, size_t row_bytes, size_t apart, size_t n, const Int8Activations& x,
                       size_t token, float* y, size_t y_stride) {
  __m256 acc[kRows][kTokens];
  float min_acc[kRows][kTokens];
#pragma GCC unroll 2
  for (size_t r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (size_t t = 0; t < kTokens; ++t) acc[r][t] = _mm256_setzero_ps(), min_acc[r][t] = 0;
  }
  const size_t n_blocks = n / 32;
  const uint32_t* spike[kTokens];  // of each token the next one
  Unrolled<kTokens>([&](auto t) { spike[t] = x.spike + (token + t) * x.n_padded / 32; });
  // Blocks whose places are known when this is compiled, where registers allow.
  constexpr bool kSuper = IsSuperBlock(kType) && (kTokens == 1 || ScaleGroups(kType) == 1 || kType == DType::kQ6_K);
  constexpr size_t kUnit = kSuper ? 8 : 1;
  constexpr size_t kUnitBytes = kSuper ? SuperBlockBytes(kType) : 0;
  Reader<kType> readers[kRows];
  for (size_t unit = 0; unit < n_blocks; unit += kUnit) {
    const auto codes_of = [&](auto r, size_t b) __attribute__((always_inline)) {
      const uint8_t* row = first + r * apart * row_bytes;
      return kSuper ? readers[r].At(row + unit / kUnit * kUnitBytes, b) : readers[r].At(row, unit + b);
    };
    Unrolled<kUnit>([&](auto b) __attribute__((always_inline)) {
      Unrolled<kRows>([&](auto r) __attribute__((always_inline)) {
        const Codes32 c = codes_of(r, b);
        Unrolled<kTokens>([&](auto t) __attribute__((always_inline)) {
          AddInt8Block<kType>(c, x, token + t, unit + b, acc[r][t], min_acc[r][t]);
        });
      });
    });
    Unrolled<kTokens>([&](auto t) __attribute__((always_inline)) {
      for (; *spike[t] / (32 * kUnit) == unit / kUnit; ++spike[t]) {
        const size_t at = n_blocks + static_cast<size_t>(spike[t] - (x.spike + (token + t) * x.n_padded / 32));
        Unrolled<kRows>([&](auto r) __attribute__((always_inline)) {
          const Codes32 c = codes_of(r, *spike[t] / 32 % kUnit);
          AddInt8Block<kType>(c, x, token + t, at, acc[r][t], min_acc[r][t]);
        });
      }
    });
  }
#pragma GCC unroll 2
  for (size_t r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (size_t t = 0; t < kTokens; ++t) y[t * y_stride + r * apart] = SumLanes(acc[r][t]) + min_acc[r][t];
  }
}

template <DType kType, size_t kTokens>
void DotInt8Rows(const RowBlock& block, const Int8Activations& x, size_t token, float* y, size_t y_stride) {
  size_t r = 0;
  if constexpr (kTokens == 1) {
    const size_t apart = block.n_rows / 2;
    for (; r < apart; ++r) {
      DotInt8Row<kType, 1, 2>(block.rows + r * block.row_bytes, block.row_bytes, apart, block.n, x, token, y + r,
                              y_stride);
    }
    r = 2 * apart;
  }
  for (; r < block.n_rows; ++r) {
    DotInt8Row<kType, kTokens, 1>(block.rows + r * block.row_bytes, block.row_bytes, 0, block.n, x, token, y + r,
                                  y_stride);
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
  static const LinearKernels kKernels = {
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
      .int8 = &Avx2Int8Kernels(),
      .dots_take_spikes = true,
      .store = ScalarStore,
      .few_panel = 3,
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
