#include "train/train_atoms.h"

#include <algorithm>
#include <cmath>
#include <numbers>
#include <numeric>
#include <span>

#include "base/check.h"
#include "base/rng.h"
#include "kernels/basic/basic.h"
#include "kernels/rows/atom_codes.h"
#include "train/train_kernels.h"

namespace lesskv::train {
namespace {

constexpr size_t kGramRows = 256;  // of W W^T at a time

double SquareLength(const float* x, size_t n) { return Dot(x, x, n); }

// x / |x|; false for a vector without direction.
bool Normalise(float* x, size_t dim) {
  const double length = std::sqrt(SquareLength(x, dim));
  if (!(length > 1e-12)) return false;
  Scale(x, static_cast<float>(1 / length), dim);
  return true;
}

class AtomTrainer {
 public:
  AtomTrainer(std::vector<float> vectors, const AtomOptions& options) : o_(options), rng_(options.seed) {
    const size_t n = vectors.size() / o_.dim;
    Shuffle(vectors, n);
    const double mean = SquareLength(vectors.data(), vectors.size()) / static_cast<double>(n);
    Scale(vectors.data(), static_cast<float>(1 / std::sqrt(std::max(mean, 1e-30))), vectors.size());
    n_held_ = std::max<size_t>(1, static_cast<size_t>(o_.held_out * static_cast<float>(n)));
    CHECK(n >= o_.atoms + n_held_, "{} vectors for {} atoms", n, o_.atoms);
    n_ = n - n_held_;
    held_.assign(vectors.begin() + static_cast<ptrdiff_t>(n_ * o_.dim), vectors.end());
    vectors.resize(n_ * o_.dim);
    x_ = std::move(vectors);
    w_.assign(x_.begin(), x_.begin() + static_cast<ptrdiff_t>(o_.atoms * o_.dim));
    for (size_t i = 0; i < o_.atoms; ++i)
      if (!Normalise(&w_[i * o_.dim], o_.dim)) w_[i * o_.dim] = 1;
    m_.resize(w_.size());
    v_.resize(w_.size());
    Round();
  }

  TrainedAtoms Run(const std::function<void()>& step) {
    TrainedAtoms result;
    for (size_t round = 0; round < o_.rounds; ++round) KMeans(), step();
    result.start = HeldError();
    const size_t n_steps = o_.epochs * ((n_ + o_.batch - 1) / o_.batch);
    for (size_t epoch = 0; epoch < o_.epochs; ++epoch) {
      result.losses.push_back(Epoch(n_steps, result));
      step();
    }
    SortByUse();
    result.error = HeldError();
    result.atoms = rows_;
    return result;
  }

 private:
  struct Codes {
    std::vector<uint16_t> indices, coefficients;
    std::vector<float> floats, residuals;
  };

  void Shuffle(std::vector<float>& vectors, size_t n) {
    for (size_t i = n; i > 1; --i) {
      const size_t j = rng_.Below(i);
      if (j != i - 1)
        std::swap_ranges(vectors.begin() + static_cast<ptrdiff_t>(j * o_.dim),
                         vectors.begin() + static_cast<ptrdiff_t>((j + 1) * o_.dim),
                         vectors.begin() + static_cast<ptrdiff_t>((i - 1) * o_.dim));
    }
  }

  // Codes are those of the atoms as they are stored.
  void Round() {
    rows_.resize(w_.size());
    F32ToF16(w_.data(), w_.size(), rows_.data());
    lanes_ = AtomLanes(rows_, o_.dim);
  }
  Atoms View() const { return {o_.dim, {rows_.data(), lanes_.data(), o_.atoms}, {}}; }

  void Encode(const float* x, size_t n, size_t pairs, Codes& codes) const {
    codes.indices.resize(n * pairs), codes.coefficients.resize(n * pairs), codes.floats.resize(n * pairs);
    codes.residuals.resize(n);
    EncodeAtoms(View(), pairs, x, n, o_.dim, codes.indices.data(), codes.coefficients.data(), codes.residuals.data());
    F16ToF32(codes.coefficients.data(), n * pairs, codes.floats.data());
  }

