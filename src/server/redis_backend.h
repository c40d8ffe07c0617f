// A session store's values in Redis, so that replicas continue each other's conversations.
//
// Keys, under a prefix with the version of the session format (another version's are never seen):
//   lesskv:2:HASH-HASH-N   a session's bytes; removed by Redis when not used for RedisOptions::unused
//   lesskv:2:lengths       sorted set of the numbers N, with the time in seconds when one was last saved or used
// A look-up reads the numbers and asks for the name that the prompt's first N tokens make, for each N that fits, so it
// sees what every other replica has saved. How much memory all values take, and which leave when it is full, are
// Redis's own maxmemory and maxmemory-policy.
#pragma once

#include <chrono>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>
#include <vector>

#include "server/store_backend.h"

struct redisContext;
struct redisReply;

namespace lesskv {

struct RedisAddress {
  std::string host;
  int port = 6379, database = 0;

  std::string ToString() const;  // "redis://host:port/database"
};

bool IsAddress(std::string_view text);  // of a server, of Redis or not; else it is a directory
// "redis://HOST[:PORT][/DATABASE]", an IPv6 address in brackets. Throws Error(kInvalidArgument), also for what may not
// be in it (a password) or is not there (TLS).
RedisAddress ParseRedisAddress(const std::string& text);

struct RedisOptions {
  RedisAddress address;
  std::string password = {};  // empty: none
  std::chrono::seconds unused{7 * 24 * 3600};
  std::chrono::milliseconds connect_time{500}, answer_time{2000};  // that we wait for a sign of it
  std::chrono::milliseconds whole_time{30000};                     // for all of what was asked, however it comes
  std::chrono::milliseconds retry_time{5000};                      // after a failure nobody tries for so long
  std::function<void(const std::string&)> log = {};                // a line when it goes, and one when it is back
};

class RedisBackend final : public StoreBackend {
 public:
  explicit RedisBackend(RedisOptions options);  // connects when it is first used
  ~RedisBackend() override;

  bool remote() const override { return true; }
  size_t MaxBytes() const override { return size_t{256} << 20; }  // a string of Redis has 512 MiB at most
  std::vector<size_t> Lengths() override;
  std::vector<bool> Has(std::span<const SessionName> names) override;
  bool Read(const SessionName& name, const Use& use) override;
  bool Touch(const SessionName& name) override;
  void Write(const SessionName& name, std::span<const std::byte> bytes) override;
  std::optional<StoreUsage> Usage() const override { return std::nullopt; }
  std::string Where(const SessionName& name) const override;

 private:
  struct FreeContext {
    void operator()(redisContext* context) const;
  };
  struct FreeReply {
    void operator()(redisReply* reply) const;
  };
  using Connection = std::unique_ptr<redisContext, FreeContext>;
  using Reply = std::unique_ptr<redisReply, FreeReply>;
  using Replies = std::vector<Reply>;
  using Command = std::vector<std::string_view>;
  using Commands = std::vector<Command>;

  std::string Key(const SessionName& name) const;
  Commands Remember(const std::string& n_tokens, const std::string& now) const;
  Replies Ask(const Commands& commands);
  Connection TakeIdle();
  Connection Connect();
  std::optional<Replies> Exchange(redisContext& connection, const Commands& commands) const;
  void RequireReachable() const;
  void SetUp(Connection connection);
  [[noreturn]] void SetDown(const std::string& why);
  void Log(const std::string& line) const;

  const RedisOptions options_;
  const std::string unused_seconds_;
  mutable std::mutex mutex_;  // of what follows
  std::vector<Connection> idle_;
  bool down_ = false;
  std::chrono::steady_clock::time_point next_try_;
};

}  // namespace lesskv
