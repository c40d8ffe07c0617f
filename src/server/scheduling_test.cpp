// Who is served when, and with what: streams beside long prompts, clients beside each other, texts on a small disk.
#include <sys/mount.h>

#include <chrono>
#include <filesystem>
#include <set>
#include <thread>

#include "server/server_harness.h"

namespace lesskv::server_test {
namespace {

class SchedulingTest : public ServerTest {
 protected:
  // Of thousands of tokens it takes long enough to be found in the middle of.
  std::vector<int32_t> LongPrompt(size_t n) const {
    std::vector<int32_t> ids = tokenizer_->Encode("the tea", true, true);
    for (int32_t i = 0; ids.size() < n; ++i) ids.push_back(i * 11 % 250);
    return ids;
  }
  // Of the text with that prompt while nothing of it has been read, as it is seen from outside.
  bool IsReading(size_t n_prompt) const {
    for (const SlotState& slot : scheduler_->Slots())
      if (slot.prompt_tokens == n_prompt) return slot.prompt_read == 0;
    return false;
  }
  Options WithPauses() const {
    return {.scheduler = {.max_running = 3, .max_queued = 8, .step_tokens = 16, .pause_after = 0ms},
            .http = {.port = 0, .max_body = 1 << 20},
            .kv = {"full", "window(24)", "h2o(24)", "snapkv(24, window=8)"},
            .max_prompt = 14000};
  }
};

TEST_F(SchedulingTest, StreamsGoOnBesideAPromptThatIsReadWhole) {
  Start(WithPauses());
  const std::vector<int32_t> prompt = LongPrompt(6000);
  for (const char* const spec : {"h2o(24)", "snapkv(24, window=8)"}) {
    const auto stream = LongStream();
    Json body = {{"prompt", prompt}, {"kv_policy", spec}, {"max_tokens", 12}};
    std::atomic<bool> done = false;
    std::string text;
    std::thread client([&] {
      text = Complete(body).json()["choices"][0]["text"];
      done = true;
    });
    EXPECT_TRUE(Soon([&] { return done || IsReading(prompt.size()); }));
    bool in_time = false;  // one that comes meanwhile has its turn, too
    std::thread other([&] { in_time = Complete({{"max_tokens", 2}}).status == 200 && IsReading(prompt.size()); });
    std::set<size_t> generated;  // by the stream, while the prompt was read
    while (!done && generated.size() < 3)
      for (const SlotState& slot : scheduler_->Slots())
        if (slot.spec == "window(24)" && IsReading(prompt.size())) generated.insert(slot.generated_tokens);
    other.join();
    client.join();
    EXPECT_GE(generated.size(), 3u) << spec;
    EXPECT_TRUE(in_time) << spec;
    Engine engine(engine_.shared_model(), {.threads = 1, .compute = ComputeChoice::kF32, .batch_invariant = true});
    Sequence sequence(engine.MakeCacheConfig(CacheSpec::Parse(spec), kCtx));
    GenerateOptions options;
    options.sampler = {.temperature = 0};
    options.max_tokens = 12;
    EXPECT_EQ(text, Generate(engine, *tokenizer_, sequence, prompt, options).text) << spec;
  }
}

TEST_F(SchedulingTest, APromptThatIsReadWholeCanBeCancelled) {
  Start(WithPauses());
  const std::vector<int32_t> prompt = LongPrompt(14000);
  const Json body = {{"prompt", prompt}, {"kv_policy", "h2o(24)"}, {"max_tokens", 12}, {"n", 2}};
  {
    const Connection connection(port_);
    connection.Send(RequestText("POST", "/v1/completions", body.dump()));
    const auto stream = LongStream();
    ASSERT_TRUE(Soon([&] { return IsReading(prompt.size()); }));
  }
  EXPECT_TRUE(Soon([&] { return scheduler_->Metrics().jobs_cancelled == 2; }));
  EXPECT_TRUE(Soon([&] { return scheduler_->Metrics().kv_bytes_reserved == 0; }));
  EXPECT_EQ(scheduler_->Metrics().prompt_tokens, tokenizer_->Encode("the tea", true, true).size());
  EXPECT_EQ(Complete({{"n", 3}}).status, 200);  // all places are free
}

TEST_F(SchedulingTest, TheServerCanEndInTheMiddleOfAPrompt) {
  Start(WithPauses());
  const std::vector<int32_t> prompt = LongPrompt(14000);
  const Connection connection(port_);
  const Json body = {{"prompt", prompt}, {"kv_policy", "h2o(24)"}, {"max_tokens", 12}};
  connection.Send(RequestText("POST", "/v1/completions", body.dump()));
  const auto stream = LongStream();
  ASSERT_TRUE(Soon([&] { return IsReading(prompt.size()); }));
  scheduler_->Stop();
  const Reply reply = ParseReply(connection.All());
  EXPECT_EQ(reply.status, 503);  // another server may have a place
  EXPECT_NE(reply.head.find("Retry-After"), std::string::npos) << reply.head;
  EXPECT_NE(reply.body.find("the server is stopping"), std::string::npos) << reply.body;
  EXPECT_EQ(scheduler_->Metrics().idle, 1u);  // the stream's cache: the prompt has not been read to its end
}

// The next of several texts without end begins when the one that runs is cancelled. Each has another prompt length.
TEST_F(SchedulingTest, ClientsTakeTurns) {
  Start({.scheduler = {.max_running = 1, .max_queued = 8}});
  const auto config = engine_.MakeCacheConfig(CacheSpec::Parse("window(24)"), kCtx);
  GenerationOptions options;
  options.sampler = {.temperature = 0};
  options.max_tokens = 150000;
  options.ignore_end = true;
  std::map<size_t, std::pair<std::string, std::shared_ptr<Job>>> jobs;
  const auto submit = [&](const std::string& client) {
    const size_t n = jobs.size() + 1;
    JobRequest request{.prompt = std::vector<int32_t>(n, 'x'), .options = options, .config = config, .client = client};
    jobs[n] = {client, scheduler_->Submit(std::move(request))};
  };
  std::set<size_t> ended;
  const auto running = [&] {  // its prompt's length
    size_t n = 0;
    EXPECT_TRUE(Soon([&] {
      const std::vector<SlotState> slots = scheduler_->Slots();
      n = slots.size() == 1 ? slots[0].prompt_tokens : 0;
      return n != 0 && !ended.contains(n);
    }));
    return n;
  };
  std::string order;
  const auto end_one = [&] {
    const size_t n = running();
    ASSERT_TRUE(jobs.contains(n));
    order += jobs[n].first;
    ended.insert(n);
    jobs[n].second->Cancel();
  };
  for (int i = 0; i < 5; ++i) submit("a");
  for (int i = 0; i < 2; ++i) submit("b");
  submit("c");
  for (int i = 0; i < 6; ++i) end_one();
  running();
  submit("b");  // had its turns before, but does not wait for all of a's
  for (int i = 0; i < 3; ++i) end_one();
  EXPECT_EQ(order, "abcabaaba");
}

class FairTest : public ServerTest {
 protected:
  void StartFair(size_t max_queued) {
    Start({.scheduler = {.max_running = 1, .max_queued = max_queued, .step_tokens = 16},
           .http = {.port = 0, .api_keys = {"a", "b", "c"}}});
    long_ = std::make_unique<Connection>(port_);  // of a fourth client, as long as it is there nobody else begins
    const Json body = {{"prompt", "the tea"}, {"max_tokens", 150000}, {"ignore_eos", true}, {"stream", true},
                       {"kv_policy", "window(24)"}};
    long_->Send(RequestText("POST", "/v1/completions", body.dump(), "Authorization: Bearer c\r\n"));
    ASSERT_TRUE(Soon([&] { return scheduler_->Metrics().running == 1; }));
  }
  // Sends a request and waits until it is in the queue.
  void Send(const std::string& key) {
    const size_t before = scheduler_->Metrics().queued + scheduler_->Metrics().jobs_rejected;
    clients_.emplace_back([this, key, i = clients_.size()] {
      const std::string body = R"({"prompt":"the tea","max_tokens":3})";
      const Reply reply = Call(RequestText("POST", "/v1/completions", body, "Authorization: Bearer " + key + "\r\n"));
      const std::lock_guard lock(mutex_);
      statuses_[i] = reply.status;
    });
    ASSERT_TRUE(
        Soon([&] { return scheduler_->Metrics().queued + scheduler_->Metrics().jobs_rejected > before; }));
  }
  void Finish() {
    long_.reset();
    for (std::thread& client : clients_) client.join();
    clients_.clear();
  }
  void TearDown() override {
    Finish();
    ServerTest::TearDown();
  }
  int Status(size_t i) {
    const std::lock_guard lock(mutex_);
    return statuses_.contains(i) ? statuses_[i] : 0;
  }

