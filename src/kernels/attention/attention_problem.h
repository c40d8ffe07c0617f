// For the tests of attention: random jobs, how their rows are stored, and what they must give, in float64.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <map>
#include <memory>
#include <new>
#include <numeric>
#include <optional>
#include <utility>
#include <vector>

#include "base/rng.h"
#include "base/threads.h"
#include "kernels/attention/attention.h"
#include "kernels/basic/cpu.h"
#include "kernels/basic/guarded_bytes.h"
#include "kernels/rows/hadamard.h"

namespace lesskv {

inline constexpr RowType kTypes[] = {RowType::kF32, RowType::kF16, RowType::kBF16, RowType::kQ8, RowType::kQ4};

struct Region {
  std::byte* Allocate(size_t bytes) {  // a multiple of kRegionAlign
    memory = GuardedBytes(bytes);
    data = memory.data();
    std::fill_n(data, bytes, std::byte{0xff});  // unused slots hold NaN
    return data;
  }
  GuardedBytes memory;
  std::byte* data = nullptr;
};

// Rows stored alike: in regions of a type, or as float32 behind a reader of the test's own.
struct RowRun {
  size_t n;
  RowType type = RowType::kF32;
  bool reader = false;
  bool hooks = false;  // the reader scores and sums up by itself
  bool narrow = false;  // keys with some of their channels: NarrowChannels
};

// Five eighths of the channels, or as many as quantised rows can have, in no order that means anything.
inline std::vector<uint16_t> NarrowChannels(size_t dim, RowType type) {
  size_t n = dim * 5 / 8;
  if (type == RowType::kQ8 || type == RowType::kQ4) n = std::max<size_t>(n / 32, 1) * 32;
  std::vector<uint16_t> channels;
  for (size_t c = 0; c < dim; ++c)
    if (c * 7 % dim < n) channels.push_back(static_cast<uint16_t>(c));
  return channels;
}

// What one test computes with. Rows are kept as floats and stored through a layout (how they are cut into spans).
struct Case {
  RowType key_type = RowType::kF32, value_type = RowType::kF32;
  std::vector<RowRun> key_runs = {}, value_runs = {};  // empty: all rows in the side's type
  size_t dim = 64, group = 1, n_past = 0, n_queries = 1;
  bool own_rows = true;  // the step's own keys are among the rows
  float key_size = 1;
  ComputeType compute = ComputeType::kF32;
  std::optional<RopeStyle> rope = {};
  size_t hadamard_block = 0;
  bool biased = false;
  size_t window = 0;
  int32_t first_position = 0;  // with a window at least n_past
  uint64_t seed = 1;

  size_t n_rows() const { return n_past + (own_rows ? n_queries : 0); }
};

// Lengths of spans and the first slot of each.
struct Cut {
  size_t n, slot;
};
using Layout = std::vector<Cut>;

inline Layout OneSpan(size_t n) { return {{n, 0}}; }
inline Layout RandomLayout(size_t n, Rng& rng, size_t longest) {
  Layout layout;
  while (n > 0) {
    const size_t take = std::min<size_t>(n, rng.Below(longest + 1));  // may be empty
    layout.push_back({take, rng.Below(40)});
    n -= take;
  }
  layout.push_back({0, 3});
  return layout;
}

struct Ask {
  size_t first_query = 0;
  const float* weights = nullptr;
  bool keep = false;  // asks for what the rows received
  bool by_head = false;
};

struct Result {
  std::vector<float> out, lse, received, sums;
};

// Rows of float32; row r lies in slot r + kShift.
class FloatReader final : public RowReader {
 public:
  static constexpr size_t kShift = 5;

  FloatReader(const std::vector<float>& rows, size_t dim, bool hooks) : rows_(rows), dim_(dim), hooks_(hooks) {}

  void ExpandKeys(size_t first, size_t n, float* out, size_t stride) const override {
    Count(expansions, n);
    for (size_t i = 0; i < n; ++i)
      for (size_t c = 0; c < dim_; ++c) out[c * stride + i] = Row(first + i)[c];
  }
  void ExpandValues(size_t first, size_t n, float* out, size_t stride) const override {
    Count(expansions, n);
    for (size_t i = 0; i < n; ++i) std::copy(Row(first + i), Row(first + i) + dim_, out + i * stride);
  }
  bool Scores(size_t first, size_t n, const float* q, size_t stacked, float* scores, size_t stride) const override {
    if (!hooks_) return false;
    Count(scored, n);
    for (size_t m = 0; m < stacked; ++m)
      for (size_t i = 0; i < n; ++i) {
        float sum = 0;
        for (size_t c = 0; c < dim_; ++c) sum += q[c * stacked + m] * Row(first + i)[c];
        scores[m * stride + i] = sum;
      }
    return true;
  }
  bool AddValues(size_t first, size_t n, const float* weights, size_t stride, size_t stacked, float* out,
                 size_t out_stride) const override {
    if (!hooks_) return false;
    Count(summed, n);
    for (size_t m = 0; m < stacked; ++m)
      for (size_t i = 0; i < n; ++i)
        for (size_t c = 0; c < dim_; ++c) out[m * out_stride + c] += weights[m * stride + i] * Row(first + i)[c];
    return true;
  }

