// Queries and keys brought to mean 0 and deviation 1 a channel while feature maps are trained. Channels of one head differ
// by orders of magnitude, and maps that start at one scale for all of them learn the large ones only. The trained file
// takes queries and keys as they are: the scaling is folded into the first layer, exactly but for rounding. Where all keys
// of a head carry a large bias (hundreds in Qwen2), what it adds to every exponent is taken out as well.
#pragma once

#include <span>
#include <vector>

#include "kvcache/residual/sidecar.h"
#include "train/less_layer.h"

namespace lesskv::train {

// Of every channel of every head: x = mean + deviation * standard.
struct ChannelScaling {
  std::vector<float> mean, deviation;  // [heads, head_dim]
};

struct InputScaling {
  ChannelScaling q;  // of n_heads
  ChannelScaling k;  // of n_kv_heads

  // LayerParams::center: mean keys times the softmax scale, of KV heads whose log-masses vary much less (half
  // the variance at most) relative to it: where keys share a bias. 0 for others.
  std::vector<float> center;

  // Over all tokens of the texts, whose softmax has the scale `scale`. A channel that does not vary keeps its scale.
  static InputScaling Measure(const SidecarShape& shape, float scale, std::span<const LessExample> texts);

  // Also takes the exact pairs' log-masses relative to the centre of the keys.
  void Standardize(const SidecarShape& shape, LessExample& text) const;

  // Maps that give for standardised inputs, relative to the centre, what `plain` gives for inputs as they are, and back. `stored`: the type in which w1 will
  // be stored; biases then make up for the rounding of what multiplies the means. kExp only: kGelu has no b1.
  LayerParams ToStandard(const SidecarShape& shape, LayerParams plain) const;
  LayerParams ToPlain(const SidecarShape& shape, LayerParams standard, DType stored) const;
};

// Fresh maps whose states weigh about a hundredth of the exact pairs in the middle of these standardised texts.
LayerParams NearTheBareSelector(const SidecarShape& shape, LayerParams fresh, std::span<const LessExample> texts);

}  // namespace lesskv::train
