#include "train/train_balance.h"

#include <Eigen/Eigenvalues>
#include <Eigen/LU>
#include <algorithm>
#include <array>
#include <chrono>
#include <cmath>
#include <numeric>

#include "base/error.h"
#include "base/threads.h"
#include "kernels/basic/rope.h"
#include "kernels/quants/half.h"
#include "kernels/rows/group_codes.h"
#include "kvcache/codec/kivi_store.h"
#include "kvcache/kv_cache.h"
#include "train/crop_source.h"
#include "train/full_layers.h"
#include "train/train_kernels.h"

namespace lesskv::train {
namespace {

using Matrix = Eigen::Matrix<double, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;

constexpr double kQueryNoise = 1e-2;   // added to the queries' covariance, of its mean: directions seldom asked for count too
constexpr double kLeastPower = 1e-6;   // of the largest

// Covariances of one KV head, sums of outer products.
struct Covariances {
  std::vector<double> queries, keys;
};
// Those of all heads of the global layers.
using HeadSums = std::vector<Covariances>;

// sums += x' x for x [n, d], rows `stride` apart.
void AddGram(const float* x, size_t n, size_t d, size_t stride, std::vector<double>& sums) {
  std::vector<float> gram(d * d);
  Gemm(true, false, d, d, n, x, stride, x, stride, gram.data(), d, false);
  std::transform(gram.begin(), gram.end(), sums.begin(), sums.begin(), [](float a, double b) { return a + b; });
}

}  // namespace

void AddWithoutGroupMeans(const float* keys, size_t n, size_t d, size_t stride, std::vector<double>& sums) {
  std::vector<float> x(n * d);
  for (size_t i = 0; i < n; ++i) std::copy_n(keys + i * stride, d, &x[i * d]);
  for (size_t first = 0; first < n; first += kBalanceGroup)
    for (size_t c = 0; c < d; ++c) {
      float mean = 0;
      for (size_t i = first; i < first + kBalanceGroup; ++i) mean += x[i * d + c] / kBalanceGroup;
      for (size_t i = first; i < first + kBalanceGroup; ++i) x[i * d + c] -= mean;
    }
  AddGram(x.data(), n, d, d, sums);
}

namespace {

// Attends in full, a layer at a time, and adds the layer's covariances.
class CovarianceCache final : public KvCache {
 public:
  CovarianceCache(const CacheShape& shape, size_t n_tokens, HeadSums& sums)
      : shape_(shape), n_tokens_(n_tokens), full_(shape, n_tokens), sums_(sums) {}

  void Append(size_t layer, const float* keys, const float* values) override {
    full_.Append(layer, keys, values);
    keys_.assign(keys, keys + n_tokens_ * shape_.layers[layer].kv_dim());
  }

  void Attend(size_t layer, const float* queries, float* out) override {
    full_.Attend(queries, out);
    if (shape_.layers[layer].window == 0) AddLayer(shape_.layers[layer], queries);
  }

 private:
  void AddLayer(const LayerShape& layer, const float* queries) {
    const size_t n = n_tokens_ / kBalanceGroup * kBalanceGroup, d = layer.head_dim;
    std::vector<float> q(queries, queries + n * layer.q_dim());
    std::vector<int32_t> positions(n);
    std::iota(positions.begin(), positions.end(), 0);
    RotateRows(*layer.rope, q.data(), n, layer.q_dim(), layer.n_heads, d, positions.data());
    RotateRows(*layer.rope, keys_.data(), n, layer.kv_dim(), layer.n_kv_heads, d, positions.data());
    ParallelFor(layer.n_kv_heads, [&](size_t h) {
      Covariances& sums = sums_[first_head_ + h];
      for (size_t head = h * layer.group(); head < (h + 1) * layer.group(); ++head)
        AddGram(&q[head * d], n, d, layer.q_dim(), sums.queries);
      AddWithoutGroupMeans(&keys_[h * d], n, d, layer.kv_dim(), sums.keys);
    });
    first_head_ += layer.n_kv_heads;
  }

