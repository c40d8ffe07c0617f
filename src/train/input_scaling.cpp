#include "train/input_scaling.h"

#include <algorithm>
#include <cmath>

#include "kernels/basic/basic.h"
#include "kernels/quants/half.h"

namespace lesskv::train {
namespace {

using Member = std::vector<float> LessExample::*;

ChannelScaling MeasureChannels(std::span<const LessExample> texts, Member input, size_t n_channels) {
  std::vector<double> sum(n_channels), square(n_channels);
  double n = 0;
  for (const LessExample& text : texts) {
    const std::vector<float>& x = text.*input;
    for (size_t i = 0; i < x.size(); ++i) sum[i % n_channels] += x[i];
    n += static_cast<double>(text.n_tokens);
  }
  for (const LessExample& text : texts) {
    const std::vector<float>& x = text.*input;
    for (size_t i = 0; i < x.size(); ++i) square[i % n_channels] += std::pow(x[i] - sum[i % n_channels] / n, 2);
  }
  ChannelScaling scaling;
  for (size_t c = 0; c < n_channels; ++c) {
    const double mean = sum[c] / n, deviation = std::sqrt(square[c] / n);
    const bool varies = deviation > 1e-4 * std::fabs(mean);
    scaling.mean.push_back(static_cast<float>(mean));
    scaling.deviation.push_back(varies ? static_cast<float>(deviation) : 1.0f);
  }
  return scaling;
}

void StandardizeChannels(const ChannelScaling& scaling, std::vector<float>& x) {
  const size_t n = scaling.mean.size();
  const float *mean = scaling.mean.data(), *deviation = scaling.deviation.data();
  for (float* row = x.data(); row < x.data() + x.size(); row += n)
    for (size_t c = 0; c < n; ++c) row[c] = (row[c] - mean[c]) / deviation[c];
}

// One channel's row of w1: multiplied, and what it makes of the channel's mean added to the biases.
struct ChannelChange {
  float factor;
  float mean;  // after multiplication; negative: taken off
  bool to_bf16;
  void Apply(float* w, float* b, size_t hidden) const {
    for (size_t j = 0; j < hidden; ++j) {
      w[j] *= factor;
      if (to_bf16) w[j] = Bf16ToFloat(FloatToBf16(w[j]));
      b[j] += mean * w[j];
    }
  }
};

void ToStandardNet(const ChannelScaling& s, size_t dim, size_t hidden, NetParams& net) {
  for (size_t c = 0; c < s.mean.size(); ++c)
    ChannelChange{s.deviation[c], s.mean[c] / s.deviation[c], false}.Apply(&net.w1[c * hidden], &net.b1[c / dim * hidden], hidden);
}

void ToPlainNet(const ChannelScaling& s, size_t dim, size_t hidden, DType stored, NetParams& net) {
  for (size_t c = 0; c < s.mean.size(); ++c)
    ChannelChange{1 / s.deviation[c], -s.mean[c], stored == DType::kBF16}.Apply(&net.w1[c * hidden], &net.b1[c / dim * hidden], hidden);
}

// Of one query head's exact log-masses where tokens have left, relative to a centre (may be null: 0).
struct LogMasses {
  double mean = 0, variance = 0;
};

LogMasses MeasureLogMasses(const SidecarShape& shape, std::span<const LessExample> texts, size_t head, const float* center) {
  double sum = 0, square = 0, n = 0;
  for (const LessExample& text : texts)
    for (size_t t = text.first_scored; t < text.n_tokens; ++t) {
      const size_t row = t * shape.n_heads + head;
      const double offset = center == nullptr ? 0.0 : Dot(&text.q[row * shape.head_dim], center, shape.head_dim);
      const double relative = text.exact_lse[row] - offset;
      sum += relative, square += relative * relative, ++n;
    }
  if (n == 0) return {};
  return {sum / n, square / n - (sum / n) * (sum / n)};
}

void DropUselessCenters(const SidecarShape& shape, std::span<const LessExample> texts, std::vector<float>& centers) {
  const size_t group = shape.n_heads / shape.n_kv_heads;
  for (size_t kv_head = 0; kv_head < shape.n_kv_heads; ++kv_head) {
    float* center = &centers[kv_head * shape.head_dim];
    double with = 0, without = 0;
    for (size_t head = kv_head * group; head < (kv_head + 1) * group; ++head) {
      with += MeasureLogMasses(shape, texts, head, center).variance;
      without += MeasureLogMasses(shape, texts, head, nullptr).variance;
    }
    if (with >= without / 2) std::fill_n(center, shape.head_dim, 0.0f);
  }
}

}  // namespace

InputScaling InputScaling::Measure(const SidecarShape& shape, float scale, std::span<const LessExample> texts) {
  InputScaling scaling = {MeasureChannels(texts, &LessExample::q, shape.n_heads * shape.head_dim),
                          MeasureChannels(texts, &LessExample::k, shape.n_kv_heads * shape.head_dim), {}};
  for (const float mean : scaling.k.mean) scaling.center.push_back(mean * scale);
  DropUselessCenters(shape, texts, scaling.center);
  return scaling;
}

void InputScaling::Standardize(const SidecarShape& shape, LessExample& text) const {
  const size_t dim = shape.head_dim, group = shape.n_heads / shape.n_kv_heads;
  for (size_t row = 0; row < text.exact_lse.size() && !center.empty(); ++row)
    text.exact_lse[row] -= Dot(&text.q[row * dim], &center[row % shape.n_heads / group * dim], dim);
  StandardizeChannels(q, text.q);
  StandardizeChannels(k, text.k);
}

LayerParams InputScaling::ToStandard(const SidecarShape& shape, LayerParams plain) const {
  ToStandardNet(q, shape.head_dim, shape.hidden, plain.phi);
  ToStandardNet(k, shape.head_dim, shape.hidden, plain.psi);
  return plain;
}

LayerParams InputScaling::ToPlain(const SidecarShape& shape, LayerParams standard, DType stored) const {
  ToPlainNet(q, shape.head_dim, shape.hidden, stored, standard.phi);
  ToPlainNet(k, shape.head_dim, shape.hidden, stored, standard.psi);
  if (std::any_of(center.begin(), center.end(), [](float c) { return c != 0; })) standard.center = center;
  return standard;
}

LayerParams NearTheBareSelector(const SidecarShape& shape, LayerParams fresh, std::span<const LessExample> texts) {
  size_t n_tokens = 0;
  for (const LessExample& text : texts) n_tokens += text.n_tokens;
  // A pair has mass R psi at first, with phi = 1; half of a text's tokens have left in its middle.
  const double pairs = static_cast<double>(n_tokens) / static_cast<double>(texts.size()) / 2;
  const double mass = std::log(pairs * static_cast<double>(shape.rank)) + fresh.psi.b2[0];
  for (size_t head = 0; head < shape.n_heads; ++head) {
    const double wanted = MeasureLogMasses(shape, texts, head, nullptr).mean + std::log(0.01);
    std::fill_n(&fresh.phi.b2[head * shape.rank], shape.rank, static_cast<float>(wanted - mass));
  }
  return fresh;
}

}  // namespace lesskv::train