  std::unique_ptr<Connection> long_;
  std::vector<std::thread> clients_;
  std::mutex mutex_;
  std::map<size_t, int> statuses_;
};

TEST_F(FairTest, AFullQueueIsShared) {
  StartFair(4);
  for (int i = 0; i < 4; ++i) Send("a");
  Send("b");  // the last of a's texts has gone
  ASSERT_TRUE(Soon([&] { return Status(3) == 429; }));
  Send("b");  // and the next: both have two
  ASSERT_TRUE(Soon([&] { return Status(2) == 429; }));
  Send("b");
  ASSERT_TRUE(Soon([&] { return Status(6) == 429; }));
  Send("a");
  ASSERT_TRUE(Soon([&] { return Status(7) == 429; }));
  EXPECT_EQ(scheduler_->Metrics().queued, 4u);
  EXPECT_EQ(scheduler_->Metrics().jobs_rejected, 4u);
  Finish();
  for (const size_t i : {0, 1, 4, 5}) EXPECT_EQ(Status(i), 200) << i;
}

// A disk of a megabyte.
class SmallDiskTest : public SchedulingTest {
 protected:
  void SetUp() override {
    folder_ = std::filesystem::temp_directory_path() / fmt::format("lesskv_small_disk_{}", ::getpid());
    std::filesystem::create_directories(folder_);
    mounted_ = ::mount("lesskv", folder_.c_str(), "tmpfs", 0, "size=1m") == 0;
    if (!mounted_) GTEST_SKIP() << "a file system of its own may not be mounted here";
  }
  void TearDown() override {
    ServerTest::TearDown();
    if (mounted_) ::umount(folder_.c_str());
    std::filesystem::remove(folder_);
  }
  std::vector<int32_t> Prompt(int32_t first, size_t n) const {
    std::vector<int32_t> ids = {first};
    for (int32_t i = 0; ids.size() < n; ++i) ids.push_back((first + i * 11) % 250);
    return ids;
  }

