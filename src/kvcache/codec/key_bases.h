// Matrices behind which keys are coded, ready to run: those of a sidecar (SidecarBalance), each part of whose channels,
// coded alike, is mixed by a Hadamard transform, so that no channel of it stands out.
//
// A key k is stored as z = k M and met by queries q' = M^-1 q: z . q' = k . q. Few bits make errors that know no
// direction; with B balanced, M's channels have the same power in keys and in queries, the product of the two powers is
// the least that any matrix gives, and the channels are in the order of what they add to scores.
#pragma once

#include <cstddef>
#include <memory>
#include <string>
#include <vector>

#include "kvcache/residual/sidecar.h"

namespace lesskv {

class KeyBases {
 public:
  static constexpr size_t kMostAtOnce = 4;

  // parts: widths of the parts of a head's channels. `name` is the file's. Throws Error kBadFile when a matrix cannot be
  // inverted.
  static std::shared_ptr<const KeyBases> Create(const SidecarBalance& from, const std::vector<size_t>& parts,
                                                const std::string& name);

  size_t head_dim() const { return head_dim_; }
  // Of both matrices of all heads.
  size_t Bytes() const { return matrices_.size() * sizeof(float); }

  // z [n, head_dim] of keys [n, head_dim].
  void ToBasis(size_t layer, size_t kv_head, size_t n, const float* keys, float* z) const;
  // Keys, out[c * stride + i], of z[c * z_stride + i], i < n.
  void FromBasis(size_t layer, size_t kv_head, size_t n, const float* z, size_t z_stride, float* out, size_t stride) const;
  // n <= kMostAtOnce queries, channel c of query m at q[c * stacked + m], to out[j * n + m].
  void Queries(size_t layer, size_t kv_head, size_t n, const float* q, size_t stacked, float* out) const;

 private:
  const float* To(size_t layer, size_t kv_head) const {
    return matrices_.data() + (first_head_[layer] + kv_head) * 2 * head_dim_ * head_dim_;
  }
  // The inverse, transposed: [c, j] is M^-1[j, c].
  const float* From(size_t layer, size_t kv_head) const { return To(layer, kv_head) + head_dim_ * head_dim_; }

  size_t head_dim_ = 0;
  std::vector<size_t> first_head_;  // [layers]
  std::vector<float> matrices_;     // [heads, 2, head_dim, head_dim]
};

}  // namespace lesskv