  double HeldError() const {
    Codes codes;
    Encode(held_.data(), n_held_, o_.pairs, codes);
    double error = 0, power = 0;
    for (size_t i = 0; i < n_held_; ++i) {
      const double square = SquareLength(&held_[i * o_.dim], o_.dim);
      error += square * codes.residuals[i] * codes.residuals[i], power += square;
    }
    return error / std::max(power, 1e-30);
  }

  // Atoms that nothing used become the vectors with the longest residuals, worst first.
  void Replace(const std::vector<size_t>& uses, const std::vector<float>& residuals) {
    std::vector<size_t> order(n_);
    std::iota(order.begin(), order.end(), size_t{0});
    const size_t n_unused = static_cast<size_t>(std::count(uses.begin(), uses.end(), size_t{0}));
    const auto end = order.begin() + static_cast<ptrdiff_t>(std::min(n_unused, n_));
    std::partial_sort(order.begin(), end, order.end(), [&](size_t a, size_t b) {
      return residuals[a] != residuals[b] ? residuals[a] > residuals[b] : a < b;
    });
    auto next = order.begin();
    for (size_t i = 0; i < o_.atoms && next != end; ++i) {
      if (uses[i] > 0) continue;
      const size_t at = i * o_.dim;
      std::copy_n(&x_[*next++ * o_.dim], o_.dim, &w_[at]);
      if (!Normalise(&w_[at], o_.dim)) std::copy_n(&x_[0], o_.dim, &w_[at]), Normalise(&w_[at], o_.dim);
      std::fill_n(&m_[at], o_.dim, 0.0f);
      std::fill_n(&v_[at], o_.dim, 0.0f);
    }
  }

  void KMeans() {
    Codes codes;
    Encode(x_.data(), n_, 1, codes);
    std::vector<float> sums(w_.size());
    std::vector<size_t> uses(o_.atoms);
    for (size_t i = 0; i < n_; ++i) {
      codes.residuals[i] *= static_cast<float>(std::sqrt(SquareLength(&x_[i * o_.dim], o_.dim)));
      ++uses[codes.indices[i]];
      Axpy(&sums[codes.indices[i] * o_.dim], codes.floats[i], &x_[i * o_.dim], o_.dim);
    }
    for (size_t i = 0; i < o_.atoms; ++i)
      if (Normalise(&sums[i * o_.dim], o_.dim)) std::copy_n(&sums[i * o_.dim], o_.dim, &w_[i * o_.dim]);
    Replace(uses, codes.residuals);
    Round();
  }

  double Epoch(size_t n_steps, TrainedAtoms& result) {
    std::vector<size_t> uses(o_.atoms), order(n_);
    std::iota(order.begin(), order.end(), size_t{0});
    rng_.Shuffle(order);
    std::vector<float> residuals(n_);
    double loss = 0;
    for (size_t first = 0; first < n_; first += o_.batch)
      loss += Step(std::span(order).subspan(first, std::min(o_.batch, n_ - first)), n_steps, uses, residuals, result);
    Replace(uses, residuals);
    Round();
    return loss / static_cast<double>(n_);
  }

  // One batch; the sum of its squared residuals.
  double Step(std::span<const size_t> batch, size_t n_steps, std::vector<size_t>& uses, std::vector<float>& residuals,
              TrainedAtoms& result) {
    const size_t n = batch.size(), dim = o_.dim;
    std::vector<float> x(n * dim), sums(n * dim), gradient(w_.size()), diverse;
    for (size_t i = 0; i < n; ++i) std::copy_n(&x_[batch[i] * dim], dim, &x[i * dim]);
    Codes codes;
    Encode(x.data(), n, o_.pairs, codes);
    DecodeAtoms(View(), o_.pairs, codes.indices.data(), codes.coefficients.data(), n, sums.data(), dim);
    double loss = 0;
    for (size_t i = 0; i < n; ++i) {
      float* rest = &x[i * dim];
      Axpy(rest, -1.0f, &sums[i * dim], dim);
      const double square = SquareLength(rest, dim);
      residuals[batch[i]] = static_cast<float>(std::sqrt(square));
      loss += square;
      for (size_t g = i * o_.pairs; g < (i + 1) * o_.pairs; ++g) {
        if (codes.floats[g] == 0) continue;
        ++uses[codes.indices[g]];
        Axpy(&gradient[codes.indices[g] * dim], -2 * codes.floats[g] / static_cast<float>(n), rest, dim);
      }
    }
    const double diversity = Diversity(w_, dim, diverse);
    const double beta = std::clamp(0.1 * loss / static_cast<double>(n) / std::max(diversity, 1e-30), 0.0, 1.0);
    result.largest_beta = std::max(result.largest_beta, beta);
    result.smallest_beta = std::min(result.smallest_beta, beta);
    Axpy(gradient.data(), static_cast<float>(beta), diverse.data(), gradient.size());
    Descend(gradient, n_steps);
    return loss;
  }

