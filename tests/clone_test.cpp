// Clones that share memory with what they were cloned from: the same bits as copies in memory of their own, whichever
// goes on, strays or is freed first.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <functional>
#include <set>
#include <thread>

#include "cache_harness.h"

namespace lesskv {
namespace {

using namespace testing_support;  // NOLINT

constexpr TinyShape kShape{3, 4, 2, 32, 1200};
constexpr size_t kSeen = 405;
const std::vector<LifeStep> kRest = {{1, StepKind::kDecode}, {140, StepKind::kStream}, {30, StepKind::kPrompt},
                                     {1, StepKind::kDecode}, {1, StepKind::kDecode}};

std::vector<Outputs> GoOn(SequenceCache& cache, const Text& text) {
  std::vector<Outputs> all;
  size_t first = kSeen;
  for (const LifeStep& step : kRest) {
    all.push_back(Live(cache, text, first, step));
    first += step.n;
  }
  return all;
}

void ExpectSame(const std::vector<Outputs>& a, const std::vector<Outputs>& b) {
  ASSERT_EQ(a.size(), b.size());
  for (size_t i = 0; i < a.size(); ++i)
    for (size_t l = 0; l < a[i].size(); ++l)
      ASSERT_EQ(std::memcmp(a[i][l].data(), b[i][l].data(), a[i][l].size() * sizeof(float)), 0) << "step " << i;
}

std::unique_ptr<SequenceCache> Begun(const std::string& spec, const TempSidecar& sidecar, const Text& text) {
  auto cache = std::make_unique<SequenceCache>(MakeConfig(spec, kShape, sidecar));
  Live(*cache, text, 0, {260, StepKind::kPrompt});
  Live(*cache, text, 260, {140, StepKind::kStream});
  for (size_t i = 400; i < kSeen; ++i) Feed(*cache, text, i, 1, StepKind::kDecode);
  return cache;
}

std::set<const void*> Memory(const SequenceCache& cache) {
  std::set<const void*> memory;
  for (const SharedPart& part : cache.ShareableParts()) EXPECT_TRUE(memory.insert(part.memory).second);
  return memory;
}

size_t Bytes(const SequenceCache& cache) {
  size_t bytes = 0;
  for (const SharedPart& part : cache.ShareableParts()) bytes += part.bytes;
  return bytes;
}

// All specs under which nothing leaves, and some others, whose clones share nothing.
void ForEachSpec(const std::function<void(const std::string&, const TempSidecar&, bool shares)>& test) {
  const TempSidecar sidecar(kShape);
  size_t n_sharing = 0;
  std::vector<std::string> specs = LegalSpecs(kShape);
  specs.push_back("full+f32+cluster(200, sinks=4, every=320, skip=1)");  // a full block is in no cluster yet
  for (const std::string& spec : specs) {
    SCOPED_TRACE(spec);
    if (!MakeConfig(spec, kShape, sidecar)->Budgets(1).empty()) continue;
    const bool shares = spec.find("offload") == std::string::npos;
    n_sharing += shares;
    test(spec, sidecar, shares);
    if (testing::Test::HasFatalFailure()) return;
  }
  EXPECT_GT(n_sharing, 12u);
  for (const std::string spec :
       {"h2o(60)+less", "snapkv(200)", "elastic(0.7)", "window(300)+kivi(2)", "kvzap(threshold=0.2)"}) {
    SCOPED_TRACE(spec);
    test(spec, sidecar, false);
  }
}

TEST(Clone, GoesOnAsACopyInMemoryOfItsOwn) {
  const Text text = RandomText(kShape, 600, 1), other = RandomText(kShape, 600, 2);
  ForEachSpec([&](const std::string& spec, const TempSidecar& sidecar, bool shares) {
    auto cache = Begun(spec, sidecar, text);
    const auto saved = cache->Serialize();
    const auto apart = cache->CloneApart(), apart_too = cache->CloneApart();
    const auto clone = cache->Clone();
    auto of_clone = clone->Clone();
    ASSERT_EQ(!Memory(*cache).empty(), shares);
    ASSERT_TRUE(Memory(*clone) == Memory(*cache) && Memory(*of_clone) == Memory(*cache));
    std::set<const void*> both = Memory(*cache);
    both.merge(Memory(*apart));
    ASSERT_EQ(both.size(), 2 * Memory(*cache).size());
    for (const SequenceCache* each : {clone.get(), of_clone.get(), apart.get()}) {
      EXPECT_TRUE(each->Serialize() == saved);
      EXPECT_EQ(each->Stats().kv_bytes, cache->Stats().kv_bytes);
    }
    // The clone strays, its own clone is freed, the original goes on; each alone.
    const std::vector<Outputs> strayed = GoOn(*apart, other), want = GoOn(*apart_too, text);
    ExpectSame(GoOn(*clone, other), strayed);
    EXPECT_TRUE(cache->Serialize() == saved && of_clone->Serialize() == saved);
    EXPECT_TRUE(clone->Serialize() == apart->Serialize());
    ExpectSame(GoOn(*cache, text), want);
    EXPECT_TRUE(of_clone->Serialize() == saved);
    EXPECT_TRUE(clone->Serialize() == apart->Serialize());
    EXPECT_EQ(cache->Stats().kv_bytes, apart_too->Stats().kv_bytes);
    const auto all = cache->Serialize();
    EXPECT_TRUE(all == apart_too->Serialize());
    cache.reset();
    ExpectSame(GoOn(*of_clone, text), want);
    EXPECT_TRUE(of_clone->Serialize() == all);
    SequenceCache restored(MakeConfig(spec, kShape, sidecar));
    const auto bytes = clone->Serialize();
    of_clone.reset();
    restored.Restore(bytes.data(), bytes.size());
    EXPECT_TRUE(restored.Serialize() == bytes);
    EXPECT_TRUE(clone->Serialize() == bytes);
  });
}

// Most of a long text's cache is shared, and what was shared once stays so.
TEST(Clone, SharesAllButTheLastBlocks) {
  const TempSidecar sidecar(kShape);
  const Text text = RandomText(kShape, 600, 3);
  for (const char* const spec :
       {"full+f32", "full+f16", "full+q4", "full+kivi(2, group=16, window=16)", "full+csr(4, window=9)"}) {
    SCOPED_TRACE(spec);
    const auto cache = Begun(spec, sidecar, text);
    const size_t blocks = std::string(spec).find("kivi") == std::string::npos ? kSeen / 128 * 128 : 256;
    EXPECT_GE(Bytes(*cache), cache->Stats().kv_bytes * blocks / 640);
    const auto clone = cache->Clone();
    const std::set<const void*> before = Memory(*cache);
    GoOn(*cache, text);
    GoOn(*clone, text);
    for (const SequenceCache* each : {cache.get(), clone.get()}) {
      const std::set<const void*> now = Memory(*each);
      EXPECT_TRUE(std::includes(now.begin(), now.end(), before.begin(), before.end()));
      EXPECT_GT(now.size(), before.size());
    }
  }
}

// Cloned, read, gone on with and freed by several threads at a time.
TEST(Clone, ThreadsNeedNotWaitForEachOther) {
  const TempSidecar sidecar(kShape);
  const Text text = RandomText(kShape, 600, 4);
  for (const char* const spec : {"full", "full+kivi(2)", "h2o(60)+less"}) {
    SCOPED_TRACE(spec);
    auto cache = Begun(spec, sidecar, text);
    std::vector<std::vector<std::byte>> got(6);
    std::vector<std::thread> threads;
    for (std::vector<std::byte>& mine : got)
      threads.emplace_back([&, origin = cache.get()] {
        for (int round = 0; round < 3; ++round) {
          const auto clone = origin->Clone()->Clone();
          GoOn(*clone, text);
          mine = clone->Serialize();
        }
      });
    for (std::thread& thread : threads) thread.join();
    GoOn(*cache, text);
    for (const std::vector<std::byte>& bytes : got) EXPECT_TRUE(bytes == cache->Serialize());
  }
}

// Whatever the pieces were that the text came in, also behind a restart.
TEST(Clone, SharesWhatTheConfigSays) {
  size_t n_promising = 0;
  const Text text = RandomText(kShape, 600, 1);
  ForEachSpec([&](const std::string& spec, const TempSidecar& sidecar, bool shares) {
    const auto config = MakeConfig(spec, kShape, sidecar);
    for (const size_t piece : {size_t{600}, size_t{97}, size_t{1}}) {
      SequenceCache cache(config);
      for (size_t seen = 0; seen < text.n;) {
        const size_t n = std::min(piece, text.n - seen);
        Live(cache, text, seen, {n, n > 1 || seen % 2 == 0 ? StepKind::kStream : StepKind::kDecode});
        seen += n;
        if (seen / 150 == (seen - n) / 150) continue;
        EXPECT_GE(Bytes(cache), config->SharedBytes(seen)) << piece << " " << seen;
        SequenceCache restored(config);
        const auto saved = cache.Serialize();
        restored.Restore(saved.data(), saved.size());
        EXPECT_GE(Bytes(restored), config->SharedBytes(seen)) << piece << " " << seen;
      }
    }
    EXPECT_TRUE(shares || config->SharedBytes(text.n) == 0);
    n_promising += config->SharedBytes(text.n) > 0;
  });
  EXPECT_GT(n_promising, 12u);
}

}  // namespace
}  // namespace lesskv
