// The cascading cache through the whole cache: positions inside the cache, scores and rings against a slow calculation in
// double precision that is written from the method's description.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <numeric>

#include "cache_harness.h"

namespace lesskv {
namespace {

using namespace testing_support;  // NOLINT

struct Entry {
  int position;
  double score;
};

// One (layer, KV head): rows in order of their positions, the oldest first.
struct OracleHead {
  std::vector<Entry> sinks;
  std::vector<std::vector<Entry>> rings;  // each the oldest first

  std::vector<Entry*> Rows() {
    std::vector<Entry*> rows;
    for (Entry& e : sinks) rows.push_back(&e);
    for (size_t i = rings.size(); i-- > 0;)
      for (Entry& e : rings[i]) rows.push_back(&e);
    return rows;
  }
};

class Oracle {
 public:
  Oracle(const TinyShape& s, const Text& t, size_t n_sinks, size_t n_rows, size_t levels, double b, bool cache_positions)
      : shape_(s), text_(t), sinks_(n_sinks), cache_(n_rows), decay_(b), ranks_(cache_positions),
        heads_(s.n_layers * s.n_kv_heads) {
    for (OracleHead& head : heads_) head.rings.resize(levels);
  }

  // Attends n tokens, scores, pushes. [n_layers][n, n_heads, head_dim]
  std::vector<std::vector<double>> Step(size_t n) {
    std::vector<std::vector<double>> out(shape_.n_layers, std::vector<double>(n * shape_.n_heads * shape_.head_dim));
    for (size_t l = 0; l < shape_.n_layers; ++l)
      for (size_t h = 0; h < shape_.n_kv_heads; ++h) StepHead(l, h, n, out[l]);
    seen_ += n;
    return out;
  }

  std::vector<int32_t> Held(size_t l, size_t h) {
    std::vector<int32_t> held;
    for (const Entry* e : heads_[l * shape_.n_kv_heads + h].Rows()) held.push_back(e->position);
    return held;
  }

 private:
  void StepHead(size_t l, size_t h, size_t n, std::vector<double>& out) {
    OracleHead& head = heads_[l * shape_.n_kv_heads + h];
    const std::vector<Entry*> past = head.Rows();
    const size_t d = shape_.head_dim, group = shape_.group(), n_past = past.size();
    std::vector<int> at;
    for (const Entry* e : past) at.push_back(e->position);
    for (size_t i = 0; i < n; ++i) at.push_back(static_cast<int>(seen_ + i));
    std::vector<std::vector<double>> keys;
    for (size_t r = 0; r < at.size(); ++r)
      keys.push_back(Rotated(shape_, &text_.k[l][(static_cast<size_t>(at[r]) * shape_.n_kv_heads + h) * d],
                             ranks_ ? r : static_cast<size_t>(at[r])));
    std::vector<double> received(at.size());
    for (size_t g = 0; g < group; ++g) {
      std::vector<double> own(at.size());
      for (size_t m = 0; m < n; ++m) {
        const size_t query_head = h * group + g;
        const auto q = Rotated(shape_, &text_.q[l][((seen_ + m) * shape_.n_heads + query_head) * d], ranks_ ? n_past + m : seen_ + m);
        std::vector<double> p(n_past + m + 1);
        for (size_t r = 0; r < p.size(); ++r)
          p[r] = std::exp(std::inner_product(q.begin(), q.end(), keys[r].begin(), 0.0) / std::sqrt(double(d)));
        const double mass = std::accumulate(p.begin(), p.end(), 0.0);
        for (size_t r = 0; r < p.size(); ++r) {
          own[r] += std::pow(decay_, double(n - 1 - m)) * p[r] / mass;
          for (size_t c = 0; c < d; ++c)
            out[(m * shape_.n_heads + query_head) * d + c] +=
                p[r] / mass * text_.v[l][(static_cast<size_t>(at[r]) * shape_.n_kv_heads + h) * d + c];
        }
      }
      for (size_t r = 0; r < own.size(); ++r) received[r] = std::max(received[r], own[r]);
    }
    for (size_t r = 0; r < n_past; ++r) past[r]->score = std::pow(decay_, double(n)) * past[r]->score + received[r];
    for (size_t i = 0; i < n; ++i) Push(head, {static_cast<int>(seen_ + i), received[n_past + i]});
  }

  void Push(OracleHead& head, Entry carried) {
    const size_t t = static_cast<size_t>(carried.position), width = (cache_ - sinks_) / head.rings.size();
    if (t < sinks_) return head.sinks.push_back(carried);
    for (size_t i = 0; i < head.rings.size(); ++i) {
      std::vector<Entry>& ring = head.rings[i];
      if (t <= cache_ || (t - sinks_) % (size_t{1} << i) == 0) {
        ring.push_back(carried);
        if (ring.size() <= width) return;
        carried = ring.front();
        ring.erase(ring.begin());
      } else {
        if (carried.score >= ring.back().score) ring.back() = carried;
        return;
      }
    }
  }

  const TinyShape& shape_;
  const Text& text_;
  size_t sinks_, cache_, seen_ = 0;
  double decay_;
  bool ranks_;
  std::vector<OracleHead> heads_;
};

// A prompt longer than a tile of queries, chunks, single tokens.
TEST(CascadeOracle, OutputsAndRowsAreTheMethods) {
  TinyShape shape = kTinyShapes[1];
  shape.ctx = 1000;
  const TempSidecar sidecar(shape);
  const Text text = RandomText(shape, 900, 31);
  for (const bool ranks : {true, false})
    for (const double decay : {0.9999999, 0.9}) {
      const std::string spec = "cascade(38, levels=3, sinks=2, positions=" + std::string(ranks ? "cache" : "true") +
                               ", decay=" + (decay < 0.95 ? "0.9" : "0.9999999") + ")+f32";
      SCOPED_TRACE(spec);
      SequenceCache cache(MakeConfig(spec, shape, sidecar));
      Oracle oracle(shape, text, 2, 38, 3, decay, ranks);
      size_t seen = 0;
      std::vector<size_t> steps = {600, 1, 1, 40, 7};
      steps.resize(steps.size() + 60, 1);
      for (const size_t n : steps) {
        const Outputs got = Feed(cache, text, seen, n, n == 1 ? StepKind::kDecode : StepKind::kStream);
        const auto want = oracle.Step(n);
        seen += n;
        for (size_t l = 0; l < shape.n_layers; ++l) {
          EXPECT_LT(RelativeError(got[l], {want[l].begin(), want[l].end()}), 1e-4) << "after " << seen;
          for (size_t h = 0; h < shape.n_kv_heads; ++h) ASSERT_EQ(Resident(cache, l, h), oracle.Held(l, h)) << seen;
        }
      }
    }
}

}  // namespace
}  // namespace lesskv
