// Codes of quantised rows, side by side: of as many rows as a vector has 32-bit lanes, four codes of each, as the
// panels of 8-bit products want them (linear_int8-inl.h, which describes Simd). Packed bytes are transposed before they
// are taken apart, half or a quarter as many as there are codes. Everything is in an anonymous namespace, so that each
// translation unit keeps its own copy, built with its own flags. Block layouts are described in quants.h.
#pragma once

#include "kernels/linear/linear_avx2-inl.h"

namespace lesskv::internal {
namespace {

// v[j]: bytes 4 j .. 4 j + 3 of the sixteen at `at` of every row.
template <typename Simd>
__attribute__((always_inline)) inline void LoadSixteens(const uint8_t* const* rows, size_t at,
                                                        typename Simd::Int v[4]) {
  typename Simd::Int a[4], b[4];
#pragma GCC unroll 4
  for (size_t i = 0; i < 4; ++i) a[i] = Simd::EveryFourthRow(rows + i, at);
#pragma GCC unroll 2
  for (size_t i = 0; i < 4; i += 2) {
    b[i] = Simd::LowWords(a[i], a[i + 1]);
    b[i + 1] = Simd::HighWords(a[i], a[i + 1]);
  }
#pragma GCC unroll 2
  for (size_t i = 0; i < 2; ++i) {
    v[2 * i] = Simd::LowPairs(b[i], b[i + 2]);
    v[2 * i + 1] = Simd::HighPairs(b[i], b[i + 2]);
  }
}

// Four bytes of every row.
template <typename Simd>
__attribute__((always_inline)) inline typename Simd::Int LoadWords(const uint8_t* const* rows, size_t at) {
  uint32_t words[Simd::kLanes];
  for (size_t r = 0; r < Simd::kLanes; ++r) words[r] = Load32(rows[r] + at);
  return Simd::LoadInt(reinterpret_cast<const uint8_t*>(words));
}

// `bits` bits of every byte, from bit `from`, moved to bit `to`.
template <typename Simd>
inline typename Simd::Int Bits(typename Simd::Int v, size_t from, int bits, size_t to = 0) {
  const auto mask = Simd::Broadcast((((1 << bits) - 1) << to) * 0x01010101);
  if (from > to) v = Simd::ShiftRight(v, static_cast<int>(from - to));
  if (from < to) v = Simd::ShiftLeft32(v, static_cast<int>(to - from));
  return Simd::And(v, mask);
}

// Sixteen in the bytes of four f whose bit of `bits` is set.
template <typename Simd>
inline typename Simd::Int FifthBitsOfFour(typename Simd::Int bits, size_t f) {
  const auto four = Simd::ShiftRight32(bits, static_cast<int>(4 * f));
  auto out = Simd::And(Simd::ShiftLeft32(four, 4), Simd::Broadcast(0x10));
#pragma GCC unroll 3
  for (int i = 1; i < 4; ++i)
    out = Simd::Or(out, Simd::And(Simd::ShiftLeft32(four, 4 + 7 * i), Simd::Broadcast(0x10 << (8 * i))));
  return out;
}

// out[i][4 half + j] = codes(i, j) for the four words j of that half of each block i.
template <size_t kBlocks, typename Int, typename F>
__attribute__((always_inline)) inline void EachWord(size_t half, Int out[][8], F&& codes) {
  Unrolled<kBlocks>([&](auto i) __attribute__((always_inline)) {
    Unrolled<4>([&](auto j) __attribute__((always_inline)) { out[i][4 * half + j] = codes(i, j); });
  });
}

// Blocks of 32 of their own.
template <typename Simd, DType kType>
__attribute__((always_inline)) inline void ReadBlock(const uint8_t* const* rows, size_t b, typename Simd::Int out[8]) {
  using Int = typename Simd::Int;
  Int packed[4];
  LoadSixteens<Simd>(rows, NibblesAt(kType, b), packed);
#pragma GCC unroll 8
  for (size_t f = 0; f < 8; ++f) out[f] = Bits<Simd>(packed[f % 4], f / 4 * 4, 4);
  if constexpr (kType == DType::kIQ4_NL || kType == DType::kIQ4_XS || kType == DType::kMXFP4) {
    const int8_t* table = kType == DType::kMXFP4 ? kShiftedMxfp4Codes : kIq4Codes;
#pragma GCC unroll 8
    for (size_t f = 0; f < 8; ++f) out[f] = Simd::LookUp(table, out[f]);
  } else if constexpr (kType == DType::kQ5_0 || kType == DType::kQ5_1) {
    const Int fifth = LoadWords<Simd>(rows, NibblesAt(kType, b) - 4);
#pragma GCC unroll 8
    for (size_t f = 0; f < 8; ++f) out[f] = Simd::Or(out[f], FifthBitsOfFour<Simd>(fifth, f));
  }
}

// Parts of blocks of 256, whose elements 32 apart share bytes: sixteen of the 32 bytes at a time, `half` of them.
template <typename Simd, DType kType>
inline void ReadHalf(const uint8_t* const* rows, size_t b, size_t half, typename Simd::Int out[][8]) {
  using Int = typename Simd::Int;
  constexpr size_t kBlocks = BlocksAtOnce(kType);
  const size_t within = b % 8, block = b / 8 * BytesOf256(kType) + 16 * half;
  Int packed[4], more[4], high[4];
  if constexpr (kType == DType::kQ4_K || kType == DType::kQ5_K) {
    LoadSixteens<Simd>(rows, block + (kType == DType::kQ4_K ? 16 : 48) + 16 * within, packed);
    EachWord<kBlocks>(half, out, [&](size_t i, size_t j) { return Bits<Simd>(packed[j], 4 * i, 4); });
    if constexpr (kType == DType::kQ5_K) {
      LoadSixteens<Simd>(rows, block + 16, high);
      for (Int& bits : high) bits = Simd::ShiftRight(bits, static_cast<int>(within));
      EachWord<kBlocks>(
          half, out, [&](size_t i, size_t j) { return Simd::Or(out[i][4 * half + j], Bits<Simd>(high[j], i, 1, 4)); });
    }
  } else if constexpr (kType == DType::kQ6_K) {
    LoadSixteens<Simd>(rows, block + 16 * within, packed);  // 64 bytes of nibbles for 128 elements,
    LoadSixteens<Simd>(rows, block + 16 * within + 32, more);
    LoadSixteens<Simd>(rows, block + 128 + 8 * within, high);  // 32 of their high bits
    EachWord<kBlocks>(half, out, [&](size_t i, size_t j) {
      const Int nibbles = Bits<Simd>(i % 2 == 0 ? packed[j] : more[j], i / 2 * 4, 4);
      return Simd::Or(nibbles, Bits<Simd>(high[j], 2 * i, 2, 4));
    });
  } else {  // kQ2_K, kQ3_K
    LoadSixteens<Simd>(rows, block + (kType == DType::kQ2_K ? 16 : 32) + 8 * within, packed);
    EachWord<kBlocks>(half, out, [&](size_t i, size_t j) { return Bits<Simd>(packed[j], 2 * i, 2); });
    if constexpr (kType == DType::kQ3_K) {
      LoadSixteens<Simd>(rows, block, high);
      for (Int& bits : high) bits = Simd::ShiftRight(bits, static_cast<int>(within));
      EachWord<kBlocks>(
          half, out, [&](size_t i, size_t j) { return Simd::Or(out[i][4 * half + j], Bits<Simd>(high[j], i, 1, 2)); });
    }
  }
}

// out[i][f]: codes 4 f .. 4 f + 3 of block b + i, of BlocksAtOnce(kType), b a multiple of it.
template <typename Simd, DType kType>
inline void ReadColumns(const uint8_t* const* rows, size_t b, typename Simd::Int out[][8]) {
  if constexpr (kType == DType::kQ8_0) {
    LoadSixteens<Simd>(rows, b * 34 + 2, out[0]);
    LoadSixteens<Simd>(rows, b * 34 + 18, out[0] + 4);
  } else if constexpr (!IsSuperBlock(kType)) {
    ReadBlock<Simd, kType>(rows, b, out[0]);
  } else {
    for (size_t half = 0; half < 2; ++half) ReadHalf<Simd, kType>(rows, b, half, out);
  }
}

// --- Scales ---

// The high halves of words, half-precision numbers.
template <typename Simd>
inline typename Simd::Float HighHalves(typename Simd::Int words) {
  return Simd::HalvesToFloat(Simd::ShiftRight32(words, 16));
}
template <typename Simd>
inline typename Simd::Float LowHalves(typename Simd::Int words) {
  return Simd::HalvesToFloat(Simd::And(words, Simd::Broadcast(0xffff)));
}

// Byte j of word i, less `subtract`, times factor: a vector of every row at out + (4 i + j) * stride.
template <typename Simd, size_t kWords>
inline void StoreBytes(const typename Simd::Int* words, int subtract, typename Simd::Float factor, float* out,
                       size_t stride) {
  Unrolled<4 * kWords>([&](auto g) __attribute__((always_inline)) {
    const auto byte = Simd::And(Simd::ShiftRight32(words[g / 4], g % 4 * 8), Simd::Broadcast(0xff));
    Simd::Store(out + g * stride, Simd::Mul(Simd::ToFloat(Simd::Sub(byte, Simd::Broadcast(subtract))), factor));
  });
}

// The scales of the 256 elements from byte `at` of every row, eight or sixteen vectors `stride` floats apart, and where
// the type HasMinimum what is added to these elements.
template <typename Simd, DType kType>
inline void ReadScales256(const uint8_t* const* rows, size_t at, float* scale, float* minimum, size_t stride) {
  using Int = typename Simd::Int;
  constexpr size_t kWords = 2 * ScaleGroups(kType);
  Int v[4], scales[kWords], minima[kWords];
  const auto negative = [](typename Simd::Float x) { return Simd::Mul(x, Simd::Broadcast(-1.0f)); };
  if constexpr (kType == DType::kQ4_K || kType == DType::kQ5_K) {
    LoadSixteens<Simd>(rows, at, v);
    scales[0] = Bits<Simd>(v[1], 0, 6);
    scales[1] = Simd::Or(Bits<Simd>(v[3], 0, 4), Bits<Simd>(v[1], 6, 2, 4));
    minima[0] = Bits<Simd>(v[2], 0, 6);
    minima[1] = Simd::Or(Bits<Simd>(v[3], 4, 4), Bits<Simd>(v[2], 6, 2, 4));
    StoreBytes<Simd, kWords>(scales, 0, LowHalves<Simd>(v[0]), scale, stride);
    StoreBytes<Simd, kWords>(minima, 0, negative(HighHalves<Simd>(v[0])), minimum, stride);
  } else if constexpr (kType == DType::kQ6_K) {  // signed bytes
    LoadSixteens<Simd>(rows, at + 192, v);
    for (size_t i = 0; i < kWords; ++i) scales[i] = Simd::Xor(v[i], Simd::Broadcast(static_cast<int32_t>(0x80808080)));
    StoreBytes<Simd, kWords>(scales, 128, HighHalves<Simd>(LoadWords<Simd>(rows, at + 206)), scale, stride);
  } else if constexpr (kType == DType::kQ2_K) {
    LoadSixteens<Simd>(rows, at, v);
    for (size_t i = 0; i < kWords; ++i) scales[i] = Bits<Simd>(v[i], 0, 4), minima[i] = Bits<Simd>(v[i], 4, 4);
    const Int factors = LoadWords<Simd>(rows, at + 80);
    StoreBytes<Simd, kWords>(scales, 0, LowHalves<Simd>(factors), scale, stride);
    StoreBytes<Simd, kWords>(minima, 0, negative(HighHalves<Simd>(factors)), minimum, stride);
  } else if constexpr (kType == DType::kIQ4_XS) {  // a half, two bits of each scale, four bits of each
    const Int first = LoadWords<Simd>(rows, at), low = LoadWords<Simd>(rows, at + 4);
    const auto factor = LowHalves<Simd>(first);
    Unrolled<8>([&](auto g) __attribute__((always_inline)) {
      const Int low_bits = Simd::And(Simd::ShiftRight32(low, 4 * g), Simd::Broadcast(15));
      const Int high_bits = Simd::And(Simd::ShiftRight32(first, 12 + 2 * g), Simd::Broadcast(0x30));
      const Int number = Simd::Sub(Simd::Or(low_bits, high_bits), Simd::Broadcast(32));
      Simd::Store(scale + g * stride, Simd::Mul(Simd::ToFloat(number), factor));
    });
  } else {  // kQ3_K: twelve bytes of scales from 96, the factor behind them
    LoadSixteens<Simd>(rows, at + 94, v);
    Int packed[3];
    for (size_t i = 0; i < 3; ++i) packed[i] = Simd::Or(Simd::ShiftRight32(v[i], 16), Simd::ShiftLeft32(v[i + 1], 16));
    for (size_t i = 0; i < kWords; ++i)
      scales[i] = Simd::Or(Bits<Simd>(packed[i % 2], i / 2 * 4, 4), Bits<Simd>(packed[2], 2 * i, 2, 4));
    StoreBytes<Simd, kWords>(scales, 32, HighHalves<Simd>(v[3]), scale, stride);
  }
}

}  // namespace
}  // namespace lesskv::internal
