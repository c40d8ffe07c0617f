#include "server/scheduler.h"

#include <malloc.h>

#include <algorithm>
#include <iterator>
#include <utility>

#include "base/memory.h"
#include "kernels/linear/linear.h"  // kMostFewTokens

namespace lesskv {

using Clock = std::chrono::steady_clock;

namespace {

constexpr const char* kStopping = "the server is stopping";
constexpr const char* kQueueFull = "too many requests are waiting already";

// Whether the cache's method wants to see all of a prompt in one step.
bool SeesPromptWhole(const CacheConfig& config) { return config.prefill_chunk() == 0 && !NeverEvicts(config); }

// A few tokens at a time are multiplied with other roundings than many. So that a prompt gives the same wherever it is
// cut, no piece of it is so short where that can be helped.
constexpr size_t kShortestPiece = kMostFewTokens + 1;

// The next piece of `left` tokens that are read in pieces of `most`.
size_t NextPiece(size_t left, size_t most) {
  if (most >= left) return left;
  const size_t rest = left - most;
  return rest < kShortestPiece && most >= 2 * kShortestPiece ? most - (kShortestPiece - rest) : most;
}

}  // namespace

bool JobState::finished() const {
  return std::ranges::all_of(choices, [](const ChoiceState& choice) { return choice.finish.has_value(); });
}

size_t JobState::generated_tokens() const {
  size_t sum = 0;
  for (const ChoiceState& choice : choices) sum += choice.generated_tokens;
  return sum;
}

void JobState::Append(JobState later) {
  for (size_t i = 0; i < choices.size(); ++i) {
    ChoiceState& whole = choices[i];
    ChoiceState& more = later.choices[i];
    whole.new_text += more.new_text;
    std::ranges::move(more.new_tokens, std::back_inserter(whole.new_tokens));
    more.new_text = std::move(whole.new_text);
    more.new_tokens = std::move(whole.new_tokens);
  }
  *this = std::move(later);
}

SpecMetrics& SchedulerMetrics::Of(const std::string& spec) {
  return specs[specs.contains(spec) || specs.size() < kMostSpecs ? spec : kOtherSpecs];
}

JobState Job::Wait(std::chrono::milliseconds patience) {
  std::unique_lock lock(mutex_);
  news_.wait_for(lock, patience, [&] { return has_news_ || state_.ended(); });
  has_news_ = false;
  JobState result = state_;
  for (ChoiceState& choice : state_.choices) {
    choice.new_text.clear();
    choice.new_tokens.clear();
    choice.picture.reset();
  }
  return result;
}

void Job::Begin(size_t cached_tokens) {
  const std::lock_guard lock(mutex_);
  state_.cached_tokens = cached_tokens;
}

void Job::Show(CachePicture picture) {
  const auto shown = std::make_shared<const CachePicture>(std::move(picture));
  const std::lock_guard lock(mutex_);
  state_.choices[0].picture = shown;
}

bool Job::Report(size_t choice, Generation::Output output, const CacheStats& stats) {
  bool finished = false;
  {
    const std::lock_guard lock(mutex_);
    ChoiceState& state = state_.choices[choice];
    state.new_text += output.text;
    std::ranges::move(output.tokens, std::back_inserter(state.new_tokens));
    state.stats = stats;
    ++state.generated_tokens;
    state.finish = output.finish;
    finished = state_.finished();
    has_news_ = true;
  }
  news_.notify_all();
  return finished;
}

void Job::Fail(const Error& error) {
  {
    const std::lock_guard lock(mutex_);
    state_.error = error;
    if (const auto* const busy = dynamic_cast<const BusyError*>(&error)) state_.busy = *busy;
    has_news_ = true;
  }
  news_.notify_all();
}

CachePicture Picture(const SequenceCache& cache) { return {cache.Stats(), ReadResidentRuns(cache)}; }

Scheduler::Scheduler(Engine& engine, const Tokenizer& tokenizer, const SchedulerOptions& options, SessionStore* store)
    : engine_(engine), tokenizer_(tokenizer), options_(options), store_(store), thread_([this] { Run(); }) {}

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
         request.choices == 1 ? "text's cache" : fmt::format("caches of {} choices", request.choices), HumanBytes(bytes),
         HumanBytes(options_.kv_memory));
  auto job = std::make_shared<Job>(std::move(request));
  const std::lock_guard lock(mutex_);
  const std::string& client = job->request().client;
  if (!stopping_) waiting_.push_back({job, bytes, each, NextTurn(client)});
  if (stopping_ || !KeepPlace(client)) {
    ++metrics_.jobs_rejected;
    throw BusyError(stopping_ ? kStopping : kQueueFull, stopping_);
  }
  work_.notify_all();
  return job;
}

