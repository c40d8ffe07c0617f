#include "train/capture.h"

#include <algorithm>
#include <exception>
#include <numeric>

#include "base/check.h"
#include "base/error.h"
#include "base/threads.h"
#include "kernels/basic/basic.h"
#include "kernels/basic/rope.h"
#include "kvcache/sequence_cache.h"
#include "train/train_kernels.h"

namespace lesskv::train {
namespace {

std::shared_ptr<const CacheConfig> OneLayerConfig(const std::string& text, const CacheShape& one) {
  const CacheSpec spec = CacheSpec::Parse(text);
  for (const Stage stage : {Stage::kBudget, Stage::kResidual})
    if (const SpecTerm* term = spec.Find(stage))
      Fail(ErrorCode::kInvalidArgument, "train less: a policy is a selector (and codec) on its own; {} has the term {}",
           text, term->name);
  return CacheConfig::Create(spec, one);
}

}  // namespace

struct CaptureCache::Policy {
  std::string spec;
  std::shared_ptr<const CacheConfig> config;
};

CaptureCache::CaptureCache(const CacheShape& shape, size_t n_tokens, std::vector<ViewRequest> views, size_t plus_rows,
                           size_t first_layer, size_t end_layer, Sink sink)
    : shape_(shape),
      layer_(shape.layers[0]),
      n_tokens_(n_tokens),
      first_layer_(first_layer),
      end_layer_(end_layer),
      sink_(std::move(sink)),
      requests_(std::move(views)) {
  shape_.layers.resize(1);
  shape_.compute = ComputeType::kF32;
  for (const ViewRequest& view : requests_) {
    policies_.push_back({view.spec, OneLayerConfig(view.spec, shape_)});
    if (plus_rows == 0) continue;
    const std::string plus = CacheSpec::Parse(view.spec).WithExtraRows(plus_rows).ToString();
    plus_policies_.push_back({plus, OneLayerConfig(plus, shape_)});
  }
  full_ = CacheConfig::Create(CacheSpec::Parse("full+f32"), shape_);
}

CaptureCache::~CaptureCache() = default;

void CaptureCache::Append(size_t, const float* keys, const float* values) {
  const size_t n = n_tokens_ * layer_.n_kv_heads * layer_.head_dim;
  keys_.assign(keys, keys + n);
  values_.assign(values, values + n);
}

void CaptureCache::Attend(size_t layer, const float* queries, float* out) {
  const size_t q_dim = layer_.n_heads * layer_.head_dim, kv_dim = layer_.n_kv_heads * layer_.head_dim;
  SequenceCache full(full_);
  full.BeginStep(n_tokens_, StepKind::kPrompt);
  full.Append(0, keys_.data(), values_.data());
  full.Attend(0, queries, out);
  full.EndStep();
  if (layer < first_layer_ || layer >= end_layer_) return;
  queries_.assign(queries, queries + n_tokens_ * q_dim);
  record_.n_tokens = n_tokens_;
  record_.target.assign(out, out + n_tokens_ * q_dim);
  record_.q = queries_;
  record_.k = keys_;
  record_.v = values_;
  std::vector<int32_t> positions(n_tokens_);
  std::iota(positions.begin(), positions.end(), 0);
  RotateRows(*layer_.rope, record_.q.data(), n_tokens_, q_dim, layer_.n_heads, layer_.head_dim, positions.data());
  RotateRows(*layer_.rope, record_.k.data(), n_tokens_, kv_dim, layer_.n_kv_heads, layer_.head_dim, positions.data());
  const size_t n_views = policies_.size(), n_plus = plus_policies_.size();
  record_.views.assign(n_views, {});
  std::vector<CaptureView> plus(n_plus);
  std::vector<std::exception_ptr> failures(n_views + n_plus);
  ParallelFor(n_views + n_plus, [&](size_t i) {
    try {
      if (i < n_views) record_.views[i] = Replay(policies_[i], requests_[i].step, false);
      else plus[i - n_views] = Replay(plus_policies_[i - n_views], requests_[i - n_views].step, true);
    } catch (...) {
      failures[i] = std::current_exception();
    }
  });
  for (const std::exception_ptr& failure : failures)
    if (failure) std::rethrow_exception(failure);
  for (size_t i = 0; i < n_plus; ++i) record_.views[i].plus_out = std::move(plus[i].exact_out);
  sink_(layer, record_);
}

// The layer's life under one policy, in a cache of one layer.
CaptureView CaptureCache::Replay(const Policy& policy, size_t step, bool outputs_only) const {
  const size_t q_dim = layer_.n_heads * layer_.head_dim, kv_dim = layer_.n_kv_heads * layer_.head_dim;
  CaptureView view;
  view.spec = policy.spec;
  view.step = step;
  view.exact_out.resize(n_tokens_ * q_dim);
  view.exact_lse.resize(n_tokens_ * layer_.n_heads);
  view.leave.assign(layer_.n_kv_heads * n_tokens_, static_cast<int32_t>(n_tokens_));
  view.first_scored = n_tokens_;
  std::vector<std::vector<int32_t>> resident(layer_.n_kv_heads);
  SequenceCache cache(policy.config);
  for (size_t seen = 0; seen < n_tokens_; seen += step) {
    const size_t n = std::min(step, n_tokens_ - seen);
    cache.BeginStep(n, StepKind::kStream);
    cache.Append(0, &keys_[seen * kv_dim], &values_[seen * kv_dim]);
    cache.Attend(0, &queries_[seen * q_dim], &view.exact_out[seen * q_dim]);
    cache.EndStep();
    if (outputs_only) continue;
    AddMasses(resident, seen, n, view);
    for (size_t h = 0; h < layer_.n_kv_heads; ++h) {
      std::vector<int32_t> held;
      for (Position p : cache.ResidentPositions(0, h)) held.push_back(ToInt(p));
      std::vector<int32_t>& before = resident[h];
      for (size_t i = 0; i < n; ++i) before.push_back(static_cast<int32_t>(seen + i));
      std::vector<int32_t> gone;
      std::set_difference(before.begin(), before.end(), held.begin(), held.end(), std::back_inserter(gone));
      for (int32_t j : gone) view.leave[h * n_tokens_ + static_cast<size_t>(j)] = static_cast<int32_t>(seen + n);
      if (!gone.empty()) view.first_scored = std::min(view.first_scored, seen + n);
      before = std::move(held);
    }
  }
  return view;
}

// Log-masses of the step's queries over the rows they saw: those resident before and the step's own up to themselves.
void CaptureCache::AddMasses(const std::vector<std::vector<int32_t>>& resident, size_t seen, size_t n,
                             CaptureView& view) const {
  const size_t dim = layer_.head_dim, group = layer_.group();
  std::vector<float> keys, scores;
  for (size_t h = 0; h < layer_.n_kv_heads; ++h) {
    const size_t n_past = resident[h].size(), n_rows = n_past + n;
    keys.resize(n_rows * dim);
    for (size_t r = 0; r < n_rows; ++r) {
      const size_t token = r < n_past ? static_cast<size_t>(resident[h][r]) : seen + r - n_past;
      std::copy_n(&record_.k[(token * layer_.n_kv_heads + h) * dim], dim, &keys[r * dim]);
    }
    scores.resize(n * n_rows);
    for (size_t g = 0; g < group; ++g) {
      const size_t head = h * group + g;
      Gemm(false, true, n, n_rows, dim, &record_.q[(seen * layer_.n_heads + head) * dim], layer_.n_heads * dim,
           keys.data(), dim, scores.data(), n_rows, false);
      Scale(scores.data(), layer_.scale, n * n_rows);
      for (size_t i = 0; i < n; ++i)
        view.exact_lse[(seen + i) * layer_.n_heads + head] = LogSumExp(&scores[i * n_rows], n_past + i + 1);
    }
  }
}

void RecordingCache::Append(size_t layer, const float* keys, const float* values) {
  const size_t n = n_step_ * shape_.layers[layer].n_kv_heads * shape_.layers[layer].head_dim;
  layers_[layer].k.insert(layers_[layer].k.end(), keys, keys + n);
  layers_[layer].v.insert(layers_[layer].v.end(), values, values + n);
  inner_.Append(layer, keys, values);
}

void RecordingCache::Attend(size_t layer, const float* queries, float* out) {
  layers_[layer].q.insert(layers_[layer].q.end(), queries, queries + n_step_ * shape_.layers[layer].n_heads * shape_.layers[layer].head_dim);
  inner_.Attend(layer, queries, out);
}

void RecordingCache::Replay(size_t layer, CaptureCache& capture) const {
  std::vector<float> out(layers_[layer].q.size());
  capture.Append(layer, layers_[layer].k.data(), layers_[layer].v.data());
  capture.Attend(layer, layers_[layer].q.data(), out.data());
}

}  // namespace lesskv::train
