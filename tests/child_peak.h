// The memory of a whole run of the program, as the kernel counts it.
#pragma once

#include <gtest/gtest.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <string>
#include <vector>

namespace lesskv::testing_support {

// Bytes resident at most. Standard output goes to the file `out`, standard error nowhere; a failure of the program is one
// of the test.
inline size_t PeakOfRun(std::vector<std::string> arguments, const std::string& out) {
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
  return static_cast<size_t>(usage.ru_maxrss) * 1024;
}

}  // namespace lesskv::testing_support