  mutable std::atomic<size_t> expansions = 0, scored = 0, summed = 0;  // rows
  mutable std::atomic<bool> too_many = false;

 private:
  void Count(std::atomic<size_t>& rows, size_t n) const {
    rows += n;
    if (n == 0 || n > (&rows == &expansions ? kMaxRows : kMostScored)) too_many = true;
  }
  const float* Row(size_t slot) const { return rows_.data() + (slot - kShift) * dim_; }

  const std::vector<float>& rows_;
  size_t dim_;
  bool hooks_;
};

class Problem {
 public:
  explicit Problem(const Case& c) : c_(c) {
    Rng rng(c.seed);
    if (c_.key_runs.empty()) c_.key_runs = {{c.n_rows(), c.key_type}};
    if (c_.value_runs.empty()) c_.value_runs = {{c.n_rows(), c.value_type}};
    keys_ = Random(rng, c.n_rows() * c.dim, c.key_size);
    values_ = Random(rng, c.n_rows() * c.dim, 1);
    queries_ = Random(rng, c.n_queries * c.group * c.dim, 1);
    for (const RowRun& run : c_.key_runs)
      if (run.narrow) channels_[run.type] = NarrowChannels(c.dim, run.type);
    Quantise(RowSide::kKeys, c_.key_runs, keys_);
    Quantise(RowSide::kValues, c_.value_runs, values_);
    if (c.rope) {
      RopeConfig config;
      config.n_dims = c.dim / 2 * 2;
      config.style = *c.rope;
      table_.emplace(config);
      for (size_t r = 0; r < c.n_rows(); ++r) read_positions_.push_back(static_cast<int32_t>(rng.Below(20000)));
    }
    if (c.biased) bias_ = Random(rng, c.n_rows(), 2);
    if (c.window > 0) past_positions_ = ShuffledPositions(rng);
    for (const bool hooks : {false, true}) {
      key_readers_.push_back(std::make_unique<FloatReader>(keys_, c.dim, hooks));
      value_readers_.push_back(std::make_unique<FloatReader>(values_, c.dim, hooks));
    }
  }

  Result Run(const Layout& layout, const Ask& ask = {}) const { return RunCut(layout, layout, ask); }
  Result RunCut(const Layout& keys, const Layout& values, const Ask& ask = {}) const {
    Stored stored = Store(keys, values);
    Result result;
    AttentionJob job = Job(stored, result);
    const size_t n_sums = c_.n_rows() * (ask.by_head ? c_.group : 1);
    if (ask.keep) {
      result.received.assign(n_sums, kUnset);
      job.received = result.received.data();
      job.received_by_head = ask.by_head;
    }
    Attend({&job, 1});
    result.sums.assign(n_sums, kUnset);
    ColumnSumJob sums = {job, job.lse, ask.first_query, ask.weights, result.sums.data(), ask.by_head};
    ColumnSums({&sums, 1});
    return result;
  }

  // In float64, from the stored rows.
  struct Exact {
    std::vector<double> out, lse, sums, head_sums;
  };
  Exact Reference(const Ask& ask = {}) const {
    const size_t n = c_.n_rows(), dim = c_.dim;
    Exact exact;
    exact.sums.assign(n, 0);
    exact.head_sums.assign(n * c_.group, 0);
    const std::vector<double> keys = RotatedKeys();
    for (size_t m = 0; m < c_.n_queries; ++m) {
      for (size_t g = 0; g < c_.group; ++g) {
        const std::vector<double> s = Scores(keys, m, g);
        double largest = -std::numeric_limits<double>::infinity(), sum = 0;
        for (double x : s) largest = std::max(largest, x);
        const bool nothing = std::isinf(largest);
        for (double x : s) sum += nothing ? 0 : std::exp(x - largest);
        const double lse = nothing ? largest : largest + std::log(sum);
        std::vector<double> out(dim);
        for (size_t r = 0; r < n; ++r) {
          const double p = nothing ? 0 : std::exp(s[r] - lse);
          for (size_t i = 0; i < dim; ++i) out[i] += p * values_[r * dim + i];
          if (m < ask.first_query) continue;
          const double weighted = (ask.weights ? ask.weights[m - ask.first_query] : 1) * p;
          exact.sums[r] += weighted;
          exact.head_sums[g * n + r] += weighted;
        }
        exact.out.insert(exact.out.end(), out.begin(), out.end());
        exact.lse.push_back(lse);
      }
    }
    return exact;
  }

