// Texts that wait for the store hold nobody up, and can be let go of.
#include <set>

#include "server/reuse_harness.h"

namespace lesskv::server_test {
namespace {

// Values in memory, in a place so far away that reading lasts until the gate is opened.
class Gate {
 public:
  void Open() {
    const std::lock_guard lock(mutex_);
    open_ = true;
    opened_.notify_all();
  }
  void Close() {
    const std::lock_guard lock(mutex_);
    open_ = false;
  }
  void Pass() {
    std::unique_lock lock(mutex_);
    ++at_gate_;
    opened_.wait(lock, [&] { return open_; });
    --at_gate_;
  }
  bool SomebodyWaits() {
    const std::lock_guard lock(mutex_);
    return at_gate_ > 0;
  }

 private:
  std::mutex mutex_;
  std::condition_variable opened_;
  bool open_ = true;
  int at_gate_ = 0;
};

using Values = std::map<SessionName, std::vector<std::byte>>;

class FarBackend final : public StoreBackend {
 public:
  FarBackend(Values& values, Gate& gate, Gate& saving, const std::atomic<bool>& refuses)
      : values_(values), gate_(gate), saving_(saving), refuses_(refuses) {}
  bool remote() const override { return true; }
  size_t MaxBytes() const override { return 1 << 30; }
  std::vector<size_t> Lengths() override {
    const std::lock_guard lock(mutex_);
    std::set<size_t> lengths;
    for (const auto& [name, value] : values_) lengths.insert(name.n_tokens);
    return {lengths.begin(), lengths.end()};
  }
  std::vector<bool> Has(std::span<const SessionName> names) override {
    const std::lock_guard lock(mutex_);
    std::vector<bool> there;
    for (const SessionName& name : names) there.push_back(values_.contains(name));
    return there;
  }
  bool Read(const SessionName& name, const Use& use) override {
    gate_.Pass();
    const std::lock_guard lock(mutex_);
    if (refuses_) Fail(ErrorCode::kIo, "there is no room");
    if (!values_.contains(name)) return false;
    use(values_.at(name));
    return true;
  }
  bool Touch(const SessionName& name) override {
    saving_.Pass();
    return Has({&name, 1})[0];
  }
  void Write(const SessionName& name, std::span<const std::byte> bytes) override {
    const std::lock_guard lock(mutex_);
    values_[name] = {bytes.begin(), bytes.end()};
  }
  std::optional<StoreUsage> Usage() const override { return std::nullopt; }
  std::string Where(const SessionName& name) const override { return name.ToString(); }

 private:
  std::mutex mutex_;
  Values& values_;
  Gate &gate_, &saving_;
  const std::atomic<bool>& refuses_;  // to read, as a machine does that has no room for it
};

class LoadingTest : public ReuseTest {
 protected:
  void SetUp() override {
    ReuseTest::SetUp();
    far_.scheduler.store_patience = 1h;
    far_.backend = [this](const auto&) { return std::make_unique<FarBackend>(values_, gate_, saving_, refuses_); };
    Start(far_);
    Ask(Ids("the sea"));
    alone_.Say(Ids("the sea"));
    ASSERT_TRUE(Saved(1));
    Stop();
    prompt_ = Joined(alone_.text(), Ids(" and then"));
    gate_.Close();
  }
  void TearDown() override {
    gate_.Open();
    saving_.Open();
    ReuseTest::TearDown();
  }

  // Has the conversation go on, whose beginning then does not come.
  std::unique_ptr<Connection> Continue(size_t choices = 1) const {
    auto connection = std::make_unique<Connection>(port_);
    const Json body = {{"prompt", prompt_}, {"max_tokens", 30}, {"temperature", 0},
                       {"n", choices},      {"ignore_eos", true}};
    connection->Send(RequestText("POST", "/v1/completions", body.dump()));
    EXPECT_TRUE(Soon([&] { return scheduler_->Metrics().loading == 1; }));
    return connection;
  }
  bool IsLoading() const { return scheduler_->Metrics().loading == 1; }

