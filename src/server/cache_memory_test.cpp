// What idle caches give to prompts that begin like theirs, and what they take of the memory for caches.
#include "server/cache_memory.h"

#include "server/server_harness.h"

namespace lesskv::server_test {
namespace {

constexpr const char* kPieces = "window(24)+prefill(chunk=8)";

class IdleCachesTest : public testing::Test {
 protected:
  std::shared_ptr<const CacheConfig> Config(const std::string& spec, std::vector<ProtectedSpan> spans = {}) const {
    return engine_.MakeCacheConfig(CacheSpec::Parse(spec), kCtx, std::move(spans));
  }
  // n tokens, of which the first n_common are those of any other text.
  static std::vector<int32_t> Text(size_t n, size_t n_common, int32_t own) {
    std::vector<int32_t> ids(n, own);
    for (size_t i = 0; i < std::min(n, n_common); ++i) ids[i] = static_cast<int32_t>(100 + i % 97);
    return ids;
  }
  Sequence Read(const std::shared_ptr<const CacheConfig>& config, const std::vector<int32_t>& tokens) {
    Sequence sequence(config);
    engine_.Prefill({{&sequence, tokens, LogitsRows::kNone}});
    return sequence;
  }
  static JobRequest Request(std::vector<int32_t> prompt, std::shared_ptr<const CacheConfig> config) {
    JobRequest request;
    request.prompt = std::move(prompt);
    request.config = std::move(config);
    return request;
  }
  static WaitingText Waiting(JobRequest request, size_t bytes) {
    return {.job = std::make_shared<Job>(std::move(request)), .bytes = bytes, .each = bytes};
  }
  static RunningText Running(JobRequest request, Sequence sequence, size_t bytes = 0) {
    const size_t seen = sequence.tokens().size();
    return {.job = std::make_shared<Job>(std::move(request)),
            .bytes = bytes,
            .each = bytes,
            .sequence = std::move(sequence),
            .cached = seen,
            .fed = seen};
  }
  // Lets a text run that has read its first tokens.
  const RunningText& Run(const std::vector<int32_t>& prompt, const std::string& spec, size_t n_read, size_t bytes = 0) {
    const auto config = Config(spec);
    Sequence sequence = Read(config, {prompt.begin(), prompt.begin() + static_cast<std::ptrdiff_t>(n_read)});
    running_.push_back(std::make_unique<RunningText>(Running(Request(prompt, config), std::move(sequence), bytes)));
    memory_.CountShared(static_cast<std::ptrdiff_t>(bytes));
    return *running_.back();
  }

