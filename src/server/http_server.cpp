#include "server/http_server.h"

#include <algorithm>
#include <utility>

#include "base/error.h"
#include "engine/run_info.h"
#include "server/checked_server.h"
#include "server/embedded.h"
#include "server/responses.h"

namespace lesskv {
namespace {

constexpr const char* kJson = "application/json";
constexpr const char* kEvents = "text/event-stream";
constexpr const char* kNoPath = "there is nothing at this path";
constexpr auto kLook = std::chrono::milliseconds(100);  // how often a client is looked for

}  // namespace

class HttpServer::Impl {
 public:
  Impl(const ApiContext& context, Scheduler& scheduler, const HttpOptions& options, const SessionStore* store)
      : c_(context),
        scheduler_(scheduler),
        options_(options),
        store_(store),
        keys_(options.api_keys, options.max_per_key),
        server_({.max_body = options.max_body, .read_time = options.max_read, .connections = ConnectionCount()},
                [this](const RequestHead& head) { return Admit(head); }) {
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

  bool Listen() { return server_.listen_after_bind(); }
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
    server_.set_pre_routing_handler(
        [this](const Request& request, Response& response) { return CheckMethod(request, response); });
    server_.set_error_handler([](const Request&, Response& response) { DescribeError(response); });
    server_.set_exception_handler([](const Request&, Response& response, std::exception_ptr) {
      SendError(response, {500, "server_error", "the request failed"});
    });
  }

  // Those that run and wait, and some to tell others that there is no place.
  size_t ConnectionCount() const {
    const size_t usual = scheduler_.options().max_running + scheduler_.options().max_queued + 16;
    return options_.max_connections == 0 ? usual : options_.max_connections;
  }

  void SetRoutes() {
    Get("/", [](const Request&, Response& r) { SendPage(r); });
    Get("/openapi.json", [](const Request&, Response& r) { r.set_content(std::string(OpenApiText()), kJson); });
    Get("/health", [](const Request&, Response& r) { r.set_content(R"({"status":"ok"})", kJson); });
    Get("/metrics", [this](const Request&, Response& r) { r.set_content(Metrics(), "text/plain; version=0.0.4"); });
    Get("/slots", [this](const Request&, Response& r) { r.set_content(SlotsText(scheduler_), kJson); });
    Get("/v1/models", [this](const Request&, Response& r) { r.set_content(Models(), kJson); });
    Get("/v1/models/{id}", [this](const Request& q, Response& r) { DescribeModel(q, r); });
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
    server_.Get(path.substr(0, path.find('{')) + (path.ends_with('}') ? "(.+)" : ""), std::move(handler));
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
    for (const auto& [name, value] : error.Headers()) response.set_header(name, value);
    response.set_content(DumpJson(error.Body()), kJson);
  }

  // Errors that the library answers itself: unknown paths, what is no HTTP.
  static void DescribeError(Response& response) {
    if (!response.body.empty()) return;
    const int status = response.status;
    const char* const message = status == 404 ? kNoPath : "the request cannot be read";
    SendError(response, {status, status >= 500 ? "server_error" : "invalid_request_error", message});
  }

  // A path that is not there, or is asked for in another way than it can be.
  httplib::Server::HandlerResponse CheckMethod(const Request& request, Response& response) const {
    using Result = httplib::Server::HandlerResponse;
    std::string allowed;
    for (const std::string& route : routes_) {
      const std::string method = route.substr(0, route.find(' ')), path = route.substr(method.size() + 1);
      const std::string_view stem = std::string_view(path).substr(0, path.find('{'));
      if (path.ends_with('}') ? !request.path.starts_with(stem) || request.path == stem : request.path != path) continue;
      if (request.method == method || (request.method == "HEAD" && method == "GET")) return Result::Unhandled;
      allowed += (allowed.empty() ? "" : ", ") + method;
    }
    // Not the library's to look for, which takes a path for a pattern.
    if (allowed.empty()) {
      SendError(response, {404, "invalid_request_error", kNoPath});
    } else {
      response.set_header("Allow", allowed);
      SendError(response, {405, "invalid_request_error", "this path is for " + allowed});
    }
    return Result::Handled;
  }

  // The page itself holds no secret: it asks for the key.
  static bool IsOpen(std::string_view path) { return path == "/health" || path == "/"; }

  // The number of the key that asks.
  size_t Admit(const RequestHead& head) const {
    if (options_.api_keys.empty() && !IsOwnHost(head.host, options_.host))
      throw ApiError{403, "permission_error",
                     "without an API key this server answers to localhost only, not to a Host that others name"};
    if (IsForeignOrigin(head.origin, head.host))
      throw ApiError{403, "permission_error", "pages of other servers are not answered"};
    if (const std::optional<size_t> key = keys_.Find(head.authorization)) return *key;
    if (IsOpen(head.path())) return 0;
    throw ApiError{401, "authentication_error", "the API key is missing or wrong", {}, "invalid_api_key"};
  }

  // Between whom places go round: the keys; without keys, addresses.
  std::string ClientOf(const Request& request) const {
    return options_.api_keys.empty() ? request.remote_addr : std::to_string(CheckedServer::KeyOf(request));
  }

