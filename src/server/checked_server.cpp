#include "server/checked_server.h"

#include <arpa/inet.h>
#include <fmt/format.h>
#include <netdb.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <condition_variable>
#include <cstdlib>
#include <mutex>
#include <span>
#include <utility>

namespace lesskv {
namespace {

using Clock = std::chrono::steady_clock;
using namespace std::chrono_literals;

constexpr auto kSilence = 5s;  // before a request's first byte
constexpr auto kGrace = 2s;    // for one whose time passed while it waited for a thread
constexpr auto kWrite = 10s;   // until a client takes something
constexpr auto kLook = 100ms;  // how often the server's end is looked for
constexpr auto kDrain = 1s;
constexpr const char* kSocket = "Lesskv-Socket";
constexpr const char* kKey = "Lesskv-Key";

thread_local Clock::time_point accepted;  // when the connection came that this thread serves

// A thread a connection. Where all have one, and as many more wait, nobody is taken in: the kernel's own short queue
// fills, and others find the port closed to them.
class Connections final : public httplib::TaskQueue {
 public:
  explicit Connections(size_t n) : pool_(n), most_(2 * n) {}

  void enqueue(std::function<void()> serve) override {
    const auto now = Clock::now();
    std::unique_lock lock(mutex_);
    place_.wait(lock, [&] { return held_ < most_; });
    ++held_;
    pool_.enqueue([this, now, serve = std::move(serve)] {
      accepted = now;
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

// Whether the socket is as asked for before the time is over. Looks once, however late it is.
bool Waits(int socket, short events, Clock::time_point end, const std::function<bool()>& give_up = {}) {
  for (;;) {
    const auto left = std::chrono::ceil<std::chrono::milliseconds>(end - Clock::now());
    pollfd state{socket, events, 0};
    const int n = ::poll(&state, 1, static_cast<int>(std::clamp<std::chrono::milliseconds>(left, 0ms, kLook).count()));
    if (n > 0) return true;
    if ((n < 0 && errno != EINTR) || left <= 0ms || (give_up && give_up())) return false;
  }
}

bool HasGone(int socket) {
  pollfd state{socket, POLLRDHUP, 0};
  return ::poll(&state, 1, 0) > 0 && (state.revents & (POLLRDHUP | POLLHUP | POLLERR)) != 0;
}

// A call that is done again when a signal came between, such as that which lets a stopped process go on.
template <typename Call>
ssize_t Again(Call call) {
  for (;;)
    if (const ssize_t n = call(); n >= 0 || errno != EINTR) return n;
}

ssize_t Receive(int socket, std::span<char> buffer) {
  return Again([&] { return ::recv(socket, buffer.data(), buffer.size(), 0); });
}

ssize_t Send(int socket, std::string_view text) {
  return Again([&] { return ::send(socket, text.data(), text.size(), MSG_NOSIGNAL); });
}

bool SendAll(int socket, std::string_view text) {
  while (!text.empty()) {
    if (!Waits(socket, POLLOUT, Clock::now() + kWrite)) return false;
    const ssize_t n = Send(socket, text);
    if (n <= 0) return false;
    text.remove_prefix(static_cast<size_t>(n));
  }
  return true;
}

// Reads a request's bytes until the time for all of them is over.
class RequestBytes {
 public:
  RequestBytes(int socket, std::chrono::seconds time, std::function<bool()> stopping)
      : socket_(socket), time_(time), stopping_(std::move(stopping)) {}

  void Begin(Clock::time_point from, bool has_bytes) {
    from_ = from;
    begun_ = has_bytes;
  }
  std::string_view More() {
    const auto end = from_ + (begun_ ? std::chrono::nanoseconds(time_) : kSilence);
    if (!Waits(socket_, POLLIN, end, stopping_)) {
      if (!begun_ || stopping_()) return {};
      throw ApiError{408, "invalid_request_error",
                     fmt::format("the request did not come within {} seconds", time_.count())};
    }
    const ssize_t n = Receive(socket_, buffer_);
    if (!begun_) from_ = std::max(from_, Clock::now() - time_ + std::min<std::chrono::nanoseconds>(kGrace, time_));
    begun_ = true;
    return n <= 0 ? std::string_view() : std::string_view(buffer_.data(), static_cast<size_t>(n));
  }

 private:
  const int socket_;
  const std::chrono::seconds time_;
  const std::function<bool()> stopping_;
  Clock::time_point from_;
  bool begun_ = false;
  std::array<char, size_t{16} << 10> buffer_;
};

// What the library reads a request from, and writes the answer to.
class Admitted final : public httplib::Stream {
 public:
  Admitted(int socket, std::string head, std::string body)
      : socket_(socket), parts_{std::move(head), std::move(body)} {}

  bool is_readable() const override { return part_ < 2; }
  bool is_writable() const override { return Waits(socket_, POLLOUT, Clock::now() + kWrite) && !HasGone(socket_); }
  ssize_t read(char* out, size_t size) override {
    while (part_ < 2 && at_ == parts_[part_].size()) {
      ++part_;
      at_ = 0;
    }
    if (part_ == 2) return 0;
    const size_t n = parts_[part_].copy(out, size, at_);
    at_ += n;
    return static_cast<ssize_t>(n);
  }
  // Also to a client that has ended its side of the connection: what takes its time asks is_writable.
  ssize_t write(const char* text, size_t size) override {
    return Waits(socket_, POLLOUT, Clock::now() + kWrite) ? Send(socket_, {text, size}) : -1;
  }
  void get_remote_ip_and_port(std::string& ip, int& port) const override {
    sockaddr_storage address;
    socklen_t n = sizeof address;
    auto* const at = reinterpret_cast<sockaddr*>(&address);
    char host[NI_MAXHOST], service[NI_MAXSERV];
    if (::getpeername(socket_, at, &n) != 0) return;
    if (::getnameinfo(at, n, host, sizeof host, service, sizeof service, NI_NUMERICHOST | NI_NUMERICSERV) != 0) return;
    ip = host;
    port = std::atoi(service);
  }
  void get_local_ip_and_port(std::string&, int&) const override {}
  // The library asks for it to refuse what select() cannot wait for; nothing here does.
  socket_t socket() const override { return INVALID_SOCKET; }

 private:
  const int socket_;
  const std::string parts_[2];
  size_t part_ = 0, at_ = 0;
};

// The library refuses a method that it does not know before any handler sees it; no path here has this one either.
std::string_view KnownMethod(std::string_view method) {
  constexpr std::string_view kKnown[] = {"GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "PATCH"};
  return std::ranges::find(kKnown, method) == std::end(kKnown) ? "TRACE" : method;
}

std::string AnswerText(const ApiError& error, bool with_body) {
  const std::string body = DumpJson(error.Body());
  std::string more;
  for (const auto& [name, value] : error.Headers()) more += fmt::format("{}: {}\r\n", name, value);
  return fmt::format("HTTP/1.1 {} Refused\r\n{}Content-Type: application/json\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{}",
                     error.status, more, body.size(), with_body ? body : "");
}

}  // namespace

CheckedServer::CheckedServer(const Options& options, Admit admit) : options_(options), admit_(std::move(admit)) {
  set_payload_max_length(options.max_body);
  set_write_timeout(kWrite.count());
  set_keep_alive_timeout(kSilence.count());
  new_task_queue = [n = options.connections] { return new Connections(n); };
}

size_t CheckedServer::KeyOf(const httplib::Request& request) { return std::stoul(request.get_header_value(kKey)); }

bool CheckedServer::ClientHasGone(const httplib::Request& request) {
  return HasGone(std::stoi(request.get_header_value(kSocket)));
}

bool CheckedServer::process_and_close_socket(socket_t socket) {
  RequestBytes bytes(socket, options_.read_time, [this] { return stopping(); });
  HttpReader reader(options_.max_body, [&] { return bytes.More(); });
  bytes.Begin(accepted, false);
  bool with_body = true;
  try {
    for (size_t n = 1; n <= keep_alive_max_count_; ++n) {
      const std::optional<RequestHead> head = reader.Head();
      if (!head) break;
      with_body = head->method != "HEAD";
      if (!ServeOne(reader, *head, socket, n == keep_alive_max_count_)) break;
      with_body = true;
      bytes.Begin(Clock::now(), reader.HasMore());
    }
  } catch (const ApiError& error) {
    if (SendAll(socket, AnswerText(error, with_body))) Drain(socket);
  } catch (const std::bad_alloc&) {
    const ApiError error{503, "server_error", "memory for the request cannot be had"};
    if (SendAll(socket, AnswerText(error, with_body))) Drain(socket);
  }
  ::shutdown(socket, SHUT_RDWR);
  ::close(socket);
  return true;
}

// Whether the connection is kept.
bool CheckedServer::ServeOne(HttpReader& reader, const RequestHead& head, socket_t socket, bool last) {
  const size_t key = admit_(head);
  const bool close = last || head.close;
  const bool too_long = !head.chunked && head.length > options_.max_body;  // told at once, in place of the word
  if (head.expects_continue && !too_long && !SendAll(socket, "HTTP/1.1 100 Continue\r\n\r\n")) return false;
  std::string body = reader.Body(head);
  std::string text =
      fmt::format("{} {} HTTP/1.{}\r\nContent-Length: {}\r\n{}\r\n", KnownMethod(head.method), head.path(),
                  head.old ? 0 : 1, body.size(), close ? "Connection: close\r\n" : "");
  Admitted stream(socket, std::move(text), std::move(body));
  bool closed = false;
  const bool sent = process_request(stream, close, closed, [&](httplib::Request& request) {
    request.set_header(kSocket, std::to_string(socket));
    request.set_header(kKey, std::to_string(key));
  });
  return sent && !closed && !close;
}

// A socket that is closed with bytes unread takes the answer back from the client.
void CheckedServer::Drain(socket_t socket) const {
  ::shutdown(socket, SHUT_WR);
  const auto end = Clock::now() + kDrain;
  std::array<char, size_t{64} << 10> rest;
  while (Clock::now() < end && Waits(socket, POLLIN, end, [this] { return stopping(); }))
    if (Receive(socket, rest) <= 0) break;
}

}  // namespace lesskv
