// The block formats in which GGUF files store weights, and the scalar reference that reads and writes them.
//
// A row is cut into blocks of 32 or 256 consecutive elements, each stored by itself; rows are whole blocks. Everything
// is little-endian. `d`, `m` and `dmin` are binary16. The structures below are the bytes in the file; fixed code tables
// are in code_tables.h.
#pragma once

#include <cstddef>
#include <cstdint>

#include "base/dtype.h"

namespace lesskv {

// 8.5 bits an element: x[i] = d * qs[i], qs in [-127, 127].
struct BlockQ8_0 {
  uint16_t d;
  int8_t qs[32];
};

// 4.5 bits: x[i] = d * (q[i] - 8), q in [0, 15]. q[i] is the low half of qs[i] for i < 16 and the high half of
// qs[i - 16] from there on.
struct BlockQ4_0 {
  uint16_t d;
  uint8_t qs[16];
};

// 5 bits: x[i] = d * q[i] + m, with q as in Q4_0.
struct BlockQ4_1 {
  uint16_t d, m;
  uint8_t qs[16];
};

// 4.5 bits: x[i] = d * kIq4Codes[q[i]], with q as in Q4_0.
struct BlockIQ4_NL {
  uint16_t d;
  uint8_t qs[16];
};

// 4.25 bits: x[i] = 2^(e - 128) * kMxfp4Codes[q[i]], with q as in Q4_0. e 255 is 2^127 here, as in llama.cpp; the
// specification calls it not a number.
struct BlockMXFP4 {
  uint8_t e;
  uint8_t qs[16];
};

// 5.5 bits: x[i] = d * (q[i] - 16), q in [0, 31]. The low four bits as in Q4_0; the fifth is bit i of qh, read as one
// little-endian 32-bit number.
struct BlockQ5_0 {
  uint16_t d;
  uint8_t qh[4];
  uint8_t qs[16];
};

// 6 bits: x[i] = d * q[i] + m, with q as in Q5_0.
struct BlockQ5_1 {
  uint16_t d, m;
  uint8_t qh[4];
  uint8_t qs[16];
};

// 2.625 bits, 256 elements in 16 groups of 16: x[i] = d * scale[i / 16] * q[i] - dmin * minimum[i / 16], q in [0, 3].
// scales[g] holds the scale in its low half, the minimum in its high half. The two halves of 128 elements are stored
// alike, half h in qs[32h, 32h + 32): element 32s + l (s in 0..3, 0 <= l < 32) is bits 2s and 2s + 1 of qs[l].
struct BlockQ2_K {
  uint8_t scales[16];
  uint8_t qs[64];
  uint16_t d, dmin;
};

// 3.4375 bits, 256 elements in 16 groups of 16: x[i] = d * (scale[i / 16] - 32) * (q[i] - 4), q in [0, 7].
// The low two bits as in Q2_K; the third of element 32s + l of half h is bit 4h + s of hmask[l]. scales packs sixteen
// 6-bit scales: the low four bits of scale g are the low (g < 8) or high half of scales[g % 8], the upper two are bits
// 2 (g / 4) and 2 (g / 4) + 1 of scales[8 + g % 4].
struct BlockQ3_K {
  uint8_t hmask[32];
  uint8_t qs[64];
  uint8_t scales[12];
  uint16_t d;
};

// 4.5 bits, 256 elements in 8 groups of 32: x[i] = d * scale[g] * q[i] - dmin * minimum[g], q in [0, 15].
// Elements are stored in four runs of 64: run r takes qs[32r, 32r + 32), its group 2r the low halves, 2r + 1 the high.
// scales packs eight 6-bit scales and eight 6-bit minima: see UnpackScales.
struct BlockQ4_K {
  uint16_t d, dmin;
  uint8_t scales[12];
  uint8_t qs[128];
};

// 5.5 bits: as Q4_K with q in [0, 31]; the fifth bit of element l of group g (0 <= l < 32) is bit g of qh[l].
struct BlockQ5_K {
  uint16_t d, dmin;
  uint8_t scales[12];
  uint8_t qh[32];
  uint8_t qs[128];
};

// 6.5625 bits, 256 elements in 16 groups of 16: x[i] = d * scales[i / 16] * (q[i] - 32), q in [0, 63].
// The two halves of 128 elements are stored alike, half h in ql[64h, 64h + 64) and qh[32h, 32h + 32). Within a half,
// element 32s + l (s in 0..3, 0 <= l < 32) has its low four bits in ql[l + 32 (s % 2)], in the low half of the byte for
// s < 2 and in the high half for s >= 2, and its upper two bits in bits 2s and 2s + 1 of qh[l].
struct BlockQ6_K {
  uint8_t ql[128];
  uint8_t qh[64];
  int8_t scales[16];
  uint16_t d;
};

// 4.25 bits, 256 elements in 8 groups of 32: x[i] = d * (scale[i / 32] - 32) * kIq4Codes[q[i]]. Group g has its numbers
// in qs[16g, 16g + 16) as a block of Q4_0 has; its 6-bit scale has the low four bits in a half of scales_l[g / 2] (the
// low one for even g), the upper two in bits 2g and 2g + 1 of scales_h.
struct BlockIQ4_XS {
  uint16_t d;
  uint16_t scales_h;
  uint8_t scales_l[4];
  uint8_t qs[128];
};

static_assert(sizeof(BlockQ8_0) == 34 && sizeof(BlockQ4_0) == 18 && sizeof(BlockQ5_0) == 22 && sizeof(BlockQ5_1) == 24);
static_assert(sizeof(BlockQ4_1) == 20 && sizeof(BlockIQ4_NL) == 18 && sizeof(BlockMXFP4) == 17);
static_assert(sizeof(BlockQ2_K) == 84 && sizeof(BlockQ3_K) == 110 && sizeof(BlockIQ4_XS) == 136);
static_assert(sizeof(BlockQ4_K) == 144 && sizeof(BlockQ5_K) == 176 && sizeof(BlockQ6_K) == 210);

// The scales and minima of Q4_K and Q5_K, each in [0, 63]. Groups 0 to 3: the low six bits of packed[g] (scale) and
// packed[g + 4] (minimum). Groups 4 to 7: the low four bits are the low (scale) and high (minimum) half of packed[g +
// 4], the upper two are the top bits of packed[g - 4] (scale) and packed[g] (minimum).
void UnpackScales(const uint8_t packed[12], uint8_t scales[8], uint8_t minima[8]);
void PackScales(const uint8_t scales[8], const uint8_t minima[8], uint8_t packed[12]);

// Whether DequantizeRow reads rows of `type`: F32, F16, BF16 and the formats above.
bool IsWeightType(DType type);

// Whether QuantizeRow makes them: all of these but Q2_K, Q3_K, IQ4_XS and MXFP4, which other programs write.
bool CanQuantizeTo(DType type);

// n elements (whole blocks) of a weight type to float32. `row` and `out` do not overlap and need no alignment beyond
// that of their element (row: 2 bytes; MXFP4: none). Bitwise deterministic: products in float32, in the order of the
// formulas above.
void DequantizeRow(DType type, const void* row, size_t n, float* out);

// The reverse. F16 and BF16 round to nearest even. Q8_0, Q4_0, Q4_1, Q5_0 and Q5_1 take the scale from the largest
// magnitude (or range) of a block, bit for bit as llama.cpp's reference does. IQ4_NL and the K formats search scales
// and minima that minimise the squared error of each block or group, ours. Values must be finite (CHECKed for block
// formats); scales beyond the half range saturate.
void QuantizeRow(DType type, const float* values, size_t n, void* out);

namespace internal {
inline constexpr float kSmallestScale = 1e-30f;  // below it a scale is 0 as a half, and its inverse could overflow
void QuantizeBlock(const float* x, BlockIQ4_NL& block);
void QuantizeBlock(const float* x, BlockQ4_K& block);
void QuantizeBlock(const float* x, BlockQ5_K& block);
void QuantizeBlock(const float* x, BlockQ6_K& block);
// A scale to binary16; magnitudes beyond its range become its largest number, not infinity.
uint16_t ScaleToHalf(float scale);
// Rounds half away from zero and clamps to [low, high].
int RoundClamped(float value, int low, int high);
}  // namespace internal

}  // namespace lesskv
