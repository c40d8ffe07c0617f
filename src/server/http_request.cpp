#include "server/http_request.h"

#include <fmt/format.h>

#include <algorithm>
#include <charconv>
#include <utility>

namespace lesskv {
namespace {

constexpr std::string_view kEnd = "\r\n";
constexpr size_t kMaxChunkLine = 256;  // a size and what may follow it

[[noreturn]] void Refuse(int status, std::string message) {
  throw ApiError{status, "invalid_request_error", std::move(message)};
}

[[noreturn]] void RefuseLength(size_t most) { Refuse(413, fmt::format("the body is longer than {} bytes", most)); }

bool IsTokenChar(char c) {
  return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') ||
         (c != '\0' && std::string_view("!#$%&'*+-.^_`|~").find(c) != std::string_view::npos);
}

bool IsToken(std::string_view text) { return !text.empty() && std::ranges::all_of(text, IsTokenChar); }

bool IsControl(char c) { return (static_cast<unsigned char>(c) < 0x20 && c != '\t') || c == 0x7f; }

std::string Lower(std::string_view text) {
  std::string lower(text);
  for (char& c : lower)
    if (c >= 'A' && c <= 'Z') c = static_cast<char>(c - 'A' + 'a');
  return lower;
}

std::string_view Trimmed(std::string_view text) {
  const size_t begin = std::min(text.find_first_not_of(" \t"), text.size());
  return text.substr(begin, text.find_last_not_of(" \t") + 1 - begin);
}

// Digits of that base and nothing else: no sign, no space.
std::optional<size_t> Number(std::string_view text, int base) {
  size_t value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value, base);
  if (text.empty() || error != std::errc() || end != text.data() + text.size()) return std::nullopt;
  return value;
}

// "close, te" has close.
bool Lists(std::string_view list, std::string_view word) {
  for (size_t begin = 0; begin <= list.size();) {
    const size_t end = std::min(list.find(',', begin), list.size());
    if (Lower(Trimmed(list.substr(begin, end - begin))) == word) return true;
    begin = end + 1;
  }
  return false;
}

class HeadParser {
 public:
  // `text`: with the empty line that ends it.
  RequestHead Parse(std::string_view text) {
    bool first = true;
    for (; !text.starts_with(kEnd); first = false) {
      const size_t end = text.find(kEnd);
      const std::string_view line = text.substr(0, end);
      if (std::ranges::any_of(line, IsControl)) Refuse(400, "the request's head has control characters in it");
      first ? RequestLine(line) : Header(line);
      text.remove_prefix(end + kEnd.size());
    }
    Check();
    return std::move(head_);
  }

 private:
  void RequestLine(std::string_view line) {
    const size_t a = line.find(' '), b = line.rfind(' ');
    if (a == std::string_view::npos || b <= a + 1 || line.substr(a + 1, b - a - 1).find(' ') != std::string_view::npos)
      Refuse(400, "the request line is not METHOD TARGET VERSION");
    head_.method = line.substr(0, a);
    head_.target = line.substr(a + 1, b - a - 1);
    const std::string_view version = line.substr(b + 1);
    if (!IsToken(head_.method)) Refuse(400, "the request's method is no word");
    for (const char c : head_.target)
      if (static_cast<unsigned char>(c) <= 0x20 || static_cast<unsigned char>(c) >= 0x7f)
        Refuse(400, "the request's target has characters that must be written as %XX");
    if (version != "HTTP/1.1" && version != "HTTP/1.0") Refuse(505, "only HTTP/1.1 is spoken here");
    head_.old = version == "HTTP/1.0";
  }

  void Header(std::string_view line) {
    const size_t colon = line.find(':');
    if (colon == std::string_view::npos || !IsToken(line.substr(0, colon)))
      Refuse(400, "a header is not NAME: VALUE");
    const std::string name = Lower(line.substr(0, colon));
    const std::string_view value = Trimmed(line.substr(colon + 1));
    if (name == "connection") head_.close |= Lists(value, "close");
    for (auto& [known, held] : values_) {
      if (name != known) continue;
      if (held) Refuse(400, fmt::format("the header {} comes twice", known));
      held = value;
    }
  }

