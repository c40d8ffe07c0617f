#include "train/full_layers.h"

namespace lesskv::train {

void FullLayers::Append(size_t layer, const float* keys, const float* values) {
  CacheShape one = shape_;
  one.layers = {shape_.layers[layer]};
  layer_ = std::make_unique<SequenceCache>(CacheConfig::Create(CacheSpec::Parse("full+f32"), one));
  layer_->BeginStep(n_tokens_, StepKind::kPrompt);
  layer_->Append(0, keys, values);
}

void FullLayers::Attend(const float* queries, float* out) {
  layer_->Attend(0, queries, out);
  layer_->EndStep();
  layer_.reset();
}

}  // namespace lesskv::train
