// A server over a tiny model, and clients of it, over loopback.
#pragma once

#include <arpa/inet.h>
#include <gtest/gtest.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include <chrono>
#include <map>
#include <mutex>
#include <nlohmann/json.hpp>
#include <thread>

#include "base/rng.h"
#include "server/directory_backend.h"
#include "server/http_server.h"

namespace lesskv::server_test {

using Json = nlohmann::json;
using namespace std::chrono_literals;

inline const std::string kModel = LESSKV_SOURCE_DIR "/tests/data/models/llama-gqa-tied.gguf";
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
    const timeval patience{300, 0};
    ::setsockopt(fd_, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof(patience));
  }
  ~Connection() { ::close(fd_); }
  // Whether all of it went out.
  bool Send(const std::string& text) const {
    return ::send(fd_, text.data(), text.size(), MSG_NOSIGNAL) == static_cast<ssize_t>(text.size());
  }
  void EndSending() const { ::shutdown(fd_, SHUT_WR); }
  std::string Some() const {
    char buffer[4096];
    ssize_t n;
    do n = ::recv(fd_, buffer, sizeof(buffer), 0);
    while (n < 0 && errno == EINTR);  // where this process was stopped and went on
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

inline std::string Dechunked(const std::string& text) {
  std::string result;
  for (size_t pos = 0; pos < text.size();) {
    const size_t n = std::stoul(text.substr(pos), nullptr, 16), begin = text.find("\r\n", pos) + 2;
    result += text.substr(begin, n);
    if (n == 0) break;
    pos = begin + n + 2;
  }
  return result;
}

inline Reply ParseReply(const std::string& text) {
  const size_t end = text.find("\r\n\r\n");
  if (end == std::string::npos) return {};
  Reply reply{std::stoi(text.substr(text.find(' ') + 1)), text.substr(0, end), text.substr(end + 4)};
  if (reply.head.find("chunked") != std::string::npos) reply.body = Dechunked(reply.body);
  return reply;
}

inline std::string RequestText(const std::string& method, const std::string& path, const std::string& body,
                               const std::string& header = "") {
  return fmt::format("{} {} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n{}Content-Length: {}\r\n\r\n{}", method, path,
                     header, body.size(), body);
}

struct Options {
  SchedulerOptions scheduler = {.max_running = 3, .max_queued = 8, .step_tokens = 16};
  HttpOptions http = {.port = 0, .max_body = 1 << 16};
  std::string store = {};  // a directory
  size_t store_bytes = 1 << 30;
  std::function<std::unique_ptr<StoreBackend>(SessionStore::LogLine)> backend = {};  // makes another kind of store
  std::vector<std::string> kv = {"full", "window(24)", "h2o(24)"};
  size_t max_prompt = 500;
  std::chrono::seconds max_time = 600s;
};

class ServerTest : public testing::Test {
 protected:
  void Start(const Options& options = {}) {
    ApiLimits limits{.ctx = kCtx,
                     .max_prompt = options.max_prompt,
                     .max_output = 150000,
                     .max_protected = 20,
                     .max_choices = options.scheduler.max_running,
                     .max_time = options.max_time};
    for (const std::string& spec : options.kv)
      limits.configs.push_back(engine_.MakeCacheConfig(CacheSpec::Parse(spec), kCtx));
    context_ = std::make_unique<ApiContext>(ApiContext{engine_, *tokenizer_, &chat_, "tiny", limits});
    const SessionStore::LogLine log = [this](const std::string& line) { AddLog(line); };
    if (options.backend) store_ = std::make_unique<SessionStore>(engine_, options.backend(log), log);
    if (!options.store.empty())
      store_ = std::make_unique<SessionStore>(
          engine_, std::make_unique<DirectoryBackend>(options.store, options.store_bytes), log);
    scheduler_ = std::make_unique<Scheduler>(engine_, *tokenizer_, options.scheduler, store_.get());
    server_ = std::make_unique<HttpServer>(*context_, *scheduler_, options.http, store_.get());
    port_ = server_->Bind();
    thread_ = std::thread([this] { server_->Listen(); });
    while (Get("/health").status != 200) std::this_thread::sleep_for(1ms);
  }
  void Stop() {
    if (!thread_.joinable()) return;
    scheduler_->Stop();
    server_->Stop();
    thread_.join();
    server_.reset();
    scheduler_.reset();
    store_.reset();
  }
  void TearDown() override { Stop(); }

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

  void AddLog(const std::string& line) {
    const std::lock_guard lock(log_mutex_);
    log_ += line + "\n";
  }
  std::string Log() {
    const std::lock_guard lock(log_mutex_);
    return log_;
  }

  // Waits until it is so; the limit, which a busy machine does not reach, ends a test that would wait for ever.
  template <typename Condition>
  static bool Soon(Condition condition) {
    const auto end = std::chrono::steady_clock::now() + 180s;
    while (!condition() && std::chrono::steady_clock::now() < end) std::this_thread::sleep_for(5ms);
    return condition();
  }

  // A text that takes long, whatever tokens it has, as a stream whose beginning has come.
  std::unique_ptr<Connection> LongStream() const {
    auto connection = std::make_unique<Connection>(port_);
    const Json body = {{"prompt", "the tea"},
                       {"temperature", 0},
                       {"max_tokens", 150000},
                       {"ignore_eos", true},
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
  std::mutex log_mutex_;
  std::string log_;  // of the store
  std::unique_ptr<SessionStore> store_;
  std::unique_ptr<Scheduler> scheduler_;
  std::unique_ptr<HttpServer> server_;
  int port_ = 0;
  std::thread thread_;
};

// The events' objects; the last event must be [DONE].
inline std::vector<Json> Events(const Reply& reply) {
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

}  // namespace lesskv::server_test
