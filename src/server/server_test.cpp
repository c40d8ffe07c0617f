// The server as clients see it, over loopback: texts, streams, many at once, clients that vanish, requests that make no
// sense.
#include <arpa/inet.h>
#include <gtest/gtest.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include <chrono>
#include <map>
#include <nlohmann/json.hpp>
#include <thread>

#include "base/rng.h"
#include "server/http_server.h"

namespace lesskv {
namespace {

using Json = nlohmann::json;
using namespace std::chrono_literals;

const std::string kModel = LESSKV_SOURCE_DIR "/tests/data/models/llama-gqa-tied.gguf";
constexpr size_t kCtx = 200000;  // so that a text can be long enough to be interrupted

struct Reply {
  int status = 0;
  std::string head, body;
  Json json() const { return Json::parse(body, nullptr, false); }
};

// A socket that closes itself.
class Connection {
 public:
  explicit Connection(int port) : fd_(::socket(AF_INET, SOCK_STREAM, 0)) {
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_port = htons(static_cast<uint16_t>(port));
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    EXPECT_EQ(::connect(fd_, reinterpret_cast<sockaddr*>(&address), sizeof(address)), 0);
    const timeval patience{60, 0};
    ::setsockopt(fd_, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof(patience));
  }
  ~Connection() { ::close(fd_); }
  void Send(const std::string& text) const { ::send(fd_, text.data(), text.size(), MSG_NOSIGNAL); }
  void EndSending() const { ::shutdown(fd_, SHUT_WR); }
  std::string Some() const {
    char buffer[4096];
    const ssize_t n = ::recv(fd_, buffer, sizeof(buffer), 0);
    return n > 0 ? std::string(buffer, static_cast<size_t>(n)) : "";
  }
  std::string All() const {
    std::string text;
    for (std::string more = Some(); !more.empty(); more = Some()) text += more;
    return text;
  }

 private:
  int fd_;
};

std::string Dechunked(const std::string& text) {
  std::string result;
  for (size_t pos = 0; pos < text.size();) {
    const size_t n = std::stoul(text.substr(pos), nullptr, 16), begin = text.find("\r\n", pos) + 2;
    result += text.substr(begin, n);
    if (n == 0) break;
    pos = begin + n + 2;
  }
  return result;
}

Reply ParseReply(const std::string& text) {
  const size_t end = text.find("\r\n\r\n");
  if (end == std::string::npos) return {};
  Reply reply{std::stoi(text.substr(text.find(' ') + 1)), text.substr(0, end), text.substr(end + 4)};
  if (reply.head.find("chunked") != std::string::npos) reply.body = Dechunked(reply.body);
  return reply;
}

std::string RequestText(const std::string& method, const std::string& path, const std::string& body,
                        const std::string& header = "") {
  return fmt::format("{} {} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{}Content-Length: {}\r\n\r\n{}", method, path,
                     header, body.size(), body);
}

struct Options {
  SchedulerOptions scheduler = {.max_running = 3, .max_queued = 8, .step_tokens = 16};
  HttpOptions http = {.port = 0, .max_body = 1 << 16};
  std::chrono::seconds max_time = 600s;
};

class ServerTest : public testing::Test {
 protected:
  void Start(const Options& options = {}) {
    ApiLimits limits{
        .ctx = kCtx, .max_prompt = 500, .max_output = 150000, .max_protected = 20, .max_time = options.max_time};
    limits.kv = {"full", "window(24)", "h2o(24)"};
    context_ = std::make_unique<ApiContext>(ApiContext{engine_, *tokenizer_, &chat_, "tiny", limits});
    scheduler_ = std::make_unique<Scheduler>(engine_, *tokenizer_, options.scheduler);
    server_ = std::make_unique<HttpServer>(*context_, *scheduler_, options.http);
    port_ = server_->Bind();
    thread_ = std::thread([this] { server_->Listen(); });
    while (Get("/health").status != 200) std::this_thread::sleep_for(1ms);
  }
  void TearDown() override {
    if (!thread_.joinable()) return;
    scheduler_->Stop();
    server_->Stop();
    thread_.join();
  }

