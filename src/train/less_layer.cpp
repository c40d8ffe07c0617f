#include "train/less_layer.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "base/check.h"
#include "base/threads.h"
#include "kvcache/residual/feature_kernels.h"
#include "train/feature_net.h"
#include "train/train_kernels.h"

namespace lesskv::train {

NetLayout::NetLayout(const SidecarShape& s, bool is_psi) {
  const bool is_exp = s.kind == FeatureKind::kExp;
  w2 = w1 + s.head_dim * s.hidden;
  b1 = w2 + s.hidden * s.rank;
  b2 = b1 + (is_exp ? s.hidden : 0);
  d = b2 + (is_exp ? s.rank : 0);
  const bool has_third = !is_exp && is_psi;
  d2 = d + (has_third ? s.rank : 0);
  x = d2 + (has_third ? s.rank : 0);
  total = x + (has_third ? s.rank * s.rank : 0);
}

// What the forward pass of one KV head leaves for the backward pass.
struct LessLayer::HeadWork {
  std::vector<int32_t> order;          // evicted tokens by (leave, position)
  std::vector<float> keys;             // [n_evicted, head_dim], in that order
  std::vector<float> psi_p2, psi;      // [n_evicted, rank]
  std::vector<std::vector<float>> phi_p2, phi;  // a query head: [n_scored, rank]
};

struct LessLayer::SequenceWork {
  std::vector<HeadWork> heads;
  std::vector<float> output;  // [n_tokens, n_heads, head_dim]
};

namespace {

// Weights of the state's sums in the common denominator, see the header. All zero while nothing was absorbed.
struct Mix {
  float exact, state;  // a = exact * o + state * N, exact + state * L = 1
  Mix(float lse, float mass) {
    if (!(mass > 0)) {
      exact = 1;
      state = 0;
      return;
    }
    const float log_mass = std::log(mass), top = std::max(lse, log_mass);
    const float e = std::exp(lse - top), s = std::exp(log_mass - top);
    exact = e / (e + s);
    state = s / (e + s) / mass;
  }
};

uint64_t Stream(size_t sequence, size_t net) { return (sequence * 4096 + net + 1) * 0xbf58476d1ce4e5b9ull; }

}  // namespace

LessLayer::LessLayer(const SidecarShape& shape, const LayerParams& initial, std::vector<float> metric)
    : shape_(shape), phi_(shape, false), psi_(shape, true), metric_(std::move(metric)) {
  const size_t q_dim = shape.n_heads * shape.head_dim;
  CHECK(metric_.size() == q_dim * q_dim, "metric of {} numbers for {} x {}", metric_.size(), q_dim, q_dim);
  parameters_.resize(shape.n_heads * phi_.total + shape.n_kv_heads * psi_.total);
  Import(initial);
}

void LessLayer::Import(const LayerParams& p) {
  auto put = [](const std::vector<float>& from, size_t head, size_t size, float* to) {
    if (!from.empty()) std::copy_n(from.data() + head * size, size, to);
  };
  for (size_t i = 0; i < shape_.n_heads + shape_.n_kv_heads; ++i) {
    const bool is_psi = i >= shape_.n_heads;
    const size_t head = is_psi ? i - shape_.n_heads : i;
    const NetParams& net = is_psi ? p.psi : p.phi;
    const NetLayout& at = is_psi ? psi_ : phi_;
    float* to = parameters_.data() + (is_psi ? PsiOffset(head) : head * phi_.total);
    put(net.w1, head, shape_.head_dim * shape_.hidden, to + at.w1);
    put(net.w2, head, shape_.hidden * shape_.rank, to + at.w2);
    put(net.b1, head, shape_.hidden, to + at.b1);
    put(net.b2, head, shape_.rank, to + at.b2);
    if (!is_psi) continue;
    put(p.d, head, shape_.rank, to + at.d);
    put(p.d2, head, shape_.rank, to + at.d2);
    put(p.x, head, shape_.rank * shape_.rank, to + at.x);
  }
}

LayerParams LessLayer::Export() const {
  LayerParams p;
  auto take = [](const float* from, size_t size, std::vector<float>& to) { to.insert(to.end(), from, from + size); };
  const bool is_exp = shape_.kind == FeatureKind::kExp;
  for (size_t i = 0; i < shape_.n_heads + shape_.n_kv_heads; ++i) {
    const bool is_psi = i >= shape_.n_heads;
    const size_t head = is_psi ? i - shape_.n_heads : i;
    NetParams& net = is_psi ? p.psi : p.phi;
    const NetLayout& at = is_psi ? psi_ : phi_;
    const float* from = parameters_.data() + (is_psi ? PsiOffset(head) : head * phi_.total);
    take(from + at.w1, shape_.head_dim * shape_.hidden, net.w1);
    take(from + at.w2, shape_.hidden * shape_.rank, net.w2);
    if (is_exp) take(from + at.b1, shape_.hidden, net.b1);
    if (is_exp) take(from + at.b2, shape_.rank, net.b2);
    if (!is_psi || is_exp) continue;
    take(from + at.d, shape_.rank, p.d);
    take(from + at.d2, shape_.rank, p.d2);
    take(from + at.x, shape_.rank * shape_.rank, p.x);
  }
  return p;
}

// -------------------------------------------------------------------------------------------------------- forward

void LessLayer::ForwardHead(const LessExample& e, size_t sequence, size_t h, const DropoutOptions& dropout,
                            HeadWork& work, float* output) const {
  const size_t dim = shape_.head_dim, rank = shape_.rank, n_scored = e.n_tokens - e.first_scored;
  const int32_t* leave = e.leave.data() + h * e.n_tokens;
  work.order.clear();
  for (size_t j = 0; j < e.n_tokens; ++j)
    if (leave[j] < static_cast<int32_t>(e.n_tokens)) work.order.push_back(static_cast<int32_t>(j));
  std::stable_sort(work.order.begin(), work.order.end(), [&](int32_t a, int32_t b) { return leave[a] < leave[b]; });
  const size_t n_evicted = work.order.size();
  work.keys.resize(n_evicted * dim);
  for (size_t i = 0; i < n_evicted; ++i)
    std::copy_n(&e.k[(static_cast<size_t>(work.order[i]) * shape_.n_kv_heads + h) * dim], dim, &work.keys[i * dim]);
  work.psi_p2.resize(n_evicted * rank);
  work.psi.resize(n_evicted * rank);
  FeatureNet(shape_, psi_, true, parameters_.data() + PsiOffset(h), dropout, Stream(sequence, shape_.n_heads + h))
      .Forward({work.keys.data(), dim, n_evicted}, work.psi_p2.data(), work.psi.data());
  work.phi_p2.resize(group());
  work.phi.resize(group());
  for (size_t g = 0; g < group(); ++g) {
    const size_t head = h * group() + g;
    work.phi_p2[g].resize(n_scored * rank);
    work.phi[g].resize(n_scored * rank);
    const Rows rows = {e.q.data() + (e.first_scored * shape_.n_heads + head) * dim, shape_.n_heads * dim, n_scored};
    FeatureNet(shape_, phi_, false, Phi(head), dropout, Stream(sequence, head))
        .Forward(rows, work.phi_p2[g].data(), work.phi[g].data());
  }
  const internal::LessKernels& kernels = internal::ActiveLessKernels();
  std::vector<float> state(rank * dim), z(rank), sums(dim);
  size_t next = 0;
  for (size_t t = e.first_scored; t < e.n_tokens; ++t) {
    for (; next < n_evicted && leave[work.order[next]] <= static_cast<int32_t>(t); ++next) {
      const size_t token = static_cast<size_t>(work.order[next]);
      kernels.absorb(&work.psi[next * rank], &e.v[(token * shape_.n_kv_heads + h) * dim], 1, rank, dim, state.data(),
                     z.data());
    }
    for (size_t g = 0; g < group(); ++g) {
      const size_t row = t * shape_.n_heads + h * group() + g;
      const float* phi = &work.phi[g][(t - e.first_scored) * rank];
      const float mass = kernels.read(phi, state.data(), z.data(), rank, dim, sums.data());
      const Mix mix(e.exact_lse[row], mass);
      for (size_t d = 0; d < dim; ++d)
        output[row * dim + d] = mix.exact * e.exact_out[row * dim + d] + mix.state * sums[d];
    }
  }
}

std::vector<LessLayer::SequenceWork> LessLayer::Forward(std::span<const LessExample* const> batch,
                                                        const DropoutOptions& dropout) const {
  std::vector<SequenceWork> work(batch.size());
  for (size_t i = 0; i < batch.size(); ++i) {
    work[i].heads.resize(shape_.n_kv_heads);
    work[i].output = batch[i]->exact_out;
  }
  ParallelFor(batch.size() * shape_.n_kv_heads, [&](size_t task) {
    const size_t i = task / shape_.n_kv_heads, h = task % shape_.n_kv_heads;
    ForwardHead(*batch[i], i, h, dropout, work[i].heads[h], work[i].output.data());
  });
  return work;
}

double LessLayer::ProjectedError(const LessExample& e, const float* output, std::vector<float>& d) const {
  const size_t q_dim = shape_.n_heads * shape_.head_dim, n = e.n_tokens - e.first_scored;
  std::vector<float> difference(n * q_dim);
  const size_t offset = e.first_scored * q_dim;
  for (size_t i = 0; i < n * q_dim; ++i) difference[i] = output[offset + i] - e.target[offset + i];
  d.resize(n * q_dim);
  Gemm(false, false, n, q_dim, q_dim, difference.data(), q_dim, metric_.data(), q_dim, d.data(), q_dim, false);
  double sum = 0;
  for (size_t t = 0; t < n; ++t) {
    float row = 0;
    for (size_t i = 0; i < q_dim; ++i) row += difference[t * q_dim + i] * d[t * q_dim + i];
    sum += row;
  }
  return sum;
}

double LessLayer::LossSum(std::span<const LessExample* const> batch, size_t* scored) const {
  const std::vector<SequenceWork> work = Forward(batch, {});
  std::vector<double> sums(batch.size());
  ParallelFor(batch.size(), [&](size_t i) {
    std::vector<float> d;
    sums[i] = ProjectedError(*batch[i], work[i].output.data(), d);
  });
  *scored = 0;
  for (const LessExample* e : batch) *scored += e->n_tokens - e->first_scored;
  return std::accumulate(sums.begin(), sums.end(), 0.0);
}

double LessLayer::OutputLossSum(const LessExample& example, const float* output) const {
  std::vector<float> d;
  return ProjectedError(example, output, d);
}

std::vector<float> LessLayer::Output(const LessExample& example) const {
  const LessExample* one[] = {&example};
  return std::move(Forward(one, {})[0].output);
}

// ------------------------------------------------------------------------------------------------------- backward

// Derivatives of the loss by what each query of a group reads; see LessLayer in the header for the formula.
struct LessLayer::ReadGradients {
  ReadGradients(size_t group, size_t n_scored, size_t rank, size_t dim)
      : phi(group, std::vector<float>(n_scored * rank)),
        sum(group, std::vector<float>(n_scored * dim)),
        mass(group, std::vector<float>(n_scored)) {}
  // A query head: [n_scored, rank], [n_scored, head_dim] (dN: da scaled by the mix), [n_scored] (dL).
  std::vector<std::vector<float>> phi, sum, mass;
};

// Forward again, for the state that each query read.
void LessLayer::BackwardReads(const LessExample& e, size_t h, const HeadWork& work, const float* output,
                              const float* d_output, ReadGradients& d) const {
  const size_t dim = shape_.head_dim, rank = shape_.rank;
  const int32_t* leave = e.leave.data() + h * e.n_tokens;
  const internal::LessKernels& kernels = internal::ActiveLessKernels();
  std::vector<float> state(rank * dim), z(rank);
  for (size_t t = e.first_scored, next = 0; t < e.n_tokens; ++t) {
    for (; next < work.order.size() && leave[work.order[next]] <= static_cast<int32_t>(t); ++next) {
      const size_t token = static_cast<size_t>(work.order[next]);
      kernels.absorb(&work.psi[next * rank], &e.v[(token * shape_.n_kv_heads + h) * dim], 1, rank, dim, state.data(),
                     z.data());
    }
    const size_t s = t - e.first_scored;
    for (size_t g = 0; g < group(); ++g) {
      const size_t head = h * group() + g, row = t * shape_.n_heads + head;
      const float* phi = &work.phi[g][s * rank];
      float mass = 0;
      for (size_t r = 0; r < rank; ++r) mass += phi[r] * z[r];
      const Mix mix(e.exact_lse[row], mass);
      const float *da = d_output + (s * shape_.n_heads + head) * dim, *a = output + row * dim;
      float* dn = &d.sum[g][s * dim];
      float dot = 0;
      for (size_t i = 0; i < dim; ++i) {
        dn[i] = mix.state * da[i];
        dot += da[i] * a[i];
      }
      d.mass[g][s] = -mix.state * dot;
      float* dp = &d.phi[g][s * rank];
      RowDots(state.data(), dn, rank, dim, dp);
      for (size_t r = 0; r < rank; ++r) dp[r] += z[r] * d.mass[g][s];
    }
  }
}

// Backward with dH, dz. Returns the derivatives by the features of the pairs that were absorbed, [n_evicted, rank].
std::vector<float> LessLayer::BackwardState(const LessExample& e, size_t h, const HeadWork& work,
                                            const ReadGradients& d) const {
  const size_t dim = shape_.head_dim, rank = shape_.rank;
  const int32_t* leave = e.leave.data() + h * e.n_tokens;
  std::vector<float> d_state(rank * dim), d_z(rank), d_psi(work.psi.size());
  size_t next = work.order.size();
  for (size_t t = e.n_tokens; t-- > e.first_scored;) {
    const size_t s = t - e.first_scored;
    for (size_t g = 0; g < group(); ++g) {
      const float* phi = &work.phi[g][s * rank];
      AddOuter(phi, &d.sum[g][s * dim], rank, dim, d_state.data());
      for (size_t r = 0; r < rank; ++r) d_z[r] += phi[r] * d.mass[g][s];
    }
    // Pairs whose first reader is query t, or, before the first scored one, that all queries read.
    while (next > 0 && (leave[work.order[next - 1]] == static_cast<int32_t>(t) || t == e.first_scored)) {
      --next;
      const size_t token = static_cast<size_t>(work.order[next]);
      RowDots(d_state.data(), &e.v[(token * shape_.n_kv_heads + h) * dim], rank, dim, &d_psi[next * rank]);
      for (size_t r = 0; r < rank; ++r) d_psi[next * rank + r] += d_z[r];
    }
  }
  return d_psi;
}

// d_output [n_scored, n_heads, head_dim].
void LessLayer::BackwardHead(const LessExample& e, size_t sequence, size_t h, const DropoutOptions& dropout,
                             HeadWork& work, const float* output, const float* d_output, float* gradient) const {
  const size_t dim = shape_.head_dim, n_scored = e.n_tokens - e.first_scored;
  ReadGradients d(group(), n_scored, shape_.rank, dim);
  BackwardReads(e, h, work, output, d_output, d);
  std::vector<float> d_psi = BackwardState(e, h, work, d);
  for (size_t g = 0; g < group(); ++g) {
    const size_t head = h * group() + g;
    const Rows rows = {e.q.data() + (e.first_scored * shape_.n_heads + head) * dim, shape_.n_heads * dim, n_scored};
    FeatureNet(shape_, phi_, false, Phi(head), dropout, Stream(sequence, head))
        .Backward(rows, work.phi_p2[g].data(), d.phi[g].data(), gradient + head * phi_.total);
  }
  FeatureNet(shape_, psi_, true, parameters_.data() + PsiOffset(h), dropout, Stream(sequence, shape_.n_heads + h))
      .Backward({work.keys.data(), dim, work.order.size()}, work.psi_p2.data(), d_psi.data(), gradient + PsiOffset(h));
}

double LessLayer::LossAndGradient(std::span<const LessExample* const> batch, const DropoutOptions& dropout,
                                  std::vector<float>& gradient) const {
  std::vector<SequenceWork> work = Forward(batch, dropout);
  size_t scored = 0;
  for (const LessExample* e : batch) scored += e->n_tokens - e->first_scored;
  if (scored == 0) {
    gradient.assign(parameters_.size(), 0.0f);
    return 0;
  }
  std::vector<double> sums(batch.size());
  std::vector<std::vector<float>> d_output(batch.size()), gradients(batch.size());
  ParallelFor(batch.size(), [&](size_t i) {
    sums[i] = ProjectedError(*batch[i], work[i].output.data(), d_output[i]);
    for (float& d : d_output[i]) d *= 2.0f / static_cast<float>(scored);
    gradients[i].assign(parameters_.size(), 0.0f);
  });
  ParallelFor(batch.size() * shape_.n_kv_heads, [&](size_t task) {
    const size_t i = task / shape_.n_kv_heads, h = task % shape_.n_kv_heads;
    BackwardHead(*batch[i], i, h, dropout, work[i].heads[h], work[i].output.data(), d_output[i].data(),
                 gradients[i].data());
  });
  gradient = gradients[0];
  for (size_t i = 1; i < batch.size(); ++i)
    for (size_t p = 0; p < gradient.size(); ++p) gradient[p] += gradients[i][p];
  return std::accumulate(sums.begin(), sums.end(), 0.0) / static_cast<double>(scored);
}

}  // namespace lesskv::train