  bool Visible(size_t m, size_t r) const {
    const bool past = r < c_.n_past;
    if (!past && r - c_.n_past > m) return false;
    if (c_.window == 0) return true;
    const int64_t position = past ? past_positions_[r] : c_.first_position + static_cast<int64_t>(r - c_.n_past);
    return position > c_.first_position + static_cast<int64_t>(m) - static_cast<int64_t>(c_.window);
  }

  std::vector<float>& keys() { return keys_; }
  std::vector<float>& values() { return values_; }
  std::vector<float>& queries() { return queries_; }
  std::vector<float>& bias() { return bias_; }
  std::vector<int32_t>& past_positions() { return past_positions_; }
  const FloatReader& key_reader(bool hooks) const { return *key_readers_[hooks]; }
  const FloatReader& value_reader(bool hooks) const { return *value_readers_[hooks]; }
  float Scale() const { return 1 / std::sqrt(static_cast<float>(c_.dim)); }

  static constexpr float kUnset = 12345;

 private:
  struct Stored {
    std::vector<Region> regions;
    std::vector<RowSpan> keys, values;
  };

  static std::vector<float> Random(Rng& rng, size_t n, float size) {
    std::vector<float> x(n);
    for (float& v : x) v = rng.Normal() * size;
    return x;
  }

  // n_past different positions before the step's first, in any order.
  std::vector<int32_t> ShuffledPositions(Rng& rng) const {
    std::vector<int32_t> positions(static_cast<size_t>(c_.first_position));
    std::iota(positions.begin(), positions.end(), 0);
    for (size_t i = positions.size(); i > 1; --i) std::swap(positions[i - 1], positions[rng.Below(i)]);
    positions.resize(c_.n_past);
    return positions;
  }

  // -infinity where a row is not visible.
  std::vector<double> Scores(const std::vector<double>& keys, size_t m, size_t g) const {
    const float* q = &queries_[(m * c_.group + g) * c_.dim];
    std::vector<double> s(c_.n_rows(), -std::numeric_limits<double>::infinity());
    for (size_t r = 0; r < s.size(); ++r) {
      if (!Visible(m, r)) continue;
      s[r] = 0;
      for (size_t i = 0; i < c_.dim; ++i) s[r] += static_cast<double>(q[i]) * keys[r * c_.dim + i];
      s[r] = s[r] * Scale() + (c_.biased ? bias_[r] : 0);
    }
    return s;
  }

  // Transforms keys as they are stored, or takes them back.
  void Transform(RowSide side, float* rows, size_t n) const {
    if (side == RowSide::kKeys && c_.hadamard_block > 0) Hadamard(rows, n * c_.dim, c_.hadamard_block);
  }

  // Keys with some of their channels, as they are stored: [n, channels].
  std::vector<float> Narrow(const RowRun& run, const float* x, size_t n) const {
    std::vector<float> some;
    for (size_t r = 0; r < n; ++r)
      for (const uint16_t c : NarrowChannels(c_.dim, run.type)) some.push_back(x[r * c_.dim + c]);
    return some;
  }

  void QuantiseNarrow(const RowRun& run, float* x) const {
    const std::vector<uint16_t> channels = NarrowChannels(c_.dim, run.type);
    const RowFormat format = {run.type, RowSide::kKeys, channels.size()};
    std::vector<float> some = Narrow(run, x, run.n);
    Region region;
    region.Allocate(RegionBytes(format, (run.n + 15) / 16 * 16));
    WriteRows(format, region.data, 0, run.n, some.data(), channels.size());
    ReadRows(format, region.data, 0, run.n, some.data(), channels.size());
    std::fill(x, x + run.n * c_.dim, 0.0f);
    for (size_t r = 0; r < run.n; ++r)
      for (size_t i = 0; i < channels.size(); ++i) x[r * c_.dim + channels[i]] = some[r * channels.size() + i];
  }

