// The session store in Redis: what servers that share it see of each other, and what they do without it.
#include <ctime>

#include "engine/session.h"
#include "server/child_process.h"
#include "server/redis_backend.h"
#include "server/reuse_harness.h"

namespace lesskv::server_test {
namespace {

TEST(StoreNameTest, NamesAreReadAsTheyAreWritten) {
  const SessionName name{0xabc, 0xffffffffffffffff, 42};
  EXPECT_EQ(name.ToString(), "0000000000000abc-ffffffffffffffff-42");
  EXPECT_EQ(SessionName::Parse(name.ToString()), name);
  for (const char* const text : {"", "0000000000000abc-ffffffffffffffff-", "0000000000000abc-ffffffffffffffff-0",
                                 "0000000000000ABC-ffffffffffffffff-42", "0000000000000abc_ffffffffffffffff-42",
                                 "0000000000000abc-ffffffffffffffff-042", "0000000000000abc-ffffffffffffffff-42x"})
    EXPECT_FALSE(SessionName::Parse(text)) << text;
}

TEST(RedisAddressTest, AddressesAreReadOrRefused) {
  const auto read = [](const std::string& text) { return ParseRedisAddress(text).ToString(); };
  EXPECT_EQ(read("redis://cache.example:6400/3"), "redis://cache.example:6400/3");
  EXPECT_EQ(read("redis://10.0.0.1"), "redis://10.0.0.1:6379/0");
  EXPECT_EQ(read("redis://10.0.0.1:7/"), "redis://10.0.0.1:7/0");
  EXPECT_EQ(read("redis://[::1]:7/1"), "redis://[::1]:7/1");
  EXPECT_EQ(ParseRedisAddress("redis://[::1]").host, "::1");
  EXPECT_TRUE(IsAddress("rediss://x"));
  EXPECT_FALSE(IsAddress("redis/x"));
  const std::vector<std::pair<std::string, std::string>> refused = {{"redis://:secret@host", "LESSKV_REDIS_PASSWORD"},
                                                                    {"rediss://host", "without TLS"},
                                                                    {"redis://", "HOST"},
                                                                    {"redis://host:0", "HOST"},
                                                                    {"redis://host:70000", "HOST"},
                                                                    {"redis://host:", "HOST"},
                                                                    {"redis://host/x", "HOST"},
                                                                    {"redis://host:1/-1", "HOST"},
                                                                    {"redis://[::1", "HOST"},
                                                                    {"redis://[::1]x:1", "HOST"},
                                                                    {"redis://host:12ab/0", "HOST"},
                                                                    {"redis:///1", "HOST"},
                                                                    {"http://host", "HOST"}};
  for (const auto& [text, said] : refused) try {
      ADD_FAILURE() << text << " is " << read(text);
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ErrorCode::kInvalidArgument);
      EXPECT_NE(std::string(error.what()).find(said), std::string::npos) << error.what();
    }
}

const std::string kPrefix = fmt::format("lesskv:{}:", kSessionVersion), kLengths = kPrefix + "lengths";

class RedisTest : public ReuseTest {
 protected:
  void SetUp() override {
    ReuseTest::SetUp();
    if (!RedisServer::IsInstalled()) GTEST_SKIP() << "redis-server and redis-cli are not there to be run";
    StartRedis();
  }
  void StartRedis(const std::vector<std::string>& more = {}) {
    redis_ = std::make_unique<RedisServer>((folder_ / "redis").string(), more);
    ASSERT_TRUE(SomebodyListens(redis_->port())) << OutputOf("cat " + (folder_ / "redis/redis.log").string());
  }

  RedisOptions ToRedis() const {
    return {.address = {"127.0.0.1", redis_->port()}, .connect_time = 10s, .answer_time = 60s, .retry_time = 200ms};
  }
  Options InRedis(const std::string& spec = "full") const { return InRedis(ToRedis(), spec); }
  static Options InRedis(const RedisOptions& redis, const std::string& spec = "full") {
    Options options{.kv = {spec}};
    options.backend = [redis](const SessionStore::LogLine& log) {
      RedisOptions with_log = redis;
      with_log.log = log;
      return std::make_unique<RedisBackend>(with_log);
    };
    return options;
  }

