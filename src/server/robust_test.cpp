// What clients do wrong, on purpose or not: bodies that make no sense, connections that end, wait or come in crowds.
#include <filesystem>
#include <fstream>
#include <iterator>

#include "server/any_body.h"
#include "server/checked_server.h"
#include "server/server_harness.h"

namespace lesskv::server_test {
namespace {

// A mutation of a body that makes sense.
std::string Mutated(Rng& rng) {
  constexpr size_t kSeeds = std::size(kSomeBodies);
  std::string body(kSomeBodies[rng.Below(kSeeds)]);
  for (size_t n = rng.Below(8); n > 0 && !body.empty(); --n) {
    const size_t at = rng.Below(body.size()), length = std::min<size_t>(rng.Below(16), body.size() - at);
    const std::string_view other = kSomeBodies[rng.Below(kSeeds)];
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

TEST_F(ServerTest, ABodyIsReadOrRefused) {
  Start();
  Rng rng(11);
  size_t read = 0, refused = 0;
  for (int i = 0; i < 10000; ++i) TakeBody(Mutated(rng), *context_) > 0 ? ++read : ++refused;
  EXPECT_GT(read, 250u);  // the mutations reach behind the parser
  EXPECT_GT(refused, 2500u);
}

TEST_F(ServerTest, ClientsThatComeAndGoLeaveNothingBehind) {
  Start();
  Rng rng(5);
  const std::string whole =
      RequestText("POST", "/v1/completions",
                  R"x({"prompt":"the tea","max_tokens":150000,"ignore_eos":true,"stream":true,"kv_policy":"window(24)"})x");
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
  // Those that wait for nobody have their places until it is seen that their clients have gone.
  EXPECT_TRUE(Soon([&] { return Complete({}).status == 200; }));
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
  const std::string body = R"x({"prompt":"the","max_tokens":150000,"ignore_eos":true,"stream":true,"kv_policy":"window(24)"})x";
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

// Who has read a stream's end may ask for the next at once, on another connection.
TEST_F(ServerTest, AKeysShareIsFreeWhenItsStreamEnds) {
  Start({.http = {.port = 0, .api_keys = {"one"}, .max_per_key = 1}});
  const std::string body = R"x({"prompt":"the","max_tokens":2,"stream":true})x";
  for (int i = 0; i < 100; ++i) {
    const Connection connection(port_);
    connection.Send(RequestText("POST", "/v1/completions", body, "Authorization: Bearer one\r\n"));
    std::string text;
    for (std::string more; text.find("[DONE]") == std::string::npos && !(more = connection.Some()).empty();) text += more;
    ASSERT_NE(text.find(" 200 "), std::string::npos) << i << text;
  }
}

TEST_F(ServerTest, PagesOfOthersAreNotAnswered) {
  Start();
  const std::string body = R"x({"prompt":"the","max_tokens":3})x";
  EXPECT_EQ(Call(RequestText("POST", "/v1/completions", body, "Origin: https://example.org\r\n")).status, 403);
  EXPECT_EQ(Call(RequestText("POST", "/v1/completions", body, "Origin: null\r\n")).status, 403);
  const Reply own = Call(RequestText("POST", "/v1/completions", body, "Origin: http://localhost\r\n"));
  EXPECT_EQ(own.status, 200);
  EXPECT_EQ(own.head.find("Access-Control"), std::string::npos);
  EXPECT_EQ(Call(RequestText("OPTIONS", "/v1/completions", "", "Origin: https://example.org\r\n")).status, 403);
}

// A name of others may lead to this machine, so that the page they served under it is no foreign one.
TEST_F(ServerTest, OnlyThisMachinesNamesAreAnsweredWithoutAKey) {
  EXPECT_TRUE(IsOwnHost("127.0.0.2:80", "127.0.0.2"));
  EXPECT_TRUE(IsOwnHost("[::1]:80", "127.0.0.1"));
  EXPECT_TRUE(IsOwnHost("LocalHost", "127.0.0.1"));
  for (const char* const other : {"", ":80", "localhost.example.org", "localhost:80x", "127.0.0.1.example.org", "[::1].example.org"})
    EXPECT_FALSE(IsOwnHost(other, "127.0.0.1")) << other;
  const auto ask = [this](const std::string& host) { return Call("GET /health HTTP/1.1\r\nHost: " + host + "\r\nConnection: close\r\n\r\n"); };
  Start();
  EXPECT_EQ(ask(fmt::format("127.0.0.1:{}", port_)).status, 200);
  EXPECT_EQ(ask("[::1]").status, 200);
  const Reply other = ask("example.org");
  EXPECT_EQ(other.status, 403);
  EXPECT_NE(other.body.find("answers to localhost only"), std::string::npos) << other.body;
  Stop();
  Start({.http = {.port = 0, .api_keys = {"secret"}}});
  EXPECT_EQ(ask("example.org").status, 200);
}

// What a flood may leave of memory; a sanitizer keeps much of what was freed.
#ifdef __SANITIZE_ADDRESS__
constexpr size_t kFloodBytes = size_t{80} << 20;
#else
constexpr size_t kFloodBytes = size_t{20} << 20;
#endif

// The memory of this process, as the kernel counts it.
size_t Resident() {
  std::ifstream file("/proc/self/statm");
  size_t pages = 0;
  file >> pages >> pages;
  return pages * static_cast<size_t>(::sysconf(_SC_PAGESIZE));
}

class LimitsTest : public ServerTest {
 protected:
  // Sends it until the server has had enough; its answer.
  Reply Flood(const std::string& head, const std::string& more, size_t times) const {
    const Connection connection(port_);
    connection.Send(head);
    for (size_t i = 0; i < times && connection.Send(more); ++i) continue;
    return ParseReply(connection.All());
  }
};

TEST_F(LimitsTest, HeadsAreLimited) {
  Start();
  const std::string head = "GET /health HTTP/1.1\r\nHost: localhost\r\n", mebibyte(1 << 20, 'y');
  const size_t before = Resident();
  EXPECT_EQ(Flood(head + "X: ", mebibyte, 100).status, 431);  // a line without an end
  EXPECT_EQ(Flood("GET /", mebibyte, 100).status, 414);
  EXPECT_EQ(Flood(head, "X: " + std::string(4000, 'y') + "\r\n", 10000).status, 431);
  EXPECT_LT(Resident(), before + kFloodBytes);
  EXPECT_EQ(Get("/health", "X: " + std::string(60000, 'y') + "\r\n").status, 200);
  EXPECT_EQ(Get("/" + std::string(10000, 'x')).status, 414);
  EXPECT_EQ(Get("/health").status, 200);
}

TEST_F(LimitsTest, BodiesAreLimitedHoweverTheyCome) {
  Start();  // 64 KiB
  const std::string head = "POST /tokenize HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n";
  const std::string chunk = "100000\r\n" + std::string(1 << 20, ' ') + "\r\n";
  const size_t before = Resident();
  EXPECT_EQ(Flood(head + "Transfer-Encoding: chunked\r\n\r\n", chunk, 200).status, 413);
  EXPECT_EQ(Flood(head + "Content-Length: 200000000\r\n\r\n", chunk, 200).status, 413);
  EXPECT_EQ(Flood(head + "Transfer-Encoding: chunked\r\n\r\n", "1\r\n \r\n", 70000).status, 413);
  EXPECT_LT(Resident(), before + kFloodBytes);
  const Reply refused = Flood(head + "Content-Length: 65537\r\n\r\n", chunk, 0);
  EXPECT_EQ(refused.json()["error"]["message"], "the body is longer than 65536 bytes");
  // Nobody is told to send what then is refused.
  EXPECT_EQ(Flood(head + "Expect: 100-continue\r\nContent-Length: 65537\r\n\r\n", chunk, 0).status, 413);
  // Within the limit, whatever it is called: also as the form that curl -d says it is.
  const std::string body = Json({{"content", std::string(40000, 'x')}}).dump();
  for (const char* const type : {"", "Content-Type: application/x-www-form-urlencoded\r\n", "Content-Type: multipart/form-data; boundary=x\r\n"})
    EXPECT_EQ(Call(RequestText("POST", "/tokenize", body, type)).status, 200) << type;
  const std::string chunked = fmt::format("{:x};x=y\r\n{}\r\n{:X}\r\n{}\r\n0\r\nX: y\r\n\r\n", 9, body.substr(0, 9), body.size() - 9, body.substr(9));
  EXPECT_EQ(Call(head + "Transfer-Encoding: chunked\r\n\r\n" + chunked).status, 200);
  EXPECT_EQ(Call(RequestText("POST", "/tokenize", body, "Content-Encoding: gzip\r\n")).status, 415);
  // Nobody's body is read before the key.
  Stop();
  Start({.http = {.port = 0, .api_keys = {"secret"}, .max_body = size_t{200} << 20}});
  const Reply unknown = Flood(head + "Content-Length: 200000000\r\n\r\n", chunk, 100);
  EXPECT_EQ(unknown.status, 401);
  EXPECT_LT(Resident(), before + kFloodBytes);
}

// Each sends a byte now and then, so that no single wait is long.
TEST_F(LimitsTest, ARequestHasOneTimeForAllOfIt) {
  Start({.http = {.port = 0, .max_read = 2s, .max_connections = 3}});
  std::vector<std::unique_ptr<Connection>> slow;
  const auto begin = std::chrono::steady_clock::now();
  for (int i = 0; i < 7; ++i) {
    slow.push_back(std::make_unique<Connection>(port_));
    slow.back()->Send(i % 2 == 0 ? "GET /hea" : "POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n");
  }
  std::atomic<bool> ended = false;
  std::thread dribble([&] {
    for (; !ended; std::this_thread::sleep_for(100ms))
      for (const auto& connection : slow) connection->Send("x");
  });
  const Reply late = Get("/health");
  const auto passed = std::chrono::steady_clock::now() - begin;
  ended = true;
  dribble.join();
  EXPECT_EQ(late.status, 200);
  EXPECT_GT(passed, 1s);  // they did hold all connections
  EXPECT_EQ(ParseReply(slow[0]->All()).status, 408);
  EXPECT_EQ(ParseReply(slow[1]->All()).status, 408);
}

// What follows a request on its connection is the next one, or nothing: never a part of it.
TEST_F(LimitsTest, AConnectionIsKeptForWholeRequestsOnly) {
  Start();
  const std::string get = "GET /health HTTP/1.1\r\nHost: localhost\r\n";
  const auto answers = [this](const std::string& text) {
    const Connection connection(port_);
    connection.Send(text);
    const std::string all = connection.All();
    size_t n = 0;
    for (size_t at = all.find("HTTP/1.1 "); at != std::string::npos; at = all.find("HTTP/1.1 ", at + 1)) ++n;
    return n;
  };
  EXPECT_EQ(answers(get + "\r\n" + get + "Connection: close\r\n\r\n"), 2u);
  EXPECT_EQ(answers(get + "Content-Length: 5\r\n\r\nGET /" + get + "Connection: close\r\n\r\n"), 2u);
  // Refused before its body was read: the body is no request.
  EXPECT_EQ(answers("POST /tokenize HTTP/1.1\r\nHost: example.org\r\nContent-Length: 100\r\n\r\n" + get + "\r\n"), 1u);
  EXPECT_EQ(answers("GET /health HTTP/1.0\r\n\r\n" + get + "\r\n"), 1u);
}

// The last answer of a connection that is not kept says so: a client that sent more knows that nobody reads it.
TEST_F(LimitsTest, AConnectionHasSoManyRequests) {
  Start();
  constexpr size_t kMost = CPPHTTPLIB_KEEPALIVE_MAX_COUNT;
  const Connection connection(port_);
  std::string requests;  // at once: for a late one the connection would not be kept
  for (size_t i = 0; i < kMost; ++i) requests += "GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n";
  connection.Send(requests);
  const std::string all = connection.All();
  size_t n = 0, last = 0;
  for (size_t at = all.find("HTTP/1.1 200"); at != std::string::npos; at = all.find("HTTP/1.1 200", at + 1)) ++n, last = at;
  EXPECT_EQ(n, kMost);
  EXPECT_EQ(all.find("Connection: close"), all.find("Connection: close", last));
  EXPECT_NE(all.find("Connection: close"), std::string::npos);
}

// Who asks for a head gets no body, of a refusal neither; that ends with the request.
TEST_F(LimitsTest, AHeadHasNoBody) {
  Start();
  const auto head_of = [this](const std::string& text) {
    const Connection connection(port_);
    connection.Send(text);
    return ParseReply(connection.All());
  };
  const Reply refused = head_of("HEAD /health HTTP/1.1\r\nHost: example.org\r\n\r\n");
  EXPECT_EQ(refused.status, 403);
  EXPECT_NE(refused.head.find("Content-Length: "), std::string::npos);
  EXPECT_EQ(refused.body, "");
  const Reply both = head_of("HEAD /health HTTP/1.1\r\nHost: localhost\r\n\r\nwhat is no request\r\n\r\n");
  EXPECT_EQ(both.status, 200);
  EXPECT_TRUE(both.body.starts_with("HTTP/1.1 400")) << both.body;
  EXPECT_TRUE(both.body.ends_with("}")) << both.body;
}

}  // namespace
}  // namespace lesskv::server_test
