// Many texts through one engine: a thread of its own runs one step after the other, each with what every running text
// has next, a piece of its prompt or its last token. Whoever asks for a text waits at a Job; it begins when its turn
// comes (WaitingTexts) and there are a place and the memory for it (CacheMemory).
#pragma once

#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <thread>
#include <vector>

#include "engine/engine.h"
#include "server/cache_memory.h"
#include "server/job.h"
#include "server/running_text.h"
#include "server/scheduler_metrics.h"
#include "server/scheduler_options.h"
#include "server/session_store.h"
#include "server/waiting_texts.h"
#include "tokenizer/tokenizer.h"

namespace lesskv {

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
  // One that has its place and its bytes, and begins when the store has said what it has. Others begin meanwhile.
  struct Loading {
    WaitingText text;
    std::shared_ptr<StoreLookup> lookup;
    std::chrono::steady_clock::time_point patience_end;
  };

  void Run();
  bool Prepare();  // false: stopped
  bool BeginWaiting();
  void DropWaiting();
  bool BeginNext(std::unique_lock<std::mutex>& lock);
  std::optional<Loading> NextLoaded();
  std::optional<WaitingText> NextAdmitted();
  bool StartLoading(const WaitingText& next);
  void Begin(const WaitingText& next, std::optional<Sequence> stored);
  void GiveBack(const WaitingText& admitted);

  void Step();
  void TakeStep();
  void ReadWhole(RunningText& text);
  void StepInPause();
  void RunStep(const std::vector<RunningText*>& texts, const std::function<void()>& pause = {});
  bool TriesAgain(RunningText& text, const Error& error);
  void FailStep(const std::vector<RunningText*>& texts, const std::vector<StepItem>& items, const Error& error);
  void Advance(RunningText& text);
  void TakeLogits(RunningText& text, std::span<const float> logits);
  std::vector<RunningText*> BeginChoices(RunningText& text);
  void TakeToken(RunningText& text, std::span<const float> logits);

  void EndCancelled();
  void FailOf(RunningText& text, const Error& error);
  void Settle();
  void ReportEnd(RunningText& text);

  Engine& engine_;
  const Tokenizer& tokenizer_;
  const SchedulerOptions options_;
  RunningTexts running_;                           // of the thread alone, as is what follows
  CacheMemory memory_;
  RunningText* reading_ = nullptr;                 // the one in the middle of whose prompt others take their steps
  std::chrono::steady_clock::time_point resumed_;  // since when that goes on,
  std::chrono::steady_clock::duration pause_due_;  // and for how long
  mutable std::mutex mutex_;                       // of what follows
  std::condition_variable work_;
  WaitingTexts waiting_;
  std::vector<Loading> loading_;
  SchedulerMetrics metrics_;
  std::vector<SlotState> slots_;
  size_t places_ = 0;  // of max_running, of the texts that have been admitted
  bool stopping_ = false;
  std::thread thread_;
};

}  // namespace lesskv
