#include "selector_oracle.h"

#include <algorithm>
#include <cmath>
#include <numeric>

namespace lesskv::testing_support {
namespace {

double Gelu(double x) { return 0.5 * x * (1 + std::erf(x / std::sqrt(2.0))); }

// x [d] times w [d, n].
std::vector<double> Times(const std::vector<double>& x, const float* w, size_t n) {
  std::vector<double> y(n);
  for (size_t i = 0; i < x.size(); ++i)
    for (size_t j = 0; j < n; ++j) y[j] += x[i] * w[i * n + j];
  return y;
}

// GELU(GELU(x A1) A2) of one head.
std::vector<double> Net(const SidecarShape& s, const NetParams& net, size_t head, const std::vector<double>& x) {
  auto hidden = Times(x, net.w1.data() + head * s.head_dim * s.hidden, s.hidden);
  for (double& value : hidden) value = Gelu(value);
  auto out = Times(hidden, net.w2.data() + head * s.hidden * s.rank, s.rank);
  for (double& value : out) value = Gelu(value);
  return out;
}

std::vector<double> Phi(const Sidecar& sidecar, size_t layer, size_t head, const std::vector<double>& q) {
  auto out = Net(sidecar.shape, sidecar.layers[layer].phi, head, q);
  for (double& value : out) value = std::fabs(value);
  return out;
}

// psi = |u + (u X) * d2|, u = |d| * g.
std::vector<double> Psi(const Sidecar& sidecar, size_t layer, size_t kv_head, const std::vector<double>& k) {
  const size_t rank = sidecar.shape.rank;
  const LayerParams& p = sidecar.layers[layer];
  auto u = Net(sidecar.shape, p.psi, kv_head, k);
  for (size_t r = 0; r < rank; ++r) u[r] *= std::fabs(p.d[kv_head * rank + r]);
  const auto mixed = Times(u, p.x.data() + kv_head * rank * rank, rank);
  for (size_t r = 0; r < rank; ++r) u[r] = std::fabs(u[r] + mixed[r] * p.d2[kv_head * rank + r]);
  return u;
}

}  // namespace

std::vector<size_t> OraclePyramid(size_t n_layers, size_t rows, size_t window, double beta, size_t n) {
  std::vector<size_t> result(n_layers, rows);
  if (n_layers == 1) return result;
  const double m = double(rows) - double(window);
  double low = m / beta, high = 2 * m - low;
  if (high > double(n) - double(window)) {
    high = double(n) - double(window);
    low = 2 * m - high;
  }
  if (high < low) return result;
  std::vector<std::pair<double, size_t>> remainders;  // negated: the largest first, then the lower layer
  size_t left = n_layers * rows;
  for (size_t l = 0; l < n_layers; ++l) {
    const double exact = double(window) + high - double(l) * (high - low) / double(n_layers - 1);
    result[l] = size_t(std::floor(exact + 1e-9));
    left -= result[l];
    remainders.push_back({-std::round((exact - double(result[l])) * 1e6), l});
  }
  std::sort(remainders.begin(), remainders.end());
  for (size_t i = 0; i < left; ++i) ++result[remainders[i].second];
  return result;
}

OracleCache::OracleCache(const TinyShape& shape, const OracleOptions& options)
    : shape_(shape), options_(options), heads_(shape.n_layers * shape.n_kv_heads) {
  if (options.less == nullptr) return;
  for (Head& head : heads_) {
    head.h.resize(options.less->shape.rank * shape.head_dim);
    head.z.resize(options.less->shape.rank);
  }
}

OracleCache::Observed OracleCache::Attend(const Text& text, size_t layer, size_t h, size_t n, StepKind,
                                          std::vector<double>& out) {
  const Head& head = At(layer, h);
  const size_t d = shape_.head_dim, n_kept = head.kept.size();
  Observed rows;
  rows.positions = head.kept;
  for (size_t i = 0; i < n; ++i) rows.positions.push_back(int32_t(seen_ + i));
  const size_t n_rows = rows.positions.size();
  rows.all.resize(n_rows);
  rows.voted.resize(n_rows);
  rows.last.resize(n_rows);
  std::vector<std::vector<double>> keys;
  for (size_t r = 0; r < n_rows; ++r)  // rows are in order: the place in the cache is r
    keys.push_back(Rotated(shape_, &text.k[layer][(size_t(rows.positions[r]) * shape_.n_kv_heads + h) * d],
                           options_.cache_positions ? r : size_t(rows.positions[r])));
  for (size_t i = 0; i < n; ++i) {
    for (size_t g = 0; g < shape_.group(); ++g) {
      const size_t head_index = h * shape_.group() + g;
      const auto q = Rotated(shape_, &text.q[layer][((seen_ + i) * shape_.n_heads + head_index) * d],
                             options_.cache_positions ? n_kept + i : seen_ + i);
      std::vector<double> s(n_kept + i + 1);
      for (size_t r = 0; r < s.size(); ++r)
        s[r] = std::inner_product(q.begin(), q.end(), keys[r].begin(), 0.0) / std::sqrt(double(d));
      const double top = *std::max_element(s.begin(), s.end());
      double mass = 0;
      for (double& x : s) mass += x = std::exp(x - top);
      std::vector<double> o(d);
      for (size_t r = 0; r < s.size(); ++r) {
        const double p = s[r] / mass;
        rows.all[r] += p;
        if (i + options_.window >= n) rows.voted[r] += p;
        if (i + 1 == n) rows.last[r] += p;
        for (size_t c = 0; c < d; ++c)
          o[c] += s[r] * text.v[layer][(size_t(rows.positions[r]) * shape_.n_kv_heads + h) * d + c];
      }
      if (options_.less != nullptr) {  // one normaliser: exp(s) of the exact rows and phi(q) psi(k) of those that left
        const auto phi = Phi(*options_.less, layer, head_index, q);
        for (size_t r = 0; r < phi.size(); ++r) {
          mass += phi[r] * head.z[r] * std::exp(-top);
          for (size_t c = 0; c < d; ++c) o[c] += phi[r] * head.h[r * d + c] * std::exp(-top);
        }
      }
      for (size_t c = 0; c < d; ++c) out[(i * shape_.n_heads + head_index) * d + c] = o[c] / mass;
    }
  }
  return rows;
}

void OracleCache::Absorb(const Text& text, size_t layer, size_t h) {
  Head& head = At(layer, h);
  const size_t d = shape_.head_dim;
  for (int32_t p : head.just_left) {
    if (options_.less == nullptr) break;
    const size_t row = (size_t(p) * shape_.n_kv_heads + h) * d;
    const auto psi = Psi(*options_.less, layer, h, Rotated(shape_, &text.k[layer][row], size_t(p)));
    for (size_t r = 0; r < psi.size(); ++r) {
      head.z[r] += psi[r];
      for (size_t c = 0; c < d; ++c) head.h[r * d + c] += psi[r] * text.v[layer][row + c];
    }
  }
  head.just_left.clear();
}

bool OracleCache::Protected(int32_t position) const {
  return std::any_of(options_.protect.begin(), options_.protect.end(),
                     [&](const auto& span) { return position >= span.first && position < span.second; });
}

std::vector<std::vector<double>> OracleCache::Step(const Text& text, size_t n, StepKind kind) {
  if (options_.policy != Policy::kFull && (kind == StepKind::kPrompt || budgets_.empty())) {
    budgets_.assign(shape_.n_layers, options_.rows);
    // Window rows that the pyramid leaves out of its shares.
    const size_t w = options_.policy == Policy::kH2o      ? options_.recent
                     : options_.policy == Policy::kSnapkv ? options_.window
                     : options_.policy == Policy::kWindow ? options_.sinks + 1
                                                          : 0;
    if (options_.pyramid_beta > 0)
      budgets_ = OraclePyramid(shape_.n_layers, options_.rows, w, options_.pyramid_beta,
                               kind == StepKind::kPrompt ? seen_ + n : shape_.ctx);
  }
  std::vector<std::vector<double>> outputs;
  for (size_t l = 0; l < shape_.n_layers; ++l) {
    outputs.emplace_back(n * shape_.n_heads * shape_.head_dim);
    std::vector<Observed> observed;
    for (size_t h = 0; h < shape_.n_kv_heads; ++h) {
      Absorb(text, l, h);
      observed.push_back(Attend(text, l, h, n, kind, outputs.back()));
    }
    Select(l, observed, kind, n);
  }
  seen_ += n;
  return outputs;
}

void OracleCache::Select(size_t layer, std::vector<Observed>& observed, StepKind kind, size_t n) {
  const auto now = int32_t(seen_ + n);
  std::vector<double> layer_last(observed[0].positions.size());
  for (const Observed& rows : observed)
    for (size_t r = 0; r < layer_last.size() && options_.policy == Policy::kTova; ++r) layer_last[r] += rows.last[r];
  for (size_t h = 0; h < observed.size(); ++h) {
    Head& head = At(layer, h);
    const Observed& rows = observed[h];
    const size_t n_rows = rows.positions.size();
    head.score.resize(size_t(now));
    for (size_t r = 0; r < n_rows; ++r) head.score[size_t(rows.positions[r])] += rows.all[r];
    head.ambiguous = false;
    const bool acts =
        options_.policy != Policy::kFull && !(options_.policy == Policy::kSnapkv && kind == StepKind::kDecode);
    if (!acts || n_rows <= budgets_[layer]) {
      head.kept = rows.positions;
      continue;
    }
    const size_t budget = budgets_[layer];
    std::vector<char> always(n_rows);
    std::vector<double> value(n_rows);
    const size_t recent = options_.pyramid_beta > 0 ? std::min(options_.recent, budget / 2) : options_.recent;
    for (size_t r = 0; r < n_rows; ++r) {
      const int32_t p = rows.positions[r];
      always[r] = Protected(p);
      switch (options_.policy) {
        case Policy::kWindow:
          always[r] |= p < int32_t(options_.sinks);
          value[r] = p;
          break;
        case Policy::kH2o:
          always[r] |= p >= now - int32_t(recent);
          value[r] = head.score[size_t(p)];
          break;
        case Policy::kTova:
          value[r] = layer_last[r];
          break;
        case Policy::kSnapkv:
          always[r] |= p >= now - int32_t(options_.window);
          break;
        case Policy::kFull:
          break;
      }
    }
    if (options_.policy == Policy::kSnapkv) {  // pool the votes of the rows before the window
      size_t prefix = 0;
      while (prefix < n_rows && rows.positions[prefix] < now - int32_t(options_.window)) ++prefix;
      const auto half = int(options_.kernel / 2);
      for (int r = 0; r < int(prefix); ++r) {
        double best = -1, sum = 0;
        for (int j = std::max(0, r - half); j <= std::min(int(prefix) - 1, r + half); ++j) {
          best = std::max(best, rows.voted[size_t(j)]);
          sum += rows.voted[size_t(j)];
        }
        value[size_t(r)] = options_.average ? sum / double(options_.kernel) : best;
      }
    }
    Keep(head, rows, budget, always, value);
  }
}

void OracleCache::Keep(Head& head, const Observed& rows, size_t budget, const std::vector<char>& always,
                       const std::vector<double>& value) {
  std::vector<size_t> rest;
  size_t room = budget;
  for (size_t r = 0; r < always.size(); ++r) {
    if (always[r])
      --room;
    else
      rest.push_back(r);
  }
  // Rows are in order of position, so a stable order keeps the lower position of equals.
  std::stable_sort(rest.begin(), rest.end(), [&](size_t a, size_t b) { return value[a] > value[b]; });
  if (room > 0 && room < rest.size()) {
    const double in = value[rest[room - 1]], out = value[rest[room]];
    head.ambiguous = in != out && in - out < 1e-5 * value[rest[0]];
  }
  head.kept.clear();
  head.just_left.clear();
  std::vector<char> stays = always;
  for (size_t i = 0; i < room && i < rest.size(); ++i) stays[rest[i]] = 1;
  for (size_t r = 0; r < stays.size(); ++r) (stays[r] ? head.kept : head.just_left).push_back(rows.positions[r]);
}

void OracleCache::Adopt(size_t layer, size_t kv_head, std::vector<int32_t> kept) {
  Head& head = At(layer, kv_head);
  std::vector<int32_t> all = head.kept;
  all.insert(all.end(), head.just_left.begin(), head.just_left.end());
  std::sort(all.begin(), all.end());
  head.kept = std::move(kept);
  head.just_left.clear();
  std::set_difference(all.begin(), all.end(), head.kept.begin(), head.kept.end(), std::back_inserter(head.just_left));
}

}  // namespace lesskv::testing_support
