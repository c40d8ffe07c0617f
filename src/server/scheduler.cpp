#include "server/scheduler.h"

#include <algorithm>
#include <utility>

#include "base/memory.h"

namespace lesskv {

using Clock = std::chrono::steady_clock;

JobState Job::Wait(std::chrono::milliseconds patience) {
  std::unique_lock lock(mutex_);
  news_.wait_for(lock, patience, [&] { return has_news_ || state_.ended(); });
  has_news_ = false;
  JobState result = state_;
  state_.new_text.clear();
  return result;
}

void Job::Report(const std::string& text, const CacheStats& stats, std::optional<FinishReason> finish) {
  {
    const std::lock_guard lock(mutex_);
    state_.new_text += text;
    state_.stats = stats;
    ++state_.generated_tokens;
    state_.finish = finish;
    has_news_ = true;
  }
  news_.notify_all();
}

void Job::Fail(const Error& error) {
  {
    const std::lock_guard lock(mutex_);
    state_.error = error;
    has_news_ = true;
  }
  news_.notify_all();
}

Scheduler::Scheduler(Engine& engine, const Tokenizer& tokenizer, const SchedulerOptions& options)
    : engine_(engine), tokenizer_(tokenizer), options_(options), thread_([this] { Run(); }) {}

Scheduler::~Scheduler() { Stop(); }

std::shared_ptr<Job> Scheduler::Submit(JobRequest request) {
  const size_t bytes = request.config->Plan(request.prompt.size(), request.options.max_tokens).bytes_peak;
  if (options_.kv_memory != 0 && bytes > options_.kv_memory)
    Fail(ErrorCode::kInvalidArgument, "the text's cache may take {}, of {} for all caches", HumanBytes(bytes),
         HumanBytes(options_.kv_memory));
  auto job = std::make_shared<Job>(std::move(request));
  const std::lock_guard lock(mutex_);
  if (stopping_ || waiting_.size() >= options_.max_queued) {
    ++metrics_.jobs_rejected;
    throw BusyError(stopping_ ? "the server is stopping" : "too many requests are waiting already");
  }
  waiting_.push_back({job, bytes});
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
  metrics.queued = waiting_.size();
  return metrics;
}

void Scheduler::Run() {
  while (Prepare()) {
    Step();
    Settle();
  }
  const Error stopping(ErrorCode::kRuntime, "the server is stopping");
  for (const auto& text : running_) FailOf(*text, stopping);
  Settle();
  const std::lock_guard lock(mutex_);
  for (const Waiting& waiting : waiting_) waiting.job->Fail(stopping);
  waiting_.clear();
}

bool Scheduler::Prepare() {
  // Those that wait behind running ones may be cancelled or late meanwhile, so that nobody waits for ever here.
  constexpr auto kLook = std::chrono::milliseconds(50);
  std::unique_lock lock(mutex_);
  while (!stopping_) {
    DropWaiting();
    Admit();
    if (!running_.empty()) return true;
    work_.wait_for(lock, waiting_.empty() ? std::chrono::milliseconds(1000) : kLook);
  }
  return false;
}

void Scheduler::DropWaiting() {
  const auto now = Clock::now();
  std::erase_if(waiting_, [&](const Waiting& waiting) {
    const bool late = waiting.job->request().deadline <= now;
    if (!late && !waiting.job->cancelled_) return false;
    ++(late ? metrics_.jobs_failed : metrics_.jobs_cancelled);
    waiting.job->Fail(Error(ErrorCode::kRuntime, late ? "the request's time ran out before it began" : "cancelled"));
    return true;
  });
}

// First come, first served: a large text is not overtaken by small ones for ever.
void Scheduler::Admit() {
  while (!waiting_.empty() && running_.size() < options_.max_running) {
    const Waiting& next = waiting_.front();
    if (options_.kv_memory != 0 && metrics_.kv_bytes_reserved + next.bytes > options_.kv_memory) return;
    try {
      running_.push_back(std::make_unique<Running>(
          Running{.job = next.job, .bytes = next.bytes, .sequence = Sequence(next.job->request().config)}));
      metrics_.kv_bytes_reserved += next.bytes;
      ++metrics_.running;
    } catch (const Error& error) {
      next.job->Fail(error);
      ++metrics_.jobs_failed;
    } catch (const std::bad_alloc&) {
      next.job->Fail(Error(ErrorCode::kOutOfMemory, "memory for the text's cache cannot be had"));
      ++metrics_.jobs_failed;
    }
    waiting_.pop_front();
  }
}

// A piece of the prompt: all of it where the cache's method wants to see it whole, else what `budget` leaves.
StepItem Scheduler::PromptItem(Running& text, size_t tag, size_t& budget) {
  const JobRequest& request = text.job->request();
  const size_t left = request.prompt.size() - text.fed, chunk = request.config->prefill_chunk();
  const bool never_evicts = request.config->Budgets(request.prompt.size()).empty();
  const bool whole = chunk == 0 && !never_evicts;
  const size_t n = whole ? left : std::min(left, chunk != 0 ? chunk : std::max<size_t>(budget, 1));
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
  const std::vector<StepItem> items = Items();
  const auto on_failure = [&](size_t tag, const Error& error) { FailOf(*running_[tag], error); };
  std::vector<std::pair<size_t, std::vector<float>>> logits;
  const LogitsSink sink = [&](std::span<const LogitsRow> tile) {
    for (const LogitsRow& row : tile) logits.emplace_back(row.tag, std::vector(row.logits.begin(), row.logits.end()));
  };
  try {
    if (!items.empty()) engine_.Step(items, sink, {.on_failure = on_failure});
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
    if (!running_[tag]->ended) TakeLogits(*running_[tag], row);
}

// The step has read its piece of the prompt.
void Scheduler::Advance(Running& text) {
  text.fed += text.next_fed;
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
  const JobRequest& request = text.job->request();
  try {
    if (!text.generation)
      text.generation.emplace(tokenizer_, request.options, request.prompt, request.config->shape().ctx);
    const Generation::Output out = text.generation->Push(logits);
    text.last_token = out.token;
    if (out.finish) return EndOf(text, out.text, *out.finish);
    text.job->Report(out.text, text.sequence.Stats(), std::nullopt);
  } catch (const Error& error) {
    FailOf(text, error);
  } catch (const std::bad_alloc&) {
    FailOf(text, Error(ErrorCode::kOutOfMemory, "memory for the text cannot be had"));
  }
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

void Scheduler::EndOf(Running& text, const std::string& rest, FinishReason reason) {
  text.ended = true;
  text.job->Report(rest, text.sequence.Stats(), reason);
  const std::lock_guard lock(mutex_);
  ++metrics_.jobs_finished;
}

void Scheduler::FailOf(Running& text, const Error& error) {
  if (text.ended) return;
  text.ended = true;
  text.job->Fail(error);
  const std::lock_guard lock(mutex_);
  ++(text.job->cancelled_ ? metrics_.jobs_cancelled : metrics_.jobs_failed);
}

// Lets ended texts go and counts.
void Scheduler::Settle() {
  const std::lock_guard lock(mutex_);
  metrics_.kv_bytes = 0;
  metrics_.tokens_resident = 0;
  for (const auto& text : running_) {
    const CacheStats stats = text->sequence.Stats();
    if (!text->ended) {
      metrics_.kv_bytes += stats.kv_bytes;
      metrics_.tokens_resident += stats.tokens_resident;
      continue;
    }
    metrics_.kv_bytes_reserved -= text->bytes;
    metrics_.prompt_tokens += text->fed;
    if (text->generation) metrics_.generated_tokens += text->generation->tokens().size();
    metrics_.tokens_evicted += stats.tokens_dropped + stats.tokens_absorbed + stats.tokens_merged;
    metrics_.tokens_absorbed += stats.tokens_absorbed;
  }
  std::erase_if(running_, [](const auto& text) { return text->ended; });
  metrics_.running = running_.size();
}

}  // namespace lesskv
