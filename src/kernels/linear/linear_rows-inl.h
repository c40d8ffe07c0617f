// What the kernels of every instruction set know of rows of weights, and how they hand them out. Everything is in an
// anonymous namespace, so that each translation unit keeps its own copy, built with its own flags. Block layouts are
// described in quants.h.
#pragma once

#include "kernels/linear/linear_kernels.h"

namespace lesskv::internal {
namespace {

inline uint16_t Load16(const uint8_t* p) {
  uint16_t value;
  __builtin_memcpy(&value, p, sizeof value);
  return value;
}

inline uint32_t Load32(const uint8_t* p) {
  uint32_t value;
  __builtin_memcpy(&value, p, sizeof value);
  return value;
}

inline uint64_t Load64(const uint8_t* p) {
  uint64_t value;
  __builtin_memcpy(&value, p, sizeof value);
  return value;
}

// --- Types ---

constexpr bool IsFloat(DType type) { return type == DType::kF32 || type == DType::kF16 || type == DType::kBF16; }

constexpr bool HasMinimum(DType type) {
  return type == DType::kQ4_1 || type == DType::kQ5_1 || type == DType::kQ2_K || type == DType::kQ4_K ||
         type == DType::kQ5_K;
}

// Scales (and, if any, minima) in 32 elements.
constexpr size_t ScaleGroups(DType type) {
  return type == DType::kQ2_K || type == DType::kQ3_K || type == DType::kQ6_K ? 2 : 1;
}

// Calls f.template operator()<type>() for a quantised type.
template <typename F>
inline void SwitchQuantized(DType type, F&& f) {
  switch (type) {
    case DType::kQ8_0:
      return f.template operator()<DType::kQ8_0>();
    case DType::kQ4_0:
      return f.template operator()<DType::kQ4_0>();
    case DType::kQ4_1:
      return f.template operator()<DType::kQ4_1>();
    case DType::kIQ4_NL:
      return f.template operator()<DType::kIQ4_NL>();
    case DType::kIQ4_XS:
      return f.template operator()<DType::kIQ4_XS>();
    case DType::kMXFP4:
      return f.template operator()<DType::kMXFP4>();
    case DType::kQ2_K:
      return f.template operator()<DType::kQ2_K>();
    case DType::kQ3_K:
      return f.template operator()<DType::kQ3_K>();
    case DType::kQ5_0:
      return f.template operator()<DType::kQ5_0>();
    case DType::kQ5_1:
      return f.template operator()<DType::kQ5_1>();
    case DType::kQ4_K:
      return f.template operator()<DType::kQ4_K>();
    case DType::kQ5_K:
      return f.template operator()<DType::kQ5_K>();
    case DType::kQ6_K:
      return f.template operator()<DType::kQ6_K>();
    default:
      return;  // Linear refused it
  }
}

// The same for any type.
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

// --- Scales ---

// The scale of a block of MXFP4, 2^(e - 128); the two smallest are subnormal.
inline float Mxfp4Scale(uint32_t e) { return __builtin_bit_cast(float, e < 2 ? 0x200000u << e : (e - 1) << 23); }

// The eight scales and minima of a Q4_K or Q5_K block, 0 to 63, a byte each.
struct PackedScales {
  uint64_t scales, minima;
};

inline PackedScales UnpackScales(const uint8_t* block) {
  const uint32_t a = Load32(block + 4), b = Load32(block + 8), c = Load32(block + 12);
  const uint32_t scales_high = (c & 0x0f0f0f0fu) | ((a >> 2) & 0x30303030u);
  const uint32_t minima_high = ((c >> 4) & 0x0f0f0f0fu) | ((b >> 2) & 0x30303030u);
  return {(a & 0x3f3f3f3fu) | uint64_t{scales_high} << 32, (b & 0x3f3f3f3fu) | uint64_t{minima_high} << 32};
}

// --- Few tokens ---

constexpr size_t kDotTokens = 4;  // tokens multiplied with a row in one pass over it

// Calls f.template operator()<n_tokens>(rows, token, row).
template <typename F>
inline void SwitchTokens(size_t n_tokens, const RowBlock& rows, size_t token, size_t row, const F& f) {
  switch (n_tokens) {
    case 1:
      return f.template operator()<1>(rows, token, row);
    case 2:
      return f.template operator()<2>(rows, token, row);
    case 3:
      return f.template operator()<3>(rows, token, row);
    default:
      return f.template operator()<kDotTokens>(rows, token, row);
  }
}

// Calls f.template operator()<tokens>(rows, first token, first row) for at most kDotTokens tokens at once; where there
// are more, kRows rows at a time, so that the next pass finds them in the cache.
template <size_t kRows, typename F>
inline void ForTokens(const RowBlock& block, size_t n_tokens, const F& f) {
  if (n_tokens <= kDotTokens) return SwitchTokens(n_tokens, block, 0, 0, f);
  RowBlock some = block;
  for (size_t r = 0; r < block.n_rows; r += kRows, some.rows += kRows * some.row_bytes) {
    some.n_rows = block.n_rows - r < kRows ? block.n_rows - r : kRows;
    for (size_t t = 0; t < n_tokens; t += kDotTokens)
      SwitchTokens(n_tokens - t < kDotTokens ? n_tokens - t : kDotTokens, some, t, r, f);
  }
}

}  // namespace
}  // namespace lesskv::internal
