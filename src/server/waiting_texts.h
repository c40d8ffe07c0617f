// Texts that wait for their place among the running ones.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <string>

#include "server/job.h"
#include "server/scheduler_options.h"

namespace lesskv {

struct WaitingText {
  std::shared_ptr<Job> job;
  size_t bytes, each;  // of RunningText
  uint64_t turn = 0;   // the lowest is next; of equal ones the first that came
  bool joins = false;  // there is room for it only beside running texts that share its beginning

  size_t places() const { return job->request().choices; }
};

// The clients take turns, and each has its texts in the order they came. Not thread-safe.
class WaitingTexts {
 public:
  explicit WaitingTexts(const SchedulerOptions& options) : options_(options) {}

  // Takes in a text, which gets its turn here, beside texts that have so many places and bytes already. Returns the job
  // that has to go for want of room, this one or the last of the client that has most, which then is not here any more;
  // null where all can wait.
  std::shared_ptr<Job> Add(WaitingText text, size_t places, size_t bytes);
  // Whose turn it is; null: nobody waits.
  WaitingText* Next();
  // Takes that one out: its turn has come.
  WaitingText TakeNext();
  template <typename Dropped>
  void DropIf(Dropped&& dropped) {
    std::erase_if(texts_, dropped);
  }

  const std::deque<WaitingText>& texts() const { return texts_; }

 private:
  uint64_t NextTurn(const std::string& client) const;
  size_t WaitingForOthers(size_t places, size_t bytes) const;

  const SchedulerOptions& options_;
  std::deque<WaitingText> texts_;                // in the order they came
  uint64_t turn_ = 0;                            // of the last text that was admitted
  std::map<std::string, uint64_t> turns_after_;  // of clients: behind their last admitted text, where that is beyond
};

}  // namespace lesskv