  Values values_;
  Gate gate_, saving_;
  std::atomic<bool> refuses_ = false;
  Options far_;
  Streamed alone_{engine_, *tokenizer_, "full"};
  std::vector<int32_t> prompt_;
};

TEST_F(LoadingTest, OthersGoOn) {
  Start(far_);
  const auto running = LongStream();  // looks for nothing that is there
  const auto waiting = Continue();
  EXPECT_NE(running->Some(), "");
  for (const char* const prompt : {"aaaa", "bbbb"}) EXPECT_EQ(Cached(Ask(Ids(prompt))), 0u);  // are looked for, too
  EXPECT_TRUE(IsLoading());
  EXPECT_NE(Get("/metrics").body.find("\nlesskv_requests_loading 1\n"), std::string::npos);
  gate_.Open();
  const size_t seen = alone_.seen();
  const Json answer = ParseReply(waiting->All()).json();
  EXPECT_EQ(Cached(answer), seen);
  EXPECT_EQ(Text(answer), alone_.Say(Ids(" and then")));
  EXPECT_FALSE(IsLoading());
}

TEST_F(LoadingTest, WhatIsStillBeingSavedIsCopied) {
  Start(far_);
  saving_.Close();
  Streamed tea(engine_, *tokenizer_, "full");
  EXPECT_EQ(Text(Ask(Ids("the tea"))), tea.Say(Ids("the tea")));
  const std::vector<int32_t> first = tea.text();
  const size_t seen = tea.seen();
  ASSERT_TRUE(Soon([&] { return saving_.SomebodyWaits(); }));
  const Json next = Ask(Joined(first, Ids(" and then")));
  EXPECT_EQ(Cached(next), seen);
  EXPECT_EQ(Text(next), tea.Say(Ids(" and then")));
  saving_.Open();
  ASSERT_TRUE(Saved(2));
  Stop();
  gate_.Open();
  Start(far_);
  EXPECT_EQ(Cached(Ask(Joined(first, Ids(" or not")))), seen);
  EXPECT_EQ(Cached(Ask(Joined(tea.text(), Ids(" or not")))), tea.seen());
}

// The next turn takes what waits to be saved, and waits in its place.
TEST_F(LoadingTest, WhatWaitsToBeSavedGoesOn) {
  gate_.Open();
  Start(far_);
  saving_.Close();
  Ask(Ids("the tea"));
  ASSERT_TRUE(Soon([&] { return saving_.SomebodyWaits(); }));
  const std::string first = Text(Ask(Ids("the land")));
  Streamed land(engine_, *tokenizer_, "full");
  EXPECT_EQ(first, land.Say(Ids("the land")));
  const size_t seen = land.seen();
  const Json next = Ask(Joined(land.text(), Ids(" and then")));
  EXPECT_EQ(Cached(next), seen);
  EXPECT_EQ(Text(next), land.Say(Ids(" and then")));
  EXPECT_EQ(store_->Metrics().skipped, 1u);
  saving_.Open();
  EXPECT_TRUE(Saved(2));
}

// What waits to be saved is not held beyond the memory for caches: it is skipped where nothing else makes room.
TEST_F(LoadingTest, WhatWaitsToBeSavedMakesRoom) {
  const auto config = engine_.MakeCacheConfig(CacheSpec::Parse("full"), kCtx);
  const size_t one = config->Plan(10, 300).bytes_peak;
  far_.scheduler.kv_memory = 3 * one + one / 2;
  gate_.Open();
  Start(far_);
  saving_.Close();
  for (const char* const prompt : {"aaaaaaaa", "bbbbbbbb", "cccccccc", "dddddddd", "eeeeeeee", "ffffffff"}) {
    Ask(Ids(prompt), {{"max_tokens", 300}});
    ASSERT_TRUE(Soon([&] { return saving_.SomebodyWaits(); }));  // the first one is in work before another needs room
  }
  ASSERT_TRUE(Soon([&] {
    const SchedulerMetrics metrics = scheduler_->Metrics();
    return metrics.idle + metrics.idle_dropped == 6;
  }));
  const uint64_t dropped = scheduler_->Metrics().idle_dropped;
  ASSERT_GE(dropped, 3u);
  EXPECT_EQ(store_->Metrics().skipped, dropped - 1);  // but for the first, which is in work
  saving_.Open();
  EXPECT_TRUE(Saved(6 - (dropped - 1)));
}

TEST_F(LoadingTest, ItHasItsPlace) {
  far_.scheduler.max_running = 1;
  Start(far_);
  const auto waiting = Continue();
  EXPECT_GT(scheduler_->Metrics().kv_bytes_reserved, 0u);
  Connection next(port_);
  next.Send(RequestText("POST", "/v1/completions", R"({"prompt":"the","max_tokens":3,"cache_prompt":false})"));
  ASSERT_TRUE(Soon([&] { return scheduler_->Metrics().queued == 1; }));
  std::this_thread::sleep_for(100ms);
  EXPECT_EQ(scheduler_->Metrics().running, 0u);
  gate_.Open();
  EXPECT_EQ(ParseReply(waiting->All()).status, 200);
  EXPECT_EQ(ParseReply(next.All()).status, 200);
  EXPECT_TRUE(Soon([&] { return scheduler_->Metrics().kv_bytes_reserved == 0; }));
}

TEST_F(LoadingTest, AClientThatGoesLeavesNothingBehind) {
  Start(far_);
  Continue().reset();
  EXPECT_TRUE(Soon([&] { return scheduler_->Metrics().jobs_cancelled == 1; }));
  EXPECT_FALSE(IsLoading());
  EXPECT_EQ(scheduler_->Metrics().kv_bytes_reserved, 0u);
  gate_.Open();
  EXPECT_EQ(Cached(Ask(prompt_)), alone_.seen());
}

// Two texts that wait for its places begin together when its client goes, and take no more of a step than it has.
TEST_F(LoadingTest, ItsPlacesAreGivenBack) {
  far_.scheduler.max_running = 2;
  Start(far_);
  auto waiting = Continue(2);
  const Connection first(port_), second(port_);
  const auto send = [&](const Connection& connection, size_t n_tokens, size_t n_queued) {
    const Json body = {{"prompt", std::vector<int32_t>(n_tokens, 'x')}, {"max_tokens", 1}, {"cache_prompt", false}};
    connection.Send(RequestText("POST", "/v1/completions", body.dump()));
    EXPECT_TRUE(Soon([&] { return scheduler_->Metrics().queued == n_queued; }));
  };
  send(first, 4 * 16, 1);
  send(second, 16 + 4, 2);
  EXPECT_EQ(scheduler_->Metrics().steps, 0u);
  waiting.reset();
  EXPECT_EQ(ParseReply(first.All()).status, 200);
  EXPECT_EQ(ParseReply(second.All()).status, 200);
  EXPECT_EQ(scheduler_->Metrics().steps, 4u + 2u);
  EXPECT_EQ(Complete({{"n", 2}, {"cache_prompt", false}}).status, 200);
}

// Of idle caches one leaves first that the store has, however lately it was used.
TEST_F(LoadingTest, WhatIsSavedMakesRoomFirst) {
  const auto config = engine_.MakeCacheConfig(CacheSpec::Parse("full"), kCtx);
  const size_t one = config->Plan(10, 300).bytes_peak;
  far_.scheduler.kv_memory = 4 * one + one / 2;
  gate_.Open();
  Start(far_);
  const auto ask = [&](const char* prompt, size_t n_idle) {
    Ask(Ids(prompt), {{"max_tokens", 300}, {"ignore_eos", true}, {"cache_prompt", false}});
    EXPECT_TRUE(Soon([&] { return scheduler_->Metrics().idle == n_idle && scheduler_->Metrics().running == 0; }));
  };
  ask("aaaaaaaa", 1);
  ASSERT_TRUE(Saved(1));
  saving_.Close();
  ask("bbbbbbbb", 2);
  ASSERT_TRUE(Soon([&] { return saving_.SomebodyWaits(); }));
  ask("cccccccc", 3);
  ask("bbbbbbbb", 3);  // is in work, which leaves the third the one that was not used for longest
  ask("aaaaaaaa", 3);
  EXPECT_EQ(scheduler_->Metrics().idle_dropped, 0u);
  ask("dddddddd", 4);
  ask("eeeeeeee", 4);
  EXPECT_EQ(scheduler_->Metrics().idle_dropped, 1u);
  EXPECT_EQ(store_->Metrics().skipped, 0u);
  saving_.Open();
  EXPECT_TRUE(Saved(5));
}

TEST_F(LoadingTest, PatienceEnds) {
  far_.scheduler.store_patience = 100ms;
  Start(far_);
  const Json answer = Ask(prompt_);  // while the gate is closed
  EXPECT_EQ(Cached(answer), 0u);
  EXPECT_EQ(Text(answer), alone_.Say(Ids(" and then")));
}

TEST_F(LoadingTest, WhatMemoryHasMeanwhileIsTaken) {
  Start(far_);
  const auto waiting = Continue();
  const size_t n = prompt_.size() - 2;
  ASSERT_GT(n, alone_.seen());
  Ask({prompt_.begin(), prompt_.begin() + static_cast<std::ptrdiff_t>(n)},
      {{"cache_prompt", false}, {"max_tokens", 1}});
  EXPECT_TRUE(IsLoading());
  gate_.Open();
  EXPECT_EQ(Cached(ParseReply(waiting->All()).json()), n);
}

TEST_F(LoadingTest, WhatTheStoreHasMoreOfIsTaken) {
  gate_.Open();
  Start(far_);
  const std::vector<int32_t> beginning(prompt_.begin(), prompt_.begin() + 5);
  Ask(beginning, {{"max_tokens", 1}});
  ASSERT_TRUE(Soon([&] { return scheduler_->Metrics().idle == 1; }));
  EXPECT_EQ(Cached(Ask(prompt_)), alone_.seen());
}

TEST_F(LoadingTest, WhatIsThereIsNotWrittenAgain) {
  Start(far_);
  Ask(Ids("the sea"));  // as SetUp has it
  Ask(Ids("the tea"));
  EXPECT_TRUE(Saved(1));
  EXPECT_EQ(values_.size(), 2u);
}

// What cannot be read now is no damage of it.
TEST_F(LoadingTest, AfterAFailureItIsReadAgain) {
  gate_.Open();
  Start(far_);
  refuses_ = true;
  EXPECT_EQ(Cached(Ask(prompt_, {{"max_tokens", 1}})), 0u);
  EXPECT_NE(Log().find("passed over: there is no room"), std::string::npos) << Log();
  refuses_ = false;
  EXPECT_EQ(Cached(Ask(Joined(alone_.text(), Ids(" or not")), {{"max_tokens", 1}})), alone_.seen());
  EXPECT_EQ(store_->Metrics().damaged, 0u);
}

TEST_F(LoadingTest, TimeIsLimited) {
  far_.max_time = 3s;  // the store is asked before that is over
  Start(far_);
  const Connection connection(port_);
  const Json body = {{"prompt", prompt_}, {"max_tokens", 30}, {"temperature", 0}};
  connection.Send(RequestText("POST", "/v1/completions", body.dump()));
  const Reply late = ParseReply(connection.All());  // of one that is read from the store until then
  EXPECT_EQ(late.status, 504);
  EXPECT_TRUE(gate_.SomebodyWaits());
  EXPECT_NE(late.body.find("time ran out"), std::string::npos);
  EXPECT_EQ(scheduler_->Metrics().kv_bytes_reserved, 0u);
}

TEST_F(LoadingTest, TheEndOfTheServerEndsIt) {
  Start(far_);
  const auto waiting = Continue();
  scheduler_->Stop();
  EXPECT_NE(waiting->All().find("the server is stopping"), std::string::npos);
}

}  // namespace
}  // namespace lesskv::server_test
