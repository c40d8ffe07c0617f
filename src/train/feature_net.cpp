#include "train/feature_net.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "base/rng.h"
#include "kvcache/residual/feature_maps.h"
#include "train/train_kernels.h"

namespace lesskv::train {
namespace {

constexpr size_t kTileRows = 256;  // 256 x 128 floats: 128 KB, a tenth of the second-level cache

// GELU and its slope for the few numbers of the last layer.
struct ScalarGelu {
  explicit ScalarGelu(float x) {
    const float cdf = 0.5f * (1.0f + std::erf(x * 0.70710678f));
    act = x * cdf;
    slope = cdf + x * 0.39894228f * std::exp(-0.5f * x * x);
  }
  float act, slope;
};

float Sign(float x) { return x > 0 ? 1.0f : x < 0 ? -1.0f : 0.0f; }

// A tile's buffers, one set a thread.
struct Tile {
  std::vector<float> pre, slope, mask;
  void Resize(size_t n) {
    pre.resize(n);
    slope.resize(n);
    mask.resize(n);
  }
};

Tile& ThreadTile() {
  thread_local Tile tile;
  return tile;
}

}  // namespace

FeatureNet::FeatureNet(const SidecarShape& shape, const NetLayout& layout, bool is_psi, const float* parameters,
                       const DropoutOptions& dropout, uint64_t stream)
    : shape_(shape),
      layout_(layout),
      is_psi_(is_psi),
      parameters_(parameters),
      dropout_(dropout.rate),
      stream_seed_(dropout.seed * 0x9e3779b97f4a7c15ull + stream) {}

// First pre-activations of rows [first, first + n), after dropout. mask (when dropout is on): 0 or 1 / (1 - rate).
void FeatureNet::Hidden(const Rows& rows, size_t first, size_t n, float* pre, float* mask) const {
  const size_t hidden = shape_.hidden;
  Gemm(false, false, n, hidden, shape_.head_dim, rows.x + first * rows.stride, rows.stride, parameters_ + layout_.w1,
       hidden, pre, hidden, false);
  if (shape_.kind == FeatureKind::kExp) AddBias(pre, parameters_ + layout_.b1, n, hidden);
  if (dropout_ == 0) return;
  // Eight units a draw, at the resolution of a byte; a tile's mask does not depend on how the work is divided.
  Rng rng(stream_seed_ + 0xd1b54a32d192ed03ull * (first + 1));
  const auto threshold = static_cast<uint32_t>(std::lround(dropout_ * 256));
  const float keep = 256.0f / static_cast<float>(256 - threshold);
  uint64_t bits = 0;
  for (size_t i = 0; i < n * hidden; ++i) {
    if (i % 8 == 0) bits = rng.Next();
    mask[i] = (bits & 255) < threshold ? 0.0f : keep;
    bits >>= 8;
  }
  Multiply(pre, mask, n * hidden);
}

void FeatureNet::Forward(const Rows& rows, float* p2, float* features) const {
  const size_t hidden = shape_.hidden, rank = shape_.rank;
  Tile& tile = ThreadTile();
  tile.Resize(kTileRows * hidden);
  for (size_t first = 0; first < rows.n; first += kTileRows) {
    const size_t n = std::min(kTileRows, rows.n - first);
    Hidden(rows, first, n, tile.pre.data(), tile.mask.data());
    Gelu(tile.pre.data(), n * hidden, tile.pre.data());
    Gemm(false, false, n, rank, hidden, tile.pre.data(), hidden, parameters_ + layout_.w2, rank, p2 + first * rank, rank,
         false);
  }
  if (shape_.kind == FeatureKind::kExp) AddBias(p2, parameters_ + layout_.b2, rows.n, rank);
  Finish(p2, rows.n, features);
}

void FeatureNet::Finish(const float* p2, size_t n, float* features) const {
  const size_t rank = shape_.rank;
  if (shape_.kind == FeatureKind::kExp) {
    for (size_t i = 0; i < n * rank; ++i) features[i] = std::exp(std::min(p2[i], kMaxExponent));
    return;
  }
  if (!is_psi_) {
    for (size_t i = 0; i < n * rank; ++i) features[i] = std::fabs(ScalarGelu(p2[i]).act);
    return;
  }
  const float *d = parameters_ + layout_.d, *d2 = parameters_ + layout_.d2, *x = parameters_ + layout_.x;
  std::vector<float> u(rank), mixed(rank);
  for (size_t m = 0; m < n; ++m) {
    for (size_t r = 0; r < rank; ++r) u[r] = std::fabs(d[r]) * ScalarGelu(p2[m * rank + r]).act;
    std::fill(mixed.begin(), mixed.end(), 0.0f);
    for (size_t i = 0; i < rank; ++i)
      for (size_t r = 0; r < rank; ++r) mixed[r] += u[i] * x[i * rank + r];
    for (size_t r = 0; r < rank; ++r) features[m * rank + r] = std::fabs(u[r] + mixed[r] * d2[r]);
  }
}

// Turns d_features into d_p2, in place.
void FeatureNet::FinishBackward(const float* p2, size_t n, float* d_features, float* gradient) const {
  const size_t rank = shape_.rank;
  if (shape_.kind == FeatureKind::kExp) {
    for (size_t i = 0; i < n * rank; ++i) d_features[i] *= p2[i] < kMaxExponent ? std::exp(p2[i]) : 0.0f;
    return;
  }
  if (!is_psi_) {
    for (size_t i = 0; i < n * rank; ++i) {
      const ScalarGelu g(p2[i]);
      d_features[i] *= Sign(g.act) * g.slope;
    }
    return;
  }
  const float *d = parameters_ + layout_.d, *d2 = parameters_ + layout_.d2, *x = parameters_ + layout_.x;
  float *gd = gradient + layout_.d, *gd2 = gradient + layout_.d2, *gx = gradient + layout_.x;
  std::vector<float> g(rank), slope(rank), u(rank), mixed(rank), dmixed(rank);
  for (size_t m = 0; m < n; ++m) {
    float* df = d_features + m * rank;
    for (size_t r = 0; r < rank; ++r) {
      const ScalarGelu gelu(p2[m * rank + r]);
      g[r] = gelu.act;
      slope[r] = gelu.slope;
      u[r] = std::fabs(d[r]) * gelu.act;
    }
    std::fill(mixed.begin(), mixed.end(), 0.0f);
    for (size_t i = 0; i < rank; ++i)
      for (size_t r = 0; r < rank; ++r) mixed[r] += u[i] * x[i * rank + r];
    for (size_t r = 0; r < rank; ++r) {  // psi = |s|, s = u + mixed * d2
      df[r] *= Sign(u[r] + mixed[r] * d2[r]);
      gd2[r] += df[r] * mixed[r];
      dmixed[r] = df[r] * d2[r];
    }
    for (size_t i = 0; i < rank; ++i) {
      float du = df[i];
      for (size_t r = 0; r < rank; ++r) {
        du += dmixed[r] * x[i * rank + r];
        gx[i * rank + r] += u[i] * dmixed[r];
      }
      gd[i] += du * g[i] * Sign(d[i]);
      df[i] = du * std::fabs(d[i]) * slope[i];
    }
  }
}

void FeatureNet::Backward(const Rows& rows, const float* p2, float* d_features, float* gradient) const {
  const size_t hidden = shape_.hidden, rank = shape_.rank, dim = shape_.head_dim;
  FinishBackward(p2, rows.n, d_features, gradient);
  const float* d_p2 = d_features;
  const bool biased = shape_.kind == FeatureKind::kExp;
  if (biased) AddColumnSums(d_p2, rows.n, rank, gradient + layout_.b2);
  Tile& tile = ThreadTile();
  tile.Resize(kTileRows * hidden);
  float *pre = tile.pre.data(), *slope = tile.slope.data(), *mask = tile.mask.data();
  for (size_t first = 0; first < rows.n; first += kTileRows) {
    const size_t n = std::min(kTileRows, rows.n - first);
    Hidden(rows, first, n, pre, mask);
    GeluWithSlope(pre, n * hidden, pre, slope);
    Gemm(true, false, hidden, rank, n, pre, hidden, d_p2 + first * rank, rank, gradient + layout_.w2, rank, true);
    Gemm(false, true, n, hidden, rank, d_p2 + first * rank, rank, parameters_ + layout_.w2, rank, pre, hidden, false);
    Multiply(pre, slope, n * hidden);
    if (dropout_ != 0) Multiply(pre, mask, n * hidden);
    if (biased) AddColumnSums(pre, n, hidden, gradient + layout_.b1);
    Gemm(true, false, dim, hidden, n, rows.x + first * rows.stride, rows.stride, pre, hidden, gradient + layout_.w1,
         hidden, true);
  }
}

}  // namespace lesskv::train
