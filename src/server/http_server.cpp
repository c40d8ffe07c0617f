#include "server/http_server.h"

#include <httplib.h>
#include <netdb.h>
#include <poll.h>
#include <sys/socket.h>

#include <condition_variable>
#include <mutex>
#include <utility>

#include "base/error.h"
#include "engine/run_info.h"
#include "server/embedded.h"
#include "server/responses.h"

namespace lesskv {
namespace {

constexpr const char* kJson = "application/json";
constexpr const char* kEvents = "text/event-stream";
constexpr auto kLook = std::chrono::milliseconds(100);  // how often a client is looked for

// A thread a connection. Where all have one, and as many more wait, nobody is taken in: the kernel's own short queue
// fills, and others find the port closed to them.
class Connections final : public httplib::TaskQueue {
 public:
  explicit Connections(size_t n) : pool_(n), most_(2 * n) {}

  void enqueue(std::function<void()> serve) override {
    std::unique_lock lock(mutex_);
    place_.wait(lock, [&] { return held_ < most_; });
    ++held_;
    pool_.enqueue([this, serve = std::move(serve)] {
      serve();
      const std::lock_guard leave(mutex_);
      --held_;
      place_.notify_one();
    });
  }
  void shutdown() override { pool_.shutdown(); }

 private:
  httplib::ThreadPool pool_;
  const size_t most_;
  std::mutex mutex_;
  std::condition_variable place_;
  size_t held_ = 0;
};

// The socket of a request, which the library does not give away: the one whose other end is the client's.
int SocketOf(const httplib::Request& request) {
  constexpr int kMostOpen = 4096;
  for (int fd = 3; fd < kMostOpen; ++fd) {
    sockaddr_storage peer{};
    socklen_t size = sizeof(peer);
    if (::getpeername(fd, reinterpret_cast<sockaddr*>(&peer), &size) != 0) continue;
    char host[NI_MAXHOST], port[NI_MAXSERV];
    if (::getnameinfo(reinterpret_cast<sockaddr*>(&peer), size, host, sizeof(host), port, sizeof(port),
                      NI_NUMERICHOST | NI_NUMERICSERV) == 0 &&
        request.remote_addr == host && std::to_string(request.remote_port) == port)
      return fd;
  }
  return -1;
}

// Whether the client has closed its end, as the library sees it, too.
bool HasGone(int socket) {
  pollfd state{socket, POLLRDHUP, 0};
  return socket >= 0 && ::poll(&state, 1, 0) > 0 && (state.revents & (POLLRDHUP | POLLHUP | POLLERR)) != 0;
}

}  // namespace

class HttpServer::Impl {
 public:
  Impl(const ApiContext& context, Scheduler& scheduler, const HttpOptions& options, const SessionStore* store)
      : c_(context),
        scheduler_(scheduler),
        options_(options),
        store_(store),
        keys_(options.api_keys, options.max_per_key) {
    if (!IsLoopback(options.host) && options.api_keys.empty())
      Fail(ErrorCode::kInvalidArgument, "--host {}: others than this machine may be served with an API key only",
           options.host);
    SetLimits();
    SetRoutes();
  }

  int Bind() {
    const int port = options_.port == 0                                   ? server_.bind_to_any_port(options_.host)
                     : server_.bind_to_port(options_.host, options_.port) ? options_.port
                                                                          : -1;
    if (port <= 0) Fail(ErrorCode::kIo, "cannot listen at {}:{}", options_.host, options_.port);
    return port;
  }

  void Listen() { server_.listen_after_bind(); }
  void Stop() { server_.stop(); }
  const std::vector<std::string>& routes() const { return routes_; }

 private:
  using Request = httplib::Request;
  using Response = httplib::Response;

  void SetLimits() {
    // The library's own options would let another server share the port.
    server_.set_socket_options([](socket_t listener) {
      const int yes = 1;
      ::setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof(yes));
    });
    server_.set_payload_max_length(options_.max_body);
    server_.set_read_timeout(10);
    server_.set_write_timeout(10);
    server_.set_keep_alive_timeout(5);
    // Those that run and wait, and some to tell others that there is no place.
    const size_t usual = scheduler_.options().max_running + scheduler_.options().max_queued + 16;
    const size_t n = options_.max_connections == 0 ? usual : options_.max_connections;
    server_.new_task_queue = [n] { return new Connections(n); };
    server_.set_pre_routing_handler(
        [this](const Request& request, Response& response) { return Authorise(request, response); });
    server_.set_error_handler([](const Request&, Response& response) { DescribeError(response); });
    server_.set_exception_handler([](const Request&, Response& response, std::exception_ptr) {
      SendError(response, {500, "server_error", "the request failed"});
    });
  }

