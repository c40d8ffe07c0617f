// Two replicas, the nginx of deploy/ before them and Redis behind them: whatever one has said, the other goes on with.
// And what deploy/'s other files ask of these programs.
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

std::string Deployed(const std::string& name) { return testing_support::ReadFile(kDeploy + name); }

void Replace(std::string& text, const std::string& what, const std::string& by) {
  ASSERT_NE(text.find(what), std::string::npos) << what;
  text.replace(text.find(what), what.size(), by);
}

// All that the first group of the expression matches.
std::vector<std::string> Matches(const std::string& text, const std::string& expression) {
  const std::regex regex(expression);
  std::vector<std::string> found;
  for (std::sregex_iterator i(text.begin(), text.end(), regex), end; i != end; ++i) found.push_back((*i)[1]);
  return found;
}

class DeployTest : public testing_support::CommandTest {
 protected:
  // nginx.conf with deploy/'s server; our port and folder stand in the place of those of a real machine.
  void WriteNginxConf(int port, const std::string& upstream) const {
    std::string server = Deployed("nginx/lesskv.conf"), paths;
    Replace(server, "listen 8080", fmt::format("listen 127.0.0.1:{}", port));
    for (const char* const name : {"client_body", "proxy", "fastcgi", "uwsgi", "scgi"})
      paths += fmt::format("{}_temp_path {};\n", name, Path(name));
    Write("nginx.conf", fmt::format("daemon off;\nmaster_process off;\npid {};\nerror_log stderr;\nevents {{}}\n"
                                    "http {{\naccess_log off;\n{}{}{}}}\n",
                                    Path("nginx.pid"), paths, upstream, server));
  }
  static Reply Call(int port, const std::string& method, const std::string& path, const std::string& body = "",
                    const std::string& header = "") {
    const Connection connection(port);
    connection.Send(server_test::RequestText(method, path, body, header));
    return server_test::ParseReply(connection.All());
  }
  // Waits until it is so.
  template <typename Condition>
  static bool Soon(Condition condition) {
    for (int i = 0; i < 3600 && !condition(); ++i) std::this_thread::sleep_for(std::chrono::milliseconds(50));
    return condition();
  }
};

// One server of the two.
struct Replica {
  int port = 0;
  ChildProcess process;
};

class ReplicasTest : public DeployTest {
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

  // In float32, so that no machine has a text of its own, whose letters might be other tokens than those that were said.
  void StartReplica(Replica& replica) const {
    if (replica.port == 0) replica.port = FreePort();
    const std::vector<std::string> words = {LESSKV_PROGRAM, "serve",
                                            "-m",           LESSKV_SOURCE_DIR "/models/lesskv-small.gguf",
                                            "--kv",         "h2o(64)",
                                            "--ctx",        "100000",
                                            "--max-output", "90000",
                                            "--compute",    "f32",
                                            "-t",           "1",
                                            "--port",       std::to_string(replica.port),
                                            "--store",      fmt::format("redis://127.0.0.1:{}", redis_->port())};
    replica.process = ChildProcess(words, Path(fmt::format("{}.err", replica.port)));
  }
  std::string Said(const Replica& replica) const { return Read(fmt::format("{}.err", replica.port)); }