  Engine engine_{Model::Load(kModel), {.threads = 1, .compute = ComputeChoice::kF32, .batch_invariant = true}};
  SchedulerOptions options_;
  RunningTexts running_;
  CacheMemory memory_{options_, nullptr, running_};
};

// A copy is kept where prompts part, far enough behind what was there and before what is read in one piece.
TEST_F(IdleCachesTest, BeginningsAreSharedWhereTextsPart) {
  Run(Text(100, 60, 7), "full", 1);
  Run(Text(100, 60, 7), kPieces, 1);
  const auto shared = [&](const std::string& spec, size_t n_cached, size_t n = 80, bool reuse = true) {
    const auto config = Config(spec);
    JobRequest request = Request(Text(n, 60, 8), config);
    request.reuse = reuse;
    RunningText text = Running(std::move(request), Sequence(config));
    text.cached = n_cached;
    return memory_.SharedBeginning(text);
  };
  EXPECT_EQ(shared("full", 0), 60u);
  EXPECT_EQ(shared("full", 0, 70), 70 - kShortestPiece);
  EXPECT_EQ(shared("full", 60 - 32), 60u);
  EXPECT_EQ(shared("full", 60 - 31), 0u);  // too little is new
  EXPECT_EQ(shared(kPieces, 0), 56u);
  EXPECT_EQ(shared(kPieces, 3), 59u);  // whole pieces behind what is there
  EXPECT_EQ(shared("window(20)+prefill(chunk=8)", 0), 0u);  // no other has such a cache
  EXPECT_EQ(shared("h2o(24)", 0), 0u);  // sees its prompt whole
  EXPECT_EQ(shared("full", 0, 80, false), 0u);
  options_.max_idle = 0;
  EXPECT_EQ(shared("full", 0), 0u);
}

// A beginning that several share stays beside its copy where both have room, else it is given away.
TEST_F(IdleCachesTest, ASharedBeginningStaysWhereThereIsRoom) {
  for (const bool room : {true, false}) {
    memory_.KeepShared(Run(Text(100, 60, 7), "full", 60));
    running_.clear();
    memory_.CountShared();
    ASSERT_EQ(memory_.idle().size(), 1u);
    ASSERT_TRUE(memory_.idle().entries().front().sequence->cache().ShareableParts().empty());
    const size_t own = 5000000;
    options_.kv_memory = own + memory_.idle().bytes() - (room ? 0 : 1);
    WaitingText text = Waiting(Request(Text(80, 60, 8), Config("full")), own);
    ASSERT_TRUE(memory_.Reserve(text));
    EXPECT_FALSE(text.joins);
    EXPECT_EQ(memory_.Begin(text, std::nullopt).tokens().size(), 60u);
    EXPECT_EQ(memory_.idle().size(), room ? 1u : 0u);
    EXPECT_EQ(memory_.dropped(), 0u);
    memory_.CountShared(-static_cast<std::ptrdiff_t>(own));
    options_.kv_memory = 0;
  }
}

TEST_F(IdleCachesTest, ACopyThatHasNoRoomIsNotMade) {
  const size_t bytes = 5000000;
  const RunningText& text = Run(Text(100, 60, 7), "full", 60, bytes);
  options_.kv_memory = bytes + text.sequence.Stats().kv_bytes - 1;
  memory_.KeepShared(text);
  EXPECT_EQ(memory_.idle().size(), 0u);
  EXPECT_EQ(memory_.dropped(), 0u);
}

// A text that has room only beside one with the same beginning takes no more of it than there is.
TEST_F(IdleCachesTest, WhoJoinsKeepsToTheMemory) {
  const size_t bytes = 50000000;
  memory_.KeepShared(Run(Text(700, 600, 7), "full", 600, bytes));
  memory_.CountShared();
  const size_t shared = memory_.idle().entries().front().running;
  ASSERT_GT(shared, 0u);
  options_.kv_memory = 2 * bytes - shared;
  JobRequest request = Request(Text(700, 600, 8), Config("full"));
  request.reuse = false;  // reads it all anew
  WaitingText alone = Waiting(request, bytes), larger = Waiting(Request(request.prompt, request.config), bytes + 1),
              text = Waiting(Request(request.prompt, request.config), bytes);
  EXPECT_FALSE(memory_.Reserve(alone));
  EXPECT_FALSE(memory_.Reserve(larger));
  ASSERT_TRUE(memory_.Reserve(text));
  EXPECT_TRUE(text.joins);
  EXPECT_EQ(memory_.reserved(), 2 * bytes - shared);
  EXPECT_EQ(memory_.Begin(text, std::nullopt).tokens().size(), 600u);
  EXPECT_EQ(memory_.reserved(), 2 * bytes - shared);
}

TEST_F(IdleCachesTest, ASlotTellsHowFarItsTextIs) {
  const auto config = Config("full");
  RunningText text = Running(Request(Text(100, 60, 7), config), Read(config, Text(40, 40, 0)), 3000);
  text.each = 1000;  // of three choices
  text.cached = 30;
  const SlotState slot = Slot(text);
  EXPECT_EQ(slot.prompt_tokens, 100u);
  EXPECT_EQ(slot.prompt_read, 40u);
  EXPECT_EQ(slot.cached_tokens, 30u);
  EXPECT_EQ(slot.kv_bytes_reserved, 3000u);
  EXPECT_EQ(slot.kv_bytes, text.sequence.Stats().kv_bytes);
}

class PiecesTest : public IdleCachesTest {
 protected:
  // The next piece of a prompt of n tokens, of which so many have been read, and what it leaves of the budget.
  std::pair<size_t, size_t> Next(const std::string& spec, size_t n, size_t fed, size_t budget, size_t shared = 0) const {
    const auto config = Config(spec);
    RunningText text = Running(Request(Text(n, n, 0), config), Sequence(config));
    text.fed = fed;
    text.shared = shared;
    const StepItem item = text.NextItem(3, budget);
    EXPECT_EQ(item.tag, 3u);
    EXPECT_EQ(item.tokens.size(), text.next_fed);
    EXPECT_EQ(item.tokens.data(), text.job->request().prompt.data() + fed);
    EXPECT_EQ(item.logits == LogitsRows::kLast, fed + text.next_fed == n);
    EXPECT_EQ(item.kind, SeesPromptWhole(*config) ? StepKind::kPrompt : StepKind::kStream);
    return {text.next_fed, budget};
  }
};

TEST_F(PiecesTest, APieceIsWhatTheStepLeaves) {
  using Piece = std::pair<size_t, size_t>;
  const size_t few = kShortestPiece;
  EXPECT_EQ(Next("full", 100, 0, 64), (Piece{64, 0}));
  EXPECT_EQ(Next("full", 100, 64, 64), (Piece{36, 28}));
  EXPECT_EQ(Next("full", 64, 0, 64), (Piece{64, 0}));
  EXPECT_EQ(Next("full", 70, 0, 64), (Piece{70 - few, 64 - (70 - few)}));  // the last piece is not too short
  EXPECT_EQ(Next("full", 64 + few, 0, 64), (Piece{64, 0}));
  EXPECT_EQ(Next("full", 30, 0, 2 * few), (Piece{30 - few, 2 * few - (30 - few)}));
  EXPECT_EQ(Next("full", 30, 0, 2 * few - 1), (Piece{2 * few - 1, 0}));  // or this one would be
  EXPECT_EQ(Next("full", 100, 10, 64, 40), (Piece{30, 34}));  // to where a copy is kept
  EXPECT_EQ(Next("full", 100, 40, 64, 40), (Piece{60, 4}));
  EXPECT_EQ(Next(kPieces, 100, 0, 64), (Piece{8, 56}));
  EXPECT_EQ(Next(kPieces, 100, 0, 4), (Piece{8, 0}));
  EXPECT_EQ(Next(kPieces, 100, 97, 64), (Piece{3, 61}));
  EXPECT_EQ(Next(kPieces, 100, 0, 64, 6), (Piece{6, 58}));
  EXPECT_EQ(Next("h2o(24)", 100, 10, 64), (Piece{90, 0}));
}

TEST_F(PiecesTest, WhatIsReadWholeAndLongHasItsOwnStep) {
  const auto needs = [&](const std::string& spec, size_t n, size_t fed) {
    const auto config = Config(spec);
    RunningText text = Running(Request(Text(n, n, 0), config), Sequence(config));
    text.fed = fed;
    return text.NeedsOwnStep(64);
  };
  EXPECT_TRUE(needs("h2o(24)", 65, 0));
  EXPECT_FALSE(needs("h2o(24)", 64, 0));
  EXPECT_TRUE(needs("h2o(24)", 100, 35));
  EXPECT_FALSE(needs("h2o(24)", 100, 36));  // what is left of it is short
  EXPECT_FALSE(needs("full", 100, 0));
  EXPECT_FALSE(needs(kPieces, 100, 0));
}

class PrefixCacheTest : public IdleCachesTest {
 protected:
  void Add(size_t n_tokens, const std::string& spec = "full", std::vector<ProtectedSpan> spans = {}) {
    cache_.Add(Read(Config(spec, std::move(spans)), Text(n_tokens, n_tokens, 0)), false);
  }
  // How many tokens of a long prompt are found.
  size_t Found(const std::string& spec = "full", std::vector<ProtectedSpan> spans = {}) {
    const auto config = Config(spec, std::move(spans));
    const std::vector<int32_t> prompt = Text(90, 90, 0);
    const PrefixCache::Entry* const found = cache_.Find({prompt, *config});
    return found == nullptr ? 0 : found->sequence->tokens().size();
  }
  std::vector<size_t> Order() const {
    std::vector<size_t> order;
    for (const PrefixCache::Entry& entry : cache_.entries()) order.push_back(entry.sequence->tokens().size());
    return order;
  }

