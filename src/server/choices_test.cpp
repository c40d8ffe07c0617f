// Several texts of one prompt, and log-probabilities of what is generated.
#include <atomic>
#include <cmath>
#include <limits>
#include <set>

#include "server/logprobs.h"
#include "server/server_harness.h"
#include "tokenizer/utf8.h"

namespace lesskv::server_test {
namespace {

class ChoicesTest : public ServerTest {
 protected:
  // Texts that differ, read anew each time.
  Json Drawn(Json more) const {
    Json body = {{"temperature", 1.5}, {"seed", 7}, {"max_tokens", 40}, {"cache_prompt", false}};
    body.update(more);
    const Reply reply = Complete(body);
    EXPECT_EQ(reply.status, 200) << reply.body;
    return reply.json();
  }

  // ln of the softmax of what the model says after `ids`.
  std::vector<double> Logprobs(const std::vector<int32_t>& ids) const {
    Engine engine(engine_.shared_model(), {.threads = 1, .compute = ComputeChoice::kF32, .batch_invariant = true});
    Sequence sequence(engine.MakeCacheConfig(CacheSpec::Parse("full"), kCtx));
    std::vector<double> logprobs;
    engine.Prefill({{&sequence, ids, LogitsRows::kLast}}, [&](std::span<const LogitsRow> rows) {
      logprobs.assign(rows.back().logits.begin(), rows.back().logits.begin() + 272);
    });
    double sum = 0;
    for (const double logit : logprobs) sum += std::exp(logit);
    for (double& logit : logprobs) logit -= std::log(sum);
    return logprobs;
  }

  // Of a completion's token, "bytes:\xc3" or its text.
  int32_t TokenOf(std::string text) const {
    constexpr std::string_view kBytes = "bytes:\\x";
    if (text.starts_with(kBytes)) text = static_cast<char>(std::stoi(text.substr(kBytes.size()), nullptr, 16));
    for (int32_t id = 0; id < static_cast<int32_t>(tokenizer_->size()); ++id)
      if (tokenizer_->TokenBytes(id) == text && tokenizer_->Type(id) != TokenType::kControl) return id;
    ADD_FAILURE() << text;
    return 0;
  }

