// Runs the program as a user does: through a shell, with what it printed and its exit status.
#pragma once

#include <fmt/format.h>
#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>

namespace lesskv::testing_support {

struct Result {
  int status;
  std::string out, err;
};

inline std::string ReadFile(const std::filesystem::path& path) {
  std::ifstream in(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(in), {}};
}

class CommandTest : public testing::Test {
 protected:
  void SetUp() override {
    folder_ = std::filesystem::temp_directory_path() / fmt::format("lesskv_command_{}", ::getpid());
    std::filesystem::create_directories(folder_);
  }
  void TearDown() override { std::filesystem::remove_all(folder_); }

  std::string Path(const std::string& name) const { return (folder_ / name).string(); }
  std::string Read(const std::string& name) const { return ReadFile(Path(name)); }
  bool Exists(const std::string& name) const { return std::filesystem::exists(Path(name)); }
  void Write(const std::string& name, const std::string& text) const { std::ofstream(Path(name)) << text; }

  // A command line run in the test's folder; $L is the program, $M a tiny model with random weights, $S the bundled
  // one, $T a text. Redirections of its own come after ours and win.
  Result Shell(const std::string& command) const {
    const std::string line = fmt::format("{} cd '{}' && {{ {} ; }} >'{}' 2>'{}'", Variables(), folder_.string(), command,
                                         Path("out"), Path("err"));
    const int status = std::system(line.c_str());
    return {WIFEXITED(status) ? WEXITSTATUS(status) : -1, Read("out"), Read("err")};
  }

  static std::string Variables() {
    const std::string source = LESSKV_SOURCE_DIR;
    return fmt::format("L='{}' M='{}' S='{}' T='{}';", LESSKV_PROGRAM, source + "/tests/data/models/llama-gqa-tied.gguf",
                       source + "/models/lesskv-small.gguf", source + "/docs/sample.txt");
  }

  // Nothing on standard output, and on standard error one sentence with `said` in it, after warnings if any.
  static void ExpectOneSentence(const Result& result, int status, const std::string& said) {
    EXPECT_EQ(result.status, status) << result.err;
    EXPECT_NE(result.err.find(said), std::string::npos) << result.err;
    EXPECT_EQ(result.out, "");
    std::string sentence = result.err;
    if (const size_t warning = sentence.find("warning:"); warning == 0) sentence.erase(0, sentence.find('\n') + 1);
    EXPECT_EQ(sentence.find('\n'), sentence.size() - 1) << result.err;
    EXPECT_TRUE(sentence.starts_with("lesskv: ")) << result.err;
  }

  std::filesystem::path folder_;
};

}  // namespace lesskv::testing_support
