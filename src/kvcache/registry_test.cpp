// The registry's table, the legal pairs, and the arithmetic of budgets.
#include "kvcache/registry.h"

#include <gtest/gtest.h>

#include <set>

#include "kvcache/cache_config.h"
#include "kvcache/select/selector.h"

namespace lesskv {
namespace {

CacheShape Shape(size_t ctx) {
  return CacheShape::Uniform(2, 2, 2, 8, ctx, {.n_dims = 8, .frequency_factors = {}});
}

TEST(Registry, EveryMethodIsWhole) {
  std::set<std::string_view> names;
  for (const Method* method : Methods()) {
    SCOPED_TRACE(method->name);
    EXPECT_TRUE(names.insert(method->name).second);
    EXPECT_FALSE(method->summary.empty());
    EXPECT_EQ(FindMethod(method->name), method);
    EXPECT_EQ(method->make_selector != nullptr, method->stage == Stage::kSelect);
    EXPECT_EQ(method->make_budgeter != nullptr, method->stage == Stage::kBudget);
    EXPECT_TRUE(method->make_divider == nullptr || method->stage == Stage::kSelect);
    EXPECT_EQ(method->make_sharer != nullptr, method->stage == Stage::kShare);
    EXPECT_EQ(method->make_codec != nullptr, method->stage == Stage::kCodec);
    std::set<std::string_view> parameters;
    for (const Parameter& parameter : method->parameters) {
      EXPECT_TRUE(parameters.insert(parameter.name).second);
      EXPECT_FALSE(parameter.help.empty());
      EXPECT_EQ(parameter.kind == Parameter::Kind::kWord, !parameter.choices.empty());
    }
  }
  EXPECT_EQ(FindMethod("nothing"), nullptr);
  for (Stage stage : kStages) {
    if (DefaultTerm(stage).empty()) continue;
    EXPECT_EQ(FindMethod(DefaultTerm(stage))->stage, stage);
  }
}

TEST(Registry, KnownPairs) {
  const auto conflict = [](const char* a, const char* b) {
    return Conflict(*FindMethod(a), *FindMethod(b)).has_value();
  };
  EXPECT_TRUE(conflict("h2o", "tova"));
  EXPECT_TRUE(conflict("full", "less"));
  EXPECT_TRUE(conflict("pyramid", "full"));
  EXPECT_FALSE(conflict("h2o", "less"));
  EXPECT_FALSE(conflict("tova", "pyramid"));
  EXPECT_FALSE(conflict("snapkv", "prefill"));
  EXPECT_FALSE(conflict("full", "prefill"));
  EXPECT_FALSE(conflict("h2o", "ada"));
  EXPECT_FALSE(conflict("snapkv", "ada"));
  EXPECT_FALSE(conflict("ada", "pyramid"));
  EXPECT_FALSE(conflict("kivi", "think"));
  EXPECT_TRUE(conflict("csr", "think"));
  EXPECT_TRUE(conflict("balanced", "think"));
  EXPECT_TRUE(conflict("cascade", "balanced"));
  EXPECT_FALSE(conflict("h2o", "balanced"));
  for (const char* other : {"full", "window", "tova", "prefill"}) EXPECT_TRUE(conflict(other, "ada")) << other;
  for (const Method* a : Methods())
    for (const Method* b : Methods()) EXPECT_EQ(Conflict(*a, *b).has_value(), Conflict(*b, *a).has_value());
}

struct Rows {
  const char* spec;
  size_t ctx, rows, window;
};

TEST(Registry, RotationIsForLowBitRows) {
  EXPECT_EQ(CacheSpec::Parse("q4(rotate=true)").ToString(), "full+q4(rotate=true)");
  EXPECT_EQ(CacheSpec::Parse("q8(rotate=false)").ToString(), CacheSpec::Parse("q8").ToString());
  EXPECT_NO_THROW(CacheSpec::Parse("mix(v=q4, rotate=true)"));
  for (const char* spec : {"mix(rotate=true)", "mix(k=f32, v=bf16, rotate=true)", "f16(rotate=true)", "q8(rotate=yes)"})
    EXPECT_THROW(CacheSpec::Parse(spec), Error) << spec;
}

// The papers' fractions of a context, rounded as their authors do, and what selectors make of small budgets.
TEST(Registry, BudgetsByHand) {
  for (const Rows& want :
       {Rows{"h2o(5%)", 4096, 204, 102}, Rows{"h2o(2%)", 4096, 80, 40}, Rows{"h2o(10%)", 4096, 408, 204},
        Rows{"h2o(5%)", 2048, 102, 51}, Rows{"h2o(10%)", 2048, 204, 102}, Rows{"h2o(5%, extra=4)", 4096, 208, 104},
        Rows{"h2o(5%, extra=3)", 4096, 207, 103}, Rows{"h2o(5%)", 2040, 102, 51}, Rows{"h2o(255)", 4096, 255, 127},
        Rows{"h2o(0.5%)", 4096, 20, 10}, Rows{"h2o(heavy=0.1%, recent=4.9%)", 4096, 204, 200},
        Rows{"window(5%)", 4096, 204, 5}, Rows{"window(8, sinks=2)", 100, 8, 3}, Rows{"tova(5%)", 4096, 204, 0},
        Rows{"tova(7, extra=2)", 64, 9, 0}, Rows{"snapkv(1024)", 4096, 1024, 32}, Rows{"snapkv(20)", 4096, 20, 10},
        Rows{"snapkv(2)", 4096, 2, 1},
        Rows{"snapkv(10%, window=16)", 4096, 409, 16}}) {
    SCOPED_TRACE(want.spec);
    const CacheSpec spec = CacheSpec::Parse(want.spec);
    const SpecTerm& term = spec.terms()[0];
    const Method& method = *FindMethod(term.name);
    const SidecarSource no_sidecar;
    const CacheShape shape = Shape(want.ctx);
    const MethodContext context{shape.layers, want.ctx, ComputeType::kF32, no_sidecar};
    const auto selector = method.make_selector(Arguments(method.parameters, term), context);
    EXPECT_EQ(selector->After(StepKind::kPrompt, want.ctx).rows, want.rows);
    EXPECT_EQ(selector->Window(want.rows), want.window);
  }
}

TEST(Registry, BudgetsThatHoldNothingAreRefused) {
  for (const char* spec : {"h2o(1%)", "window(4)", "window(1%)", "tova(1%)", "snapkv(8, window=8)", "snapkv(1%)", "snapkv(1)"})
    EXPECT_THROW(CacheConfig::Create(CacheSpec::Parse(spec), Shape(64)), Error) << spec;
  // 8-bit rows come in blocks of 32 channels.
  EXPECT_THROW(CacheConfig::Create(CacheSpec::Parse("q8"), Shape(64)), Error);
  EXPECT_THROW(CacheConfig::Create(CacheSpec::Parse("h2o(8)+less"), Shape(64)), Error);
}

}  // namespace
}  // namespace lesskv
