// Loss and gradients of one layer's LESS feature maps (Dong et al., arXiv 2402.09398, section 4.1), without ever
// forming a T x T matrix.
//
// What is exact does not depend on the maps and comes with the example: the output and log-mass of the resident pairs
// for every query, and when each token leaves. Training then is a scan along the text: the state H, z changes only
// where tokens leave, a query reads it in O(rank head_dim), and the backward scan carries dH, dz from the end.
//
//   a_t = (e^lse o_t + phi_t H) / (e^lse + phi_t z)          H, z: sums over tokens with leave <= t
//   loss = mean over scored t and channels of ((a_t - target_t) W_o)^2
//
// The output projection enters only through W_o^T W_o, so that the loss costs one product of q_dim x q_dim.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "kvcache/residual/sidecar.h"

namespace lesskv::train {

// One text in one layer under one policy. Row-major; queries and keys rotated.
struct LessExample {
  size_t n_tokens = 0;
  size_t first_scored = 0;             // queries before it have no loss: nothing has left yet
  std::vector<float> q;                // [n_tokens, n_heads, head_dim]
  std::vector<float> k, v;             // [n_tokens, n_kv_heads, head_dim]
  std::vector<float> target;           // [n_tokens, n_heads, head_dim]: output of full attention
  std::vector<float> exact_out;        // [n_tokens, n_heads, head_dim]: output over resident pairs
  std::vector<float> exact_lse;        // [n_tokens, n_heads]
  std::vector<int32_t> leave;          // [n_kv_heads, n_tokens]: first query that no longer sees it; n_tokens: none
};

// Where the parameters of one head's net lie in its slice of the flat parameter vector.
struct NetLayout {
  NetLayout(const SidecarShape& shape, bool is_psi);
  size_t w1 = 0, w2, b1, b2, d, d2, x, total;
};

struct DropoutOptions {
  float rate = 0;  // of first pre-activations, before GELU, in both nets
  uint64_t seed = 0;
};

class LessLayer {
 public:
  // metric [q_dim, q_dim] = W_o^T W_o / d_model.
  LessLayer(const SidecarShape& shape, const LayerParams& initial, std::vector<float> metric);

  // Flat: n_heads phi nets, then n_kv_heads psi nets, each in NetLayout order.
  std::vector<float>& parameters() { return parameters_; }
  const std::vector<float>& parameters() const { return parameters_; }
  void Import(const LayerParams& params);
  LayerParams Export() const;

  // The mean loss over all scored positions of the batch, and its gradient (overwritten, [parameters().size()]).
  // The same bits whatever the number of threads.
  double LossAndGradient(std::span<const LessExample* const> batch, const DropoutOptions& dropout,
                         std::vector<float>& gradient) const;

  // Sum of the loss over scored positions (not the mean), without dropout. `scored` receives their number.
  double LossSum(std::span<const LessExample* const> batch, size_t* scored) const;

  // The same measure for any given attention output [n_tokens, q_dim], such as a bare selector's.
  double OutputLossSum(const LessExample& example, const float* output) const;

  // Attention output of the layer with the present parameters, [n_tokens, n_heads, head_dim]; rows before
  // first_scored are the exact part's.
  std::vector<float> Output(const LessExample& example) const;

 private:
  struct HeadWork;
  struct SequenceWork;
  struct ReadGradients;

  size_t group() const { return shape_.n_heads / shape_.n_kv_heads; }
  const float* Phi(size_t head) const { return parameters_.data() + head * phi_.total; }
  size_t PsiOffset(size_t kv_head) const { return shape_.n_heads * phi_.total + kv_head * psi_.total; }

  void ForwardHead(const LessExample& e, size_t sequence, size_t kv_head, const DropoutOptions& dropout,
                   HeadWork& work, float* output) const;
  void BackwardHead(const LessExample& e, size_t sequence, size_t kv_head, const DropoutOptions& dropout,
                    HeadWork& work, const float* output, const float* d_output, float* gradient) const;
  void BackwardReads(const LessExample& e, size_t kv_head, const HeadWork& work, const float* output,
                     const float* d_output, ReadGradients& d) const;
  std::vector<float> BackwardState(const LessExample& e, size_t kv_head, const HeadWork& work,
                                   const ReadGradients& d) const;
  std::vector<SequenceWork> Forward(std::span<const LessExample* const> batch, const DropoutOptions& dropout) const;
  // diff = (output - target) of scored rows; d = diff metric. Returns sum of diff . d.
  double ProjectedError(const LessExample& e, const float* output, std::vector<float>& d) const;

  SidecarShape shape_;
  NetLayout phi_, psi_;
  std::vector<float> parameters_;
  std::vector<float> metric_;
};

}  // namespace lesskv::train
