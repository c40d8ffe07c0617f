// Caches that outlive their texts: conversations that go on without being read anew, in memory and from the store.
#include <fstream>
#include <map>

#include "kernels/linear/linear.h"
#include "kvcache/residual/sidecar.h"
#include "server/reuse_harness.h"

namespace lesskv::server_test {
namespace {

size_t Resident() {
  size_t pages = 0;
  std::ifstream("/proc/self/statm") >> pages >> pages;
  return pages * static_cast<size_t>(::sysconf(_SC_PAGESIZE));
}

TEST_F(ReuseTest, AConversationGoesOnAsOneSequence) {
  Start({.kv = kSpecs});
  size_t cached = 0;
  std::map<std::string, double> evicted;
  for (const std::string& spec : kSpecs) {
    Streamed alone(engine_, *tokenizer_, spec);
    const std::vector<int32_t> first = Ids("the tea");
    const Json one = Ask(first, {{"kv_policy", spec}});
    EXPECT_EQ(Text(one), alone.Say(first)) << spec;
    EXPECT_EQ(Cached(one), 0u);
    std::vector<int32_t> prompt = Joined(alone.text(), Ids(" and then"));
    for (int turn = 0; turn < 3; ++turn) {
      const size_t seen = alone.seen();
      const std::string text = alone.Say(Ids(" and then"));
      if (spec == "full") {
        const Json anew = Ask(prompt, {{"cache_prompt", false}});
        EXPECT_EQ(Cached(anew), 0u);
        EXPECT_EQ(Text(anew), text);
      }
      const Json next = Ask(prompt, {{"kv_policy", spec}});
      EXPECT_EQ(Cached(next), seen) << spec;
      cached += seen;
      EXPECT_EQ(Text(next), text) << spec << " turn " << turn;
      EXPECT_EQ(next["usage"]["kv"]["rows"], alone.rows()) << spec;
      EXPECT_EQ(next["usage"]["prompt_tokens"], prompt.size());
      prompt = Joined(alone.text(), Ids(" and then"));
    }
    evicted[CacheSpec::Parse(spec).ToString()] = static_cast<double>(alone.seen()) - alone.rows();
  }
  const SchedulerMetrics metrics = scheduler_->Metrics();
  for (const auto& [spec, rows] : evicted) EXPECT_NEAR(metrics.specs.at(spec).tokens_evicted, rows, 1e-6) << spec;
  EXPECT_EQ(metrics.prefix_hits, 3 * kSpecs.size());
  EXPECT_EQ(metrics.prefix_tokens, cached);
  EXPECT_NE(Get("/metrics").body.find(fmt::format("\nlesskv_prefix_hits_total {}\n", metrics.prefix_hits)),
            std::string::npos);
}

TEST_F(ReuseTest, OtherTextsAndOtherCachesShareNothing) {
  Start();
  const std::vector<int32_t> prompt = Ids("the tea");
  Streamed alone(engine_, *tokenizer_, "full");
  alone.Say(prompt);
  Ask(prompt);
  const std::vector<int32_t> next = Joined(alone.text(), Ids(" and"));
  EXPECT_EQ(Cached(Ask(next, {{"kv_policy", "window(24)"}})), 0u);
  std::vector<int32_t> other = next;
  other[3] = other[3] == 5 ? 6 : 5;
  EXPECT_EQ(Cached(Ask(other)), 0u);
  EXPECT_EQ(Cached(Ask(prompt)), 0u);  // nothing would be left to read
  EXPECT_EQ(Cached(Ask(next)), alone.seen());
}

// A sidecar with feature maps that matter.
void WriteMaps(const Model& model, const fs::path& file, uint64_t seed) {
  const ModelConfig& config = model.config();
  Sidecar sidecar = InitialSidecar({.n_layers = config.n_layers,
                                    .n_heads = config.n_heads,
                                    .n_kv_heads = config.n_kv_heads,
                                    .head_dim = config.head_dim,
                                    .rank = 4,
                                    .hidden = 8},
                                   seed);
  sidecar.model_fingerprint = model.fingerprint();
  ShiftLogMass(sidecar, 9);
  WriteSidecar(file.string(), sidecar);
}

// What has been trained is read when the server starts: texts, and conversations from the store, go on with that.
TEST_F(ReuseTest, WhatBecomesOfTheSidecarsFileDoesNotMatter) {
  const fs::path file = fs::temp_directory_path() / fmt::format("lesskv_sidecar_{}", ::getpid());
  WriteMaps(engine_.model(), file, 1);
  const std::string spec = CacheSpec::Parse(fmt::format("h2o(24)+less(file=\"{}\")", file.string())).ToString();
  const auto start = [&] {
    Start({.scheduler = {.max_running = 1, .max_idle = 1}, .store = folder_, .kv = {spec, "window(24)"}});
  };
  start();
  Streamed alone(engine_, *tokenizer_, spec);
  std::vector<int32_t> prompt = Ids("the tea and the sea and the tea again");
  const auto ask = [&] {  // and something else, so that what is idle is this, once the store has the first
    const uint64_t before = store_->Metrics().saved;
    const Json answer = Ask(prompt);
    EXPECT_TRUE(Soon([&] { return store_->Metrics().saved > before; }));
    Ask(Ids("x"), {{"kv_policy", "window(24)"}});
    return answer;
  };
  EXPECT_EQ(Text(ask()), alone.Say(prompt));
  WriteMaps(engine_.model(), file, 2);
  for (const char* const then : {"another", "none"}) {
    prompt = Joined(alone.text(), Ids(" and then"));
    const size_t seen = alone.seen();
    const std::string text = alone.Say(Ids(" and then"));
    const Json next = ask();
    EXPECT_EQ(Cached(next), seen) << then;
    EXPECT_EQ(Text(next), text) << then;
    EXPECT_EQ(Text(Ask(Ids("the sea"), {{"protected_spans", {{0, 1}}}})).empty(), false) << then;
    fs::remove(file);
  }
  EXPECT_GE(store_->Metrics().restored, 2u);
  EXPECT_EQ(store_->Metrics().damaged, 0u) << Log();
  Stop();
  EXPECT_THROW(start(), Error);
}

TEST_F(ReuseTest, ABeginningThatSeveralShareIsKept) {
  Start({.kv = kSpecs});
  const std::string system = "You are a ship's cook who speaks of nothing but the sea and tea.";
  for (const std::string spec : {"full", "window(24)+prefill(chunk=8)", "cascade(24, block=8)"}) {
    std::vector<size_t> cached;
    for (const char* const question : {" a?", " b?", " c?", " d?", " e?"}) {
      const std::vector<int32_t> prompt = Ids(system + question);
      Streamed alone(engine_, *tokenizer_, spec);
      const Json answer = Ask(prompt, {{"kv_policy", spec}});
      EXPECT_EQ(Text(answer), alone.Say(prompt)) << spec << question;
      cached.push_back(Cached(answer));
    }
    const size_t whole = CommonPrefix(Ids(system + " a?"), Ids(system + " b?"));
    // What is read behind a copy is more than a few tokens, so that products round as those of a whole prompt.
    const size_t kept = spec == "full" ? Ids(system + " b?").size() - (kMostFewTokens + 1) : whole / 8 * 8;
    EXPECT_LE(kept, whole);
    EXPECT_EQ(cached, (std::vector<size_t>{0, 0, kept, kept, kept})) << spec;
  }
}

TEST_F(ReuseTest, ProtectedTokensAreTheRequests) {
  Start();
  const std::vector<int32_t> first = Ids("the tea was cold");
  const Json spans = {{"kv_policy", "h2o(24)"}, {"protected_spans", {{1, 3}}}};
  Streamed alone(engine_, *tokenizer_, "h2o(24)", {{1, 3}});
  EXPECT_EQ(Text(Ask(first, spans)), alone.Say(first));
  const std::vector<int32_t> next = Joined(alone.text(), Ids(" and it was late in the evening"));
  Json other = spans;
  other["protected_spans"] = {{1, 4}};
  EXPECT_EQ(Cached(Ask(next, other)), 0u);
  Json more = spans;
  const size_t mark = next.size() - 20;
  more.update({{"protected_spans", {{1, 3}, {mark, mark + 4}}},
               {"stream", true},
               {"kv_stats", 100},
               {"stream_options", {{"include_usage", true}}},
               {"prompt", next},
               {"max_tokens", 30},
               {"ignore_eos", true},
               {"temperature", 0}});
  const std::vector<Json> events = Events(Post("/v1/completions", more));
  EXPECT_EQ(events.back()["usage"]["prompt_tokens_details"]["cached_tokens"], alone.seen());
  Json last;
  for (const Json& event : events)
    if (event["object"] == "lesskv.kv") last = event["kv"];
  for (const Json& layer : last["layers"])
    for (const Json& runs : layer)
      for (const size_t position : {size_t{1}, size_t{2}, mark, mark + 3}) {
        bool held = false;
        for (size_t i = 0; i < runs.size(); i += 2) held = held || (runs[i] <= position && position < runs[i + 1]);
        EXPECT_TRUE(held) << position << " in " << runs;
      }
}

TEST_F(ReuseTest, PicturesShowWhoIsInTheCache) {
  Start();
  const Json body = {{"prompt", "the tea"},       {"temperature", 0}, {"max_tokens", 60}, {"ignore_eos", true},
                     {"kv_policy", "window(24)"}, {"stream", true},   {"kv_stats", 10}};
  const std::vector<Json> events = Events(Post("/v1/completions", body));
  size_t pictures = 0;
  Json kv;
  for (const Json& event : events)
    if (event["object"] == "lesskv.kv") kv = event["kv"], ++pictures;
  EXPECT_GE(pictures, 1u);  // some may be overtaken by the next
  EXPECT_EQ(kv["rows"], 24);
  const size_t seen = kv["seen"].get<size_t>();
  EXPECT_EQ(seen, tokenizer_->Encode("the tea", true, true).size() + 59);  // the last one shows the end, whose token is not read
  ASSERT_EQ(kv["layers"].size(), engine_.model().config().n_layers);
  for (const Json& layer : kv["layers"])
    for (const Json& runs : layer) {
      size_t held = 0;
      for (size_t i = 0; i < runs.size(); i += 2) held += runs[i + 1].get<size_t>() - runs[i].get<size_t>();
      EXPECT_EQ(held, 24u);
      EXPECT_EQ(runs.back(), seen);
    }
  EXPECT_EQ(Complete({{"kv_stats", 10}}).status, 400);
  EXPECT_EQ(Complete({{"kv_stats", 0}, {"stream", true}}).status, 400);
}

// A later turn's text counts what it adds to what the cache had done before.
TEST_F(ReuseTest, AConversationIsCountedOnce) {
  const fs::path file = fs::temp_directory_path() / fmt::format("lesskv_sidecar_{}", ::getpid());
  WriteMaps(engine_.model(), file, 1);
  std::vector<std::string> specs = {"h2o(24)+merge", fmt::format("h2o(24)+less(file=\"{}\")", file.string())};
  for (std::string& spec : specs) spec = CacheSpec::Parse(spec).ToString();
  Start({.kv = specs});
  SpecMetrics all;
  for (const std::string& spec : specs) {
    Streamed alone(engine_, *tokenizer_, spec);
    const std::vector<int32_t> first = Ids("the tea and the sea and the tea again, and then the sea"), more = Ids(" and so");
    EXPECT_EQ(Text(Ask(first, {{"kv_policy", spec}})), alone.Say(first)) << spec;
    const std::vector<int32_t> next = Joined(alone.text(), more);
    const size_t seen = alone.seen();
    const Json answer = Ask(next, {{"kv_policy", spec}});
    EXPECT_EQ(Text(answer), alone.Say(more)) << spec;
    EXPECT_EQ(Cached(answer), seen) << spec;
    ASSERT_TRUE(Soon([&] { return scheduler_->Metrics().running == 0; }));
    const SpecMetrics of_spec = scheduler_->Metrics().specs.at(alone.sequence().config().spec_text());
    const CacheStats stats = alone.sequence().Stats();
    EXPECT_NEAR(of_spec.tokens_evicted, stats.tokens_dropped + stats.tokens_absorbed + stats.tokens_merged, 1e-6) << spec;
    EXPECT_NEAR(of_spec.tokens_absorbed, stats.tokens_absorbed, 1e-6) << spec;
    EXPECT_NEAR(of_spec.tokens_merged, stats.tokens_merged, 1e-6) << spec;
    all.tokens_absorbed += of_spec.tokens_absorbed;
    all.tokens_merged += of_spec.tokens_merged;
  }
  EXPECT_GT(all.tokens_absorbed, 0);
  EXPECT_GT(all.tokens_merged, 0);
  fs::remove(file);
}

TEST_F(ReuseTest, IdleCachesMakeRoomOldestFirst) {
  const auto config = engine_.MakeCacheConfig(CacheSpec::Parse("full"), kCtx);
  const size_t one = config->Plan(10, 300).bytes_peak;
  Start({.scheduler = {.max_running = 3, .max_queued = 8, .kv_memory = 3 * one + one / 2, .step_tokens = 16}});
  std::vector<std::vector<int32_t>> texts;
  for (const char* const prompt : {"aaaaaaaa", "bbbbbbbb", "cccccccc", "dddddddd"}) {
    Streamed alone(engine_, *tokenizer_, "full");
    const std::vector<int32_t> ids = Ids(prompt);
    EXPECT_EQ(Text(Ask(ids, {{"max_tokens", 300}})), alone.Say(ids, 300));
    texts.push_back(Joined(alone.text(), Ids(" and")));
    ASSERT_TRUE(Soon([&] { return scheduler_->Metrics().running == 0; }));
    const SchedulerMetrics metrics = scheduler_->Metrics();
    EXPECT_LE(metrics.idle_bytes + metrics.kv_bytes_reserved, 3 * one + one / 2);
    EXPECT_GT(metrics.idle_bytes, 0u);
  }
  EXPECT_GE(scheduler_->Metrics().idle_dropped, 1u);
  EXPECT_GT(Cached(Ask(texts[3], {{"max_tokens", 1}})), 0u);
  EXPECT_EQ(Cached(Ask(texts[0], {{"max_tokens", 1}})), 0u);
}

// A beginning that several texts share is there once: it counts once, and more of them run at a time.
TEST_F(ReuseTest, ASharedBeginningCountsOnce) {
  const size_t n = 8192, n_tail = 16, n_output = 2000, n_texts = 6;
  const auto full = engine_.MakeCacheConfig(CacheSpec::Parse("full"), kCtx);
  const auto bytes = [&](size_t tokens) { return full->Plan(tokens, 0).bytes_end; };
  const size_t one = full->Plan(n + n_tail, n_output).bytes_peak, limit = 2 * one + one / 4;
  Start({.scheduler = {.max_running = n_texts, .max_queued = 8, .kv_memory = limit, .step_tokens = 512},
         .max_prompt = n + n_tail});
  const auto prompt = [&](int32_t last) {
    std::vector<int32_t> ids(n + n_tail);
    for (size_t i = 0; i < n; ++i) ids[i] = static_cast<int32_t>(100 + i % 97);
    std::fill(ids.begin() + static_cast<std::ptrdiff_t>(n), ids.end(), last);
    return ids;
  };
  Ask(prompt(50), {{"max_tokens", 2}});
  Ask(prompt(51), {{"max_tokens", 2}});  // what both begin with is kept
  for (int32_t i = 52; i < 55; ++i) EXPECT_EQ(Cached(Ask(prompt(i), {{"max_tokens", 2}})), n);
  ASSERT_TRUE(Soon([&] { return scheduler_->Metrics().idle == 6; }));
  const size_t tail = bytes(n_tail + 2) + 4 * (n + n_tail + 2);  // and the tokens' ids
  EXPECT_GE(scheduler_->Metrics().idle_bytes, 2 * bytes(n));
  EXPECT_LE(scheduler_->Metrics().idle_bytes, 2 * bytes(n) + 6 * tail);
  std::vector<std::unique_ptr<Connection>> streams;
  for (size_t i = 0; i < n_texts; ++i) {
    streams.push_back(std::make_unique<Connection>(port_));
    const Json body = {{"prompt", prompt(60 + static_cast<int32_t>(i))},
                       {"temperature", 0},
                       {"max_tokens", n_output},
                       {"stream", true}};
    streams[i]->Send(RequestText("POST", "/v1/completions", body.dump()));
  }
  size_t most = 0;
  ASSERT_TRUE(Soon([&] {
    const SchedulerMetrics metrics = scheduler_->Metrics();
    EXPECT_LE(metrics.kv_bytes_reserved, limit);
    EXPECT_LE(metrics.kv_bytes, metrics.kv_bytes_reserved);
    EXPECT_LE(metrics.kv_bytes + metrics.idle_bytes, limit);
    most = std::max(most, metrics.running);
    return most >= 4;
  }));
  ASSERT_TRUE(Soon([&] {
    const SchedulerMetrics metrics = scheduler_->Metrics();
    return metrics.running >= 4 && metrics.kv_bytes <= bytes(n) + metrics.running * bytes(n_output + 2 * 128);
  }));
  streams.clear();
  SchedulerMetrics after;
  ASSERT_TRUE(Soon([&] {  // those that waited may yet begin, and have their bytes before they run
    after = scheduler_->Metrics();
    return after.running == 0 && after.queued == 0 && after.kv_bytes_reserved == 0;
  }));
  EXPECT_EQ(after.kv_bytes, 0u);
  EXPECT_LE(after.idle_bytes, limit);
  const Json again = Ask(prompt(60), {{"max_tokens", 40}});
  EXPECT_EQ(Cached(again), n);
  Streamed alone(engine_, *tokenizer_, "full");
  EXPECT_EQ(Text(again), alone.Say(prompt(60), 40));
}

TEST_F(ReuseTest, MemoryOfIdleCachesIsReturned) {
#ifdef __SANITIZE_ADDRESS__
  GTEST_SKIP() << "AddressSanitizer keeps freed memory";
#endif
  const size_t n = 4000, n_texts = 6;
  const auto config = engine_.MakeCacheConfig(CacheSpec::Parse("full"), kCtx);
  const size_t one = config->Plan(n, 2).bytes_peak;
  Start({.scheduler = {.max_running = 1, .max_queued = 8, .kv_memory = (n_texts + 2) * one, .step_tokens = 512},
         .max_prompt = n_texts * n});
  const auto prompt = [](size_t length, int32_t first) {
    std::vector<int32_t> ids(length, 100);
    ids[0] = first;
    return ids;
  };
  Ask(prompt(n, 50), {{"max_tokens", 2}});
  const size_t before = Resident();
  for (size_t i = 1; i < n_texts; ++i) Ask(prompt(n, 60 + static_cast<int32_t>(i)), {{"max_tokens", 2}});
  const size_t full = Resident();
  EXPECT_GT(full, before + (n_texts - 2) * one / 2);
  // A text that may become as large as all of them drives them out when it begins, and itself ends at once.
  int32_t end = 0;
  while (!tokenizer_->IsEndOfGeneration(end)) ++end;
  EXPECT_EQ(Complete({{"prompt", prompt(20, 80)},
                      {"max_tokens", (n_texts + 1) * n},
                      {"logit_bias", {{std::to_string(end), 100}}}})
                .json()["usage"]["completion_tokens"],
            1);
  EXPECT_GE(scheduler_->Metrics().idle_dropped, n_texts - 1);
  EXPECT_LT(Resident(), full - (n_texts - 2) * one / 2);
}

TEST_F(ReuseTest, AStoredConversationOutlivesTheServer) {
  const Options options{.store = folder_.string(), .kv = kSpecs};
  for (const std::string& spec : kSpecs) {
    Start(options);
    Streamed alone(engine_, *tokenizer_, spec);
    Ask(Ids("the sea"), {{"kv_policy", spec}});
    alone.Say(Ids("the sea"));
    ASSERT_TRUE(Saved(1));
    Stop();
    std::ofstream(folder_ / "x.session.77.tmp") << "half a file";
    Start(options);
    EXPECT_FALSE(fs::exists(folder_ / "x.session.77.tmp"));
    const size_t seen = alone.seen();
    const std::vector<int32_t> prompt = Joined(alone.text(), Ids(" and then"));
    const Json next = Ask(prompt, {{"kv_policy", spec}});
    EXPECT_EQ(Cached(next), seen) << spec;
    EXPECT_EQ(Text(next), alone.Say(Ids(" and then"))) << spec;
    EXPECT_EQ(store_->Metrics().restored, 1u);
    EXPECT_NE(Get("/metrics").body.find("\nlesskv_store_restored_total 1\n"), std::string::npos);
    Stop();
  }
  EXPECT_EQ(Log(), "");
}

TEST_F(ReuseTest, ADamagedFileIsPassedOver) {
  const Options options{.store = folder_.string()};
  Streamed alone(engine_, *tokenizer_, "full");
  StoreSea(options, alone);
  for (const fs::directory_entry& entry : fs::directory_iterator(folder_)) Damage(entry.path(), entry.file_size() / 2);
  std::ofstream(folder_ / "notes.txt") << "of somebody else";
  Start(options);
  const std::vector<int32_t> prompt = Joined(alone.text(), Ids(" and then"));
  const Json next = Ask(prompt);
  EXPECT_EQ(Cached(next), 0u);
  EXPECT_EQ(Text(next), alone.Say(Ids(" and then")));
  EXPECT_EQ(store_->Metrics().damaged, 1u);
  EXPECT_NE(Log().find("damaged"), std::string::npos) << Log();
  EXPECT_TRUE(fs::exists(folder_ / "notes.txt"));
}

// A name says what a file should hold; what it holds is looked at.
TEST_F(ReuseTest, AFileUnderAnothersNameIsPassedOver) {
  const Options options{.store = folder_.string()};
  const std::vector<int32_t> one = {40, 41, 42, 43, 44, 45}, other = {50, 51, 52, 53, 54, 55};
  Start(options);
  Ask(one, {{"max_tokens", 1}});
  ASSERT_TRUE(Saved(1));
  const fs::path first = fs::directory_iterator(folder_)->path();
  Ask(other, {{"max_tokens", 1}});
  ASSERT_TRUE(Saved(2));
  Stop();
  for (const fs::directory_entry& entry : fs::directory_iterator(folder_))
    if (entry.path() != first) fs::copy_file(first, entry.path(), fs::copy_options::overwrite_existing);
  Start(options);
  const std::vector<int32_t> prompt = Joined(other, Ids(" and then"));
  const Json next = Ask(prompt);
  EXPECT_EQ(Cached(next), 0u);
  EXPECT_EQ(Text(next), Text(Ask(prompt, {{"cache_prompt", false}})));
  EXPECT_EQ(store_->Metrics().damaged, 1u);
  EXPECT_EQ(Cached(Ask(Joined(one, Ids(" and then")))), one.size());
}

// The same text with other protected tokens is another conversation.
TEST_F(ReuseTest, StoredNamesTellProtectedTokensApart) {
  Start({.store = folder_.string()});
  const std::vector<int32_t> prompt(30, 'x');
  Ask(prompt, {{"kv_policy", "window(24)"}, {"max_tokens", 1}, {"protected_spans", {{5, 7}}}});
  ASSERT_TRUE(Saved(1));
  Ask(prompt, {{"kv_policy", "window(24)"}, {"max_tokens", 1}, {"protected_spans", {{6, 8}}}});
  EXPECT_TRUE(Saved(2));
}

// A damaged conversation that is had again is written anew, found again, and counted once.
TEST_F(ReuseTest, ADamagedFileIsWrittenAnew) {
  const Options options{.scheduler = {.max_running = 3, .max_queued = 8, .step_tokens = 16, .max_idle = 1},
                        .store = folder_.string()};
  Streamed alone(engine_, *tokenizer_, "full");
  StoreSea(options, alone);
  Damage(fs::directory_iterator(folder_)->path(), 200);
  Start(options);
  EXPECT_EQ(Cached(Ask(Joined(alone.text(), Ids(" and then")))), 0u);
  ASSERT_TRUE(Saved(1));
  Ask(Ids("the sea"));
  ASSERT_TRUE(Saved(2));
  Ask(Ids("a boat"));  // the only idle one
  ASSERT_TRUE(Saved(3));
  EXPECT_EQ(Cached(Ask(Joined(alone.text(), Ids(" but then")))), alone.seen());
  ASSERT_TRUE(Saved(4));
  size_t bytes = 0;
  for (const fs::directory_entry& entry : fs::directory_iterator(folder_)) bytes += entry.file_size();
  EXPECT_EQ(store_->Metrics().usage->bytes, bytes);
  EXPECT_EQ(store_->Metrics().damaged, 1u);
}

TEST_F(ReuseTest, TheStoreKeepsToItsSize) {
  Start({.store = folder_.string()});
  Ask(Ids("the sea"));
  ASSERT_TRUE(Saved(1));
  const size_t one = store_->Metrics().usage->bytes;
  Stop();
  Start({.store = folder_.string(), .store_bytes = 3 * one});
  for (const char* const prompt : {"aaaa", "bbbb", "cccc", "dddd", "eeee"}) Ask(Ids(prompt));
  ASSERT_TRUE(Saved(5));
  const StoreUsage usage = *store_->Metrics().usage;
  EXPECT_LE(usage.bytes, 3 * one);
  EXPECT_GE(usage.files, 2u);
  EXPECT_GE(usage.removed, 3u);
  size_t on_disk = 0;
  for (const fs::directory_entry& entry : fs::directory_iterator(folder_)) on_disk += entry.file_size();
  EXPECT_EQ(on_disk, usage.bytes);
  Stop();
  Start({.store = folder_.string(), .store_bytes = one / 2});
  EXPECT_EQ(store_->Metrics().usage->files, 0u);
  Ask(Ids("the sea"));
  EXPECT_TRUE(Soon([&] { return store_->Metrics().skipped == 1; }));
}

TEST_F(ReuseTest, WhatWasNotUsedForLongestLeavesTheDirectory) {
  const std::vector<std::byte> bytes(1000, std::byte{7});
  const std::vector<SessionName> names = {{1, 0, 5}, {2, 0, 6}, {3, 0, 7}, {4, 0, 8}};
  DirectoryBackend backend(folder_.string(), 3500);
  for (size_t i = 0; i < 3; ++i) backend.Write(names[i], bytes);
  EXPECT_TRUE(backend.Read(names[0], [&](auto value) { EXPECT_TRUE(std::ranges::equal(value, bytes)); }));
  EXPECT_TRUE(backend.Touch(names[1]));
  backend.Write(names[3], bytes);
  EXPECT_EQ(backend.Has(names), (std::vector<bool>{true, true, false, true}));
  EXPECT_EQ(backend.Lengths(), (std::vector<size_t>{5, 6, 8}));
  EXPECT_FALSE(fs::exists(backend.Where(names[2])));
  EXPECT_EQ(backend.Usage()->bytes, 3000u);
}

// The order of use outlives the server, and who takes files away takes nothing else.
TEST_F(ReuseTest, FilesSayWhenTheyWereUsedAndMayBeTakenAway) {
  const std::vector<std::byte> bytes(1000, std::byte{7});
  const std::vector<SessionName> names = {{1, 0, 5}, {2, 0, 6}, {3, 0, 7}};
  {
    DirectoryBackend backend(folder_.string(), 3500);
    for (const SessionName& name : names) {
      backend.Write(name, bytes);
      const fs::path file = backend.Where(name);
      fs::last_write_time(file, fs::last_write_time(file) - 1h);  // a file's time goes in steps, which may be long
    }
    EXPECT_TRUE(backend.Touch(names[0]));
  }
  EXPECT_EQ(DirectoryBackend(folder_.string(), 1500).Has(names), (std::vector<bool>{true, false, false}));
  DirectoryBackend backend(folder_.string(), 3500);
  for (const SessionName& name : {names[1], names[2]}) {
    backend.Write(name, bytes);
    fs::remove(backend.Where(name));
  }
  EXPECT_FALSE(backend.Touch(names[1]));
  EXPECT_FALSE(backend.Read(names[2], [](auto) { FAIL(); }));
  EXPECT_EQ(backend.Has(names), (std::vector<bool>{true, false, false}));
  EXPECT_EQ(backend.Usage()->bytes, 1000u);
}

// Nothing of the first one's is touched: what looks like a leftover may be what it is writing.
TEST_F(ReuseTest, ASecondServerIsRefusedADirectory) {
  std::optional<DirectoryBackend> first(std::in_place, folder_.string(), 3500);
  const fs::path writing = fs::path(folder_) / "x.session.tmp";
  std::ofstream(writing) << "half";
  EXPECT_THROW(DirectoryBackend(folder_.string(), 3500), Error);
  EXPECT_TRUE(fs::exists(writing));
  first.reset();
  EXPECT_NO_THROW(DirectoryBackend(folder_.string(), 3500));
  EXPECT_FALSE(fs::exists(writing));
}

TEST_F(ReuseTest, AStoreThatCannotBeIsRefused) {
  std::ofstream(folder_.string()) << "a file";
  EXPECT_THROW(DirectoryBackend(folder_.string(), 1 << 20), Error);
}

}  // namespace
}  // namespace lesskv::server_test
