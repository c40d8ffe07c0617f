// A text, or several of one prompt, that somebody asked for: what was asked, and what has come of it so far.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "engine/generate.h"
#include "engine/resident_runs.h"
#include "kvcache/sequence_cache.h"

namespace lesskv {

struct JobRequest {
  std::vector<int32_t> prompt;  // at least one token, and one less than the context at most
  GenerationOptions options;    // max_tokens is a number, at least 1
  std::shared_ptr<const CacheConfig> config;
  std::string client = {};  // who asks: places go round among clients
  std::chrono::steady_clock::time_point deadline = std::chrono::steady_clock::time_point::max();
  // Texts that go on from the prompt, which is read once: each with a copy of its cache and the seed plus its number.
  size_t choices = 1;   // at most as many texts as may run; more than one has no pictures
  bool reuse = true;    // may go on with a cache that has seen the prompt's beginning
  size_t kv_every = 0;  // with every so many generated tokens comes a picture of the cache; 0: none
};

// Who is in a cache.
struct CachePicture {
  CacheStats stats;
  ResidentRuns layers;
};
CachePicture Picture(const SequenceCache& cache);

// There is no place now, and later there may be; where `stopping`, in another process. Thrown by Submit, and what a job
// fails with whose place in the queue went to another client, or that the end of the server cut.
class BusyError : public Error {
 public:
  explicit BusyError(const std::string& message, bool stopping = false)
      : Error(ErrorCode::kRuntime, message), stopping_(stopping) {}
  bool stopping() const { return stopping_; }

 private:
  bool stopping_;
};

// What one of a job's texts has come to, by the time it was asked.
struct ChoiceState {
  std::string new_text;                         // since the last time
  std::vector<GeneratedToken> new_tokens;       // likewise; where log-probabilities were asked for
  std::optional<FinishReason> finish;           // the text has ended
  size_t generated_tokens = 0;                  // an end-of-generation token counts
  CacheStats stats;                             // of the cache, at the last step
  std::shared_ptr<const CachePicture> picture;  // a new one, if there is one
};

struct JobState {
  std::vector<ChoiceState> choices;
  std::optional<Error> error;     // none of the texts can be gone on with
  std::optional<BusyError> busy;  // the error, where it is one
  size_t cached_tokens = 0;       // of the prompt, that needed no reading

  bool finished() const;  // all texts have ended
  bool ended() const { return error || finished(); }
  size_t generated_tokens() const;  // of all texts
  // What came later, behind what is here already.
  void Append(JobState later);
};

// What was asked for: one text, or several of one prompt. Thread-safe.
class Job {
 public:
  explicit Job(JobRequest request) : request_(std::move(request)) { state_.choices.resize(request_.choices); }

  const JobRequest& request() const { return request_; }
  // Waits until there is something new, but no longer than `patience`.
  JobState Wait(std::chrono::milliseconds patience);
  // Nobody waits any more: the text leaves its next step.
  void Cancel() { cancelled_ = true; }
  const std::atomic<bool>& cancelled() const { return cancelled_; }

 private:
  friend class Scheduler;
  void Begin(size_t cached_tokens);
  // Of one token of a text. Returns whether all texts have ended.
  bool Report(size_t choice, Generation::Output output, const CacheStats& stats);
  void Show(CachePicture picture);  // of the only text
  void Fail(const Error& error);

  const JobRequest request_;
  std::atomic<bool> cancelled_ = false;
  std::mutex mutex_;
  std::condition_variable news_;
  bool has_news_ = false;
  JobState state_;
};

}  // namespace lesskv
