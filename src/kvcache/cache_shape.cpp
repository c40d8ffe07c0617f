#include "kvcache/cache_shape.h"

#include <algorithm>
#include <cmath>

namespace lesskv {

float UsualScale(size_t head_dim) { return static_cast<float>(1.0 / std::sqrt(static_cast<double>(head_dim))); }

CacheShape CacheShape::Uniform(size_t n_layers, size_t n_heads, size_t n_kv_heads, size_t head_dim, size_t ctx,
                               const RopeConfig& rope, ComputeType compute) {
  const LayerShape layer{n_heads, n_kv_heads, head_dim, UsualScale(head_dim), std::make_shared<RopeTable>(rope), 0};
  return {std::vector<LayerShape>(n_layers, layer), ctx, compute};
}

LocalLayers CountLocal(const CacheShape& shape) {
  LocalLayers local;
  for (const LayerShape& layer : shape.layers) {
    if (layer.window > 0) ++local.n_layers;
    local.window = std::max(local.window, layer.window);
  }
  return local;
}

HeadTable::HeadTable(std::span<const LayerShape> layers) : first_{0} {
  for (const LayerShape& layer : layers) first_.push_back(first_.back() + layer.n_kv_heads);
}

size_t HeadTable::LayerOf(size_t head) const {
  return static_cast<size_t>(std::upper_bound(first_.begin(), first_.end(), head) - first_.begin()) - 1;
}

}  // namespace lesskv
