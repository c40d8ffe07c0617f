// Two replicas, the nginx of deploy/ before them and Redis behind them: whatever one has said, the other goes on with.
#include <filesystem>
#include <regex>

#include "command_harness.h"
#include "server/child_process.h"
#include "server/server_harness.h"

namespace lesskv {
namespace {

using server_test::ChildProcess;
using server_test::Connection;
using server_test::FindProgram;
using server_test::FreePort;
using server_test::Json;
using server_test::RedisServer;
using server_test::Reply;

const std::string kDeploy = LESSKV_SOURCE_DIR "/deploy/";

// One server of the two.
struct Replica {
  int port = 0;
  ChildProcess process;
};

class ReplicasTest : public testing_support::CommandTest {
 protected:
  void SetUp() override {
    CommandTest::SetUp();
    if (!RedisServer::IsInstalled()) GTEST_SKIP() << "redis-server and redis-cli are not there to be run";
    if (FindProgram("nginx").empty()) GTEST_SKIP() << "nginx is not there to be run";
    redis_ = std::make_unique<RedisServer>(Path("redis"));
    for (Replica& replica : replicas_) StartReplica(replica);
    for (Replica& replica : replicas_) ASSERT_TRUE(server_test::WaitForListener(replica.port)) << Said(replica);
    StartNginx();
  }

  void StartReplica(Replica& replica) const {
    if (replica.port == 0) replica.port = FreePort();
    const std::vector<std::string> words = {LESSKV_PROGRAM, "serve",
                                            "-m",           LESSKV_SOURCE_DIR "/models/lesskv-small.gguf",
                                            "--kv",         "h2o(64)",
                                            "--ctx",        "512",
                                            "-t",           "1",
                                            "--port",       std::to_string(replica.port),
                                            "--store",      fmt::format("redis://127.0.0.1:{}", redis_->port())};
    replica.process = ChildProcess(words, Path(fmt::format("{}.err", replica.port)));
  }
  std::string Said(const Replica& replica) const { return Read(fmt::format("{}.err", replica.port)); }

  // With our ports and folder in the place of those of a real machine.
  void StartNginx() {
    port_ = FreePort();
    std::string server = testing_support::ReadFile(kDeploy + "nginx/lesskv.conf");
    std::string upstream = testing_support::ReadFile(kDeploy + "nginx/upstream_local.conf");
    const auto replace = [](std::string& text, const std::string& what, const std::string& by) {
      ASSERT_NE(text.find(what), std::string::npos) << what;
      text.replace(text.find(what), what.size(), by);
    };
    replace(server, "listen 8080", fmt::format("listen 127.0.0.1:{}", port_));
    replace(upstream, "127.0.0.1:8081", fmt::format("127.0.0.1:{}", replicas_[0].port));
    replace(upstream, "127.0.0.1:8082", fmt::format("127.0.0.1:{}", replicas_[1].port));
    std::string paths;
    for (const char* const name : {"client_body", "proxy", "fastcgi", "uwsgi", "scgi"})
      paths += fmt::format("{}_temp_path {};\n", name, Path(name));
    Write("nginx.conf", fmt::format("daemon off;\nmaster_process off;\npid {};\nerror_log stderr;\nevents {{}}\n"
                                    "http {{\naccess_log off;\n{}{}{}}}\n",
                                    Path("nginx.pid"), paths, upstream, server));
    nginx_ = ChildProcess({FindProgram("nginx"), "-p", Path(""), "-c", Path("nginx.conf")}, Path("nginx.err"));
    ASSERT_TRUE(server_test::WaitForListener(port_)) << Read("nginx.err");
  }

  static Reply Call(int port, const std::string& method, const std::string& path, const std::string& body = "") {
    const Connection connection(port);
    connection.Send(server_test::RequestText(method, path, body));
    return server_test::ParseReply(connection.All());
  }
  static Json Complete(int port, const std::string& prompt) {
    const Json body = {{"prompt", prompt}, {"max_tokens", 24}, {"temperature", 0}};
    const Reply reply = Call(port, "POST", "/v1/completions", body.dump());
    EXPECT_EQ(reply.status, 200) << reply.body;
    return reply.json();
  }
  static std::string Text(const Json& answer) { return answer["choices"][0]["text"]; }
  static size_t Cached(const Json& answer) { return answer["usage"]["prompt_tokens_details"]["cached_tokens"]; }
  static int Metric(const Replica& replica, const std::string& name) {
    const std::string text = Call(replica.port, "GET", "/metrics").body, line = fmt::format("\nlesskv_{} ", name);
    const size_t at = text.find(line);
    return at == std::string::npos ? -1 : std::atoi(&text[at + line.size()]);
  }
  // Waits until it is so.
  template <typename Condition>
  static bool Soon(Condition condition) {
    for (int i = 0; i < 600 && !condition(); ++i) std::this_thread::sleep_for(std::chrono::milliseconds(50));
    return condition();
  }
  static int Saved(const Replica& replica) { return Metric(replica, "store_saved_total"); }

