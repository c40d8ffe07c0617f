// Products on 64-bit ARM, written with Highway for vectors of 128 bits. Included by linear_neon.cpp and
// linear_dotprod.cpp; everything is in an anonymous namespace, so that each keeps its own copy, built with its own
// flags. Behind it they define how 8-bit numbers are multiplied (Dot). Block layouts are described in quants.h. Many
// tokens in 8-bit numbers take the kernel of few tokens, in turns.
#pragma once

#include <hwy/highway.h>

#include "kernels/linear/linear_rounding-inl.h"
#include "kernels/linear/linear_rows-inl.h"
#include "kernels/quants/code_tables.h"

HWY_BEFORE_NAMESPACE();
namespace lesskv::internal {
namespace {

namespace hn = hwy::HWY_NAMESPACE;
using DF = hn::Full128<float>;
using DI32 = hn::Full128<int32_t>;
using DI8 = hn::Full128<int8_t>;
using DU8 = hn::Full128<uint8_t>;
using VF = hn::Vec<DF>;
using VI32 = hn::Vec<DI32>;
using VI8 = hn::Vec<DI8>;
using VU8 = hn::Vec<DU8>;

// Adds the 16 products to the four sums; which products a sum gets is the unit's own matter.
inline VI32 Dot(VI32 sums, VI8 a, VI8 b);

constexpr size_t kBlockVectors = 8;  // of float32, in a block of 32

inline float HalfAt(const uint8_t* p) { return static_cast<float>(__builtin_bit_cast(__fp16, Load16(p))); }

// Rows of weights need no alignment: they are read as bytes.
inline VU8 LoadBytes(const uint8_t* p) { return hn::LoadU(DU8(), p); }
inline VF LoadFloats(const uint8_t* p) { return hn::BitCast(DF(), LoadBytes(p)); }
inline VF FourHalves(const uint8_t* p) {
  const auto bytes = hn::LoadU(hn::Full64<uint8_t>(), p);
  return hn::PromoteTo(DF(), hn::BitCast(hn::Full64<hwy::float16_t>(), bytes));
}
inline VF FourBf16(const uint8_t* p) {
  const auto bits = hn::BitCast(hn::Full64<uint16_t>(), hn::LoadU(hn::Full64<uint8_t>(), p));
  return hn::BitCast(DF(), hn::ShiftLeft<16>(hn::PromoteTo(hn::Full128<uint32_t>(), bits)));
}

// --- 32 elements of a quantised row: x[i] = scale[i / 16] * code[i] + minimum[i / 16] ---

struct Codes32 {
  VI8 codes[2];  // 16 elements each, their offset taken off
  float scale[2];
  float minimum[2];  // of the types that HasMinimum
};

inline Codes32 OneScale(VI8 low, VI8 high, float scale, float minimum = 0) {
  return {{low, high}, {scale, scale}, {minimum, minimum}};
}

inline VU8 Bytes(int value) { return hn::Set(DU8(), static_cast<uint8_t>(value)); }
inline VU8 LowHalves(VU8 v) { return hn::And(v, Bytes(15)); }
inline VU8 HighHalves(VU8 v) { return hn::ShiftRight<4>(v); }
// Unsigned codes below 128 less their offset.
inline VI8 Signed(VU8 codes, int offset) { return hn::BitCast(DI8(), hn::Sub(codes, Bytes(offset))); }
// `set` in every byte of v that has that bit.
inline VU8 WhereBit(VU8 v, VU8 bit, int set) {
  return hn::And(hn::VecFromMask(DU8(), hn::TestBit(v, bit)), Bytes(set));
}

// The fifth bits of 16 elements, in their place.
inline VU8 FifthBits(const uint8_t* two_bytes) {
  HWY_ALIGN static constexpr uint8_t kWhich[16] = {0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1};
  HWY_ALIGN static constexpr uint8_t kBit[16] = {1, 2, 4, 8, 16, 32, 64, 128, 1, 2, 4, 8, 16, 32, 64, 128};
  const VU8 both = hn::BitCast(DU8(), hn::Set(hn::Full128<uint16_t>(), Load16(two_bytes)));
  return WhereBit(hn::TableLookupBytes(both, hn::Load(DU8(), kWhich)), hn::Load(DU8(), kBit), 16);
}

inline Codes32 FourBits(const uint8_t* halves, int offset, float scale, float minimum = 0) {
  const VU8 v = LoadBytes(halves);
  return OneScale(Signed(LowHalves(v), offset), Signed(HighHalves(v), offset), scale, minimum);
}

inline Codes32 FiveBits(const uint8_t* halves, const uint8_t* fifth, int offset, float scale, float minimum = 0) {
  const VU8 v = LoadBytes(halves);
  return OneScale(Signed(hn::Or(LowHalves(v), FifthBits(fifth)), offset),
                  Signed(hn::Or(HighHalves(v), FifthBits(fifth + 2)), offset), scale, minimum);
}

inline Codes32 LookUp(const int8_t table[16], const uint8_t* halves, float scale) {
  const VI8 entries = hn::LoadU(DI8(), table);
  const VU8 v = LoadBytes(halves);
  return OneScale(hn::TableLookupBytes(entries, hn::BitCast(DI8(), LowHalves(v))),
                  hn::TableLookupBytes(entries, hn::BitCast(DI8(), HighHalves(v))), scale);
}

// Reads a row 32 elements after the other, from its first: At(row, b) are the b-th ones.
template <DType kType>
struct Reader;

template <>
struct Reader<DType::kQ8_0> {
  Codes32 At(const uint8_t* row, size_t b) const {
    const uint8_t* block = row + b * 34;
    return OneScale(hn::BitCast(DI8(), LoadBytes(block + 2)), hn::BitCast(DI8(), LoadBytes(block + 18)), HalfAt(block));
  }
};

template <>
struct Reader<DType::kQ4_0> {
  Codes32 At(const uint8_t* row, size_t b) const {
    const uint8_t* block = row + b * 18;
    return FourBits(block + 2, 8, HalfAt(block));
  }
};

template <>
struct Reader<DType::kQ4_1> {
  Codes32 At(const uint8_t* row, size_t b) const {
    const uint8_t* block = row + b * 20;
    return FourBits(block + 4, 0, HalfAt(block), HalfAt(block + 2));
  }
};

template <>
struct Reader<DType::kQ5_0> {
  Codes32 At(const uint8_t* row, size_t b) const {
    const uint8_t* block = row + b * 22;
    return FiveBits(block + 6, block + 2, 16, HalfAt(block));
  }
};

template <>
struct Reader<DType::kQ5_1> {
  Codes32 At(const uint8_t* row, size_t b) const {
    const uint8_t* block = row + b * 24;
    return FiveBits(block + 8, block + 4, 0, HalfAt(block), HalfAt(block + 2));
  }
};

template <>
struct Reader<DType::kIQ4_NL> {
  Codes32 At(const uint8_t* row, size_t b) const {
    const uint8_t* block = row + b * 18;
    return LookUp(kIq4Codes, block + 2, HalfAt(block));
  }
};

template <>
struct Reader<DType::kIQ4_XS> {
  Codes32 At(const uint8_t* row, size_t b) const {
    const uint8_t* block = row + b / 8 * 136;
    const size_t g = b % 8;
    const int low = (block[4 + g / 2] >> (4 * (g % 2))) & 15, high = (Load16(block + 2) >> (2 * g)) & 3;
    return LookUp(kIq4Codes, block + 8 + 16 * g, HalfAt(block) * static_cast<float>((low | high << 4) - 32));
  }
};

template <>
struct Reader<DType::kMXFP4> {
  Codes32 At(const uint8_t* row, size_t b) const {
    const uint8_t* block = row + b * 17;
    return LookUp(kMxfp4Codes, block + 1, Mxfp4Scale(block[0]));
  }
};

template <>
struct Reader<DType::kQ2_K> {
  Codes32 At(const uint8_t* row, size_t b) const {
    const uint8_t* block = row + b / 8 * 84;
    const size_t g = b % 8;
    const float d = HalfAt(block + 80), dmin = -HalfAt(block + 82);
    const int first = block[2 * g], second = block[2 * g + 1];
    const uint8_t* codes = block + 16 + 32 * (g / 4);
    const int shift = static_cast<int>(2 * (g % 4));
    const VU8 low = hn::And(hn::ShiftRightSame(LoadBytes(codes), shift), Bytes(3));
    const VU8 high = hn::And(hn::ShiftRightSame(LoadBytes(codes + 16), shift), Bytes(3));
    return {{Signed(low, 0), Signed(high, 0)},
            {d * static_cast<float>(first & 15), d * static_cast<float>(second & 15)},
            {dmin * static_cast<float>(first >> 4), dmin * static_cast<float>(second >> 4)}};
  }
};

template <>
struct Reader<DType::kQ3_K> {
  static int Scale(const uint8_t* packed, size_t g) {
    const int low = packed[g % 8] >> (g / 8 * 4) & 15, high = packed[8 + g % 4] >> (g / 4 * 2) & 3;
    return (low | high << 4) - 32;
  }
  static VI8 Codes(const uint8_t* two_bits, const uint8_t* third, size_t g) {
    const VU8 low = hn::And(hn::ShiftRightSame(LoadBytes(two_bits), static_cast<int>(2 * (g % 4))), Bytes(3));
    return Signed(hn::Or(low, WhereBit(LoadBytes(third), Bytes(1 << g), 4)), 4);
  }
  Codes32 At(const uint8_t* row, size_t b) const {
    const uint8_t* block = row + b / 8 * 110;
    const size_t g = b % 8;
    const uint8_t* two_bits = block + 32 + 32 * (g / 4);
    const float d = HalfAt(block + 108);
    const auto scale = [&](size_t i) { return d * static_cast<float>(Scale(block + 96, 2 * g + i)); };
    return {{Codes(two_bits, block, g), Codes(two_bits + 16, block + 16, g)}, {scale(0), scale(1)}, {0, 0}};
  }
};

// Scales and minima are unpacked eight at a time.
struct K45Scales {
  float scale[8], minimum[8];

