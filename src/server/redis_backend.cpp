#include "server/redis_backend.h"

#include <fmt/format.h>
#include <hiredis/hiredis.h>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <csignal>
#include <cstring>
#include <utility>

#include "engine/session.h"

namespace lesskv {
namespace {

constexpr std::string_view kScheme = "redis://";
const std::string kPrefix = fmt::format("lesskv:{}:", kSessionVersion);
const std::string kLengths = kPrefix + "lengths";

timeval ToTimeval(std::chrono::milliseconds time) { return {time.count() / 1000, time.count() % 1000 * 1000}; }

template <typename Number>
bool ParseNumber(std::string_view text, Number& number) {
  const auto [stop, error] = std::from_chars(text.data(), text.data() + text.size(), number);
  return error == std::errc() && stop == text.data() + text.size();
}

int64_t UnixSeconds() {
  return std::chrono::duration_cast<std::chrono::seconds>(std::chrono::system_clock::now().time_since_epoch()).count();
}

bool IsError(const redisReply& reply) { return reply.type == REDIS_REPLY_ERROR; }

// An error of one value, such as no room for it. Any other says that Redis cannot be used.
bool IsAboutValue(const redisReply& error) {
  const std::string_view text(error.str, error.len);
  return text.starts_with("OOM ") || text.starts_with("WRONGTYPE ");
}

// Why a connection failed, from what hiredis and the last system call left.
std::string Reason(const redisContext& connection, int error) {
  const bool late = error == EAGAIN || error == EWOULDBLOCK;
  const bool io = connection.err == REDIS_ERR_IO || connection.err == 0;
  return late && io ? "it does not answer in time" : connection.errstr;
}

}  // namespace

std::string RedisAddress::ToString() const {
  const bool v6 = host.find(':') != std::string::npos;
  return fmt::format("{}{}{}{}:{}/{}", kScheme, v6 ? "[" : "", host, v6 ? "]" : "", port, database);
}

bool IsAddress(std::string_view text) { return text.find("://") != std::string_view::npos; }

RedisAddress ParseRedisAddress(const std::string& text) {
  if (text.starts_with("rediss://"))
    Fail(ErrorCode::kInvalidArgument, "a session store in Redis is reached without TLS, as redis://HOST:PORT");
  if (text.find('@') != std::string::npos)
    Fail(ErrorCode::kInvalidArgument,
         "the address of a session store in Redis has no place for a password, which others could see there: "
         "LESSKV_REDIS_PASSWORD has it");
  const std::string rest = text.starts_with(kScheme) ? text.substr(kScheme.size()) : "";
  const size_t slash = std::min(rest.find('/'), rest.size()), bracket = rest.starts_with('[') ? rest.find(']') : 0;
  const size_t colon = bracket == std::string::npos ? slash : std::min(rest.find(':', bracket), slash);
  RedisAddress address;
  address.host = bracket == 0 ? rest.substr(0, colon) : rest.substr(1, std::min(bracket, colon) - 1);
  const bool right = !address.host.empty() && (bracket == 0 || bracket + 1 == colon) &&
                     (colon == slash || ParseNumber(rest.substr(colon + 1, slash - colon - 1), address.port)) &&
                     (slash + 1 >= rest.size() || ParseNumber(rest.substr(slash + 1), address.database)) &&
                     address.port > 0 && address.port < 65536 && address.database >= 0;
  if (!right)
    Fail(ErrorCode::kInvalidArgument, "a session store in Redis is redis://HOST[:PORT][/DATABASE], found \"{}\"", text);
  return address;
}

void RedisBackend::FreeContext::operator()(redisContext* context) const { redisFree(context); }
void RedisBackend::FreeReply::operator()(redisReply* reply) const { freeReplyObject(reply); }

RedisBackend::RedisBackend(RedisOptions options)
    : options_(std::move(options)), unused_seconds_(std::to_string(options_.unused.count())) {
  std::signal(SIGPIPE, SIG_IGN);  // hiredis writes with write(); the HTTP library does the same
}

RedisBackend::~RedisBackend() = default;

std::string RedisBackend::Key(const SessionName& name) const { return kPrefix + name.ToString(); }
std::string RedisBackend::Where(const SessionName& name) const {
  return fmt::format("{} {}", options_.address.ToString(), Key(name));
}

std::vector<size_t> RedisBackend::Lengths() {
  const std::string oldest = std::to_string(UnixSeconds() - options_.unused.count());
  const Replies replies = Ask({{"ZRANGEBYSCORE", kLengths, oldest, "+inf"}});
  std::vector<size_t> lengths;
  for (size_t i = 0; i < replies[0]->elements; ++i) {
    const redisReply& element = *replies[0]->element[i];
    size_t n = 0;
    if (element.type == REDIS_REPLY_STRING && ParseNumber({element.str, element.len}, n)) lengths.push_back(n);
  }
  std::ranges::sort(lengths);
  return lengths;
}

std::vector<bool> RedisBackend::Has(std::span<const SessionName> names) {
  std::vector<std::string> keys;
  for (const SessionName& name : names) keys.push_back(Key(name));
  Commands commands;
  for (const std::string& key : keys) commands.push_back({"EXISTS", key});
  std::vector<bool> there;
  for (const Reply& reply : Ask(commands)) there.push_back(reply->integer == 1);
  return there;
}

// That a value of so many tokens is in use.
RedisBackend::Commands RedisBackend::Remember(const std::string& n_tokens, const std::string& now) const {
  return {{"ZADD", kLengths, now, n_tokens}, {"EXPIRE", kLengths, unused_seconds_}};
}

bool RedisBackend::Read(const SessionName& name, const Use& use) {
  const std::string key = Key(name), n = std::to_string(name.n_tokens), now = std::to_string(UnixSeconds());
  Commands commands = Remember(n, now);
  commands.insert(commands.begin(), {"GETEX", key, "EX", unused_seconds_});
  const Replies replies = Ask(commands);
  const redisReply& value = *replies[0];
  if (value.type == REDIS_REPLY_NIL) return false;
  if (value.type != REDIS_REPLY_STRING) Fail(ErrorCode::kBadFile, "{}: there is no string", Where(name));
  use(std::as_bytes(std::span(value.str, value.len)));
  return true;
}

bool RedisBackend::Touch(const SessionName& name) {
  const std::string key = Key(name), n = std::to_string(name.n_tokens), now = std::to_string(UnixSeconds());
  Commands commands = Remember(n, now);
  commands.insert(commands.begin(), {"EXPIRE", key, unused_seconds_});
  return Ask(commands)[0]->integer == 1;
}

void RedisBackend::Write(const SessionName& name, std::span<const std::byte> bytes) {
  const std::string key = Key(name), n = std::to_string(name.n_tokens), now = std::to_string(UnixSeconds());
  const std::string oldest = std::to_string(UnixSeconds() - options_.unused.count() - 1);
  Commands commands = Remember(n, now);
  const std::string_view value(reinterpret_cast<const char*>(bytes.data()), bytes.size());
  commands.insert(commands.begin(), {"SET", key, value, "EX", unused_seconds_});
  commands.push_back({"ZREMRANGEBYSCORE", kLengths, "-inf", oldest});
  for (const Reply& reply : Ask(commands))
    if (IsError(*reply)) Fail(ErrorCode::kIo, "{}: {}", Where(name), std::string(reply->str, reply->len));
}

// The replies to all commands, which go out at once. Errors among them are about a value.
RedisBackend::Replies RedisBackend::Ask(const Commands& commands) {
  RequireReachable();
  Connection connection = TakeIdle();
  std::optional<Replies> replies;
  if (connection != nullptr) {
    replies = Exchange(*connection, commands);
    if (!replies && errno == EAGAIN) SetDown(Reason(*connection, errno));
  }
  if (!replies) {  // Redis may have closed an idle connection; a new one tells whether it is there
    connection = Connect();
    replies = Exchange(*connection, commands);
    if (!replies) SetDown(Reason(*connection, errno));
  }
  for (const Reply& reply : *replies)
    if (IsError(*reply) && !IsAboutValue(*reply)) SetDown(reply->str);
  SetUp(std::move(connection));
  return std::move(*replies);
}

RedisBackend::Connection RedisBackend::Connect() {
  const RedisAddress& address = options_.address;
  Connection connection(redisConnectWithTimeout(address.host.c_str(), address.port, ToTimeval(options_.connect_time)));
  if (connection == nullptr) SetDown("memory for a connection cannot be had");
  if (connection->err != 0) SetDown(connection->errstr);
  redisSetTimeout(connection.get(), ToTimeval(options_.answer_time));
  const std::string database = std::to_string(address.database);
  Commands greeting;
  if (!options_.password.empty()) greeting.push_back({"AUTH", options_.password});
  greeting.push_back({"SELECT", database});
  const std::optional<Replies> replies = Exchange(*connection, greeting);
  if (!replies) SetDown(Reason(*connection, errno));
  for (const Reply& reply : *replies)
    if (IsError(*reply)) SetDown(reply->str);
  return connection;
}

// Nothing, where the connection failed: errno is that of the last system call, or says that it takes too long.
std::optional<RedisBackend::Replies> RedisBackend::Exchange(redisContext& connection, const Commands& commands) const {
  const auto end = std::chrono::steady_clock::now() + options_.whole_time;
  const auto late = [&] {
    if (std::chrono::steady_clock::now() < end) return false;
    errno = EAGAIN;
    return true;
  };
  errno = 0;
  for (const Command& command : commands) {
    std::vector<const char*> words;
    std::vector<size_t> lengths;
    for (const std::string_view word : command) {
      words.push_back(word.data());
      lengths.push_back(word.size());
    }
    if (redisAppendCommandArgv(&connection, static_cast<int>(words.size()), words.data(), lengths.data()) != REDIS_OK)
      return std::nullopt;
  }
  for (int written = 0; written == 0;)
    if (redisBufferWrite(&connection, &written) != REDIS_OK || (written == 0 && late())) return std::nullopt;
  Replies replies;
  while (replies.size() < commands.size()) {
    void* reply = nullptr;
    if (redisGetReplyFromReader(&connection, &reply) != REDIS_OK) return std::nullopt;
    if (reply != nullptr)
      replies.emplace_back(static_cast<redisReply*>(reply));
    else if (late() || redisBufferRead(&connection) != REDIS_OK)
      return std::nullopt;
  }
  return replies;
}

RedisBackend::Connection RedisBackend::TakeIdle() {
  const std::lock_guard lock(mutex_);
  if (idle_.empty()) return nullptr;
  Connection connection = std::move(idle_.back());
  idle_.pop_back();
  return connection;
}

// While it is down, the next try is somebody's later on: nobody waits for it again and again.
void RedisBackend::RequireReachable() const {
  const std::lock_guard lock(mutex_);
  if (down_ && std::chrono::steady_clock::now() < next_try_) throw StoreGone("the session store cannot be used");
}

void RedisBackend::SetUp(Connection connection) {
  bool was_down;
  {
    const std::lock_guard lock(mutex_);
    was_down = std::exchange(down_, false);
    idle_.push_back(std::move(connection));
  }
  if (was_down) Log(fmt::format("the session store {} is used again", options_.address.ToString()));
}

void RedisBackend::SetDown(const std::string& why) {
  bool was_down;
  {
    const std::lock_guard lock(mutex_);
    was_down = std::exchange(down_, true);
    next_try_ = std::chrono::steady_clock::now() + options_.retry_time;
    idle_.clear();
  }
  const std::string line = fmt::format("the session store {} cannot be used: {}", options_.address.ToString(), why);
  if (!was_down) Log(line + "; conversations are read anew");
  throw StoreGone(line);
}

void RedisBackend::Log(const std::string& line) const {
  if (options_.log) options_.log(line);
}

}  // namespace lesskv
