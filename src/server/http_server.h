// The HTTP side of `lesskv serve`: routes, keys, limits, streams. cpp-httplib does the protocol and stays behind this
// header.
#pragma once

#include <cstddef>
#include <memory>
#include <string>

#include "server/api.h"
#include "server/scheduler.h"

namespace lesskv {

struct HttpOptions {
  std::string host = "127.0.0.1";
  int port = 8080;           // 0: any that is free
  std::string api_key = {};  // empty: none is asked for, which only a loopback address may do
  size_t max_body = size_t{4} << 20;
};

class HttpServer {
 public:
  // Both must outlive it. Throws Error kInvalidArgument when the host is not loopback and there is no key.
  HttpServer(const ApiContext& context, Scheduler& scheduler, const HttpOptions& options);
  ~HttpServer();
  HttpServer(const HttpServer&) = delete;
  HttpServer& operator=(const HttpServer&) = delete;

  // Takes the address and returns the port. Throws Error kIo when it cannot be had.
  int Bind();
  // Answers until Stop, which any thread may call; then waits for the connections in work.
  void Listen();
  void Stop();

 private:
  class Impl;
  std::unique_ptr<Impl> impl_;
};

// Whether the two are the same, in a time that does not tell where they differ.
bool SameSecret(std::string_view a, std::string_view b);
bool IsLoopback(const std::string& host);

}  // namespace lesskv
