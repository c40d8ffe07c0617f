#include "server/scheduler.h"

#include <algorithm>
#include <new>
#include <utility>

#include "base/memory.h"

namespace lesskv {

using Clock = std::chrono::steady_clock;

namespace {

constexpr const char* kStopping = "the server is stopping";
constexpr const char* kQueueFull = "too many requests are waiting already";

// What `body` fails with, if it does: `no_memory` where the system has none.
template <typename Body>
std::optional<Error> Failure(const char* no_memory, Body&& body) {
  try {
    body();
  } catch (const Error& error) {
    return error;
  } catch (const std::bad_alloc&) {
    return Error(ErrorCode::kOutOfMemory, no_memory);
  }
  return std::nullopt;
}

}  // namespace

Scheduler::Scheduler(Engine& engine, const Tokenizer& tokenizer, const SchedulerOptions& options, SessionStore* store)
    : engine_(engine),
      tokenizer_(tokenizer),
      options_(options),
      memory_(options_, store, running_),
      waiting_(options_),
      thread_([this] { Run(); }) {}

Scheduler::~Scheduler() { Stop(); }

std::shared_ptr<Job> Scheduler::Submit(JobRequest request) {
  if (request.choices < 1 || request.choices > options_.max_running)
    Fail(ErrorCode::kInvalidArgument, "a request may have 1 to {} choices, which run together, not {}",
         options_.max_running, request.choices);
  const size_t each = request.config->Plan(request.prompt.size(), request.options.max_tokens).bytes_peak;
  const size_t further = each - (request.choices == 1 ? 0 : request.config->SharedBytes(request.prompt.size()));
  const size_t bytes = each + (request.choices - 1) * further;
  if (options_.kv_memory != 0 && bytes > options_.kv_memory)
    Fail(ErrorCode::kInvalidArgument, "the {} may take {}, of {} for all caches",
         request.choices == 1 ? "text's cache" : fmt::format("caches of {} choices", request.choices),
         HumanBytes(bytes), HumanBytes(options_.kv_memory));
  auto job = std::make_shared<Job>(std::move(request));
  const std::lock_guard lock(mutex_);
  const std::shared_ptr<Job> refused =
      stopping_ ? job : waiting_.Add({.job = job, .bytes = bytes, .each = each}, places_, memory_.reserved());
  if (refused != nullptr) ++metrics_.jobs_rejected;
  if (refused == job) throw BusyError(stopping_ ? kStopping : kQueueFull, stopping_);
  if (refused != nullptr) refused->Fail(BusyError(kQueueFull));
  work_.notify_all();
  return job;
}

void Scheduler::Stop() {
  {
    const std::lock_guard lock(mutex_);
    stopping_ = true;
    work_.notify_all();
  }
  if (thread_.joinable()) thread_.join();
}

SchedulerMetrics Scheduler::Metrics() const {
  const std::lock_guard lock(mutex_);
  SchedulerMetrics metrics = metrics_;
  metrics.kv_bytes_reserved = memory_.reserved();
  metrics.idle_dropped = memory_.dropped();
  metrics.queued = waiting_.texts().size();
  metrics.loading = loading_.size();
  return metrics;
}

std::vector<SlotState> Scheduler::Slots() const {
  const std::lock_guard lock(mutex_);
  return slots_;
}

void Scheduler::Run() {
  while (Prepare()) {
    Step();
    Settle();
  }
  const BusyError stopping(kStopping, true);
  for (const auto& text : running_) FailOf(*text, stopping);
  Settle();
  const std::lock_guard lock(mutex_);
  for (const WaitingText& waiting : waiting_.texts()) waiting.job->Fail(stopping);
  for (const Loading& loading : loading_) loading.text.job->Fail(stopping);
  waiting_.DropIf([](const WaitingText&) { return true; });
  loading_.clear();
}

// --- Who begins ---

bool Scheduler::Prepare() {
  // Those that wait behind running ones may be cancelled or late meanwhile, so that nobody waits for ever here. The
  // store is looked at often: what it brings back takes milliseconds.
  constexpr auto kLook = std::chrono::milliseconds(50), kLookAtStore = std::chrono::milliseconds(2);
  std::unique_lock lock(mutex_);
  while (!stopping_) {
    DropWaiting();
    if (BeginNext(lock)) continue;
    if (!running_.empty()) return true;
    const bool waits = !waiting_.texts().empty();
    work_.wait_for(lock, !loading_.empty() ? kLookAtStore : waits ? kLook : std::chrono::milliseconds(1000));
  }
  return false;
}

// The same in the middle of a step, where nobody is waited for.
bool Scheduler::BeginWaiting() {
  std::unique_lock lock(mutex_);
  DropWaiting();
  while (!stopping_ && BeginNext(lock)) {
  }
  return !stopping_;
}

void Scheduler::DropWaiting() {
  const auto now = Clock::now();
  const auto dropped = [&](const WaitingText& waiting) {
    const bool late = waiting.job->request().deadline <= now;
    if (!late && !waiting.job->cancelled()) return false;
    ++(late ? metrics_.jobs_failed : metrics_.jobs_cancelled);
    waiting.job->Fail(Error(ErrorCode::kRuntime, late ? "the request's time ran out before it began" : "cancelled"));
    return true;
  };
  waiting_.DropIf(dropped);
  std::erase_if(loading_, [&](const Loading& loading) {
    if (!dropped(loading.text)) return false;
    GiveBack(loading.text);
    return true;
  });
}

// One that the store has answered, or the next that has a place; false: there is none. Copying a cache, and freeing
// one, takes its time, so that the lock is let go of.
bool Scheduler::BeginNext(std::unique_lock<std::mutex>& lock) {
  if (std::optional<Loading> loaded = NextLoaded()) {
    lock.unlock();
    Begin(loaded->text, loaded->lookup->done() ? loaded->lookup->Take() : std::nullopt);
    lock.lock();
    return true;
  }
  if (const std::optional<WaitingText> next = NextAdmitted()) {
    lock.unlock();
    if (next->joins || !StartLoading(*next)) Begin(*next, std::nullopt);
    lock.lock();
    return true;
  }
  return false;
}

std::optional<Scheduler::Loading> Scheduler::NextLoaded() {
  const auto now = Clock::now();
  const auto ready = std::ranges::find_if(
      loading_, [&](const Loading& loading) { return loading.lookup->done() || loading.patience_end <= now; });
  if (ready == loading_.end()) return std::nullopt;
  Loading loaded = std::move(*ready);
  loading_.erase(ready);
  return loaded;
}

// Who is next and does not fit yet is waited for: a large text is not overtaken by small ones for ever.
std::optional<WaitingText> Scheduler::NextAdmitted() {
  WaitingText* const next = waiting_.Next();
  if (next == nullptr || places_ + next->places() > options_.max_running || !memory_.Reserve(*next))
    return std::nullopt;
  places_ += next->places();
  return waiting_.TakeNext();
}

void Scheduler::GiveBack(const WaitingText& admitted) {
  memory_.Release(admitted.bytes);
  places_ -= admitted.places();
}

// False: there is nothing that the store would be waited for.
bool Scheduler::StartLoading(const WaitingText& next) {
  std::shared_ptr<StoreLookup> lookup = memory_.AskStore(next.job->request());
  if (lookup == nullptr) return false;
  const std::lock_guard lock(mutex_);
  loading_.push_back({next, std::move(lookup), Clock::now() + options_.store_patience});
  return true;
}

void Scheduler::Begin(const WaitingText& next, std::optional<Sequence> stored) {
  const auto failure = Failure("memory for the text's cache cannot be had", [&] {
    auto text = std::make_unique<RunningText>(RunningText{.job = next.job,
                                                          .bytes = next.bytes,
                                                          .each = next.each,
                                                          .sequence = memory_.Begin(next, std::move(stored)),
                                                          .places = next.places()});
    text->before = text->sequence.Stats();
    text->cached = text->fed = text->sequence.tokens().size();
    text->shared = memory_.SharedBeginning(*text);
    next.job->Begin(text->cached);
    const std::lock_guard lock(mutex_);
    metrics_.prefix_hits += text->cached > 0;
    metrics_.Of(text->sequence.config().spec_text()).prefix_hits += text->cached > 0;
    metrics_.prefix_tokens += text->cached;
    metrics_.running += text->places;
    running_.push_back(std::move(text));
  });
  if (failure) {
    next.job->Fail(*failure);
    const std::lock_guard lock(mutex_);
    GiveBack(next);
    ++metrics_.jobs_failed;
  }
  memory_.CountShared();
}

// --- Steps ---

void Scheduler::Step() {
  EndCancelled();
  TakeStep();
  const auto whole =
      std::ranges::find_if(running_, [&](const auto& text) { return text->NeedsOwnStep(options_.step_tokens); });
  if (whole != running_.end()) ReadWhole(**whole);
}

// One step that texts share.
void Scheduler::TakeStep() {
  std::vector<RunningText*> texts;
  for (const auto& text : running_)  // the one in whose pause this is has perhaps ended already
    if (!text->ended && !text->NeedsOwnStep(options_.step_tokens)) texts.push_back(text.get());
  RunStep(texts);
}

// One step of its own for a long prompt, in the middle of which the others go on. What comes out is what the prompt
// gives alone, whoever runs beside it.
void Scheduler::ReadWhole(RunningText& text) {
  reading_ = &text;
  resumed_ = Clock::now();
  pause_due_ = options_.pause_after;
  RunStep({&text}, [this] { StepInPause(); });
  reading_ = nullptr;
}

// The prompt has four fifths of the time, but nobody waits for more than ten times `pause_after` and a tile.
void Scheduler::StepInPause() {
  const auto begin = Clock::now();
  if (begin - resumed_ < pause_due_) return;
  if (BeginWaiting()) {
    EndCancelled();
    TakeStep();
  } else {
    FailOf(*reading_, BusyError(kStopping, true));
  }
  if (reading_->ended) reading_->job->Cancel();  // its time is over: it leaves the step
  Settle();
  resumed_ = Clock::now();
  pause_due_ = std::clamp<Clock::duration>(4 * (resumed_ - begin), options_.pause_after, 10 * options_.pause_after);
}

// Each text gives what it has next, as far as `step_tokens` go; the engine runs it all; then pieces of prompts are read
// and tokens sampled.
void Scheduler::RunStep(const std::vector<RunningText*>& texts, const std::function<void()>& pause) {
  std::vector<StepItem> items;
  size_t budget = options_.step_tokens;
  for (size_t i = 0; i < texts.size(); ++i)
    if (!texts[i]->in_prompt() || budget > 0) items.push_back(texts[i]->NextItem(i, budget));
  if (items.empty()) return;
  const auto on_failure = [&](size_t i, const Error& error) {
    if (!TriesAgain(*texts[i], error)) FailOf(*texts[i], error);
  };
  std::vector<std::pair<size_t, std::vector<float>>> logits;
  const LogitsSink sink = [&](std::span<const LogitsRow> tile) {
    for (const LogitsRow& row : tile) logits.emplace_back(row.tag, std::vector(row.logits.begin(), row.logits.end()));
  };
  const auto failure = Failure("memory for a step cannot be had", [&] {
    engine_.Step(items, sink, {.on_failure = on_failure, .pause = pause});
  });
  if (failure) return FailStep(texts, items, *failure);
  {
    const std::lock_guard lock(mutex_);
    ++metrics_.steps;
  }
  for (const StepItem& item : items)
    if (RunningText& text = *texts[item.tag]; !text.ended && text.in_prompt()) Advance(text);
  for (const auto& [i, row] : logits)
    if (!texts[i]->ended) TakeLogits(*texts[i], row);
}

// Caches have the room of a step, also that on a disk, before it begins, so that a text that finds none has lost
// nothing: an idle cache that has rows there goes, and the text takes its step again. Once more where there is none:
// another text of the same step may have made room.
bool Scheduler::TriesAgain(RunningText& text, const Error& error) {
  if (error.code() != ErrorCode::kIo || text.sequence.interrupted()) return false;
  if (!memory_.MakeRoomOnDisk() && std::exchange(text.tries_again, true)) return false;
  text.next_fed = 0;
  return true;
}

// A step that did not happen, for lack of work memory as a rule: prompts are what took it, so generating texts go on.
void Scheduler::FailStep(const std::vector<RunningText*>& texts, const std::vector<StepItem>& items,
                         const Error& error) {
  const bool has_prompts =
      std::ranges::any_of(items, [&](const StepItem& item) { return texts[item.tag]->in_prompt(); });
  for (const StepItem& item : items) {
    RunningText& text = *texts[item.tag];
    if (!has_prompts || text.in_prompt() || text.sequence.interrupted()) FailOf(text, error);
  }
}

// The step has read its piece of the prompt.
void Scheduler::Advance(RunningText& text) {
  if (text.next_fed == 0) return;
  text.tries_again = false;
  text.fed += text.next_fed;
  if (text.fed == text.shared) memory_.KeepShared(text);
  if (text.in_prompt()) return;
  const auto failure =
      Failure("memory for the text's cache cannot be had", [&] { text.sequence.cache().EndPrompt(); });
  if (failure) FailOf(text, *failure);
}

void Scheduler::TakeLogits(RunningText& text, std::span<const float> logits) {
  const auto failure = Failure("memory for the text cannot be had", [&] {
    if (text.generation) return TakeToken(text, logits);
    for (RunningText* const choice : BeginChoices(text)) TakeToken(*choice, logits);
  });
  if (failure) FailOf(text, *failure);
}

// The prompt has been read. Each further choice goes on with a copy of the sequence, in the place that was kept for it;
// from now on each has its own bytes, and what they share is counted as it is.
std::vector<RunningText*> Scheduler::BeginChoices(RunningText& text) {
  const JobRequest& request = text.job->request();
  RunningTexts copies;
  for (size_t choice = 1; choice < request.choices; ++choice) {
    copies.push_back(std::make_unique<RunningText>(RunningText{.job = text.job,
                                                               .bytes = text.each,
                                                               .each = text.each,
                                                               .sequence = text.sequence.Clone(),
                                                               .choice = choice,
                                                               .cached = text.fed,
                                                               .fed = text.fed}));
    copies.back()->before = copies.back()->sequence.Stats();
  }
  std::vector<RunningText*> choices = {&text};
  choices.reserve(request.choices);
  running_.reserve(running_.size() + copies.size());
  for (auto& copy : copies) {
    choices.push_back(copy.get());
    running_.push_back(std::move(copy));
  }
  const size_t reserved = std::exchange(text.bytes, text.each);
  text.places = 1;
  if (request.choices > 1) memory_.CountShared(static_cast<std::ptrdiff_t>(request.choices * text.each - reserved));
  GenerationOptions options = request.options;
  for (RunningText* const choice : choices) {
    choice->generation.emplace(tokenizer_, options, request.prompt, request.config->shape().ctx);
    ++options.sampler.seed;
  }
  return choices;
}

void Scheduler::TakeToken(RunningText& text, std::span<const float> logits) {
  text.tries_again = false;
  Generation::Output out = text.generation->Push(logits);
  text.last_token = out.token;
  const size_t every = text.job->request().kv_every, n = text.generation->tokens().size();
  if (every != 0 && (out.finish || n % every == 1 % every)) text.job->Show(Picture(text.sequence.cache()));
  text.ended = out.finish.has_value();
  if (text.ended)
    text.last = std::move(out);  // told when its place is free (Settle)
  else
    text.job->Report(text.choice, std::move(out), text.sequence.Stats());
}

// --- Ends ---

// Between steps: texts that nobody waits for, and those whose time is over.
void Scheduler::EndCancelled() {
  for (const auto& text : running_) {
    if (text->job->cancelled())
      FailOf(*text, Error(ErrorCode::kRuntime, "cancelled"));
    else if (text->job->request().deadline <= Clock::now())
      FailOf(*text, Error(ErrorCode::kRuntime, "the request's time ran out"));
  }
  Settle();
}

// What ends one choice by a failure ends the others, too.
void Scheduler::FailOf(RunningText& text, const Error& error) {
  if (text.ended) return;
  for (const auto& other : running_)
    if (other->job == text.job) other->ended = true;
  const bool cancelled = text.job->cancelled();  // whoever waits cancels when it has heard of the failure
  text.job->Fail(error);
  const std::lock_guard lock(mutex_);
  ++(cancelled ? metrics_.jobs_cancelled : metrics_.jobs_failed);
}

// Lets ended texts go, whose caches stay as idle ones, and counts. Who hears of an end finds its place free.
void Scheduler::Settle() {
  RunningTexts ended;
  for (auto& text : running_)
    if (text->ended && text.get() != reading_) ended.push_back(std::move(text));
  std::erase(running_, nullptr);
  std::ptrdiff_t released = 0;
  for (const auto& text : ended) {
    released += static_cast<std::ptrdiff_t>(text->bytes);
    const std::lock_guard lock(mutex_);
    places_ -= text->places;
    metrics_.CountEnded(*text);
  }
  if (!ended.empty()) memory_.CountShared(-released);
  for (const auto& text : ended) {
    ReportEnd(*text);
    memory_.KeepEnded(std::move(text->sequence));
  }
  const std::lock_guard lock(mutex_);
  metrics_.CountPresent(running_, memory_.idle());
  slots_.clear();
  for (const auto& text : running_) slots_.push_back(Slot(*text));
}

void Scheduler::ReportEnd(RunningText& text) {
  if (!text.last || !text.job->Report(text.choice, std::move(*text.last), text.sequence.Stats())) return;
  const std::lock_guard lock(mutex_);
  ++metrics_.jobs_finished;
}

}  // namespace lesskv