  Reply Call(const std::string& text) const {
    const Connection connection(port_);
    connection.Send(text);
    return ParseReply(connection.All());
  }
  Reply Get(const std::string& path, const std::string& header = "") const {
    return Call(RequestText("GET", path, "", header));
  }
  Reply Post(const std::string& path, const Json& body) const { return Call(RequestText("POST", path, body.dump())); }
  Reply Complete(Json more) const {
    Json body = {{"prompt", "the tea"}, {"temperature", 0}, {"max_tokens", 12}};
    if (more.is_object()) body.update(more);
    return Post("/v1/completions", body);
  }

  // What the engine alone says.
  GenerateResult Alone(const std::string& prompt, size_t n, const std::string& spec = "full") const {
    Engine engine(engine_.shared_model(), {.threads = 1, .compute = ComputeChoice::kF32, .batch_invariant = true});
    Sequence sequence(engine.MakeCacheConfig(CacheSpec::Parse(spec), kCtx));
    GenerateOptions options;
    options.sampler = {.temperature = 0};
    options.max_tokens = n;
    return Generate(engine, *tokenizer_, sequence, tokenizer_->Encode(prompt, true, true), options);
  }

  // Waits until it is so.
  template <typename Condition>
  static bool Soon(Condition condition) {
    const auto end = std::chrono::steady_clock::now() + 30s;
    while (!condition() && std::chrono::steady_clock::now() < end) std::this_thread::sleep_for(5ms);
    return condition();
  }

  // A text that takes long, as a stream whose beginning has come.
  std::unique_ptr<Connection> LongStream() const {
    auto connection = std::make_unique<Connection>(port_);
    const Json body = {{"prompt", "the tea"},
                       {"temperature", 0},
                       {"max_tokens", 150000},
                       {"stream", true},
                       {"kv_policy", "window(24)"}};
    connection->Send(RequestText("POST", "/v1/completions", body.dump()));
    EXPECT_NE(connection->Some().find("200"), std::string::npos);
    return connection;
  }

