// What a run takes of the machine's memory, by the kernel's own count (VmHWM of the child): opening a model maps it
// without reading it, and rows that leave the cache leave memory, however long the text.
#include <gtest/gtest.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <iterator>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "base/error.h"

namespace lesskv {
namespace {

namespace fs = std::filesystem;
const std::string kModel = LESSKV_SOURCE_DIR "/models/lesskv-small.gguf";

struct ChildRun {
  size_t peak = 0;  // bytes resident at most
  nlohmann::json result;
};

class PeakMemory : public testing::Test {
 protected:
  void SetUp() override {
#ifdef __SANITIZE_ADDRESS__
    GTEST_SKIP() << "AddressSanitizer keeps freed memory and shadows the rest";
#endif
    folder_ = fs::temp_directory_path() / fmt::format("lesskv_peak_{}", ::getpid());
    fs::create_directories(folder_);
  }
  void TearDown() override {
    if (!folder_.empty()) fs::remove_all(folder_);
  }

  ChildRun Call(std::vector<std::string> arguments) const {
    const std::string out = (folder_ / "out").string();
    arguments.insert(arguments.begin(), LESSKV_PROGRAM);
    const pid_t child = fork();
    if (child == 0) {
      std::vector<char*> argv;
      for (std::string& argument : arguments) argv.push_back(argument.data());
      argv.push_back(nullptr);
      if (freopen(out.c_str(), "w", stdout) == nullptr || freopen("/dev/null", "w", stderr) == nullptr) _exit(99);
      execv(argv[0], argv.data());
      _exit(99);
    }
    int status = 0;
    rusage usage{};
    EXPECT_EQ(wait4(child, &status, 0, &usage), child);
    EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0);
    std::ifstream in(out);
    const std::string text((std::istreambuf_iterator<char>(in)), {});
    return {static_cast<size_t>(usage.ru_maxrss) * 1024, nlohmann::json::parse(text, nullptr, false)};
  }

  fs::path folder_;
};

// 16,000 tokens read in chunks: beyond what a one-token run takes, the full cache costs its counted bytes and the small
// one its own, about a twentieth.
TEST_F(PeakMemory, WhatLeftTheCacheLeftMemory) {
  std::ifstream sample(LESSKV_SOURCE_DIR "/docs/sample.txt");
  const std::string text((std::istreambuf_iterator<char>(sample)), {});
  const std::string path = (folder_ / "long.txt").string();
  std::ofstream long_text(path);
  for (int i = 0; i < 13; ++i) long_text << text << "\n";  // some 1,200 tokens each
  long_text.close();
  const auto run = [&](const std::string& spec, const std::vector<std::string>& prompt) {
    std::vector<std::string> arguments = {"run", "-m", kModel, "--ctx", "16384", "-n", "1", "-t", "1", "--json",
                                          "--kv", spec};
    arguments.insert(arguments.end(), prompt.begin(), prompt.end());
    return Call(arguments);
  };
  const std::string chunk = "+prefill(chunk=512)";
  // The base has the work memory of a whole chunk, and a cache of one chunk.
  std::string first_chunk = text.substr(0, 2000);
  const ChildRun base = run("full" + chunk, {"-p", first_chunk});
  const ChildRun full = run("full" + chunk, {"-f", path});
  const ChildRun small = run("h2o(5%)" + chunk, {"-f", path});
  ASSERT_GT(full.result["tokens_seen"], 15000);
  ASSERT_EQ(full.result["tokens_seen"], small.result["tokens_seen"]);
  const auto peak = [](const ChildRun& r) { return r.result["kv_bytes_peak"].get<double>(); };
  const auto beyond = [&](const ChildRun& r) {
    return static_cast<double>(r.peak) - static_cast<double>(base.peak) + peak(base);
  };
  fmt::print("beyond the base: full {:.0f} of {:.0f} bytes counted, small {:.0f} of {:.0f}\n", beyond(full), peak(full),
             beyond(small), peak(small));
  EXPECT_LT(peak(small), 0.1 * peak(full));
  const double slack = 4 << 20;  // text, tokens, allocator
  EXPECT_NEAR(beyond(full), peak(full), slack);
  EXPECT_NEAR(beyond(small), peak(small), slack);
  EXPECT_LT(beyond(small), 0.25 * beyond(full));
}

}  // namespace
}  // namespace lesskv
