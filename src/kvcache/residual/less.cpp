#include "kvcache/residual/less.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "base/check.h"
#include "base/error.h"
#include "base/threads.h"
#include "kernels/basic/basic.h"

namespace lesskv {
namespace {

constexpr float kReferenceEpsilon = 1e-6f;  // less.md section 3, "decode code"
constexpr size_t kAbsorbBlock = 64;         // victims whose features are held at a time
constexpr size_t kReadBlock = 32;           // queries a task

class LessResidual final : public Residual {
 public:
  LessResidual(const LessOptions& options, std::shared_ptr<const FeatureMaps> maps)
      : clamp_(options.clamp), maps_(std::move(maps)) {}

  size_t StateFloats() const override { return LessStateFloats(rank(), head_dim()); }
  size_t WeightBytes() const override { return maps_->bytes(); }
  bool ReadsEmptyState() const override { return clamp_; }

  void Absorb(size_t layer, std::span<const EvictedRows> evicted) const override {
    ParallelFor(evicted.size(), [&](size_t i) { AbsorbHead(layer, evicted[i]); });
  }

  void Attend(size_t layer, std::span<const ResidualQuery> queries) const override {
    const size_t n_heads = maps_->shape().n_heads;
    struct Block {
      const ResidualQuery* query;
      size_t first;
    };
    std::vector<Block> blocks;
    for (const ResidualQuery& query : queries)
      for (size_t first = 0; first < query.n_queries; first += kReadBlock) blocks.push_back({&query, first});
    ParallelFor(n_heads * blocks.size(), [&](size_t task) {
      const Block& block = blocks[task / n_heads];
      ReadHead(layer, task % n_heads, *block.query, block.first, std::min(block.query->n_queries - block.first, kReadBlock));
    });
  }

 private:
  size_t rank() const { return maps_->shape().rank; }
  size_t head_dim() const { return maps_->shape().head_dim; }

  void AbsorbHead(size_t layer, const EvictedRows& rows) const {
    float psi[kAbsorbBlock * internal::kMaxRank];
    float* h = rows.state;
    float* z = rows.state + rank() * head_dim();
    for (size_t first = 0; first < rows.n_rows; first += kAbsorbBlock) {
      const size_t n = std::min(rows.n_rows - first, kAbsorbBlock);
      maps_->Psi(layer, rows.kv_head, rows.keys + first * head_dim(), head_dim(), n, psi);
      for (size_t i = 0; rows.weights != nullptr && i < n; ++i)  // a row that stands for several tokens
        Scale(psi + i * rank(), rows.weights[first + i], rank());
      internal::ActiveLessKernels().absorb(psi, rows.values + first * head_dim(), n, rank(), head_dim(), h, z);
    }
  }

  void ReadHead(size_t layer, size_t head, const ResidualQuery& query, size_t first, size_t n) const {
    const size_t n_heads = maps_->shape().n_heads, group = n_heads / maps_->shape().n_kv_heads;
    const float* state = query.states + head / group * StateFloats();
    const float* z = state + rank() * head_dim();
    // psi >= 0: z is zero exactly while nothing with mass was absorbed, and then there is nothing to compute.
    const bool is_empty = std::all_of(z, z + rank(), [](float mass) { return mass == 0; });
    float phi[kReadBlock * internal::kMaxRank];
    if (!is_empty || clamp_)
      maps_->Phi(layer, head, query.queries + (first * n_heads + head) * head_dim(), n_heads * head_dim(), n, phi);
    for (size_t m = 0; m < n; ++m) {
      const size_t row = (first + m) * n_heads + head;
      float* o = query.out + row * head_dim();
      query.lse[row] = is_empty && !clamp_ ? Empty(o) : ReadQuery(phi + m * rank(), state, z, o);
      query.lse[row] += maps_->LogMassOffset(layer, head, query.queries + row * head_dim());
    }
  }

  float Empty(float* out) const {
    std::fill_n(out, head_dim(), 0.0f);
    return -std::numeric_limits<float>::infinity();
  }

  float ReadQuery(float* phi, const float* h, const float* z, float* out) const {
    const internal::LessKernels& kernels = internal::ActiveLessKernels();
    float mass = kernels.read(phi, h, z, rank(), head_dim(), out);
    if (clamp_) {  // numerator with each feature clamped, denominator with the product clamped
      for (size_t r = 0; r < rank(); ++r) phi[r] = std::max(phi[r], kReferenceEpsilon);
      kernels.read(phi, h, z, rank(), head_dim(), out);
      mass = std::max(mass, kReferenceEpsilon);
    }
    if (mass == 0) return Empty(out);
    const float scale = 1 / mass;
    if (!std::isfinite(scale)) return Empty(out);  // a denormal mass weighs nothing beside any exact pair
    for (size_t d = 0; d < head_dim(); ++d) out[d] *= scale;
    return std::log(mass);
  }

  bool clamp_;
  std::shared_ptr<const FeatureMaps> maps_;
};

}  // namespace

std::unique_ptr<const Residual> MakeLessResidual(const LessOptions& options, std::span<const LayerShape> layers,
                                                 std::shared_ptr<const FeatureMaps> maps) {
  const SidecarShape& s = maps->shape();
  for (const LayerShape& layer : layers)
    if (s.n_layers != layers.size() || s.n_heads != layer.n_heads || s.n_kv_heads != layer.n_kv_heads ||
        s.head_dim != layer.head_dim)
      Fail(ErrorCode::kMismatch,
           "feature maps are for {}, but the model has {} layers, {} query heads, {} KV heads of {}", s.ToString(),
           layers.size(), layer.n_heads, layer.n_kv_heads, layer.head_dim);
  return std::make_unique<LessResidual>(options, std::move(maps));
}

}  // namespace lesskv
