// lesskv serve as an operator runs it: a process that may be killed at any moment, and what is left of its
// conversations.
#include <fcntl.h>
#include <signal.h>

#include <filesystem>
#include <set>

#include "command_harness.h"
#include "server/server_harness.h"

namespace lesskv {
namespace {

using server_test::Connection;
using server_test::Json;
using server_test::Reply;
using testing_support::Result;
using namespace std::chrono_literals;

class ServeCommandTest : public testing_support::CommandTest {
 protected:
  void TearDown() override {
    if (pid_ > 0) Kill(SIGKILL);
    CommandTest::TearDown();
  }

  void Serve(const std::vector<std::string>& more) {
    const std::string model = LESSKV_SOURCE_DIR "/models/lesskv-small.gguf";
    std::vector<std::string> words = {LESSKV_PROGRAM, "serve", "-m", model, "--ctx", ctx_, "-t", "1", "--port", "0"};
    words.insert(words.end(), more.begin(), more.end());
    std::vector<char*> arguments;
    for (std::string& word : words) arguments.push_back(word.data());
    arguments.push_back(nullptr);
    const std::string err = Path("serve.err");
    std::filesystem::remove(err);
    pid_ = ::fork();
    if (pid_ == 0) {
      ::dup2(::open(err.c_str(), O_WRONLY | O_CREAT, 0600), STDERR_FILENO);
      ::execv(LESSKV_PROGRAM, arguments.data());
      ::_exit(127);
    }
    for (int i = 0; i < 3600 && Port() == 0; ++i) std::this_thread::sleep_for(50ms);
    port_ = Port();
    ASSERT_GT(port_, 0) << Read("serve.err");
  }
  int Port() const {
    const std::string said = Exists("serve.err") ? Read("serve.err") : "", mark = "http://127.0.0.1:";
    const size_t at = said.find(mark);
    return at == std::string::npos || said.find(',', at) == std::string::npos ? 0 : std::atoi(&said[at + mark.size()]);
  }
  int Kill(int signal) {
    ::kill(pid_, signal);
    int status = 0;
    ::waitpid(pid_, &status, 0);
    pid_ = -1;
    return status;
  }

  Reply Call(const std::string& method, const std::string& path, const std::string& body = "") const {
    const Connection connection(port_);
    connection.Send(server_test::RequestText(method, path, body));
    return server_test::ParseReply(connection.All());
  }
  Json Complete(const std::string& prompt, const std::string& policy) const {
    const Json body = {{"prompt", prompt}, {"max_tokens", 24}, {"temperature", 0}, {"kv_policy", policy}};
    const Reply reply = Call("POST", "/v1/completions", body.dump());
    EXPECT_EQ(reply.status, 200) << reply.body;
    return reply.json();
  }
  static std::string Text(const Json& answer) { return answer["choices"][0]["text"]; }
  static size_t Cached(const Json& answer) { return answer["usage"]["prompt_tokens_details"]["cached_tokens"]; }
  bool MetricIs(const std::string& name, int value) const {
    const std::string line = fmt::format("\nlesskv_{} {}\n", name, value);
    for (int i = 0; i < 3600; ++i, std::this_thread::sleep_for(50ms))
      if (Call("GET", "/metrics").body.find(line) != std::string::npos) return true;
    return false;
  }

