// lesskv chat and lesskv run --chat as a user calls them: over a pipe, on a terminal, with the bundled model, and with
// a model that was trained to talk where there is one.
#include <gtest/gtest.h>
#include <poll.h>
#include <pty.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <csignal>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <nlohmann/json.hpp>
#include <string>
#include <thread>

namespace lesskv {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::json;

struct Result {
  int status;
  std::string out, err;
};

std::string Read(const fs::path& path) {
  std::ifstream in(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(in), {}};
}

// LESSKV_CHAT_MODEL, or the file beside the checkout that tests of real models use; may not exist.
std::string TalkingModel() {
  const char* file = std::getenv("LESSKV_CHAT_MODEL");
  if (file != nullptr) return file;
  return (fs::path(LESSKV_SOURCE_DIR).parent_path() / "models" / "smollm2.gguf").string();
}

class ChatCommand : public testing::Test {
 protected:
  void SetUp() override {
    folder_ = fs::temp_directory_path() / ("lesskv_chat_" + std::to_string(::getpid()));
    fs::create_directories(folder_);
  }
  void TearDown() override { fs::remove_all(folder_); }

  std::string Path(const std::string& name) const { return (folder_ / name).string(); }

  // A shell command line; $L is the program, $M the bundled model, $S the one that can talk.
  Result Shell(const std::string& command) const {
    const std::string line = std::string("L='") + LESSKV_PROGRAM + "' M='" + kModel + "' S='" + TalkingModel() +
                             "'; cd '" + folder_.string() + "' && { " + command + " ; } >'" + Path("out") + "' 2>'" +
                             Path("err") + "'";
    const int status = std::system(line.c_str());
    return {WIFEXITED(status) ? WEXITSTATUS(status) : -1, Read(Path("out")), Read(Path("err"))};
  }

  // `input` to lesskv chat on the bundled model with the plain template, greedy, answers of 8 tokens.
  Result Chat(const std::string& input, const std::string& options = "") const {
    std::ofstream(Path("in"), std::ios::binary) << input;
    return Shell("$L chat -m $M --chat-template plain --temp 0 -n 8 " + options + " < in");
  }

