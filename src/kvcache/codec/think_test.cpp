// What ThinK must show, through the store and the cache: which channels stay and why, that nothing else of a row
// changes, attention against float64, rows and bytes.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <numeric>

#include "base/checked.h"
#include "base/error.h"
#include "base/rng.h"
#include "kernels/basic/cpu.h"
#include "kvcache/codec/think_store.h"
#include "kvcache/sequence_cache.h"

namespace lesskv {
namespace {

constexpr size_t kHeads = 4, kKvHeads = 2;

LayerShape Shape(size_t dim) {
  return {kHeads,
          kKvHeads,
          dim,
          UsualScale(dim),
          std::make_shared<RopeTable>(RopeConfig{.n_dims = 0, .frequency_factors = {}}),
          0};
}

// Queries, keys and values of a text. Channels have sizes of their own, or all would matter alike.
struct Rows {
  size_t dim;
  std::vector<float> q, k, v;
  explicit Rows(size_t n, size_t d = 32) : dim(d) {
    Rng rng(7);
    for (auto* x : {&q, &k, &v}) x->resize(n * (x == &q ? kHeads : kKvHeads) * dim);
    for (auto* x : {&q, &k, &v})
      for (size_t i = 0; i < x->size(); ++i)
        (*x)[i] = rng.Normal() * (x == &v ? 1 : 0.2f + static_cast<float>(i % dim * 13 % dim) / 20);
  }
  std::span<float> Query(size_t t, size_t head) { return std::span(q).subspan((t * kHeads + head) * dim, dim); }
  std::span<float> Key(size_t t, size_t h) { return std::span(k).subspan((t * kKvHeads + h) * dim, dim); }
  std::span<const float> Key(size_t t, size_t h) const { return std::span(k).subspan((t * kKvHeads + h) * dim, dim); }
};

struct Step {
  size_t n = 1;
  bool is_prompt = false;
  size_t budget = 0;  // 0: nothing leaves
  std::vector<Departure> leaving = {};
};

// A store of one layer.
struct Subject {
  ByteCounter counter;
  LayerShape shape;
  std::unique_ptr<KvStore> store;
  size_t seen = 0;
  SlotMap map;  // of the last step, head 0
  std::vector<float> lse;

  Subject(const ThinkOptions& options, size_t dim = 32, const RowTypes& types = {RowType::kF32, RowType::kF32},
          bool grows = true)
      : shape(Shape(dim)) {
    const StoreShape s{{shape}, ComputeType::kF32, false, grows};
    if (options.ratio > 0)
      store = std::make_unique<ThinkStore>(counter, s, types, options);
    else
      store = std::make_unique<RowStore>(counter, s, types);
  }
  ThinkStore& think() { return static_cast<ThinkStore&>(*store); }
  std::vector<uint16_t> Channels(size_t h = 0) {
    const auto kept = think().kept_channels(0, h);
    return {kept.begin(), kept.end()};
  }

