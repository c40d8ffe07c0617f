#include "engine/resident_runs.h"

namespace lesskv {

ResidentRuns ReadResidentRuns(const SequenceCache& cache) {
  ResidentRuns layers;
  const CacheShape& shape = cache.config().shape();
  for (size_t layer = 0; layer < shape.layers.size(); ++layer) {
    auto& heads = layers.emplace_back();
    for (size_t head = 0; head < shape.layers[layer].n_kv_heads; ++head) {
      std::vector<int32_t>& runs = heads.emplace_back();
      for (const Position position : cache.ResidentPositions(layer, head)) {
        if (!runs.empty() && runs.back() == ToInt(position))
          ++runs.back();
        else
          runs.insert(runs.end(), {ToInt(position), ToInt(position) + 1});
      }
    }
  }
  return layers;
}

size_t CountRows(const std::vector<int32_t>& runs) {
  size_t n = 0;
  for (size_t i = 0; i + 1 < runs.size(); i += 2) n += static_cast<size_t>(runs[i + 1] - runs[i]);
  return n;
}

}  // namespace lesskv
