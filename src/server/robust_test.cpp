// What clients do wrong, on purpose or not: bodies that make no sense, connections that end, wait or come in crowds.
#include <filesystem>
#include <iterator>

#include "server/server_harness.h"

namespace lesskv::server_test {
namespace {

const ApiContext* fuzz_context = nullptr;

// A mutation of a body that makes sense.
std::string Mutated(Rng& rng, const std::vector<std::string>& seeds) {
  std::string body = seeds[rng.Below(seeds.size())];
  for (size_t n = rng.Below(8); n > 0 && !body.empty(); --n) {
    const size_t at = rng.Below(body.size()), length = std::min<size_t>(rng.Below(16), body.size() - at);
    const std::string& other = seeds[rng.Below(seeds.size())];
    const size_t from = rng.Below(other.size());
    switch (rng.Below(5)) {
      case 0:
        body[at] = static_cast<char>(rng.Below(256));
        break;
      case 1:
        body.erase(at, length);
        break;
      case 2:
        body.insert(at, body.substr(at, length));
        break;
      case 3:
        body.insert(at, other.substr(from, rng.Below(24)));
        break;
      default:
        body.insert(at, fmt::format("{}", static_cast<int64_t>(rng.Below(3)) * (INT64_MAX / 2) - 1));
    }
  }
  return body;
}

}  // namespace
}  // namespace lesskv::server_test

// The target of a fuzzer such as libFuzzer, for each kind of body: it is read, or refused with an Error.
extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace lesskv;
  const std::string_view body(reinterpret_cast<const char*>(data), size);
  const ApiContext& context = *server_test::fuzz_context;
  const auto take = [](auto&& read) {
    try {
      read();
      return 1;
    } catch (const Error& error) {
      if (ToApiError(error).status >= 500) throw;
      return 0;
    }
  };
  int read = take([&] { ParseChatRequest(body, context); });
  read += take([&] { ParseCompletionRequest(body, context); });
  read += take([&] { ParseResponseRequest(body, context); });
  read += take([&] { Tokenize(body, context); });
  read += take([&] { Detokenize(body, context); });
  return read + take([&] { ApplyTemplate(body, context); });
}

namespace lesskv::server_test {
namespace {

const std::vector<std::string> kBodies = {
    R"x({"prompt":"the tea","max_tokens":3,"temperature":0.5,"stop":["a","b"],"kv_policy":"h2o(24)"})x",
    R"x({"prompt":["the"],"n":2,"logprobs":5,"logit_bias":{"5":-100,"271":1e1},"frequency_penalty":-2,"echo":null})x",
    R"x({"messages":[{"role":"user","content":"y","name":null}],"logprobs":true,"top_logprobs":20,"n":3,"seed":9,
        "presence_penalty":1.5,"response_format":{"type":"text"}})x",
    R"x({"prompt":[1,2,300],"stream":true,"stream_options":{"include_usage":true},"kv_stats":3,"seed":1})x",
    R"x({"messages":[{"role":"system","content":"x"},{"role":"user","content":[{"type":"text","text":"é\u0000"}]}]})x",
    R"x({"messages":[{"role":"user","content":"y"}],"protected_spans":[[0,1],[1,2]],"max_completion_tokens":9})x",
    R"x({"input":[{"role":"user","content":"z"}],"instructions":"i","store":false,"max_output_tokens":2})x",
    R"x({"content":"the tea","add_special":true,"parse_special":false})x",
    R"x({"tokens":[1,2,3,271]})x",
};

TEST_F(ServerTest, ABodyIsReadOrRefused) {
  Start();
  fuzz_context = context_.get();
  Rng rng(11);
  size_t read = 0, refused = 0;
  for (int i = 0; i < 10000; ++i) {
    const std::string body = Mutated(rng, kBodies);
    const int n = LLVMFuzzerTestOneInput(reinterpret_cast<const uint8_t*>(body.data()), body.size());
    n > 0 ? ++read : ++refused;
  }
  EXPECT_GT(read, 250u);  // the mutations reach behind the parser
  EXPECT_GT(refused, 2500u);
}

TEST_F(ServerTest, ClientsThatComeAndGoLeaveNothingBehind) {
  Start();
  Rng rng(5);
  const std::string whole =
      RequestText("POST", "/v1/completions",
                  R"x({"prompt":"the tea","max_tokens":150000,"stream":true,"kv_policy":"window(24)"})x");
  std::vector<std::unique_ptr<Connection>> slow;
  for (int i = 0; i < 60; ++i) {
    auto connection = std::make_unique<Connection>(port_);
    switch (i % 4) {
      case 0:  // half a request
        connection->Send(whole.substr(0, rng.Below(whole.size())));
        break;
      case 1:  // before the first token
        connection->Send(whole);
        break;
      case 2:  // in the middle of the answer
        connection->Send(whole);
        if (i % 8 == 2) connection->Some();
        break;
      default:  // not at all for a while
        connection->Send(whole.substr(0, 30));
        if (slow.size() < 6) slow.push_back(std::move(connection));
    }
  }
  EXPECT_EQ(Complete({}).status, 200);
  slow.clear();
  EXPECT_TRUE(Soon([&] {
    const SchedulerMetrics metrics = scheduler_->Metrics();
    return metrics.running == 0 && metrics.queued == 0 && metrics.kv_bytes_reserved == 0;
  }));
  EXPECT_EQ(Complete({}).status, 200);
}

