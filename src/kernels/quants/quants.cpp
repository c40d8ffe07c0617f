#include "kernels/quants/quants.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "base/check.h"
#include "kernels/quants/code_tables.h"
#include "kernels/quants/half.h"

namespace lesskv {
namespace {

uint32_t LoadU32(const uint8_t bytes[4]) {
  uint32_t value;
  std::memcpy(&value, bytes, 4);
  return value;
}

void DequantizeBlock(const BlockQ8_0& block, float* out) {
  const float d = HalfToFloat(block.d);
  for (int i = 0; i < 32; ++i) out[i] = d * static_cast<float>(block.qs[i]);
}

void DequantizeBlock(const BlockQ4_0& block, float* out) {
  const float d = HalfToFloat(block.d);
  for (int i = 0; i < 16; ++i) {
    out[i] = d * static_cast<float>((block.qs[i] & 15) - 8);
    out[i + 16] = d * static_cast<float>((block.qs[i] >> 4) - 8);
  }
}

void DequantizeBlock(const BlockQ4_1& block, float* out) {
  const float d = HalfToFloat(block.d), m = HalfToFloat(block.m);
  for (int i = 0; i < 16; ++i) {
    out[i] = d * static_cast<float>(block.qs[i] & 15) + m;
    out[i + 16] = d * static_cast<float>(block.qs[i] >> 4) + m;
  }
}

// Thirty-two codes of a table, stored as the numbers of Q4_0.
void DequantizeCodes(const int8_t codes[16], float scale, const uint8_t qs[16], float* out) {
  for (int i = 0; i < 16; ++i) {
    out[i] = scale * static_cast<float>(codes[qs[i] & 15]);
    out[i + 16] = scale * static_cast<float>(codes[qs[i] >> 4]);
  }
}

void DequantizeBlock(const BlockIQ4_NL& block, float* out) {
  DequantizeCodes(kIq4Codes, HalfToFloat(block.d), block.qs, out);
}

void DequantizeBlock(const BlockMXFP4& block, float* out) {
  DequantizeCodes(kMxfp4Codes, std::ldexp(1.0f, block.e - 128), block.qs, out);
}

void DequantizeBlock(const BlockIQ4_XS& block, float* out) {
  const float d = HalfToFloat(block.d);
  for (int g = 0; g < 8; ++g) {
    const int low = (block.scales_l[g / 2] >> (4 * (g % 2))) & 15, high = (block.scales_h >> (2 * g)) & 3;
    const float scale = d * static_cast<float>((low | high << 4) - 32);
    DequantizeCodes(kIq4Codes, scale, block.qs + 16 * g, out + 32 * g);
  }
}

// The two-bit number of element i in Q2_K and Q3_K.
int TwoBits(const uint8_t qs[64], int i) { return (qs[i / 128 * 32 + i % 32] >> (i % 128 / 32 * 2)) & 3; }

void DequantizeBlock(const BlockQ2_K& block, float* out) {
  const float d = HalfToFloat(block.d), dmin = HalfToFloat(block.dmin);
  for (int i = 0; i < 256; ++i) {
    const int packed = block.scales[i / 16];
    const float scale = d * static_cast<float>(packed & 15), minimum = dmin * static_cast<float>(packed >> 4);
    out[i] = scale * static_cast<float>(TwoBits(block.qs, i)) - minimum;
  }
}

void DequantizeBlock(const BlockQ3_K& block, float* out) {
  const float d = HalfToFloat(block.d);
  for (int i = 0; i < 256; ++i) {
    const int g = i / 16;
    const int low = (block.scales[g % 8] >> (g < 8 ? 0 : 4)) & 15, high = (block.scales[8 + g % 4] >> (g / 4 * 2)) & 3;
    const float scale = d * static_cast<float>((low | high << 4) - 32);
    const int third = (block.hmask[i % 32] >> (i / 32)) & 1;
    out[i] = scale * static_cast<float>((TwoBits(block.qs, i) | third << 2) - 4);
  }
}

// The five-bit numbers of Q5_0 and Q5_1.
void UnpackFiveBits(const uint8_t qh[4], const uint8_t qs[16], int q[32]) {
  const uint32_t high = LoadU32(qh);
  for (int i = 0; i < 16; ++i) {
    q[i] = (qs[i] & 15) | static_cast<int>((high >> i) & 1) << 4;
    q[i + 16] = (qs[i] >> 4) | static_cast<int>((high >> (i + 16)) & 1) << 4;
  }
}

void PackFiveBits(const int q[32], uint8_t qh[4], uint8_t qs[16]) {
  uint32_t high = 0;
  for (int i = 0; i < 32; ++i) high |= static_cast<uint32_t>(q[i] >> 4) << i;
  std::memcpy(qh, &high, 4);
  for (int i = 0; i < 16; ++i) qs[i] = static_cast<uint8_t>((q[i] & 15) | (q[i + 16] & 15) << 4);
}

void DequantizeBlock(const BlockQ5_0& block, float* out) {
  const float d = HalfToFloat(block.d);
  int q[32];
  UnpackFiveBits(block.qh, block.qs, q);
  for (int i = 0; i < 32; ++i) out[i] = d * static_cast<float>(q[i] - 16);
}

void DequantizeBlock(const BlockQ5_1& block, float* out) {
  const float d = HalfToFloat(block.d), m = HalfToFloat(block.m);
  int q[32];
  UnpackFiveBits(block.qh, block.qs, q);
  for (int i = 0; i < 32; ++i) out[i] = d * static_cast<float>(q[i]) + m;
}

template <typename Block>
void DequantizeGroups(const Block& block, float* out) {
  const float d = HalfToFloat(block.d), dmin = HalfToFloat(block.dmin);
  uint8_t scales[8], minima[8];
  UnpackScales(block.scales, scales, minima);
  for (int g = 0; g < 8; ++g) {
    const float scale = d * scales[g], minimum = dmin * minima[g];
    const uint8_t* qs = block.qs + g / 2 * 32;
    for (int l = 0; l < 32; ++l) {
      int q = g % 2 == 0 ? qs[l] & 15 : qs[l] >> 4;
      if constexpr (std::is_same_v<Block, BlockQ5_K>) q |= ((block.qh[l] >> g) & 1) << 4;
      out[g * 32 + l] = scale * static_cast<float>(q) - minimum;
    }
  }
}

void DequantizeBlock(const BlockQ4_K& block, float* out) { DequantizeGroups(block, out); }
void DequantizeBlock(const BlockQ5_K& block, float* out) { DequantizeGroups(block, out); }

void DequantizeBlock(const BlockQ6_K& block, float* out) {
  const float d = HalfToFloat(block.d);
  for (int i = 0; i < 256; ++i) {
    const int half = i / 128, s = i % 128 / 32, l = i % 32;
    const int low_byte = block.ql[64 * half + 32 * (s % 2) + l];
    const int low = s < 2 ? low_byte & 15 : low_byte >> 4;
    const int high = (block.qh[32 * half + l] >> (2 * s)) & 3;
    out[i] = d * static_cast<float>(block.scales[i / 16]) * static_cast<float>((low | high << 4) - 32);
  }
}

// A scale's inverse; 0 where the scale is 0 or so small that the inverse would overflow (such a scale is 0 as a half).
float Inverse(float scale) { return std::fabs(scale) > 1e-30f ? 1.0f / scale : 0.0f; }

// The element with the largest magnitude, sign kept; the first of equals.
float SignedMaximum(const float* x, int n) {
  float result = 0;
  for (int i = 0; i < n; ++i)
    if (std::fabs(x[i]) > std::fabs(result)) result = x[i];
  return result;
}

// q = x * inverse + offset, truncated after adding one half: how the reference rounds numbers that are not negative.
int RoundUnsigned(float x, float inverse, float offset, int high) {
  return std::clamp(static_cast<int>(std::clamp(x * inverse + offset, 0.0f, 255.0f)), 0, high);
}

constexpr float kLargestHalf = 65504.0f;
float Saturate(float scale) { return std::clamp(scale, -kLargestHalf, kLargestHalf); }

void QuantizeBlock(const float* x, BlockQ8_0& block) {
  const float d = Saturate(std::fabs(SignedMaximum(x, 32)) / 127.0f), inverse = Inverse(d);
  block.d = FloatToHalf(d);
  for (int i = 0; i < 32; ++i) block.qs[i] = static_cast<int8_t>(internal::RoundClamped(x[i] * inverse, -127, 127));
}

// The value of largest magnitude becomes the most negative number, which has one more step than the positive side.
void QuantizeBlock(const float* x, BlockQ4_0& block) {
  const float d = Saturate(SignedMaximum(x, 32) / -8.0f), inverse = Inverse(d);
  block.d = FloatToHalf(d);
  for (int i = 0; i < 16; ++i) {
    const int low = RoundUnsigned(x[i], inverse, 8.5f, 15), high = RoundUnsigned(x[i + 16], inverse, 8.5f, 15);
    block.qs[i] = static_cast<uint8_t>(low | high << 4);
  }
}

void QuantizeBlock(const float* x, BlockQ4_1& block) {
  const auto [lowest, highest] = std::minmax_element(x, x + 32);
  const float m = Saturate(*lowest), d = Saturate((*highest - m) / 15.0f), inverse = Inverse(d);
  block.d = FloatToHalf(d);
  block.m = FloatToHalf(m);
  for (int i = 0; i < 16; ++i) {
    const int low = RoundUnsigned(x[i] - m, inverse, 0.5f, 15), high = RoundUnsigned(x[i + 16] - m, inverse, 0.5f, 15);
    block.qs[i] = static_cast<uint8_t>(low | high << 4);
  }
}

void QuantizeBlock(const float* x, BlockQ5_0& block) {
  const float d = Saturate(SignedMaximum(x, 32) / -16.0f), inverse = Inverse(d);
  block.d = FloatToHalf(d);
  int q[32];
  for (int i = 0; i < 32; ++i) q[i] = RoundUnsigned(x[i], inverse, 16.5f, 31);
  PackFiveBits(q, block.qh, block.qs);
}

void QuantizeBlock(const float* x, BlockQ5_1& block) {
  const auto [low, high] = std::minmax_element(x, x + 32);
  const float m = Saturate(*low), d = Saturate((*high - m) / 31.0f), inverse = Inverse(d);
  block.d = FloatToHalf(d);
  block.m = FloatToHalf(m);
  int q[32];
  for (int i = 0; i < 32; ++i) q[i] = RoundUnsigned(x[i] - m, inverse, 0.5f, 31);
  PackFiveBits(q, block.qh, block.qs);
}

using internal::QuantizeBlock;

// Zero for finite numbers only; one addition an element and no branch.
bool AllFinite(const float* x, size_t n) {
  float zero = 0;
  for (size_t i = 0; i < n; ++i) zero += x[i] * 0.0f;
  return zero == 0.0f;
}

template <typename Block, size_t kElements>
void DequantizeBlocks(const void* row, size_t n, float* out) {
  const Block* blocks = static_cast<const Block*>(row);
  for (size_t i = 0; i < n / kElements; ++i) DequantizeBlock(blocks[i], out + i * kElements);
}

template <typename Block, size_t kElements>
void QuantizeBlocks(const float* values, size_t n, void* out) {
  Block* blocks = static_cast<Block*>(out);
  for (size_t i = 0; i < n / kElements; ++i) {
    const float* x = values + i * kElements;
    CHECK(AllFinite(x, kElements), "block {} of a row to quantise holds a value that is not finite", i);
    QuantizeBlock(x, blocks[i]);
  }
}

template <typename From, typename To>
void Convert(const void* from, size_t n, void* to, To (*convert)(From)) {
  const From* source = static_cast<const From*>(from);
  To* target = static_cast<To*>(to);
  for (size_t i = 0; i < n; ++i) target[i] = convert(source[i]);
}

void CheckBlocks(DType type, size_t n) {
  CHECK(IsWeightType(type), "{} is not a weight type", Traits(type).name);
  CHECK(n % Traits(type).block_elements == 0, "{} elements are not whole {} blocks", n, Traits(type).name);
}

}  // namespace

uint16_t internal::ScaleToHalf(float scale) { return FloatToHalf(Saturate(scale)); }

int internal::RoundClamped(float value, int low, int high) {
  // Clamped first: a float beyond the range of int has no defined conversion.
  return static_cast<int>(std::round(std::clamp(value, static_cast<float>(low), static_cast<float>(high))));
}

void UnpackScales(const uint8_t packed[12], uint8_t scales[8], uint8_t minima[8]) {
  for (int g = 0; g < 4; ++g) {
    scales[g] = packed[g] & 63;
    minima[g] = packed[g + 4] & 63;
    scales[g + 4] = static_cast<uint8_t>((packed[g + 8] & 15) | (packed[g] >> 6) << 4);
    minima[g + 4] = static_cast<uint8_t>((packed[g + 8] >> 4) | (packed[g + 4] >> 6) << 4);
  }
}

void PackScales(const uint8_t scales[8], const uint8_t minima[8], uint8_t packed[12]) {
  for (int g = 0; g < 4; ++g) {
    packed[g] = static_cast<uint8_t>(scales[g] | (scales[g + 4] >> 4) << 6);
    packed[g + 4] = static_cast<uint8_t>(minima[g] | (minima[g + 4] >> 4) << 6);
    packed[g + 8] = static_cast<uint8_t>((scales[g + 4] & 15) | (minima[g + 4] & 15) << 4);
  }
}

bool IsWeightType(DType type) {
  switch (type) {
    case DType::kF32:
    case DType::kF16:
    case DType::kBF16:
    case DType::kQ8_0:
    case DType::kQ4_0:
    case DType::kQ4_1:
    case DType::kQ5_0:
    case DType::kQ5_1:
    case DType::kQ2_K:
    case DType::kQ3_K:
    case DType::kQ4_K:
    case DType::kQ5_K:
    case DType::kQ6_K:
    case DType::kIQ4_NL:
    case DType::kIQ4_XS:
    case DType::kMXFP4:
      return true;
    default:
      return false;
  }
}

bool CanQuantizeTo(DType type) {
  const bool read_only =
      type == DType::kQ2_K || type == DType::kQ3_K || type == DType::kIQ4_XS || type == DType::kMXFP4;
  return IsWeightType(type) && !read_only;
}

void DequantizeRow(DType type, const void* row, size_t n, float* out) {
  CheckBlocks(type, n);
  switch (type) {
    case DType::kF16:
      return Convert(row, n, out, &HalfToFloat);
    case DType::kBF16:
      return Convert(row, n, out, &Bf16ToFloat);
    case DType::kQ8_0:
      return DequantizeBlocks<BlockQ8_0, 32>(row, n, out);
    case DType::kQ4_0:
      return DequantizeBlocks<BlockQ4_0, 32>(row, n, out);
    case DType::kQ4_1:
      return DequantizeBlocks<BlockQ4_1, 32>(row, n, out);
    case DType::kIQ4_NL:
      return DequantizeBlocks<BlockIQ4_NL, 32>(row, n, out);
    case DType::kIQ4_XS:
      return DequantizeBlocks<BlockIQ4_XS, 256>(row, n, out);
    case DType::kMXFP4:
      return DequantizeBlocks<BlockMXFP4, 32>(row, n, out);
    case DType::kQ2_K:
      return DequantizeBlocks<BlockQ2_K, 256>(row, n, out);
    case DType::kQ3_K:
      return DequantizeBlocks<BlockQ3_K, 256>(row, n, out);
    case DType::kQ5_0:
      return DequantizeBlocks<BlockQ5_0, 32>(row, n, out);
    case DType::kQ5_1:
      return DequantizeBlocks<BlockQ5_1, 32>(row, n, out);
    case DType::kQ4_K:
      return DequantizeBlocks<BlockQ4_K, 256>(row, n, out);
    case DType::kQ5_K:
      return DequantizeBlocks<BlockQ5_K, 256>(row, n, out);
    case DType::kQ6_K:
      return DequantizeBlocks<BlockQ6_K, 256>(row, n, out);
    default:
      std::copy_n(static_cast<const float*>(row), n, out);  // F32
  }
}

void QuantizeRow(DType type, const float* values, size_t n, void* out) {
  CheckBlocks(type, n);
  CHECK(CanQuantizeTo(type), "{} is read, not written", Traits(type).name);
  switch (type) {
    case DType::kF16:
      return Convert(values, n, out, &FloatToHalf);
    case DType::kBF16:
      return Convert(values, n, out, &FloatToBf16);
    case DType::kQ8_0:
      return QuantizeBlocks<BlockQ8_0, 32>(values, n, out);
    case DType::kQ4_0:
      return QuantizeBlocks<BlockQ4_0, 32>(values, n, out);
    case DType::kQ4_1:
      return QuantizeBlocks<BlockQ4_1, 32>(values, n, out);
    case DType::kIQ4_NL:
      return QuantizeBlocks<BlockIQ4_NL, 32>(values, n, out);
    case DType::kQ5_0:
      return QuantizeBlocks<BlockQ5_0, 32>(values, n, out);
    case DType::kQ5_1:
      return QuantizeBlocks<BlockQ5_1, 32>(values, n, out);
    case DType::kQ4_K:
      return QuantizeBlocks<BlockQ4_K, 256>(values, n, out);
    case DType::kQ5_K:
      return QuantizeBlocks<BlockQ5_K, 256>(values, n, out);
    case DType::kQ6_K:
      return QuantizeBlocks<BlockQ6_K, 256>(values, n, out);
    default:
      std::copy_n(values, n, static_cast<float*>(out));  // F32
  }
}

}  // namespace lesskv
