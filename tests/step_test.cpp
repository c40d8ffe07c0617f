// Steps of many sequences: prompt chunks beside generated tokens, items that fail, are cancelled or run out of memory.
// This program can let any allocation fail.
#include <gtest/gtest.h>

#include <atomic>
#include <cstdlib>
#include <map>
#include <new>

#include "base/error.h"
#include "engine/engine.h"

// This program's own operators take memory from malloc and give it back to free; inlined, they look mismatched to GCC.
#pragma GCC diagnostic ignored "-Wmismatched-new-delete"

namespace {

std::atomic<int64_t> g_fail_at{-1};  // counts down to the allocation that fails; below 0: none does

bool MayAllocate() { return g_fail_at.load() < 0 || g_fail_at.fetch_sub(1) != 0; }

void* Allocate(size_t bytes, size_t align) {
  if (!MayAllocate()) return nullptr;
  const size_t at_least = bytes == 0 ? 1 : bytes;
  return align <= alignof(std::max_align_t) ? std::malloc(at_least) : std::aligned_alloc(align, (at_least + align - 1) / align * align);
}

void* AllocateOrThrow(size_t bytes, size_t align) {
  void* memory = Allocate(bytes, align);
  if (memory == nullptr) throw std::bad_alloc();
  return memory;
}

}  // namespace

void* operator new(size_t bytes) { return AllocateOrThrow(bytes, 1); }
void* operator new[](size_t bytes) { return AllocateOrThrow(bytes, 1); }
void* operator new(size_t bytes, std::align_val_t align) { return AllocateOrThrow(bytes, static_cast<size_t>(align)); }
void* operator new(size_t bytes, const std::nothrow_t&) noexcept { return Allocate(bytes, 1); }
void* operator new(size_t bytes, std::align_val_t align, const std::nothrow_t&) noexcept {
  return Allocate(bytes, static_cast<size_t>(align));
}
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete[](void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, size_t) noexcept { std::free(memory); }
void operator delete[](void* memory, size_t) noexcept { std::free(memory); }
void operator delete(void* memory, std::align_val_t) noexcept { std::free(memory); }
void operator delete(void* memory, size_t, std::align_val_t) noexcept { std::free(memory); }
void operator delete(void* memory, const std::nothrow_t&) noexcept { std::free(memory); }
void operator delete(void* memory, std::align_val_t, const std::nothrow_t&) noexcept { std::free(memory); }