TEST_F(ServerTest, AClientThatGoesBeforeItsFirstTokenLeavesTheQueue) {
  Start({.scheduler = {.max_running = 1, .max_queued = 4, .step_tokens = 16}});
  const auto running = LongStream();
  {
    const Connection waiting(port_);
    waiting.Send(RequestText("POST", "/v1/completions", R"x({"prompt":"the","max_tokens":3})x"));
    ASSERT_TRUE(Soon([&] { return scheduler_->Metrics().queued == 1; }));
  }
  EXPECT_TRUE(Soon([&] { return scheduler_->Metrics().queued == 0; }));
  EXPECT_EQ(scheduler_->Metrics().running, 1u);
  EXPECT_EQ(scheduler_->Metrics().jobs_cancelled, 1u);
}

TEST_F(ServerTest, ASlowReaderHoldsNobodyUp) {
  Start();
  const auto slow = LongStream();  // and reads no more
  for (int i = 0; i < 5; ++i) EXPECT_EQ(Complete({}).status, 200);
}

TEST_F(ServerTest, ConnectionsAreLimited) {
  Start({.http = {.port = 0, .max_connections = 2}});
  const auto open_files = [] {
    const std::filesystem::directory_iterator files("/proc/self/fd");
    return std::distance(std::filesystem::begin(files), std::filesystem::end(files));
  };
  const auto before = open_files();
  std::vector<std::unique_ptr<Connection>> silent;
  for (int i = 0; i < 9; ++i) silent.push_back(std::make_unique<Connection>(port_));
  std::this_thread::sleep_for(200ms);
  // Beside our ends: two that are served, two that wait and one that was just accepted.
  EXPECT_LE(open_files() - before, 9 + 5);
  Connection late(port_);
  late.Send(RequestText("GET", "/health", ""));
  std::atomic<bool> answered = false;
  std::thread client([&] { answered = ParseReply(late.All()).status == 200; });
  std::this_thread::sleep_for(300ms);
  EXPECT_FALSE(answered);
  silent.clear();
  client.join();
  EXPECT_TRUE(answered);
}

TEST_F(ServerTest, AKeyHasItsShare) {
  Start({.http = {.port = 0, .api_keys = {"one", "two"}, .max_per_key = 1}});
  const std::string body = R"x({"prompt":"the","max_tokens":150000,"stream":true,"kv_policy":"window(24)"})x";
  const auto with = [](const char* key) { return fmt::format("Authorization: Bearer {}\r\n", key); };
  auto first = std::make_unique<Connection>(port_);
  first->Send(RequestText("POST", "/v1/completions", body, with("one")));
  ASSERT_NE(first->Some().find("200"), std::string::npos);
  const std::string small = R"x({"prompt":"the","max_tokens":3})x";
  const Reply more = Call(RequestText("POST", "/v1/completions", small, with("one")));
  EXPECT_EQ(more.status, 429);
  EXPECT_NE(more.head.find("Retry-After"), std::string::npos);
  EXPECT_NE(more.body.find("more than 1 texts of this key"), std::string::npos);
  EXPECT_EQ(Call(RequestText("POST", "/v1/completions", small, with("two"))).status, 200);
  EXPECT_EQ(Call(RequestText("POST", "/v1/completions", small, with("three"))).status, 401);
  first.reset();
  EXPECT_TRUE(Soon([&] { return Call(RequestText("POST", "/v1/completions", small, with("one"))).status == 200; }));
}

TEST_F(ServerTest, PagesOfOthersAreNotAnswered) {
  Start();
  const std::string body = R"x({"prompt":"the","max_tokens":3})x";
  EXPECT_EQ(Call(RequestText("POST", "/v1/completions", body, "Origin: https://example.org\r\n")).status, 403);
  EXPECT_EQ(Call(RequestText("POST", "/v1/completions", body, "Origin: null\r\n")).status, 403);
  const Reply own = Call(RequestText("POST", "/v1/completions", body, "Origin: http://x\r\n"));  // Host: x
  EXPECT_EQ(own.status, 200);
  EXPECT_EQ(own.head.find("Access-Control"), std::string::npos);
  EXPECT_EQ(Call(RequestText("OPTIONS", "/v1/completions", "", "Origin: https://example.org\r\n")).status, 403);
}

TEST_F(ServerTest, HeadersAreLimited) {
  Start();
  EXPECT_NE(Get("/health", "X-Long: " + std::string(10000, 'x') + "\r\n").status, 200);
  EXPECT_NE(Get("/" + std::string(10000, 'x')).status, 200);
  EXPECT_EQ(Get("/health").status, 200);
}

}  // namespace
}  // namespace lesskv::server_test
