// NeuralDict (arXiv 2412.11741, section "Training"): a dictionary whose atoms some vectors are sparse sums of.
//
// The start is a k-means of directions: each vector goes to the atom that fits it best, either sign, and an atom becomes
// the direction of sum c x. Then epochs of mini-batches: codes by matching pursuit, supports and coefficients held fixed, one
// Adam step on
//
//   L = mean |x - W r(x)|^2 + beta |I - W^T W|_F^2 / N^2,   beta = clamp(0.1 L_MSE / L_div, 0, 1), not differentiated,
//
// without the gradient's part along each atom, the rate falling to 0 as a cosine; atoms are unit vectors after each step.
// Atoms that an epoch does not use become vectors that were coded badly. Vectors are scaled to a mean square length of 1.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <vector>

namespace lesskv::train {

struct AtomOptions {
  size_t dim = 0;
  size_t atoms = 1024;
  size_t pairs = 8;   // a vector
  size_t rounds = 8;  // of k-means
  size_t epochs = 8;
  size_t batch = 256;
  float rate = 2e-3f;
  float held_out = 0.1f;  // share of the vectors that only judges
  uint64_t seed = 0;
};

struct TrainedAtoms {
  std::vector<uint16_t> atoms;  // f16 [atoms, dim], the most used ones first
  // Mean |x - W r(x)|^2 over mean |x|^2 of the held-out vectors: after k-means, and at the end.
  double start = 0, error = 0;
  std::vector<double> losses;  // an epoch: of the training vectors, as they were coded
  double largest_beta = 0, smallest_beta = 1;
};

// vectors [n, dim], n at least the atoms and one held out. Serial, so that many can be trained side by side; the same seed
// gives the same atoms. Calls step() after each round and epoch; what it throws ends the training.
TrainedAtoms TrainAtoms(std::vector<float> vectors, const AtomOptions& options, const std::function<void()>& step);

// |I - W W^T|_F^2 / N^2 of W [n, dim] and its gradient [n, dim]; for tests.
double Diversity(const std::vector<float>& w, size_t dim, std::vector<float>& gradient);

}  // namespace lesskv::train