  void SetRoutes() {
    Get("/", [](const Request&, Response& r) { SendPage(r); });
    Get("/openapi.json", [](const Request&, Response& r) { r.set_content(std::string(OpenApiText()), kJson); });
    Get("/health", [](const Request&, Response& r) { r.set_content(R"({"status":"ok"})", kJson); });
    Get("/metrics", [this](const Request&, Response& r) { r.set_content(Metrics(), "text/plain; version=0.0.4"); });
    Get("/slots", [this](const Request&, Response& r) { r.set_content(SlotsText(scheduler_), kJson); });
    Get("/v1/models", [this](const Request&, Response& r) { r.set_content(Models(), kJson); });
    Get("/props", [this](const Request&, Response& r) { r.set_content(Props(), kJson); });
    Post("/tokenize", [this](const Request& q, Response& r) { r.set_content(Tokenize(q.body, c_), kJson); });
    Post("/detokenize", [this](const Request& q, Response& r) { r.set_content(Detokenize(q.body, c_), kJson); });
    Post("/apply-template", [this](const Request& q, Response& r) { r.set_content(ApplyTemplate(q.body, c_), kJson); });
    Post("/v1/chat/completions", [this](const Request& q, Response& r) { Answer(ParseChatRequest(q.body, c_), q, r); });
    Post("/v1/completions",
         [this](const Request& q, Response& r) { Answer(ParseCompletionRequest(q.body, c_), q, r); });
    Post("/v1/responses", [this](const Request& q, Response& r) { Answer(ParseResponseRequest(q.body, c_), q, r); });
  }

  void Get(const std::string& path, httplib::Server::Handler handler) {
    routes_.push_back("GET " + path);
    server_.Get(path, std::move(handler));
  }

  // What the handler throws becomes an answer.
  void Post(const std::string& path, httplib::Server::Handler handler) {
    routes_.push_back("POST " + path);
    server_.Post(path, [handler = std::move(handler)](const Request& request, Response& response) {
      try {
        handler(request, response);
      } catch (const Error& error) {
        SendError(response, ToApiError(error));
      } catch (const std::bad_alloc&) {
        SendError(response, {503, "server_error", "memory for the request cannot be had"});
      }
    });
  }

  // The page brings everything with it; nothing else may be loaded, or ask in its name.
  static void SendPage(Response& response) {
    response.set_header(
        "Content-Security-Policy",
        "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'");
    response.set_header("X-Content-Type-Options", "nosniff");
    response.set_content(std::string(PageHtml()), "text/html; charset=utf-8");
  }

  static void SendError(Response& response, const ApiError& error) {
    response.status = error.status;
    if (error.status == 429 || error.status == 503) response.set_header("Retry-After", "1");
    response.set_content(DumpJson(error.Body()), kJson);
  }

  // Errors that the library answers itself: unknown paths, bodies that are too long, what is no HTTP.
  static void DescribeError(Response& response) {
    if (!response.body.empty()) return;
    const int status = response.status;
    const char* const message = status == 404   ? "there is nothing at this path"
                                : status == 413 ? "the body is too long"
                                                : "the request cannot be read";
    SendError(response, {status, status >= 500 ? "server_error" : "invalid_request_error", message});
  }

  // The page itself holds no secret: it asks for the key.
  static bool IsOpen(const std::string& path) { return path == "/health" || path == "/"; }

  httplib::Server::HandlerResponse Authorise(const Request& request, Response& response) const {
    using Result = httplib::Server::HandlerResponse;
    if (IsForeignOrigin(request.get_header_value("Origin"), request.get_header_value("Host"))) {
      SendError(response, {403, "permission_error", "pages of other servers are not answered"});
      return Result::Handled;
    }
    if (IsOpen(request.path) || keys_.Find(request.get_header_value("Authorization"))) return Result::Unhandled;
    response.set_header("WWW-Authenticate", "Bearer");
    SendError(response, {401, "authentication_error", "the API key is missing or wrong"});
    return Result::Handled;
  }

  // Authorise has found it.
  size_t KeyOf(const Request& request) const { return *keys_.Find(request.get_header_value("Authorization")); }

  // Between whom places go round: the keys; without keys, addresses.
  std::string ClientOf(const Request& request) const {
    return options_.api_keys.empty() ? request.remote_addr : std::to_string(KeyOf(request));
  }

  std::shared_ptr<void> EnterKey(const Request& request, size_t texts) {
    std::shared_ptr<void> place = keys_.Enter(KeyOf(request), texts);
    if (place == nullptr) throw BusyError(fmt::format("more than {} texts of this key would be in work", keys_.most()));
    return place;
  }

