// Products with AVX2, FMA and F16C. Built with those flags; see linear_avx512.cpp for the rules.
#if defined(__x86_64__)

#include "kernels/linear/linear_avx2-inl.h"
#include "kernels/linear/linear_floats-inl.h"
#include "kernels/linear/linear_kernels.h"

namespace lesskv::internal {
namespace {

constexpr size_t kLongestDot = 32768;  // elements of a row, with int8 activations

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
  requires(IsFloat(kType))
struct Unpacker<kType> {
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

// --- Few tokens, int8 activations in natural order ---
//
// vpmaddubsw adds two products of an unsigned code and a signed activation in 16 bits: codes up to 63 cannot saturate
// it, and signed codes pass their sign to the activation. Eight blocks share what they can: their scales become floats
// together, and one product with the activations' sums is all that minima, or the offset of codes, cost. Spikes meet
// the codes and scales of their elements, gathered eight at a time.

// Scales and sums have an entry for each scale of the weights, up to whole 256 elements. Sums have the spikes in them,
// and the factor minus the offset where codes have one. The spikes themselves stand behind the scales.
void Quantize(DType type, const float* x, size_t n, size_t token, const Int8Activations& out) {
  RoundRowToInt8(x, n, token, out);
  const int8_t* q = out.q + token * out.n_padded;
  float* scale = out.scale + token * out.n_padded / 16;
  float* sum = out.sum + token * out.n_padded / 16;
  const uint32_t* spike = out.spike + token * out.n_padded / 32;
  const size_t groups = ScaleGroups(type), n_scales = n / 32 * groups, spikes_at = (n + 255) / 256 * 8 * groups;
  for (size_t b = n / 32; b-- > 0;) {  // from the last one, because scales may take more room
    int totals[2];
    SumHalves(SumsOfFour(q + b * 32), totals);
    if (groups == 1) totals[0] += totals[1];
    const float block_scale = scale[b];
    for (size_t g = 0; g < groups; ++g) {
      scale[b * groups + g] = block_scale;
      sum[b * groups + g] = block_scale * static_cast<float>(totals[g]);
    }
  }
  for (size_t i = n_scales; i < spikes_at; ++i) scale[i] = sum[i] = 0;
  for (size_t e = 0; e < out.n_spikes; ++e) {
    scale[spikes_at + e] = x[spike[e]];
    sum[spike[e] * groups / 32] += x[spike[e]];
  }
  if (CodeOffset(type) == 0) return;
  for (size_t i = 0; i < n_scales; ++i) sum[i] *= static_cast<float>(-CodeOffset(type));
}

// A token's spikes, and where every row has their codes (as in CodePlace) and scales. Zeros fill the last eight.
struct SpikePlan {
  static constexpr size_t kMost = kLongestDot / kElementsOfSpike;
  size_t n = 0;
  float value[kMost];
  uint32_t scale[kMost];
  uint32_t low_byte[kMost], low_shift[kMost], high_byte[kMost], high_shift[kMost];
};

template <DType kType>
inline void MakePlan(const Int8Activations& x, size_t n, size_t token, SpikePlan& plan) {
  const uint32_t* spike = x.spike + token * x.n_padded / 32;
  const float* value = x.scale + token * x.n_padded / 16 + (n + 255) / 256 * 8 * ScaleGroups(kType);
  for (plan.n = 0; plan.n < x.n_spikes || plan.n % 8 != 0; ++plan.n) {
    const size_t e = plan.n, i = e < x.n_spikes ? spike[e] : 0;
    const CodePlace place = PlaceOf<kType>(i);
    plan.value[e] = e < x.n_spikes ? value[e] : 0;
    plan.scale[e] = static_cast<uint32_t>(i * ScaleGroups(kType) / 32);
    plan.low_byte[e] = static_cast<uint32_t>(place.low_byte);
    plan.low_shift[e] = static_cast<uint32_t>(place.low_shift);
    plan.high_byte[e] = static_cast<uint32_t>(place.high_byte);
    plan.high_shift[e] = static_cast<uint32_t>(place.high_shift);
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
  if constexpr (HighBits(kType) > 0) {
    const __m256i high = EightFields(row, plan.high_byte + e, plan.high_shift + e, HighBits(kType));
    bits = _mm256_or_si256(bits, _mm256_slli_epi32(high, LowBits(kType)));
  }
  const uint32_t* at = plan.scale + e;
  const __m256 scales = _mm256_setr_ps(scale[at[0]], scale[at[1]], scale[at[2]], scale[at[3]], scale[at[4]],
                                       scale[at[5]], scale[at[6]], scale[at[7]]);
  const __m256 weights = _mm256_mul_ps(_mm256_cvtepi32_ps(CodesOfBits<kType>(bits)), scales);
  return _mm256_fmadd_ps(weights, _mm256_loadu_ps(plan.value + e), sum);
}

// The products of 32 codes, in eight sums of four.
template <DType kType>
inline __m256 BlockProduct(__m256i codes, const int8_t* q) {
  __m256i x = Load32Bytes(reinterpret_cast<const uint8_t*>(q));
  if constexpr (HasSignedCodes(kType)) {
    x = _mm256_sign_epi8(x, codes);
    codes = _mm256_abs_epi8(codes);
  }
  return _mm256_cvtepi32_ps(_mm256_madd_epi16(_mm256_maddubs_epi16(codes, x), _mm256_set1_epi16(1)));
}

// The scale of a block's eight sums.
template <DType kType>
inline __m256 BlockScale(const float* scale, size_t b) {
  if constexpr (ScaleGroups(kType) == 1) return _mm256_broadcast_ss(scale + b);
  const __m256d both = _mm256_broadcast_sd(reinterpret_cast<const double*>(scale + 2 * b));
  return _mm256_permutevar_ps(_mm256_castpd_ps(both), _mm256_set_epi32(1, 1, 1, 1, 0, 0, 0, 0));
}

// Types bound by arithmetic come fastest with the first cache filled a few units ahead; Q8_0, which is bound by memory,
// with the second one filled further ahead.
template <DType kType>
inline void FetchAhead(const uint8_t* unit) {
  for (size_t i = 0; i < BytesOf256(kType); i += 64)
    kType == DType::kQ8_0 ? __builtin_prefetch(unit + 4096 + i, 0, 2) : __builtin_prefetch(unit + 2048 + i);
}

// kRows rows, `apart` rows from each other: two streams come faster. Blocks take turns with two sums, or one would wait
// for itself.
template <DType kType, size_t kTokens, size_t kRows>
inline void DotInt8Row(const uint8_t* first, size_t row_bytes, size_t apart, size_t n, const Int8Activations& x,
                       size_t token, const SpikePlan* plans, float* y, size_t y_stride) {
  constexpr size_t kGroups = ScaleGroups(kType);
  const size_t n_units = (n + 255) / 256;  // of 256 elements, the last one perhaps of fewer
  const auto blocks_of = [n](size_t unit) { return IsOf256(kType) || unit * 256 + 256 <= n ? 8 : n % 256 / 32; };
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
  // The scales of the weights, and those of two units times those of the activations: read a unit ahead of the codes,
  // which would wait for them.
  alignas(32) float scale[kRows][kLongestDot / 32 * kGroups], both[kRows][kTokens][2][8 * kGroups];
  const auto read_scales = [&](size_t unit) __attribute__((always_inline)) {
    Unrolled<kRows>([&](auto r) __attribute__((always_inline)) {
      const uint8_t* at = row[r] + unit * BytesOf256(kType);
      FetchAhead<kType>(at);
      const Scales256<kType> s = ScalesAt<kType>(at, blocks_of(unit));
      Unrolled<kGroups>([&](auto g) __attribute__((always_inline)) {
        const size_t to = (unit * kGroups + g) * 8;
        _mm256_store_ps(scale[r] + to, s.scale[g]);
        Unrolled<kTokens>([&](auto t) __attribute__((always_inline)) {
          _mm256_store_ps(both[r][t][unit % 2] + 8 * g, _mm256_mul_ps(s.scale[g], _mm256_loadu_ps(x_scale[t] + to)));
          if constexpr (HasMinimum(kType) || CodeOffset(kType) != 0) {
            const __m256 added = HasMinimum(kType) ? s.minimum[g] : s.scale[g];
            min_acc[r][t] = _mm256_fmadd_ps(added, _mm256_loadu_ps(x_sum[t] + to), min_acc[r][t]);
          }
        });
      });
    });
  };
  read_scales(0);
  for (size_t unit = 0; unit < n_units; ++unit) {
    if (unit + 1 < n_units) read_scales(unit + 1);
    const auto add = [&](auto half, size_t b) __attribute__((always_inline)) {
      Unrolled<kRows>([&](auto r) __attribute__((always_inline)) {
        const __m256i codes = CodesAt<kType>(row[r] + unit * BytesOf256(kType), b);
        Unrolled<kTokens>([&](auto t) __attribute__((always_inline)) {
          acc[r][t][half] = _mm256_fmadd_ps(BlockProduct<kType>(codes, q[t] + unit * 256 + b * 32),
                                            BlockScale<kType>(both[r][t][unit % 2], b), acc[r][t][half]);
        });
      });
    };
    const size_t n_blocks = blocks_of(unit);
    if (n_blocks == 8) {
      Unrolled<8>([&](auto b) __attribute__((always_inline)) { add(std::integral_constant<size_t, b % 2>{}, b); });
    } else {
#pragma GCC unroll 1
      for (size_t b = 0; b < n_blocks; ++b) add(std::integral_constant<size_t, 0>{}, b);
    }
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

void DotInt8(const RowBlock& block, const Int8Activations& x, size_t n_tokens, float* y, size_t y_stride) {
  SwitchQuantized(block.type, [&]<DType kType>() {
    SpikePlan plans[kKernelTokens];
    for (size_t t = 0; t < n_tokens; ++t) MakePlan<kType>(x, block.n, t, plans[t]);
    ForTokens<1>(block, n_tokens, [&]<size_t kTokens>(const RowBlock& rows, size_t t, size_t r) {
      DotInt8Rows<kType, kTokens>(rows, x, t, plans + t, y + t * y_stride + r, y_stride);
    });
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
      .quantize = Quantize,
      .dot_int8 = DotInt8,
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
      .longest_few_int8 = kLongestDot,
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
