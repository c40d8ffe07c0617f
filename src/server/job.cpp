#include "server/job.h"

#include <algorithm>
#include <iterator>

namespace lesskv {

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
    if (more.picture == nullptr) more.picture = std::move(whole.picture);
  }
  *this = std::move(later);
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

}  // namespace lesskv