  Engine engine_{Model::Load(kModel), {.threads = 1, .compute = ComputeChoice::kF32, .batch_invariant = true}};
  std::unique_ptr<const Tokenizer> tokenizer_ = Tokenizer::Create(LoadVocabulary(engine_.model().file()));
  const ChatTemplate chat_ = ChatTemplate::Choose("plain", "", *tokenizer_, kModel);
  std::unique_ptr<ApiContext> context_;
  std::unique_ptr<Scheduler> scheduler_;
  std::unique_ptr<HttpServer> server_;
  int port_ = 0;
  std::thread thread_;
};

// The events' objects; the last event must be [DONE].
std::vector<Json> Events(const Reply& reply) {
  std::vector<Json> events;
  bool done = false;
  for (size_t pos = 0; pos < reply.body.size();) {
    const size_t end = reply.body.find("\n\n", pos);
    const std::string line = reply.body.substr(pos, end - pos);
    EXPECT_TRUE(line.starts_with("data: ")) << line;
    done = line == "data: [DONE]";
    if (!done) events.push_back(Json::parse(line.substr(6)));
    pos = end + 2;
  }
  EXPECT_TRUE(done);
  return events;
}

TEST_F(ServerTest, ACompletionIsWhatTheEngineSays) {
  Start();
  const Reply reply = Complete({});
  ASSERT_EQ(reply.status, 200) << reply.body;
  const GenerateResult alone = Alone("the tea", 12);
  const Json json = reply.json();
  EXPECT_EQ(json["object"], "text_completion");
  EXPECT_EQ(json["model"], "tiny");
  EXPECT_EQ(json["choices"][0]["text"], alone.text);
  EXPECT_EQ(json["choices"][0]["finish_reason"], "length");
  const Json& usage = json["usage"];
  EXPECT_EQ(usage["prompt_tokens"], alone.prompt_tokens);
  EXPECT_EQ(usage["completion_tokens"], 12);
  EXPECT_EQ(usage["total_tokens"], alone.prompt_tokens + 12);
  EXPECT_EQ(usage["kv"]["spec"], "full");
  EXPECT_EQ(usage["kv"]["rows"], alone.prompt_tokens + 11);  // the last token is not fed
  EXPECT_EQ(usage["kv"]["evicted"], 0);
  EXPECT_GT(usage["kv"]["bytes"], 0);
}

TEST_F(ServerTest, AStreamHasTheSameText) {
  Start();
  Json body = {{"messages",
                {{{"role", "system"}, {"content", "the"}},
                 {{"role", "user"}, {"content", {{{"type", "text"}, {"text", "tea"}}}}}}},
               {"temperature", 1.5},
               {"max_completion_tokens", 20}};
  Reply whole;
  for (int seed = 0; seed < 20; ++seed) {  // some answers end at once
    body["seed"] = seed;
    whole = Post("/v1/chat/completions", body);
    ASSERT_EQ(whole.status, 200) << whole.body;
    if (whole.json()["usage"]["completion_tokens"] == 20) break;
  }
  EXPECT_EQ(whole.json()["choices"][0]["message"]["role"], "assistant");
  Json streamed = body;
  streamed.update({{"stream", true}, {"stream_options", {{"include_usage", true}}}});
  const Reply stream = Post("/v1/chat/completions", streamed);
  EXPECT_NE(stream.head.find("text/event-stream"), std::string::npos);
  const std::vector<Json> events = Events(stream);
  ASSERT_GE(events.size(), 4u);
  EXPECT_EQ(events[0]["choices"][0]["delta"]["role"], "assistant");
  std::string text;
  for (size_t i = 1; i + 2 < events.size(); ++i) text += events[i]["choices"][0]["delta"]["content"].get<std::string>();
  EXPECT_EQ(text, whole.json()["choices"][0]["message"]["content"]);
  EXPECT_EQ(events[events.size() - 2]["choices"][0]["finish_reason"], "length");
  EXPECT_EQ(events.back()["usage"]["completion_tokens"], 20);
  EXPECT_EQ(events.back()["usage"]["kv"], whole.json()["usage"]["kv"]);
  EXPECT_EQ(events.back()["choices"], Json::array());
}

TEST_F(ServerTest, ManyAtOnceAreAsEachAlone) {
  Start();
  std::vector<std::string> prompts, texts(9);
  for (size_t i = 0; i < texts.size(); ++i)
    prompts.push_back(std::string(5 + 13 * i, static_cast<char>('a' + i)) + " the");
  std::vector<std::thread> clients;
  for (size_t i = 0; i < texts.size(); ++i)
    clients.emplace_back([&, i] {
      const bool stream = i % 2 == 1;
      const Reply reply = Complete({{"prompt", prompts[i]},
                                    {"max_tokens", 60},
                                    {"stream", stream},
                                    {"kv_policy", i % 3 == 0 ? "h2o(24)" : "full"}});
      if (!stream) {
        texts[i] = reply.json()["choices"][0]["text"];
        return;
      }
      for (const Json& event : Events(reply)) texts[i] += event["choices"][0]["text"].get<std::string>();
    });
  for (std::thread& client : clients) client.join();
  for (size_t i = 0; i < texts.size(); ++i)
    EXPECT_EQ(texts[i], Alone(prompts[i], 60, i % 3 == 0 ? "h2o(24)" : "full").text) << i;
  const SchedulerMetrics metrics = scheduler_->Metrics();
  EXPECT_EQ(metrics.jobs_finished, texts.size());
  EXPECT_EQ(metrics.generated_tokens, 60 * texts.size());
  EXPECT_LT(metrics.steps, 60 * texts.size());  // steps were shared
  EXPECT_EQ(metrics.kv_bytes_reserved, 0u);
}

TEST_F(ServerTest, SamplingAndStopsAreTheRequests) {
  Start();
  const auto text = [&](const Json& more) { return Complete(more).json()["choices"][0]["text"].get<std::string>(); };
  const std::string a = text({{"temperature", 1.5}, {"seed", 7}, {"max_tokens", 40}});
  EXPECT_EQ(a, text({{"temperature", 1.5}, {"seed", 7}, {"max_tokens", 40}}));
  EXPECT_NE(a, text({{"temperature", 1.5}, {"seed", 8}, {"max_tokens", 40}}));
  EXPECT_EQ(text({}), text({{"temperature", 1.5}, {"top_k", 1}}));
  const std::string whole = text({});
  ASSERT_GT(whole.size(), 4u);
  const Json stopped = Complete({{"stop", {whole.substr(3, 2)}}}).json();
  EXPECT_EQ(stopped["choices"][0]["text"], whole.substr(0, whole.find(whole.substr(3, 2))));
  EXPECT_EQ(stopped["choices"][0]["finish_reason"], "stop");
}

TEST_F(ServerTest, CachePoliciesAreWhatTheOperatorAllows) {
  Start();
  const Json kv = Complete({{"kv_policy", "window(24)"}, {"max_tokens", 60}}).json()["usage"]["kv"];
  EXPECT_EQ(kv["spec"], "window(24)");
  EXPECT_EQ(kv["rows"], 24);
  EXPECT_GT(kv["evicted"], 30);
  EXPECT_EQ(Complete({{"kv_policy", "window(25)"}}).status, 400);
  // The protected tokens take their place in the budget, and must fit it.
  EXPECT_EQ(Complete({{"kv_policy", "window(24)"}, {"protected_spans", {{0, 3}}}}).status, 200);
  EXPECT_EQ(Complete({{"protected_spans", {{0, 3}, {2, 1}}}}).status, 400);
  const Reply many = Complete({{"prompt", std::string(60, 'x')}, {"protected_spans", {{0, 21}}}});
  EXPECT_EQ(many.status, 400);
  EXPECT_NE(many.body.find("at most 20 tokens"), std::string::npos);
}

TEST_F(ServerTest, RequestsThatMakeNoSenseAreNamed) {
  Start();
  const struct {
    Json more;
    int status;
    std::string said;
  } kCases[] = {
      {{{"temperature", -1}}, 400, "temp"},
      {{{"temperature", "hot"}}, 400, "temperature: expected a number"},
      {{{"temperature", 1e300}}, 400, "temp"},
      {{{"top_p", 1.5}}, 400, "top-p"},
      {{{"top_k", -1}}, 400, "top-k"},
      {{{"top_k", 1.5}}, 400, "top_k: expected a whole number"},
      {{{"max_tokens", 0}}, 400, "max_tokens: expected a number in [1, 150000]"},
      {{{"max_tokens", 150001}}, 400, "max_tokens"},
      {{{"max_tokens", -5}}, 400, "max_tokens: expected a count"},
      {{{"n", 2}}, 400, "n: expected 1"},
      {{{"seed", -1}}, 400, "seed"},
      {{{"stop", ""}}, 400, "stop"},
      {{{"stop", {1}}}, 400, "stop"},
      {{{"stream", "yes"}}, 400, "stream: expected true or false"},
      {{{"stream_options", {{"include_usage", true}}}}, 400, "stream_options: expected none without stream"},
      {{{"logit_bias", Json::object()}}, 400, "'logit_bias': lesskv has no such field"},
      {{{"presence_penalty", 0.5}}, 400, "presence_penalty: expected 0"},
      {{{"kv_policy", "h2o("}}, 400, ""},
      {{{"kv_policy", "less(file=\"/etc/passwd\")+h2o(24)"}}, 400, "one that the operator allows"},
      {{{"protected_spans", {{0, 1e9}}}}, 400, "protected_spans"},
      {{{"protected_spans", 3}}, 400, "protected_spans: expected an array"},
      {{{"prompt", Json::array()}}, 400, "the prompt is empty"},
      {{{"prompt", {1, 272}}}, 400, "prompt: expected token ids below 272"},
      {{{"prompt", {"a", "b"}}}, 400, "prompt: expected token ids"},
      {{{"prompt", std::string(501, 'x')}}, 400, "at most 500 are allowed"},
      {{{"prompt", nullptr}}, 400, "prompt: expected a text"},
      {{{"model", "gpt"}}, 404, "there is no model 'gpt', only 'tiny'"},
  };
  for (const auto& test : kCases) {
    const Reply reply = Complete(test.more);
    EXPECT_EQ(reply.status, test.status) << test.more;
    const Json error = reply.json()["error"];
    EXPECT_NE(error["message"].get<std::string>().find(test.said), std::string::npos) << reply.body;
    EXPECT_EQ(error["code"], test.status);
  }
  EXPECT_EQ(Post("/v1/chat/completions", {{"messages", Json::array()}}).status, 400);
  EXPECT_EQ(Post("/v1/chat/completions", {{"messages", {{{"role", "judge"}, {"content", "x"}}}}}).status, 400);
  EXPECT_EQ(Post("/v1/chat/completions", {{"messages", {{{"role", "user"}}}}}).status, 400);
  EXPECT_EQ(Complete({}).status, 200);
}

TEST_F(ServerTest, GarbageDoesNotHurt) {
  Start();
  for (const std::string body : {"", "{", "[1]", "\"x\"", "{\"prompt\": \"\xff\xfe\"}", "nul"}) {
    const Reply reply = Call(RequestText("POST", "/v1/completions", body));
    EXPECT_EQ(reply.status, 400) << body;
    EXPECT_TRUE(reply.json().contains("error")) << reply.body;
  }
  EXPECT_EQ(Call(RequestText("POST", "/v1/completions", std::string(1 << 17, ' '))).status, 413);
  EXPECT_EQ(Call(RequestText("POST", "/v1/completions", std::string(60000, '['))).status, 400);
  EXPECT_EQ(Get("/nothing").json()["error"]["code"], 404);
  EXPECT_EQ(Get("/v1/completions").status, 404);
  Rng rng(3);
  for (int i = 0; i < 200; ++i) {
    std::string bytes = i % 2 == 0 ? "" : RequestText("POST", "/v1/completions", R"({"prompt":"the","max_tokens":3})");
    for (int n = 0; n < 30; ++n) {
      const char c = static_cast<char>(rng.Below(256));
      if (bytes.size() < 100)
        bytes += c;
      else
        bytes[rng.Below(bytes.size())] = c;
    }
    const Connection connection(port_);
    connection.Send(bytes);
    connection.EndSending();
    connection.All();
  }
  EXPECT_EQ(Complete({}).status, 200);
}

TEST_F(ServerTest, AClientThatVanishesEndsItsText) {
  Start();
  LongStream().reset();
  EXPECT_TRUE(Soon([&] { return scheduler_->Metrics().jobs_cancelled == 1; }));
  {
    const Connection connection(port_);
    const Json body = {{"prompt", "the tea"}, {"temperature", 0}, {"max_tokens", 150000}, {"kv_policy", "window(24)"}};
    connection.Send(RequestText("POST", "/v1/completions", body.dump()));
    EXPECT_TRUE(Soon([&] { return scheduler_->Metrics().running == 1; }));
  }
  EXPECT_TRUE(Soon([&] { return scheduler_->Metrics().jobs_cancelled == 2; }));
  const SchedulerMetrics metrics = scheduler_->Metrics();
  EXPECT_EQ(metrics.running, 0u);
  EXPECT_EQ(metrics.kv_bytes_reserved, 0u);
}

TEST_F(ServerTest, AFullQueueIsTold) {
  Start({.scheduler = {.max_running = 1, .max_queued = 1, .step_tokens = 16}});
  auto running = LongStream();
  Connection waiting(port_);
  waiting.Send(RequestText("POST", "/v1/completions", R"({"prompt":"the","max_tokens":3})"));
  ASSERT_TRUE(Soon([&] { return scheduler_->Metrics().queued == 1; }));
  const Reply refused = Complete({});
  EXPECT_EQ(refused.status, 429);
  EXPECT_NE(refused.head.find("Retry-After: 1"), std::string::npos);
  EXPECT_EQ(refused.json()["error"]["type"], "rate_limit_error");
  running.reset();
  EXPECT_EQ(ParseReply(waiting.All()).status, 200);
  EXPECT_EQ(scheduler_->Metrics().jobs_rejected, 1u);
}

TEST_F(ServerTest, CachesKeepToTheirMemory) {
  const auto config = engine_.MakeCacheConfig(CacheSpec::Parse("full"), kCtx);
  const size_t one = config->Plan(tokenizer_->Encode("the tea", true, true).size(), 300).bytes_peak;
  Start({.scheduler = {.max_running = 3, .max_queued = 8, .kv_memory = one + one / 2, .step_tokens = 16}});
  std::vector<std::thread> clients;
  for (int i = 0; i < 4; ++i)
    clients.emplace_back([&] { EXPECT_EQ(Complete({{"max_tokens", 300}}).json()["usage"]["completion_tokens"], 300); });
  size_t most = 0;
  while (scheduler_->Metrics().jobs_finished < 4) {
    most = std::max(most, scheduler_->Metrics().running);
    EXPECT_LE(scheduler_->Metrics().kv_bytes, one + one / 2);
  }
  for (std::thread& client : clients) client.join();
  EXPECT_EQ(most, 1u);
  const Reply large = Complete({{"max_tokens", 3000}});
  EXPECT_EQ(large.status, 400);
  EXPECT_NE(large.body.find("the text's cache may take"), std::string::npos);
}

TEST_F(ServerTest, KeysAreAskedFor) {
  Start({.http = {.port = 0, .api_key = "secret"}});
  EXPECT_EQ(Get("/health").status, 200);
  EXPECT_EQ(Get("/v1/models").status, 401);
  EXPECT_EQ(Get("/v1/models", "Authorization: Bearer secreT\r\n").status, 401);
  EXPECT_EQ(Get("/v1/models", "Authorization: Bearer secret1\r\n").status, 401);
  EXPECT_EQ(Get("/v1/models", "Authorization: Bearer secret\r\n").status, 200);
  EXPECT_EQ(Complete({}).status, 401);
  EXPECT_TRUE(SameSecret("ab", "ab"));
  EXPECT_FALSE(SameSecret("ab", "abc"));
  EXPECT_FALSE(SameSecret("abc", "ab"));
  EXPECT_FALSE(SameSecret("", "a"));
}

TEST_F(ServerTest, OthersAreServedWithAKeyOnly) {
  Start();
  EXPECT_THROW(HttpServer(*context_, *scheduler_, {.host = "0.0.0.0", .port = 0}), Error);
  EXPECT_NO_THROW(HttpServer(*context_, *scheduler_, {.host = "0.0.0.0", .port = 0, .api_key = "k"}));
  EXPECT_TRUE(IsLoopback("127.0.0.1"));
  EXPECT_FALSE(IsLoopback("127.0.0.1.example.org"));
  EXPECT_THROW(HttpServer(*context_, *scheduler_, {.port = port_}).Bind(), Error);
}

TEST_F(ServerTest, TheOtherPathsAnswer) {
  Start();
  const Json ids = Post("/tokenize", {{"content", "the tea"}, {"add_special", true}}).json()["tokens"];
  EXPECT_EQ(ids, tokenizer_->Encode("the tea", true, true));
  Json rest = ids;
  rest.erase(0);
  EXPECT_EQ(Post("/detokenize", {{"tokens", rest}}).json()["content"], "the tea");
  EXPECT_EQ(Post("/detokenize", {{"tokens", {272}}}).status, 400);
  EXPECT_EQ(Get("/v1/models").json()["data"][0]["id"], "tiny");
  EXPECT_EQ(Get("/props").json()["kv_policies"], (Json{"full", "window(24)", "h2o(24)"}));
  Complete({});
  ASSERT_TRUE(Soon([&] { return scheduler_->Metrics().running == 0; }));
  const std::string metrics = Get("/metrics").body;
  EXPECT_NE(metrics.find("\nlesskv_generated_tokens_total 12\n"), std::string::npos) << metrics;
  EXPECT_NE(metrics.find("\nlesskv_requests_finished_total 1\n"), std::string::npos);
}

TEST_F(ServerTest, TimeIsLimited) {
  Start({.max_time = 0s});
  const Reply late = Complete({});
  EXPECT_EQ(late.status, 500);
  EXPECT_NE(late.body.find("time ran out"), std::string::npos);
}

TEST_F(ServerTest, TheEndOfTheServerEndsItsTexts) {
  Start();
  const auto stream = LongStream();
  scheduler_->Stop();
  EXPECT_NE(stream->All().find("the server is stopping"), std::string::npos);
  EXPECT_EQ(Complete({}).status, 429);
}

}  // namespace
}  // namespace lesskv