// Texts that cannot begin as soon as the thread comes to them: there is no place, or not the memory, or they are behind
// such a one. (One that has the memory only with what it may share waits, too.)
size_t Scheduler::WaitingForOthers() const {
  std::vector<const Waiting*> next;
  for (const Waiting& waiting : waiting_) next.push_back(&waiting);
  std::ranges::stable_sort(next, {}, [](const Waiting* waiting) { return waiting->turn; });
  size_t places = places_, bytes = Reserved();
  const auto behind = std::ranges::find_if(next, [&](const Waiting* waiting) {
    places += waiting->job->request().choices;
    bytes += waiting->bytes;
    return places > options_.max_running || (options_.kv_memory != 0 && bytes > options_.kv_memory);
  });
  return static_cast<size_t>(next.end() - behind);
}

// Whether the queue has a place for the client's text that has just come; else it leaves again. Where the queue is full,
// the newest text of the client that has most leaves it, if that has two more than this one had, so that none takes the
// whole queue and none is driven out.
bool Scheduler::KeepPlace(const std::string& client) {
  if (WaitingForOthers() <= options_.max_queued) return true;
  std::map<std::string_view, size_t> texts;
  for (const Waiting& waiting : waiting_) ++texts[waiting.job->request().client];
  const size_t own = texts[client] - 1;
  const auto most = std::ranges::max_element(texts, {}, [](const auto& of) { return of.second; });
  if (most->second < own + 2) {
    waiting_.pop_back();
    return false;
  }
  const auto newest = std::ranges::find_if(waiting_.rbegin(), waiting_.rend(), [&](const Waiting& waiting) {
    return waiting.job->request().client == most->first;
  });
  newest->job->Fail(BusyError(kQueueFull));
  waiting_.erase(std::next(newest).base());
  ++metrics_.jobs_rejected;
  return true;
}

// Behind the client's other texts, and not before what is served now: each round has a text of every client that waits,
// and who comes new does not wait for those that others have in store.
uint64_t Scheduler::NextTurn(const std::string& client) const {
  uint64_t turn = turn_;
  if (const auto after = turns_after_.find(client); after != turns_after_.end()) turn = std::max(turn, after->second);
  for (const Waiting& waiting : waiting_) {
    const JobRequest& request = waiting.job->request();
    if (request.client == client) turn = std::max(turn, waiting.turn + request.choices);
  }
  return turn;
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
  metrics.kv_bytes_reserved = Reserved();
  metrics.queued = waiting_.size();
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
  for (const Waiting& waiting : waiting_) waiting.job->Fail(stopping);
  for (const Loading& loading : loading_) loading.text.job->Fail(stopping);
  waiting_.clear();
  loading_.clear();
}

bool Scheduler::Prepare() {
  // Those that wait behind running ones may be cancelled or late meanwhile, so that nobody waits for ever here. The
  // store is looked at often: what it brings back takes milliseconds.
  constexpr auto kLook = std::chrono::milliseconds(50), kLookAtStore = std::chrono::milliseconds(2);
  std::unique_lock lock(mutex_);
  while (!stopping_) {
    DropWaiting();
    if (BeginNext(lock)) continue;
    if (!running_.empty()) return true;
    work_.wait_for(lock, !loading_.empty() ? kLookAtStore : waiting_.empty() ? std::chrono::milliseconds(1000) : kLook);
  }
  return false;
}