  std::string ctx_ = "512";
  pid_t pid_ = -1;
  int port_ = 0;
};

// In float32, so that no machine has a text of its own, whose letters might be other tokens than those that were said.
TEST_F(ServeCommandTest, ConversationsOutliveAKilledServer) {
  for (const std::string policy : {"full", "h2o(64)"}) {
    Serve({"--kv", policy, "--compute", "f32"});
    const std::string first = Text(Complete("The sea was", policy));
    const std::string prompt = "The sea was" + first + " And then";
    const std::string second = Text(Complete(prompt, policy));
    EXPECT_EQ(WEXITSTATUS(Kill(SIGTERM)), 0);

    Serve({"--kv", policy, "--compute", "f32", "--store", Path("store")});
    EXPECT_EQ(Text(Complete("The sea was", policy)), first);
    ASSERT_TRUE(MetricIs("store_saved_total", 1));
    for (const auto& file : std::filesystem::directory_iterator(Path("store")))
      EXPECT_EQ(file.status().permissions() & ~std::filesystem::perms::owner_all, std::filesystem::perms::none) << file.path();
    Kill(SIGKILL);
    Serve({"--kv", policy, "--compute", "f32", "--store", Path("store")});
    const Json after = Complete(prompt, policy);
    EXPECT_GT(Cached(after), 3u);
    EXPECT_EQ(Text(after), second);
    EXPECT_TRUE(MetricIs("store_restored_total", 1));
    Kill(SIGKILL);
    std::filesystem::remove_all(Path("store"));
  }
}

// A prompt that is read anew, in one piece or several, and one behind a copy of what was read before are multiplied by
// the same kernels.
TEST_F(ServeCommandTest, ASeedRepeatsItsText) {
  Serve({});
  for (const auto& [word, n_words] : {std::pair("sea", 60), {"tea", 257}, {"and", 290}}) {
    std::string prompt;
    for (int i = 0; i < n_words; ++i) prompt += word;
    const Json body = {{"prompt", prompt}, {"max_tokens", 24}, {"temperature", 1.5}, {"seed", 3}};
    std::set<std::string> texts;
    size_t cached = 0;
    for (int i = 0; i < 4; ++i) {
      const Json answer = Call("POST", "/v1/completions", body.dump()).json();
      texts.insert(Text(answer));
      cached += Cached(answer) > 0;
    }
    EXPECT_EQ(texts.size(), 1u) << n_words << *texts.begin();
    EXPECT_EQ(cached, 2u);
  }
}

TEST_F(ServeCommandTest, ThePageTalks) {
  if (Shell("node --version").status != 0) GTEST_SKIP() << "node is not there to run the page's script";
  ctx_ = "100000";  // for an answer that is there to be stopped, however late that is
  Serve({"--allow-kv", "h2o(64)", "--allow-kv", "window(16)", "--compute", "f32", "--max-output", "50000"});
  const Result result =
      Shell(fmt::format("node '" LESSKV_SOURCE_DIR "/tests/page_check.js' http://127.0.0.1:{}/", port_));
  EXPECT_EQ(result.status, 0) << result.err;
}

TEST_F(ServeCommandTest, WhatCannotBeIsRefused) {
  Write("file", "");
  ExpectOneSentence(Shell("$L serve -m $M --chat-template plain --port 0 --store file"), 1, "the session store file cannot be");
  ExpectOneSentence(Shell("$L serve -m $M --chat-template plain --port 0 --store dir --store-size lots"), 2, "--store-size: expected a number of bytes");
  const auto refused = [&](const std::string& more, const std::string& said) {
    ExpectOneSentence(Shell("$L serve -m $M --chat-template plain --port 0 " + more), 2, said);
  };
  refused("--store redis://:secret@localhost", "LESSKV_REDIS_PASSWORD");
  refused("--store rediss://localhost", "without TLS");
  refused("--store http://localhost", "redis://HOST");
  refused("--store redis://localhost --store-size 1G", "--store-size: Redis is limited by");
  for (const char* const bytes : {"0", "0G", "17179869184G", "999999999999G", "9223372036854775808", "99999999999999999999", "-1", "1MB"}) {
    refused(std::string("--kv-memory ") + bytes, "--kv-memory: expected a number of bytes such as 500M or 4GiB");
    refused(std::string("--store dir --store-size ") + bytes, "--store-size: expected a number of bytes such as 500M or 4GiB");
  }
  for (const char* const blank : {"' '", "' \t '", "'\n'"})
    ExpectOneSentence(Shell(std::string("LESSKV_API_KEY=") + blank + " $L serve -m $M --chat-template plain --port 0 --host 0.0.0.0"), 2, "LESSKV_API_KEY: there is no key in it");
  refused("--kv-memory 1000", "--kv-memory: the shortest text under full takes");
  refused("--allow-kv 'h2o(24)' --kv-memory 1000", "--kv-memory: the shortest text under");
  refused("--host 0.0.0.0", "with an API key only");
  refused("--store dir --store-days 3", "--store-days: a directory is limited by");
  refused("--store-days 3", "limits of a --store, which is not given");
  refused("--store-size 1G", "limits of a --store, which is not given");
  ExpectOneSentence(Shell("$L serve -m $M --chat-template plain --port 0 --api-key-file file"), 2, "--api-key-file file: there is no key in it");
  Write("file", " \n\t\n");
  ExpectOneSentence(Shell("$L serve -m $M --chat-template plain --port 0 --api-key-file file"), 2, "--api-key-file file: there is no key in it");
}

}  // namespace
}  // namespace lesskv
