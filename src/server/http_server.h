// The HTTP side of `lesskv serve`: routes, keys, limits, streams. cpp-httplib does the protocol and stays behind this
// header.
#pragma once

#include <chrono>
#include <cstddef>
#include <memory>
#include <string>
#include <vector>

#include "server/access.h"
#include "server/api.h"
#include "server/scheduler.h"

namespace lesskv {

struct HttpOptions {
  std::string host = "127.0.0.1";
  int port = 8080;                         // 0: any that is free
  std::vector<std::string> api_keys = {};  // none: none is asked for, which only a loopback address may do
  size_t max_per_key = 0;                  // texts of a key in work at once; 0: as many as there are places
  size_t max_body = size_t{4} << 20;
  std::chrono::seconds max_read{30};  // for all of a request to come
  size_t max_connections = 0;  // a thread each; others wait. 0: as many as texts run and wait, and 16
};

class HttpServer {
 public:
  // All must outlive it; `store`, which only is asked for numbers, may be null. Throws Error kInvalidArgument when the
  // host is not loopback and there is no key.
  HttpServer(const ApiContext& context, Scheduler& scheduler, const HttpOptions& options,
             const SessionStore* store = nullptr);
  ~HttpServer();
  HttpServer(const HttpServer&) = delete;
  HttpServer& operator=(const HttpServer&) = delete;

  // Takes the address and returns the port. Throws Error kIo when it cannot be had.
  int Bind();
  // Answers until Stop, which any thread may call; then waits for the connections in work. False: it was not Stop that
  // ended it, but the system, which gives no more connections.
  bool Listen();
  void Stop();

  // What is answered, as "GET /health".
  const std::vector<std::string>& Routes() const;

 private:
  class Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace lesskv
