// Whose turn is next, and who leaves a full queue.
#include "server/waiting_texts.h"

#include <gtest/gtest.h>

#include <vector>

namespace lesskv {
namespace {

class WaitingTextsTest : public testing::Test {
 protected:
  // A text of `client`, whose texts are named a1, a2, ...: returns the name of the one that has to go.
  std::string Add(const std::string& client, size_t choices = 1, size_t bytes = 1, size_t places = 0,
                  size_t bytes_taken = 0) {
    JobRequest request;
    request.client = client;
    request.choices = choices;
    const auto job = std::make_shared<Job>(std::move(request));
    names_[job.get()] = client + std::to_string(++counts_[client]);
    const std::shared_ptr<Job> refused = waiting_.Add({.job = job, .bytes = bytes, .each = bytes}, places, bytes_taken);
    return refused == nullptr ? "" : names_.at(refused.get());
  }
  std::string Take() { return names_.at(waiting_.TakeNext().job.get()); }
  std::string TakeAll() {
    std::string order;
    while (waiting_.Next() != nullptr) order += Take();
    return order;
  }

  SchedulerOptions options_{.max_running = 4, .max_queued = 100};
  WaitingTexts waiting_{options_};
  std::map<const Job*, std::string> names_;
  std::map<std::string, int> counts_;
};

TEST_F(WaitingTextsTest, ChoicesAreAsManyTurns) {
  for (int i = 0; i < 2; ++i) Add("a", 2);
  for (int i = 0; i < 4; ++i) Add("b");
  EXPECT_EQ(TakeAll(), "a1b1b2a2b3b4");
}

// Who has had its turns does not come before those that wait.
TEST_F(WaitingTextsTest, TurnsThatWereHadCount) {
  Add("a", 2);
  for (int i = 0; i < 3; ++i) Add("b");
  EXPECT_EQ(Take(), "a1");
  Add("a");
  EXPECT_EQ(TakeAll(), "b1b2b3a2");
  for (int i = 0; i < 2; ++i) Add("a");
  Add("c");  // comes new, and is not behind what others had
  EXPECT_EQ(TakeAll(), "c1a3a4");
}

TEST_F(WaitingTextsTest, NobodyIsDrivenOut) {
  options_.max_running = options_.max_queued = 1;
  EXPECT_EQ(Add("a", 1, 1, 1), "");
  EXPECT_EQ(Add("b", 1, 1, 1), "b1");
  EXPECT_EQ(Add("a", 1, 1, 1), "a2");
  EXPECT_EQ(TakeAll(), "a1");
}

TEST_F(WaitingTextsTest, TheNewestOfWhoHasMostLeaves) {
  options_.max_running = 1;
  options_.max_queued = 3;
  for (int i = 0; i < 3; ++i) EXPECT_EQ(Add("b", 1, 1, 1), "");
  EXPECT_EQ(Add("a", 1, 1, 1), "b3");
  EXPECT_EQ(Add("a", 1, 1, 1), "a2");  // or a would have as many as b has left
  EXPECT_EQ(TakeAll(), "b1a1b2");
}

// Those that begin at once are not in the queue: as far as places and memory go, in the order of their turns.
TEST_F(WaitingTextsTest, WhoBeginsAtOnceDoesNotWait) {
  options_.max_running = 2;
  options_.max_queued = 1;
  EXPECT_EQ(Add("a"), "");
  EXPECT_EQ(Add("a", 2), "");
  EXPECT_EQ(Add("b"), "");  // is before a's second, which alone waits
  EXPECT_EQ(Add("b"), "b2");
  EXPECT_EQ(TakeAll(), "a1b1a2");
}

TEST_F(WaitingTextsTest, WhoHasNoMemoryWaits) {
  options_.max_queued = 1;
  options_.kv_memory = 10;
  EXPECT_EQ(Add("a", 1, 4, 1, 6), "");
  EXPECT_EQ(Add("a", 1, 4, 1, 6), "");
  EXPECT_EQ(Add("a", 1, 4, 1, 6), "a3");
  options_.kv_memory = 0;  // no bound
  EXPECT_EQ(Add("a", 1, 4, 1, 6), "");
}

}  // namespace
}  // namespace lesskv