void Scheduler::DropWaiting() {
  const auto now = Clock::now();
  const auto dropped = [&](const Waiting& waiting) {
    const bool late = waiting.job->request().deadline <= now;
    if (!late && !waiting.job->cancelled_) return false;
    ++(late ? metrics_.jobs_failed : metrics_.jobs_cancelled);
    waiting.job->Fail(Error(ErrorCode::kRuntime, late ? "the request's time ran out before it began" : "cancelled"));
    return true;
  };
  std::erase_if(waiting_, dropped);
  std::erase_if(loading_, [&](const Loading& loading) {
    if (!dropped(loading.text)) return false;
    metrics_.kv_bytes_reserved -= loading.text.bytes;
    places_ -= loading.text.job->request().choices;
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
  if (const std::optional<Waiting> next = NextAdmitted()) {
    lock.unlock();
    if (next->joins || !StartLoading(*next)) Begin(*next, std::nullopt);
    lock.lock();
    return true;
  }
  return false;
}

// The clients take turns, and each has its texts in the order they came. Who is next and does not fit yet is waited
// for: a large text is not overtaken by small ones for ever.
std::optional<Scheduler::Waiting> Scheduler::NextAdmitted() {
  if (waiting_.empty()) return std::nullopt;
  const auto first = std::ranges::min_element(waiting_, {}, &Waiting::turn);
  Waiting next = *first;
  const size_t places = next.job->request().choices;
  if (places_ + places > options_.max_running) return std::nullopt;
  if (options_.kv_memory != 0 && Reserved() + next.bytes > options_.kv_memory) {
    const JobRequest& request = next.job->request();
    const PrefixCache::Entry* const idle = request.reuse ? idle_.Look({request.prompt, *request.config}) : nullptr;
    if (idle == nullptr || Reserved() + next.bytes - idle->running > options_.kv_memory) return std::nullopt;
    next.joins = true;
    beginning_ = idle;
    shared_ += idle->running;  // until its cache is there
  }
  metrics_.kv_bytes_reserved += next.bytes;
  places_ += places;
  waiting_.erase(first);
  turn_ = std::max(turn_, next.turn);
  turns_after_[next.job->request().client] = next.turn + places;
  std::erase_if(turns_after_, [&](const auto& client) { return client.second <= turn_; });
  return next;
}

size_t Scheduler::RunningPlaces() const {
  size_t places = 0;
  for (const auto& text : running_) places += text->places;
  return places;
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

// Has the store look for more than memory has; false: there is nothing to wait for.
bool Scheduler::StartLoading(const Waiting& next) {
  const JobRequest& request = next.job->request();
  if (store_ == nullptr || !request.reuse) return false;
  const PrefixCache::Entry* const idle = idle_.Find({request.prompt, *request.config});
  auto lookup = store_->Find(request.prompt, request.config, idle == nullptr ? 0 : idle->sequence->tokens().size());
  if (lookup == nullptr) return false;
  const std::lock_guard lock(mutex_);
  loading_.push_back({next, std::move(lookup), Clock::now() + options_.store_patience});
  return true;
}

void Scheduler::Begin(const Waiting& next, std::optional<Sequence> stored) {
  const auto fail = [&](const Error& error) {
    next.job->Fail(error);
    const std::lock_guard lock(mutex_);
    metrics_.kv_bytes_reserved -= next.bytes;
    places_ -= next.job->request().choices;
    ++metrics_.jobs_failed;
  };
  try {
    auto text = std::make_unique<Running>(Running{.job = next.job,
                                                  .bytes = next.bytes,
                                                  .each = next.each,
                                                  .sequence = BeginSequence(next, std::move(stored)),
                                                  .places = next.job->request().choices});
    text->before = text->sequence.Stats();
    text->cached = text->fed = text->sequence.tokens().size();
    text->shared = SharedBeginning(*text);
    next.job->Begin(text->cached);
    const std::lock_guard lock(mutex_);
    metrics_.prefix_hits += text->cached > 0;
    metrics_.Of(text->sequence.config().spec_text()).prefix_hits += text->cached > 0;
    metrics_.prefix_tokens += text->cached;
    running_.push_back(std::move(text));
    metrics_.running = RunningPlaces();
  } catch (const Error& error) {
    fail(error);
  } catch (const std::bad_alloc&) {
    fail(Error(ErrorCode::kOutOfMemory, "memory for the text's cache cannot be had"));
  }
  beginning_ = nullptr;
  CountShared();
}

// One that has seen the prompt's beginning, or a new one.
Sequence Scheduler::BeginSequence(const Waiting& next, std::optional<Sequence> stored) {
  const JobRequest& request = next.job->request();
  if (request.reuse) {
    try {
      if (std::optional<Sequence> found = FindBeginning(request, std::move(stored)))
        return Adopt(std::move(*found), request.config);
    } catch (const Error&) {  // such as spans that fit the budget when a prompt is read anew only
      if (next.joins) throw;
      beginning_ = nullptr;
    }
  }
  MakeRoom(nullptr);
  return Sequence(request.config);
}

// The sequence, idle or just brought from the store, that has seen most of the prompt. One that several texts begin
// with stays, as far as there is room for it beside its copy.
std::optional<Sequence> Scheduler::FindBeginning(const JobRequest& request, std::optional<Sequence> stored) {
  const PrefixCache::Entry* const idle = idle_.Find({request.prompt, *request.config});
  if (stored && (idle == nullptr || idle->sequence->tokens().size() < stored->tokens().size())) {
    MakeRoom(nullptr);
    return stored;
  }
  if (idle == nullptr) return std::nullopt;
  beginning_ = idle;
  MakeRoom(idle);
  if (idle->shared && HasRoom(0)) return PrefixCache::Copy(idle);
  beginning_ = nullptr;
  return idle_.Take(idle, store_ != nullptr && !store_->LetGo(*idle->sequence));
}

// Counts memory that caches share once, after any has come or gone: with the text that began first, with idle caches
// where no text has it. Shared rows do not change, so that what a text may still take is not less for them. `reserved`
// is what texts reserve that have come, or, negative, have ended: what is reserved and what of it is shared change
// together.
void Scheduler::CountShared(std::ptrdiff_t reserved) {
  SharedMemory running;
  size_t shared = 0;
  for (const auto& text : running_) {
    text->counted = running.Add(text->sequence.cache().ShareableParts());
    shared += text->counted;
  }
  if (beginning_ != nullptr) shared += running.Add(beginning_->sequence->cache().ShareableParts());
  idle_.CountShared(running);
  const std::lock_guard lock(mutex_);
  metrics_.kv_bytes_reserved += static_cast<size_t>(reserved);
  shared_ = shared;
}

// What running texts, and those that the store is asked for, may reach together.
size_t Scheduler::Reserved() const { return metrics_.kv_bytes_reserved - shared_; }

// Whether the idle caches, and so many bytes more, fit beside what the running ones may reach.
bool Scheduler::HasRoom(size_t more) const {
  if (options_.kv_memory == 0) return true;
  const std::lock_guard lock(mutex_);
  return Reserved() + idle_.bytes() + more <= options_.kv_memory;
}

// Lets idle caches go, those first that were not used for longest, until so many bytes more fit.
void Scheduler::MakeRoom(const PrefixCache::Entry* spared, size_t more) {
  CountShared();
  while (idle_.size() > options_.max_idle || !HasRoom(more)) {
    const size_t bytes = DropIdle(spared, false);
    if (bytes == 0) return;
    ReturnMemory(bytes);
    CountShared();
    const std::lock_guard lock(mutex_);
    ++metrics_.idle_dropped;
  }
}

// Lets the idle cache go that was not used for longest, of all but `spared` or of those that have rows on a disk: rather
// one that does not wait to be saved, for which the store holds it. Returns its bytes; 0: there is none.
size_t Scheduler::DropIdle(const PrefixCache::Entry* spared, bool on_disk) {
  const auto waits = [&](const PrefixCache::Entry& entry) {
    return store_ != nullptr && store_->Saves(*entry.sequence);
  };
  const PrefixCache::Entry* dropped = nullptr;
  for (const PrefixCache::Entry& entry : idle_.entries()) {  // the last used first
    if (&entry == spared || (on_disk && entry.sequence->Stats().recall.file_bytes == 0)) continue;
    if (dropped == nullptr || !waits(entry) || waits(*dropped)) dropped = &entry;
  }
  if (dropped == nullptr) return 0;
  if (store_ != nullptr) store_->LetGo(*dropped->sequence);
  return idle_.Drop(dropped);
}

// What the C library has been given back it would keep for itself.
void Scheduler::ReturnMemory(size_t bytes) {
  constexpr size_t kWorthwhile = size_t{1} << 20;
  unreturned_ += bytes;
  if (unreturned_ < kWorthwhile) return;
  ::malloc_trim(0);
  unreturned_ = 0;
}

// Where the prompt stops to be like that of another text, so that a third one need not read this again: where the
// cache's method lets a prompt be read in pieces.
size_t Scheduler::SharedBeginning(const Running& text) const {
  const JobRequest& request = text.job->request();
  const size_t chunk = request.config->prefill_chunk();
  if (!request.reuse || options_.max_idle == 0 || SeesPromptWhole(*request.config)) return 0;
  size_t n = idle_.LongestCommon({request.prompt, *request.config});
  for (const auto& other : running_) {
    const size_t common = CommonPrefix(other->job->request().prompt, request.prompt);
    if (common > n && SameBeginning(other->sequence.config(), *request.config, common)) n = common;
  }
  const size_t rest = chunk == 0 ? kShortestPiece : 1;
  n = std::min(n, request.prompt.size() - std::min(request.prompt.size(), rest));
  if (n < text.cached + options_.min_shared) return 0;
  return chunk == 0 ? n : text.cached + (n - text.cached) / chunk * chunk;  // pieces stay as they would be
}

void Scheduler::KeepShared(const Running& text) {
  size_t bytes = text.sequence.Stats().kv_bytes;
  for (const SharedPart& part : text.sequence.cache().ShareableParts()) bytes -= part.bytes;
  MakeRoom(nullptr, bytes);
  if (!HasRoom(bytes)) return;
  try {
    Keep(text.sequence.Clone(), true);
  } catch (const Error&) {  // no memory for a copy: the text goes on all the same
  } catch (const std::bad_alloc&) {
  }
}

void Scheduler::Keep(Sequence sequence, bool shared) {
  if (options_.max_idle == 0 || sequence.interrupted() || sequence.tokens().empty()) return;
  const std::shared_ptr<const Sequence> kept = idle_.Add(std::move(sequence), shared);
  if (kept != nullptr && store_ != nullptr) store_->Save(kept);
  MakeRoom(nullptr);
}

// Whether that is more than a step should take.
bool Scheduler::MustReadWhole(const Running& text) const {
  const JobRequest& request = text.job->request();
  return !text.ended && text.in_prompt() && SeesPromptWhole(*request.config) &&
         request.prompt.size() - text.fed > options_.step_tokens;
}

// A piece of the prompt: all of it where the cache's method wants to see it whole, else what `budget` leaves.
StepItem Scheduler::PromptItem(Running& text, size_t tag, size_t& budget) {
  const JobRequest& request = text.job->request();
  const size_t left = request.prompt.size() - text.fed, chunk = request.config->prefill_chunk();
  const size_t until = text.shared > text.fed ? text.shared - text.fed : left;
  const bool whole = SeesPromptWhole(*request.config);
  const size_t n = whole ? left : chunk != 0 ? std::min(until, chunk) : NextPiece(until, std::max<size_t>(budget, 1));
  text.next_fed = n;
  budget -= std::min(budget, n);
  return {.sequence = &text.sequence,
          .tokens = std::span(request.prompt).subspan(text.fed, n),
          .logits = n == left ? LogitsRows::kLast : LogitsRows::kNone,
          .tag = tag,
          .kind = whole ? StepKind::kPrompt : StepKind::kStream,
          .cancel = &text.job->cancelled_};
}

std::vector<StepItem> Scheduler::Items() {
  std::vector<StepItem> items;
  size_t budget = options_.step_tokens;
  for (size_t tag = 0; tag < running_.size(); ++tag) {
    Running& text = *running_[tag];
    if (text.ended || MustReadWhole(text)) continue;  // the one in whose pause this is has perhaps ended already
    text.next_fed = 0;
    if (!text.in_prompt()) {
      items.push_back({.sequence = &text.sequence,
                       .tokens = {&text.last_token, 1},
                       .logits = LogitsRows::kLast,
                       .tag = tag,
                       .kind = StepKind::kDecode,
                       .cancel = &text.job->cancelled_});
    } else if (budget > 0) {
      items.push_back(PromptItem(text, tag, budget));
    }
  }
  return items;
}

void Scheduler::Step() {
  EndCancelled();
  TakeStep();
  const auto whole = std::ranges::find_if(running_, [&](const auto& text) { return MustReadWhole(*text); });
  if (whole != running_.end()) ReadWhole(**whole);
}

// One step of its own for a long prompt, in the middle of which the others go on. What comes out is what the prompt
// gives alone, whoever runs beside it.
void Scheduler::ReadWhole(Running& text) {
  size_t budget = 0;
  const StepItem item = PromptItem(text, 0, budget);
  std::vector<float> logits;
  const auto on_failure = [&](size_t, const Error& error) {
    if (!TriesAgain(text, error)) FailOf(text, error);
  };
  const LogitsSink sink = [&](std::span<const LogitsRow> tile) {
    logits.assign(tile.back().logits.begin(), tile.back().logits.end());
  };
  reading_ = &text;
  resumed_ = Clock::now();
  pause_due_ = options_.pause_after;
  try {
    engine_.Step({item}, sink, {.on_failure = on_failure, .pause = [&] { StepInPause(); }});
  } catch (const Error& error) {
    FailOf(text, error);
  } catch (const std::bad_alloc&) {
    FailOf(text, Error(ErrorCode::kOutOfMemory, "memory for a step cannot be had"));
  }
  reading_ = nullptr;
  {
    const std::lock_guard lock(mutex_);
    ++metrics_.steps;
  }
  if (!text.ended) Advance(text);
  if (!text.ended && !text.in_prompt()) TakeLogits(text, logits);
}

// False: stopped.
bool Scheduler::BeginWaiting() {
  std::unique_lock lock(mutex_);
  DropWaiting();
  while (!stopping_ && BeginNext(lock)) {
  }
  return !stopping_;
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
  if (reading_->ended) reading_->job->cancelled_ = true;  // its time is over: it leaves the step
  Settle();
  resumed_ = Clock::now();
  pause_due_ = std::clamp<Clock::duration>(4 * (resumed_ - begin), options_.pause_after, 10 * options_.pause_after);
}

void Scheduler::TakeStep() {
  const std::vector<StepItem> items = Items();
  if (items.empty()) return;
  const auto on_failure = [&](size_t tag, const Error& error) {
    if (!TriesAgain(*running_[tag], error)) FailOf(*running_[tag], error);
  };
  std::vector<std::pair<size_t, std::vector<float>>> logits;
  const LogitsSink sink = [&](std::span<const LogitsRow> tile) {
    for (const LogitsRow& row : tile) logits.emplace_back(row.tag, std::vector(row.logits.begin(), row.logits.end()));
  };
  try {
    engine_.Step(items, sink, {.on_failure = on_failure});
  } catch (const Error& error) {
    return FailStep(items, error);
  } catch (const std::bad_alloc&) {
    return FailStep(items, Error(ErrorCode::kOutOfMemory, "memory for a step cannot be had"));
  }
  {
    const std::lock_guard lock(mutex_);
    ++metrics_.steps;
  }
  for (const StepItem& item : items) {
    Running& text = *running_[item.tag];
    if (!text.ended && text.in_prompt()) Advance(text);
  }
  for (const auto& [tag, row] : logits)
    if (Running& text = *running_[tag]; !text.ended) TakeLogits(text, row);
}

// Caches have the room of a step, also that on a disk, before it begins, so that a text that finds none has lost
// nothing: an idle cache that has rows there goes, and the text takes its step again. Once more where there is none:
// another text of the same step may have made room.
bool Scheduler::TriesAgain(Running& text, const Error& error) {
  if (error.code() != ErrorCode::kIo || text.sequence.interrupted()) return false;
  const size_t bytes = DropIdle(nullptr, true);
  if (bytes == 0 && std::exchange(text.tries_again, true)) return false;
  text.next_fed = 0;
  if (bytes == 0) return true;
  ReturnMemory(bytes);
  const std::lock_guard lock(mutex_);
  ++metrics_.idle_dropped;
  return true;
}

// The step has read its piece of the prompt.
void Scheduler::Advance(Running& text) {
  if (text.next_fed == 0) return;
  text.tries_again = false;
  text.fed += text.next_fed;
  if (text.fed == text.shared) KeepShared(text);
  if (text.in_prompt()) return;
  try {
    text.sequence.cache().EndPrompt();
  } catch (const Error& error) {
    FailOf(text, error);
  } catch (const std::bad_alloc&) {
    FailOf(text, Error(ErrorCode::kOutOfMemory, "memory for the text's cache cannot be had"));
  }
}

// A step that did not happen, for lack of work memory as a rule: prompts are what took it, so generating texts go on.
void Scheduler::FailStep(const std::vector<StepItem>& items, const Error& error) {
  const bool has_prompts =
      std::ranges::any_of(items, [&](const StepItem& item) { return running_[item.tag]->in_prompt(); });
  for (const StepItem& item : items) {
    Running& text = *running_[item.tag];
    if (!has_prompts || text.in_prompt() || text.sequence.interrupted()) FailOf(text, error);
  }
}

void Scheduler::TakeLogits(Running& text, std::span<const float> logits) {
  try {
    if (text.generation) return TakeToken(text, logits);
    for (Running* const choice : BeginChoices(text)) TakeToken(*choice, logits);
  } catch (const Error& error) {
    FailOf(text, error);
  } catch (const std::bad_alloc&) {
    FailOf(text, Error(ErrorCode::kOutOfMemory, "memory for the text cannot be had"));
  }
}

// The prompt has been read. Each further choice goes on with a copy of the sequence, in the place that was kept for it;
// from now on each has its own bytes, and what they share is counted as it is.
std::vector<Scheduler::Running*> Scheduler::BeginChoices(Running& text) {
  const JobRequest& request = text.job->request();
  std::vector<std::unique_ptr<Running>> copies;
  for (size_t choice = 1; choice < request.choices; ++choice) {
    copies.push_back(std::make_unique<Running>(Running{.job = text.job,
                                                       .bytes = text.each,
                                                       .each = text.each,
                                                       .sequence = text.sequence.Clone(),
                                                       .choice = choice}));
    copies.back()->cached = copies.back()->fed = text.fed;
    copies.back()->before = copies.back()->sequence.Stats();
  }
  std::vector<Running*> choices = {&text};
  choices.reserve(request.choices);
  running_.reserve(running_.size() + copies.size());
  for (auto& copy : copies) {
    choices.push_back(copy.get());
    running_.push_back(std::move(copy));
  }
  const size_t reserved = std::exchange(text.bytes, text.each);
  text.places = 1;
  if (request.choices > 1) CountShared(static_cast<std::ptrdiff_t>(request.choices * text.each - reserved));
  GenerationOptions options = request.options;
  for (Running* const choice : choices) {
    choice->generation.emplace(tokenizer_, options, request.prompt, request.config->shape().ctx);
    ++options.sampler.seed;
  }
  return choices;
}

void Scheduler::TakeToken(Running& text, std::span<const float> logits) {
  if (text.ended) return;  // another choice has failed
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

void Scheduler::ReportEnd(Running& text) {
  if (!text.last || !text.job->Report(text.choice, std::move(*text.last), text.sequence.Stats())) return;
  const std::lock_guard lock(mutex_);
  ++metrics_.jobs_finished;
}

// Between steps: texts that nobody waits for, and those whose time is over.
void Scheduler::EndCancelled() {
  for (const auto& text : running_) {
    if (text->job->cancelled_)
      FailOf(*text, Error(ErrorCode::kRuntime, "cancelled"));
    else if (text->job->request().deadline <= Clock::now())
      FailOf(*text, Error(ErrorCode::kRuntime, "the request's time ran out"));
  }
  Settle();
}

// What ends one choice by a failure ends the others, too.
void Scheduler::FailOf(Running& text, const Error& error) {
  if (text.ended) return;
  for (const auto& other : running_)
    if (other->job == text.job) other->ended = true;
  const bool cancelled = text.job->cancelled_;  // whoever waits cancels when it has heard of the failure
  text.job->Fail(error);
  const std::lock_guard lock(mutex_);
  ++(cancelled ? metrics_.jobs_cancelled : metrics_.jobs_failed);
}

// Lets ended texts go, whose caches stay as idle ones, and counts. Who hears of an end finds its place free.
void Scheduler::Settle() {
  std::vector<std::unique_ptr<Running>> ended;
  for (auto& text : running_)
    if (text->ended && text.get() != reading_) ended.push_back(std::move(text));
  std::erase(running_, nullptr);
  std::ptrdiff_t released = 0;
  for (const auto& text : ended) {
    CountEnded(*text);
    released += static_cast<std::ptrdiff_t>(text->bytes);
  }
  if (!ended.empty()) CountShared(-released);
  for (const auto& text : ended) {
    ReportEnd(*text);
    const size_t bytes = text->sequence.Stats().kv_bytes;
    Keep(std::move(text->sequence), false);
    if (options_.max_idle == 0) ReturnMemory(bytes);
  }
  const std::lock_guard lock(mutex_);
  metrics_.kv_bytes = 0;
  slots_.clear();
  for (auto& [spec, of_spec] : metrics_.specs) {
    of_spec.running = of_spec.kv_bytes = of_spec.kv_bytes_logical = of_spec.idle = of_spec.idle_bytes = 0;
    of_spec.tokens_resident = 0;
  }
  for (const auto& text : running_) {
    const CacheStats stats = text->sequence.Stats();
    metrics_.kv_bytes += stats.kv_bytes - text->counted;
    SpecMetrics& of_spec = metrics_.Of(text->sequence.config().spec_text());
    ++of_spec.running;
    of_spec.kv_bytes += stats.kv_bytes - text->counted;
    of_spec.kv_bytes_logical += stats.kv_bytes_full;
    of_spec.tokens_resident += stats.tokens_resident;
    slots_.push_back({text->sequence.config().spec_text(), text->job->request().prompt.size(), text->fed, text->cached,
                      text->generation ? text->generation->tokens().size() : 0, stats.kv_bytes, text->bytes,
                      stats.tokens_resident});
  }
  metrics_.running = RunningPlaces();
  metrics_.idle = idle_.size();
  metrics_.idle_bytes = idle_.bytes();
  for (const PrefixCache::Entry& entry : idle_.entries()) {
    SpecMetrics& of_spec = metrics_.Of(entry.sequence->config().spec_text());
    ++of_spec.idle;
    of_spec.idle_bytes += entry.own_bytes();
  }
}

void Scheduler::CountEnded(const Running& text) {
  const CacheStats now = text.sequence.Stats(), &before = text.before;
  const auto left = [](const CacheStats& s) { return s.tokens_dropped + s.tokens_absorbed + s.tokens_merged; };
  const std::lock_guard lock(mutex_);
  metrics_.prompt_tokens += text.fed - text.cached;
  if (text.generation) metrics_.generated_tokens += text.generation->tokens().size();
  SpecMetrics& of_spec = metrics_.Of(text.sequence.config().spec_text());
  of_spec.tokens_evicted += left(now) - left(before);
  of_spec.tokens_absorbed += now.tokens_absorbed - before.tokens_absorbed;
  of_spec.tokens_merged += now.tokens_merged - before.tokens_merged;
  const auto n_heads = static_cast<double>(std::max<size_t>(text.sequence.config().global().heads.size(), 1));
  places_ -= text.places;
  of_spec.tokens_recalled += static_cast<double>(now.recall.rows_recalled - before.recall.rows_recalled) / n_heads;
}

}  // namespace lesskv
