// The selectors and LESS from their papers, slow and in double precision, by position and without slots: what the cache
// is compared with. Written from the methods' descriptions, not from the cache.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

#include "cache_harness.h"

namespace lesskv::testing_support {

enum class Policy { kFull, kWindow, kH2o, kTova, kSnapkv };

struct OracleOptions {
  Policy policy = Policy::kFull;
  size_t rows = 0;
  size_t sinks = 0;   // window
  size_t recent = 0;  // h2o
  size_t window = 0;  // snapkv
  size_t kernel = 7;  // snapkv
  bool average = false;
  bool cache_positions = false;
  double pyramid_beta = 0;  // 0: uniform
  std::vector<std::pair<int32_t, int32_t>> protect = {};
  const Sidecar* less = nullptr;
};

// PyramidKV's shares, straight from its formula: w + max - l (max - min) / (L - 1), rounded by largest remainders.
std::vector<size_t> OraclePyramid(size_t n_layers, size_t rows, size_t window, double beta, size_t n);

class OracleCache {
 public:
  OracleCache(const TinyShape& shape, const OracleOptions& options);

  // Attends and evicts one step of `n` tokens; outputs [n_layers][n, n_heads, head_dim].
  std::vector<std::vector<double>> Step(const Text& text, size_t n, StepKind kind);

  const std::vector<int32_t>& Kept(size_t layer, size_t kv_head) const { return At(layer, kv_head).kept; }
  // Whether the last step's choice hung on a difference that single precision cannot see.
  bool Ambiguous(size_t layer, size_t kv_head) const { return At(layer, kv_head).ambiguous; }
  // Takes over another choice of an ambiguous step.
  void Adopt(size_t layer, size_t kv_head, std::vector<int32_t> kept);

 private:
  struct Head {
    std::vector<int32_t> kept;       // ascending
    std::vector<double> score;       // by position
    std::vector<double> h, z;        // residual state
    std::vector<int32_t> just_left;  // not yet absorbed: the choice may still be adopted
    bool ambiguous = false;
  };
  struct Observed {
    std::vector<int32_t> positions;        // rows seen in the step: kept ones, then the step's
    std::vector<double> all, voted, last;  // attention received, summed over the group
  };
  Head& At(size_t layer, size_t h) { return heads_[layer * shape_.n_kv_heads + h]; }
  const Head& At(size_t layer, size_t h) const { return heads_[layer * shape_.n_kv_heads + h]; }

  Observed Attend(const Text& text, size_t layer, size_t h, size_t n, StepKind kind, std::vector<double>& out);
  void Absorb(const Text& text, size_t layer, size_t h);
  bool Protected(int32_t position) const;
  void Select(size_t layer, std::vector<Observed>& observed, StepKind kind, size_t n);
  void Keep(Head& head, const Observed& rows, size_t budget, const std::vector<char>& always,
            const std::vector<double>& value);

  TinyShape shape_;
  OracleOptions options_;
  std::vector<Head> heads_;
  std::vector<size_t> budgets_;  // a layer
  size_t seen_ = 0;
};

}  // namespace lesskv::testing_support
