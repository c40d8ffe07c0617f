// What a scheduler tells of its texts.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <string>

#include "server/prefix_cache.h"
#include "server/running_text.h"

namespace lesskv {

// What the texts of one cache spec have come to: counts of ended texts, means over KV heads where they are tokens.
struct SpecMetrics {
  double tokens_evicted = 0, tokens_absorbed = 0, tokens_merged = 0, tokens_recalled = 0;
  uint64_t prefix_hits = 0;
  // Now, of running texts: bytes that their caches hold, and that f16 full caches of the same texts would hold. Memory
  // that several hold counts once, with the text that began first, and with idle caches where no running one has it.
  size_t running = 0, kv_bytes = 0, kv_bytes_logical = 0;
  double tokens_resident = 0;
  size_t idle = 0, idle_bytes = 0;  // caches of texts that have ended
};

// Counts since the beginning, and what is so now.
struct SchedulerMetrics {
  uint64_t jobs_finished = 0, jobs_failed = 0, jobs_cancelled = 0, jobs_rejected = 0;
  uint64_t prompt_tokens = 0, generated_tokens = 0, steps = 0;
  std::map<std::string, SpecMetrics> specs;  // at most kMostSpecs, and kOtherSpecs for the rest
  size_t running = 0, loading = 0, queued = 0;
  size_t kv_bytes = 0, kv_bytes_reserved = 0;  // held by running texts (shared memory once), and at most to be held
  uint64_t prefix_hits = 0, prefix_tokens = 0;  // texts that went on with a cache, and prompt tokens they did not read
  uint64_t idle_dropped = 0;                    // idle caches that had to make room
  size_t idle = 0, idle_bytes = 0;              // caches of texts that have ended

  static constexpr size_t kMostSpecs = 32;
  static constexpr const char* kOtherSpecs = "other";
  SpecMetrics& Of(const std::string& spec);
  void CountEnded(const RunningText& text);
  // What is so now, but for what waits.
  void CountPresent(const RunningTexts& running, const PrefixCache& idle);
};

// What /slots shows of a running text.
struct SlotState {
  std::string spec;
  size_t prompt_tokens = 0, prompt_read = 0, cached_tokens = 0, generated_tokens = 0;
  size_t kv_bytes = 0, kv_bytes_reserved = 0;
  double tokens_resident = 0;
};
SlotState Slot(const RunningText& text);

}  // namespace lesskv