  // Lets a server say the first turn and end. What the prompt of the next one is.
  std::vector<int32_t> SaidAndStopped(const Options& options, Streamed& alone) {
    Start(options);
    EXPECT_EQ(Text(Ask(Ids("the sea"))), alone.Say(Ids("the sea")));
    EXPECT_TRUE(Saved(1)) << Log();
    Stop();
    return Joined(alone.text(), Ids(" and then"));
  }
  std::string ValueKey() const {
    const std::string keys = redis_->Tell("--scan --pattern '" + kPrefix + "*-*-*'");
    return keys.substr(0, keys.find('\n'));
  }
  // Those with that text.
  size_t LogLines(const std::string& text = "\n") {
    const std::string log = Log();
    size_t n = 0;
    for (size_t at = log.find(text); at != std::string::npos; at = log.find(text, at + 1)) ++n;
    return n;
  }

  std::unique_ptr<RedisServer> redis_;
};

TEST_F(RedisTest, AConversationGoesOnInAnotherServer) {
  for (const std::string& spec : kSpecs) {
    Streamed alone(engine_, *tokenizer_, spec);
    const std::vector<int32_t> prompt = SaidAndStopped(InRedis(spec), alone);
    Start(InRedis(spec));
    const size_t seen = alone.seen();
    const Json next = Ask(prompt);
    EXPECT_EQ(Cached(next), seen) << spec;
    EXPECT_EQ(Text(next), alone.Say(Ids(" and then"))) << spec;
    EXPECT_EQ(store_->Metrics().restored, 1u);
    EXPECT_EQ(Get("/metrics").body.find("lesskv_store_bytes"), std::string::npos);
    Stop();
  }
  EXPECT_EQ(Log(), "");
}

// Both are there before anything was said.
TEST_F(RedisTest, StoresSeeWhatOthersSave) {
  SessionStore one(engine_, std::make_unique<RedisBackend>(ToRedis()));
  SessionStore other(engine_, std::make_unique<RedisBackend>(ToRedis()));
  const std::shared_ptr<const CacheConfig> config = engine_.MakeCacheConfig(CacheSpec::Parse("full"), kCtx);
  const std::vector<int32_t> prompt = Ids("the sea was calm and the tea was cold");
  const auto longest = [&](size_t longer_than) {
    const std::shared_ptr<StoreLookup> lookup = other.Find(prompt, config, longer_than);
    EXPECT_TRUE(Soon([&] { return lookup->done(); }));
    const std::optional<Sequence> found = lookup->Take();
    return found ? found->tokens().size() : 0;
  };
  EXPECT_EQ(longest(0), 0u);
  uint64_t saved = 0;
  for (const size_t n : {size_t{5}, size_t{9}, size_t{7}, prompt.size()}) {
    auto sequence = std::make_shared<Sequence>(config);
    engine_.Prefill({{sequence.get(), std::span(prompt).first(n)}});
    one.Save(sequence);
    ++saved;
    ASSERT_TRUE(Soon([&] { return one.Metrics().saved == saved; }));
    EXPECT_EQ(longest(0), saved == 1 ? 5u : 9u);
  }
  EXPECT_EQ(longest(8), 9u);
  EXPECT_EQ(longest(9), 0u);
  EXPECT_EQ(other.Find(prompt, config, prompt.size() - 1), nullptr);

  // Others' conversations may have very many lengths.
  const std::string now = std::to_string(std::time(nullptr));
  std::string many = "ZADD " + kLengths;
  for (int n = 20; n < 1500; ++n) many += fmt::format(" {} {}", now, n);
  redis_->Tell(many);
  std::vector<int32_t> text = prompt;
  text.resize(1600, 100);
  const std::shared_ptr<StoreLookup> lookup = other.Find(text, config, 0);
  ASSERT_TRUE(Soon([&] { return lookup->done(); }));
  EXPECT_EQ(lookup->Take()->tokens().size(), prompt.size());
}

TEST_F(RedisTest, NobodyTriesAgainAtOnce) {
  RedisOptions options = ToRedis();
  options.retry_time = 1h;
  RedisBackend backend(options);
  EXPECT_EQ(backend.Lengths(), std::vector<size_t>{});
  redis_->process().Kill(SIGKILL);
  EXPECT_THROW(backend.Lengths(), StoreGone);
  ASSERT_TRUE(redis_->Start());
  EXPECT_THROW(backend.Lengths(), StoreGone);
}

TEST_F(RedisTest, ADamagedValueIsPassedOver) {
  Streamed alone(engine_, *tokenizer_, "full");
  const std::vector<int32_t> prompt = SaidAndStopped(InRedis(), alone);
  const std::string key = ValueKey();
  ASSERT_NE(key, "");
  redis_->Tell("SETRANGE " + key + " 700 damage");
  Start(InRedis());
  const std::string text = alone.Say(Ids(" and then"));
  for (int i = 0; i < 2; ++i) {
    const Json next = Ask(prompt);
    EXPECT_EQ(Cached(next), 0u);
    EXPECT_EQ(Text(next), text);
  }
  EXPECT_EQ(store_->Metrics().damaged, 1u);
  EXPECT_EQ(LogLines(), 1u) << Log();
  EXPECT_NE(Log().find("damaged"), std::string::npos) << Log();
  EXPECT_NE(Log().find(key), std::string::npos) << Log();
}

TEST_F(RedisTest, WithoutRedisTextsAreReadAnew) {
  Streamed alone(engine_, *tokenizer_, "full");
  redis_->process().Kill(SIGKILL);
  Start(InRedis());
  for (int i = 0; i < 3; ++i, std::this_thread::sleep_for(250ms)) EXPECT_EQ(Cached(Ask(Ids("the tea"))), 0u);
  EXPECT_TRUE(Soon([&] { return store_->Metrics().unreachable == 4; }));  // and a text saved that is there once
  EXPECT_EQ(LogLines(), 1u) << Log();
  EXPECT_NE(Log().find("cannot be used: Connection refused"), std::string::npos) << Log();

  ASSERT_TRUE(redis_->Start());
  std::this_thread::sleep_for(300ms);  // until it is tried again
  Ask(Ids("the sea"));
  alone.Say(Ids("the sea"));
  ASSERT_TRUE(Saved(1)) << Log();
  EXPECT_EQ(LogLines(), 2u) << Log();
  EXPECT_NE(Log().find("is used again"), std::string::npos) << Log();

  // Idle connections that Redis has closed are no reason to do without it.
  redis_->Tell("CLIENT KILL TYPE normal");
  Ask(Ids("the land"));
  EXPECT_TRUE(Saved(2)) << Log();
  EXPECT_EQ(LogLines(), 2u) << Log();
}

TEST_F(RedisTest, ASlowRedisHoldsNobodyUp) {
  RedisOptions redis = ToRedis();
  redis.answer_time = 300ms;
  Options options = InRedis(redis);
  options.scheduler.store_patience = 1h;  // nothing else ends the waiting
  Start(options);
  int asked = 0;
  const auto one_is_saved = [&] {  // on a busy machine Redis may be too slow for the first ones
    const uint64_t before = store_->Metrics().saved;
    return Soon([&] {
      Ask(Ids(fmt::format("the sea {}", ++asked)));
      return store_->Metrics().saved > before;
    });
  };
  ASSERT_TRUE(one_is_saved()) << Log();
  redis_->process().Signal(SIGSTOP);
  for (const char* const prompt : {"aaaa", "bbbb", "cccc"}) EXPECT_EQ(Cached(Ask(Ids(prompt))), 0u);
  EXPECT_EQ(LogLines("cannot be used: it does not answer in time"), LogLines("is used again") + 1) << Log();
  redis_->process().Signal(SIGCONT);
  EXPECT_TRUE(one_is_saved()) << Log();
}

// It says something again and again, but never all: not for ever.
TEST(RedisBackendTest, AnAnswerThatComesInDropsIsNotWaitedFor) {
  const int listener = ::socket(AF_INET, SOCK_STREAM, 0);
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  socklen_t size = sizeof address;
  ASSERT_EQ(::bind(listener, reinterpret_cast<sockaddr*>(&address), size), 0);
  ASSERT_EQ(::listen(listener, 1), 0);
  ::getsockname(listener, reinterpret_cast<sockaddr*>(&address), &size);
  std::thread redis([&] {
    const int connection = ::accept(listener, nullptr, nullptr);
    ::send(connection, "+OK\r\n*1\r\n$1000\r\n", 16, MSG_NOSIGNAL);
    while (::send(connection, "x", 1, MSG_NOSIGNAL) == 1) std::this_thread::sleep_for(50ms);
    ::close(connection);
  });
  std::string log;
  {
    RedisBackend backend({.address = {"127.0.0.1", ntohs(address.sin_port)},
                          .answer_time = 60s,
                          .whole_time = 500ms,
                          .log = [&](const std::string& line) { log += line; }});
    EXPECT_THROW(backend.Lengths(), StoreGone);
  }
  EXPECT_NE(log.find("does not answer in time"), std::string::npos) << log;
  redis.join();
  ::close(listener);
}

TEST_F(RedisTest, APasswordAndADatabaseAreUsed) {
  StartRedis({"--requirepass", "secret"});
  RedisOptions options = ToRedis();
  options.address.database = 3;
  for (const char* const wrong : {"", "wrong"}) {
    options.password = wrong;
    Start(InRedis(options));
    Ask(Ids("the sea"));
    EXPECT_TRUE(Soon([&] { return store_->Metrics().unreachable >= 2; }));
    Stop();
  }
  EXPECT_NE(Log().find("NOAUTH"), std::string::npos) << Log();
  EXPECT_NE(Log().find("WRONGPASS"), std::string::npos) << Log();
  options.password = "secret";
  Start(InRedis(options));
  Ask(Ids("the sea"));
  EXPECT_TRUE(Saved(1)) << Log();
  EXPECT_EQ(redis_->Tell("--no-auth-warning -a secret -n 3 DBSIZE"), "2\n");
  EXPECT_EQ(redis_->Tell("--no-auth-warning -a secret -n 0 DBSIZE"), "0\n");
}

TEST_F(RedisTest, WhatIsNotUsedLeaves) {
  RedisOptions options = ToRedis();
  options.unused = 100000s;
  RedisBackend backend(options);
  const std::vector<std::byte> bytes(1000, std::byte{7});
  const SessionName name{1, 2, 42}, other{1, 3, 77};
  backend.Write(name, bytes);
  const std::string key = kPrefix + name.ToString();
  const auto time_left = [&](const std::string& of) { return std::stoi(redis_->Tell("TTL " + of)); };
  EXPECT_GT(time_left(key), 90000);
  EXPECT_GT(time_left(kLengths), 90000);
  for (const bool read : {true, false}) {
    redis_->Tell("EXPIRE " + key + " 10000");
    redis_->Tell("EXPIRE " + kLengths + " 10000");
    redis_->Tell("ZADD " + kLengths + " 5 42");
    EXPECT_EQ(backend.Lengths(), std::vector<size_t>{});
    size_t seen = 0;
    EXPECT_TRUE(read ? backend.Read(name, [&](auto value) { seen = value.size(); }) : backend.Touch(name));
    EXPECT_EQ(seen, read ? bytes.size() : 0);
    EXPECT_GT(time_left(key), 90000) << read;
    EXPECT_GT(time_left(kLengths), 90000) << read;
    EXPECT_EQ(backend.Lengths(), std::vector<size_t>{42});
  }
  redis_->Tell("ZADD " + kLengths + " 5 41");
  backend.Write(other, bytes);
  EXPECT_EQ(redis_->Tell("ZRANGE " + kLengths + " 0 -1"), "42\n77\n");
  EXPECT_EQ(backend.Has(std::vector<SessionName>{name, {9, 9, 9}, other}), (std::vector<bool>{true, false, true}));
  redis_->Tell("DEL " + key);
  EXPECT_EQ(backend.Has(std::vector<SessionName>{name}), std::vector<bool>{false});
  EXPECT_FALSE(backend.Read(name, [](auto) { FAIL(); }));
  EXPECT_FALSE(backend.Touch(name));
}

TEST_F(RedisTest, AFullRedisIsStillRead) {
  Streamed alone(engine_, *tokenizer_, "full");
  const std::vector<int32_t> prompt = SaidAndStopped(InRedis(), alone);
  redis_->Tell("CONFIG SET maxmemory-policy noeviction");
  redis_->Tell("CONFIG SET maxmemory 1");
  Start(InRedis());
  EXPECT_EQ(Cached(Ask(prompt)), alone.seen());
  EXPECT_TRUE(Soon([&] { return store_->Metrics().skipped == 1; }));
  EXPECT_EQ(LogLines(), 1u) << Log();
  EXPECT_NE(Log().find("could not be saved"), std::string::npos) << Log();
  EXPECT_NE(Log().find("OOM"), std::string::npos) << Log();
}

TEST_F(RedisTest, AKeyOfAnotherKindIsPassedOver) {
  RedisBackend backend(ToRedis());
  const SessionName name{1, 2, 42};
  redis_->Tell("RPUSH " + kPrefix + name.ToString() + " x");
  EXPECT_THROW(backend.Read(name, [](auto) {}), Error);
  EXPECT_NO_THROW(backend.Lengths());  // it is no reason to do without Redis
}

}  // namespace
}  // namespace lesskv::server_test
