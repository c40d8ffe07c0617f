// The whole chain, file to logits, through the real cache: against golden logits, against itself in other step shapes,
// in batches, when stopped, when refused, and as text.
#include <gtest/gtest.h>
#include <xxhash.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <thread>

#include "base/error.h"
#include "kernels/basic/cpu.h"
#include "engine/engine.h"
#include "engine/generate.h"
#include "engine/session.h"
#include "kernels/basic/basic.h"
#include "kvcache/residual/sidecar.h"

namespace lesskv {
namespace {

const std::string kSource = LESSKV_SOURCE_DIR;
const char* const kTinyModels[] = {"llama-gqa-tied", "llama-mha-untied", "llama-rope-scaled", "llama-yarn",
                                   "qwen2-bias",     "qwen3-qk-norm",    "gemma3-local",      "phi3-longrope",
                                   "falcon-mqa",     "falcon-two-norms", "smollm3-nope"};
std::string TinyModel(const std::string& name) { return kSource + "/tests/data/models/" + name; }

struct Golden {
  std::vector<int32_t> tokens;
  std::vector<float> logits;  // [tokens, n_vocab]
};

Golden LoadGolden(const std::string& name) {
  const auto file = GgufFile::Open(TinyModel(name + ".expected.gguf"));
  const GgufTensor& tokens = *file.FindTensor("tokens");
  const GgufTensor& logits = *file.FindTensor("logits");
  Golden golden{std::vector<int32_t>(tokens.Elements()), std::vector<float>(logits.Elements())};
  std::memcpy(golden.tokens.data(), tokens.data.data(), tokens.data.size());
  std::memcpy(golden.logits.data(), logits.data.data(), logits.data.size());
  return golden;
}

Engine MakeEngine(const std::string& path, ComputeChoice compute = ComputeChoice::kF32) {
  return Engine(Model::Load(path), {.threads = 2, .compute = compute});
}

// Collects the logits of every item, rows one after the other.
struct Collector {
  std::vector<std::vector<float>> logits;
  explicit Collector(size_t n_items) : logits(n_items) {}
  LogitsSink Sink() {
    return [this](std::span<const LogitsRow> tile) {
      for (const LogitsRow& row : tile) {
        EXPECT_EQ(row.row * row.logits.size(), logits[row.tag].size());  // in order, none left out
        logits[row.tag].insert(logits[row.tag].end(), row.logits.begin(), row.logits.end());
      }
    };
  }
};

std::vector<float> PrefillAll(Engine& engine, const std::string& spec, std::span<const int32_t> tokens) {
  Sequence sequence(engine.MakeCacheConfig(CacheSpec::Parse(spec)));
  Collector collector(1);
  EXPECT_TRUE(engine.Prefill({{&sequence, tokens, LogitsRows::kAll}}, collector.Sink()));
  return collector.logits[0];
}

// Feeds the text in steps of n tokens as if it had been generated.
std::vector<float> StepAll(Engine& engine, const std::string& spec, std::span<const int32_t> tokens, size_t n) {
  Sequence sequence(engine.MakeCacheConfig(CacheSpec::Parse(spec)));
  std::vector<float> logits;
  for (size_t i = 0; i < tokens.size(); i += n)
    engine.Decode({{&sequence, tokens.subspan(i, std::min(n, tokens.size() - i)), LogitsRows::kAll}},
                  [&](std::span<const LogitsRow> tile) {
                    for (const LogitsRow& row : tile) logits.insert(logits.end(), row.logits.begin(), row.logits.end());
                  });
  return logits;
}

double Range(const std::vector<float>& x) {
  const auto [low, high] = std::minmax_element(x.begin(), x.end());
  return double{*high} - *low;
}

double MaxDifference(const std::vector<float>& a, const std::vector<float>& b) {
  EXPECT_EQ(a.size(), b.size());
  double worst = 0;
  for (size_t i = 0; i < a.size(); ++i) worst = std::max(worst, std::abs(double{a[i]} - b[i]));
  return worst;
}

TEST(Chain, LogitsMatchTheGoldenOnesAtEveryPosition) {
  for (const char* name : kTinyModels) {
    Engine engine = MakeEngine(TinyModel(std::string(name) + ".gguf"));
    const Golden golden = LoadGolden(name);
    const std::vector<float> got = PrefillAll(engine, "full+f32", golden.tokens);
    EXPECT_LE(MaxDifference(got, golden.logits), 1e-5 * Range(golden.logits)) << name;
    const size_t n_vocab = engine.model().config().n_vocab;
    for (size_t t = 0; t < golden.tokens.size(); ++t)
      EXPECT_EQ(ArgMax(&got[t * n_vocab], n_vocab), ArgMax(&golden.logits[t * n_vocab], n_vocab)) << name << " " << t;
    // The default cache stores halves: 11 bits of keys and values.
    EXPECT_LE(MaxDifference(PrefillAll(engine, "full", golden.tokens), golden.logits), 1e-3 * Range(golden.logits));
  }
}

TEST(Chain, TokenByTokenEqualsOneShot) {
  for (const char* name : kTinyModels) {
    Engine engine = MakeEngine(TinyModel(std::string(name) + ".gguf"));
    const Golden golden = LoadGolden(name);
    for (const char* spec : {"full", "full+f32"}) {
      const std::vector<float> whole = PrefillAll(engine, spec, golden.tokens);
      for (const size_t n : {size_t{1}, size_t{5}, size_t{11}})
        EXPECT_LE(MaxDifference(StepAll(engine, spec, golden.tokens, n), whole), 1e-4 * Range(whole))
            << name << " " << spec << " in steps of " << n;
      EXPECT_LE(MaxDifference(PrefillAll(engine, std::string(spec) + "+prefill(chunk=7)", golden.tokens), whole),
                1e-4 * Range(whole))
          << name;
    }
  }
}

// Feature maps of random weights beside a link to the model, both removed with the object.
struct ModelWithMaps {
  explicit ModelWithMaps(const std::string& name)
      : folder(std::filesystem::path(testing::TempDir()) / ("lesskv_chain_" + name)) {
    std::filesystem::create_directories(folder);
    std::filesystem::copy_file(TinyModel(name + ".gguf"), Path(".gguf"), std::filesystem::copy_options::overwrite_existing);
    const auto model = Model::Load(Path(".gguf"));
    const ModelConfig& c = model->config();
    const size_t n_local = CountLocal(model->MakeCacheShape(64, ComputeType::kF32)).n_layers;
    Sidecar sidecar = InitialSidecar({.n_layers = c.n_layers - n_local, .n_heads = c.n_heads, .n_kv_heads = c.n_kv_heads,
                                      .head_dim = c.head_dim, .rank = 4, .hidden = 8}, 7);
    sidecar.model_fingerprint = model->fingerprint();
    WriteSidecar(Path(".less.gguf"), sidecar);
  }
  ~ModelWithMaps() { std::filesystem::remove_all(folder); }
  std::string Path(const char* suffix) const { return (folder / (std::string("model") + suffix)).string(); }

