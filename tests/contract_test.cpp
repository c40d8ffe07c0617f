// What every cache promises, whatever its spec: tested for each registered method, alone and in every legal pair, on
// tiny random texts with multi-head, grouped and multi-query attention and odd head sizes.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <optional>
#include <set>

#include "base/error.h"
#include "base/threads.h"
#include "cache_harness.h"
#include "kvcache/cache_batch.h"
#include "kvcache/registry.h"

namespace lesskv {
namespace {

using namespace testing_support;  // NOLINT

// Calls test(spec, shape, sidecar) for all legal specs of all tiny shapes.
void ForEachSpec(const std::function<void(const std::string&, const TinyShape&, const TempSidecar&)>& test) {
  for (const TinyShape& shape : kTinyShapes) {
    const TempSidecar sidecar(shape);
    for (const std::string& spec : LegalSpecs(shape)) {
      SCOPED_TRACE(spec + ", " + shape.Name());
      test(spec, shape, sidecar);
      if (testing::Test::HasFatalFailure()) return;
    }
  }
}

// Feeds a life from token `first` on; the outputs of each of its steps.
std::vector<Outputs> LiveAll(SequenceCache& cache, const Text& text, const std::vector<LifeStep>& life,
                             size_t first = 0) {
  std::vector<Outputs> all;
  for (const LifeStep& step : life) {
    all.push_back(Live(cache, text, first, step));
    first += step.n;
  }
  return all;
}

void ExpectSameLives(const std::vector<Outputs>& a, const std::vector<Outputs>& b) {
  ASSERT_EQ(a.size(), b.size());
  for (size_t i = 0; i < a.size(); ++i) EXPECT_TRUE(Same(a[i], b[i])) << "step " << i;
}

// The heads' shares depend on the prompt; their sum does not.
bool DividesBudgets(const std::string& spec) {
  const CacheSpec parsed = CacheSpec::Parse(spec);
  return parsed.Find(Stage::kBudget) != nullptr || parsed.Find(Stage::kShare) != nullptr ||
         TraitsOf(*parsed.Find(Stage::kSelect)).divides_rows;
}

// How many rows stay depends on the text.
bool SaysHowMany(const std::string& spec) {
  return TraitsOf(*CacheSpec::Parse(spec).Find(Stage::kSelect)).says_how_many;
}

bool Evicts(const std::string& spec) { return TraitsOf(*CacheSpec::Parse(spec).Find(Stage::kSelect)).evicts; }

// The machine's other cores are not ours: with one thread no test waits for a pool.
class OneThread : public testing::Environment {
 public:
  void SetUp() override { scope_.emplace(pool_); }
  void TearDown() override { scope_.reset(); }