  PrefixCache cache_;
};

TEST_F(PrefixCacheTest, WhatHasSeenMostIsFoundAndUsed) {
  for (const size_t n : {30, 50, 40}) Add(n);
  EXPECT_EQ(Order(), (std::vector<size_t>{40, 50, 30}));
  EXPECT_EQ(Found(), 50u);
  EXPECT_EQ(Order(), (std::vector<size_t>{50, 40, 30}));
  Add(30);  // is here already
  EXPECT_EQ(Order(), (std::vector<size_t>{30, 50, 40}));
  Add(90);  // all of the prompt: its last token is to be read
  EXPECT_EQ(Found(), 50u);
}

// The cache's bytes, and those of the tokens' ids.
TEST_F(PrefixCacheTest, IdsCount) {
  Add(50);
  EXPECT_EQ(cache_.bytes(), cache_.entries().front().sequence->Stats().kv_bytes + 50 * sizeof(int32_t));
}

// Of several texts' beginning copies are handed out, also where one text's cache was there first.
TEST_F(PrefixCacheTest, WhatIsKeptTwiceMayBeShared) {
  Add(50);
  EXPECT_FALSE(cache_.entries().front().shared);
  EXPECT_EQ(cache_.Add(Read(Config("full"), Text(50, 50, 0)), true), nullptr);
  EXPECT_TRUE(cache_.entries().front().shared);
  Add(50);
  EXPECT_TRUE(cache_.entries().front().shared);
  EXPECT_EQ(cache_.size(), 1u);
}

// Protected tokens are compared as far as the cache has seen the text.
TEST_F(PrefixCacheTest, SpansCountAsFarAsTheyAreSeen) {
  Add(50, "h2o(24)", {{44, 52}});
  EXPECT_EQ(Found("h2o(24)", {{44, 52}}), 50u);
  EXPECT_EQ(Found("h2o(24)", {{44, 55}}), 50u);
  EXPECT_EQ(Found("h2o(24)", {{44, 52}, {60, 62}}), 50u);
  EXPECT_EQ(Found("h2o(24)", {{44, 49}}), 0u);
  EXPECT_EQ(Found("h2o(24)", {{43, 52}}), 0u);
  EXPECT_EQ(Found("h2o(24)"), 0u);
  EXPECT_EQ(Found(), 0u);
}

}  // namespace
}  // namespace lesskv::server_test
