// Sequences of random specs on small models: together as each alone, saved and restored, read together, and where a
// context is full.
#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <memory>
#include <optional>

#include "base/error.h"
#include "cache_harness.h"
#include "engine/engine.h"
#include "engine/session.h"
#include "random_spec.h"

namespace lesskv {
namespace {

using namespace testing_support;  // NOLINT

// A small model, with all that methods want trained for it.
struct Trained {
  std::shared_ptr<const Model> model;
  std::unique_ptr<TempSidecar> sidecar;

  explicit Trained(const char* path) : model(Model::Load(std::string(LESSKV_SOURCE_DIR) + path)) {
    const ModelConfig& config = model->config();
    const size_t n_local = CountLocal(model->MakeCacheShape(64, ComputeType::kF32)).n_layers;
    const TinyShape tiny{config.n_layers - n_local, config.n_heads, config.n_kv_heads, config.head_dim};
    sidecar = std::make_unique<TempSidecar>(tiny, FeatureKind::kGelu, config.d_model);
  }
  std::shared_ptr<const CacheConfig> Config(const CacheSpec& spec, const Engine& engine, size_t ctx) const {
    return CacheConfig::Create(spec, model->MakeCacheShape(ctx, engine.compute()), {}, sidecar->source());
  }
};

const Trained& SomeModel(Rng& rng) {
  constexpr const char* kPaths[] = {"/tests/data/models/llama-gqa-tied.gguf", "/tests/data/models/llama-yarn.gguf",
                                    "/tests/data/models/gemma3-local.gguf", "/models/lesskv-small.gguf"};
  static std::unique_ptr<const Trained> models[std::size(kPaths)];
  const size_t i = rng.Below(std::size(kPaths));
  if (models[i] == nullptr) models[i] = std::make_unique<const Trained>(kPaths[i]);
  return *models[i];
}

using Logits = std::map<size_t, std::vector<float>>;  // by tag, rows one after the other

LogitsSink Into(Logits& logits) {
  return [&logits](std::span<const LogitsRow> tile) {
    for (const LogitsRow& row : tile)
      logits[row.tag].insert(logits[row.tag].end(), row.logits.begin(), row.logits.end());
  };
}

// One sequence: what it is to read, and in which steps.
struct Reader {
  std::shared_ptr<const CacheConfig> config;
  RandomLife life;
  std::vector<int32_t> tokens;

  StepItem Item(Sequence& sequence, size_t step, size_t tag) const {
    const size_t first = sequence.tokens().size();
    return {&sequence, std::span(tokens).subspan(first, life[step].n), LogitsRows::kAll, tag, life[step].kind};
  }
};

class RandomSteps : public testing::Test {
 protected:
  void Make(uint64_t seed) {
    rng_.emplace(seed * 2 + 1);
    trained_ = &SomeModel(*rng_);
    constexpr ComputeChoice kChoices[] = {ComputeChoice::kF32, ComputeChoice::kBF16, ComputeChoice::kInt8};
    const ComputeChoice compute = kChoices[rng_->Below(3)];
    engine_ = std::make_unique<Engine>(trained_->model,
                                       EngineOptions{.threads = 1, .compute = compute, .batch_invariant = true});
    constexpr size_t kContexts[] = {5, 40, 97, 256};
    ctx_ = kContexts[rng_->Below(std::size(kContexts))];
  }

  Reader NewReader() {
    while (true) {
      try {
        const CacheSpec spec = RandomSpec(ctx_, *rng_);
        NameSubject(spec.ToString());
        Reader reader{trained_->Config(spec, *engine_, ctx_), {}, {}};
        reader.life = MakeLife(*reader.config, std::min<size_t>(ctx_, 1 + rng_->Below(120)), *rng_);
        for (size_t i = 0; i < ctx_ + 1; ++i)
          reader.tokens.push_back(static_cast<int32_t>(rng_->Below(trained_->model->config().n_vocab)));
        return reader;
      } catch (const Error&) {
      }
    }
  }

  void Step(const Reader& reader, Sequence& sequence, size_t step, Logits& logits, size_t tag) {
    engine_->Step({reader.Item(sequence, step, tag)}, Into(logits));
    if (reader.life[step].ends) sequence.cache().EndPrompt();
  }