  std::filesystem::path folder_;
  bool mounted_ = false;
};

TEST_F(SmallDiskTest, IdleCachesMakeRoomOnADisk) {
  const std::string text = fmt::format("cluster(24, skip=0, offload=\"{}\")", folder_.string());
  const std::string spec = CacheSpec::Parse(text).ToString();
  Start({.kv = {spec, "full"}, .max_prompt = 14000});
  const auto ask = [&](int32_t first, size_t n) {
    return Complete({{"prompt", Prompt(first, n)}, {"max_tokens", 40}});
  };
  EXPECT_EQ(Complete({{"kv_policy", "full"}}).status, 200);  // has nothing there, and stays
  for (int32_t i = 3; i < 9; ++i) {
    const Reply reply = ask(i, 2500);
    EXPECT_EQ(reply.status, 200) << i << ": " << reply.body;
  }
  SchedulerMetrics metrics;
  EXPECT_TRUE(Soon([&] {  // a text is answered before its cache idles
    metrics = scheduler_->Metrics();
    return metrics.idle + metrics.idle_dropped == 7;
  }));
  EXPECT_GT(metrics.idle_dropped, 0u);
  EXPECT_EQ(metrics.specs.at("full").idle, 1u);
  const Reply large = ask(9, 12000);  // larger than the disk
  EXPECT_EQ(large.status, 500);
  EXPECT_NE(large.body.find("No space left"), std::string::npos) << large.body;
  EXPECT_EQ(ask(10, 2500).status, 200);
}

// The store's directory on the same disk: what it cannot write is not kept, and texts go on.
TEST_F(SmallDiskTest, AStoreThatFindsNoRoomIsNotWaitedFor) {
  const std::string text = fmt::format("cluster(24, skip=0, offload=\"{}\")", folder_.string());
  Start({.store = folder_ / "store", .kv = {CacheSpec::Parse(text).ToString()}, .max_prompt = 14000});
  for (int32_t i = 3; i < 9; ++i) {
    const Reply reply = Complete({{"prompt", Prompt(i, 2500)}, {"max_tokens", 40}});
    EXPECT_EQ(reply.status, 200) << i << ": " << reply.body;
  }
  ASSERT_TRUE(Soon([&] { return store_->Metrics().saved + store_->Metrics().skipped == 6; }));
  EXPECT_GT(store_->Metrics().skipped, 0u);
  EXPECT_NE(Log().find("could not be saved"), std::string::npos) << Log();
  for (const auto& file : std::filesystem::recursive_directory_iterator(folder_ / "store"))
    EXPECT_TRUE(file.is_directory() || file.file_size() > 100000) << file.path() << " is a part of one";
}

}  // namespace
}  // namespace lesskv::server_test
