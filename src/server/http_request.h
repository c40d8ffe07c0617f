// HTTP requests as they come from anybody: read strictly and within limits, whole, before the library sees them. The
// library (0.11) has no limit for a line, a head or a chunked body, decodes what should stay as it is, unpacks without
// bound, and gives each read a time of its own. No sockets here.
#pragma once

#include <cstddef>
#include <functional>
#include <optional>
#include <string>
#include <string_view>

#include "server/api.h"

namespace lesskv {

constexpr size_t kMaxRequestLine = size_t{8} << 10;
constexpr size_t kMaxHead = size_t{64} << 10;  // the request line and all headers

// What of a head the server goes by; all else in it is dropped.
struct RequestHead {
  std::string method, target;
  std::string host, origin, authorization;
  bool old = false;               // HTTP/1.0, which knows no chunks
  bool close = false;             // the connection is not to be kept
  bool expects_continue = false;  // the client waits for a word before it sends the body
  bool chunked = false;
  size_t length = 0;  // of the body that is not chunked

  // The target without its query.
  std::string_view path() const { return std::string_view(target).substr(0, target.find_first_of("?#")); }
};

// One request after the other from a client's bytes. What is wrong is thrown as ApiError; then nothing more can be read.
class HttpReader {
 public:
  // Gives more bytes, which stay until the next call; none: there will be no more. May throw ApiError.
  using More = std::function<std::string_view()>;
  HttpReader(size_t max_body, More more) : max_body_(max_body), more_(std::move(more)) {}

  // Nothing: the client has sent its last request.
  std::optional<RequestHead> Head();
  // Of the request whose head was just read.
  std::string Body(const RequestHead& head);
  // Whether bytes of a further request have come already.
  bool HasMore() const { return at_ < buffer_.size(); }

 private:
  std::string ChunkedBody();
  bool Fill();
  void Need(size_t n);  // bytes in the buffer
  std::string_view Line();
  std::string_view Rest() const { return std::string_view(buffer_).substr(at_); }

  const size_t max_body_;
  const More more_;
  std::string buffer_;
  size_t at_ = 0;  // what is before it has been used
};

}  // namespace lesskv
