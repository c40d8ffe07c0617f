#include "server/waiting_texts.h"

#include <algorithm>
#include <iterator>
#include <string_view>
#include <utility>
#include <vector>

namespace lesskv {

// Where the queue is full, the newest text of the client that has most leaves it, if that has two more than this one
// had, so that none takes the whole queue and none is driven out.
std::shared_ptr<Job> WaitingTexts::Add(WaitingText text, size_t places, size_t bytes) {
  const std::string& client = text.job->request().client;
  text.turn = NextTurn(client);
  texts_.push_back(text);
  if (WaitingForOthers(places, bytes) <= options_.max_queued) return nullptr;
  std::map<std::string_view, size_t> texts;
  for (const WaitingText& waiting : texts_) ++texts[waiting.job->request().client];
  const size_t own = texts[client] - 1;
  const auto most = std::ranges::max_element(texts, {}, [](const auto& of) { return of.second; });
  const std::string_view loser = most->second < own + 2 ? client : most->first;
  const auto newest = std::ranges::find_if(texts_.rbegin(), texts_.rend(), [&](const WaitingText& waiting) {
    return waiting.job->request().client == loser;
  });
  std::shared_ptr<Job> refused = newest->job;
  texts_.erase(std::next(newest).base());
  return refused;
}

// Behind the client's other texts, and not before what is served now: each round has a text of every client that waits,
// and who comes new does not wait for those that others have in store.
uint64_t WaitingTexts::NextTurn(const std::string& client) const {
  uint64_t turn = turn_;
  if (const auto after = turns_after_.find(client); after != turns_after_.end()) turn = std::max(turn, after->second);
  for (const WaitingText& waiting : texts_)
    if (waiting.job->request().client == client) turn = std::max(turn, waiting.turn + waiting.places());
  return turn;
}

// Texts that cannot begin as soon as somebody comes to them: there is no place, or not the memory, or they are behind
// such a one. (One that has the memory only with what it may share waits, too.)
size_t WaitingTexts::WaitingForOthers(size_t places, size_t bytes) const {
  std::vector<const WaitingText*> next;
  for (const WaitingText& waiting : texts_) next.push_back(&waiting);
  std::ranges::stable_sort(next, {}, [](const WaitingText* waiting) { return waiting->turn; });
  const auto behind = std::ranges::find_if(next, [&](const WaitingText* waiting) {
    places += waiting->places();
    bytes += waiting->bytes;
    return places > options_.max_running || (options_.kv_memory != 0 && bytes > options_.kv_memory);
  });
  return static_cast<size_t>(next.end() - behind);
}

WaitingText* WaitingTexts::Next() {
  const auto next = std::ranges::min_element(texts_, {}, &WaitingText::turn);
  return next == texts_.end() ? nullptr : &*next;
}

WaitingText WaitingTexts::TakeNext() {
  const auto at = std::ranges::min_element(texts_, {}, &WaitingText::turn);
  WaitingText next = std::move(*at);
  texts_.erase(at);
  turn_ = next.turn;  // none that waits had one before the last
  turns_after_[next.job->request().client] = next.turn + next.places();
  std::erase_if(turns_after_, [&](const auto& client) { return client.second <= turn_; });
  return next;
}

}  // namespace lesskv