 private:
  const ThreadPool pool_{1};
  std::optional<ThreadScope> scope_;
};
const auto* const kOneThread = testing::AddGlobalTestEnvironment(new OneThread);

TEST(Contract, ListCoversEveryMethod) {
  const auto specs = LegalSpecs(kTinyShapes[3]);
  EXPECT_GT(specs.size(), 60u);
  for (const Method* method : Methods()) {
    if (method->name == DefaultTerm(method->stage)) continue;  // left out of canonical specs
    const bool used = std::any_of(specs.begin(), specs.end(), [&](const std::string& spec) {
      return CacheSpec::Parse(spec).Find(method->name) != nullptr;
    });
    EXPECT_TRUE(used) << method->name;
  }
}

// Both read tokens [0, n) in one batch, the second with the first as its leader; the outputs of the first.
Outputs ReadTogether(SequenceCache& leader, SequenceCache& other, const TinyShape& shape, const Text& text, size_t n) {
  SequenceCache* caches[] = {&leader, &other};
  const size_t leaders[] = {0, 0};
  for (SequenceCache* cache : caches) cache->BeginStep(n, StepKind::kPrompt);
  CacheBatch batch;
  batch.Start(caches, leaders);
  const Outputs outputs = RunLayers(batch, shape, text, 0, n);
  for (size_t i = 0; i < 2; ++i) EXPECT_EQ(batch.failure(i), nullptr);
  for (SequenceCache* cache : caches) {
    cache->EndStep();
    cache->EndPrompt();
  }
  return outputs;
}

// Caches that read prompts alike give the same bits behind them, and hold the same as each alone when they read together.
TEST(Contract, PromptsAreReadTogether) {
  const Text text = RandomText(kTinyShapes[3], 60, 12);
  const TempSidecar sidecar(kTinyShapes[3]);
  const CacheShape shape = MakeCacheShape(kTinyShapes[3]);
  std::vector<std::shared_ptr<const CacheConfig>> leaders;
  size_t n_together = 0;
  for (const std::string& spec : LegalSpecs(kTinyShapes[3])) {
    SCOPED_TRACE(spec);
    const auto config = CacheConfig::Create(CacheSpec::Parse(spec), shape, {}, sidecar.source());
    const auto leads = std::ranges::find_if(leaders, [&](const auto& leader) { return config->ReadsPromptsAs(*leader); });
    if (leads == leaders.end()) {
      leaders.push_back(config);
      continue;
    }
    ++n_together;
    SequenceCache leader(*leads), leader_alone(*leads), other(config), alone(config);
    const Outputs outputs = ReadTogether(leader, other, kTinyShapes[3], text, 50);
    ASSERT_TRUE(Same(outputs, Live(leader_alone, text, 0, {50, StepKind::kPrompt})));
    ASSERT_TRUE(Same(outputs, Live(alone, text, 0, {50, StepKind::kPrompt})));
    ASSERT_EQ(leader.Serialize(), leader_alone.Serialize());
    ASSERT_EQ(other.Serialize(), alone.Serialize());
    for (size_t i = 50; i < 60; ++i)
      ASSERT_TRUE(Same(Feed(other, text, i, 1, StepKind::kDecode), Feed(alone, text, i, 1, StepKind::kDecode)));
  }
  EXPECT_GT(n_together, 30u);
}

// Caches of models whose layers differ do not.
TEST(Contract, PromptsOfOtherLayersAreReadApart) {
  const CacheShape shape = MakeCacheShape(kTinyShapes[3]);
  const auto config_of = [](const CacheShape& of) { return CacheConfig::Create(CacheSpec::Parse("h2o(12)"), of); };
  const auto config = config_of(shape);
  EXPECT_TRUE(config_of(shape)->ReadsPromptsAs(*config));
  CacheShape rope = shape, window = shape, scale = shape, compute = shape;
  rope.layers[1].rope = std::make_shared<RopeTable>(RopeConfig{.n_dims = 32, .base = 7.0, .frequency_factors = {}});
  window.layers[1].window = 9;
  scale.layers[1].scale *= 2;
  compute.compute = shape.compute == ComputeType::kF32 ? ComputeType::kBF16 : ComputeType::kF32;
  for (const CacheShape* other : {&rope, &window, &scale, &compute})
    EXPECT_FALSE(config_of(*other)->ReadsPromptsAs(*config)) << other - &rope;
  CacheShape local = window, longer = window;
  longer.layers[1].window = 10;
  EXPECT_FALSE(config_of(longer)->ReadsPromptsAs(*config_of(local)));
}

// A step that is longer than a tile of queries: where a cache has a leader, tiles that nothing observes are left out.
TEST(Contract, LongPromptsAreReadTogether) {
  TinyShape tiny = kTinyShapes[3];
  tiny.ctx = 1400;
  Text text = RandomText(tiny, 1210, 13);
  for (float& x : text.q[0]) x *= 0.05f;  // so that budgets differ between layers
  const TempSidecar sidecar(tiny);
  const CacheShape shape = MakeCacheShape(tiny);
  const auto full = CacheConfig::Create(CacheSpec::Parse("full"), shape);
  for (const char* spec : {"full", "window(40)", "h2o(40)+less", "snapkv(40, window=30)", "snapkv(740, window=700)+ada",
                           "tova(40)", "tova(40)+zigzag", "window(40)+zigzag", "kvzap(40, scope=head)", "elastic(0.2)", "full+kivi(2)"}) {
    SCOPED_TRACE(spec);
    const auto config = CacheConfig::Create(CacheSpec::Parse(spec), shape, {}, sidecar.source());
    ASSERT_TRUE(config->ReadsPromptsAs(*full));
    SequenceCache leader(full), other(config), alone(config);
    const Outputs outputs = ReadTogether(leader, other, tiny, text, 1200);
    ASSERT_TRUE(Same(outputs, Live(alone, text, 0, {1200, StepKind::kPrompt})));
    ASSERT_EQ(other.Serialize(), alone.Serialize());
    for (size_t i = 1200; i < 1210; ++i)
      ASSERT_TRUE(Same(Feed(other, text, i, 1, StepKind::kDecode), Feed(alone, text, i, 1, StepKind::kDecode)));
  }
}

// Rule 1 and the budget: resident tokens are tokens seen, none twice, none comes back, and each of the others is counted once
// by what became of it; never more than the budget.
TEST(Contract, NothingReturnsAndBudgetsHold) {
  ForEachSpec([](const std::string& spec, const TinyShape& shape, const TempSidecar& sidecar) {
    const auto config = MakeConfig(spec, shape, sidecar);
    SequenceCache cache(config);
    const Text text = RandomText(shape, 120, 3);
    std::vector<std::vector<int32_t>> before(shape.n_layers * shape.n_kv_heads);
    size_t seen = 0;
    for (const LifeStep& step : UsualLife()) {
      for (const auto& layer : Live(cache, text, seen, step))
        for (float x : layer) ASSERT_TRUE(std::isfinite(x));
      const size_t had = seen;
      seen += step.n;
      ASSERT_EQ(cache.tokens_seen(), seen);
      const auto now = AllResident(cache, shape);
      const bool evicts = config->global().selector->EvictsIn(step.kind);
      const LayerPolicy& policy = config->global();
      const size_t n = config->prefill_chunk() > 0 || seen < 60 ? 45 : seen;
      const auto budgets = evicts ? policy.Budgets(policy.selector->After(step.kind, seen).rows, n) : config->Budgets(n);
      double rows = 0;
      for (size_t i = 0; i < now.size(); ++i) {
        ASSERT_TRUE(std::is_sorted(now[i].begin(), now[i].end()));
        ASSERT_EQ(std::adjacent_find(now[i].begin(), now[i].end()), now[i].end());
        for (int32_t p : now[i]) {
          ASSERT_GE(p, 0);
          ASSERT_LT(static_cast<size_t>(p), seen);
          if (static_cast<size_t>(p) < had) {
            ASSERT_TRUE(std::binary_search(before[i].begin(), before[i].end(), p)) << p << " came back";
          }
        }
        rows += static_cast<double>(now[i].size());
        if (!Evicts(spec)) {
          ASSERT_EQ(now[i].size(), seen);
        }
        if (SaysHowMany(spec)) {
          ASSERT_LE(now[i].size(), policy.RowsThatStay(seen, budgets[i]));
          ASSERT_GE(now[i].size(), policy.RowsThatAlwaysStay(seen));
        } else if (evicts && !DividesBudgets(spec)) {
          ASSERT_EQ(now[i].size(), config->global().RowsThatStay(seen, budgets[i]));
        } else if (Evicts(spec) && !evicts) {
          ASSERT_EQ(now[i].size(), before[i].size() + step.n);
        }
      }
      if (evicts) {
        size_t total = 0;
        for (size_t b : budgets) total += b;
        ASSERT_LE(rows, static_cast<double>(total));
        if (step.kind == StepKind::kPrompt && config->prefill_chunk() == 0 && total <= seen * now.size() / 2 &&
            config->global().codec->traits().group_rows == 1 && policy.bunches().rows == 1 && !SaysHowMany(spec)) {
          ASSERT_EQ(rows, static_cast<double>(total));
        }
      }
      const CacheStats stats = cache.Stats();
      ASSERT_DOUBLE_EQ(stats.tokens_resident + stats.tokens_offloaded, rows / static_cast<double>(now.size()));
      const double left = stats.tokens_dropped + stats.tokens_absorbed + stats.tokens_merged;
      ASSERT_NEAR(stats.tokens_resident + stats.tokens_offloaded + left, static_cast<double>(seen), 1e-9 * static_cast<double>(seen));
      ASSERT_EQ(stats.tokens_seen, seen);
      ASSERT_EQ(stats.kv_bytes_full, seen * shape.n_layers * shape.n_kv_heads * shape.head_dim * 4);
      before = now;
    }
  });
}

// The bytes a plan names are those that the same life then takes, or around them where they depend on the text.
TEST(Contract, PlanEqualsWhatIsTaken) {
  ForEachSpec([](const std::string& spec, const TinyShape& shape, const TempSidecar& sidecar) {
    const auto config = MakeConfig(spec, shape, sidecar);
    const Text text = RandomText(shape, 240, 4);
    for (const auto& [n_prompt, n_decode] :
         {std::pair<size_t, size_t>{45, 30}, {45, 0}, {3, 40}, {1, 1}, {0, 20}, {16, 1}, {200, 33}}) {
      SCOPED_TRACE(testing::Message() << n_prompt << " + " << n_decode << " tokens");
      const CachePlan plan = config->Plan(n_prompt, n_decode);
      SequenceCache cache(config);
      if (n_prompt > 0) Live(cache, text, 0, {n_prompt, StepKind::kPrompt});
      if (SaysHowMany(spec)) {
        EXPECT_LE(cache.Stats().kv_bytes, plan.bytes_after_prompt);
      } else {
        EXPECT_EQ(cache.Stats().kv_bytes, plan.bytes_after_prompt);
      }
      for (size_t i = 0; i < n_decode; ++i) Feed(cache, text, n_prompt + i, 1, StepKind::kDecode);
      if (SaysHowMany(spec)) {
        EXPECT_LE(cache.Stats().kv_bytes, plan.bytes_end);
        EXPECT_GE(cache.Stats().kv_bytes, plan.bytes_end_least);
        EXPECT_LE(cache.Stats().kv_bytes_peak, plan.bytes_peak);
        EXPECT_LE(cache.Stats().tokens_resident, plan.rows_end);
        EXPECT_GE(cache.Stats().tokens_resident, plan.rows_end_least);
        continue;
      }
      EXPECT_EQ(plan.bytes_end_least, plan.bytes_end);
      EXPECT_EQ(cache.Stats().kv_bytes, plan.bytes_end);
      EXPECT_EQ(cache.Stats().kv_bytes_peak, plan.bytes_peak);
      EXPECT_DOUBLE_EQ(cache.Stats().tokens_resident, plan.rows_end);
    }
  });
}

// Rule 4. A budget that nothing exceeds changes no bit of what `full` computes with the same codec and steps.
TEST(Contract, NothingEvictedEqualsFull) {
  for (const TinyShape& shape : kTinyShapes) {
    const TempSidecar sidecar(shape);
    const Text text = RandomText(shape, 120, 5);
    for (const Method* select : Methods()) {
      if (select->stage != Stage::kSelect || select->name == "full") continue;
      for (const char* rest : {"+f32", "+f16", "+bf16", "+f32+less", "+f16+pyramid", "+f16+zigzag", "+f32+split", "+f32+ada", "+f32+prefill(chunk=7)", "+f32+merge",
                               "+f32+match", "+kivi(2, group=16, window=32)",
                               "+kivi(k=4, v=2, group=16, window=32)+prefill(chunk=7)", "+kivi(4, group=16, window=16)+think(0.5)", "+csr(4, window=9)",
                               "+csr(4, sample=8, guard=7)+prefill(chunk=7)", "+balanced(2, group=16, window=32)",
                               "+balanced(3, group=16, window=20, sinks=5)+prefill(chunk=7)"}) {
        std::string rows = select->name == "cascade" ? "(200, positions=true)" : select->name == "elastic" ? "(1)" : "(200)";
        const auto has = [&](const char* term) { return std::string(rest).find(term) != std::string::npos; };
        const bool in_groups = has("kivi") || has("balanced");
        if (select->name == "kvzap" && (in_groups || has("csr"))) rows = "(200, scope=head)";
        const MethodTraits traits = TraitsOf(ParseTerm(std::string(select->name) + rows));
        if ((in_groups || has("csr")) && shape.head_dim % 16 != 0) continue;
        if (traits.needs_known_rows && (has("zigzag") || has("ada"))) continue;
        if (in_groups && (traits.needs_rewrites || traits.needs_single_rows)) continue;
        if (has("csr") && traits.needs_rewrites) continue;
        if ((has("prefill") && !traits.acts_in_stream) || (has("match") && traits.takes_no_fit) ||
            ((has("pyramid") || has("zigzag") || has("split") || has("ada")) && traits.same_rows))
          continue;
        if (has("ada") && Conflict(*select, *FindMethod("ada"))) continue;
        const std::string spec = std::string(select->name) + rows + rest;
        SCOPED_TRACE(spec + ", " + shape.Name());
        const CacheSpec parsed = CacheSpec::Parse(spec);
        std::string full = "full";
        for (const char* kept : {"f32", "f16", "bf16", "kivi", "balanced", "think", "csr", "prefill"})
          if (const SpecTerm* term = parsed.Find(kept)) full += "+" + ToString(*term);
        SequenceCache a(MakeConfig(spec, shape, sidecar)), b(MakeConfig(full, shape, sidecar));
        ExpectSameLives(LiveAll(a, text, UsualLife()), LiveAll(b, text, UsualLife()));
      }
    }
    // Keys stored unrotated: to rounding.
    SequenceCache full(MakeConfig("full+f32", shape, sidecar));
    const auto want = LiveAll(full, text, UsualLife());
    for (const char* spec : {"window(200, positions=cache)+f32", "cascade(200)+f32", "cascade(200, levels=7)+f32"}) {
      SequenceCache cache(MakeConfig(spec, shape, sidecar));
      const auto got = LiveAll(cache, text, UsualLife());
      for (size_t i = 0; i < got.size(); ++i)
        for (size_t l = 0; l < shape.n_layers; ++l) EXPECT_LT(RelativeError(got[i][l], want[i][l]), 1e-5) << i;
    }
  }
}

// A threshold that every score reaches is the full cache, one that none reaches a window, bit for bit.
TEST(Contract, ThresholdsAtTheEndsAreFullAndAWindow) {
  for (const TinyShape& shape : kTinyShapes) {
    const TempSidecar sidecar(shape);
    const Text text = RandomText(shape, 120, 5);
    for (const std::string rest : {"+f32", "+f32+prefill(chunk=7)", "+f16", "+f32+less"}) {
      SCOPED_TRACE(rest + ", " + shape.Name());
      const auto live = [&](const std::string& spec) {
        SequenceCache cache(MakeConfig(spec + rest, shape, sidecar));
        return LiveAll(cache, text, UsualLife());
      };
      if (rest != "+f32+less") ExpectSameLives(live("kvzap(threshold=-1000000)"), live("full"));
      ExpectSameLives(live("kvzap(threshold=1000000, window=10, sinks=2)"), live("window(12, sinks=2)"));
    }
  }
}

// How a text is cut into steps does not matter to the full cache, and not to a window whose tokens all stay.
TEST(Contract, FullIsTheSameInAnySteps) {
  for (const TinyShape& shape : kTinyShapes) {
    const TempSidecar sidecar(shape);
    const Text text = RandomText(shape, 150, 6);
    const auto run = [&](const std::string& spec, size_t chunk, StepKind kind) {
      SequenceCache cache(MakeConfig(spec, shape, sidecar));
      Outputs all(shape.n_layers);
      for (size_t first = 0; first < text.n; first += chunk) {
        const Outputs part = Feed(cache, text, first, std::min(chunk, text.n - first), kind);
        for (size_t l = 0; l < shape.n_layers; ++l) all[l].insert(all[l].end(), part[l].begin(), part[l].end());
      }
      return all;
    };
    const Outputs want = run("full+f32", text.n, StepKind::kPrompt);
    for (const char* spec : {"full+f32", "window(200)+f32", "window(200, positions=cache)+f32", "cascade(200)+f32",
                             "h2o(200)+f32+less"})
      for (const auto& [chunk, kind] : {std::pair{size_t{1}, StepKind::kDecode},
                                        {7, StepKind::kStream},
                                        {16, StepKind::kStream},
                                        {64, StepKind::kDecode},
                                        {150, StepKind::kStream}}) {
        const Outputs got = run(spec, chunk, kind);
        for (size_t l = 0; l < shape.n_layers; ++l)
          EXPECT_LT(RelativeError(got[l], want[l]), 1e-5) << spec << " in steps of " << chunk;
      }
  }
}

// Prompt outputs are exact for every method: a prompt is attended in full before anything leaves.
TEST(Contract, OneShotPromptIsAttendedInFull) {
  ForEachSpec([](const std::string& spec, const TinyShape& shape, const TempSidecar& sidecar) {
    const CacheSpec parsed = CacheSpec::Parse(spec);
    if (parsed.Find("prefill") != nullptr || spec.find("positions=cache") != std::string::npos ||
        spec.find("unrotated") != std::string::npos ||
        (parsed.Find("cascade") != nullptr && spec.find("positions=true") == std::string::npos))
      return;
    std::string full = "full";
    for (const SpecTerm& term : parsed.terms())
      if (FindMethod(term.name)->stage == Stage::kCodec) full += "+" + ToString(term);
    if (parsed.Find("recent") != nullptr) {  // a prompt's own rows are whole until it has been attended
      if (spec.find("rotate=true") != std::string::npos) return;
      for (const char* coded : {"q8", "q4"})
        if (const size_t at = full.find(coded); at != std::string::npos) full.replace(at, 2, "f16");
    }
    const Text text = RandomText(shape, 60, 8);
    SequenceCache a(MakeConfig(spec, shape, sidecar)), b(MakeConfig(full, shape, sidecar));
    EXPECT_TRUE(Same(Feed(a, text, 0, 60, StepKind::kPrompt), Feed(b, text, 0, 60, StepKind::kPrompt))) << full;
  });
}

// Rule 6. With all scores equal no score can hold a protected token; only the set can.
TEST(Contract, ProtectedTokensStay) {
  const std::vector<ProtectedSpan> protect = {{17, 19}, {5, 6}};
  ForEachSpec([&](const std::string& spec, const TinyShape& shape, const TempSidecar& sidecar) {
    if (!Evicts(spec)) return;
    std::shared_ptr<const CacheConfig> config;
    try {
      config = MakeConfig(spec, shape, sidecar, protect);
    } catch (const Error& error) {
      // Refused where it does not fit: some layer has no three rows beside its window.
      EXPECT_NE(std::string(error.what()).find("protected"), std::string::npos) << error.what();
      EXPECT_TRUE(spec.find("pyramid") != std::string::npos || spec == "h2o(heavy=0, recent=11)+f32" ||
                  spec == "tova(1)+f32" || spec.find("kivi") != std::string::npos ||
                  spec.find("balanced") != std::string::npos)
          << error.what();
      return;
    }
    for (const bool one_by_one : {false, true}) {
      SequenceCache cache(config);
      Text text = RandomText(shape, 120, 9);
      for (auto& k : text.k) std::fill(k.begin(), k.end(), 0.0f);
      size_t seen = 0;
      auto life = UsualLife();
      if (one_by_one) life.assign(95, {1, StepKind::kStream});
      for (const LifeStep& step : life) {
        Live(cache, text, seen, step);
        seen += step.n;
        for (const auto& held : AllResident(cache, shape))
          for (int32_t p : {5, 17, 18}) {
            if (static_cast<size_t>(p) >= seen) continue;
            ASSERT_TRUE(std::binary_search(held.begin(), held.end(), p)) << p << " after " << seen;
          }
      }
    }
  });
}

// A config with other spans is what is made anew with them. It reads no file, and needs the first one no more.
TEST(Contract, OtherSpansAreAsMadeWithThem) {
  const std::vector<ProtectedSpan> protect = {{17, 19}, {5, 6}};
  const TinyShape& shape = kTinyShapes[3];
  struct Pair {
    std::string spec;
    std::shared_ptr<const CacheConfig> base, wanted;  // wanted: null where the spans do not fit
  };
  std::vector<Pair> pairs;
  {
    const TempSidecar sidecar(shape);
    for (const std::string& spec : LegalSpecs(shape)) {
      pairs.push_back({spec, MakeConfig(spec, shape, sidecar), nullptr});
      try {
        pairs.back().wanted = MakeConfig(spec, shape, sidecar, protect);
      } catch (const Error&) {
      }
    }
  }
  const Text text = RandomText(shape, 120, 9);
  for (Pair& pair : pairs) {
    SCOPED_TRACE(pair.spec);
    if (pair.wanted == nullptr) {
      EXPECT_THROW(pair.base->WithProtected(protect), Error);
      continue;
    }
    std::shared_ptr<const CacheConfig> made = pair.base->WithProtected(protect);
    ASSERT_TRUE(pair.base->protect().empty());
    pair.base.reset();
    ASSERT_EQ(made->spec_text(), pair.wanted->spec_text());
    ASSERT_EQ(made->prefill_chunk(), pair.wanted->prefill_chunk());
    SequenceCache a(made), b(pair.wanted);
    made.reset();
    ExpectSameLives(LiveAll(a, text, UsualLife()), LiveAll(b, text, UsualLife()));
    EXPECT_TRUE(a.Serialize() == b.Serialize());
  }
}

TEST(Contract, ProtectionThatDoesNotFitIsRefused) {
  const TinyShape& shape = kTinyShapes[1];
  const TempSidecar sidecar(shape);
  for (const auto& [spec, fits] : {std::pair<const char*, int>{"h2o(12)", 6},
                                   {"h2o(heavy=9, recent=3)", 9},
                                   {"tova(10)", 10},
                                   {"window(12, sinks=2)", 9},
                                   {"cascade(14, levels=3, sinks=2)", 11},
                                   {"snapkv(14, window=4)", 10}}) {
    EXPECT_NO_THROW(MakeConfig(spec, shape, sidecar, {{20, 20 + fits}})) << spec;
    EXPECT_THROW(MakeConfig(spec, shape, sidecar, {{20, 21 + fits}}), Error) << spec;
  }
  EXPECT_NO_THROW(MakeConfig("full", shape, sidecar, {{0, 200}}));
  EXPECT_THROW(MakeConfig("full", shape, sidecar, {{-1, 2}}), Error);
  EXPECT_THROW(MakeConfig("full", shape, sidecar, {{5, 2}}), Error);
  // Spans inside the window's own sinks cost nothing; overlapping spans count once.
  EXPECT_NO_THROW(MakeConfig("window(12, sinks=4)", shape, sidecar, {{0, 4}, {2, 11}}));
}

// Everything fits exactly: with as many protected tokens as rows allow the cache still works to the end.
TEST(Contract, ProtectionThatFitsExactlyWorks) {
  const TinyShape& shape = kTinyShapes[1];
  const TempSidecar sidecar(shape);
  for (const auto& [spec, fits] : {std::pair<const char*, int>{"h2o(12)+f32", 6},
                                   {"tova(10)+f32", 10},
                                   {"window(12, sinks=2)+f32", 9},
                                   {"window(12, sinks=2, positions=cache)+f32", 9},
                                   {"cascade(14, levels=3, sinks=2)+f32", 11},
                                   {"snapkv(14, window=4)+f32", 10}}) {
    for (int begin : {0, 3, 30}) {
      SCOPED_TRACE(testing::Message() << spec << " from " << begin);
      if (begin == 0 && (std::string(spec).starts_with("window") || std::string(spec).starts_with("cascade"))) continue;  // sinks are part of it
      SequenceCache cache(MakeConfig(spec, shape, sidecar, {{begin, begin + fits}}));
      LiveAll(cache, RandomText(shape, 120, 10), UsualLife());
      for (const auto& held : AllResident(cache, shape))
        for (int p = begin; p < begin + fits; ++p) EXPECT_TRUE(std::binary_search(held.begin(), held.end(), p)) << p;
    }
  }
}

// Rule 9.
// Of spans in one group of rows the group is counted once.
TEST(Contract, ProtectionIsCountedInGroups) {
  const TinyShape& shape = kTinyShapes[3];
  const TempSidecar sidecar(shape);
  const auto make = [&](std::vector<ProtectedSpan> spans) {
    return MakeConfig("h2o(64)+kivi(2, group=16, window=16)", shape, sidecar, std::move(spans));
  };
  EXPECT_NO_THROW(make({{1, 2}, {5, 6}, {9, 10}, {40, 41}}));
  EXPECT_NO_THROW(make({{14, 18}, {20, 21}}));
  EXPECT_THROW(make({{1, 2}, {20, 21}, {40, 41}}), Error);
}

TEST(Contract, InterleavedSequencesBehaveAsEachAlone) {
  ForEachSpec([](const std::string& spec, const TinyShape& shape, const TempSidecar& sidecar) {
    const auto config = MakeConfig(spec, shape, sidecar);
    const Text text_a = RandomText(shape, 120, 12), text_b = RandomText(shape, 120, 13);
    const std::vector<LifeStep> life_a = UsualLife();
    std::vector<LifeStep> life_b = {{23, StepKind::kPrompt}};
    while (life_b.size() < life_a.size()) life_b.push_back({2, StepKind::kDecode});
    SequenceCache alone_a(config), alone_b(config);
    const auto want_a = LiveAll(alone_a, text_a, life_a), want_b = LiveAll(alone_b, text_b, life_b);

    SequenceCache a(config), b(config);
    std::vector<Outputs> got_a, got_b;
    size_t at_a = 0, at_b = 0;
    for (size_t i = 0; i < life_a.size(); ++i) {
      if (life_a[i].kind == StepKind::kPrompt || life_b[i].kind == StepKind::kPrompt) {
        got_a.push_back(Live(a, text_a, at_a, life_a[i]));
        got_b.push_back(Live(b, text_b, at_b, life_b[i]));
      } else {  // in one step, as the engine does: layer by layer, one sequence after the other
        a.BeginStep(life_a[i].n, life_a[i].kind);
        b.BeginStep(life_b[i].n, life_b[i].kind);
        Outputs out_a, out_b;
        for (size_t l = 0; l < shape.n_layers; ++l) {
          const size_t kv = shape.n_kv_heads * shape.head_dim, qs = shape.n_heads * shape.head_dim;
          out_a.emplace_back(life_a[i].n * qs);
          if (a.WantsInputs(l)) a.ReadInputs(l, 0, life_a[i].n, text_a.v[l].data() + at_a * kv);
          a.Append(l, text_a.k[l].data() + at_a * kv, text_a.v[l].data() + at_a * kv);
          a.Attend(l, text_a.q[l].data() + at_a * qs, out_a.back().data());
          out_b.emplace_back(life_b[i].n * qs);
          if (b.WantsInputs(l)) b.ReadInputs(l, 0, life_b[i].n, text_b.v[l].data() + at_b * kv);
          b.Append(l, text_b.k[l].data() + at_b * kv, text_b.v[l].data() + at_b * kv);
          b.Attend(l, text_b.q[l].data() + at_b * qs, out_b.back().data());
        }
        b.EndStep();
        a.EndStep();
        got_a.push_back(out_a);
        got_b.push_back(out_b);
      }
      at_a += life_a[i].n;
      at_b += life_b[i].n;
    }
    ExpectSameLives(got_a, want_a);
    ExpectSameLives(got_b, want_b);
    EXPECT_TRUE(a.Serialize() == alone_a.Serialize());
    EXPECT_TRUE(b.Serialize() == alone_b.Serialize());
    EXPECT_EQ(a.Stats().kv_bytes, alone_a.Stats().kv_bytes);
  });
}

// A clone goes on as the original, and neither notices the other.
TEST(Contract, CloneGoesOnAsTheOriginal) {
  ForEachSpec([](const std::string& spec, const TinyShape& shape, const TempSidecar& sidecar) {
    const auto config = MakeConfig(spec, shape, sidecar);
    const Text text = RandomText(shape, 120, 14), other = RandomText(shape, 120, 15);
    const std::vector<LifeStep> rest = {
        {1, StepKind::kDecode}, {5, StepKind::kStream}, {11, StepKind::kPrompt}, {1, StepKind::kDecode}};
    SequenceCache cache(config);
    Live(cache, text, 0, {45, StepKind::kPrompt});
    for (size_t i = 0; i < 4; ++i) Feed(cache, text, 45 + i, 1, StepKind::kDecode);
    const auto saved = cache.Serialize();
    const auto clone = cache.Clone();
    EXPECT_TRUE(clone->Serialize() == saved);
    EXPECT_EQ(clone->Stats().kv_bytes, cache.Stats().kv_bytes);
    const auto strayed = cache.Clone();
    LiveAll(*strayed, other, rest, 49);
    EXPECT_TRUE(cache.Serialize() == saved);
    const auto want = LiveAll(cache, text, rest, 49);
    EXPECT_TRUE(clone->Serialize() == saved);
    ExpectSameLives(LiveAll(*clone, text, rest, 49), want);
    EXPECT_TRUE(clone->Serialize() == cache.Serialize());
  });
}

// Rule 10, at several moments of a life.
TEST(Contract, RestoredCacheGoesOnAsTheOriginal) {
  ForEachSpec([](const std::string& spec, const TinyShape& shape, const TempSidecar& sidecar) {
    const auto config = MakeConfig(spec, shape, sidecar);
    const Text text = RandomText(shape, 120, 16);
    const std::vector<LifeStep> life = UsualLife();
    SequenceCache whole(config);
    std::vector<std::vector<std::byte>> saved;
    std::vector<Outputs> want;
    std::vector<size_t> at = {0};
    for (const LifeStep& step : life) {
      saved.push_back(whole.Serialize());
      want.push_back(Live(whole, text, at.back(), step));
      at.push_back(at.back() + step.n);
    }
    for (size_t moment : {size_t{0}, size_t{1}, size_t{2}, size_t{21}, size_t{22}, size_t{23}}) {
      SequenceCache cache(config);
      Live(cache, text, 50, {9, StepKind::kPrompt});  // what it held before is forgotten
      cache.Restore(saved[moment].data(), saved[moment].size());
      EXPECT_TRUE(cache.Serialize() == saved[moment]) << "moment " << moment;
      EXPECT_EQ(cache.tokens_seen(), at[moment]);
      for (size_t i = moment; i < life.size(); ++i)
        ASSERT_TRUE(Same(Live(cache, text, at[i], life[i]), want[i])) << "moment " << moment << ", step " << i;
      EXPECT_TRUE(cache.Serialize() == whole.Serialize());
      EXPECT_EQ(cache.Stats().kv_bytes, whole.Stats().kv_bytes);
    }
  });
}

// Damaged bytes are refused, or give a cache that works; the cache that was to be restored stays as it was when they
// are refused.
TEST(Contract, DamagedBytesNeverCrash) {
  for (const char* spec : {"full+f32", "h2o(11)+f32+less", "h2o(11)+pyramid(3)", "h2o(11)+ada+f32",
                           "snapkv(14, window=4)+ada", "h2o(14)+zigzag", "window(14)+split(4)", "tova(9)+f32", "window(9)",
                           "window(9, sinks=2, positions=cache)+f32", "snapkv(14, window=4)+f32",
                           "cluster(9, sinks=2, size=4, every=7, add=2, skip=1)+f32",
                           "cluster(9, sinks=2, size=4, every=7, add=2, skip=1, offload=\"/tmp\")+f32",
                           "kvzap(threshold=0.2, window=5)+f32", "full+think(window=3)",
                           "h2o(14)+ada+think(0.6, window=3)", "snapkv(14, window=4)+f32+think(window=5, generated=full)",
                           "full+think(0.5)+kivi(2, group=16, window=32)", "full+think(0.5)+kivi(2, group=16, window=16)",
                           "h2o(24)+match(every=16)+f32", "full+balanced(2, group=16, window=16)", "h2o(66)+balanced(3, group=16, window=16)"}) {
    SCOPED_TRACE(spec);
    const std::string text_of(spec);
    const bool in_groups = text_of.find("kivi") != std::string::npos || text_of.find("balanced") != std::string::npos;
    const TinyShape& shape = kTinyShapes[in_groups ? 3 : 1];
    const TempSidecar sidecar(shape);
    const Text text = RandomText(shape, 160, 17);
    const auto config = MakeConfig(spec, shape, sidecar, {{1, 2}});
    SequenceCache cache(config);
    Live(cache, text, 0, {30, StepKind::kPrompt});
    for (size_t i = 0; i < 3; ++i) Feed(cache, text, 30 + i, 1, StepKind::kDecode);
    const auto good = cache.Serialize();
    const auto before = cache.Serialize();

    const auto refused = [&](const std::vector<std::byte>& bytes) {
      // Memory of exactly this size, so that reading on would be seen.
      const std::unique_ptr<std::byte[]> exact(new std::byte[bytes.size()]);
      std::copy(bytes.begin(), bytes.end(), exact.get());
      try {
        SequenceCache other(config);
        Live(other, text, 0, {5, StepKind::kPrompt});
        const auto other_before = other.Serialize();
        try {
          other.Restore(exact.get(), bytes.size());
        } catch (const Error&) {
          EXPECT_TRUE(other.Serialize() == other_before);
          throw;
        }
        if (other.tokens_seen() > 1000000) return false;  // sound, but its positions are beyond this test
        for (size_t i = 0; i < 14; ++i) Feed(other, text, 100 + i, 1, StepKind::kDecode);
        Live(other, text, 120, {20, StepKind::kPrompt});
        return false;
      } catch (const Error&) {
        return true;
      }
    };
    EXPECT_FALSE(refused(good));
    const size_t step = std::max<size_t>(1, good.size() / 150);
    for (size_t size = 0; size < good.size(); size += step) {
      EXPECT_TRUE(refused({good.begin(), good.begin() + static_cast<ptrdiff_t>(size)})) << size << " bytes";
    }
    auto longer = good;
    longer.push_back(std::byte{0});
    EXPECT_TRUE(refused(longer));
    Rng rng(18);
    size_t n_refused = 0;
    for (int i = 0; i < 400; ++i) {
      auto bad = good;
      const size_t flips = 1 + rng.Below(3);
      for (size_t f = 0; f < flips; ++f) {
        // Half of them in the header, where the counts are.
        const size_t at = rng.Below(i % 2 == 0 ? std::min<size_t>(bad.size(), 80) : bad.size());
        bad[at] ^= static_cast<std::byte>(1u << rng.Below(8));
      }
      n_refused += refused(bad);
    }
    EXPECT_GT(n_refused, 20u);
    EXPECT_TRUE(cache.Serialize() == before);
  }
}

// What no cache can hold is told by what it is: numbers that are none, weights of nothing, budgets of another sum,
// heads of a set that differ. Each is where the layout has it, counted from the end or the beginning.
TEST(Contract, WhatCannotBeIsRefused) {
  const TinyShape shape{1, 2, 2, 32};
  const TempSidecar sidecar(shape);
  const Text text = RandomText(shape, 60, 18);
  const auto expect = [&](const std::string& spec, const char* why,
                          const std::function<void(std::vector<std::byte>&)>& change, size_t n = 40) {
    SequenceCache cache(MakeConfig(spec, shape, sidecar)), other(MakeConfig(spec, shape, sidecar));
    Feed(cache, text, 0, n, StepKind::kPrompt);
    auto bytes = cache.Serialize();
    EXPECT_NO_THROW(other.Restore(bytes.data(), bytes.size()));
    change(bytes);
    try {
      other.Restore(bytes.data(), bytes.size());
      ADD_FAILURE() << spec << ": not refused; " << why;
      Feed(other, text, n, 1, StepKind::kDecode);
    } catch (const Error& error) {
      EXPECT_NE(std::string(error.what()).find(why), std::string::npos) << error.what();
    }
  };
  const auto put = [](auto value, std::byte* to) { std::memcpy(to, &value, sizeof value); };
  constexpr size_t kBehind = 1 + 8;  // a byte for the layer and the length of no states
  const float nan = std::nanf("");
  const auto last = [&](auto value) {
    return [&, value](std::vector<std::byte>& bytes) { put(value, &bytes[bytes.size() - kBehind - sizeof value]); };
  };
  const auto budgets = [&](uint64_t first, uint64_t second) {
    return [&, first, second](std::vector<std::byte>& bytes) { put(first, &bytes[16]), put(second, &bytes[24]); };
  };
  expect("h2o(11)+f32", "a vote is not finite", last(nan));
  expect("window(9)+merge+f32", "weight is not positive", last(0.0f));
  expect("window(9)+f32", "heads of a layer hold different tokens", last(int32_t{20}));
  expect("h2o(11)+f32+less", "the residual state", [&](auto& bytes) { put(nan, &bytes[bytes.size() - 4]); });
  expect("window(9)+f32", "have different budgets", budgets(10, 8));
  expect("h2o(11)+f32", "budgets of 21 rows", budgets(11, 10));
  expect("window(9, sinks=4)+f32", "does not hold the 5", budgets(4, 14));
  expect("cascade(14, levels=3, sinks=2)+split+f32", "does not hold the 3", budgets(2, 26), 2);
}

// Bytes of another spec or shape are refused wherever they could not be told apart by luck alone.
TEST(Contract, BytesOfAnotherShapeAreRefused) {
  const TinyShape& shape = kTinyShapes[1];
  const TempSidecar sidecar(shape), other_sidecar(kTinyShapes[0]);
  SequenceCache cache(MakeConfig("h2o(11)+f32", shape, sidecar));
  LiveAll(cache, RandomText(shape, 120, 19), UsualLife());
  const auto bytes = cache.Serialize();
  for (const char* spec : {"full+f32", "h2o(11)", "tova(11)+f32", "h2o(11)+f32+less", "h2o(9)+f32"}) {
    SequenceCache other(MakeConfig(spec, shape, sidecar));
    EXPECT_THROW(other.Restore(bytes.data(), bytes.size()), Error) << spec;
    EXPECT_EQ(other.tokens_seen(), 0u);
  }
  SequenceCache foreign(MakeConfig("h2o(11)+f32", kTinyShapes[0], other_sidecar));
  EXPECT_THROW(foreign.Restore(bytes.data(), bytes.size()), Error);
}

TEST(Contract, ThreadsDoNotChangeABit) {
  const TinyShape& shape = kTinyShapes[1];
  const TempSidecar sidecar(shape);
  const Text text = RandomText(shape, 120, 20);
  for (const char* spec : {"full+f32", "h2o(11)+f32+less", "tova(9)+less", "snapkv(14, window=4)+pyramid(3)+bf16", "h2o(14)+ada+less", "h2o(14)+zigzag+ada", "window(12, sinks=2, positions=cache)+split(2)", "snapkv(14, window=4)+ada+bf16",
                           "window(9, sinks=2, positions=cache)", "h2o(11)+f32+prefill(chunk=7)",
                           "cascade(14, levels=3, sinks=2)+f32", "elastic(0.3, weighted=true)+merge+f32",
                           "snapkv(14, window=4)+match+f32", "h2o(40)+match(every=16)+f32", "h2o(14)+ada+think(window=3)",
                           "kvzap(threshold=0.2, window=5)+less+f32"}) {
    SCOPED_TRACE(spec);
    const auto config = MakeConfig(spec, shape, sidecar);
    const std::vector<LifeStep> life = {{45, StepKind::kPrompt},
                                        {1, StepKind::kDecode},
                                        {1, StepKind::kDecode},
                                        {18, StepKind::kPrompt},
                                        {2, StepKind::kDecode}};
    SequenceCache one(config);
    const auto want = LiveAll(one, text, life);
    const ThreadPool pool(2);
    const ThreadScope scope(pool);
    SequenceCache two(config);
    const auto got = LiveAll(two, text, life);
    ExpectSameLives(got, want);
    EXPECT_TRUE(one.Serialize() == two.Serialize());
  }
}

// A step that was begun and taken back never was: in no bit, and in no byte more.
TEST(Contract, CancelledStepLeavesNothing) {
  ForEachSpec([](const std::string& spec, const TinyShape& shape, const TempSidecar& sidecar) {
    const auto config = MakeConfig(spec, shape, sidecar);
    const Text text = RandomText(shape, 120, 21);
    SequenceCache plain(config), cache(config);
    const auto cancel = [&] {
      const size_t bytes = cache.Stats().kv_bytes;
      for (const auto& [n, kind] : {std::pair{size_t{1}, StepKind::kDecode},
                                    {40, StepKind::kPrompt},
                                    {170, StepKind::kStream},
                                    {3, StepKind::kDecode},
                                    {1, StepKind::kDecode}}) {
        const auto before = cache.Serialize();
        cache.BeginStep(n, kind);
        cache.CancelStep();
        EXPECT_TRUE(cache.Serialize() == before);
        EXPECT_LE(cache.Stats().kv_bytes, bytes) << "after " << cache.tokens_seen();
      }
    };
    size_t seen = 0;
    for (const LifeStep& step : UsualLife()) {
      cancel();
      const Outputs want = Live(plain, text, seen, step), got = Live(cache, text, seen, step);
      ASSERT_TRUE(Same(got, want)) << "after " << seen;
      seen += step.n;
    }
    EXPECT_TRUE(cache.Serialize() == plain.Serialize());
    EXPECT_EQ(cache.Stats().kv_bytes, plain.Stats().kv_bytes);
  });
}

// Weights are >= 0 and sum to one, exact rows and residual state together: equal values come out as they are.
TEST(Contract, EqualValuesComeOutAsTheyAre) {
  ForEachSpec([](const std::string& spec, const TinyShape& shape, const TempSidecar& sidecar) {
    SequenceCache cache(MakeConfig(spec, shape, sidecar));
    Text text = RandomText(shape, 120, 22);
    for (auto& v : text.v) std::fill(v.begin(), v.end(), 0.75f);
    const bool blocks = spec.find("q8") != std::string::npos || spec.find("q4") != std::string::npos;
    const bool balanced = spec.find("balanced") != std::string::npos;  // its values are rotated
    const bool rotated = spec.find("rotate=true") != std::string::npos || balanced;  // scales in f16 of one channel that has it all
    const bool bytes = rotated && (spec.find("v=2") != std::string::npos || balanced);  // of its codes' weights
    for (const Outputs& step : LiveAll(cache, text, UsualLife()))
      for (const auto& layer : step)
        for (float x : layer) ASSERT_NEAR(x, 0.75f, blocks ? 0.75 / 7 : bytes ? 0.75 / 64 : rotated ? 0.75 / 1024 : 1e-5);
  });
}

// Rows stored transformed are untransformed for everybody else: what is absorbed, merged and read anew is as without.
TEST(Contract, RotatedRowsAnswerAsExactOnesToTheirPrecision) {
  const TinyShape& shape = kTinyShapes[3];
  ASSERT_EQ(shape.head_dim % 32, 0u);
  const TempSidecar sidecar(shape);
  const Text text = RandomText(shape, 120, 24);
  for (const std::string select : {"full", "window(12, sinks=2)", "window(12, sinks=2)+less", "snapkv(200)",
                                   "window(12, sinks=2, positions=cache)", "window(12)+less+prefill(chunk=7)"}) {
    SCOPED_TRACE(select);
    const auto live = [&](const std::string& codec) {
      SequenceCache cache(MakeConfig(select + "+" + codec, shape, sidecar));
      return LiveAll(cache, text, UsualLife());
    };
    const auto exact = live("f32"), rotated = live("q8(rotate=true)");
    for (size_t i = 0; i < exact.size(); ++i)
      for (size_t l = 0; l < shape.n_layers; ++l) EXPECT_LT(RelativeError(rotated[i][l], exact[i][l]), 0.05) << i;
  }
}

// Grouped heads equal as many KV heads that hold the same keys and values.
TEST(Contract, GroupedEqualsRepeatedHeads) {
  const TinyShape grouped{2, 6, 2, 5}, repeated{2, 6, 6, 5};
  const TempSidecar grouped_sidecar(grouped), repeated_sidecar(repeated);
  Text text = RandomText(grouped, 120, 23);
  const size_t d = grouped.head_dim, group = grouped.group();
  // Heads of a group ask the same, so that sums over the group rank rows as each head alone does.
  for (auto& q : text.q)
    for (size_t t = 0; t < text.n; ++t)
      for (size_t h = 0; h < grouped.n_heads; ++h)
        std::copy_n(q.begin() + static_cast<ptrdiff_t>((t * grouped.n_heads + h / group * group) * d), d,
                    q.begin() + static_cast<ptrdiff_t>((t * grouped.n_heads + h) * d));
  Text wide = text;
  const auto widen = [&](std::vector<float>& x) {
    std::vector<float> y;
    for (size_t t = 0; t < text.n; ++t)
      for (size_t h = 0; h < grouped.n_heads; ++h) {
        const auto from = x.begin() + static_cast<ptrdiff_t>((t * grouped.n_kv_heads + h / group) * d);
        y.insert(y.end(), from, from + static_cast<ptrdiff_t>(d));
      }
    x = y;
  };
  for (auto& k : wide.k) widen(k);
  for (auto& v : wide.v) widen(v);
  for (const char* spec :
       {"full+f32", "window(9, sinks=2)+f32", "h2o(11)+f32", "tova(9)+f32", "snapkv(14, window=4)+f32",
        "snapkv(14, window=4, pool=avg)+pyramid(3)", "window(9, sinks=2, positions=cache)",
        "cascade(14, levels=3, sinks=2)+f32"}) {
    SCOPED_TRACE(spec);
    SequenceCache a(MakeConfig(spec, grouped, grouped_sidecar)), b(MakeConfig(spec, repeated, repeated_sidecar));
    const auto out_a = LiveAll(a, text, UsualLife()), out_b = LiveAll(b, wide, UsualLife());
    for (size_t i = 0; i < out_a.size(); ++i)
      for (size_t l = 0; l < 2; ++l) EXPECT_LT(RelativeError(out_a[i][l], out_b[i][l]), 1e-5) << "step " << i;
    for (size_t l = 0; l < 2; ++l)
      for (size_t h = 0; h < grouped.n_heads; ++h) EXPECT_EQ(Resident(b, l, h), Resident(a, l, h / group));
  }
}

// One ring is a window: the same rows in the same slots, the same bits.
TEST(Contract, CascadeOfOneLevelIsAWindow) {
  for (const TinyShape& shape : kTinyShapes) {
    const TempSidecar sidecar(shape);
    const Text text = RandomText(shape, 120, 28);
    for (const auto& [one_level, rest] : {std::pair<std::string, std::string>{", block=0)+f32", "+f32"},
                                          {", block=0)+bf16+pyramid(3)", "+bf16+pyramid(3)"},
                                          {")+f16+prefill(chunk=7)", "+f16+prefill(chunk=7)"},
                                          {", block=16)+f32", "+f32+prefill(chunk=16)"},
                                          {")+f32", "+f32+prefill(chunk=512)"}}) {
      SCOPED_TRACE(rest + ", " + shape.Name());
      SequenceCache window(MakeConfig("window(12, sinks=2, positions=cache)" + rest, shape, sidecar)),
          cascade(MakeConfig("cascade(12, levels=1, sinks=2" + one_level, shape, sidecar));
      ExpectSameLives(LiveAll(cascade, text, UsualLife()), LiveAll(window, text, UsualLife()));
      EXPECT_EQ(cascade.Stats().kv_bytes_peak, window.Stats().kv_bytes_peak);
    }
  }
}

// Heads that hold different numbers of rows, each read at its ranks: a head's outputs are those of a window of its own rows.
TEST(Contract, UnequalWindowsAreReadAsWindowsOfTheirOwn) {
  for (const TinyShape& shape : {kTinyShapes[0], kTinyShapes[1]}) {
    const TempSidecar sidecar(shape);
    const Text text = RandomText(shape, 120, 33);
    SequenceCache split(MakeConfig("window(12, sinks=2, positions=cache)+split(2)+f32", shape, sidecar));
    const auto found = LiveAll(split, text, UsualLife());
    const size_t width = shape.group() * shape.head_dim, stride = shape.n_heads * shape.head_dim;
    std::set<size_t> sizes;
    for (size_t l = 0; l < shape.n_layers; ++l) {
      for (size_t h = 0; h < shape.n_kv_heads; ++h) {
        const size_t rows = Resident(split, l, h).size();
        sizes.insert(rows);
        SequenceCache alone(MakeConfig("window(" + std::to_string(rows) + ", sinks=2, positions=cache)+f32", shape, sidecar));
        const auto wanted = LiveAll(alone, text, UsualLife());
        const auto last = [&](const std::vector<Outputs>& outputs) {
          const std::vector<float>& layer = outputs.back()[l];
          const auto* const head = layer.data() + layer.size() - stride + h * width;
          return std::vector<float>(head, head + width);
        };
        EXPECT_LT(RelativeError(last(found), last(wanted)), 1e-5) << shape.Name() << " layer " << l << " head " << h;
      }
    }
    EXPECT_GT(sizes.size(), 1u);
  }
}

// The cascade reads prompts in blocks of its own, as prefill(chunk) would feed them; that term comes first.
TEST(Contract, CascadeReadsAPromptInBlocks) {
  TinyShape shape = kTinyShapes[1];
  shape.ctx = 70000;
  const TempSidecar sidecar(shape);
  const Text text = RandomText(shape, 1400, 32);
  const auto config = [&](const std::string& options, const std::string& rest = "") {
    return MakeConfig("cascade(38, levels=3, sinks=2, positions=true" + options + ")+f32" + rest, shape, sidecar);
  };
  const std::vector<LifeStep> life = {
      {1300, StepKind::kPrompt}, {1, StepKind::kDecode}, {60, StepKind::kPrompt}, {1, StepKind::kDecode}};
  const auto lived = [&](const std::shared_ptr<const CacheConfig>& c) {
    SequenceCache cache(c);
    return LiveAll(cache, text, life);
  };
  const auto full = lived(MakeConfig("full+f32", shape, sidecar));
  const auto blocks = lived(config(""));
  ExpectSameLives(blocks, lived(config("", "+prefill(chunk=512)")));
  ExpectSameLives(lived(config(", block=100")), lived(config(", block=9", "+prefill(chunk=100)")));
  // The first block sees all of its own tokens; the next ones see what is left of the others.
  EXPECT_FALSE(Same(blocks[0], full[0]));
  const size_t first = 512 * shape.n_heads * shape.head_dim;
  for (size_t l = 0; l < shape.n_layers; ++l)
    EXPECT_TRUE(std::equal(full[0][l].begin(), full[0][l].begin() + static_cast<ptrdiff_t>(first), blocks[0][l].begin()));
  // One step: no block, or one that holds the prompt.
  EXPECT_EQ(config(", block=0")->prefill_chunk(), 0u);
  const auto whole = lived(config(", block=0"));
  EXPECT_TRUE(Same(whole[0], full[0]));
  ExpectSameLives(lived(config(", block=1300")), whole);
  // Blocks of one token are decoding.
  SequenceCache ones(config(", block=1")), decoded(config(""));
  Outputs steps(shape.n_layers);
  for (size_t t = 0; t < 300; ++t) {
    const Outputs step = Feed(decoded, text, t, 1, StepKind::kDecode);
    for (size_t l = 0; l < shape.n_layers; ++l) steps[l].insert(steps[l].end(), step[l].begin(), step[l].end());
  }
  EXPECT_TRUE(Same(Live(ones, text, 0, {300, StepKind::kPrompt}), steps));
  // The length of a prompt does not matter to memory.
  EXPECT_EQ(config("")->Plan(65536, 1).bytes_peak, config("")->Plan(2048, 1).bytes_peak);
  EXPECT_GT(config(", block=0")->Plan(65536, 1).bytes_peak, 10 * config("")->Plan(65536, 1).bytes_peak);
}

TEST(Contract, WhatActsAtAPromptsEndTakesNoBlocks) {
  EXPECT_THROW(CacheSpec::Parse("cascade(64, positions=true)+think(generated=full)"), Error);
  EXPECT_NO_THROW(CacheSpec::Parse("cascade(64, positions=true, block=0)+think(generated=full)"));
  EXPECT_THROW(CacheSpec::Parse("cascade(64, positions=true, block=0)+think(generated=full)+prefill(chunk=9)"), Error);
}

// Blocks of one token are decoding.
TEST(Contract, CascadeOfBlocksOfOneDecodes) {
  const TinyShape& shape = kTinyShapes[1];
  const TempSidecar sidecar(shape);
  const Text text = RandomText(shape, 90, 29);
  const auto run = [&](StepKind kind) {
    SequenceCache cache(MakeConfig("cascade(14, levels=3, sinks=2)+f32", shape, sidecar));
    std::vector<Outputs> all;
    for (size_t t = 0; t < text.n; ++t) all.push_back(Feed(cache, text, t, 1, kind));
    return all;
  };
  ExpectSameLives(run(StepKind::kStream), run(StepKind::kDecode));
}

// Score-free or one set a layer: nothing but positions and the layer's queries may matter.
TEST(Contract, TovaKeepsOneSetALayer) {
  const TinyShape shape{2, 6, 3, 5};
  const TempSidecar sidecar(shape);
  SequenceCache cache(MakeConfig("tova(9)+f32", shape, sidecar));
  const Text text = RandomText(shape, 120, 24);
  size_t seen = 0;
  for (const LifeStep& step : UsualLife()) {
    Live(cache, text, seen, step);
    seen += step.n;
    for (size_t l = 0; l < 2; ++l)
      for (size_t h = 1; h < 3; ++h) ASSERT_EQ(Resident(cache, l, h), Resident(cache, l, 0));
  }
  EXPECT_NE(Resident(cache, 0, 0), Resident(cache, 1, 0));
}

// Huge, tiny and zero keys.
TEST(Contract, ExtremeKeysStayFinite) {
  const TinyShape& shape = kTinyShapes[1];
  const TempSidecar sidecar(shape);
  for (const float scale : {0.0f, 1e-30f, 1e-4f, 60.0f, 1e4f})
    for (const char* spec :
         {"full+f32", "h2o(11)+f32+less", "tova(9)+f32+less", "snapkv(14)+f32", "window(9)+f32+less"}) {
      SequenceCache cache(MakeConfig(spec, shape, sidecar));
      Text text = RandomText(shape, 120, 25, 1.0f);
      for (auto& k : text.k)
        for (float& x : k) x *= scale;
      for (const Outputs& step : LiveAll(cache, text, UsualLife()))
        for (const auto& layer : step)
          for (float x : layer) ASSERT_TRUE(std::isfinite(x)) << spec << ", scale " << scale;
    }
}

// Not-a-number in, not-a-number out, and no crash: selectors get scores that compare with nothing.
TEST(Contract, NotANumberDoesNotCrash) {
  const TinyShape& shape = kTinyShapes[1];
  const TempSidecar sidecar(shape);
  for (const char* spec : {"full+f32", "h2o(11)+f32+less", "tova(9)+f32", "snapkv(14)+f32", "window(9)+f32+less",
                           "h2o(11)+f32+think(window=3)"}) {
    SCOPED_TRACE(spec);
    SequenceCache cache(MakeConfig(spec, shape, sidecar));
    Text text = RandomText(shape, 120, 26);
    Rng rng(27);
    for (auto& k : text.k)
      for (size_t i = 0; i < k.size(); i += 1 + rng.Below(90)) k[i] = std::nanf("");
    size_t seen = 0;
    for (const LifeStep& step : UsualLife()) {
      Live(cache, text, seen, step);
      seen += step.n;
    }
    for (const auto& held : AllResident(cache, shape))
      EXPECT_EQ(std::adjacent_find(held.begin(), held.end()), held.end());
  }
}

}  // namespace
}  // namespace lesskv
