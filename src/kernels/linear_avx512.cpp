// Products with AVX-512 (F, BW, DQ, VL, VNNI). Built with those flags: nothing here may be called before cpu.h has seen
// that the processor has them, and nothing but the table at the end is visible outside.
#if defined(__x86_64__)

#include "kernels/linear_avx512-inl.h"
#include "kernels/linear_kernels.h"

namespace lesskv::internal {
namespace {

constexpr size_t kDotTokens = 4;         // tokens multiplied with a row in one pass over it
constexpr size_t kPrefetchBytes = 4096;  // how far ahead a row is fetched: the rows of a task follow each other

inline void Prefetch(const uint8_t* p, size_t bytes) {
  for (size_t i = 0; i < bytes; i += 64)
    _mm_prefetch(reinterpret_cast<const char*>(p + kPrefetchBytes + i), _MM_HINT_T0);
}

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
  inline void PutTail(size_t i, __m512 a, __m512 b, size_t count) {
    const uint32_t mask = (1u << count) - 1;
#pragma GCC unroll 4
    for (size_t t = 0; t < kTokens; ++t) {
      const float* row = x + t * x_stride + i;
      const __m512 x0 = _mm512_maskz_loadu_ps(static_cast<__mmask16>(mask), row);
      const __m512 x1 = _mm512_maskz_loadu_ps(static_cast<__mmask16>(mask >> 16), row + 16);
      acc[t][0] = _mm512_fmadd_ps(a, x0, acc[t][0]);
      acc[t][1] = _mm512_fmadd_ps(b, x1, acc[t][1]);
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

// --- Few tokens, int8 activations ---
//
// vpdpbusd multiplies unsigned codes with signed activations and adds four neighbours into an int32 lane. Codes are
// stored with an offset (8, 16, 32, or 128 after flipping the sign bit of Q8_0); the accumulator starts from minus the
// offset times the activations' sum, kept in `init`, so the integer result is exact and costs no correction.
//
// Element order of the activations:
//   Q4_0, Q5_0, Q5_1   per 128: elements 0..15 of four blocks, then elements 16..31 of the four; the two vectors of
//                      codes then share one accumulator, whose lanes 4 b .. 4 b + 3 belong to block b
//   Q4_K, Q5_K         per 256: sub-blocks 0, 2, 1, 3, 4, 6, 5, 7, as a load of 64 code bytes splits into nibbles
//   Q8_0, Q6_K         natural

constexpr bool IsMerged(DType type) { return type == DType::kQ4_0 || type == DType::kQ5_0 || type == DType::kQ5_1; }
constexpr bool IsK45(DType type) { return type == DType::kQ4_K || type == DType::kQ5_K; }

constexpr int CodeOffset(DType type) {
  switch (type) {
    case DType::kQ4_0:
      return 8;
    case DType::kQ5_0:
      return 16;
    case DType::kQ6_K:
      return 32;
    case DType::kQ8_0:
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

void Quantize(DType type, const float* x, size_t n, size_t token, const Int8Activations& out) {
  int8_t* q = out.q + token * out.n_padded;
  float* scale = out.scale + token * out.n_padded / 16;
  float* sum = out.sum + token * out.n_padded / 32;
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
    sum[b] = block_scale * static_cast<float>(_mm512_reduce_add_epi32(_mm512_add_epi32(q0, q1)));
    if (type == DType::kQ6_K) {
      scale[2 * b] = scale[2 * b + 1] = block_scale;
    } else {
      scale[b] = block_scale;
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
          x.sum + token * x.n_padded / 32};
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

template <DType kType>
struct Int8Group;  // four blocks of 32

template <>
struct Int8Group<DType::kQ4_0> {
  static constexpr size_t kBlockBytes = 18;
  static constexpr bool kHasMin = false;
  static inline void Codes(const uint8_t* p, __m512i codes[2]) {
    const __m512i nibble = _mm512_set1_epi8(15), v = FourCodes16(p + 2, 18);
    codes[0] = _mm512_and_si512(v, nibble);
    codes[1] = _mm512_and_si512(_mm512_srli_epi16(v, 4), nibble);
  }
};

template <size_t kBytes>
inline void FiveBitCodes(const uint8_t* codes_at, const uint8_t* fifth_at, __m512i codes[2]) {
  const __m512i nibble = _mm512_set1_epi8(15), v = FourCodes16(codes_at, kBytes);
  uint64_t low = 0, high = 0;
  for (size_t b = 0; b < 4; ++b) {
    low |= uint64_t{Load16(fifth_at + b * kBytes)} << (16 * b);
    high |= uint64_t{Load16(fifth_at + b * kBytes + 2)} << (16 * b);
  }
  codes[0] = AddFifthBits(_mm512_and_si512(v, nibble), low);
  codes[1] = AddFifthBits(_mm512_and_si512(_mm512_srli_epi16(v, 4), nibble), high);
}

template <>
struct Int8Group<DType::kQ5_0> {
  static constexpr size_t kBlockBytes = 22;
  static constexpr bool kHasMin = false;
  static inline void Codes(const uint8_t* p, __m512i codes[2]) { FiveBitCodes<22>(p + 6, p + 2, codes); }
};

template <>
struct Int8Group<DType::kQ5_1> {
  static constexpr size_t kBlockBytes = 24;
  static constexpr bool kHasMin = true;
  static inline void Codes(const uint8_t* p, __m512i codes[2]) { FiveBitCodes<24>(p + 8, p + 4, codes); }
};

template <>
struct Int8Group<DType::kQ8_0> {
  static constexpr size_t kBlockBytes = 34;
  static constexpr bool kHasMin = false;
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

// Types with blocks of 32, four blocks at a time.
template <DType kType, size_t kTokens>
struct Int8Dot {
  using Group = Int8Group<kType>;
  Int8Row x[kTokens];
  __m512 acc[kTokens];
  __m128 min_acc[kTokens];

  inline void Step(const uint8_t* p, size_t g) {
    __m512i codes[2];
    Group::Codes(p, codes);
    const __m128 d = FourHalves(p, Group::kBlockBytes);
#pragma GCC unroll 4
    for (size_t t = 0; t < kTokens; ++t) {
      const __m512i x0 = _mm512_loadu_si512(x[t].q + g * 128), x1 = _mm512_loadu_si512(x[t].q + g * 128 + 64);
      const __m512 scale = _mm512_castps128_ps512(_mm_mul_ps(d, _mm_loadu_ps(x[t].scale + g * 4)));
      if constexpr (IsMerged(kType)) {
        __m512i total = Group::kHasMin ? _mm512_setzero_si512() : _mm512_loadu_si512(x[t].init + g * 16);
        total = _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(total, codes[0], x0), codes[1], x1);
        acc[t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(total), _mm512_permutexvar_ps(QuarterLanes(0), scale), acc[t]);
      } else {
        const __m512i a = _mm512_dpbusd_epi32(_mm512_loadu_si512(x[t].init + g * 32), codes[0], x0);
        const __m512i b = _mm512_dpbusd_epi32(_mm512_loadu_si512(x[t].init + g * 32 + 16), codes[1], x1);
        acc[t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(a), _mm512_permutexvar_ps(HalfLanes(0, 1), scale), acc[t]);
        acc[t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(b), _mm512_permutexvar_ps(HalfLanes(2, 3), scale), acc[t]);
      }
      if constexpr (Group::kHasMin) {
        const __m128 m = FourHalves(p + 2, Group::kBlockBytes);
        min_acc[t] = _mm_fmadd_ps(m, _mm_loadu_ps(x[t].sum + g * 4), min_acc[t]);
      }
    }
  }

  inline void Row(const uint8_t* row, size_t n) {
    constexpr size_t kGroupBytes = 4 * Group::kBlockBytes;
    size_t g = 0;
    for (; (g + 1) * 128 <= n; ++g) {
      Prefetch(row + g * kGroupBytes, kGroupBytes);
      Step(row + g * kGroupBytes, g);
    }
    if (g * 128 == n) return;
    uint8_t last[kGroupBytes] = {};  // blocks beyond the row's end have scale zero
    __builtin_memcpy(last, row + g * kGroupBytes, (n - g * 128) / 32 * Group::kBlockBytes);
    Step(last, g);
  }

  inline void Finish(float* y, size_t y_stride) const {
#pragma GCC unroll 4
    for (size_t t = 0; t < kTokens; ++t) {
      float total = _mm512_reduce_add_ps(acc[t]);
      if constexpr (Group::kHasMin) total += _mm512_reduce_add_ps(_mm512_zextps128_ps512(min_acc[t]));
      y[t * y_stride] = total;
    }
  }

  inline void Reset() {
#pragma GCC unroll 4
    for (size_t t = 0; t < kTokens; ++t) acc[t] = _mm512_setzero_ps(), min_acc[t] = _mm_setzero_ps();
  }
};

// Codes of Q4_K: vectors of sub-blocks (0, 2), (1, 3), (4, 6), (5, 7).
template <DType kType>
inline void K45Codes(const uint8_t* block, __m512i codes[4]) {
  const __m512i nibble = _mm512_set1_epi8(15);
  const uint8_t* at = block + (kType == DType::kQ4_K ? 16 : 48);
  for (size_t p = 0; p < 2; ++p) {
    const __m512i v = _mm512_loadu_si512(at + 64 * p);
    codes[2 * p] = _mm512_and_si512(v, nibble);
    codes[2 * p + 1] = _mm512_and_si512(_mm512_srli_epi16(v, 4), nibble);
  }
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

template <DType kType, size_t kTokens>
struct Int8DotK45 {
  static constexpr size_t kBlockBytes = kType == DType::kQ4_K ? 144 : 176;
  Int8Row x[kTokens];
  __m512 acc[kTokens];
  __m256 min_acc[kTokens];

  inline void Step(const uint8_t* p, size_t b) {
    __m512i codes[4];
    K45Codes<kType>(p, codes);
    const ScalesAndMins packed = UnpackScales(p + 4);
    const __m256 d = _mm256_mul_ps(BytesToFloat8(packed.scales), _mm256_set1_ps(HalfAt(p)));
    const __m256 m = _mm256_mul_ps(BytesToFloat8(packed.mins), _mm256_set1_ps(HalfAt(p + 2)));
    const __m512i lanes[4] = {HalfLanes(0, 2), HalfLanes(1, 3), HalfLanes(4, 6), HalfLanes(5, 7)};
#pragma GCC unroll 4
    for (size_t t = 0; t < kTokens; ++t) {
      const __m512 scale = _mm512_castps256_ps512(_mm256_mul_ps(d, _mm256_loadu_ps(x[t].scale + b * 8)));
      min_acc[t] = _mm256_fnmadd_ps(m, _mm256_loadu_ps(x[t].sum + b * 8), min_acc[t]);
      for (size_t v = 0; v < 4; ++v) {
        const __m512i total =
            _mm512_dpbusd_epi32(_mm512_setzero_si512(), codes[v], _mm512_loadu_si512(x[t].q + b * 256 + v * 64));
        acc[t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(total), _mm512_permutexvar_ps(lanes[v], scale), acc[t]);
      }
    }
  }

  inline void Row(const uint8_t* row, size_t n) {
    for (size_t b = 0; b < n / 256; ++b, row += kBlockBytes) {
      Prefetch(row, kBlockBytes);
      Step(row, b);
    }
  }

  inline void Finish(float* y, size_t y_stride) const {
#pragma GCC unroll 4
    for (size_t t = 0; t < kTokens; ++t) {
      y[t * y_stride] = _mm512_reduce_add_ps(_mm512_add_ps(acc[t], _mm512_zextps256_ps512(min_acc[t])));
    }
  }

  inline void Reset() {
#pragma GCC unroll 4
    for (size_t t = 0; t < kTokens; ++t) acc[t] = _mm512_setzero_ps(), min_acc[t] = _mm256_setzero_ps();
  }
};

template <size_t kTokens>
struct Int8DotQ6K {
  static constexpr size_t kBlockBytes = 210;
  Int8Row x[kTokens];
  __m512 acc[kTokens];

  inline void Step(const uint8_t* p, size_t b) {
    __m512i codes[4];
    Q6Codes(p, codes);
    const __m512 d = _mm512_mul_ps(SignedToFloat(LoadCodes16(p + 192)), _mm512_set1_ps(HalfAt(p + 208)));
    const __m512i lanes[4] = {QuarterLanes(0), QuarterLanes(1), QuarterLanes(2), QuarterLanes(3)};
#pragma GCC unroll 4
    for (size_t t = 0; t < kTokens; ++t) {
      const __m512 scale = _mm512_mul_ps(d, _mm512_loadu_ps(x[t].scale + b * 16));
      for (size_t v = 0; v < 4; ++v) {
        const __m512i total = _mm512_dpbusd_epi32(_mm512_loadu_si512(x[t].init + b * 64 + v * 16), codes[v],
                                                  _mm512_loadu_si512(x[t].q + b * 256 + v * 64));
        acc[t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(total), _mm512_permutexvar_ps(lanes[v], scale), acc[t]);
      }
    }
  }

  inline void Row(const uint8_t* row, size_t n) {
    for (size_t b = 0; b < n / 256; ++b, row += kBlockBytes) {
      Prefetch(row, kBlockBytes);
      Step(row, b);
    }
  }

  inline void Finish(float* y, size_t y_stride) const {
#pragma GCC unroll 4
    for (size_t t = 0; t < kTokens; ++t) y[t * y_stride] = _mm512_reduce_add_ps(acc[t]);
  }

  inline void Reset() {
#pragma GCC unroll 4
    for (size_t t = 0; t < kTokens; ++t) acc[t] = _mm512_setzero_ps();
  }
};

template <DType kType, size_t kTokens>
struct Int8DotFor {
  using Type = Int8Dot<kType, kTokens>;
};
template <size_t kTokens>
struct Int8DotFor<DType::kQ4_K, kTokens> {
  using Type = Int8DotK45<DType::kQ4_K, kTokens>;
};
template <size_t kTokens>
struct Int8DotFor<DType::kQ5_K, kTokens> {
  using Type = Int8DotK45<DType::kQ5_K, kTokens>;
};
template <size_t kTokens>
struct Int8DotFor<DType::kQ6_K, kTokens> {
  using Type = Int8DotQ6K<kTokens>;
};

template <DType kType, size_t kTokens>
void DotInt8Rows(const RowBlock& block, const Int8Activations& x, size_t token, float* y, size_t y_stride) {
  typename Int8DotFor<kType, kTokens>::Type dot;
#pragma GCC unroll 4
  for (size_t t = 0; t < kTokens; ++t) dot.x[t] = TokenRow(x, token + t);
  for (size_t r = 0; r < block.n_rows; ++r) {
    dot.Reset();
    dot.Row(block.rows + r * block.row_bytes, block.n);
    dot.Finish(y + r, y_stride);
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

template <size_t kVectors, size_t kRows>
void TileF32Fixed(const float* const* rows, size_t n, const float* group, float* acc, bool first) {
  constexpr size_t kWidth = kVectors * kTokenLanes;
  __m512 sum[kRows][kVectors];
  const float* row[kRows];
#pragma GCC unroll 24
  for (size_t r = 0; r < kRows; ++r) {
    row[r] = rows[r];
#pragma GCC unroll 4
    for (size_t v = 0; v < kVectors; ++v) {
      sum[r][v] = first ? _mm512_setzero_ps() : _mm512_loadu_ps(acc + r * kWidth + v * kTokenLanes);
    }
  }
  for (size_t i = 0; i < n; ++i) {
    __m512 x[kVectors];
#pragma GCC unroll 4
    for (size_t v = 0; v < kVectors; ++v) x[v] = _mm512_loadu_ps(group + i * kWidth + v * kTokenLanes);
#pragma GCC unroll 24
    for (size_t r = 0; r < kRows; ++r) {
      const __m512 w = _mm512_set1_ps(row[r][i]);
#pragma GCC unroll 4
      for (size_t v = 0; v < kVectors; ++v) sum[r][v] = _mm512_fmadd_ps(w, x[v], sum[r][v]);
    }
  }
#pragma GCC unroll 24
  for (size_t r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (size_t v = 0; v < kVectors; ++v) _mm512_storeu_ps(acc + r * kWidth + v * kTokenLanes, sum[r][v]);
  }
}

constexpr size_t kTileRows[kMaxGroupVectors] = {12, 12, 8, 6};

void TileF32(const float* const* rows, size_t n, const float* group, size_t vectors, float* acc, bool first) {
  switch (vectors) {
    case 1:
      return TileF32Fixed<1, kTileRows[0]>(rows, n, group, acc, first);
    case 2:
      return TileF32Fixed<2, kTileRows[1]>(rows, n, group, acc, first);
    case 3:
      return TileF32Fixed<3, kTileRows[2]>(rows, n, group, acc, first);
    default:
      return TileF32Fixed<4, kTileRows[3]>(rows, n, group, acc, first);
  }
}

}  // namespace

const LinearKernels& Avx512LinearKernels() {
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
      .group_vectors = kMaxGroupVectors,
      .tile_rows_f32 = {kTileRows[0], kTileRows[1], kTileRows[2], kTileRows[3]},
      .tile_rows_bf16 = {0, 0, 0, 0},
  };
  return kKernels;
}

}  // namespace lesskv::internal

#endif  // defined(__x86_64__)
