// The library's server behind a door of our own: a request is read whole, within its limits and one time for all of it,
// and admitted or refused; then the library gets what it needs of it, in a form that leaves nothing to interpret.
#pragma once

#include <httplib.h>

#include <chrono>
#include <functional>

#include "server/api.h"
#include "server/http_request.h"

namespace lesskv {

class CheckedServer final : public httplib::Server {
 public:
  // The number of the key that asks; throws ApiError where it may not. Any thread calls it.
  using Admit = std::function<size_t(const RequestHead&)>;
  struct Options {
    size_t max_body;
    std::chrono::seconds read_time;
    size_t connections;  // a thread each
  };
  CheckedServer(const Options& options, Admit admit);

  // Of a request in work.
  static size_t KeyOf(const httplib::Request& request);
  static bool ClientHasGone(const httplib::Request& request);

 private:
  bool process_and_close_socket(socket_t socket) override;
  bool ServeOne(HttpReader& reader, const RequestHead& head, socket_t socket, bool last);
  void Drain(socket_t socket) const;
  bool stopping() const { return svr_sock_ == INVALID_SOCKET; }

  const Options options_;
  const Admit admit_;
};

}  // namespace lesskv
