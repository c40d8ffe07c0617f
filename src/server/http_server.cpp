#include "server/http_server.h"

#include <httplib.h>

#include <utility>

#include "base/error.h"
#include "engine/run_info.h"

namespace lesskv {
namespace {

constexpr const char* kJson = "application/json";
constexpr const char* kEvents = "text/event-stream";
constexpr auto kLook = std::chrono::milliseconds(100);  // how often a client is looked for

}  // namespace

bool SameSecret(std::string_view a, std::string_view b) {
  unsigned difference = a.size() == b.size() ? 0 : 1;
  for (size_t i = 0; i < a.size(); ++i)
    difference |= static_cast<unsigned char>(a[i]) ^ static_cast<unsigned char>(i < b.size() ? b[i] : 0);
  return difference == 0;
}

bool IsLoopback(const std::string& host) {
  return host == "localhost" || host == "::1" ||
         (host.starts_with("127.") && host.find_first_not_of("0123456789.") == std::string::npos);
}

class HttpServer::Impl {
 public:
  Impl(const ApiContext& context, Scheduler& scheduler, const HttpOptions& options)
      : c_(context), scheduler_(scheduler), options_(options) {
    if (!IsLoopback(options.host) && options.api_key.empty())
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
    // A thread a connection: those that run and wait, and some to tell others that there is no place.
    const size_t n = scheduler_.options().max_running + scheduler_.options().max_queued + 8;
    server_.new_task_queue = [n] { return new httplib::ThreadPool(n); };
    server_.set_pre_routing_handler(
        [this](const Request& request, Response& response) { return Authorise(request, response); });
    server_.set_error_handler([](const Request&, Response& response) { DescribeError(response); });
    server_.set_exception_handler([](const Request&, Response& response, std::exception_ptr) {
      SendError(response, {500, "server_error", "the request failed"});
    });
  }

  void SetRoutes() {
    server_.Get("/health", [](const Request&, Response& r) { r.set_content(R"({"status":"ok"})", kJson); });
    server_.Get("/metrics", [this](const Request&, Response& r) {
      r.set_content(MetricsText(scheduler_.Metrics()), "text/plain; version=0.0.4");
    });
    server_.Get("/v1/models", [this](const Request&, Response& r) { r.set_content(Models(), kJson); });
    server_.Get("/props", [this](const Request&, Response& r) { r.set_content(Props(), kJson); });
    Post("/tokenize", [this](const Request& q, Response& r) { r.set_content(Tokenize(q.body, c_), kJson); });
    Post("/detokenize", [this](const Request& q, Response& r) { r.set_content(Detokenize(q.body, c_), kJson); });
    Post("/v1/chat/completions", [this](const Request& q, Response& r) { Answer(ParseChatRequest(q.body, c_), r); });
    Post("/v1/completions", [this](const Request& q, Response& r) { Answer(ParseCompletionRequest(q.body, c_), r); });
  }

  // What the handler throws becomes an answer.
  void Post(const char* path, std::function<void(const Request&, Response&)> handler) {
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

  static void SendError(Response& response, const ApiError& error) {
    response.status = error.status;
    if (error.status == 429) response.set_header("Retry-After", "1");
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

  httplib::Server::HandlerResponse Authorise(const Request& request, Response& response) const {
    using Result = httplib::Server::HandlerResponse;
    if (options_.api_key.empty() || request.path == "/health") return Result::Unhandled;
    if (SameSecret(request.get_header_value("Authorization"), "Bearer " + options_.api_key)) return Result::Unhandled;
    response.set_header("WWW-Authenticate", "Bearer");
    SendError(response, {401, "authentication_error", "the API key is missing or wrong"});
    return Result::Handled;
  }

  // One text. Until its first token is there, what fails has a status of its own; from then on the answer is written
  // piece by piece, so that a client that has gone is noticed.
  void Answer(TextRequest request, Response& response) {
    auto answer = std::make_shared<const TextAnswer>(c_, request);
    const bool stream = request.stream;
    const std::shared_ptr<Job> job = scheduler_.Submit(std::move(request.job));
    auto state = std::make_shared<JobState>();
    do {
      *state = job->Wait(kLook);
    } while (!state->ended() && state->generated_tokens == 0);
    if (state->error) throw *state->error;
    const auto send = stream ? &Impl::Stream : &Impl::SendWhole;
    response.set_chunked_content_provider(
        stream ? kEvents : kJson, [=](size_t, httplib::DataSink& sink) { return send(*answer, *job, *state, sink); },
        [job](bool) { job->Cancel(); });
  }

  static bool Write(httplib::DataSink& sink, const std::string& text) {
    return text.empty() || (sink.is_writable() && sink.write(text.data(), text.size()));
  }

  static bool Stream(const TextAnswer& answer, Job& job, JobState state, httplib::DataSink& sink) {
    if (!Write(sink, answer.FirstEvent())) return false;
    for (;; state = job.Wait(kLook)) {
      if (!sink.is_writable()) return false;
      if (!state.new_text.empty() && !Write(sink, answer.TextEvent(state.new_text))) return false;
      if (state.ended()) break;
    }
    const bool sent =
        Write(sink, state.error ? TextAnswer::ErrorEvent(ToApiError(*state.error)) : answer.LastEvents(state));
    if (sent) sink.done();
    return sent;
  }

  static bool SendWhole(const TextAnswer& answer, Job& job, JobState state, httplib::DataSink& sink) {
    std::string text = state.new_text;
    while (!state.ended()) {
      if (!sink.is_writable()) return false;
      state = job.Wait(kLook);
      text += state.new_text;
    }
    const bool sent = Write(sink, state.error ? DumpJson(ToApiError(*state.error).Body()) : answer.Body(text, state));
    if (sent) sink.done();
    return sent;
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
                     {"max_seconds", l.max_time.count()},
                     {"chat_template", c_.chat == nullptr ? "" : std::string(c_.chat->name())}});
  }

  const ApiContext& c_;
  Scheduler& scheduler_;
  const HttpOptions options_;
  httplib::Server server_;
};

HttpServer::HttpServer(const ApiContext& context, Scheduler& scheduler, const HttpOptions& options)
    : impl_(std::make_unique<Impl>(context, scheduler, options)) {}
HttpServer::~HttpServer() = default;
int HttpServer::Bind() { return impl_->Bind(); }
void HttpServer::Listen() { impl_->Listen(); }
void HttpServer::Stop() { impl_->Stop(); }

}  // namespace lesskv
