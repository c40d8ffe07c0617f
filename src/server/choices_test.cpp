// Several texts of one prompt.
#include <set>

#include "server/server_harness.h"

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
};

TEST_F(ChoicesTest, EachChoiceIsWhatItsSeedSaysAlone) {
  Start();
  for (const char* const spec : {"full", "window(24)", "h2o(24)"}) {
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
  EXPECT_EQ(scheduler_->Metrics().kv_bytes_reserved, 0u);
}

TEST_F(ChoicesTest, AStreamSaysOfEachEventWhoseItIs) {
  Start();
  const Json whole = Drawn({{"n", 3}});
  const Reply reply = Complete({{"temperature", 1.5},
                                {"seed", 7},
                                {"max_tokens", 40},
                                {"n", 3},
                                {"stream", true},
                                {"stream_options", {{"include_usage", true}}}});
  std::map<int, std::string> texts, ends;
  const std::vector<Json> events = Events(reply);
  for (const Json& event : events) {
    if (event["choices"].empty()) continue;
    ASSERT_EQ(event["choices"].size(), 1u);
    const Json& choice = event["choices"][0];
    const int index = choice["index"];
    EXPECT_FALSE(ends.contains(index)) << "nothing comes behind the end";
    texts[index] += choice["text"].get<std::string>();
    if (!choice["finish_reason"].is_null()) ends[index] = choice["finish_reason"];
  }
  ASSERT_EQ(ends.size(), 3u);
  for (int i = 0; i < 3; ++i) {
    EXPECT_EQ(texts[i], whole["choices"][i]["text"]);
    EXPECT_EQ(ends[i], whole["choices"][i]["finish_reason"]);
  }
  EXPECT_EQ(events.back()["usage"]["completion_tokens"], whole["usage"]["completion_tokens"]);
  const Reply chat = Post("/v1/chat/completions",
                          {{"messages", {{{"role", "user"}, {"content", "x"}}}}, {"n", 2}, {"stream", true}, {"max_tokens", 3}});
  EXPECT_EQ(Events(chat)[0]["choices"][0]["delta"]["role"], "assistant");
  EXPECT_EQ(Events(chat)[1]["choices"][0]["delta"]["role"], "assistant");
  EXPECT_EQ(Events(chat)[1]["choices"][0]["index"], 1);
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
                       {"temperature", 0},    {"stream", true}};
    connection.Send(RequestText("POST", "/v1/completions", body.dump()));
    EXPECT_NE(connection.Some().find("200"), std::string::npos);
    EXPECT_EQ(scheduler_->Metrics().running, 3u);
    EXPECT_EQ(Get("/slots").json()["free"], 0);
    EXPECT_EQ(Get("/slots").json()["running"].size(), 3u);
  }
  EXPECT_TRUE(Soon([&] { return scheduler_->Metrics().running == 0; }));
  EXPECT_EQ(scheduler_->Metrics().jobs_cancelled, 1u);
  EXPECT_EQ(scheduler_->Metrics().kv_bytes_reserved, 0u);
  EXPECT_EQ(Complete({{"n", 3}}).status, 200);
}

TEST_F(ChoicesTest, PlacesAndBytesAreThoseOfAll) {
  const auto config = engine_.MakeCacheConfig(CacheSpec::Parse("full"), kCtx);
  const size_t one = config->Plan(tokenizer_->Encode("the tea", true, true).size(), 300).bytes_peak;
  Start({.scheduler = {.max_running = 3, .max_queued = 8, .kv_memory = 2 * one + one / 2, .step_tokens = 16}});
  EXPECT_EQ(Complete({{"n", 2}, {"max_tokens", 300}}).json()["usage"]["completion_tokens"], 600);
  const Reply large = Complete({{"n", 3}, {"max_tokens", 300}});
  EXPECT_EQ(large.status, 400);
  EXPECT_NE(large.body.find("for each of 3 choices"), std::string::npos) << large.body;
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

TEST_F(ChoicesTest, AKeysTextsAreCountedWithTheirChoices) {
  Start({.http = {.port = 0, .api_keys = {"one"}, .max_per_key = 2}});
  const std::string key = "Authorization: Bearer one\r\n";
  EXPECT_EQ(Call(RequestText("POST", "/v1/completions", R"({"prompt":"the","max_tokens":3,"n":2})", key)).status, 200);
  EXPECT_EQ(Call(RequestText("POST", "/v1/completions", R"({"prompt":"the","max_tokens":3,"n":3})", key)).status, 429);
  EXPECT_EQ(Call(RequestText("POST", "/v1/completions", R"({"prompt":"the","max_tokens":3,"n":2})", key)).status, 200);
}

}  // namespace
}  // namespace lesskv::server_test
