// The reference of every product: plain loops, one row at a time, built with the compiler's baseline flags.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "base/checked.h"
#include "kernels/linear/linear_kernels.h"
#include "kernels/quants/half.h"
#include "kernels/quants/quants.h"

namespace lesskv::internal {
namespace {

constexpr size_t kInt8Block = 32;

void UnpackF32(const RowBlock& block, float* out, size_t out_stride) {
  for (size_t r = 0; r < block.n_rows; ++r) {
    DequantizeRow(block.type, block.rows + r * block.row_bytes, block.n, out + r * out_stride);
  }
}

void UnpackBf16(const RowBlock& block, uint16_t* out, size_t out_stride) {
  std::vector<float> row(block.n);
  for (size_t r = 0; r < block.n_rows; ++r) {
    DequantizeRow(block.type, block.rows + r * block.row_bytes, block.n, row.data());
    std::transform(row.begin(), row.end(), out + r * out_stride, FloatToBf16);
  }
}

void DotF32(const RowBlock& block, const float* x, size_t x_stride, size_t n_tokens, float* y, size_t y_stride) {
  std::vector<float> row(block.n);
  for (size_t r = 0; r < block.n_rows; ++r) {
    DequantizeRow(block.type, block.rows + r * block.row_bytes, block.n, row.data());
    for (size_t t = 0; t < n_tokens; ++t) {
      double sum = 0;
      for (size_t i = 0; i < block.n; ++i) sum += static_cast<double>(row[i]) * x[t * x_stride + i];
      y[t * y_stride + r] = static_cast<float>(sum);
    }
  }
}

// Returns the scale.
float QuantizeBlock(const float* x, int8_t* q) {
  float largest = 0;
  for (size_t i = 0; i < kInt8Block; ++i) largest = std::max(largest, std::fabs(x[i]));
  const float inverse = largest > 0 ? 127.0f / largest : 0.0f;
  for (size_t i = 0; i < kInt8Block; ++i) q[i] = static_cast<int8_t>(std::nearbyint(x[i] * inverse));
  return largest / 127.0f;
}

void Quantize(DType, const float* x, size_t n, size_t token, const Int8Activations& out) {
  int8_t* q = out.q + token * out.n_padded;
  float* scales = out.scale + token * (out.n_padded / kInt8Block);
  uint32_t* spike = out.spike + token * (out.n_padded / kInt8Block);
  const size_t n_blocks = n / kInt8Block;
  std::vector<float> rest(x, x + n);
  for (size_t e = 0; e < out.n_spikes; ++e) {
    const auto size = [](float a, float b) { return std::fabs(a) < std::fabs(b); };
    spike[e] = static_cast<uint32_t>(std::max_element(rest.begin(), rest.end(), size) - rest.begin());
    rest[spike[e]] = 0;
  }
  std::sort(spike, spike + out.n_spikes);
  spike[out.n_spikes] = kNoSpike;
  for (size_t b = 0; b < n_blocks; ++b) scales[b] = QuantizeBlock(&rest[b * kInt8Block], q + b * kInt8Block);
  for (size_t e = 0; e < out.n_spikes; ++e) {
    float block[kInt8Block] = {};
    block[spike[e] % kInt8Block] = x[spike[e]];
    scales[n_blocks + e] = QuantizeBlock(block, q + (n_blocks + e) * kInt8Block);
  }
}

// The same arithmetic as the fast kernels up to the order of summation: codes times scales, exact products.
void DotInt8(const RowBlock& block, const Int8Activations& x, size_t n_tokens, float* y, size_t y_stride) {
  std::vector<float> row(block.n);
  for (size_t r = 0; r < block.n_rows; ++r) {
    DequantizeRow(block.type, block.rows + r * block.row_bytes, block.n, row.data());
    for (size_t t = 0; t < n_tokens; ++t) {
      const int8_t* q = x.q + t * x.n_padded;
      const float* scales = x.scale + t * (x.n_padded / kInt8Block);
      const uint32_t* spike = x.spike + t * (x.n_padded / kInt8Block);
      double sum = 0;
      const auto add = [&](size_t b, size_t x_block) {
        for (size_t i = 0; i < kInt8Block; ++i)
          sum += static_cast<double>(row[b * kInt8Block + i]) * scales[x_block] * q[x_block * kInt8Block + i];
      };
      for (size_t b = 0; b < block.n / kInt8Block; ++b) add(b, b);
      for (size_t e = 0; e < x.n_spikes; ++e) add(spike[e] / kInt8Block, block.n / kInt8Block + e);
      y[t * y_stride + r] = static_cast<float>(sum);
    }
  }
}

void PackBf16(const float* x, size_t x_stride, size_t n_tokens, size_t n, size_t vectors, uint16_t* out) {
  const size_t width = vectors * kTokenLanes;
  std::fill_n(out, CeilDiv(n, 2) * width * 2, uint16_t{0});
  for (size_t t = 0; t < n_tokens; ++t) {
    for (size_t i = 0; i < n; ++i) out[((i / 2) * width + t) * 2 + i % 2] = FloatToBf16(x[t * x_stride + i]);
  }
}

void TileF32(const float* const* rows, size_t n, const float* group, size_t vectors, float* acc, bool first) {
  const size_t width = vectors * kTokenLanes;
  if (first) std::fill_n(acc, width, 0.0f);
  for (size_t i = 0; i < n; ++i) {
    for (size_t t = 0; t < width; ++t) acc[t] += rows[0][i] * group[i * width + t];
  }
}

void TileBf16(const uint16_t* const* rows, size_t n_pairs, const uint16_t* group, size_t vectors, float* acc,
              bool first) {
  const size_t width = vectors * kTokenLanes;
  if (first) std::fill_n(acc, width, 0.0f);
  for (size_t i = 0; i < n_pairs; ++i) {
    uint16_t w[2];
    std::memcpy(w, reinterpret_cast<const char*>(rows[0]) + i * sizeof w, sizeof w);
    for (size_t t = 0; t < width; ++t) {
      const uint16_t* pair = group + (i * width + t) * 2;
      acc[t] += Bf16ToFloat(w[0]) * Bf16ToFloat(pair[0]) + Bf16ToFloat(w[1]) * Bf16ToFloat(pair[1]);
    }
  }
}

}  // namespace

void ScalarPackF32(const float* x, size_t x_stride, size_t n_tokens, size_t n, size_t vectors, float* out) {
  const size_t width = vectors * kTokenLanes;
  for (size_t i = 0; i < n; ++i) {
    for (size_t t = 0; t < n_tokens; ++t) out[i * width + t] = x[t * x_stride + i];
    for (size_t t = n_tokens; t < width; ++t) out[i * width + t] = 0;
  }
}

void ScalarStore(const float* acc, size_t width, size_t n_rows, size_t n_tokens, float* y, size_t y_stride) {
  for (size_t t = 0; t < n_tokens; ++t) {
    for (size_t r = 0; r < n_rows; ++r) y[t * y_stride + r] = acc[r * width + t];
  }
}

const LinearKernels& ScalarLinearKernels() {
  static const LinearKernels kernels = {
      .unpack_f32 = UnpackF32,
      .unpack_bf16 = UnpackBf16,
      .dot_f32 = DotF32,
      .quantize = Quantize,
      .dot_int8 = DotInt8,
      .pack_f32 = ScalarPackF32,
      .pack_bf16 = PackBf16,
      .tile_f32 = TileF32,
      .tile_bf16 = TileBf16,
      .shape_f32 = {.group_vectors = 1, .rows = {1}},
      .shape_bf16 = {.group_vectors = 1, .rows = {1}},
      .dots_take_spikes = true,
      .store = ScalarStore,
  };
  return kernels;
}

}  // namespace lesskv::internal
