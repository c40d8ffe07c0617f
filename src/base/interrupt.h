// Ctrl-C (SIGINT) and SIGTERM without signal handlers: they are blocked in every thread and taken by a thread of their
// own. A handler would run on the stack of whatever thread the system picks, and foreign code does not always leave room
// below its stack pointer (a matrix product of oneDNN keeps that pointer inside a heap buffer).
#pragma once

#include <atomic>

namespace lesskv {

// To be called first in main: threads that exist already would not be protected. Until StopOnInterrupt is called, the
// signals end the process at once, as they do by default.
void TakeInterrupts();

// The flag that the first signal sets from now on; whoever works polls it. A second signal ends the process at once.
const std::atomic<bool>& StopOnInterrupt();
// Takes the flag back: the next signal is the first one again.
void ForgetInterrupt();

// While it lives the calling thread takes the signals itself, as by default or as a library on its stack wants it. For
// waiting at an input.
class InterruptsAsByDefault {
 public:
  InterruptsAsByDefault();
  ~InterruptsAsByDefault();
  InterruptsAsByDefault(const InterruptsAsByDefault&) = delete;
  InterruptsAsByDefault& operator=(const InterruptsAsByDefault&) = delete;
};

// The same around an editor of lines, where Ctrl-C is a key: SIGTERM is the calling thread's, and a SIGINT, which comes of
// the key when the terminal is not the editor's yet, means nothing; one that is taken only when the editor has gone is a
// first one: what was interrupted before is over.
class KeyInterrupts {
 public:
  KeyInterrupts();
  ~KeyInterrupts();
  KeyInterrupts(const KeyInterrupts&) = delete;
  KeyInterrupts& operator=(const KeyInterrupts&) = delete;
};

}  // namespace lesskv