  // One request's texts. Until their first token is there, what fails has a status of its own; from then on the answer is
  // written piece by piece.
  void Answer(TextRequest request, const Request& http, Response& response) {
    const std::shared_ptr<void> place = EnterKey(http, request.job.choices);
    const std::shared_ptr<TextAnswer> answer = MakeAnswer(request);
    const bool stream = request.stream;
    request.job.client = ClientOf(http);
    const std::shared_ptr<Job> job = scheduler_.Submit(std::move(request.job));
    auto state = std::make_shared<JobState>(WaitForToken(*job, SocketOf(http)));
    if (state->refused) throw BusyError(state->error->what());
    if (state->error) throw *state->error;
    const auto send = stream ? &Impl::Stream : &Impl::SendWhole;
    response.set_chunked_content_provider(
        stream ? kEvents : kJson, [=](size_t, httplib::DataSink& sink) { return send(*answer, *job, *state, sink); },
        [job, place](bool) { job->Cancel(); });
  }

  std::shared_ptr<TextAnswer> MakeAnswer(const TextRequest& request) const {
    if (request.form == TextForm::kResponse) return std::make_shared<ResponseAnswer>(c_, request);
    return std::make_shared<TextAnswer>(c_, request);
  }

  // Until the first token, or the end. A client that goes meanwhile ends it.
  static JobState WaitForToken(Job& job, int socket) {
    for (;;) {
      JobState state = job.Wait(kLook);
      if (state.ended() || state.generated_tokens() > 0) return state;
      if (HasGone(socket)) job.Cancel();
    }
  }

  static bool Write(httplib::DataSink& sink, const std::string& text) {
    return text.empty() || (sink.is_writable() && sink.write(text.data(), text.size()));
  }

  static bool Stream(TextAnswer& answer, Job& job, JobState state, httplib::DataSink& sink) {
    if (!Write(sink, answer.FirstEvent())) return false;
    for (;; state = job.Wait(kLook)) {
      if (!sink.is_writable()) return false;
      if (!Write(sink, answer.News(state))) return false;
      if (state.ended()) break;
    }
    const bool sent = Write(sink, state.error ? answer.ErrorEvent(ToApiError(*state.error)) : answer.LastEvents(state));
    if (sent) sink.done();
    return sent;
  }

  static bool SendWhole(TextAnswer& answer, Job& job, JobState state, httplib::DataSink& sink) {
    while (!state.ended()) {
      if (!sink.is_writable()) return false;
      state.Append(job.Wait(kLook));
    }
    const bool sent = Write(sink, state.error ? DumpJson(ToApiError(*state.error).Body()) : answer.Body(state));
    if (sent) sink.done();
    return sent;
  }

  std::string Metrics() const {
    return MetricsText(scheduler_.Metrics()) + (store_ == nullptr ? "" : MetricsText(store_->Metrics()));
  }

  std::string Models() const {
    nlohmann::ordered_json list = {{"object", "list"}, {"data", nlohmann::ordered_json::array()}};
    list["data"].push_back({{"id", c_.model_name}, {"object", "model"}, {"created", 0}, {"owned_by", "lesskv"}});
    return DumpJson(list);
  }

  std::string Props() const {
    const ApiLimits& l = c_.limits;
    return DumpJson({{"model", c_.model_name},
                     {"model_fingerprint", c_.engine.model().FingerprintText()},
                     {"version", Version()},
                     {"ctx", l.ctx},
                     {"kv_policies", l.kv},
                     {"kv_memory", scheduler_.options().kv_memory},
                     {"max_running", scheduler_.options().max_running},
                     {"max_queued", scheduler_.options().max_queued},
                     {"max_prompt", l.max_prompt},
                     {"max_output", l.max_output},
                     {"max_protected", l.max_protected},
                     {"max_choices", l.max_choices},
                     {"max_seconds", l.max_time.count()},
                     {"chat_template", c_.chat == nullptr ? "" : std::string(c_.chat->name())}});
  }

  const ApiContext& c_;
  Scheduler& scheduler_;
  const HttpOptions options_;
  const SessionStore* const store_;
  KeyRing keys_;
  std::vector<std::string> routes_;
  httplib::Server server_;
};

HttpServer::HttpServer(const ApiContext& context, Scheduler& scheduler, const HttpOptions& options,
                       const SessionStore* store)
    : impl_(std::make_unique<Impl>(context, scheduler, options, store)) {}
HttpServer::~HttpServer() = default;
int HttpServer::Bind() { return impl_->Bind(); }
void HttpServer::Listen() { impl_->Listen(); }
void HttpServer::Stop() { impl_->Stop(); }
const std::vector<std::string>& HttpServer::Routes() const { return impl_->routes(); }

}  // namespace lesskv