  void Unpack(const uint8_t* block) {
    const PackedScales packed = UnpackScales(block);
    const float d = HalfAt(block), dmin = -HalfAt(block + 2);
    for (size_t g = 0; g < 8; ++g) {
      scale[g] = d * static_cast<float>(static_cast<uint8_t>(packed.scales >> 8 * g));
      minimum[g] = dmin * static_cast<float>(static_cast<uint8_t>(packed.minima >> 8 * g));
    }
  }
};

// The low four bits of 16 elements of group g.
inline VU8 K45Nibbles(const uint8_t* codes, size_t g) {
  const VU8 v = LoadBytes(codes + g / 2 * 32);
  return g % 2 == 0 ? LowHalves(v) : HighHalves(v);
}

template <>
struct Reader<DType::kQ4_K> {
  K45Scales scales;
  Codes32 At(const uint8_t* row, size_t b) {
    const uint8_t* block = row + b / 8 * 144;
    const size_t g = b % 8;
    if (g == 0) scales.Unpack(block);
    return OneScale(Signed(K45Nibbles(block + 16, g), 0), Signed(K45Nibbles(block + 32, g), 0), scales.scale[g],
                    scales.minimum[g]);
  }
};

template <>
struct Reader<DType::kQ5_K> {
  K45Scales scales;
  static VI8 Codes(const uint8_t* nibbles, const uint8_t* fifth, size_t g) {
    return Signed(hn::Or(K45Nibbles(nibbles, g), WhereBit(LoadBytes(fifth), Bytes(1 << g), 16)), 0);
  }
  Codes32 At(const uint8_t* row, size_t b) {
    const uint8_t* block = row + b / 8 * 176;
    const size_t g = b % 8;
    if (g == 0) scales.Unpack(block);
    return OneScale(Codes(block + 48, block + 16, g), Codes(block + 64, block + 32, g), scales.scale[g],
                    scales.minimum[g]);
  }
};

template <>
struct Reader<DType::kQ6_K> {
  static VI8 Codes(const uint8_t* low, const uint8_t* high, size_t s) {
    const VU8 v = LoadBytes(low), nibbles = s < 2 ? LowHalves(v) : HighHalves(v);
    const VU8 two_bits = hn::And(hn::ShiftRightSame(LoadBytes(high), static_cast<int>(2 * s)), Bytes(3));
    return Signed(hn::Or(nibbles, hn::ShiftLeft<4>(two_bits)), 32);
  }
  Codes32 At(const uint8_t* row, size_t b) const {
    const uint8_t* block = row + b / 8 * 210;
    const size_t half = b % 8 / 4, s = b % 4;  // s: which 32 of the half's 128
    const uint8_t *low = block + 64 * half + 32 * (s % 2), *high = block + 128 + 32 * half;
    const auto* scales = reinterpret_cast<const int8_t*>(block + 192) + 2 * (b % 8);
    const float d = HalfAt(block + 208);
    return {{Codes(low, high, s), Codes(low + 16, high + 16, s)},
            {d * static_cast<float>(scales[0]), d * static_cast<float>(scales[1])},
            {0, 0}};
  }
};

// --- Unpack: a sink receives 32 elements as eight vectors; float types may end with fewer, given as floats in memory
// ---

struct Block32 {
  VF v[kBlockVectors];
};

// 16 codes to four vectors.
inline void CodesToFloats(VI8 codes, float scale, float minimum, VF* out) {
  const hn::Full128<int16_t> d16;
  const hn::Full64<int8_t> dh8;
  const hn::Full64<int16_t> dh16;
  const VF factor = hn::Set(DF(), scale), offset = hn::Set(DF(), minimum);
  const auto low = hn::PromoteTo(d16, hn::LowerHalf(codes)), high = hn::PromoteTo(d16, hn::UpperHalf(dh8, codes));
  const VI32 whole[4] = {hn::PromoteTo(DI32(), hn::LowerHalf(low)), hn::PromoteTo(DI32(), hn::UpperHalf(dh16, low)),
                         hn::PromoteTo(DI32(), hn::LowerHalf(high)), hn::PromoteTo(DI32(), hn::UpperHalf(dh16, high))};
  for (size_t i = 0; i < 4; ++i) out[i] = hn::MulAdd(hn::ConvertTo(DF(), whole[i]), factor, offset);
}

template <DType kType, typename Sink>
inline void UnpackQuantized(const uint8_t* row, size_t n, Sink& sink) {
  Reader<kType> reader;
  for (size_t b = 0; b < n / 32; ++b) {
    const Codes32 c = reader.At(row, b);
    Block32 block;
    for (size_t h = 0; h < 2; ++h) CodesToFloats(c.codes[h], c.scale[h], c.minimum[h], block.v + 4 * h);
    sink.Put(b * 32, block);
  }
}

template <DType kType>
inline VF FourFloats(const uint8_t* row, size_t i) {
  if constexpr (kType == DType::kF32) return LoadFloats(row + i * 4);
  if constexpr (kType == DType::kF16) return FourHalves(row + i * 2);
  return FourBf16(row + i * 2);
}

// Element i and up to three more, the missing ones 0.
template <DType kType>
inline VF LastFloats(const uint8_t* row, size_t i, size_t n) {
  constexpr size_t kBytes = kType == DType::kF32 ? 4 : 2;
  uint8_t last[16] = {};
  __builtin_memcpy(last, row + i * kBytes, (n - i) * kBytes);
  return FourFloats<kType>(last, 0);
}

template <DType kType, typename Sink>
inline void UnpackFloats(const uint8_t* row, size_t n, Sink& sink) {
  size_t i = 0;
  for (; i + 32 <= n; i += 32) {
    Block32 block;
    for (size_t v = 0; v < kBlockVectors; ++v) block.v[v] = FourFloats<kType>(row, i + v * 4);
    sink.Put(i, block);
  }
  if (i == n) return;
  HWY_ALIGN float last[32] = {};
  for (size_t j = i; j < n; j += 4)
    hn::Store(j + 4 <= n ? FourFloats<kType>(row, j) : LastFloats<kType>(row, j, n), DF(), last + (j - i));
  sink.PutTail(i, last, n - i);
}

template <DType kType, typename Sink>
inline void UnpackRow(const uint8_t* row, size_t n, Sink& sink) {
  if constexpr (IsFloat(kType)) {
    UnpackFloats<kType>(row, n, sink);
  } else {
    UnpackQuantized<kType>(row, n, sink);
  }
}

struct StoreSink {
  float* out;
  void Put(size_t i, const Block32& block) const {
    for (size_t v = 0; v < kBlockVectors; ++v) hn::StoreU(block.v[v], DF(), out + i + v * 4);
  }
  void PutTail(size_t i, const float* last, size_t count) const {
    __builtin_memcpy(out + i, last, count * sizeof(float));
  }
};

void UnpackF32(const RowBlock& block, float* out, size_t out_stride) {
  SwitchType(block.type, [&]<DType kType>() {
    for (size_t r = 0; r < block.n_rows; ++r) {
      StoreSink sink = {out + r * out_stride};
      UnpackRow<kType>(block.rows + r * block.row_bytes, block.n, sink);
    }
  });
}

// --- Few tokens, float32 ---

template <size_t kTokens>
struct DotSink {
  const float* x;
  size_t x_stride;
  VF acc[kTokens][2];

