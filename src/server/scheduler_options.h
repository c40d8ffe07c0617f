#pragma once

#include <chrono>
#include <cstddef>

namespace lesskv {

struct SchedulerOptions {
  size_t max_running = 4;    // texts that share steps
  size_t max_queued = 16;    // texts that wait for others to end
  size_t kv_memory = 0;      // bytes of all running caches at their largest, and of idle ones; 0: no bound
  size_t step_tokens = 256;  // of a prompt that a step takes where the cache does not say otherwise
  // A longer prompt that its method must see whole pauses for the others' steps, at the earliest after this time.
  std::chrono::milliseconds pause_after{50};
  size_t max_idle = 64;      // caches that are kept when their texts have ended; 0: every prompt is read anew
  size_t min_shared = 32;    // tokens: a beginning that two prompts share is kept from this length on
  std::chrono::milliseconds store_patience{10000};  // for a stored conversation; then its text is read anew
};

}  // namespace lesskv
