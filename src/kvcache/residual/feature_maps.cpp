#include "kvcache/residual/feature_maps.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>

#include "base/check.h"
#include "base/checked.h"
#include "base/error.h"
#include "kernels/basic/basic.h"

namespace lesskv {
namespace {

using internal::kHiddenTile;

uint32_t Bf16Bits(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

// One row of 64 units in the packed form.
void PackRow(const float (&units)[kHiddenTile], bool is_bf16, std::byte* out) {
  if (!is_bf16) {
    std::memcpy(out, units, sizeof(units));
    return;
  }
  uint32_t words[kHiddenTile / 2];
  for (size_t i = 0; i < kHiddenTile / 2; ++i)
    words[i] = Bf16Bits(units[i]) | Bf16Bits(units[i + kHiddenTile / 2]) << 16;
  std::memcpy(out, words, sizeof(words));
}

float Gelu(float x) { return 0.5f * x * (1.0f + std::erf(x * 0.70710678f)); }

}  // namespace

std::vector<float> FoldThirdLayer(const LayerParams& params, size_t rank, size_t kv_head) {
  const float* d = params.d.data() + kv_head * rank;
  const float* d2 = params.d2.data() + kv_head * rank;
  const float* x = params.x.data() + kv_head * rank * rank;
  std::vector<float> w3(rank * rank);
  for (size_t i = 0; i < rank; ++i)
    for (size_t j = 0; j < rank; ++j) w3[i * rank + j] = std::fabs(d[i]) * ((i == j ? 1.0f : 0.0f) + x[i * rank + j] * d2[j]);
  return w3;
}

FeatureMaps::Map FeatureMaps::PackMap(const SidecarShape& s, DType type, const NetParams& net, size_t head) {
  Map map;
  internal::PackedMap& p = map.packed;
  p.head_dim = s.head_dim;
  p.rank = s.rank;
  p.n_tiles = CeilDiv(s.hidden, kHiddenTile);
  p.is_bf16 = type == DType::kBF16;
  const size_t row_bytes = kHiddenTile * (p.is_bf16 ? 2 : 4);
  const size_t w1_rows = p.n_tiles * s.head_dim, w2_rows = p.n_tiles * s.rank;
  map.storage.resize((w1_rows + w2_rows) * row_bytes);
  const float* w1 = net.w1.data() + head * s.head_dim * s.hidden;
  const float* w2 = net.w2.data() + head * s.hidden * s.rank;
  // Units beyond the hidden width are zero: GELU(0) = 0, so they add nothing.
  auto pack = [&](size_t row, size_t tile, auto value) {
    float units[kHiddenTile] = {};
    const size_t first = tile * kHiddenTile;
    for (size_t u = 0; first + u < s.hidden && u < kHiddenTile; ++u) units[u] = value(first + u);
    PackRow(units, p.is_bf16, map.storage.data() + row * row_bytes);
  };
  for (size_t tile = 0; tile < p.n_tiles; ++tile) {
    for (size_t d = 0; d < s.head_dim; ++d)
      pack(tile * s.head_dim + d, tile, [&](size_t u) { return w1[d * s.hidden + u]; });
    for (size_t r = 0; r < s.rank; ++r)
      pack(w1_rows + tile * s.rank + r, tile, [&](size_t u) { return w2[u * s.rank + r]; });
  }
  p.w1 = map.storage.data();
  p.w2 = map.storage.data() + w1_rows * row_bytes;
  if (s.kind == FeatureKind::kExp) {
    map.b1.assign(p.n_tiles * kHiddenTile, 0.0f);
    std::copy_n(net.b1.data() + head * s.hidden, s.hidden, map.b1.data());
    map.b2.assign(net.b2.data() + head * s.rank, net.b2.data() + (head + 1) * s.rank);
    p.b1 = map.b1.data();
  }
  return map;
}

std::shared_ptr<const FeatureMaps> FeatureMaps::Create(const Sidecar& sidecar, const std::string& name) {
  auto maps = std::shared_ptr<FeatureMaps>(new FeatureMaps());
  const SidecarShape& s = sidecar.shape;
  maps->shape_ = s;
  maps->training_ = sidecar.training;
  maps->layers_.resize(s.n_layers);
  for (size_t layer = 0; layer < s.n_layers; ++layer) {
    const LayerParams& params = sidecar.layers[layer];
    if (params.empty())
      Fail(ErrorCode::kMismatch, "{}: layer {} is missing; merge the parts of a layer-wise training first", name, layer);
    Layer& out = maps->layers_[layer];
    out.center = params.center;
    for (size_t h = 0; h < s.n_heads; ++h) out.phi.push_back(PackMap(s, sidecar.matrix_type, params.phi, h));
    for (size_t h = 0; h < s.n_kv_heads; ++h) {
      out.psi.push_back(PackMap(s, sidecar.matrix_type, params.psi, h));
      if (s.kind == FeatureKind::kGelu) out.psi.back().w3 = FoldThirdLayer(params, s.rank, h);
    }
  }
  return maps;
}

std::shared_ptr<const FeatureMaps> FeatureMaps::OfFile(const Sidecar& sidecar, const std::string& path) {
  if (!sidecar.has_maps())
    Fail(ErrorCode::kNotFound, "{}: holds no feature maps (train them with 'lesskv train less')", path);
  return Create(sidecar, path);
}

size_t FeatureMaps::bytes() const {
  size_t bytes = 0;
  for (const Layer& layer : layers_) {
    for (const std::vector<Map>* maps : {&layer.phi, &layer.psi})
      for (const Map& map : *maps)
        bytes += map.storage.size() + (map.b1.size() + map.b2.size() + map.w3.size()) * sizeof(float);
    bytes += layer.center.size() * sizeof(float);
  }
  return bytes;
}

void FeatureMaps::Phi(size_t layer, size_t head, const float* x, size_t x_stride, size_t n, float* out) const {
  DCHECK(layer < layers_.size() && head < shape_.n_heads);
  Run(layers_[layer].phi[head], x, x_stride, n, out);
}

void FeatureMaps::Psi(size_t layer, size_t kv_head, const float* x, size_t x_stride, size_t n, float* out) const {
  DCHECK(layer < layers_.size() && kv_head < shape_.n_kv_heads);
  Run(layers_[layer].psi[kv_head], x, x_stride, n, out);
}

float FeatureMaps::LogMassOffset(size_t layer, size_t head, const float* q) const {
  const std::vector<float>& center = layers_[layer].center;
  if (center.empty()) return 0;
  const size_t kv_head = head / (shape_.n_heads / shape_.n_kv_heads);
  return Dot(q, center.data() + kv_head * shape_.head_dim, shape_.head_dim);
}

void FeatureMaps::Run(const Map& map, const float* x, size_t x_stride, size_t n, float* out) const {
  internal::ActiveLessKernels().hidden_map(map.packed, x, x_stride, n, out);
  const size_t rank = shape_.rank;
  float u[internal::kMaxRank];
  for (size_t m = 0; m < n; ++m) {
    float* features = out + m * rank;
    if (shape_.kind == FeatureKind::kExp) {
      for (size_t r = 0; r < rank; ++r) features[r] = std::exp(std::min(features[r] + map.b2[r], kMaxExponent));
      continue;
    }
    for (size_t r = 0; r < rank; ++r) u[r] = Gelu(features[r]);
    for (size_t r = 0; r < rank; ++r) {
      float sum = u[r];
      if (!map.w3.empty()) {
        sum = 0;
        for (size_t i = 0; i < rank; ++i) sum += u[i] * map.w3[i * rank + r];
      }
      features[r] = std::fabs(sum);
    }
  }
}

}  // namespace lesskv