  CacheShape shape_;
  size_t n_tokens_;
  FullLayers full_;
  HeadSums& sums_;
  size_t first_head_ = 0;
  std::vector<float> keys_;
};

// Where texts of n tokens may begin in a context: at its start, behind another such text, and at each 1.4 times as far.
std::vector<int32_t> Starts(size_t n, size_t context) {
  std::vector<int32_t> starts = {0};
  for (double at = static_cast<double>(n); at + static_cast<double>(n) <= static_cast<double>(context); at *= std::sqrt(2.0))
    starts.push_back(static_cast<int32_t>(at));
  return starts;
}

// The mean of a covariance of vectors that are rotated to each of the positions: R C R'.
std::vector<double> OverPositions(const LayerShape& layer, const std::vector<double>& covariance,
                                  const std::vector<int32_t>& positions) {
  const size_t d = layer.head_dim;
  std::vector<double> mean(d * d);
  for (const int32_t position : positions) {
    const std::vector<int32_t> at(d, position);
    std::vector<float> rotated(covariance.begin(), covariance.end()), transposed(d * d);
    for (int side = 0; side < 2; ++side) {
      RotateRows(*layer.rope, rotated.data(), d, d, 1, d, at.data());
      for (size_t i = 0; i < d; ++i)
        for (size_t j = 0; j < d; ++j) transposed[j * d + i] = rotated[i * d + j];
      rotated = transposed;
    }
    for (size_t i = 0; i < d * d; ++i) mean[i] += rotated[i] / static_cast<double>(positions.size());
  }
  return mean;
}

Eigen::Map<const Matrix> Square(std::span<const double> x, size_t d) {
  return {x.data(), static_cast<Eigen::Index>(d), static_cast<Eigen::Index>(d)};
}

// The error of a code of so many bits, relative to the variance: extremes of 64 normal numbers are 4.8 deviations apart.
double CodeError(size_t bits) {
  return bits == 0 ? 1 : std::pow(4.8 / (std::pow(2, static_cast<double>(bits)) - 1), 2) / 12;
}

// The expected squared error of logits of keys coded behind B, relative to that of keys as they are. A Hadamard transform
// in each part gives its channels one power.
double ExpectedError(size_t d, size_t bits, const Matrix& b, const Matrix& of_queries, const Matrix& of_keys) {
  const Matrix inverse = b.inverse();
  const Eigen::VectorXd keys = (b.transpose() * of_keys * b).diagonal(), queries = (inverse * of_queries * inverse.transpose()).diagonal();
  double error = 0;
  Eigen::Index first = 0;
  for (const GroupFormat& part : BalancedParts(bits, kBalanceGroup, d)) {
    const auto n = static_cast<Eigen::Index>(part.head_dim);
    error += CodeError(part.bits) * keys.segment(first, n).sum() * queries.segment(first, n).sum() / static_cast<double>(n);
    first += n;
  }
  return error / (CodeError(bits) * of_keys.diagonal().dot(of_queries.diagonal()));
}

void Validate(const TrainBalanceOptions& o) {
  const auto require = [](bool ok, const char* what) {
    if (!ok) Fail(ErrorCode::kInvalidArgument, "train balance: {}", what);
  };
  require(o.sequences >= 1, "--sequences must be at least 1");
  require(o.tokens >= 2 * kBalanceGroup, "--tokens must be at least 128");
  require(o.positions == 0 || o.positions >= o.tokens, "--positions must be at least --tokens");
}

// The global layers, which must have heads of one size.
std::vector<LayerShape> GlobalLayers(const CacheShape& shape) {
  std::vector<LayerShape> layers;
  for (const LayerShape& layer : shape.layers)
    if (layer.window == 0) layers.push_back(layer);
  if (layers.empty()) Fail(ErrorCode::kInvalidArgument, "train balance: the model has no global layers");
  for (const LayerShape& layer : layers)
    if (layer.head_dim != layers[0].head_dim)
      Fail(ErrorCode::kInvalidArgument, "train balance: the model has heads of {} and of {}", layers[0].head_dim, layer.head_dim);
  if (layers[0].head_dim > kMostGroupedChannels || layers[0].head_dim % kGroupedChannels != 0)
    Fail(ErrorCode::kInvalidArgument, "train balance: heads must have a size that is a multiple of {}, at most {}, the model's have {}",
         kGroupedChannels, kMostGroupedChannels, layers[0].head_dim);
  return layers;
}

HeadSums NoSums(const std::vector<LayerShape>& layers) {
  HeadSums sums;
  for (const LayerShape& layer : layers)
    for (size_t h = 0; h < layer.n_kv_heads; ++h)
      sums.push_back({std::vector<double>(layer.head_dim * layer.head_dim), std::vector<double>(layer.head_dim * layer.head_dim)});
  return sums;
}

}  // namespace

std::vector<double> BalancingMatrix(size_t d, std::span<const double> of_queries, std::span<const double> of_keys) {
  Matrix queries = Square(of_queries, d);
  const double trace = queries.trace();
  queries.diagonal().array() += trace > 0 ? kQueryNoise * trace / static_cast<double>(d) : 1.0;
  const Matrix lower = queries.llt().matrixL();
  const Eigen::SelfAdjointEigenSolver<Matrix> solver(lower.transpose() * Square(of_keys, d) * lower);
  const Eigen::VectorXd power = solver.eigenvalues().reverse();
  const double largest = power[0] > 0 ? power[0] : 1;
  Matrix b = lower * solver.eigenvectors().rowwise().reverse() *
             power.cwiseMax(kLeastPower * largest).array().pow(-0.25).matrix().asDiagonal();
  b /= b.cwiseAbs().maxCoeff();
  return {b.data(), b.data() + b.size()};
}

namespace {

// The matrices of all heads, and what to expect of them.
TrainBalanceReport Fit(const std::vector<LayerShape>& layers, const HeadSums& learned, const HeadSums& measured,
                       const std::vector<int32_t>& starts) {
  const size_t d = layers[0].head_dim;
  TrainBalanceReport report;
  report.balance.head_dim = d;
  report.balance.keys.resize(learned.size() * d * d);
  report.error.assign(3, std::vector<double>(layers.size()));
  std::vector<size_t> layer_of;
  for (size_t l = 0; l < layers.size(); ++l) {
    report.balance.n_kv_heads.push_back(layers[l].n_kv_heads);
    layer_of.insert(layer_of.end(), layers[l].n_kv_heads, l);
  }
  std::vector<std::array<double, 3>> errors(learned.size());
  ParallelFor(learned.size(), [&](size_t head) {
    const auto spread = [&](const std::vector<double>& sums) { return OverPositions(layers[layer_of[head]], sums, starts); };
    const std::vector<double> b = BalancingMatrix(d, spread(learned[head].queries), spread(learned[head].keys));
    std::vector<double> stored(d * d);
    for (size_t i = 0; i < d * d; ++i) {
      const uint16_t half = FloatToHalf(static_cast<float>(b[i]));
      report.balance.keys[head * d * d + i] = half;
      stored[i] = HalfToFloat(half);
    }
    const std::vector<double> queries = spread(measured[head].queries), keys = spread(measured[head].keys);
    for (const size_t bits : {2, 3, 4})
      errors[head][bits - 2] = ExpectedError(d, bits, Square(stored, d), Square(queries, d), Square(keys, d));
  });
  for (size_t head = 0; head < learned.size(); ++head)
    for (size_t i = 0; i < 3; ++i)
      report.error[i][layer_of[head]] += errors[head][i] / static_cast<double>(layers[layer_of[head]].n_kv_heads);
  return report;
}

}  // namespace

TrainBalanceReport TrainBalance(const Engine& engine, const Tokenizer& tokenizer, const TrainBalanceOptions& options,
                                const std::function<void(double done)>& progress, const std::atomic<bool>* stop) {
  Validate(options);
  const auto start = std::chrono::steady_clock::now();
  const CropSource crops(tokenizer, options.texts);
  const ThreadScope threads(engine.threads());
  const Model& model = engine.model();
  const size_t context = options.positions > 0 ? options.positions : std::max(model.config().train_ctx, options.tokens);
  CacheShape shape = model.MakeCacheShape(context, engine.compute());
  shape.compute = ComputeType::kF32;
  const std::vector<LayerShape> layers = GlobalLayers(shape);
  const size_t n_learned = options.sequences - options.sequences / 4;
  HeadSums learned = NoSums(layers), measured = NoSums(layers);
  for (size_t s = 0; s < options.sequences; ++s) {
    if (stop != nullptr && *stop) Fail(ErrorCode::kRuntime, "stopped");
    const std::vector<int32_t> text = crops.Crop(MixSeed(options.seed, s), options.tokens);
    ForwardWorkspace workspace;
    workspace.Reserve(model.config(), text.size());
    CovarianceCache cache(shape, text.size(), s < n_learned ? learned : measured);
    Forward(model, text, cache, engine.compute(), workspace);
    progress(static_cast<double>(s + 1) / static_cast<double>(options.sequences));
  }
  if (n_learned == options.sequences) measured = learned;

  TrainBalanceReport report = Fit(layers, learned, measured, Starts(options.tokens, context));
  report.balance.tokens = n_learned * options.tokens;
  report.balance.positions = context;
  report.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  return report;
}

}  // namespace lesskv::train