  void Descend(std::vector<float>& gradient, size_t n_steps) {
    const size_t dim = o_.dim;
    for (size_t at = 0; at < w_.size(); at += dim)
      Axpy(&gradient[at], -Dot(&gradient[at], &w_[at], dim), &w_[at], dim);
    constexpr double kBeta1 = 0.9, kBeta2 = 0.999;
    const double t = static_cast<double>(++steps_);
    const double rate = o_.rate * 0.5 * (1 + std::cos(std::numbers::pi * (t - 1) / static_cast<double>(n_steps)));
    const double correction1 = 1 - std::pow(kBeta1, t), correction2 = std::sqrt(1 - std::pow(kBeta2, t));
    const AdamStep step{static_cast<float>(rate * correction2 / correction1), static_cast<float>(kBeta1),
                        static_cast<float>(kBeta2), static_cast<float>(1e-8 * correction2)};
    Adam(step, gradient.data(), w_.size(), w_.data(), m_.data(), v_.data());
    for (size_t at = 0; at < w_.size(); at += dim) Normalise(&w_[at], dim);
    Round();
  }

  void SortByUse() {
    Codes codes;
    Encode(x_.data(), n_, o_.pairs, codes);
    std::vector<size_t> uses(o_.atoms), order(o_.atoms);
    for (size_t g = 0; g < codes.indices.size(); ++g)
      if (codes.floats[g] != 0) ++uses[codes.indices[g]];
    std::iota(order.begin(), order.end(), size_t{0});
    std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return uses[a] > uses[b]; });
    std::vector<float> sorted;
    for (const size_t i : order)
      sorted.insert(sorted.end(), w_.begin() + static_cast<ptrdiff_t>(i * o_.dim), w_.begin() + static_cast<ptrdiff_t>((i + 1) * o_.dim));
    w_ = std::move(sorted);
    Round();
  }

  AtomOptions o_;
  Rng rng_;
  size_t n_ = 0, n_held_ = 0, steps_ = 0;
  std::vector<float> x_, held_;           // [n, dim]
  std::vector<float> w_, m_, v_;          // [atoms, dim]: atoms, Adam's moments
  std::vector<uint16_t> rows_, lanes_;    // atoms as stored
};

}  // namespace

double Diversity(const std::vector<float>& w, size_t dim, std::vector<float>& gradient) {
  const size_t n = w.size() / dim;
  gradient.resize(w.size());
  std::vector<float> gram(std::min(kGramRows, n) * n);
  double sum = 0;
  for (size_t first = 0; first < n; first += kGramRows) {
    const size_t rows = std::min(kGramRows, n - first);
    Gemm(false, true, rows, n, dim, &w[first * dim], dim, w.data(), dim, gram.data(), n, false);
    for (size_t i = 0; i < rows; ++i) gram[i * n + first + i] -= 1;
    for (size_t i = 0; i < rows; ++i) sum += SquareLength(&gram[i * n], n);
    Gemm(false, false, rows, dim, n, gram.data(), n, w.data(), dim, &gradient[first * dim], dim, false);
  }
  const double square = static_cast<double>(n) * static_cast<double>(n);
  Scale(gradient.data(), static_cast<float>(4 / square), gradient.size());
  return sum / square;
}

TrainedAtoms TrainAtoms(std::vector<float> vectors, const AtomOptions& options, const std::function<void()>& step) {
  return AtomTrainer(std::move(vectors), options).Run(step);
}

}  // namespace lesskv::train
