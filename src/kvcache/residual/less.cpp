#include "kvcache/residual/less.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "base/checked.h"
#include "base/error.h"
#include "base/threads.h"
#include "kernels/basic/basic.h"

namespace lesskv {
namespace {

constexpr float kReferenceEpsilon = 1e-6f;  // of the authors' decode code
constexpr size_t kAbsorbBlock = 64;         // victims whose features are held at a time
constexpr size_t kReadBlock = 32;           // queries a task

class LessResidual final : public Residual {
 public:
  LessResidual(const LessOptions& options, std::shared_ptr<const FeatureMaps> maps)
      : clamp_(options.clamp), maps_(std::move(maps)) {}

  size_t StateFloats() const override { return LessStateFloats(rank(), head_dim()); }
  size_t WeightBytes() const override { return maps_->bytes(); }
  bool ReadsEmptyState() const override { return clamp_; }

  // Rows of different sequences go through a head's map together, too.
  void Absorb(size_t layer, std::span<const EvictedRows> evicted) const override {
    std::vector<EvictedRows> sorted(evicted.begin(), evicted.end());
    std::stable_sort(sorted.begin(), sorted.end(), [](const auto& a, const auto& b) { return a.kv_head < b.kv_head; });
    std::vector<std::span<const EvictedRows>> tasks;
    for (size_t first = 0, end = 0; first < sorted.size(); first = end) {
      size_t n = sorted[first].n_rows;
      for (end = first + 1; end < sorted.size() && sorted[end].kv_head == sorted[first].kv_head; ++end) {
        n += sorted[end].n_rows;
        if (n > kAbsorbBlock) break;
      }
      tasks.push_back(std::span(sorted).subspan(first, end - first));
    }
    ParallelFor(tasks.size(), [&](size_t i) {
      tasks[i].size() == 1 ? AbsorbMany(layer, tasks[i][0]) : AbsorbSome(layer, tasks[i]);
    });
  }

  // Queries of different sequences go through a head's map together: its weights are read once for all of them.
  void Attend(size_t layer, std::span<const ResidualQuery> queries) const override {
    std::vector<Reader> readers;
    for (const ResidualQuery& query : queries)
      for (size_t m = 0; m < query.n_queries; ++m) readers.push_back({&query, m});
    const size_t n_heads = maps_->shape().n_heads;
    ParallelFor(n_heads * CeilDiv(readers.size(), kReadBlock), [&](size_t task) {
      const size_t first = task / n_heads * kReadBlock;
      ReadHead(layer, task % n_heads, std::span(readers).subspan(first, std::min(readers.size() - first, kReadBlock)));
    });
  }

 private:
  struct Reader {
    const ResidualQuery* query;
    size_t m;  // its query
  };

  size_t rank() const { return maps_->shape().rank; }
  size_t head_dim() const { return maps_->shape().head_dim; }

  void AbsorbMany(size_t layer, const EvictedRows& rows) const {
    float psi[kAbsorbBlock * internal::kMaxRank];
    for (size_t first = 0; first < rows.n_rows; first += kAbsorbBlock) {
      const size_t n = std::min(rows.n_rows - first, kAbsorbBlock);
      maps_->Psi(layer, rows.kv_head, rows.keys + first * head_dim(), head_dim(), n, psi);
      Fold(rows, first, n, psi);
    }
  }

  // At most kAbsorbBlock rows of one head of several sequences.
  void AbsorbSome(size_t layer, std::span<const EvictedRows> evicted) const {
    thread_local std::vector<float> keys;
    keys.clear();
    for (const EvictedRows& rows : evicted) keys.insert(keys.end(), rows.keys, rows.keys + rows.n_rows * head_dim());
    float psi[kAbsorbBlock * internal::kMaxRank];
    maps_->Psi(layer, evicted[0].kv_head, keys.data(), head_dim(), keys.size() / head_dim(), psi);
    float* own = psi;
    for (const EvictedRows& rows : evicted) {
      Fold(rows, 0, rows.n_rows, own);
      own += rows.n_rows * rank();
    }
  }

  // n rows with their features, into their state.
  void Fold(const EvictedRows& rows, size_t first, size_t n, float* psi) const {
    for (size_t i = 0; rows.weights != nullptr && i < n; ++i)  // a row that stands for several tokens
      Scale(psi + i * rank(), rows.weights[first + i], rank());
    float *h = rows.state, *z = rows.state + rank() * head_dim();
    internal::ActiveLessKernels().absorb(psi, rows.values + first * head_dim(), n, rank(), head_dim(), h, z);
  }

  // One head's states read by at most kReadBlock queries.
  void ReadHead(size_t layer, size_t head, std::span<const Reader> readers) const {
    const size_t n_heads = maps_->shape().n_heads, group = n_heads / maps_->shape().n_kv_heads, dim = head_dim();
    thread_local std::vector<float> rows;  // of those with something to read
    rows.clear();
    for (const Reader& reader : readers) {
      if (IsEmpty(State(reader, head / group))) continue;
      const float* q = reader.query->queries + (reader.m * n_heads + head) * dim;
      rows.insert(rows.end(), q, q + dim);
    }
    float phi[kReadBlock * internal::kMaxRank];
    maps_->Phi(layer, head, rows.data(), dim, rows.size() / dim, phi);
    size_t next = 0;
    for (const Reader& reader : readers) {
      const float* state = State(reader, head / group);
      const size_t row = reader.m * n_heads + head;
      float *out = reader.query->out + row * dim, *lse = reader.query->lse + row;
      if (IsEmpty(state)) {
        *lse = Empty(out);
        continue;
      }
      *lse = ReadQuery(phi + next * rank(), state, state + rank() * dim, out) + maps_->LogMassOffset(layer, head, &rows[next * dim]);
      ++next;
    }
  }

  const float* State(const Reader& reader, size_t kv_head) const { return reader.query->states + kv_head * StateFloats(); }

  // psi >= 0: z is zero exactly while nothing with mass was absorbed, and then there is nothing to compute.
  bool IsEmpty(const float* state) const {
    const float* z = state + rank() * head_dim();
    return !clamp_ && std::all_of(z, z + rank(), [](float mass) { return mass == 0; });
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