  static constexpr const char* kModel = LESSKV_SOURCE_DIR "/models/lesskv-small.gguf";
  fs::path folder_;
};

void ExpectOneSentence(const Result& result, int status, const std::string& said) {
  EXPECT_EQ(result.status, status) << result.err;
  EXPECT_NE(result.err.find(said), std::string::npos) << result.err;
  EXPECT_TRUE(result.err.starts_with("lesskv: ")) << result.err;
  EXPECT_EQ(result.err.find('\n'), result.err.size() - 1) << result.err;
}

TEST_F(ChatCommand, AnswersEachLineAndEndsWithTheInput) {
  const Result one = Chat("The sea was\n");
  ASSERT_EQ(one.status, 0) << one.err;
  EXPECT_GT(one.out.size(), 8u);
  EXPECT_TRUE(one.out.ends_with('\n'));
  const Result two = Chat("The sea was\n\nShe had never\n");
  ASSERT_EQ(two.status, 0) << two.err;
  EXPECT_TRUE(two.out.starts_with(one.out)) << two.out;
  EXPECT_GT(two.out.size(), one.out.size());
  EXPECT_EQ(Chat("The sea was\n/exit\nShe had never\n").out, one.out);
  EXPECT_EQ(Chat("").out, "");
}

TEST_F(ChatCommand, WhatEditorsAddToLinesIsLeftOut) {
  const Result plain = Chat("The sea was\n/stats\n");
  ASSERT_EQ(plain.status, 0) << plain.err;
  const Result crlf = Chat("\xef\xbb\xbfThe sea was\r\n/stats\r\n");
  EXPECT_EQ(crlf.status, 0) << crlf.err;
  EXPECT_EQ(crlf.out, plain.out);
  EXPECT_EQ(Chat("The sea \\\r\nwas\r\n").out, Chat("The sea \\\nwas\n").out) << "a line that goes on in the next";
  EXPECT_EQ(Chat("/stats").out, "cache    full: empty\n") << "the last line needs no end";
}

// The second answer depends on the first question; after /clear it does not.
TEST_F(ChatCommand, RemembersUntilCleared) {
  const std::string first = Chat("The sea was\n").out, second = Chat("She had never\n").out;
  EXPECT_NE(Chat("The sea was\nShe had never\n").out, first + second);
  EXPECT_EQ(Chat("The sea was\n/clear\nShe had never\n").out, first + second);
}

// A turn of the conversation is a turn of run --chat --session: same tokens, same cache, same text.
TEST_F(ChatCommand, TurnsAreThoseOfRunWithASession) {
  const std::string run = "$L run -m $M --chat --chat-template plain --temp 0 -n 8 --session s.bin --kv 'h2o(24)' -p ";
  const Result first = Shell(run + "'The sea was'"), second = Shell(run + "'She had never'");
  ASSERT_EQ(first.status, 0) << first.err;
  ASSERT_EQ(second.status, 0) << second.err;
  const Result chat = Chat("The sea was\nShe had never\n/save c.bin\n", "--kv 'h2o(24)'");
  EXPECT_EQ(chat.out, first.out + second.out) << chat.err;
  EXPECT_EQ(Read(Path("c.bin")), Read(Path("s.bin")));
}

TEST_F(ChatCommand, GoesOnFromASavedConversation) {
  const Result whole = Chat("The sea was\nShe had never\n");
  const Result first = Chat("The sea was\n/save s.bin\n");
  EXPECT_NE(first.err.find("saved: s.bin"), std::string::npos) << first.err;
  const Result rest = Chat("/load s.bin\nShe had never\n");
  EXPECT_EQ(rest.status, 0) << rest.err;
  EXPECT_EQ(first.out + rest.out, whole.out);
}

// Nothing evicted: reading the conversation anew must not change what is said.
TEST_F(ChatCommand, AnotherCacheReadsTheConversationAnew) {
  const Result whole = Chat("The sea was\nShe had never\n", "--compute f32");
  const Result changed = Chat("The sea was\n/kv window(500)\nShe had never\n/stats\n", "--compute f32");
  ASSERT_EQ(changed.status, 0) << changed.err;
  EXPECT_TRUE(changed.out.starts_with(whole.out)) << changed.out;
  EXPECT_NE(changed.out.find("cache    window(500)\n"), std::string::npos) << changed.out;
}

TEST_F(ChatCommand, StatsSayWhatTheCacheHoldsAndWhatLeft) {
  EXPECT_EQ(Chat("/stats\n").out, "cache    full: empty\n");
  const Result full = Chat("The sea was\n/stats\n");
  EXPECT_NE(full.out.find(" stay, 0.0 have left"), std::string::npos) << full.out;
  const Result small = Chat("The sea was a long way from the house, and she had never seen it before.\n/stats\n",
                            "--kv 'window(16, sinks=0)' --ctx 128");
  EXPECT_NE(small.out.find("16.0 a KV head stay"), std::string::npos) << small.out;
  EXPECT_EQ(small.out.find(" 0.0 have left"), std::string::npos) << small.out;
  EXPECT_NE(small.out.find(" of 128 tokens"), std::string::npos) << small.out;
}

TEST_F(ChatCommand, SystemPromptAndTemplateAreProtectedUnlessKeepSaysOtherwise) {
  const std::string rest = "--kv 'window(24, sinks=0)' --ctx 128 --system 'Be brief, and be kind to all.'";
  const auto protected_tokens = [&](const std::string& options) {
    const std::string out = Chat("The sea\n/stats\n", rest + options).out;
    const size_t end = out.find(" are protected");
    return std::stoul(out.substr(out.rfind(' ', end - 1)));
  };
  EXPECT_GT(protected_tokens(""), 6u);
  EXPECT_EQ(protected_tokens(" --keep 0"), 0u);
  EXPECT_EQ(protected_tokens(" --keep 2"), 2u);
  // What does not fit is refused, not dropped.
  ExpectOneSentence(Chat("The sea\n", "--kv 'window(4, sinks=0)' --ctx 128 --system 'Be brief, and be kind to all.'"),
                    2, "protected");
}

TEST_F(ChatCommand, ALineGoesOnBehindABackslashAndASlashIsWrittenWithTwo) {
  EXPECT_EQ(Chat("The sea\\\nwas\n").out,
            Shell("$L run -m $M --chat --chat-template plain --temp 0 -n 8 -p 'The sea\nwas'").out);
  EXPECT_EQ(Chat("//stats\n").out, Shell("$L run -m $M --chat --chat-template plain --temp 0 -n 8 -p /stats").out);
}

// The plain template's answers end at an empty line, which the next turn must find once and not twice.
TEST_F(ChatCommand, TheEndOfAPlainAnswerIsReadOnce) {
  std::ofstream(Path("in")) << "The sea was\nShe had never\n/save s.bin\n";
  const Result chat = Shell("$L chat -m $M --compute f32 --chat-template plain --seed 3 -n 300 < in");
  ASSERT_EQ(chat.status, 0) << chat.err;
  const std::string session = Read(Path("s.bin"));
  ASSERT_FALSE(session.empty());
  EXPECT_EQ(chat.out.find("\n\n"), std::string::npos) << "no answer holds an empty line";
}

TEST_F(ChatCommand, HelpListsEveryCommand) {
  const std::string out = Chat("/help\n").out;
  for (const char* name : {"/stats", "/kv", "/save", "/load", "/clear", "/help", "/exit", "Ctrl-C"})
    EXPECT_NE(out.find(name), std::string::npos) << name;
}

TEST_F(ChatCommand, WhatCannotBeDoneIsOneSentence) {
  ExpectOneSentence(Shell("$L chat -m $M < /dev/null"), 2, "--chat-template");
  ExpectOneSentence(Shell("$L chat -m $M --chat-template chatlm < /dev/null"), 2, "chatml, ");
  ExpectOneSentence(Shell("$L run -m $M --chat -p x"), 2, "--chat-template");
  ExpectOneSentence(Shell("$L run -m $M --chat-template plain -p x"), 2, "--chat");
  ExpectOneSentence(Shell("$L chat -m nowhere.gguf < /dev/null"), 2, "nowhere.gguf");
  ExpectOneSentence(Chat("", "--kv nonsense"), 2, "nonsense");
  ExpectOneSentence(Chat("", "--keep -7"), 2, "--keep");
  ExpectOneSentence(Shell("$L chat -m $M --chat-template plain -n 0 < /dev/null"), 2, "-n");
  ExpectOneSentence(Chat("", "--temp -1"), 2, "--temp");
  ExpectOneSentence(Chat("", "--stop ''"), 2, "--stop");
  ExpectOneSentence(Chat("/dance\n"), 2, "\"/dance\"");
  ExpectOneSentence(Chat("/save\n"), 2, "/save");
  ExpectOneSentence(Chat("/save s.bin\n"), 2, "no conversation");
  ExpectOneSentence(Chat("/load nowhere.bin\n"), 2, "nowhere.bin");
  ExpectOneSentence(Chat("/load in\n"), 2, "not a lesskv session file");
  ExpectOneSentence(Chat("/kv h2o(\n"), 2, "h2o");
  ExpectOneSentence(Chat("/kv h2o(50%)+less(file=\"nowhere.gguf\")\n"), 2, "nowhere.gguf");
}

TEST_F(ChatCommand, AFullContextIsSaidWithWhatToDo) {
  const Result answer = Chat("The sea was\n", "--ctx 9");
  EXPECT_EQ(answer.status, 0) << answer.err;
  EXPECT_NE(answer.err.find("/clear"), std::string::npos) << answer.err;
  ExpectOneSentence(Chat("The sea was so far away that nobody had ever seen it from here\n", "--ctx 12"), 2, "/clear");
}

// A child on a terminal of its own.
class Terminal {
 public:
  Terminal(const std::vector<std::string>& command) {
    pid_ = forkpty(&fd_, nullptr, nullptr, nullptr);
    if (pid_ != 0) return;
    setenv("TERM", "xterm", 1);
    setenv("LC_ALL", "C.UTF-8", 1);
    std::vector<char*> arguments;
    for (const std::string& word : command) arguments.push_back(const_cast<char*>(word.c_str()));
    arguments.push_back(nullptr);
    execv(arguments[0], arguments.data());
    _exit(127);
  }
  ~Terminal() {
    close(fd_);
    if (!ended_) {
      kill(pid_, SIGKILL);
      waitpid(pid_, nullptr, 0);
    }
  }