  static std::string Bytes(const Json& token) {
    std::string bytes;
    if (token["bytes"].is_null()) return bytes;
    for (const Json& byte : token["bytes"]) bytes += static_cast<char>(byte.get<int>());
    return bytes;
  }
};

TEST_F(ChoicesTest, EachChoiceIsWhatItsSeedSaysAlone) {
  Start();
  for (const char* const spec : {"full", "window(24)", "h2o(24)"}) {
    ASSERT_TRUE(Soon([&] { return scheduler_->Metrics().running == 0; }));
    const SchedulerMetrics before = scheduler_->Metrics();
    const Json same = {{"temperature", 4}, {"kv_policy", spec}, {"prompt", "the tea and the sea and the tea again"}};
    Json several = same;
    several["n"] = 3;
    const Json together = Drawn(several);
    ASSERT_TRUE(Soon([&] { return scheduler_->Metrics().running == 0; }));
    const SchedulerMetrics after = scheduler_->Metrics();
    const size_t prompt = together["usage"]["prompt_tokens"];
    EXPECT_EQ(after.prompt_tokens - before.prompt_tokens, prompt) << "the prompt is read once";
    EXPECT_EQ(after.jobs_finished - before.jobs_finished, 1u);
    ASSERT_EQ(together["choices"].size(), 3u);
    std::set<std::string> texts;
    size_t generated = 0;
    double rows = 0, bytes = 0;
    for (int i = 0; i < 3; ++i) {
      Json one = same;
      one["seed"] = 7 + i;
      const Json alone = Drawn(one);
      EXPECT_EQ(together["choices"][i]["index"], i);
      EXPECT_EQ(together["choices"][i]["text"], alone["choices"][0]["text"]) << spec << i;
      EXPECT_EQ(together["choices"][i]["finish_reason"], alone["choices"][0]["finish_reason"]);
      texts.insert(alone["choices"][0]["text"]);
      generated += alone["usage"]["completion_tokens"].get<size_t>();
      rows += alone["usage"]["kv"]["rows"].get<double>();
      bytes += alone["usage"]["kv"]["bytes_full"].get<double>();
      EXPECT_EQ(alone["usage"]["prompt_tokens"], prompt);
    }
    EXPECT_GT(texts.size(), 1u);
    EXPECT_EQ(together["usage"]["completion_tokens"], generated);
    EXPECT_EQ(together["usage"]["total_tokens"], prompt + generated);
    EXPECT_EQ(together["usage"]["kv"]["rows"], rows);
    EXPECT_EQ(together["usage"]["kv"]["bytes_full"], bytes);
  }
  EXPECT_TRUE(Soon([&] { return scheduler_->Metrics().kv_bytes_reserved == 0; }));
}

TEST_F(ChoicesTest, ChoicesHoldThePromptOnce) {
  const auto full = engine_.MakeCacheConfig(CacheSpec::Parse("full"), kCtx);
  const size_t n = 2000, one = full->Plan(n, 40).bytes_end, tail = full->Plan(256, 0).bytes_end + 4 * (n + 40);
  std::vector<int32_t> prompt(n);
  for (size_t i = 0; i < n; ++i) prompt[i] = static_cast<int32_t>(100 + i % 97);
  Start({.max_prompt = n});
  for (const char* const spec : {"full", "h2o(24)"}) {
    Drawn({{"prompt", prompt}, {"n", 3}, {"temperature", 4}, {"kv_policy", spec}});
    ASSERT_TRUE(Soon([&] { return scheduler_->Metrics().running == 0; }));
    const SpecMetrics metrics = scheduler_->Metrics().specs[spec];
    ASSERT_EQ(metrics.idle, 3u);
    if (spec == std::string("full")) {
      EXPECT_GT(metrics.idle_bytes, one);
      EXPECT_LT(metrics.idle_bytes, one + 3 * tail);
    }
    const std::string line = fmt::format("lesskv_spec_idle_bytes{{spec=\"{}\"}} {}\n", spec, metrics.idle_bytes);
    EXPECT_NE(Get("/metrics").body.find(line), std::string::npos);
  }
  Stop();
  Start({.scheduler = {.max_running = 3, .max_idle = 0}, .max_prompt = n});
  Drawn({{"prompt", prompt}, {"n", 3}});
  ASSERT_TRUE(Soon([&] { return scheduler_->Metrics().running == 0; }));
  EXPECT_EQ(scheduler_->Metrics().kv_bytes_reserved, 0u);
}

TEST_F(ChoicesTest, AStreamSaysOfEachEventWhoseItIs) {
  Start();
  const Json whole = Drawn({{"n", 3}, {"logprobs", 0}});
  const Reply reply = Complete({{"temperature", 1.5},
                                {"seed", 7},
                                {"max_tokens", 40},
                                {"n", 3},
                                {"logprobs", 0},
                                {"stream", true},
                                {"stream_options", {{"include_usage", true}}}});
  std::map<int, std::string> texts, ends;
  std::map<int, std::vector<std::string>> tokens;
  const std::vector<Json> events = Events(reply);
  for (const Json& event : events) {
    if (event["choices"].empty()) continue;
    ASSERT_EQ(event["choices"].size(), 1u);
    const Json& choice = event["choices"][0];
    const int index = choice["index"];
    EXPECT_FALSE(ends.contains(index)) << "nothing comes behind the end";
    texts[index] += choice["text"].get<std::string>();
    if (!choice["logprobs"].is_null())
      for (const Json& token : choice["logprobs"]["tokens"]) tokens[index].push_back(token);
    if (!choice["finish_reason"].is_null()) ends[index] = choice["finish_reason"];
  }
  ASSERT_EQ(ends.size(), 3u);
  for (int i = 0; i < 3; ++i) {
    EXPECT_EQ(texts[i], whole["choices"][i]["text"]);
    EXPECT_EQ(ends[i], whole["choices"][i]["finish_reason"]);
    EXPECT_EQ(Json(tokens[i]), whole["choices"][i]["logprobs"]["tokens"]);
  }
  EXPECT_EQ(events.back()["usage"]["completion_tokens"], whole["usage"]["completion_tokens"]);
  const Reply chat = Post("/v1/chat/completions",
                          {{"messages", {{{"role", "user"}, {"content", "x"}}}}, {"n", 2}, {"stream", true}, {"max_tokens", 3}});
  EXPECT_EQ(Events(chat)[0]["choices"][0]["delta"]["role"], "assistant");
  EXPECT_EQ(Events(chat)[1]["choices"][0]["delta"]["role"], "assistant");
  EXPECT_EQ(Events(chat)[1]["choices"][0]["index"], 1);
}

// However late the others are.
TEST_F(ChoicesTest, AnEndIsToldOnce) {
  Start();
  TextRequest request = ParseCompletionRequest(R"({"prompt":"the","n":2,"stream":true})", *context_);
  TextAnswer answer(*context_, request);
  JobState state;
  state.choices.resize(2);
  state.choices[0].finish = FinishReason::kStopString;
  const std::string first = answer.News(state);
  EXPECT_NE(first.find(R"("index":0,"text":"","logprobs":null,"finish_reason":"stop")"), std::string::npos) << first;
  EXPECT_EQ(answer.News(state), "");
  state.choices[1].finish = FinishReason::kLength;
  const std::string second = answer.News(state);
  EXPECT_NE(second.find(R"("index":1,"text":"","logprobs":null,"finish_reason":"length")"), std::string::npos) << second;
  EXPECT_EQ(second.find(R"("index":0)"), std::string::npos) << second;
}

// Choices that are alike have caches that are alike.
TEST_F(ChoicesTest, TheUsageIsThatOfAllCaches) {
  Start({.kv = {"h2o(24)+merge"}});
  const Json body = {{"max_tokens", 60}, {"ignore_eos", true}};
  const Json one = Complete(body).json()["usage"]["kv"];
  Json three = body;
  three["n"] = 3;
  const Json all = Complete(three).json()["usage"]["kv"];
  EXPECT_GT(one["merged"], 0);
  for (const char* const key : {"rows", "bytes", "bytes_full", "evicted", "merged"})
    EXPECT_NEAR(all[key].get<double>(), 3 * one[key].get<double>(), 1e-6) << key;
  EXPECT_GE(all["bytes_peak"], all["bytes"]);
}

// A token that cannot be: JSON has no number for that. It is listed though it is not among the likeliest.
TEST_F(ChoicesTest, WhatIsImpossibleHasANumber) {
  GeneratedToken token;
  token.text = "a";
  token.logprob = -std::numeric_limits<double>::infinity();
  TokenLogprob other;
  other.text = "b";
  other.logprob = -0.5;
  token.likeliest = {other};
  const std::vector<GeneratedToken> tokens = {token};
  EXPECT_EQ(ChatLogprobs(tokens)["content"][0]["logprob"], -9999);
  const nlohmann::ordered_json completion = CompletionLogprobs(tokens);
  EXPECT_EQ(completion["token_logprobs"][0], -9999);
  EXPECT_EQ(completion["top_logprobs"][0], (nlohmann::ordered_json{{"b", -0.5}, {"a", -9999}}));
}

// What ends behind the prompt ends all choices, and is counted once.
TEST_F(ChoicesTest, OneFailureIsThatOfAll) {
  Start({.max_time = 1s});
  const Reply reply =
      Complete({{"n", 3}, {"max_tokens", 150000}, {"ignore_eos", true}, {"kv_policy", "window(24)"}});
  EXPECT_NE(reply.body.find("time ran out"), std::string::npos) << reply.body.substr(0, 300);
  ASSERT_TRUE(Soon([&] { return scheduler_->Metrics().running == 0; }));
  EXPECT_EQ(scheduler_->Metrics().jobs_failed, 1u);
  EXPECT_EQ(scheduler_->Metrics().jobs_finished, 0u);
  EXPECT_TRUE(Soon([&] { return scheduler_->Metrics().kv_bytes_reserved == 0; }));
}

TEST_F(ChoicesTest, EveryChoiceCanBeGoneOnWith) {
  Start();
  const Json together = Complete({{"n", 3}, {"temperature", 2}, {"seed", 4}, {"logprobs", 0}}).json();
  ASSERT_TRUE(Soon([&] { return scheduler_->Metrics().running == 0; }));
  for (const Json& choice : together["choices"]) {
    std::vector<int32_t> prompt = tokenizer_->Encode("the tea", true, true);
    const size_t n_prompt = prompt.size();
    for (const Json& token : choice["logprobs"]["tokens"]) {
      prompt.push_back(TokenOf(token));
    }
    const size_t n_seen = prompt.size() - 1;  // the last token was not fed
    ASSERT_GT(n_seen, n_prompt);
    prompt.push_back(prompt[1]);
    const Json next = Complete({{"prompt", prompt}}).json();
    EXPECT_EQ(next["usage"]["prompt_tokens_details"]["cached_tokens"], n_seen);
  }
}

TEST_F(ChoicesTest, OneThatStopsDoesNotEndTheOthers) {
  Start();
  bool differ = false;
  for (int seed = 0; seed < 40 && !differ; seed += 3) {
    const Json together = Drawn({{"n", 3}, {"seed", seed}, {"stop", "e"}});
    std::set<std::string> reasons;
    for (int i = 0; i < 3; ++i) {
      const Json alone = Drawn({{"seed", seed + i}, {"stop", "e"}})["choices"][0];
      EXPECT_EQ(together["choices"][i]["text"], alone["text"]);
      EXPECT_EQ(together["choices"][i]["finish_reason"], alone["finish_reason"]);
      reasons.insert(alone["finish_reason"]);
    }
    differ = reasons.size() == 2;
  }
  EXPECT_TRUE(differ) << "some stop and some go on";
}

TEST_F(ChoicesTest, AClientThatVanishesEndsAll) {
  Start();
  {
    const Connection connection(port_);
    const Json body = {{"prompt", "the tea"}, {"max_tokens", 150000}, {"kv_policy", "window(24)"}, {"n", 3},
                       {"temperature", 0},    {"ignore_eos", true},   {"stream", true}};
    connection.Send(RequestText("POST", "/v1/completions", body.dump()));
    EXPECT_NE(connection.Some().find("200"), std::string::npos);
    EXPECT_TRUE(Soon([&] { return scheduler_->Metrics().running == 3u; }));
    EXPECT_EQ(Get("/slots").json()["free"], 0);
    EXPECT_TRUE(Soon([&] { return Get("/slots").json()["running"].size() == 3u; }));  // copies, once the prompt is read
  }
  EXPECT_TRUE(Soon([&] { return scheduler_->Metrics().running == 0; }));
  EXPECT_EQ(scheduler_->Metrics().jobs_cancelled, 1u);
  EXPECT_TRUE(Soon([&] { return scheduler_->Metrics().kv_bytes_reserved == 0; }));
  EXPECT_EQ(Complete({{"n", 3}}).status, 200);
}

TEST_F(ChoicesTest, PlacesAndBytesAreThoseOfAll) {
  const auto config = engine_.MakeCacheConfig(CacheSpec::Parse("full"), kCtx);
  const size_t one = config->Plan(tokenizer_->Encode("the tea", true, true).size(), 300).bytes_peak;
  Start({.scheduler = {.max_running = 3, .max_queued = 8, .kv_memory = 2 * one + one / 2, .step_tokens = 16}});
  const Json fitting = {{"n", 2}, {"max_tokens", 300}, {"ignore_eos", true}};
  EXPECT_EQ(Complete(fitting).json()["usage"]["completion_tokens"], 600);
  const Reply large = Complete({{"n", 3}, {"max_tokens", 300}});
  EXPECT_EQ(large.status, 400);
  EXPECT_NE(large.body.find("the caches of 3 choices may take"), std::string::npos) << large.body;
  const Reply many = Complete({{"n", 4}});
  EXPECT_EQ(many.status, 400);
  EXPECT_NE(many.body.find("n: expected a number in [1, 3], found '4'"), std::string::npos) << many.body;
  auto running = LongStream();
  Connection waiting(port_);
  waiting.Send(RequestText("POST", "/v1/completions", R"({"prompt":"the","max_tokens":3,"n":3})"));
  ASSERT_TRUE(Soon([&] { return scheduler_->Metrics().queued == 1; }));
  std::this_thread::sleep_for(100ms);
  EXPECT_EQ(scheduler_->Metrics().running, 1u);
  running.reset();
  EXPECT_EQ(ParseReply(waiting.All()).json()["choices"].size(), 3u);
}

// The prompt of three choices, which is read whole, and what leaves the cache as it is read, are counted once.
TEST_F(ChoicesTest, WhatChoicesShareIsCountedOnce) {
  Start();
  const Json body = {{"prompt", std::vector<int32_t>(60, 'x')}, {"kv_policy", "h2o(24)"}, {"n", 3},
                     {"max_tokens", 40},                        {"temperature", 1.5},     {"ignore_eos", true}};
  EXPECT_EQ(Complete(body).json()["usage"]["completion_tokens"], 120);
  ASSERT_TRUE(Soon([&] { return scheduler_->Metrics().running == 0; }));
  const SchedulerMetrics metrics = scheduler_->Metrics();
  EXPECT_EQ(metrics.prompt_tokens, 60u);
  EXPECT_EQ(metrics.generated_tokens, 120u);
  EXPECT_EQ(metrics.steps, 40u);
  EXPECT_NEAR(metrics.specs.at("h2o(24)").tokens_evicted, 60 - 24 + 3 * 39, 1e-9);
}

// Without a seed every choice of every request has one of its own.
TEST_F(ChoicesTest, WithoutASeedNoTwoTextsAreAlike) {
  Start();
  std::set<std::string> texts;
  for (int i = 0; i < 2; ++i) {
    const Json answer = Complete({{"n", 3}, {"temperature", 4}, {"max_tokens", 20}, {"ignore_eos", true}}).json();
    for (const Json& choice : answer["choices"]) texts.insert(choice["text"].get<std::string>());
  }
  EXPECT_EQ(texts.size(), 6u);
}

// Three texts of a long prompt where two caches without a common part would have no room: of a prompt that is read, and
// of one whose beginning the store has.
TEST_F(ChoicesTest, ThePromptIsReservedOnce) {
  const auto full = engine_.MakeCacheConfig(CacheSpec::Parse("full"), kCtx);
  const size_t n = 2000, n_begin = 1930, n_output = 400, one = full->Plan(n, n_output).bytes_peak;
  const size_t together = one + 2 * (one - full->SharedBytes(n));
  ASSERT_LT(together, 2 * one);
  std::vector<int32_t> prompt(n);
  for (size_t i = 0; i < n; ++i) prompt[i] = static_cast<int32_t>(100 + i % 97);
  const std::vector<int32_t> beginning(prompt.begin(), prompt.begin() + n_begin);
  const std::filesystem::path folder =
      std::filesystem::temp_directory_path() / fmt::format("lesskv_choices_{}", ::getpid());
  const auto start = [&](size_t kv_memory) {
    Stop();
    Start({.scheduler = {.max_running = 3, .max_queued = 8, .kv_memory = kv_memory, .step_tokens = 512},
           .store = folder,
           .max_prompt = n});
  };
  const Json body = {{"prompt", prompt}, {"n", 3},    {"max_tokens", n_output}, {"temperature", 4},
                     {"seed", 7},        {"ignore_eos", true}};
  start(together - 1);
  const Reply refused = Post("/v1/completions", body);
  EXPECT_EQ(refused.status, 400) << refused.body;
  EXPECT_EQ(Complete({{"prompt", beginning}, {"max_tokens", 1}}).status, 200);
  ASSERT_TRUE(Soon([&] { return store_->Metrics().saved == 1; }));
  for (const bool stored : {true, false}) {
    start(together);
    Json asked = body;
    asked["cache_prompt"] = stored;
    std::atomic<bool> done = false;
    std::thread client([&] {
      const Reply reply = Post("/v1/completions", asked);
      EXPECT_EQ(reply.status, 200) << reply.body;
      EXPECT_EQ(reply.json()["usage"]["prompt_tokens_details"]["cached_tokens"], stored ? n_begin : 0);
      done = true;
    });
    size_t most_reserved = 0, before = 0;
    while (!done) {
      const SchedulerMetrics metrics = scheduler_->Metrics();
      EXPECT_LE(metrics.kv_bytes, together);
      most_reserved = std::max(most_reserved, metrics.kv_bytes_reserved);
      if (metrics.kv_bytes_reserved > 0 && before == 0) before = metrics.kv_bytes_reserved;
    }
    client.join();
    if (most_reserved > 0) {  // where this thread has had its turn in time
      EXPECT_EQ(before, together);
      EXPECT_EQ(most_reserved, together) << (stored ? "stored" : "read");
    }
    EXPECT_LT(scheduler_->Metrics().steps, 2 * n_output);  // all three took part in most of them
  }
  Stop();  // the store still writes
  std::filesystem::remove_all(folder);
}

TEST_F(ChoicesTest, AKeysTextsAreCountedWithTheirChoices) {
  Start({.http = {.port = 0, .api_keys = {"one"}, .max_per_key = 2}});
  const std::string key = "Authorization: Bearer one\r\n";
  EXPECT_EQ(Call(RequestText("POST", "/v1/completions", R"({"prompt":"the","max_tokens":3,"n":2})", key)).status, 200);
  EXPECT_EQ(Call(RequestText("POST", "/v1/completions", R"({"prompt":"the","max_tokens":3,"n":3})", key)).status, 429);
  EXPECT_EQ(Call(RequestText("POST", "/v1/completions", R"({"prompt":"the","max_tokens":3,"n":2})", key)).status, 200);
}

TEST_F(ChoicesTest, CompletionsComeWithLogProbabilities) {
  Start();
  const Json choice = Complete({{"logprobs", 3}, {"temperature", 0.7}, {"seed", 3}, {"frequency_penalty", 1}})
                          .json()["choices"][0];
  const Json& logprobs = choice["logprobs"];
  const size_t n = logprobs["tokens"].size();
  ASSERT_GE(n, 10u);
  std::vector<int32_t> ids = tokenizer_->Encode("the tea", true, true);
  std::string text;
  for (size_t i = 0; i < n; ++i) {
    const std::string token = logprobs["tokens"][i];
    ASSERT_FALSE(token.starts_with("bytes:")) << "choose another seed";
    EXPECT_EQ(logprobs["text_offset"][i], text.size());
    text += token;
    const std::vector<double> expected = Logprobs(ids);
    ids.push_back(tokenizer_->Encode(token, false, false, false).at(0));
    EXPECT_NEAR(logprobs["token_logprobs"][i].get<double>(), expected[static_cast<size_t>(ids.back())], 1e-4);
    const Json& top = logprobs["top_logprobs"][i];
    EXPECT_EQ(top[token], logprobs["token_logprobs"][i]);
    EXPECT_TRUE(top.size() == 3 || top.size() == 4);
    double largest = -1e9;
    for (const Json& logprob : top) largest = std::max(largest, logprob.get<double>());
    EXPECT_NEAR(largest, *std::ranges::max_element(expected), 1e-4);
  }
  EXPECT_EQ(text, choice["text"]);
  EXPECT_TRUE(Complete({}).json()["choices"][0]["logprobs"].is_null());
}

TEST_F(ChoicesTest, PartsOfCharactersAreTheirBytes) {
  Start();
  Json body = {{"messages", {{{"role", "user"}, {"content", "the tea"}}}}, {"temperature", 3}, {"max_tokens", 60},
               {"logprobs", true}, {"top_logprobs", 2}};
  bool parts = false;
  for (int seed = 0; seed < 20; ++seed) {
    body["seed"] = seed;
    const Json choice = Post("/v1/chat/completions", body).json()["choices"][0];
    std::string text;
    for (const Json& token : choice["logprobs"]["content"]) {
      const std::string bytes = Bytes(token);
      text += bytes;
      EXPECT_EQ(token["top_logprobs"].size(), 2u);
      EXPECT_GE(token["top_logprobs"][0]["logprob"], token["logprob"]);
      EXPECT_GE(token["top_logprobs"][0]["logprob"], token["top_logprobs"][1]["logprob"]);
      if (token["bytes"].is_null() || ReplaceInvalidUtf8(bytes) == bytes) continue;
      parts = true;
      EXPECT_EQ(token["token"], fmt::format("\\x{:02x}", static_cast<unsigned char>(bytes[0])));
    }
    EXPECT_EQ(ReplaceInvalidUtf8(text), choice["message"]["content"]) << seed;
    Json streamed = body, content = Json::array();
    streamed["stream"] = true;
    for (const Json& event : Events(Post("/v1/chat/completions", streamed)))
      if (!event["choices"][0]["logprobs"].is_null())
        for (const Json& token : event["choices"][0]["logprobs"]["content"]) content.push_back(token);
    EXPECT_EQ(content, choice["logprobs"]["content"]);
  }
  EXPECT_TRUE(parts) << "choose other seeds";
}

TEST_F(ChoicesTest, TokensThatAreCutAwayAreNotListed) {
  Start();
  const std::string whole = Complete({}).json()["choices"][0]["text"], stop = whole.substr(3, 2);
  const Json choice = Complete({{"stop", stop}, {"logprobs", 0}}).json()["choices"][0];
  EXPECT_EQ(choice["finish_reason"], "stop");
  std::string text;
  for (const Json& token : choice["logprobs"]["tokens"]) text += token.get<std::string>();
  EXPECT_EQ(text, choice["text"]) << "this model's tokens are letters";
}

TEST_F(ChoicesTest, BiasesForbidAndForce) {
  Start();
  const std::string first = Complete({{"max_tokens", 1}}).json()["choices"][0]["text"];
  const int32_t id = tokenizer_->Encode(first, false, false, false).at(0);
  const auto with = [&](int32_t token, double bias) {
    return Complete({{"logit_bias", {{std::to_string(token), bias}}}}).json()["choices"][0]["text"].get<std::string>();
  };
  EXPECT_EQ(with(id, -100).find(first), std::string::npos);
  EXPECT_EQ(with(tokenizer_->Encode("q", false, false, false).at(0), 100), std::string(12, 'q'));
}

TEST_F(ChoicesTest, ATextGoesOnWhereItsEndIsIgnored) {
  Start();
  int32_t end = 0;
  while (!tokenizer_->IsEndOfGeneration(end)) ++end;
  const Json likely = {{"logit_bias", {{std::to_string(end), 100}}}};
  EXPECT_EQ(Complete(likely).json()["usage"]["completion_tokens"], 1);
  Json ignored = likely;
  ignored["ignore_eos"] = true;
  const Json answer = Complete(ignored).json();
  EXPECT_EQ(answer["usage"]["completion_tokens"], 12);
  EXPECT_EQ(answer["choices"][0]["finish_reason"], "length");
  EXPECT_EQ(answer["choices"][0]["text"], Complete({{"ignore_eos", true}}).json()["choices"][0]["text"]);
}

}  // namespace
}  // namespace lesskv::server_test