namespace lesskv {
namespace {

using Logits = std::map<size_t, std::vector<float>>;  // by tag, rows one after the other

// What a sink keeps is its own affair: its allocations do not fail.
LogitsSink Into(Logits& logits) {
  return [&logits](std::span<const LogitsRow> tile) {
    const int64_t armed = g_fail_at.exchange(-1);
    for (const LogitsRow& row : tile)
      logits[row.tag].insert(logits[row.tag].end(), row.logits.begin(), row.logits.end());
    g_fail_at = armed;
  };
}

std::vector<int32_t> Tokens(size_t n, int32_t seed) {
  std::vector<int32_t> tokens;
  for (size_t i = 0; i < n; ++i) tokens.push_back(static_cast<int32_t>((static_cast<size_t>(seed) * 37 + i * 11) % 270));
  return tokens;
}

constexpr const char* kSpecs[] = {"full", "h2o(12)", "window(10)+prefill(chunk=16)", "snapkv(14, window=4)",
                                  "tova(12)+f32", "h2o(30)+pyramid", "window(9, sinks=2, positions=cache)", "full+bf16"};

class Step : public testing::TestWithParam<ComputeChoice> {
 protected:
  std::shared_ptr<const Model> model_ =
      Model::Load(std::string(LESSKV_SOURCE_DIR) + "/tests/data/models/llama-gqa-tied.gguf");
};

// Half the sequences read prompts of 64 tokens while the other half generate: each as if it were alone.
TEST_P(Step, ManySequencesBehaveAsEachAlone) {
  Engine engine(model_, {.threads = 2, .compute = GetParam(), .batch_invariant = true});
  const auto make = [&](size_t i) {
    return Sequence(engine.MakeCacheConfig(CacheSpec::Parse(kSpecs[i / 2 % std::size(kSpecs)]), 128));
  };
  const auto item = [&](size_t i, Sequence& sequence, const std::vector<int32_t>& tokens) {
    const bool reads = i % 2 == 0;
    const StepKind kind = sequence.config().prefill_chunk() > 0 ? StepKind::kStream : StepKind::kPrompt;
    return StepItem{&sequence, tokens, i % 4 == 0 ? LogitsRows::kAll : LogitsRows::kLast, i, reads ? kind : StepKind::kDecode};
  };
  std::vector<std::vector<int32_t>> begun, next, after;
  for (int32_t i = 0; i < 32; ++i) {
    begun.push_back(Tokens(20 + static_cast<size_t>(i), i));
    next.push_back(Tokens(i % 2 == 0 ? 64 : 1, i + 50));
    after.push_back(Tokens(1, i + 90));
  }
  const auto run = [&](const std::vector<size_t>& which) {
    Logits logits;
    std::vector<Sequence> sequences;
    for (const size_t i : which) sequences.push_back(make(i));
    for (size_t s = 0; s < which.size(); ++s)
      if (which[s] % 2 == 1) engine.Prefill({{&sequences[s], begun[which[s]], LogitsRows::kNone}});
    for (const auto& tokens : {&next, &after}) {
      std::vector<StepItem> items;
      for (size_t s = 0; s < which.size(); ++s) items.push_back(item(which[s], sequences[s], (*tokens)[which[s]]));
      for (StepItem& one : items) one.kind = one.tokens.size() == 1 ? StepKind::kDecode : one.kind;
      EXPECT_TRUE(engine.Step(items, Into(logits)));
    }
    for (const Sequence& sequence : sequences) EXPECT_FALSE(sequence.interrupted());
    return logits;
  };
  std::vector<size_t> all(32);
  for (size_t i = 0; i < 32; ++i) all[i] = i;
  Logits together = run(all);
  for (size_t i = 0; i < 32; ++i) EXPECT_EQ(together[i], run({i})[i]) << "sequence " << i;
}

// A long prompt in one step, and another sequence that takes its own steps in the pauses of that.
TEST_P(Step, StepsInAPauseChangeNothing) {
  Engine engine(model_, {.threads = 2, .compute = GetParam()});
  const std::vector<int32_t> prompt = Tokens(1300, 1), first = Tokens(40, 2);  // three tiles
  for (const char* spec : kSpecs) {
    const auto config = engine.MakeCacheConfig(CacheSpec::Parse(spec), 4096);
    // One token after the other, and now and then a piece of a prompt.
    const auto step = [&](Sequence& other, size_t i, Logits& logits) {
      const std::vector<int32_t> tokens = i % 5 == 0 ? first : Tokens(1, static_cast<int32_t>(i));
      engine.Step({{&other, tokens, LogitsRows::kLast, 1, i % 5 == 0 ? StepKind::kStream : StepKind::kDecode}},
                  Into(logits));
    };
    Logits interleaved, alone;
    Sequence long_one(config), other(config);
    size_t pauses = 0;
    engine.Step({{&long_one, prompt, LogitsRows::kLast, 0, StepKind::kPrompt}}, Into(interleaved),
                {.pause = [&] { step(other, pauses++, interleaved); }});
    EXPECT_GE(pauses, 8 * model_->config().n_layers) << spec;  // tiles before, in and behind attention
    Sequence long_alone(config), other_alone(config);
    engine.Step({{&long_alone, prompt, LogitsRows::kLast, 0, StepKind::kPrompt}}, Into(alone));
    for (size_t i = 0; i < pauses; ++i) step(other_alone, i, alone);
    EXPECT_EQ(interleaved, alone) << spec;
    EXPECT_EQ(long_one.cache().Serialize(), long_alone.cache().Serialize()) << spec;
  }
}

INSTANTIATE_TEST_SUITE_P(Compute, Step, testing::Values(ComputeChoice::kF32, ComputeChoice::kBF16, ComputeChoice::kInt8),
                         [](const auto& c) {
                           return c.param == ComputeChoice::kF32 ? "f32" : c.param == ComputeChoice::kBF16 ? "bf16" : "int8";
                         });

class StepFailure : public Step {};

// A small life of three sequences of different specs: two prompts are read, then one goes on reading while the others
// generate. `arm` is called before the step of the given number.
struct Life {
  std::vector<Sequence> sequences;
  Logits logits;
  std::map<size_t, std::string> failures;
  std::string thrown;

