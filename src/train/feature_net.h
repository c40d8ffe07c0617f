// One head's net of a feature map in training: forward and backward over many rows, in tiles that stay in the cache.
// The hidden layer is not kept for the backward pass but computed again: it is the largest thing there is, and its
// product is a third of the work.
#pragma once

#include <cstddef>
#include <cstdint>

#include "train/less_layer.h"

namespace lesskv::train {

struct Rows {
  const float* x;   // [n, head_dim], rows `stride` floats apart
  size_t stride;
  size_t n;
};

class FeatureNet {
 public:
  // `parameters` in NetLayout order. `stream` names this net's dropout mask beside the options' seed.
  FeatureNet(const SidecarShape& shape, const NetLayout& layout, bool is_psi, const float* parameters,
             const DropoutOptions& dropout, uint64_t stream);

  // p2 [n, rank]: what enters the last activation; features [n, rank].
  void Forward(const Rows& rows, float* p2, float* features) const;

  // Adds to gradient (NetLayout order). d_features [n, rank] is overwritten.
  void Backward(const Rows& rows, const float* p2, float* d_features, float* gradient) const;

 private:
  void Hidden(const Rows& rows, size_t first, size_t n, float* pre, float* mask) const;
  void Finish(const float* p2, size_t n, float* features) const;
  void FinishBackward(const float* p2, size_t n, float* d_features, float* gradient) const;

  const SidecarShape& shape_;
  const NetLayout& layout_;
  bool is_psi_;
  const float* parameters_;
  float dropout_;
  uint64_t stream_seed_;
};

}  // namespace lesskv::train
