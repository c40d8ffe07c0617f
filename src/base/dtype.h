// Element types of tensors as GGUF numbers them (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md), with the
// sizes needed for bounds checks. What is inside a block is documented beside its codec in kernels/quants.h.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>

namespace lesskv {

enum class DType : uint32_t {
  kF32 = 0,
  kF16 = 1,
  kQ4_0 = 2,
  kQ4_1 = 3,
  kQ5_0 = 6,
  kQ5_1 = 7,
  kQ8_0 = 8,
  kQ2_K = 10,
  kQ3_K = 11,
  kQ4_K = 12,
  kQ5_K = 13,
  kQ6_K = 14,
  kIQ4_NL = 20,
  kIQ4_XS = 23,
  kI8 = 24,
  kI16 = 25,
  kI32 = 26,
  kI64 = 27,
  kBF16 = 30,
  kMXFP4 = 39,
};

struct DTypeTraits {
  std::string_view name;    // "F32", "Q4_K", ...
  size_t block_elements;    // elements a block; rows must be a multiple of it
  size_t block_bytes;
};

// nullptr for a number that is not one of the types above.
const DTypeTraits* FindDType(uint32_t ggml_type);
const DTypeTraits& Traits(DType type);

// Bytes of one row of `n` elements; CHECKs that n is a multiple of the block.
size_t RowBytes(DType type, size_t n);

}  // namespace lesskv