  // Rounds rows to what their type holds, so that the reference sees what the kernels see.
  void Quantise(RowSide side, const std::vector<RowRun>& runs, std::vector<float>& rows) const {
    float* x = rows.data();
    for (const RowRun& run : runs) {
      if (run.narrow) {
        QuantiseNarrow(run, x);
        x += run.n * c_.dim;
        continue;
      }
      if (!run.reader && run.n > 0) {
        const RowFormat format = {run.type, side, c_.dim};
        Region region;
        region.Allocate(RegionBytes(format, (run.n + 15) / 16 * 16));
        Transform(side, x, run.n);
        WriteRows(format, region.data, 0, run.n, x, c_.dim);
        ReadRows(format, region.data, 0, run.n, x, c_.dim);
        Transform(side, x, run.n);
      }
      x += run.n * c_.dim;
    }
    EXPECT_EQ(x, rows.data() + rows.size()) << "the runs must cover the rows";
  }

  std::vector<double> RotatedKeys() const {
    std::vector<double> keys(keys_.begin(), keys_.end());
    for (size_t r = 0; table_ && r < c_.n_rows(); ++r) {
      const size_t pairs = table_->n_dims() / 2;
      for (size_t i = 0; i < pairs; ++i) {
        const double angle = table_->frequencies()[i] * read_positions_[r];
        const bool halves = table_->style() == RopeStyle::kHalves;
        double& a = keys[r * c_.dim + (halves ? i : 2 * i)];
        double& b = keys[r * c_.dim + (halves ? i + pairs : 2 * i + 1)];
        const double x = a, y = b;
        a = x * std::cos(angle) - y * std::sin(angle);
        b = x * std::sin(angle) + y * std::cos(angle);
      }
    }
    return keys;
  }

  Stored Store(const Layout& keys, const Layout& values) const {
    Stored stored;
    stored.keys = StoreSide(keys, RowSide::kKeys, stored.regions);
    stored.values = StoreSide(values, RowSide::kValues, stored.regions);
    return stored;
  }

  // The layout's spans, cut where runs end.
  std::vector<RowSpan> StoreSide(const Layout& layout, RowSide side, std::vector<Region>& regions) const {
    const std::vector<RowRun>& runs = side == RowSide::kKeys ? c_.key_runs : c_.value_runs;
    std::vector<RowSpan> spans;
    size_t row = 0, run = 0, run_end = runs[0].n;
    for (const Cut& cut : layout) {
      for (size_t left = cut.n;;) {
        while (row == run_end && run + 1 < runs.size()) run_end += runs[++run].n;
        const size_t n = std::min(left, run_end - row);
        spans.push_back(StoreSpan(runs[run], side, row, n, cut.slot, regions));
        row += n;
        left -= n;
        if (left == 0) break;
      }
    }
    return spans;
  }

  RowSpan StoreSpan(const RowRun& run, RowSide side, size_t row, size_t n, size_t slot,
                    std::vector<Region>& regions) const {
    if (run.narrow) return StoreNarrowSpan(run, row, n, slot, regions);
    const RowFormat format = {run.type, side, c_.dim};
    if (run.reader) {
      const auto& readers = side == RowSide::kKeys ? key_readers_ : value_readers_;
      return {.format = format,
              .first_slot = row + FloatReader::kShift,
              .n_rows = n,
              .reader = readers[run.hooks].get()};
    }
    std::byte* data = regions.emplace_back().Allocate(RegionBytes(format, (slot + n + 15) / 16 * 16));
    const float* from = (side == RowSide::kKeys ? keys_ : values_).data() + row * c_.dim;
    std::vector<float> rows(from, from + n * c_.dim);
    Transform(side, rows.data(), n);
    WriteRows(format, data, slot, n, rows.data(), c_.dim);
    return {.format = format, .rows = data, .first_slot = slot, .n_rows = n};
  }

  RowSpan StoreNarrowSpan(const RowRun& run, size_t row, size_t n, size_t slot, std::vector<Region>& regions) const {
    const std::vector<uint16_t>& channels = channels_.at(run.type);
    const RowFormat format = {run.type, RowSide::kKeys, channels.size()};
    std::byte* data = regions.emplace_back().Allocate(RegionBytes(format, (slot + n + 15) / 16 * 16));
    const std::vector<float> rows = Narrow(run, keys_.data() + row * c_.dim, n);
    WriteRows(format, data, slot, n, rows.data(), channels.size());
    return {.format = format, .rows = data, .first_slot = slot, .n_rows = n, .channels = channels.data()};
  }