  // The outputs of its queries.
  std::vector<float> Take(const Rows& rows, const Step& step) {
    const size_t kv = shape.kv_dim(), qs = shape.q_dim();
    const std::vector<size_t> budgets(kKvHeads, step.budget);
    StepRoom room{.n_step = step.n, .evicts = step.budget > 0, .is_prompt = step.is_prompt, .budgets = {}};
    if (step.budget > 0) room.budgets = budgets;
    store->Reserve(room);
    store->Append(0, 0, step.n, &rows.k[seen * kv], &rows.v[seen * kv]);
    std::vector<float> out(step.n * qs);
    lse.assign(step.n * kHeads, 0);
    JobList list;
    StoreQuery query{.queries = &rows.q[seen * qs], .n_queries = step.n, .out = out.data(), .lse = lse.data()};
    store->AddJobs(query, list);
    Attend(list.jobs);
    store->Observe(query);
    store->Finish(query);
    for (size_t h = kKvHeads; h-- > 0;) map = store->Close(0, h, step.leaving);
    store->EndStep();
    seen += step.n;
    return out;
  }
  std::vector<float> Keys(size_t h, std::vector<uint32_t> rows) const {
    std::vector<float> keys(rows.size() * shape.head_dim), values(keys.size());
    store->ReadRows(0, h, rows, keys.data(), values.data());
    return keys;
  }
};

Step Prompt(size_t n) { return {.n = n, .is_prompt = true}; }

// |Q_j K_j^T|_F of each channel, from the outer product itself: the last 32 of n queries against n keys.
std::vector<double> OuterProducts(Rows rows, size_t n, size_t h) {
  std::vector<double> norms(rows.dim);
  for (size_t j = 0; j < rows.dim; ++j) {
    double sum = 0;
    for (size_t t = n - std::min<size_t>(n, 32); t < n; ++t)
      for (size_t g = 0; g < kHeads / kKvHeads; ++g)
        for (size_t s = 0; s < n; ++s)
          sum += std::pow(static_cast<double>(rows.Query(t, h * 2 + g)[j]) * rows.Key(s, h)[j], 2);
    norms[j] = std::sqrt(sum);
  }
  return norms;
}

std::vector<uint16_t> Largest(const std::vector<double>& scores, size_t n) {
  std::vector<uint16_t> order(scores.size());
  std::iota(order.begin(), order.end(), uint16_t{0});
  std::sort(order.begin(), order.end(), [&](uint16_t a, uint16_t b) { return scores[a] > scores[b]; });
  order.resize(n);
  std::sort(order.begin(), order.end());
  return order;
}

// Products that one can compute, and the rounding of the ratio.
TEST(Think, ChannelsByHand) {
  Rows rows(3, 4);
  std::fill(rows.q.begin(), rows.q.end(), 0.0f);
  const float q[2][4] = {{1, 2, 0, 1}, {1, 0, 2, 1}}, k[3][4] = {{1, 0, 2, 3}, {1, 1, 0, 3}, {1, 2, 1, 0}};
  for (size_t t = 0; t < 2; ++t) std::copy_n(q[t], 4, rows.Query(t, 0).begin());
  for (size_t t = 0; t < 3; ++t) std::copy_n(k[t], 4, rows.Key(t, 0).begin());
  for (const auto& [ratio, want] : {std::pair{0.25, std::vector<uint16_t>{1, 2, 3}}, {0.5, {2, 3}}}) {
    Subject subject({.ratio = ratio, .window = 1}, 4);
    subject.Take(rows, Prompt(3));
    EXPECT_EQ(subject.Channels(), want);
    EXPECT_EQ(subject.Keys(0, {0}), (std::vector<float>{0, 0, 2, 3}));
    EXPECT_EQ(subject.Keys(0, {1}), (ratio == 0.25 ? std::vector<float>{0, 1, 0, 3} : std::vector<float>{0, 0, 0, 3}));
    EXPECT_EQ(subject.Keys(0, {2}), (std::vector<float>{1, 2, 1, 0}));
  }
  EXPECT_EQ(ChooseChannels(std::vector<double>{1, std::nan(""), 1, 0}, 2), (std::vector<uint16_t>{0, 2}));
  size_t i = 0;
  for (const double ratio : {0.3, 0.4, 0.5, 0.6}) {
    EXPECT_EQ(128 - KeptChannels(ratio, 128, 1), (std::vector<size_t>{38, 51, 64, 76})[i]);
    EXPECT_EQ(64 - KeptChannels(ratio, 64, 1), (std::vector<size_t>{19, 25, 32, 38})[i++]);
  }
  EXPECT_EQ(KeptChannels(0.4, 128, ChannelUnit(RowType::kQ8)), 96u);
  EXPECT_EQ(KeptChannels(0.4, 128, 16), 80u);
  EXPECT_EQ(KeptChannels(0.4, 9, 16), 9u);
  EXPECT_EQ(KeptChannels(0, 128, ChannelUnit(RowType::kF16)), 128u);
}

// The largest outer products stay, the same ones for good, and with a smaller ratio more of them.
TEST(Think, TheLargestOuterProductsStay) {
  const Rows rows(300);
  std::vector<std::vector<uint16_t>> sets;
  for (const double ratio : {0.1, 0.4, 0.5, 0.7, 0.9}) {
    Subject subject({.ratio = ratio, .window = 16});
    subject.Take(rows, Prompt(150));
    const size_t kept = 32 - static_cast<size_t>(ratio * 32 + 1e-9);
    std::vector<std::vector<uint16_t>> chosen;
    for (size_t h = 0; h < kKvHeads; ++h) {
      EXPECT_EQ(subject.Channels(h), Largest(OuterProducts(rows, 150, h), kept)) << ratio;
      chosen.push_back(subject.Channels(h));
    }
    for (size_t i = 0; i < 60; ++i) subject.Take(rows, {});
    subject.Take(rows, Prompt(50));
    for (size_t h = 0; h < kKvHeads; ++h) EXPECT_EQ(subject.Channels(h), chosen[h]);
    if (ratio > 0.3 && ratio < 0.8) {
      EXPECT_NE(chosen[0], chosen[1]) << ratio;
    }
    for (const auto& more : sets)
      EXPECT_TRUE(std::includes(more.begin(), more.end(), chosen[0].begin(), chosen[0].end()));
    sets.push_back(chosen[0]);
  }
}

// The last 32 queries and no earlier one: the query before them asks for other channels, and would outweigh them.
TEST(Think, TheQueryBeforeTheLastOnesDoesNotCount) {
  for (const size_t n : {size_t{50}, size_t{520}}) {  // 520: the first of the last ones lies in another tile
    Rows rows(n);
    for (const size_t t : {n - 33, n - 32})
      for (size_t head = 0; head < kHeads; ++head)
        for (size_t c = 0; c < 32; ++c) rows.Query(t, head)[c] = t == n - 33 ? (c < 16 ? 1e4f : 0) : (c < 16 ? 0 : 1e2f);
    Subject subject({.ratio = 0.5, .window = 8});
    subject.Take(rows, Prompt(n));
    EXPECT_EQ(subject.Channels(), Largest(OuterProducts(rows, n, 0), 16));
    EXPECT_EQ(subject.Channels().front(), 16);
  }
}

// A text that begins token by token: all queries until there are rows to be pruned.
TEST(Think, ShortStepsAddUp) {
  const Rows rows(40);
  Subject subject({.ratio = 0.5, .window = 16});
  for (size_t t = 0; t < 16; ++t) {
    subject.Take(rows, {});
    EXPECT_TRUE(subject.Channels().empty());
  }
  subject.Take(rows, {});
  for (size_t h = 0; h < kKvHeads; ++h) EXPECT_EQ(subject.Channels(h), Largest(OuterProducts(rows, 17, h), 16));
}

TEST(Think, SizesAndOrderDoNotMatter) {
  Rows rows(30);
  const auto chosen = [&](const Rows& of) {
    Subject subject({.ratio = 0.5, .window = 8});
    subject.Take(of, Prompt(30));
    return subject.Channels();
  };
  const std::vector<uint16_t> want = chosen(rows);
  Rows queries = rows, keys = rows, turned = rows;
  for (float& x : queries.q) x *= -3;
  for (float& x : keys.k) x *= 0.125f;
  for (size_t t = 0; t < 30; ++t)
    for (size_t h = 0; h < kHeads; ++h) {
      std::copy(rows.Query(t, h).begin(), rows.Query(t, h).end(), turned.Query((t * 7 + 3) % 30, h).begin());
      if (h < kKvHeads)
        std::copy(rows.Key(t, h).begin(), rows.Key(t, h).end(), turned.Key((t * 11 + 5) % 30, h).begin());
    }
  EXPECT_EQ(chosen(queries), want);
  EXPECT_EQ(chosen(keys), want);
  EXPECT_EQ(chosen(turned), want);
}

// Rows as they came, but for the pruned channels of old keys, wherever a step ends.
TEST(Think, OnlyOldKeysLoseChannels) {
  const Rows rows(200);
  for (const bool full : {false, true}) {
    Subject subject({.ratio = 0.4, .window = 20, .generated_full = full});
    size_t generated = 0, prompts = 0;
    const auto check = [&] {
      const size_t old =
          full ? prompts - std::min<size_t>(prompts, 20) : subject.seen - std::min<size_t>(subject.seen, 20);
      for (size_t h = 0; h < kKvHeads; ++h) {
        ASSERT_EQ(subject.think().old_rows(0, h), old);
        ASSERT_EQ(subject.store->n_rows(0, h), subject.seen);
        const std::vector<uint16_t> kept = subject.Channels(h);
        for (uint32_t r = 0; r < subject.seen; ++r) {
          std::vector<float> want(rows.Key(r, h).begin(), rows.Key(r, h).end());
          for (uint16_t c = 0; c < 32 && r < old; ++c)
            if (!std::binary_search(kept.begin(), kept.end(), c)) want[c] = 0;
          ASSERT_EQ(subject.Keys(h, {r}), want) << "row " << r << " of " << subject.seen;
        }
      }
    };
    subject.Take(rows, Prompt(50)), prompts = 50, check();
    for (; generated < 45; ++generated) subject.Take(rows, {}), check();
    subject.Take(rows, {.n = 3}), check();
    subject.Take(rows, Prompt(30)), prompts = subject.seen, check();
    for (size_t i = 0; i < 3; ++i) subject.Take(rows, {}), check();
  }
}

// Softmax attention in double over what ReadRows gives before a single token; fills lse.
std::vector<double> Exact(const Subject& subject, const Rows& rows, size_t token, std::vector<double>& lse) {
  const LayerShape& shape = subject.shape;
  const size_t n = subject.store->n_rows(0, 0), d = shape.head_dim;
  std::vector<double> out(shape.q_dim());
  lse.clear();
  for (size_t head = 0; head < shape.n_heads; ++head) {
    const size_t h = head / shape.group();
    std::vector<uint32_t> all(n);
    std::iota(all.begin(), all.end(), 0u);
    std::vector<float> keys((n + 1) * d), values((n + 1) * d);
    subject.store->ReadRows(0, h, all, keys.data(), values.data());
    std::copy_n(&rows.k[(token * kKvHeads + h) * d], d, &keys[n * d]);
    std::copy_n(&rows.v[(token * kKvHeads + h) * d], d, &values[n * d]);
    std::vector<double> p(n + 1);
    double sum = 0;
    for (size_t r = 0; r <= n; ++r) {
      for (size_t c = 0; c < d; ++c) p[r] += double(rows.q[(token * kHeads + head) * d + c]) * keys[r * d + c];
      sum += p[r] = std::exp(p[r] * shape.scale);
    }
    lse.push_back(std::log(sum));
    for (size_t r = 0; r <= n; ++r)
      for (size_t c = 0; c < d; ++c) out[head * d + c] += p[r] / sum * values[r * d + c];
  }
  return out;
}

double Deviation(const std::vector<float>& x, const std::vector<double>& want) {
  double error = 0, power = 0;
  for (size_t i = 0; i < x.size(); ++i) error += std::pow(x[i] - want[i], 2), power += want[i] * want[i];
  return error / power;
}

// For every row type and instruction set; the scale is that of whole keys. Longer steps agree with single tokens.
TEST(Think, AttentionIsThatOfZeroedKeys) {
  for (const Isa isa : AvailableIsas()) {
    ForceIsa(isa);
    for (const RowTypes& types : {RowTypes{RowType::kF32, RowType::kF32},
                                  {RowType::kF16, RowType::kF16},
                                  {RowType::kBF16, RowType::kBF16},
                                  {RowType::kQ8, RowType::kQ8},
                                  {RowType::kQ4, RowType::kQ4},
                                  {RowType::kQ8, RowType::kF16}}) {
      SCOPED_TRACE(testing::Message() << IsaName(isa) << ", " << Name(types.keys) << " " << Name(types.values));
      const Rows rows(1500, 64);
      Subject subject({.ratio = 0.5}, 64, types);
      subject.Take(rows, Prompt(1300));
      // The token's own row is stored in the codec's type, the oracle has it as it came.
      const double bound = types.keys == RowType::kF32 ? 1e-10 : types.keys == RowType::kF16 ? 1e-7 : 1e-4;
      for (size_t i = 0; i < 3; ++i) {
        std::vector<double> lse;
        const std::vector<double> want = Exact(subject, rows, subject.seen, lse);
        EXPECT_LE(Deviation(subject.Take(rows, {}), want), bound);
        for (size_t h = 0; h < kHeads; ++h) EXPECT_NEAR(subject.lse[h / 2 * 2 + h % 2], lse[h], std::sqrt(bound));
      }
      for (const size_t n : {size_t{4}, size_t{9}}) {
        std::vector<double> lse;
        const std::vector<double> want = Exact(subject, rows, subject.seen, lse);
        std::vector<float> out = subject.Take(rows, {.n = n});
        out.resize(kHeads * 64);
        EXPECT_LE(Deviation(out, want), bound);
      }
    }
  }
  ForceIsa(BestIsa());
}

// What is zero in the keys, or in every query, is not missed.
TEST(Think, UnusedChannelsAreNotMissed) {
  for (const bool in_keys : {false, true}) {
    Rows rows(150);
    for (size_t t = 0; t < 150; ++t)
      for (size_t h = 0; h < (in_keys ? kKvHeads : kHeads); ++h)
        for (size_t c = 1; c < 32; c += 2) (in_keys ? rows.Key(t, h) : rows.Query(t, h))[c] = 0;
    Subject think({.ratio = 0.5, .window = 8}), whole({.ratio = 0});
    for (const Step& step : {Prompt(100), Step{}, Step{}, Step{.n = 7}, Step{}}) {
      const std::vector<float> want = whole.Take(rows, step);
      EXPECT_LE(Deviation(think.Take(rows, step), {want.begin(), want.end()}), 1e-12);
    }
    EXPECT_EQ(think.Channels()[1], 2);
  }
}

// The bits of whole rows until there are more than the window, and of a prompt always.
TEST(Think, NothingIsPrunedBeforeTheWindowIsFull) {
  const Rows rows(100);
  Subject think({.ratio = 0.5}), whole({.ratio = 0});
  EXPECT_EQ(think.Take(rows, Prompt(20)), whole.Take(rows, Prompt(20)));
  for (size_t i = 0; i < 13; ++i) EXPECT_EQ(think.Take(rows, {}), whole.Take(rows, {}));
  EXPECT_NE(think.Take(rows, {}), whole.Take(rows, {}));
  Subject long_think({.ratio = 0.9, .window = 4}), long_whole({.ratio = 0});
  EXPECT_EQ(long_think.Take(rows, Prompt(90)), long_whole.Take(rows, Prompt(90)));
}

// No row is padded, whatever its width; blocks and tiles are, and count as slack.
TEST(Think, BytesAreThoseOfTheRows) {
  constexpr size_t kDim = 128, kPrompt = 2048, kKept = 77;
  const Rows rows(kPrompt + 4, kDim);
  Subject subject({.ratio = 0.4}, kDim, {});
  subject.Take(rows, Prompt(kPrompt));
  const size_t old = kPrompt - 32, blocks = RoundUp(old, kBlockRows), channels = kKvHeads * kKept * 2;
  EXPECT_EQ(subject.counter.now, kKvHeads * (blocks * (kKept + kDim) * 2 + 32 * kDim * 4) + channels);
  const size_t needed = subject.counter.now - channels - subject.store->SlackBytes({});
  EXPECT_EQ(needed, kKvHeads * (old * (kKept + kDim) + 32 * kDim * 2) * 2);
  EXPECT_NEAR(static_cast<double>(needed) / static_cast<double>(kPrompt * kKvHeads * kDim * 4), 0.804, 5e-4);
}

// A smaller budget whose victims are all of the window: old rows take their places there, as zeroed keys.
TEST(Think, OldRowsGoBackWhereTheWindowIsShort) {
  const Rows rows(60);
  Subject subject({.ratio = 0.5, .window = 8}, 32, {RowType::kF32, RowType::kF32}, false);
  Step prompt{.n = 40, .is_prompt = true, .budget = 24};
  for (uint32_t r = 0; r < 16; ++r) prompt.leaving.push_back({r * 2, Fate::kDrop});
  subject.Take(rows, prompt);
  ASSERT_EQ(subject.think().old_rows(0, 0), 16u);
  std::vector<std::vector<float>> before;
  for (uint32_t r = 0; r < 24; ++r) before.push_back(subject.Keys(0, {r}));
  Step next{.n = 1, .is_prompt = true, .budget = 20};
  for (const uint32_t r : {3, 15, 19, 20, 24}) next.leaving.push_back({r, Fate::kDrop});
  before.emplace_back(rows.Key(40, 0).begin(), rows.Key(40, 0).end());
  subject.Take(rows, next);
  EXPECT_EQ(subject.think().old_rows(0, 0), 12u);
  EXPECT_EQ(subject.store->n_rows(0, 0), 20u);
  ASSERT_TRUE(subject.map.at_once);
  std::vector<uint32_t> from(20);
  std::iota(from.begin(), from.end(), 0u);
  for (const RowMove& move : subject.map.moves) from[move.to] = move.from;
  for (uint32_t r = 0; r < 20; ++r) EXPECT_EQ(subject.Keys(0, {r}), before[from[r]]) << r;
  std::vector<double> lse;
  const std::vector<double> want = Exact(subject, rows, subject.seen, lse);
  Step last{.n = 1, .budget = 20};
  last.leaving.push_back({0, Fate::kDrop});
  EXPECT_LE(Deviation(subject.Take(rows, last), want), 1e-10);
}

std::shared_ptr<const CacheConfig> Config(const std::string& spec, size_t dim = 32) {
  return CacheConfig::Create(CacheSpec::Parse(spec), CacheShape::Uniform(1, kHeads, kKvHeads, dim, 240,
                                                                         {.n_dims = dim, .frequency_factors = {}}));
}

// The canonical form, and what cannot be combined.
TEST(Think, RefusesWhatCannotWork) {
  EXPECT_EQ(CacheSpec::Parse("think+h2o(5%)").ToString(), "h2o(5%)+think");
  const auto message = [](const std::string& spec, size_t dim) {
    try {
      Config(spec, dim);
    } catch (const Error& error) {
      return std::string(error.what());
    }
    return std::string();
  };
  for (const auto& [spec, why] : {std::pair<const char*, const char*>{"csr+think", "does not keep apart"},
                                  {"q8(rotate=true)+think", "does not keep apart"},
                                  {"h2o(5%)+less+think", "does not give back whole keys, which 'less' needs"},
                                  {"snapkv(64)+match+think", "match"},
                                  {"h2o(5%)+merge+think", "merge"},
                                  {"window(64, positions=cache)+think", "re-numbers positions"},
                                  {"cascade(64)+think", "re-numbers positions"},
                                  {"think(generated=full)+prefill(chunk=64)", "end of a prompt only"},
                                  {"h2o(64)+think(generated=full)", "bounds the rows"},
                                  {"elastic(0.9, merge=off)+think(generated=full)", "bounds the rows"},
                                  {"think(1)", "ratio"},
                                  {"think(window=0)", "window"}})
    EXPECT_NE(message(spec, 64).find(why), std::string::npos) << spec << ": " << message(spec, 64);
  for (const char* spec :
       {"think", "h2o(64)+q8+think(0.5)", "snapkv(64)+think(generated=full)", "think+prefill(chunk=64)",
        "window(64)+think", "cascade(64, positions=true)+think", "h2o(64)+zigzag+ada+think"})
    EXPECT_EQ(message(spec, 64), "") << spec;
  EXPECT_NE(message("q8+think(0.4)", 32).find("would prune nothing"), std::string::npos);
}

TEST(Think, NoRatioIsNoThink) {
  const Rows rows(120);
  SequenceCache think(Config("f32+think(0)")), whole(Config("f32"));
  for (const size_t n : {90, 1, 1, 5}) {
    std::vector<float> a(n * kHeads * 32), b = a;
    for (auto& [cache, out] : {std::pair{&think, &a}, {&whole, &b}}) {
      const size_t seen = cache->tokens_seen();
      cache->BeginStep(n, n == 90 ? StepKind::kPrompt : StepKind::kDecode);
      cache->Append(0, &rows.k[seen * kKvHeads * 32], &rows.v[seen * kKvHeads * 32]);
      cache->Attend(0, &rows.q[seen * kHeads * 32], out->data());
      cache->EndStep();
    }
    EXPECT_EQ(a, b);
  }
  EXPECT_EQ(think.Stats().kv_bytes, whole.Stats().kv_bytes);
}

}  // namespace
}  // namespace lesskv