  std::filesystem::path folder;
};

// Every architecture lives with a cache that evicts and absorbs in its global layers: tokens that left change what
// follows, a plan tells the bytes, and the text in chunks gives finite logits.
TEST(Chain, EveryArchitectureRunsWithASmallCache) {
  for (const char* name : kTinyModels) {
    SCOPED_TRACE(name);
    const ModelWithMaps files(name);
    Engine engine = MakeEngine(files.Path(".gguf"));
    const Golden golden = LoadGolden(name);
    const std::span<const int32_t> text = golden.tokens;
    const auto config = engine.MakeCacheConfig(CacheSpec::Parse("h2o(5%)+less"), 120);  // 6 rows
    Sequence sequence(config);
    std::vector<float> logits;
    const LogitsSink sink = [&](std::span<const LogitsRow> rows) {
      for (const LogitsRow& row : rows) logits.insert(logits.end(), row.logits.begin(), row.logits.end());
    };
    engine.Prefill({{&sequence, text.first(24), LogitsRows::kAll}}, sink);
    for (size_t i = 24; i < text.size(); ++i) engine.Decode({{&sequence, text.subspan(i, 1), LogitsRows::kAll}}, sink);
    ASSERT_EQ(logits.size(), golden.logits.size());
    for (const float value : logits) ASSERT_TRUE(std::isfinite(value));
    const size_t n_prompt = 24 * engine.model().config().n_vocab;
    const auto part = [](const std::vector<float>& x, size_t first, size_t end) {
      return std::vector<float>(x.begin() + static_cast<ptrdiff_t>(first), x.begin() + static_cast<ptrdiff_t>(end));
    };
    // A prompt is attended in full; what follows sees 6 rows and a residual state.
    EXPECT_LE(MaxDifference(part(logits, 0, n_prompt), part(golden.logits, 0, n_prompt)), 1e-3 * Range(golden.logits));
    EXPECT_GT(MaxDifference(part(logits, n_prompt, logits.size()), part(golden.logits, n_prompt, logits.size())),
              1e-3 * Range(golden.logits));
    const CacheStats stats = sequence.cache().Stats();
    EXPECT_EQ(stats.tokens_resident, 6);
    EXPECT_EQ(stats.tokens_absorbed, static_cast<double>(text.size() - 6));
    const CachePlan plan = config->Plan(24, text.size() - 24);
    EXPECT_EQ(plan.bytes_end, stats.kv_bytes);
    EXPECT_EQ(plan.bytes_peak, stats.kv_bytes_peak);
    EXPECT_EQ(plan.bytes_local > 0, CountLocal(config->shape()).n_layers > 0);
    EXPECT_LT(plan.bytes_local, plan.bytes_end);
  }
}

// Prompts of different lengths in one step, then three generated tokens each: the same bits as each alone. With chunks,
// a sequence's last one has so few tokens that alone they are multiplied in another order: the same up to rounding.
TEST(Chain, SequencesOfABatchBehaveAsEachAlone) {
  Engine engine = MakeEngine(TinyModel("llama-gqa-tied.gguf"));
  const Golden golden = LoadGolden("llama-gqa-tied");
  const std::span<const int32_t> text = golden.tokens;
  const std::vector<std::span<const int32_t>> prompts = {text.subspan(0, 20), text.subspan(5, 9), text.subspan(2, 14)};
  for (const char* spec : {"full", "h2o(12)", "window(10)+prefill(chunk=9)", "cascade(14, levels=3, sinks=2, block=9)"}) {
    const auto config = engine.MakeCacheConfig(CacheSpec::Parse(spec), 64);
    const auto run = [&](std::vector<size_t> which) {
      std::vector<Sequence> sequences;
      std::vector<std::vector<float>> logits(which.size());
      const LogitsSink sink = [&](std::span<const LogitsRow> tile) {
        for (const LogitsRow& row : tile)
          logits[row.tag].insert(logits[row.tag].end(), row.logits.begin(), row.logits.end());
      };
      for (size_t i = 0; i < which.size(); ++i) sequences.emplace_back(config);
      std::vector<StepItem> items;
      for (size_t i = 0; i < which.size(); ++i) items.push_back({&sequences[i], prompts[which[i]], LogitsRows::kAll, i});
      EXPECT_TRUE(engine.Prefill(items, sink));
      for (size_t step = 0; step < 3; ++step) {
        for (size_t i = 0; i < which.size(); ++i)
          items[i] = {&sequences[i], text.subspan(22 + step + which[i], 1), LogitsRows::kLast, i};
        EXPECT_TRUE(engine.Decode(items, sink));
      }
      return logits;
    };
    const auto together = run({0, 1, 2});
    for (size_t i = 0; i < prompts.size(); ++i) {
      EXPECT_EQ(together[i].size(), (prompts[i].size() + 3) * 272);
      const std::vector<float> alone = run({i})[0];
      const bool chunked = config->prefill_chunk() != 0;
      EXPECT_LE(MaxDifference(together[i], alone), chunked ? 1e-5 * Range(alone) : 0) << spec << ", sequence " << i;
    }
  }
}

TEST(Chain, ARefusedStepChangesNothing) {
  Engine engine = MakeEngine(TinyModel("llama-gqa-tied.gguf"));
  const auto config = engine.MakeCacheConfig(CacheSpec(), 16);
  Sequence first(config), second(config);
  const std::vector<int32_t> short_text = {1, 5, 9}, long_text(17, 4), bad_text = {3, 272};
  const auto refused = [&](std::span<const int32_t> tokens, const char* word) {
    try {
      engine.Step({{&first, short_text}, {&second, tokens}});
      ADD_FAILURE() << "accepted: " << word;
    } catch (const Error& error) {
      EXPECT_NE(std::string(error.what()).find(word), std::string::npos) << error.what();
    }
    EXPECT_EQ(first.tokens().size(), 0u);
    EXPECT_EQ(first.cache().tokens_seen(), 0u);
  };
  refused(long_text, "context of 16");
  refused(bad_text, "vocabulary of 272");
  refused({}, "at least one token");
  EXPECT_TRUE(engine.Step({{&first, short_text}, {&second, short_text}}));
  EXPECT_EQ(first.tokens(), short_text);
}

TEST(Chain, StopBetweenChunksLeavesTheSequenceSoundAndInsideAStepDoesNot) {
  Engine engine = MakeEngine(TinyModel("llama-gqa-tied.gguf"));
  std::atomic<bool> stop{false};
  const std::vector<int32_t> text(600, 7);
  Sequence chunked(engine.MakeCacheConfig(CacheSpec::Parse("full+prefill(chunk=100)"), 1000));
  EXPECT_FALSE(engine.Prefill({{&chunked, text}}, {}, {.stop = &stop, .progress = [&](double done) {
                                                         if (done > 0.3) stop = true;
                                                       }}));
  EXPECT_FALSE(chunked.interrupted());
  EXPECT_EQ(chunked.tokens().size(), 200u);
  stop = false;
  Sequence whole(engine.MakeCacheConfig(CacheSpec(), 1000));
  EXPECT_FALSE(engine.Prefill({{&whole, text}}, {}, {.stop = &stop, .progress = [&](double) { stop = true; }}));
  EXPECT_TRUE(whole.interrupted());
}

TEST(Chain, ProgressRisesToOne) {
  Engine engine = MakeEngine(TinyModel("llama-gqa-tied.gguf"));
  const std::vector<int32_t> text(50, 7);
  for (const char* spec : {"full", "full+prefill(chunk=20)"}) {
    Sequence sequence(engine.MakeCacheConfig(CacheSpec::Parse(spec)));
    double last = 0;
    EXPECT_TRUE(engine.Prefill({{&sequence, text}}, {}, {.progress = [&](double done) {
                                 EXPECT_GT(done, last);
                                 last = done;
                               }}));
    EXPECT_NEAR(last, 1, 1e-9);
  }
}

TEST(Chain, CloneGoesOnLikeTheOriginal) {
  Engine engine = MakeEngine(TinyModel("qwen2-bias.gguf"));
  const Golden golden = LoadGolden("qwen2-bias");
  const std::span<const int32_t> text = golden.tokens;
  Sequence original(engine.MakeCacheConfig(CacheSpec::Parse("h2o(8)")));
  engine.Prefill({{&original, text.first(20)}});
  Sequence clone = original.Clone();
  EXPECT_EQ(clone.tokens(), original.tokens());
  Collector a(1), b(1);
  engine.Decode({{&original, text.subspan(20, 1), LogitsRows::kAll}}, a.Sink());
  engine.Decode({{&clone, text.subspan(20, 1), LogitsRows::kAll}}, b.Sink());
  EXPECT_EQ(a.logits, b.logits);
}

// A session holds the rows of offloaded clusters: it goes on with any folder, and names none.
TEST(Chain, ASessionOfOffloadedClustersGoesOnInAnotherFolder) {
  Engine engine = MakeEngine(TinyModel("qwen2-bias.gguf"));
  const Golden golden = LoadGolden("qwen2-bias");
  const std::span<const int32_t> text = golden.tokens;
  const auto spec_in = [](const std::string& folder, size_t rows = 6) {
    return CacheSpec::Parse(fmt::format("cluster({}, sinks=1, size=2, skip=0, offload=\"{}\")", rows, folder));
  };
  const std::string here = testing::TempDir(), there = here + "/session_test_folder";
  std::filesystem::create_directories(there);
  Sequence original(engine.MakeCacheConfig(spec_in(here)));
  engine.Prefill({{&original, text.first(20)}});
  const std::vector<std::byte> bytes = SessionBytes(engine, original, std::nullopt);
  EXPECT_EQ(std::string(reinterpret_cast<const char*>(bytes.data()), bytes.size()).find(here), std::string::npos);
  Session restored = ParseSession(bytes, "session", engine, *engine.MakeCacheConfig(spec_in(there)));
  EXPECT_EQ(restored.sequence.tokens(), original.tokens());
  Collector a(1), b(1);
  engine.Decode({{&original, text.subspan(20, 1), LogitsRows::kAll}}, a.Sink());
  engine.Decode({{&restored.sequence, text.subspan(20, 1), LogitsRows::kAll}}, b.Sink());
  EXPECT_EQ(a.logits, b.logits);
  EXPECT_THROW(ParseSession(bytes, "session", engine, *engine.MakeCacheConfig(spec_in(there, 7))), Error);
  std::filesystem::remove_all(there);
}

// A session belongs to a model, a cache spec and a context length, and has its text and its protected tokens. What no
// writer has left there is refused, also where the checksum is right.
TEST(Chain, SessionsAreCheckedBeforeTheyGoOn) {
  Engine engine = MakeEngine(TinyModel("qwen2-bias.gguf"));
  const Engine foreign = MakeEngine(TinyModel("qwen3-qk-norm.gguf"));
  const Golden golden = LoadGolden("qwen2-bias");
  const auto config_of = [&](const char* spec, size_t ctx) {
    return engine.MakeCacheConfig(CacheSpec::Parse(spec), ctx);
  };
  const auto config = config_of("h2o(12)", 40);
  Sequence original(engine.MakeCacheConfig(CacheSpec::Parse("h2o(12)"), 40, {{1, 3}}));
  engine.Prefill({{&original, std::span(golden.tokens).first(20)}});
  const std::vector<std::byte> good = SessionBytes(engine, original, 7);
  const Session session = ParseSession(good, "session", engine, *config);
  EXPECT_EQ(session.pending_token, 7);
  EXPECT_EQ(session.sequence.tokens(), original.tokens());
  EXPECT_EQ(session.sequence.config().protect().size(), 2u);
  const auto refused = [](const std::vector<std::byte>& bytes, const Engine& with,
                          const CacheConfig& wanted) -> std::optional<ErrorCode> {
    try {
      ParseSession(bytes, "session", with, wanted);
    } catch (const Error& error) {
      return error.code();
    }
    return std::nullopt;
  };
  EXPECT_EQ(refused(good, foreign, *config), ErrorCode::kMismatch);
  EXPECT_EQ(refused(good, engine, *config_of("h2o(13)", 40)), ErrorCode::kMismatch);
  EXPECT_EQ(refused(good, engine, *config_of("h2o(12)", 41)), ErrorCode::kMismatch);

  constexpr size_t kVersion = 8;
  const auto behind_text = [&](size_t at) {
    uint64_t n;
    std::memcpy(&n, &good[at], sizeof n);
    return at + sizeof n + n;
  };
  const size_t pending = behind_text(behind_text(kVersion + 4)) + 8 + 8 + 8, first_token = pending + 4 + 8;
  const auto changed = [&](size_t at, size_t value) {
    std::vector<std::byte> bytes = good;
    const auto as_int = static_cast<int32_t>(value);
    std::memcpy(&bytes[at], &as_int, sizeof as_int);
    const uint64_t checksum = XXH3_64bits(bytes.data(), bytes.size() - sizeof checksum);
    std::memcpy(&bytes[bytes.size() - sizeof checksum], &checksum, sizeof checksum);
    return bytes;
  };
  const size_t n_vocab = engine.model().config().n_vocab;
  EXPECT_EQ(refused(changed(pending, 8), engine, *config), std::nullopt);
  EXPECT_EQ(refused(changed(first_token, n_vocab - 1), engine, *config), std::nullopt);
  for (const auto& [at, value] : {std::pair{kVersion, size_t{kSessionVersion + 1}}, {pending, n_vocab},
                                  {pending, size_t{0} - 2}, {first_token, n_vocab}, {first_token, size_t{0} - 1}})
    EXPECT_EQ(refused(changed(at, value), engine, *config), ErrorCode::kBadFile) << at << ": " << value;
  std::vector<std::byte> damaged = good;
  damaged[good.size() / 2] ^= std::byte{1};
  EXPECT_EQ(refused(damaged, engine, *config), ErrorCode::kBadFile);
}

TEST(Chain, EnginesOnTwoThreadsEqualEachAlone) {
  const std::string path = TinyModel("llama-gqa-tied.gguf");
  const auto model = Model::Load(path);
  const Golden golden = LoadGolden("llama-gqa-tied");
  const auto live = [&](int threads, const char* spec) {
    Engine engine(model, {.threads = threads, .compute = ComputeChoice::kF32});
    EXPECT_EQ(engine.threads().size(), threads);
    std::vector<float> logits = StepAll(engine, spec, golden.tokens, 3);
    const std::vector<float> whole = PrefillAll(engine, spec, golden.tokens);
    logits.insert(logits.end(), whole.begin(), whole.end());
    return logits;
  };
  const std::vector<float> h2o = live(2, "h2o(12)"), window = live(3, "window(9)+bf16");
  std::thread other([&] {
    for (int round = 0; round < 5; ++round) EXPECT_EQ(live(3, "window(9)+bf16"), window);
  });
  for (int round = 0; round < 5; ++round) EXPECT_EQ(live(2, "h2o(12)"), h2o);
  other.join();
}

std::string ReadFile(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

// bf16 and int8 against f32 on the bundled model, both ways of multiplying: many tokens (bfloat16 in bf16) and few (int8
// activations).
class ReducedCompute : public testing::TestWithParam<ComputeChoice> {};

TEST_P(ReducedCompute, StaysCloseToF32) {
  const std::string path = kSource + "/models/lesskv-small.gguf";
  Engine exact = MakeEngine(path), reduced = MakeEngine(path, GetParam());
  const auto tokenizer = Tokenizer::Create(LoadVocabulary(exact.model().file()));
  std::vector<int32_t> tokens = tokenizer->Encode(ReadFile(kSource + "/docs/sample.txt"), true, false);
  tokens.resize(std::min<size_t>(tokens.size(), 512));
  const size_t n_vocab = exact.model().config().n_vocab;
  const double least_same = GetParam() == ComputeChoice::kInt8 ? 0.97 : 0.98;
  for (const size_t step : {tokens.size(), size_t{4}}) {
    const std::vector<float> p = StepAll(exact, "full", tokens, step), q = StepAll(reduced, "full", tokens, step);
    size_t same = 0;
    double kl = 0;
    for (size_t t = 0; t < tokens.size(); ++t) {
      const float *a = &p[t * n_vocab], *b = &q[t * n_vocab];
      same += ArgMax(a, n_vocab) == ArgMax(b, n_vocab);
      const double mass_a = LogSumExp(a, n_vocab), mass_b = LogSumExp(b, n_vocab);
      for (size_t i = 0; i < n_vocab; ++i)
        kl += std::exp(a[i] - mass_a) * ((a[i] - mass_a) - (b[i] - mass_b)) / static_cast<double>(tokens.size());
    }
    EXPECT_GE(static_cast<double>(same) / static_cast<double>(tokens.size()), least_same) << "steps of " << step;
    EXPECT_LE(kl, 0.002) << "steps of " << step;
    // A processor that cannot multiply bfloat16 pairs takes float32 for many tokens, and says so (linear.h).
    const bool rounds = GetParam() == ComputeChoice::kInt8 || step == 4 || ActiveIsa() == Isa::kScalar || ActiveIsa() >= Isa::kAvx512Bf16;
    EXPECT_EQ(MaxDifference(p, q) > 0, rounds) << "steps of " << step;
  }
}

INSTANTIATE_TEST_SUITE_P(Chain, ReducedCompute, testing::Values(ComputeChoice::kBF16, ComputeChoice::kInt8),
                         [](const auto& c) { return c.param == ComputeChoice::kBF16 ? "bf16" : "int8"; });

// Where the optional data lies: LESSKV_SHARED_DIR, or `shared` beside the checkout.
std::string SharedFile(const std::string& name) {
  const char* folder = std::getenv("LESSKV_SHARED_DIR");
  return (folder != nullptr ? std::string(folder) : kSource + "/../shared") + "/" + name;
}

TEST(Chain, ARealModelTellsItsStory) {
  const std::string path = SharedFile("data/models/stories260Ktok512.gguf");
  if (!std::filesystem::exists(path)) GTEST_SKIP() << path << " is not there";
  for (const ComputeChoice compute : {ComputeChoice::kF32, ComputeChoice::kBF16, ComputeChoice::kInt8}) {
    Engine engine = MakeEngine(path, compute);
    const auto tokenizer = Tokenizer::Create(LoadVocabulary(engine.model().file()));
    Sequence sequence(engine.MakeCacheConfig(CacheSpec()));
    GenerateOptions options;
    options.sampler.temperature = 0;
    options.max_tokens = 30;
    std::string streamed;
    options.on_text = [&](std::string_view piece) { streamed += piece; };
    const std::vector<int32_t> prompt = {tokenizer->bos()};
    const GenerateResult result = Generate(engine, *tokenizer, sequence, prompt, options);
    EXPECT_EQ(result.text.substr(0, 54), "Once upon a time, there was a little girl named Lily. ");
    EXPECT_EQ(streamed, result.text);
    EXPECT_EQ(result.generated_tokens, 30u);
    EXPECT_EQ(sequence.tokens().size(), 30u);  // BOS, and all but the last generated token
  }
}

TEST(Chain, GenerationEndsAtALengthAStopStringOrAFullContext) {
  Engine engine = MakeEngine(TinyModel("llama-gqa-tied.gguf"));
  const auto tokenizer = Tokenizer::Create(LoadVocabulary(engine.model().file()));
  const std::vector<int32_t> prompt = tokenizer->Encode("the sea", true, false);
  const auto generate = [&](size_t max_tokens, std::vector<std::string> stops) {
    GenerateOptions options;
    options.sampler.temperature = 0;
    options.max_tokens = max_tokens;
    options.stops = std::move(stops);
    Sequence sequence(engine.MakeCacheConfig(CacheSpec(), 40));
    return Generate(engine, *tokenizer, sequence, prompt, options);
  };
  const GenerateResult all = generate(GenerateOptions::kNoLimit, {});
  ASSERT_EQ(all.reason, FinishReason::kContext);
  EXPECT_EQ(all.generated_tokens, 40 - prompt.size() + 1);
  EXPECT_EQ(generate(4, {}).generated_tokens, 4u);
  ASSERT_GE(all.text.size(), 8u);
  const std::string stop = all.text.substr(4, 3);
  const GenerateResult stopped = generate(GenerateOptions::kNoLimit, {stop});
  EXPECT_EQ(stopped.reason, FinishReason::kStopString);
  EXPECT_EQ(stopped.text, all.text.substr(0, all.text.find(stop)));
  EXPECT_THROW(
      {
        Sequence sequence(engine.MakeCacheConfig(CacheSpec(), prompt.size()));
        Generate(engine, *tokenizer, sequence, prompt, {});
      },
      Error);
}

// What a server does: two texts with their own options, one token of each a step, and no loop of the engine's.
TEST(Chain, GenerationsSideBySideSayWhatEachSaysAlone) {
  Engine engine = MakeEngine(kSource + "/models/lesskv-small.gguf");
  const auto tokenizer = Tokenizer::Create(LoadVocabulary(engine.model().file()));
  GenerateOptions options[2];
  options[0].sampler.seed = 3;
  options[0].max_tokens = 25;
  options[1].sampler = {.repeat_penalty = 1.3f, .seed = 4};
  options[1].max_tokens = 20;
  const std::vector<int32_t> prompts[2] = {tokenizer->Encode("The sea was", true, false),
                                           tokenizer->Encode("She had never", true, false)};
  const auto config = engine.MakeCacheConfig(CacheSpec::Parse("h2o(16)"), 64);
  std::vector<std::string> alone;
  for (size_t i = 0; i < 2; ++i) {
    Sequence sequence(config);
    alone.push_back(Generate(engine, *tokenizer, sequence, prompts[i], options[i]).text);
  }

  std::vector<Sequence> sequences;
  std::vector<Generation> generations;
  std::vector<std::vector<float>> logits(2);
  for (size_t i = 0; i < 2; ++i) {
    sequences.emplace_back(config);
    engine.Prefill({{&sequences[i], prompts[i], LogitsRows::kLast}}, [&](std::span<const LogitsRow> rows) {
      logits[i].assign(rows[0].logits.begin(), rows[0].logits.end());
    });
    generations.emplace_back(*tokenizer, options[i], sequences[i].tokens(), config->shape().ctx);
  }
  std::vector<Generation::Output> outs(2);
  for (;;) {
    std::vector<StepItem> step;
    for (size_t i = 0; i < 2; ++i) {
      if (outs[i].finish) continue;
      outs[i] = generations[i].Push(logits[i]);
      if (outs[i].finish) continue;
      step.push_back({&sequences[i], {&outs[i].token, 1}, LogitsRows::kLast, i});
    }
    if (step.empty()) break;
    engine.Decode(step, [&](std::span<const LogitsRow> rows) {
      for (const LogitsRow& row : rows) logits[row.tag].assign(row.logits.begin(), row.logits.end());
    });
  }
  for (size_t i = 0; i < 2; ++i) EXPECT_EQ(generations[i].text(), alone[i]);
}

// A stop string and what led to it are not shown, so the next turn must not see them either: the cache is the one of a
// text that ended where the stop string began.
TEST(Chain, ASequenceThatGoesOnHasNotSeenWhatAStopStringHid) {
  Engine engine = MakeEngine(kSource + "/models/lesskv-small.gguf");
  const auto tokenizer = Tokenizer::Create(LoadVocabulary(engine.model().file()));
  const std::vector<int32_t> prompt = tokenizer->Encode("The sea was", true, false);
  struct Text {
    Sequence sequence;
    GenerateResult result;
  };
  const auto generate = [&](const char* spec, size_t max_tokens, std::vector<std::string> stops) {
    Sequence sequence(engine.MakeCacheConfig(CacheSpec::Parse(spec), 64));
    GenerateOptions options;
    options.sampler.temperature = 1;  // the likeliest text repeats itself
    options.sampler.seed = 5;
    options.max_tokens = max_tokens;
    options.stops = std::move(stops);
    options.sequence_goes_on = true;
    GenerateResult result = Generate(engine, *tokenizer, sequence, prompt, options);
    return Text{std::move(sequence), std::move(result)};
  };
  for (const char* spec : {"full", "h2o(8)"}) {
    const Text all = generate(spec, 30, {});
    const auto& tokens = all.sequence.tokens();
    const auto text_of = [&](size_t first, size_t n) {
      return tokenizer->Decode(std::span(tokens).subspan(prompt.size() + first, n));
    };
    for (const size_t kept : {1, 9}) {
      const std::string stop = text_of(kept, 5);  // five tokens, of which four have been fed
      ASSERT_EQ(all.result.text.find(stop), text_of(0, kept).size()) << "choose another place";
      Text stopped = generate(spec, 30, {stop}), cut = generate(spec, kept, {});
      ASSERT_EQ(stopped.result.reason, FinishReason::kStopString);
      EXPECT_EQ(stopped.result.text, cut.result.text);
      for (Text* text : {&stopped, &cut})
        if (const auto pending = text->result.pending_token)
          engine.Decode({{&text->sequence, {&*pending, 1}, LogitsRows::kNone}});
      EXPECT_EQ(stopped.sequence.tokens(), cut.sequence.tokens()) << spec << ", " << kept;
      EXPECT_EQ(stopped.sequence.cache().Serialize(), cut.sequence.cache().Serialize()) << spec << ", " << kept;
    }
  }
}

}  // namespace
}  // namespace lesskv
