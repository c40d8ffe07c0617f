#include "base/interrupt.h"

#include <pthread.h>
#include <unistd.h>

#include <csignal>
#include <initializer_list>
#include <system_error>
#include <thread>

namespace lesskv {
namespace {

std::atomic<bool> g_polled{false}, g_interrupted{false}, g_is_key{false};

sigset_t Set(std::initializer_list<int> numbers) {
  sigset_t set;
  sigemptyset(&set);
  for (const int number : numbers) sigaddset(&set, number);
  return set;
}

sigset_t Interrupts() { return Set({SIGINT, SIGTERM}); }

// As the signal would have ended the process, so that whoever started it can tell.
[[noreturn]] void End(int number) {
  std::signal(number, SIG_DFL);
  const sigset_t set = Interrupts();
  pthread_sigmask(SIG_UNBLOCK, &set, nullptr);
  ::raise(number);
  ::_exit(128 + number);
}

void Wait() {
  const sigset_t set = Interrupts();
  for (;;) {
    int number = 0;
    if (sigwait(&set, &number) != 0 || (number == SIGINT && g_is_key)) continue;
    if (!g_polled || g_interrupted.exchange(true)) End(number);
  }
}

}  // namespace

void TakeInterrupts() {
  const sigset_t set = Interrupts();
  pthread_sigmask(SIG_BLOCK, &set, nullptr);
  try {
    std::thread(Wait).detach();
  } catch (const std::system_error&) {  // no thread to be had: the signals end the process, as by default
    pthread_sigmask(SIG_UNBLOCK, &set, nullptr);
  }
}

void ForgetInterrupt() { g_interrupted = false; }

InterruptsAsByDefault::InterruptsAsByDefault() {
  const sigset_t set = Interrupts();
  pthread_sigmask(SIG_UNBLOCK, &set, nullptr);
}

InterruptsAsByDefault::~InterruptsAsByDefault() {
  const sigset_t set = Interrupts();
  pthread_sigmask(SIG_BLOCK, &set, nullptr);
}

KeyInterrupts::KeyInterrupts() {
  g_is_key = true;
  ForgetInterrupt();
  const sigset_t set = Set({SIGTERM});
  pthread_sigmask(SIG_UNBLOCK, &set, nullptr);
}

KeyInterrupts::~KeyInterrupts() {
  const sigset_t set = Set({SIGTERM});
  pthread_sigmask(SIG_BLOCK, &set, nullptr);
  g_is_key = false;
}

const std::atomic<bool>& StopOnInterrupt() {
  g_polled = true;
  return g_interrupted;
}

}  // namespace lesskv