  void Type(const std::string& keys) const {
    ASSERT_EQ(write(fd_, keys.data(), keys.size()), static_cast<ssize_t>(keys.size()));
  }

  // Types keys again and again until `text` appears: while the terminal changes between the line editor's mode and the
  // usual one, Ctrl-C means neither what it does here nor what it does there.
  bool TypeUntil(const std::string& keys, const std::string& text) {
    for (int tries = 0; tries < 60; ++tries) {
      Type(keys);
      if (WaitFor(text, std::chrono::seconds(1))) return true;
    }
    return false;
  }

  // Reads until `text` has appeared behind what was waited for before; false when time is up and at the end.
  bool WaitFor(const std::string& text, std::chrono::milliseconds limit = std::chrono::minutes(1)) {
    const auto deadline = std::chrono::steady_clock::now() + limit;
    for (;;) {
      if (const size_t at = seen_.find(text, from_); at != std::string::npos) {
        from_ = at + text.size();
        return true;
      }
      if (std::chrono::steady_clock::now() > deadline) return false;
      pollfd there{fd_, POLLIN, 0};
      if (poll(&there, 1, 100) == 0) continue;
      char buffer[4096];
      const ssize_t n = read(fd_, buffer, sizeof buffer);
      if (n <= 0) return false;
      seen_.append(buffer, static_cast<size_t>(n));
    }
  }