  std::shared_ptr<void> EnterKey(const Request& request, size_t texts) {
    std::shared_ptr<void> place = keys_.Enter(CheckedServer::KeyOf(request), texts);
    if (place == nullptr) throw BusyError(fmt::format("more than {} texts of this key would be in work", keys_.most()));
    return place;
  }

  // One request's texts. What fails before anything was sent has a status of its own: a whole answer to its end, a
  // stream until its first token.
  void Answer(TextRequest request, const Request& http, Response& response) {
    const std::shared_ptr<void> place = EnterKey(http, request.job.choices);
    const std::shared_ptr<TextAnswer> answer = MakeAnswer(request);
    const bool stream = request.stream;
    request.job.client = ClientOf(http);
    const std::shared_ptr<Job> job = scheduler_.Submit(std::move(request.job));
    auto state = std::make_shared<JobState>(WaitFor(*job, http, !stream));
    if (state->busy) throw *state->busy;
    if (state->error) return SendError(response, ErrorOf(*state->error, *job));
    if (!stream) return response.set_content(answer->Body(*state), kJson);
    const auto held = std::make_shared<std::shared_ptr<void>>(place);
    const auto events = [=](size_t, httplib::DataSink& sink) { return Stream(*answer, *job, *state, *held, sink); };
    const auto release = [job](bool) { job->Cancel(); };
    if (http.version == "HTTP/1.0") return response.set_content_provider(kEvents, events, release);
    response.set_chunked_content_provider(kEvents, events, release);
  }

  static ApiError ErrorOf(const Error& error, const Job& job) {
    ApiError described = ToApiError(error);
    if (described.status == 500 && job.request().deadline <= std::chrono::steady_clock::now()) {
      described.status = 504;
      described.code = "timeout";
    }
    return described;
  }

  std::shared_ptr<TextAnswer> MakeAnswer(const TextRequest& request) const {
    if (request.form == TextForm::kResponse) return std::make_shared<ResponseAnswer>(c_, request);
    return std::make_shared<TextAnswer>(c_, request);
  }

  // Until the first token, or the end. A client that goes meanwhile ends it.
  static JobState WaitFor(Job& job, const Request& http, bool whole) {
    JobState state = job.Wait(kLook);
    while (!state.ended() && (whole || state.generated_tokens() == 0)) {
      if (CheckedServer::ClientHasGone(http)) job.Cancel();
      state.Append(job.Wait(kLook));
    }
    return state;
  }

  static bool Write(httplib::DataSink& sink, const std::string& text) {
    return text.empty() || (sink.is_writable() && sink.write(text.data(), text.size()));
  }

  // The key's `place` is free when the end has been told.
  static bool Stream(TextAnswer& answer, Job& job, JobState state, std::shared_ptr<void>& place,
                     httplib::DataSink& sink) {
    if (!Write(sink, answer.FirstEvent())) return false;
    for (;; state = job.Wait(kLook)) {
      if (!sink.is_writable()) return false;
      if (!Write(sink, answer.News(state))) return false;
      if (state.ended()) break;
    }
    place.reset();
    const bool sent = Write(sink, state.error ? answer.ErrorEvent(ErrorOf(*state.error, job)) : answer.LastEvents(state));
    if (sent) sink.done();
    return sent;
  }

  std::string Metrics() const {
    return MetricsText(scheduler_.Metrics()) + (store_ == nullptr ? "" : MetricsText(store_->Metrics()));
  }

  nlohmann::ordered_json Model() const {
    return {{"id", c_.model_name}, {"object", "model"}, {"created", 0}, {"owned_by", "lesskv"}};
  }

  std::string Models() const {
    nlohmann::ordered_json list = {{"object", "list"}, {"data", nlohmann::ordered_json::array()}};
    list["data"].push_back(Model());
    return DumpJson(list);
  }

  void DescribeModel(const Request& request, Response& response) const {
    const std::string name = request.matches[1];
    if (name == c_.model_name) return response.set_content(DumpJson(Model()), kJson);
    SendError(response, ToApiError(NoSuchModel(name, c_.model_name)));
  }

  std::string Props() const {
    const ApiLimits& l = c_.limits;
    return DumpJson({{"model", c_.model_name},
                     {"model_fingerprint", c_.engine.model().FingerprintText()},
                     {"version", Version()},
                     {"ctx", l.ctx},
                     {"kv_policies", l.Specs()},
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
  CheckedServer server_;
};

HttpServer::HttpServer(const ApiContext& context, Scheduler& scheduler, const HttpOptions& options,
                       const SessionStore* store)
    : impl_(std::make_unique<Impl>(context, scheduler, options, store)) {}
HttpServer::~HttpServer() = default;
int HttpServer::Bind() { return impl_->Bind(); }
bool HttpServer::Listen() { return impl_->Listen(); }
void HttpServer::Stop() { impl_->Stop(); }
const std::vector<std::string>& HttpServer::Routes() const { return impl_->routes(); }

}  // namespace lesskv
