// Many texts through one engine: a thread of its own runs one step after the other, each with what every running text
// has next, a piece of its prompt or its last token. Whoever asks for a text waits at a Job.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "engine/engine.h"
#include "engine/generate.h"
#include "tokenizer/tokenizer.h"

namespace lesskv {

struct JobRequest {
  std::vector<int32_t> prompt;  // at least one token, and one less than the context at most
  GenerationOptions options;    // max_tokens is a number, at least 1
  std::shared_ptr<const CacheConfig> config;
  std::chrono::steady_clock::time_point deadline = std::chrono::steady_clock::time_point::max();
};

// What a text has come to, by the time it was asked.
struct JobState {
  std::string new_text;                // since the last time
  std::optional<FinishReason> finish;  // the text has ended
  std::optional<Error> error;          // it cannot be gone on with
  size_t generated_tokens = 0;         // an end-of-generation token counts
  CacheStats stats;                    // of the cache, at the last step

  bool ended() const { return finish || error; }
};

// One text that was asked for. Thread-safe.
class Job {
 public:
  explicit Job(JobRequest request) : request_(std::move(request)) {}

  const JobRequest& request() const { return request_; }
  // Waits until there is something new, but no longer than `patience`.
  JobState Wait(std::chrono::milliseconds patience);
  // Nobody waits any more: the text leaves its next step.
  void Cancel() { cancelled_ = true; }

 private:
  friend class Scheduler;
  void Report(const std::string& text, const CacheStats& stats, std::optional<FinishReason> finish);  // of one token
  void Fail(const Error& error);

  const JobRequest request_;
  std::atomic<bool> cancelled_ = false;
  std::mutex mutex_;
  std::condition_variable news_;
  bool has_news_ = false;
  JobState state_;
};

struct SchedulerOptions {
  size_t max_running = 4;    // texts that share steps
  size_t max_queued = 16;    // texts that wait
  size_t kv_memory = 0;      // bytes of all running caches at their largest; 0: no bound
  size_t step_tokens = 256;  // of a prompt that a step takes where the cache does not say otherwise
};

// Counts since the beginning, and what is so now.
struct SchedulerMetrics {
  uint64_t jobs_finished = 0, jobs_failed = 0, jobs_cancelled = 0, jobs_rejected = 0;
  uint64_t prompt_tokens = 0, generated_tokens = 0, steps = 0;
  double tokens_evicted = 0, tokens_absorbed = 0;  // of ended texts; mean rows a KV head
  size_t running = 0, queued = 0;
  size_t kv_bytes = 0, kv_bytes_reserved = 0;  // held by running texts, and at most to be held by them
  double tokens_resident = 0;
};

// Thrown by Submit: there is no place now, and later there may be.
class BusyError : public Error {
 public:
  explicit BusyError(const std::string& message) : Error(ErrorCode::kRuntime, message) {}
};

class Scheduler {
 public:
  // Both must outlive it; nobody else may use the engine meanwhile.
  Scheduler(Engine& engine, const Tokenizer& tokenizer, const SchedulerOptions& options);
  ~Scheduler();  // Stop
  Scheduler(const Scheduler&) = delete;
  Scheduler& operator=(const Scheduler&) = delete;

  // Throws BusyError when the queue is full or the scheduler has been stopped, Error when the text can never run: its
  // cache would be larger than all memory for caches.
  std::shared_ptr<Job> Submit(JobRequest request);
  // Ends all texts, with an error, and the thread.
  void Stop();
  SchedulerMetrics Metrics() const;
  const SchedulerOptions& options() const { return options_; }

 private:
  // A text that takes part in steps.
  struct Running {
    std::shared_ptr<Job> job;
    size_t bytes;  // its cache at its largest
    Sequence sequence;
    size_t fed = 0;           // tokens of the prompt
    size_t next_fed = 0;      // of which the step in work takes so many more
    int32_t last_token = -1;  // sampled, not fed
    std::optional<Generation> generation = {};
    bool ended = false;

    bool in_prompt() const { return fed < job->request().prompt.size(); }
  };
  struct Waiting {
    std::shared_ptr<Job> job;
    size_t bytes;
  };

  void Run();
  bool Prepare();  // false: stopped
  void DropWaiting();
  void Admit();
  void Step();
  std::vector<StepItem> Items();
  StepItem PromptItem(Running& text, size_t tag, size_t& budget);
  void Advance(Running& text);
  void FailStep(const std::vector<StepItem>& items, const Error& error);
  void TakeLogits(Running& text, std::span<const float> logits);
  void EndOf(Running& text, const std::string& rest, FinishReason reason);
  void FailOf(Running& text, const Error& error);
  void EndCancelled();
  void Settle();

  Engine& engine_;
  const Tokenizer& tokenizer_;
  const SchedulerOptions options_;
  std::vector<std::unique_ptr<Running>> running_;  // of the thread alone
  mutable std::mutex mutex_;                       // of what follows
  std::condition_variable work_;
  std::deque<Waiting> waiting_;
  SchedulerMetrics metrics_;
  bool stopping_ = false;
  std::thread thread_;
};

}  // namespace lesskv
