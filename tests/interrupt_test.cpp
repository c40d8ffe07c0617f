// Ctrl-C and SIGTERM while the program works: it stops at a sound place and says so, and a second signal ends it at once.
#include <fcntl.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/stat.h>

#include <chrono>
#include <functional>
#include <string>
#include <thread>
#include <vector>

#include "base/rng.h"
#include "command_harness.h"

namespace lesskv {
namespace {

using namespace testing_support;  // NOLINT
namespace fs = std::filesystem;

class Interrupt : public CommandTest {
 protected:
  void TearDown() override {
    if (child_ > 0) End(SIGKILL);
    CommandTest::TearDown();
  }

  // The shell becomes the program, whose number is then ours.
  void Start(const std::string& arguments) {
    fs::remove(Path("err"));  // what an earlier program wrote says nothing of this one
    const std::string line = fmt::format("{} cd '{}' && exec \"$L\" {} >'{}' 2>'{}'", Variables(), folder_.string(), arguments,
                                         Path("out"), Path("err"));
    child_ = ::fork();
    if (child_ == 0) {
      ::execl("/bin/sh", "sh", "-c", line.c_str(), nullptr);
      ::_exit(127);
    }
  }
  // Sends the signal and waits; the status as waitpid gives it.
  int End(int signal) {
    ::kill(child_, signal);
    return Wait();
  }
  int Wait() {
    int status = 0;
    ::waitpid(std::exchange(child_, 0), &status, 0);
    return status;
  }
  bool Until(const std::function<bool()>& there) const {
    const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(60);
    while (!there() && std::chrono::steady_clock::now() < deadline)
      std::this_thread::sleep_for(std::chrono::milliseconds(5));
    return there();
  }

  void ExpectStopped(int status, const std::string& said) const {
    EXPECT_TRUE(WIFEXITED(status)) << "ended by signal " << WTERMSIG(status) << ": " << Read("err");
    EXPECT_EQ(WEXITSTATUS(status), 1);
    EXPECT_NE(Read("err").find(said), std::string::npos) << Read("err");
  }

  pid_t child_ = 0;
};

const char* const kTraining =
    "train less -m \"$S\" --text \"$T\" -o x.gguf -c 128 --sequences 6 --views 1 --hidden 64 --batch 2 --epochs 100000 "
    "--kv 'h2o(10%)' --layers 0 --work work";

// The mask of the threads' status files.
bool Has(const std::string& status, const std::string& field, int signal) {
  const size_t at = status.find(field + ":");
  return at != std::string::npos && (std::stoull(status.substr(at + field.size() + 1), nullptr, 16) >> (signal - 1) & 1) != 0;
}

TEST_F(Interrupt, NoHandlerRunsOnAThreadsStack) {
  Start(kTraining);
  ASSERT_TRUE(Until([&] { return Exists("work/state-layer-000.gguf"); })) << Read("err");
  size_t n_threads = 0, n_waiting = 0;  // one thread waits for the signals, which it does with them unblocked
  for (const auto& task : fs::directory_iterator(fmt::format("/proc/{}/task", child_))) {
    const std::string status = ReadFile(task.path() / "status");
    if (status.empty()) continue;  // it has ended meanwhile
    for (const int signal : {SIGINT, SIGTERM}) {
      n_waiting += signal == SIGINT && !Has(status, "SigBlk", signal) ? 1 : 0;
      EXPECT_FALSE(Has(status, "SigCgt", signal)) << status;
    }
    ++n_threads;
  }
  EXPECT_GE(n_threads, 2u);
  EXPECT_LE(n_waiting, 1u);
  ExpectStopped(End(SIGTERM), "--resume continues");
}

// Where foreign code keeps its stack pointer in the heap, a handler's frame overwrites the heap's own data.
TEST_F(Interrupt, TrainingStopsSoundWheneverItIsInterrupted) {
  Rng rng(1);
  for (int round = 0; round < 12; ++round) {
    Start(std::string(kTraining) + (round == 0 ? "" : " --resume"));
    ASSERT_TRUE(Until([&] { return Exists("work/state-layer-000.gguf") && Read("err").find("captures") == 0; })) << Read("err");
    std::this_thread::sleep_for(std::chrono::milliseconds(100 + rng.Below(200)));
    ExpectStopped(End(round % 2 == 0 ? SIGINT : SIGTERM), "--resume continues");
    for (const auto& entry : fs::directory_iterator(folder_ / "work"))
      EXPECT_NE(entry.path().extension(), ".tmp") << entry.path();
  }
}

TEST_F(Interrupt, ASecondSignalEndsAtOnceAndALongPromptIsAnnounced) {
  std::string words;
  while (words.size() < 600000) words += "the sea and ";
  Write("long.txt", words);
  Start("run -m \"$M\" -f long.txt -n 1 -c 1000000 -t 1");
  ASSERT_TRUE(Until([&] { return Read("err").find(": about ") != std::string::npos; })) << Read("err");
  EXPECT_NE(Read("err").find("prompt of "), std::string::npos) << Read("err");
  ::kill(child_, SIGINT);  // would stop at the end of a layer; two of one number might be taken as one
  const int status = End(SIGTERM);
  EXPECT_TRUE(WIFSIGNALED(status) && (WTERMSIG(status) == SIGINT || WTERMSIG(status) == SIGTERM)) << status << Read("err");
}

TEST_F(Interrupt, WhatDoesNotWatchForItEndsAtOnce) {
  ASSERT_EQ(::mkfifo(Path("pipe").c_str(), 0600), 0);
  const int writer = ::open(Path("pipe").c_str(), O_RDWR);
  Start("run -m \"$M\" -f - -n 1 <pipe");  // waits for a prompt
  std::this_thread::sleep_for(std::chrono::milliseconds(300));
  const int status = End(SIGINT);
  ::close(writer);
  EXPECT_TRUE(WIFSIGNALED(status) && WTERMSIG(status) == SIGINT) << status;
}

}  // namespace
}  // namespace lesskv