  std::unique_ptr<RedisServer> redis_;
  Replica replicas_[2];
  ChildProcess nginx_;
  int port_ = 0;  // of nginx
};

TEST_F(ReplicasTest, AConversationOutlivesAReplica) {
  // What one server says that keeps everything in its memory, turn by turn.
  std::vector<std::string> prompts = {"The sea was"}, texts;
  Replica alone;
  StartReplica(alone);
  ASSERT_TRUE(server_test::WaitForListener(alone.port)) << Said(alone);
  for (int turn = 0; turn < 3; ++turn) {
    texts.push_back(Text(Complete(alone.port, prompts.back())));
    prompts.push_back(prompts.back() + texts.back() + " And then");
  }
  redis_->Tell("FLUSHALL");

  EXPECT_EQ(Text(Complete(port_, prompts[0])), texts[0]);
  ASSERT_TRUE(Soon([&] { return Saved(replicas_[0]) + Saved(replicas_[1]) == 1; })) << Said(replicas_[0]);
  const bool first = Saved(replicas_[0]) == 1;
  Replica &dies = replicas_[first ? 0 : 1], &lives = replicas_[first ? 1 : 0];
  EXPECT_EQ(Metric(lives, "store_restored_total"), 0);
  {
    const Connection cut(dies.port);  // in the middle of an answer
    const Json body = {{"prompt", prompts[1]}, {"max_tokens", 400}, {"stream", true}};
    cut.Send(server_test::RequestText("POST", "/v1/completions", body.dump()));
    EXPECT_NE(cut.Some().find("200"), std::string::npos);
    dies.process.Kill(SIGKILL);
    EXPECT_EQ(cut.All().find("data: [DONE]"), std::string::npos);
  }

  const Json second = Complete(port_, prompts[1]);
  EXPECT_GT(Cached(second), 3u);
  EXPECT_EQ(Text(second), texts[1]);
  EXPECT_EQ(Metric(lives, "store_restored_total"), 1);

  ASSERT_TRUE(Soon([&] { return Saved(lives) == 1; })) << Said(lives);
  StartReplica(dies);
  ASSERT_TRUE(server_test::WaitForListener(dies.port)) << Said(dies);
  lives.process.Kill(SIGKILL);
  ASSERT_TRUE(Soon([&] { return Call(port_, "GET", "/health").status == 200; }));  // nginx passes it over for a while
  const Json third = Complete(port_, prompts[2]);
  EXPECT_GT(Cached(third), Cached(second));
  EXPECT_EQ(Text(third), texts[2]);
}

TEST_F(ReplicasTest, StreamsComeInPieces) {
  const Connection connection(port_);
  const Json body = {{"prompt", "The sea was"}, {"max_tokens", 100}, {"temperature", 0}, {"stream", true}};
  connection.Send(server_test::RequestText("POST", "/v1/completions", body.dump()));
  std::string text;
  size_t pieces = 0;
  for (std::string more = connection.Some(); !more.empty(); more = connection.Some(), ++pieces) text += more;
  EXPECT_GT(pieces, 3u);
  EXPECT_NE(text.find("data: [DONE]"), std::string::npos);
  EXPECT_EQ(Call(port_, "GET", "/metrics").status, 404);
  EXPECT_EQ(Call(port_, "GET", "/health").status, 200);
}

TEST(DeployTest, TheServiceIsUnderstood) {
  if (FindProgram("systemd-analyze").empty()) GTEST_SKIP() << "systemd-analyze is not there to be run";
  const std::filesystem::path folder =
      std::filesystem::temp_directory_path() / fmt::format("lesskv_units_{}", ::getpid());
  std::filesystem::create_directories(folder);
  const std::string unit = std::regex_replace(testing_support::ReadFile(kDeploy + "systemd/lesskv@.service"),
                                              std::regex("/usr/local/bin/lesskv"), LESSKV_PROGRAM);
  std::ofstream(folder / "lesskv@8081.service") << unit;
  const std::string said =
      server_test::OutputOf(fmt::format("systemd-analyze verify '{}' 2>&1", (folder / "lesskv@8081.service").string()));
  EXPECT_EQ(said.find("lesskv@8081"), std::string::npos) << said;
  std::filesystem::remove_all(folder);
}

}  // namespace
}  // namespace lesskv
