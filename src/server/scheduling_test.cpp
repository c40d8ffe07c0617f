// Who is served when: streams beside long prompts.
#include <set>

#include "server/server_harness.h"

namespace lesskv::server_test {
namespace {

class SchedulingTest : public ServerTest {
 protected:
  // Long enough to be found in the middle of.
  std::vector<int32_t> LongPrompt() const {
    std::vector<int32_t> ids = tokenizer_->Encode("the tea", true, true);
    for (int32_t i = 0; ids.size() < 6000; ++i) ids.push_back(i * 11 % 250);
    return ids;
  }
  // Of the text with that prompt while nothing of it has been read, as it is seen from outside.
  bool IsReading(size_t n_prompt) const {
    for (const SlotState& slot : scheduler_->Slots())
      if (slot.prompt_tokens == n_prompt) return slot.prompt_read == 0;
    return false;
  }
  Options WithPauses() const {
    return {.scheduler = {.max_running = 3, .max_queued = 8, .step_tokens = 16, .pause_after = 0ms},
            .kv = {"full", "window(24)", "h2o(24)", "snapkv(24, window=8)"},
            .max_prompt = 10000};
  }
};

TEST_F(SchedulingTest, StreamsGoOnBesideAPromptThatIsReadWhole) {
  Start(WithPauses());
  const std::vector<int32_t> prompt = LongPrompt();
  for (const char* const spec : {"h2o(24)", "snapkv(24, window=8)"}) {
    const auto stream = LongStream();
    Json body = {{"prompt", prompt}, {"kv_policy", spec}, {"max_tokens", 12}};
    std::atomic<bool> done = false;
    std::string text;
    std::thread client([&] {
      text = Complete(body).json()["choices"][0]["text"];
      done = true;
    });
    std::set<size_t> generated;  // by the stream, while the prompt was read
    while (!done && generated.size() < 5)
      for (const SlotState& slot : scheduler_->Slots())
        if (slot.spec == "window(24)" && IsReading(prompt.size())) generated.insert(slot.generated_tokens);
    // One that comes meanwhile has its turn, too.
    const bool in_time = Complete({{"max_tokens", 2}}).status == 200 && IsReading(prompt.size());
    client.join();
    EXPECT_GE(generated.size(), 5u) << spec;
    EXPECT_TRUE(in_time) << spec;
    Engine engine(engine_.shared_model(), {.threads = 1, .compute = ComputeChoice::kF32, .batch_invariant = true});
    Sequence sequence(engine.MakeCacheConfig(CacheSpec::Parse(spec), kCtx));
    GenerateOptions options;
    options.sampler = {.temperature = 0};
    options.max_tokens = 12;
    EXPECT_EQ(text, Generate(engine, *tokenizer_, sequence, prompt, options).text) << spec;
  }
}

TEST_F(SchedulingTest, APromptThatIsReadWholeCanBeCancelled) {
  Start(WithPauses());
  const std::vector<int32_t> prompt = LongPrompt();
  const Json body = {{"prompt", prompt}, {"kv_policy", "h2o(24)"}, {"max_tokens", 12}};
  {
    const Connection connection(port_);
    connection.Send(RequestText("POST", "/v1/completions", body.dump()));
    const auto stream = LongStream();
    ASSERT_TRUE(Soon([&] { return IsReading(prompt.size()); }));
  }
  EXPECT_TRUE(Soon([&] { return scheduler_->Metrics().jobs_cancelled == 2; }));
  EXPECT_TRUE(Soon([&] { return scheduler_->Metrics().kv_bytes_reserved == 0; }));
  EXPECT_EQ(scheduler_->Metrics().prompt_tokens, tokenizer_->Encode("the tea", true, true).size());
  EXPECT_EQ(Complete({}).status, 200);
}

TEST_F(SchedulingTest, TheServerCanEndInTheMiddleOfAPrompt) {
  Start(WithPauses());
  const std::vector<int32_t> prompt = LongPrompt();
  const Connection connection(port_);
  const Json body = {{"prompt", prompt}, {"kv_policy", "h2o(24)"}, {"max_tokens", 12}};
  connection.Send(RequestText("POST", "/v1/completions", body.dump()));
  const auto stream = LongStream();
  ASSERT_TRUE(Soon([&] { return IsReading(prompt.size()); }));
  scheduler_->Stop();
  const Reply reply = ParseReply(connection.All());
  EXPECT_EQ(reply.status, 500);
  EXPECT_NE(reply.body.find("the server is stopping"), std::string::npos) << reply.body;
}

}  // namespace
}  // namespace lesskv::server_test