  void StartNginx() {
    port_ = FreePort();
    std::string upstream = Deployed("nginx/upstream_local.conf");
    Replace(upstream, "127.0.0.1:8081", fmt::format("127.0.0.1:{}", replicas_[0].port));
    Replace(upstream, "127.0.0.1:8082", fmt::format("127.0.0.1:{}", replicas_[1].port));
    WriteNginxConf(port_, upstream);
    nginx_ = ChildProcess({FindProgram("nginx"), "-p", Path(""), "-c", Path("nginx.conf")}, Path("nginx.err"));
    ASSERT_TRUE(server_test::WaitForListener(port_)) << Read("nginx.err");
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
  alone.process.Kill(SIGTERM);  // what it saves it has saved when it ends
  redis_->Tell("FLUSHALL");

  EXPECT_EQ(Text(Complete(port_, prompts[0])), texts[0]);
  ASSERT_TRUE(Soon([&] { return Saved(replicas_[0]) + Saved(replicas_[1]) == 1; })) << Said(replicas_[0]);
  const bool first = Saved(replicas_[0]) == 1;
  Replica &dies = replicas_[first ? 0 : 1], &lives = replicas_[first ? 1 : 0];
  EXPECT_EQ(Metric(lives, "store_restored_total"), 0);
  {
    const Connection cut(dies.port);  // in the middle of an answer
    const Json body = {{"prompt", prompts[1]}, {"max_tokens", 90000}, {"ignore_eos", true}, {"stream", true}};
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
  const Json body = {
      {"prompt", "The sea was"}, {"max_tokens", 100}, {"ignore_eos", true}, {"temperature", 0}, {"stream", true}};
  connection.Send(server_test::RequestText("POST", "/v1/completions", body.dump()));
  std::string text;
  size_t pieces = 0;
  for (std::string more = connection.Some(); !more.empty(); more = connection.Some(), ++pieces) text += more;
  EXPECT_GT(pieces, 3u);
  EXPECT_NE(text.find("data: [DONE]"), std::string::npos);
  EXPECT_EQ(Call(port_, "GET", "/metrics").status, 404);
  EXPECT_EQ(Call(port_, "GET", "/health").status, 200);
}

TEST_F(DeployTest, TheServiceIsUnderstood) {
  if (FindProgram("systemd-analyze").empty()) GTEST_SKIP() << "systemd-analyze is not there to be run";
  Write("lesskv@8081.service",
        std::regex_replace(Deployed("systemd/lesskv@.service"), std::regex("/usr/local/bin/lesskv"), LESSKV_PROGRAM));
  const std::string said =
      server_test::OutputOf(fmt::format("systemd-analyze verify '{}' 2>&1", Path("lesskv@8081.service")));
  EXPECT_EQ(said.find("lesskv@8081"), std::string::npos) << said;
}

// It must start where a replica has no name because it is stopped, and know those that compose.yaml starts.
TEST_F(DeployTest, NginxKnowsTheContainersWithoutTheirNames) {
  const std::string upstream = Deployed("nginx/upstream_compose.conf");
  const std::vector<std::string> servers = Matches(upstream, "\n *server ([0-9.]+):8080 ");
  EXPECT_EQ(servers.size(), 2u);
  EXPECT_EQ(servers, Matches(Deployed("compose.yaml"), "\n *ipv4_address: (\\S+)"));
  if (FindProgram("nginx").empty()) GTEST_SKIP() << "nginx is not there to be run";
  WriteNginxConf(FreePort(), upstream);
  const std::string said = server_test::OutputOf(
      fmt::format("{} -t -p '{}' -c '{}' 2>&1", FindProgram("nginx"), Path(""), Path("nginx.conf")));
  EXPECT_NE(said.find("test is successful"), std::string::npos) << said;
}

// The commands of compose.yaml's Redis and replicas, with our ports and paths.
TEST_F(DeployTest, TheContainersCommandsAreUnderstood) {
  if (!RedisServer::IsInstalled()) GTEST_SKIP() << "redis-server and redis-cli are not there to be run";
  const std::string compose = Deployed("compose.yaml");
  const int redis_port = FreePort(), port = FreePort();

  std::vector<std::string> blocks = Matches(compose, "\n      - \\|\n((?: {8}.*\n)+)");
  ASSERT_EQ(blocks.size(), 1u);
  std::string script = std::regex_replace(blocks[0], std::regex("(^|\n) {8}"), "$1");
  Replace(script, "$$PASSWORD", "$PASSWORD");
  Replace(script, "save \"\"", fmt::format("save \"\"\nport {}\nbind 127.0.0.1", redis_port));
  ChildProcess redis({"env", "PASSWORD=open sesame", "sh", "-c", script}, Path("redis.log"));
  ASSERT_TRUE(server_test::WaitForListener(redis_port)) << Read("redis.log");
  const auto ask = [&](const std::string& more) {
    return server_test::OutputOf(fmt::format("redis-cli -p {} {} 2>&1", redis_port, more));
  };
  EXPECT_NE(ask("dbsize").find("NOAUTH"), std::string::npos);
  EXPECT_EQ(ask("--no-auth-warning -a 'open sesame' config get maxmemory-policy"), "maxmemory-policy\nallkeys-lru\n");
  EXPECT_EQ(ask("--no-auth-warning -a 'open sesame' config get save"), "save\n\n");

  std::vector<std::string> words = {"env", "LESSKV_API_KEY=key", "LESSKV_REDIS_PASSWORD=open sesame", LESSKV_PROGRAM,
                                    "serve"};
  for (std::string& word : Matches(compose, "\n    - (--\\S+=.*)")) {
    word = std::regex_replace(word, std::regex("\\$\\{LESSKV_MODEL:[^}]*\\}"), "lesskv-small.gguf");
    word = std::regex_replace(word, std::regex("\\$\\{\\w+:-([^}]*)\\}"), "$1");
    word = std::regex_replace(word, std::regex("=/models/"), "=" LESSKV_SOURCE_DIR "/models/");
    word = std::regex_replace(word, std::regex("//redis:6379"), fmt::format("//127.0.0.1:{}", redis_port));
    word = std::regex_replace(word, std::regex("--port=8080"), fmt::format("--port={}", port));
    words.push_back(word);
  }
  EXPECT_EQ(words.size(), 11u);
  const ChildProcess replica(words, Path("replica.err"));
  ASSERT_TRUE(server_test::WaitForListener(port)) << Read("replica.err");
  EXPECT_EQ(Call(port, "GET", "/v1/models").status, 401);
  const Reply reply = Call(port, "POST", "/v1/completions", R"({"prompt": "The sea was", "max_tokens": 8})",
                           "Authorization: Bearer key\r\n");
  EXPECT_EQ(reply.status, 200) << reply.body;
  EXPECT_EQ(reply.json()["model"], "lesskv-small");
  EXPECT_TRUE(Soon([&] { return ask("--no-auth-warning -a 'open sesame' dbsize") != "0\n"; })) << Read("replica.err");

  redis.Kill(SIGTERM);  // reaches Redis itself
  EXPECT_FALSE(server_test::SomebodyListens(redis_port));
}

}  // namespace
}  // namespace lesskv
