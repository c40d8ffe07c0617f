// Rows of weights for tests and benchmarks, of any weight type.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

#include "base/rng.h"
#include "kernels/quants/half.h"
#include "kernels/quants/quants.h"

namespace lesskv {

// n elements (whole blocks) of `type`: normal numbers as QuantizeRow encodes them, or, for the types that it does not
// make, random codes and packed scales under block scales that keep the values below about five.
inline void RandomRow(DType type, size_t n, Rng& rng, void* out) {
  if (CanQuantizeTo(type)) {
    std::vector<float> values(n);
    for (float& value : values) value = rng.Normal();
    return QuantizeRow(type, values.data(), n, out);
  }
  const auto set_half = [](uint8_t* at, float value) {
    const uint16_t half = FloatToHalf(value);
    std::memcpy(at, &half, sizeof half);
  };
  const size_t block_bytes = Traits(type).block_bytes;
  uint8_t* const end = static_cast<uint8_t*>(out) + RowBytes(type, n);
  for (uint8_t* block = static_cast<uint8_t*>(out); block < end; block += block_bytes) {
    for (size_t i = 0; i < block_bytes; ++i) block[i] = static_cast<uint8_t>(rng.Next());
    if (type == DType::kQ2_K) {
      set_half(block + offsetof(BlockQ2_K, d), 0.1f);
      set_half(block + offsetof(BlockQ2_K, dmin), 0.1f);
    } else if (type == DType::kQ3_K) {
      set_half(block + offsetof(BlockQ3_K, d), 0.04f);
    } else if (type == DType::kIQ4_XS) {
      set_half(block + offsetof(BlockIQ4_XS, d), 0.001f);
    } else {
      block[offsetof(BlockMXFP4, e)] = static_cast<uint8_t>(124 + rng.Below(3));
    }
  }
}

}  // namespace lesskv
