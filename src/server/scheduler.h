// Many texts through one engine: a thread of its own runs one step after the other, each with what every running text
// has next, a piece of its prompt or its last token. Whoever asks for a text waits at a Job.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "engine/engine.h"
#include "engine/generate.h"
#include "engine/resident_runs.h"
#include "server/prefix_cache.h"
#include "server/session_store.h"
#include "tokenizer/tokenizer.h"

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
};

// What /slots shows of a running text.
struct SlotState {
  std::string spec;
  size_t prompt_tokens = 0, prompt_read = 0, cached_tokens = 0, generated_tokens = 0;
  size_t kv_bytes = 0, kv_bytes_reserved = 0;
  double tokens_resident = 0;
};

class Scheduler {
 public:
  // All must outlive it; nobody else may use the engine meanwhile. `store`: where idle caches are saved, or null.
  Scheduler(Engine& engine, const Tokenizer& tokenizer, const SchedulerOptions& options, SessionStore* store = nullptr);
  ~Scheduler();  // Stop
  Scheduler(const Scheduler&) = delete;
  Scheduler& operator=(const Scheduler&) = delete;

  // Throws BusyError when the queue is full or the scheduler has been stopped, Error when the text can never run: its
  // caches would be larger than all memory for caches, its choices more than the texts that may run. In a full queue a
  // client with few texts takes the place of the last one of the client that has most, which then is refused.
  std::shared_ptr<Job> Submit(JobRequest request);
  // Ends all texts, with an error, and the thread.
  void Stop();
  SchedulerMetrics Metrics() const;
  std::vector<SlotState> Slots() const;  // of the running texts
  const SchedulerOptions& options() const { return options_; }

 private:
  // A text that takes part in steps.
  struct Running {
    std::shared_ptr<Job> job;
    size_t bytes;  // its cache at its largest; until the prompt is read, those of all choices together
    size_t each;   // a cache at its largest
    Sequence sequence;
    size_t places = 1;        // of max_running; likewise
    size_t choice = 0;        // of the job
    size_t cached = 0;        // tokens of the prompt that the sequence had seen already
    size_t fed = 0;           // tokens of the prompt, these included
    size_t next_fed = 0;      // of which the step in work takes so many more
    size_t shared = 0;        // tokens of the prompt at which a copy is kept, for others that begin so; 0: nowhere
    size_t counted = 0;       // bytes of its cache that are counted with another running one (CountShared)
    CacheStats before = {};   // of the sequence, when the text began
    int32_t last_token = -1;  // sampled, not fed
    std::optional<Generation> generation = {};
    std::optional<Generation::Output> last = {};  // the text's end, not yet reported
    bool tries_again = false;  // the last step found no room on the disk
    bool ended = false;

    bool in_prompt() const { return fed < job->request().prompt.size(); }
  };
  struct Waiting {
    std::shared_ptr<Job> job;
    size_t bytes, each;  // of Running
    uint64_t turn = 0;   // the lowest is next; of equal ones the first that came
    bool joins = false;  // there is room for it only beside running texts that share its beginning
  };
  // One that has its place and its bytes, and begins when the store has said what it has. Others begin meanwhile.
  struct Loading {
    Waiting text;
    std::shared_ptr<StoreLookup> lookup;
    std::chrono::steady_clock::time_point patience_end;
  };

  void Run();
  bool Prepare();  // false: stopped
  void DropWaiting();
  bool BeginNext(std::unique_lock<std::mutex>& lock);
  bool KeepPlace(const std::string& client);
  size_t WaitingForOthers() const;
  uint64_t NextTurn(const std::string& client) const;
  std::optional<Waiting> NextAdmitted();
  size_t RunningPlaces() const;
  std::optional<Loading> NextLoaded();
  bool StartLoading(const Waiting& next);
  void Begin(const Waiting& next, std::optional<Sequence> stored);
  Sequence BeginSequence(const Waiting& next, std::optional<Sequence> stored);
  std::optional<Sequence> FindBeginning(const JobRequest& request, std::optional<Sequence> stored);
  void CountShared(std::ptrdiff_t reserved = 0);
  size_t Reserved() const;
  bool HasRoom(size_t more) const;
  void MakeRoom(const PrefixCache::Entry* spared, size_t more = 0);
  size_t DropIdle(const PrefixCache::Entry* spared, bool on_disk);
  size_t SharedBeginning(const Running& text) const;
  void KeepShared(const Running& text);
  void Keep(Sequence sequence, bool shared);
  void ReturnMemory(size_t bytes);
  void Step();
  bool MustReadWhole(const Running& text) const;
  void ReadWhole(Running& text);
  void StepInPause();
  bool BeginWaiting();
  void TakeStep();
  std::vector<StepItem> Items();
  StepItem PromptItem(Running& text, size_t tag, size_t& budget);
  bool TriesAgain(Running& text, const Error& error);
  void Advance(Running& text);
  void FailStep(const std::vector<StepItem>& items, const Error& error);
  void TakeLogits(Running& text, std::span<const float> logits);
  std::vector<Running*> BeginChoices(Running& text);
  void TakeToken(Running& text, std::span<const float> logits);
  void FailOf(Running& text, const Error& error);
  void EndCancelled();
  void ReportEnd(Running& text);
  void Settle();
  void CountEnded(const Running& text);

  Engine& engine_;
  const Tokenizer& tokenizer_;
  const SchedulerOptions options_;
  SessionStore* const store_;
  std::vector<std::unique_ptr<Running>> running_;  // of the thread alone
  Running* reading_ = nullptr;                     // the one in the middle of whose prompt others take their steps
  std::chrono::steady_clock::time_point resumed_;  // since when that goes on,
  std::chrono::steady_clock::duration pause_due_;  // and for how long
  PrefixCache idle_;                               // of the thread alone, too
  const PrefixCache::Entry* beginning_ = nullptr;  // what the text that begins at the moment goes on with or copies
  size_t unreturned_ = 0;                          // bytes freed since the system got memory back
  mutable std::mutex mutex_;                       // of what follows
  std::condition_variable work_;
  std::deque<Waiting> waiting_;                  // in the order they came
  uint64_t turn_ = 0;                            // of the last text that was admitted
  std::map<std::string, uint64_t> turns_after_;  // of clients: behind their last admitted text, where that is beyond
  std::vector<Loading> loading_;
  SchedulerMetrics metrics_;
  size_t places_ = 0;  // of max_running, of the texts that have been admitted
  size_t shared_ = 0;  // of metrics_.kv_bytes_reserved, what is there once for several texts
  std::vector<SlotState> slots_;
  bool stopping_ = false;
  std::thread thread_;
};

}  // namespace lesskv