  AttentionJob Job(const Stored& stored, Result& result) const {
    AttentionJob job;
    job.keys = stored.keys;
    job.values = stored.values;
    job.n_past = c_.n_past;
    job.n_queries = c_.n_queries;
    job.q = queries_.data();
    job.q_stride = c_.group * c_.dim;
    job.group = c_.group;
    job.scale = Scale();
    job.compute = c_.compute;
    if (table_) {
      job.rope = &*table_;
      job.read_positions = read_positions_.data();
      job.key_hadamard_block = c_.hadamard_block;
    }
    if (c_.biased) job.bias = bias_.data();
    job.window = c_.window;
    job.first_position = c_.first_position;
    if (c_.window > 0) job.past_positions = past_positions_.data();
    result.out.assign(c_.n_queries * c_.group * c_.dim, kUnset);
    result.lse.assign(c_.n_queries * c_.group, kUnset);
    job.out = result.out.data();
    job.out_stride = c_.group * c_.dim;
    job.lse = result.lse.data();
    return job;
  }

  Case c_;
  std::vector<float> keys_, values_, queries_, bias_;
  std::optional<RopeTable> table_;
  std::vector<int32_t> read_positions_, past_positions_;
  std::map<RowType, std::vector<uint16_t>> channels_;
  std::vector<std::unique_ptr<FloatReader>> key_readers_, value_readers_;  // without and with hooks
};

// Normalised mean squared error: does not shrink as the array grows.
inline double Nmse(const std::vector<float>& x, const std::vector<double>& exact) {
  EXPECT_EQ(x.size(), exact.size());
  double error = 0, power = 1e-30;
  for (size_t i = 0; i < x.size(); ++i) {
    error += (x[i] - exact[i]) * (x[i] - exact[i]);
    power += exact[i] * exact[i];
  }
  return error / power;
}

inline void ExpectNearLse(const std::vector<float>& lse, const std::vector<double>& exact, double tolerance) {
  for (size_t i = 0; i < lse.size(); ++i) {
    if (std::isinf(exact[i])) {
      EXPECT_EQ(lse[i], -std::numeric_limits<float>::infinity());
    } else {
      EXPECT_NEAR(lse[i], exact[i], tolerance * std::max(1.0, std::fabs(exact[i])));
    }
  }
}

inline bool SameBits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0);
}
inline void ExpectSameBits(const Result& a, const Result& b) {
  EXPECT_TRUE(SameBits(a.out, b.out));
  EXPECT_TRUE(SameBits(a.lse, b.lse));
  EXPECT_TRUE(SameBits(a.received, b.received));
  EXPECT_TRUE(SameBits(a.sums, b.sums));
}

// In decode queries are rounded to 16 bits where they meet quantised keys, weights where they meet quantised values; else
// everything is float32.
inline bool IsCoded(RowType type, const std::vector<RowRun>& runs) {
  const auto coded = [](RowType t) { return t == RowType::kQ8 || t == RowType::kQ4; };
  return coded(type) || std::any_of(runs.begin(), runs.end(), [&](const RowRun& run) { return coded(run.type); });
}
inline double DefaultBound(const Case& c) {
  if (IsCoded(c.key_type, c.key_runs)) return 1e-7;
  return IsCoded(c.value_type, c.value_runs) && c.n_queries <= 4 ? 2e-8 : 1e-10;
}

inline void ExpectMatches(const Case& c, double bound = 0) {
  if (bound == 0) bound = DefaultBound(c);
  const Problem problem(c);
  const Problem::Exact exact = problem.Reference();
  const Result result = problem.Run(OneSpan(c.n_rows()), {.keep = c.n_queries == 1});
  EXPECT_LE(Nmse(result.out, exact.out), bound);
  EXPECT_LE(Nmse(result.sums, exact.sums), bound);
  if (c.n_queries == 1) {
    EXPECT_LE(Nmse(result.received, exact.sums), bound);
  }
  ExpectNearLse(result.lse, exact.lse, std::sqrt(bound));
}

// Every instruction set that this processor has.
class AttentionIsaTest : public testing::TestWithParam<Isa> {
 protected:
  void SetUp() override { ForceIsa(GetParam()); }
  void TearDown() override { ForceIsa(BestIsa()); }
  bool Slow() const { return GetParam() == Isa::kScalar; }
};
#define INSTANTIATE_ISAS(suite)                                              \
  INSTANTIATE_TEST_SUITE_P(Isas, suite, testing::ValuesIn(AvailableIsas()), \
                           [](const auto& isa) { return std::string(IsaName(isa.param)); })

}  // namespace lesskv