  void Put(size_t i, const Block32& block) {
    for (size_t t = 0; t < kTokens; ++t) {
      const float* row = x + t * x_stride + i;
      for (size_t v = 0; v < kBlockVectors; ++v)
        acc[t][v % 2] = hn::MulAdd(block.v[v], hn::LoadU(DF(), row + v * 4), acc[t][v % 2]);
    }
  }
  void PutTail(size_t i, const float* last, size_t count) {
    for (size_t t = 0; t < kTokens; ++t) {
      HWY_ALIGN float padded[32] = {};
      __builtin_memcpy(padded, x + t * x_stride + i, count * sizeof(float));
      for (size_t j = 0; j < 32; j += 4)
        acc[t][0] = hn::MulAdd(hn::Load(DF(), last + j), hn::Load(DF(), padded + j), acc[t][0]);
    }
  }
};

template <DType kType, size_t kTokens>
void DotF32Rows(const RowBlock& block, const float* x, size_t x_stride, float* y, size_t y_stride) {
  for (size_t r = 0; r < block.n_rows; ++r) {
    DotSink<kTokens> sink;
    sink.x = x;
    sink.x_stride = x_stride;
    for (size_t t = 0; t < kTokens; ++t) sink.acc[t][0] = sink.acc[t][1] = hn::Zero(DF());
    UnpackRow<kType>(block.rows + r * block.row_bytes, block.n, sink);
    for (size_t t = 0; t < kTokens; ++t)
      y[t * y_stride + r] = hn::GetLane(hn::SumOfLanes(DF(), hn::Add(sink.acc[t][0], sink.acc[t][1])));
  }
}

void DotF32(const RowBlock& block, const float* x, size_t x_stride, size_t n_tokens, float* y, size_t y_stride) {
  SwitchType(block.type, [&]<DType kType>() {
    ForTokens<1>(block, n_tokens, [&]<size_t kTokens>(const RowBlock& rows, size_t t, size_t r) {
      DotF32Rows<kType, kTokens>(rows, x + t * x_stride, x_stride, y + t * y_stride + r, y_stride);
    });
  });
}

// --- Few tokens, int8 activations in natural order ---

// The sizes of values [4 i, 4 i + 4), 0 for those in `without`.
inline VF SizesBut(const float* x, uint32_t without, size_t i) {
  const VI32 bits = hn::Set(DI32(), static_cast<int32_t>(without >> 4 * i)) & hn::Shl(hn::Set(DI32(), 1), hn::Iota(DI32(), 0));
  return hn::IfThenElseZero(hn::RebindMask(DF(), bits == hn::Zero(DI32())), hn::Abs(hn::LoadU(DF(), x + 4 * i)));
}

inline float LargestSize(const float* x, uint32_t without) {
  VF most = hn::Zero(DF());
  for (size_t i = 0; i < 8; ++i) most = hn::Max(most, SizesBut(x, without, i));
  return hn::GetLane(hn::MaxOfLanes(DF(), most));
}

inline uint32_t OfSize(const float* x, float size) {
  uint32_t found = 0;
  for (size_t i = 0; i < 8; ++i) {
    const auto same = hn::Abs(hn::LoadU(DF(), x + 4 * i)) == hn::Set(DF(), size);
    uint8_t bits = 0;
    hn::StoreMaskBits(DF(), same, &bits);
    found |= uint32_t{bits} << 4 * i;
  }
  return found;
}

inline void Quantize32(const float* x, float largest, int8_t* q) {
  const hn::Full64<int16_t> d16;
  const VF inverse = hn::Set(DF(), largest > 0 ? 127.0f / largest : 0.0f);
  for (size_t i = 0; i < 32; i += 8) {
    const auto low = hn::DemoteTo(d16, hn::NearestInt(hn::Mul(hn::LoadU(DF(), x + i), inverse)));
    const auto high = hn::DemoteTo(d16, hn::NearestInt(hn::Mul(hn::LoadU(DF(), x + i + 4), inverse)));
    hn::StoreU(hn::DemoteTo(hn::Full64<int8_t>(), hn::Combine(hn::Full128<int16_t>(), high, low)), hn::Full64<int8_t>(),
               q + i);
  }
}

inline int32_t SumOf16(const int8_t* q) {
  const VI32 sums = Dot(hn::Zero(DI32()), hn::LoadU(DI8(), q), hn::Set(DI8(), int8_t{1}));
  return hn::GetLane(hn::SumOfLanes(DI32(), sums));
}

// Codes have no offset here, so that sums start from 0 and `init` serves as work space only.
void Quantize(DType type, const float* x, size_t n, size_t token, const Int8Activations& out) {
  const size_t n_blocks = RoundRowToInt8(x, n, token, out);
  if (!HasMinimum(type)) return;
  const int8_t* q = out.q + token * out.n_padded;
  const float* scale = out.scale + token * out.n_padded / 16;
  float* sum = out.sum + token * out.n_padded / 16;
  for (size_t b = 0; b < n_blocks; ++b) {
    const int32_t low = SumOf16(q + b * 32), high = SumOf16(q + b * 32 + 16);
    if (ScaleGroups(type) == 2) {
      sum[2 * b] = scale[b] * static_cast<float>(low);
      sum[2 * b + 1] = scale[b] * static_cast<float>(high);
    } else {
      sum[b] = scale[b] * static_cast<float>(low + high);
    }
  }
}

// What a token's product is summed up in.
struct Int8Sum {
  VF lanes;
  float minima;
  float Total() const { return hn::GetLane(hn::SumOfLanes(DF(), lanes)) + minima; }
};

// Adds a token's block `x_block` times 32 codes.
template <DType kType>
inline void AddInt8Block(const Codes32& c, const Int8Activations& x, size_t token, size_t x_block, Int8Sum& sum) {
  const size_t at = token * x.n_padded;
  const int8_t* q = x.q + at + x_block * 32;
  const float scale = x.scale[at / 16 + x_block];
  const VI8 low = hn::LoadU(DI8(), q), high = hn::LoadU(DI8(), q + 16);
  const VI32 first = Dot(hn::Zero(DI32()), c.codes[0], low);
  if constexpr (ScaleGroups(kType) == 2) {
    const VI32 second = Dot(hn::Zero(DI32()), c.codes[1], high);
    sum.lanes = hn::MulAdd(hn::ConvertTo(DF(), first), hn::Set(DF(), c.scale[0] * scale), sum.lanes);
    sum.lanes = hn::MulAdd(hn::ConvertTo(DF(), second), hn::Set(DF(), c.scale[1] * scale), sum.lanes);
  } else {
    const VI32 both = Dot(first, c.codes[1], high);
    sum.lanes = hn::MulAdd(hn::ConvertTo(DF(), both), hn::Set(DF(), c.scale[0] * scale), sum.lanes);
  }
  if constexpr (HasMinimum(kType) && ScaleGroups(kType) == 2) {
    sum.minima += c.minimum[0] * x.sum[at / 16 + 2 * x_block] + c.minimum[1] * x.sum[at / 16 + 2 * x_block + 1];
  } else if constexpr (HasMinimum(kType)) {
    sum.minima += c.minimum[0] * x.sum[at / 16 + x_block];
  }
}

template <DType kType, size_t kTokens>
void DotInt8Row(const uint8_t* row, size_t n, const Int8Activations& x, size_t token, float* y, size_t y_stride) {
  Int8Sum sum[kTokens];
  for (size_t t = 0; t < kTokens; ++t) sum[t] = {hn::Zero(DF()), 0};
  const size_t n_blocks = n / 32;
  const uint32_t* spikes = x.spike + token * x.n_padded / 32;
  const size_t apart = x.n_padded / 32;
  size_t next[kTokens] = {};  // of each token the next spike
  Reader<kType> reader;
  for (size_t b = 0; b < n_blocks; ++b) {
    const Codes32 c = reader.At(row, b);
    for (size_t t = 0; t < kTokens; ++t) AddInt8Block<kType>(c, x, token + t, b, sum[t]);
    for (size_t t = 0; t < kTokens; ++t) {
      for (; spikes[t * apart + next[t]] / 32 == b; ++next[t])
        AddInt8Block<kType>(c, x, token + t, n_blocks + next[t], sum[t]);
    }
  }
  for (size_t t = 0; t < kTokens; ++t) y[t * y_stride] = sum[t].Total();
}

void DotInt8(const RowBlock& block, const Int8Activations& x, size_t n_tokens, float* y, size_t y_stride) {
  SwitchQuantized(block.type, [&]<DType kType>() {
    ForTokens<1>(block, n_tokens, [&]<size_t kTokens>(const RowBlock& rows, size_t t, size_t first) {
      for (size_t r = 0; r < rows.n_rows; ++r)
        DotInt8Row<kType, kTokens>(rows.rows + r * rows.row_bytes, rows.n, x, t, y + t * y_stride + first + r,
                                   y_stride);
    });
  });
}

// --- Many tokens, float32 ---

constexpr size_t kTileRows = 6, kTileVectors = kTokenLanes / 4;  // 24 of 32 registers sum up

void TileF32(const float* const* rows, size_t n, const float* group, size_t, float* acc, bool first) {
  VF sum[kTileRows][kTileVectors];
  for (size_t r = 0; r < kTileRows; ++r) {
    for (size_t v = 0; v < kTileVectors; ++v)
      sum[r][v] = first ? hn::Zero(DF()) : hn::LoadU(DF(), acc + r * kTokenLanes + v * 4);
  }
  for (size_t i = 0; i < n; ++i) {
    VF x[kTileVectors];
    for (size_t v = 0; v < kTileVectors; ++v) x[v] = hn::LoadU(DF(), group + i * kTokenLanes + v * 4);
    for (size_t r = 0; r < kTileRows; ++r) {
      const VF w = hn::Set(DF(), rows[r][i]);
      for (size_t v = 0; v < kTileVectors; ++v) sum[r][v] = hn::MulAdd(w, x[v], sum[r][v]);
    }
  }
  for (size_t r = 0; r < kTileRows; ++r) {
    for (size_t v = 0; v < kTileVectors; ++v) hn::StoreU(sum[r][v], DF(), acc + r * kTokenLanes + v * 4);
  }
}

LinearKernels MakeKernels() {
  return {
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
      .dots_take_spikes = true,
      .store = ScalarStore,
  };
}

}  // namespace
}  // namespace lesskv::internal
HWY_AFTER_NAMESPACE();