  Life(Engine& engine, size_t armed_step, const std::function<void()>& arm) {
    for (const char* spec : {"h2o(12)", "full", "window(9, sinks=2, positions=cache)+f32"})
      sequences.emplace_back(engine.MakeCacheConfig(CacheSpec::Parse(spec), 96));
    const std::vector<std::vector<int32_t>> prompts = {Tokens(30, 1), Tokens(17, 2), Tokens(40, 3)}, one = {Tokens(1, 7), Tokens(1, 8), Tokens(6, 9)};
    const StepControl control{.on_failure = [&](size_t tag, const Error& error) { failures[tag] = error.what(); }};
    for (size_t step = 0; step < 2; ++step) {
      std::vector<StepItem> items;
      for (size_t i = 0; i < 3; ++i)
        if (failures.count(i) == 0)
          items.push_back({&sequences[i], step == 0 ? prompts[i] : one[i], LogitsRows::kLast, i,
                           step == 0 ? StepKind::kPrompt : StepKind::kDecode});
      const LogitsSink sink = Into(logits);
      try {
        if (step == armed_step) arm();
        engine.Step(items, sink, control);
        g_fail_at = -1;
      } catch (const Error& error) {
        g_fail_at = -1;
        thrown = error.what();
        break;
      }
    }
  }
};

// Any allocation of a step may fail: those it concerns say so, the others are what they would be, and the engine works.
TEST_F(StepFailure, MemoryMayEndAtAnyAllocation) {
  Engine engine(model_, {.threads = 2, .compute = ComputeChoice::kF32, .batch_invariant = true});
  const Life whole(engine, 9, [] {});
  ASSERT_TRUE(whole.thrown.empty() && whole.failures.empty());
  for (const size_t step : {size_t{0}, size_t{1}}) {
    size_t alone = 0, together = 0, n = 0;
    for (bool reached = true; reached; ++n) {
      SCOPED_TRACE(testing::Message() << "allocation " << n << " of step " << step);
      bool fired = false;
      Life life(engine, step, [&] { g_fail_at = static_cast<int64_t>(n); });
      fired = !life.thrown.empty() || !life.failures.empty();
      // No failure: the step has no so many allocations, or did without this one.
      if (!fired && n > 400) reached = false;
      alone += life.failures.empty() ? 0 : 1;
      together += life.thrown.empty() ? 0 : 1;
      if (!life.thrown.empty()) {
        EXPECT_NE(life.thrown.find("memory"), std::string::npos) << life.thrown;
      }
      for (size_t i = 0; i < 3; ++i) {
        Sequence& sequence = life.sequences[i];
        if (life.thrown.empty() && life.failures.count(i) == 0) {
          EXPECT_EQ(life.logits[i], whole.logits.at(i)) << "sequence " << i;
          EXPECT_FALSE(sequence.interrupted());
        } else if (!sequence.interrupted()) {
          EXPECT_EQ(sequence.cache().tokens_seen(), sequence.tokens().size());
          EXPECT_NO_THROW(engine.Decode({{&sequence, Tokens(1, 3), LogitsRows::kNone}}));  // as it was, it goes on
        } else {
          EXPECT_THROW(engine.Decode({{&sequence, Tokens(1, 3), LogitsRows::kNone}}), Error);
          EXPECT_THROW(sequence.Clone(), Error);
        }
      }
      ASSERT_LT(n, 5000u);
    }
    const Life after(engine, 9, [] {});
    EXPECT_EQ(after.logits, whole.logits);
    EXPECT_GT(alone, 5u) << "no failure concerned a sequence alone";
    EXPECT_GT(together, 0u);
  }
}

TEST_F(StepFailure, ACancelledSequenceLeavesTheOthersAlone) {
  Engine engine(model_, {.threads = 2, .compute = ComputeChoice::kF32, .batch_invariant = true});
  const std::vector<int32_t> prompt = Tokens(30, 1), other = Tokens(25, 2);
  const auto config = engine.MakeCacheConfig(CacheSpec::Parse("h2o(12)"), 96);
  Sequence alone(config), a(config), b(config);
  Logits want, got;
  engine.Prefill({{&alone, other, LogitsRows::kLast, 1}}, Into(want));
  std::atomic<bool> cancel{false};
  std::vector<size_t> failed;
  StepControl control{.progress = [&](double) { cancel = true; },
                      .on_failure = [&](size_t tag, const Error&) { failed.push_back(tag); }};
  EXPECT_TRUE(engine.Prefill({{&a, prompt, LogitsRows::kLast, 0, StepKind::kPrompt, &cancel}, {&b, other, LogitsRows::kLast, 1}},
                             Into(got), control));
  EXPECT_EQ(failed, std::vector<size_t>{0});
  EXPECT_TRUE(a.interrupted());
  EXPECT_EQ(got, want);
  EXPECT_EQ(b.tokens(), other);
}

TEST_F(StepFailure, CallersMistakesAreErrors) {
  Engine engine(model_, {.threads = 2, .compute = ComputeChoice::kF32});
  const auto config = engine.MakeCacheConfig(CacheSpec(), 40);
  Sequence a(config), b(config);
  const std::vector<int32_t> tokens = Tokens(5, 1), many = Tokens(41, 1), foreign = {100000};
  const auto refused = [&](StepItems items, const char* word) {
    try {
      engine.Step(items);
      ADD_FAILURE() << "accepted: " << word;
    } catch (const Error& error) {
      EXPECT_NE(std::string(error.what()).find(word), std::string::npos) << error.what();
    }
  };
  refused({{&a, tokens}, {&a, tokens}}, "only once");
  refused({{nullptr, tokens}}, "needs a sequence");
  refused({{&a, {}}}, "at least one token");
  refused({{&a, many}}, "context of 40");
  refused({{&a, foreign}}, "vocabulary");
  std::vector<std::string> told;
  Logits logits;
  engine.Step({{&a, tokens, LogitsRows::kLast, 0}, {&b, many, LogitsRows::kLast, 1}}, Into(logits),
              {.on_failure = [&](size_t, const Error& error) { told.push_back(error.what()); }});
  EXPECT_EQ(told.size(), 1u);
  EXPECT_EQ(logits.size(), 1u);
  EXPECT_EQ(a.tokens(), tokens);
  EXPECT_EQ(b.tokens().size(), 0u);
  // Of a prompt in pieces none is read where the whole does not fit.
  Sequence pieces(engine.MakeCacheConfig(CacheSpec::Parse("h2o(12)+prefill(chunk=16)"), 40));
  EXPECT_THROW(engine.Prefill({{&pieces, many}}), Error);
  EXPECT_TRUE(pieces.tokens().empty());
  engine.Prefill({{&pieces, std::span(many).first(40)}});
  EXPECT_EQ(pieces.tokens().size(), 40u);
}

// Prompts whose specs cut them into different chunks, or none, go together.
TEST_F(StepFailure, ChunksMayDiffer) {
  Engine engine(model_, {.threads = 2, .compute = ComputeChoice::kF32, .batch_invariant = true});
  const std::vector<int32_t> text = Tokens(50, 4);
  const auto make = [&](const char* spec) { return Sequence(engine.MakeCacheConfig(CacheSpec::Parse(spec), 96)); };
  const std::vector<const char*> specs = {"h2o(12)+prefill(chunk=16)", "full", "window(10)+prefill(chunk=7)"};
  std::vector<Sequence> sequences;
  std::vector<StepItem> items;
  for (const char* spec : specs) sequences.push_back(make(spec));
  for (size_t i = 0; i < 3; ++i) items.push_back({&sequences[i], std::span(text).first(50 - i), LogitsRows::kAll, i});
  Logits together;
  EXPECT_TRUE(engine.Prefill(items, Into(together)));
  for (size_t i = 0; i < 3; ++i) {
    Logits alone;
    Sequence sequence = make(specs[i]);
    engine.Prefill({{&sequence, std::span(text).first(50 - i), LogitsRows::kAll, i}}, Into(alone));
    EXPECT_EQ(together[i], alone[i]) << specs[i];
  }
}

// A prompt that several caches read with the first of them: each as if it were alone, beside a prompt of another text.
TEST_P(Step, PromptsReadTogether) {
  Engine engine(model_, {.threads = 2, .compute = GetParam(), .batch_invariant = true});
  const std::vector<int32_t> text = Tokens(70, 6), other = Tokens(40, 7), next = Tokens(1, 8);
  const char* const specs[] = {"full", "h2o(12)", "snapkv(14, window=4)", "window(20)", "tova(12)"};
  const auto make = [&](const char* spec) { return Sequence(engine.MakeCacheConfig(CacheSpec::Parse(spec), 96)); };
  std::vector<Sequence> sequences;
  for (const char* spec : specs) sequences.push_back(make(spec));
  Sequence stranger = make("full");
  std::vector<StepItem> items = {{&stranger, other, LogitsRows::kLast, 99}};
  for (size_t i = 0; i < sequences.size(); ++i)
    items.push_back({&sequences[i], text, LogitsRows::kAll, i, StepKind::kPrompt, nullptr, i > 0 ? &sequences[0] : nullptr});
  Logits together, after;
  EXPECT_TRUE(engine.Prefill(items, Into(together)));
  for (size_t i = 0; i < sequences.size(); ++i) {
    EXPECT_EQ(sequences[i].tokens(), text);
    engine.Decode({{&sequences[i], next, LogitsRows::kLast, i}}, Into(after));
    Logits alone, alone_after;
    Sequence sequence = make(specs[i]);
    engine.Prefill({{&sequence, text, LogitsRows::kAll, i}}, Into(alone));
    engine.Decode({{&sequence, next, LogitsRows::kLast, i}}, Into(alone_after));
    EXPECT_EQ(together[i], alone[i]) << specs[i];
    EXPECT_EQ(after[i], alone_after[i]) << specs[i];
    EXPECT_EQ(sequences[i].Stats().kv_bytes, sequence.Stats().kv_bytes) << specs[i];
  }
  EXPECT_EQ(stranger.tokens(), other);
}

// Who reads with another fails with it, and with nobody else.
TEST_F(StepFailure, WhoReadsWithAnotherFailsWithIt) {
  Engine engine(model_, {.threads = 1, .compute = ComputeChoice::kF32});
  const std::vector<int32_t> prompt = Tokens(60, 1), other = Tokens(50, 2);
  const auto config = engine.MakeCacheConfig(CacheSpec::Parse("h2o(12)"), 96);
  Sequence leader(config), follower(config), b(config);
  std::atomic<bool> cancel{false};
  std::vector<size_t> failed;
  Logits logits;
  const StepControl control{.progress = [&](double) { cancel = true; },
                            .on_failure = [&](size_t tag, const Error&) { failed.push_back(tag); }};
  EXPECT_TRUE(engine.Prefill({{&leader, prompt, LogitsRows::kLast, 0, StepKind::kPrompt, &cancel},
                              {&follower, prompt, LogitsRows::kLast, 1, StepKind::kPrompt, nullptr, &leader},
                              {&b, other, LogitsRows::kLast, 2}}, Into(logits), control));
  EXPECT_EQ(failed, (std::vector<size_t>{0, 1}));
  EXPECT_TRUE(leader.interrupted());
  EXPECT_TRUE(follower.interrupted());
  EXPECT_EQ(b.tokens(), other);
  EXPECT_EQ(logits.size(), 1u);

  failed.clear();
  Sequence full(engine.MakeCacheConfig(CacheSpec(), 40)), with_it(engine.MakeCacheConfig(CacheSpec(), 96));
  engine.Prefill({{&full, prompt, LogitsRows::kNone, 0}, {&with_it, prompt, LogitsRows::kNone, 1, StepKind::kPrompt, nullptr, &full}}, {}, control);
  EXPECT_EQ(failed, (std::vector<size_t>{0, 1}));  // the first does not fit its context
  EXPECT_FALSE(with_it.interrupted());
}

TEST_F(StepFailure, NotEveryPromptCanBeReadWithAnother) {
  Engine engine(model_, {.threads = 1, .compute = ComputeChoice::kF32});
  const std::vector<int32_t> text = Tokens(20, 1), other = Tokens(20, 2);
  const auto make = [&](const char* spec) { return Sequence(engine.MakeCacheConfig(CacheSpec::Parse(spec), 96)); };
  Sequence a = make("full"), b = make("h2o(12)"), coded = make("full+bf16"), unrotated = make("window(9, positions=cache)"),
           chunked = make("h2o(12)+prefill(chunk=16)"), seen = make("full");
  engine.Prefill({{&seen, text}});
  const auto refused = [&](StepItems items, const char* word) {
    try {
      engine.Prefill(items);
      ADD_FAILURE() << "accepted: " << word;
    } catch (const Error& error) {
      EXPECT_NE(std::string(error.what()).find(word), std::string::npos) << error.what();
    }
  };
  const auto with = [&](Sequence& own, const std::vector<int32_t>& tokens, const Sequence& leader) {
    return StepItem{&own, tokens, LogitsRows::kNone, 0, StepKind::kPrompt, nullptr, &leader};
  };
  refused({{&a, text}, with(b, other, a)}, "same tokens");
  refused({{&a, text}, with(coded, text, a)}, "in the same way");
  refused({{&a, text}, with(unrotated, text, a)}, "in the same way");
  refused({{&a, text}, with(chunked, text, a)}, "first of both");
  refused({{&a, text}, with(seen, text, a)}, "first of both");
  refused({with(b, text, a), {&a, text}}, "comes before it");
  refused({with(b, text, a)}, "comes before it");
  for (const Sequence* sequence : {&a, &b, &coded, &unrotated, &chunked}) EXPECT_TRUE(sequence->tokens().empty());
}

}  // namespace
}  // namespace lesskv