  std::optional<Rng> rng_;
  const Trained* trained_ = nullptr;
  std::unique_ptr<Engine> engine_;
  size_t ctx_ = 0;
};

TEST_F(RandomSteps, BehaveAsEachAlone) {
  const Seeds seeds(60);
  for (uint64_t seed = seeds.first; seed < seeds.end; ++seed) {
    Make(seed);
    SCOPED_TRACE(testing::Message() << "seed " << seed << ", context " << ctx_);
    std::vector<Reader> readers;
    for (size_t i = 0; i < 3; ++i) readers.push_back(NewReader());
    std::vector<Sequence> together, alone;
    size_t most = 0;
    for (const Reader& reader : readers) {
      together.emplace_back(reader.config);
      alone.emplace_back(reader.config);
      most = std::max(most, reader.life.size());
    }
    for (size_t step = 0; step < most; ++step) {
      std::vector<StepItem> items;
      Logits got, want;
      for (size_t i = 0; i < readers.size(); ++i)
        if (step < readers[i].life.size()) items.push_back(readers[i].Item(together[i], step, i));
      engine_->Step(items, Into(got));
      for (size_t i = 0; i < readers.size(); ++i) {
        if (step >= readers[i].life.size()) continue;
        SCOPED_TRACE(readers[i].config->spec().ToString());
        if (readers[i].life[step].ends) together[i].cache().EndPrompt();
        if (Chance(0.05, *rng_)) {  // by way of a session
          const std::vector<std::byte> saved = SessionBytes(*engine_, alone[i], 3);
          alone[i] = std::move(ParseSession(saved, "saved", *engine_, *readers[i].config).sequence);
        }
        Step(readers[i], alone[i], step, want, i);
        ASSERT_TRUE(got[i] == want[i]) << "step " << step;
      }
    }
    for (size_t i = 0; i < readers.size(); ++i) {
      SCOPED_TRACE(readers[i].config->spec().ToString());
      EXPECT_TRUE(together[i].cache().Serialize() == alone[i].cache().Serialize());
    }
  }
}

// What does not fit a context is refused and changes nothing; what does fills it.
TEST_F(RandomSteps, FillTheirContext) {
  const Seeds seeds(60);
  for (uint64_t seed = seeds.first; seed < seeds.end; ++seed) {
    Make(seed);
    const Reader reader = NewReader();
    SCOPED_TRACE(testing::Message() << "seed " << seed << ", context " << ctx_ << ", "
                                    << reader.config->spec().ToString());
    Sequence sequence(reader.config);
    Logits logits;
    for (size_t step = 0; step < reader.life.size(); ++step) Step(reader, sequence, step, logits, 0);
    const auto rest = [&] { return std::span(reader.tokens).subspan(sequence.tokens().size()); };
    const auto refused = [&] {
      const std::vector<std::byte> before = sequence.cache().Serialize();
      EXPECT_THROW(engine_->Prefill({{&sequence, rest(), LogitsRows::kLast}}), Error);
      EXPECT_FALSE(sequence.interrupted());
      EXPECT_TRUE(sequence.cache().Serialize() == before);
    };
    refused();
    if (rest().size() > 1 && Chance(0.5, *rng_))
      engine_->Prefill({{&sequence, rest().first(rest().size() - 1), LogitsRows::kLast}});
    while (rest().size() > 1) engine_->Decode({{&sequence, rest().first(1), LogitsRows::kLast}}, Into(logits));
    ASSERT_EQ(sequence.tokens().size(), ctx_);
    refused();
    EXPECT_THROW(engine_->Decode({{&sequence, rest().first(1), LogitsRows::kLast}}), Error);
    const Sequence clone = sequence.Clone();
    EXPECT_TRUE(clone.cache().Serialize() == sequence.cache().Serialize());
    const std::vector<std::byte> saved = SessionBytes(*engine_, sequence, std::nullopt);
    const Session session = ParseSession(saved, "saved", *engine_, *reader.config);
    EXPECT_TRUE(session.sequence.cache().Serialize() == sequence.cache().Serialize());
  }
}

}  // namespace
}  // namespace lesskv