  int Wait() {
    int status = 0;
    waitpid(pid_, &status, 0);
    ended_ = true;
    return WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status);
  }
  const std::string& seen() const { return seen_; }

 private:
  int fd_ = -1;
  pid_t pid_ = -1;
  std::string seen_;
  size_t from_ = 0;
  bool ended_ = false;
};

TEST_F(ChatCommand, OnATerminalCtrlCStopsTheAnswerOnly) {
  Terminal terminal(
      {LESSKV_PROGRAM, "chat", "-m", kModel, "--chat-template", "chatml", "--ctx", "100000", "--temp", "0", "--ignore-eos"});
  ASSERT_TRUE(terminal.WaitFor("> ")) << terminal.seen();
  for (int i = 0; i < 2; ++i) {
    terminal.Type("The s\u00E9a was\n");
    ASSERT_TRUE(terminal.WaitFor("was\r\n")) << terminal.seen();
    ASSERT_TRUE(terminal.WaitFor(" ")) << terminal.seen();  // the answer has begun; it would go on for minutes
    ASSERT_TRUE(terminal.TypeUntil("\x03", "stopped")) << terminal.seen();
    ASSERT_TRUE(terminal.WaitFor("> ")) << terminal.seen();
  }
  terminal.Type("half a question");
  ASSERT_TRUE(terminal.WaitFor("half a question")) << terminal.seen();
  terminal.Type("\x03/dance\n");  // Ctrl-C empties the line
  ASSERT_TRUE(terminal.WaitFor("no command \"/dance\"")) << terminal.seen();
  terminal.Type("/stats\n");
  ASSERT_TRUE(terminal.WaitFor("context  ")) << terminal.seen();
  terminal.Type("/exit\n");
  EXPECT_EQ(terminal.Wait(), 0) << terminal.seen();
}

// Half a question in the cache would be worse than none: the conversation is again what it was before.
TEST_F(ChatCommand, OnATerminalCtrlCTakesAQuestionBackThatIsBeingRead) {
  // Without the processor's instruction sets the question is not read before it is taken back.
  Terminal terminal({"/usr/bin/env", "LESSKV_ISA=scalar", LESSKV_PROGRAM, "chat", "-m", kModel, "--chat-template",
                     "plain", "--temp", "0", "-n", "4", "-t", "1", "--kv", "full+prefill(chunk=1)"});
  const auto context = [&] {
    terminal.Type("/stats\n");
    EXPECT_TRUE(terminal.WaitFor("context  ")) << terminal.seen();
    EXPECT_TRUE(terminal.WaitFor(" of 2048")) << terminal.seen();
    const std::string& seen = terminal.seen();
    const size_t begin = seen.rfind("context  ");
    return seen.substr(begin, seen.find(" of 2048", begin) - begin);
  };
  ASSERT_TRUE(terminal.WaitFor("> ")) << terminal.seen();
  terminal.Type("The sea was\n");
  const std::string before = context();
  std::string question;
  for (int i = 0; i < 300; ++i) question += "so far ";
  terminal.Type(question + "\n");
  ASSERT_TRUE(terminal.WaitFor(" tokens [")) << terminal.seen();
  ASSERT_TRUE(terminal.TypeUntil("\x03", "the question was not read")) << terminal.seen();
  EXPECT_EQ(context(), before);
  terminal.Type("/exit\n");
  EXPECT_EQ(terminal.Wait(), 0) << terminal.seen();
}

TEST_F(ChatCommand, ARealModelAnswersInItsOwnTemplate) {
  if (!fs::exists(TalkingModel())) GTEST_SKIP() << TalkingModel() << " is not there";
  std::ofstream(Path("in")) << "What is the capital of France?\nAnd of Italy?\n";
  const Result chat = Shell("$L chat -m $S --compute f32 --temp 0 -n 40 < in");
  ASSERT_EQ(chat.status, 0) << chat.err;
  const size_t first = chat.out.find("Paris"), second = chat.out.find("Rome");
  EXPECT_NE(first, std::string::npos) << chat.out;
  EXPECT_NE(second, std::string::npos) << chat.out;
  EXPECT_LT(first, second);
  EXPECT_EQ(chat.out.find("<|im_"), std::string::npos) << chat.out;
  const Json with = Json::parse(Shell("$L run -m $S --chat -p hello --temp 0 -n 1 --json").out);
  const Json without = Json::parse(Shell("$L run -m $S --chat --system '' -p hello --temp 0 -n 1 --json").out);
  EXPECT_GT(with["prompt_tokens"].get<int>(), without["prompt_tokens"].get<int>() + 10)
      << "the file's default system prompt";
}

}  // namespace
}  // namespace lesskv
