// lesskv train balance: the matrices behind which the codec `balanced` codes a model's keys.
//
// Texts go through the model with a full cache. Of each KV head of the global layers the covariance C_q of its queries
// and C_k of its keys, both behind RoPE, are averaged over the texts and over many positions at which they could stand: a
// text that begins later has both covariances rotated, and a matrix that is fitted to one place alone is useless at
// others. Keys count without the mean of their group of tokens, which the codes hold anyway. With L L' = C_q and
// L' C_k L = V S V' the matrix is B = L V S^(-1/4): keys times B and queries times its inverse, transposed, both have the
// diagonal covariance S^(1/2) (balanced truncation: Moore 1981).
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <vector>

#include "engine/engine.h"
#include "kvcache/residual/sidecar.h"
#include "tokenizer/tokenizer.h"

namespace lesskv::train {

struct TrainBalanceOptions {
  std::vector<std::string> texts;  // files
  size_t sequences = 16;           // texts of `tokens` tokens each; of four or more the last quarter is for measuring
  size_t tokens = 1024;
  size_t positions = 0;  // tokens of the longest context to be ready for; 0: those that the model was trained for
  uint64_t seed = 0;
};

struct TrainBalanceReport {
  SidecarBalance balance;
  // [bits 2, 3, 4][global layers]: the squared error of logits to expect, as a share of that of keys coded as they are with
  // as many bits, mean over the heads; on texts that were not trained on (where there are some).
  std::vector<std::vector<double>> error;
  double seconds = 0;
};

inline constexpr size_t kBalanceGroup = 64;  // tokens whose mean key the codes hold: the default of `balanced`

// sums [dim, dim] += k' k of keys [n, dim], rows `stride` apart, without the mean of each kBalanceGroup of them, by which n
// is divisible; exposed for tests.
void AddWithoutGroupMeans(const float* keys, size_t n, size_t dim, size_t stride, std::vector<double>& sums);

// B [dim, dim], row-major, of covariances of queries and keys [dim, dim]; exposed for tests. Its largest entry is 1.
std::vector<double> BalancingMatrix(size_t dim, std::span<const double> of_queries, std::span<const double> of_keys);

// progress(done). Throws Error for options that make no sense, models it does not fit and texts too short; `stop` set:
// Error kRuntime.
TrainBalanceReport TrainBalance(const Engine& engine, const Tokenizer& tokenizer, const TrainBalanceOptions& options,
                                const std::function<void(double done)>& progress, const std::atomic<bool>* stop = nullptr);

}  // namespace lesskv::train
