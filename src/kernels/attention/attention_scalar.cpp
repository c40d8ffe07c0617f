// The attention kernels, one number at a time: the reference of the faster ones.
#include "kernels/attention/attention_isa.h"
#include "kernels/rows/rows_layout.h"

namespace lesskv::scalar {
namespace {

using V = float;
constexpr size_t kW = 1;

V Zero() { return 0; }
V Splat(float x) { return x; }
V Load(const float* p) { return *p; }
void Store(float* p, V x) { *p = x; }
V Fma(V a, V b, V c) { return a * b + c; }
V Mul(V a, V b) { return a * b; }
V Add(V a, V b) { return a + b; }
V Sub(V a, V b) { return a - b; }
V VMax(V a, V b) { return a > b ? a : b; }
V VMin(V a, V b) { return a < b ? a : b; }
V Round(V x) { return (x + 12582912.0f) - 12582912.0f; }  // 1.5 * 2^23: the sum has no fraction bits
V TimesPow2(V y, V n) {
  n = VMax(-127, n);  // the bits of 2^-127 are 0
  return y * __builtin_bit_cast(float, (static_cast<int32_t>(n) + 127) << 23);
}
float ReduceMax(V x) { return x; }
float ReduceAdd(V x) { return x; }
float HalfToFloat(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16, magnitude = half & 0x7fffu;
  if (magnitude < 0x400u) {
    const float value = static_cast<float>(magnitude) * 0x1p-24f;
    return sign ? -value : value;
  }
  const uint32_t exponent = magnitude >= 0x7c00u ? 0x70000000u : 0x38000000u;  // infinities and NaN keep all ones
  return __builtin_bit_cast(float, sign | ((magnitude << 13) + exponent));
}
V LoadF16(const uint16_t* p) { return HalfToFloat(*p); }
V LoadBF16(const uint16_t* p) { return __builtin_bit_cast(float, static_cast<uint32_t>(*p) << 16); }
V Field(const uint8_t* p, int shift, int mask) { return static_cast<float>(p[shift / 8] >> shift % 8 & mask); }

#include "kernels/attention/attention_prefill.h"

bool FusedScores(const AttentionView&, const DecodeScratch&, const RowSpan&, size_t, size_t, size_t) { return false; }
bool FusedValues(const AttentionView&, const DecodeScratch&, RowType, size_t, size_t, size_t) { return false; }

}  // namespace

const AttentionKernels kAttentionKernels = {ScratchFloats, PartialFloats, Decode,        MergeSplits,
                                            Prefill,       ColumnSums};

}  // namespace lesskv::scalar
