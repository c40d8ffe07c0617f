// Other programs beside a test: servers that it starts, stops and kills.
#pragma once

#include <arpa/inet.h>
#include <fcntl.h>
#include <fmt/format.h>
#include <netinet/in.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <filesystem>
#include <string>
#include <thread>
#include <vector>

namespace lesskv::server_test {

// Dies with the test.
class ChildProcess {
 public:
  ChildProcess() = default;
  // `output`: a file for what it says.
  ChildProcess(std::vector<std::string> words, const std::string& output) : pid_(::fork()) {
    if (pid_ != 0) return;
    ::prctl(PR_SET_PDEATHSIG, SIGKILL);
    const int out = ::open(output.c_str(), O_WRONLY | O_CREAT | O_TRUNC, 0600);
    ::dup2(out, STDOUT_FILENO);
    ::dup2(out, STDERR_FILENO);
    std::vector<char*> arguments;
    for (std::string& word : words) arguments.push_back(word.data());
    arguments.push_back(nullptr);
    ::execvp(arguments[0], arguments.data());
    ::_exit(127);
  }
  ChildProcess(ChildProcess&& other) noexcept : pid_(std::exchange(other.pid_, -1)) {}
  ChildProcess& operator=(ChildProcess&& other) noexcept {
    std::swap(pid_, other.pid_);
    return *this;
  }
  ~ChildProcess() { Kill(SIGKILL); }

  void Signal(int signal) const {
    if (pid_ > 0) ::kill(pid_, signal);
  }
  // Its wait status.
  int Kill(int signal) {
    int status = 0;
    if (pid_ <= 0) return status;
    Signal(signal);
    ::waitpid(pid_, &status, 0);
    pid_ = -1;
    return status;
  }

 private:
  pid_t pid_ = -1;
};

inline sockaddr_in Loopback(int port) {
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_port = htons(static_cast<uint16_t>(port));
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  return address;
}

// One that nobody has now, below those that the kernel gives to clients: it is still free when the program comes that
// shall listen there. Tests that run at the same time look from different numbers on.
inline int FreePort() {
  constexpr int kFirst = 10000, kCount = 20000;
  static int next = static_cast<int>(::getpid() * 37L % kCount);
  for (int tries = 0; tries < kCount; ++tries) {
    const int port = kFirst + next++ % kCount, fd = ::socket(AF_INET, SOCK_STREAM, 0);
    const sockaddr_in address = Loopback(port);
    const bool is_free = ::bind(fd, reinterpret_cast<const sockaddr*>(&address), sizeof(address)) == 0;
    ::close(fd);
    if (is_free) return port;
  }
  return 0;
}

inline bool SomebodyListens(int port) {
  const int fd = ::socket(AF_INET, SOCK_STREAM, 0);
  const sockaddr_in address = Loopback(port);
  const bool connected = ::connect(fd, reinterpret_cast<const sockaddr*>(&address), sizeof(address)) == 0;
  ::close(fd);
  return connected;
}

inline bool WaitForListener(int port) {
  for (int i = 0; i < 3600; ++i, std::this_thread::sleep_for(std::chrono::milliseconds(50)))
    if (SomebodyListens(port)) return true;
  return false;
}

// What a command line prints.
inline std::string OutputOf(const std::string& command) {
  std::string text;
  std::FILE* const pipe = ::popen(command.c_str(), "r");
  for (int c; (c = std::fgetc(pipe)) != EOF;) text += static_cast<char>(c);
  ::pclose(pipe);
  return text;
}

// Programs of administrators are not on everybody's path.
inline std::string FindProgram(const std::string& name) {
  const std::string found = OutputOf(fmt::format("PATH=\"$PATH:/usr/sbin:/sbin\" command -v {}", name));
  return found.substr(0, found.find('\n'));
}

// A Redis at a free port of this machine, whose files lie in `folder`.
class RedisServer {
 public:
  static bool IsInstalled() { return !FindProgram("redis-server").empty() && !FindProgram("redis-cli").empty(); }

  RedisServer(std::string folder, std::vector<std::string> more = {})
      : folder_(std::move(folder)), more_(std::move(more)), port_(FreePort()) {
    Start();
  }
  bool Start() {
    std::filesystem::create_directories(folder_);
    std::vector<std::string> words = {"redis-server", "--port", std::to_string(port_), "--bind", "127.0.0.1"};
    words.insert(words.end(), {"--dir", folder_, "--save", "", "--appendonly", "no"});
    words.insert(words.end(), more_.begin(), more_.end());
    process_ = ChildProcess(words, folder_ + "/redis.log");
    return WaitForListener(port_);
  }
  int port() const { return port_; }
  ChildProcess& process() { return process_; }
  std::string Tell(const std::string& command) const {
    return OutputOf(fmt::format("redis-cli -p {} {} 2>&1", port_, command));
  }

 private:
  const std::string folder_;
  const std::vector<std::string> more_;
  const int port_;
  ChildProcess process_;
};

}  // namespace lesskv::server_test