  void Check() {
    head_.close |= head_.old;
    if (!host_ && !head_.old) Refuse(400, "the header Host is missing");
    head_.host = host_.value_or("");
    head_.origin = origin_.value_or("");
    head_.authorization = authorization_.value_or("");
    if (encoding_ && Lower(*encoding_) != "identity") Refuse(415, "the body must not be compressed");
    if (expect_) {
      if (Lower(*expect_) != "100-continue") Refuse(417, "Expect is known as 100-continue only");
      head_.expects_continue = !head_.old;
    }
    // One that comes with both could be read otherwise by a proxy on the way.
    if (transfer_ && (length_ || head_.old))
      Refuse(400, "Transfer-Encoding goes with HTTP/1.1 and without Content-Length");
    if (transfer_ && Lower(*transfer_) != "chunked") Refuse(501, "Transfer-Encoding is known as chunked only");
    head_.chunked = transfer_.has_value();
    if (!length_) return;
    const std::optional<size_t> length = Number(*length_, 10);
    if (!length) Refuse(400, "Content-Length is not a number of bytes");
    head_.length = *length;
  }

  using Value = std::optional<std::string_view>;
  RequestHead head_;
  Value host_, origin_, authorization_, length_, transfer_, encoding_, expect_;
  const std::pair<std::string_view, Value&> values_[7] = {
      {"host", host_},           {"origin", origin_},   {"authorization", authorization_}, {"content-length", length_},
      {"transfer-encoding", transfer_}, {"content-encoding", encoding_}, {"expect", expect_}};
};

}  // namespace

std::optional<RequestHead> HttpReader::Head() {
  constexpr std::string_view kEmptyLine = "\r\n\r\n";
  for (size_t looked = 0;;) {
    while (Rest().starts_with(kEnd)) at_ += kEnd.size();  // some clients send one behind a body
    const std::string_view rest = Rest();
    const size_t line = rest.find(kEnd);
    if (std::min(line, rest.size()) > kMaxRequestLine)
      Refuse(414, fmt::format("the request line is longer than {} bytes", kMaxRequestLine));
    const size_t end = rest.find(kEmptyLine, looked);
    if (std::min(end, rest.size()) > kMaxHead - kEmptyLine.size())
      Refuse(431, fmt::format("the request's head is longer than {} bytes", kMaxHead));
    if (end != std::string_view::npos) {
      const std::string_view text = rest.substr(0, end + kEmptyLine.size());
      at_ += text.size();
      return HeadParser().Parse(text);
    }
    looked = rest.size() - std::min(rest.size(), kEmptyLine.size() - 1);
    if (Fill()) continue;
    if (!HasMore()) return std::nullopt;
    Refuse(400, "the request ends in its head");
  }
}

std::string HttpReader::Body(const RequestHead& head) {
  if (head.chunked) return ChunkedBody();
  if (head.length > max_body_) RefuseLength(max_body_);
  Need(head.length);
  at_ += head.length;
  return buffer_.substr(at_ - head.length, head.length);
}

std::string HttpReader::ChunkedBody() {
  std::string body;
  for (;;) {
    const std::string_view line = Line();
    const std::optional<size_t> size = Number(Trimmed(line.substr(0, line.find(';'))), 16);
    if (!size) Refuse(400, "a chunk of the body has no size");
    if (*size == 0) break;
    if (*size > max_body_ - body.size()) RefuseLength(max_body_);
    Need(*size + kEnd.size());
    body += Rest().substr(0, *size);
    at_ += *size;
    if (!Rest().starts_with(kEnd)) Refuse(400, "a chunk of the body is longer than its size");
    at_ += kEnd.size();
  }
  size_t trailers = 0;  // which say nothing to us
  for (std::string_view line = Line(); !line.empty(); line = Line())
    if ((trailers += line.size()) > kMaxRequestLine) Refuse(431, "there is too much behind the body");
  return body;
}

bool HttpReader::Fill() {
  buffer_.erase(0, at_);
  at_ = 0;
  const std::string_view more = more_();
  buffer_ += more;
  return !more.empty();
}

void HttpReader::Need(size_t n) {
  while (buffer_.size() - at_ < n)
    if (!Fill()) Refuse(400, "the request ends in its body");
}

std::string_view HttpReader::Line() {
  for (;;) {
    const std::string_view rest = Rest();
    const size_t end = rest.find(kEnd);
    if (std::min(end, rest.size()) > kMaxChunkLine) Refuse(400, "a line between the body's chunks is too long");
    if (end != std::string_view::npos) {
      at_ += end + kEnd.size();
      return rest.substr(0, end);
    }
    if (!Fill()) Refuse(400, "the request ends in its body");
  }
}

}  // namespace lesskv
