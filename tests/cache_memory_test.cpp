// Bytes counted are bytes allocated: every cache buffer is a 64-byte aligned allocation, and this program counts those
// itself. Also: memory that a method saves is really given back, and a reservation that fails changes nothing.
#include <gtest/gtest.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <new>

#include "base/error.h"
#include "base/threads.h"
#include "cache_harness.h"

// This program's own operators take memory from malloc and give it back to free; inlined, they look mismatched to GCC.
#pragma GCC diagnostic ignored "-Wmismatched-new-delete"

namespace {

std::atomic<size_t> live_bytes{0}, peak_bytes{0};
std::atomic<long> allocations_until_failure{-1};  // negative: none fails
constexpr size_t kHeader = 64;

void* CountedAllocate(size_t size) noexcept {
  if (allocations_until_failure >= 0 && allocations_until_failure-- == 0) return nullptr;
  void* memory = std::aligned_alloc(64, (size + kHeader + 63) / 64 * 64);
  if (memory == nullptr) return nullptr;
  std::memcpy(memory, &size, sizeof size);
  const size_t now = live_bytes += size;
  if (now > peak_bytes) peak_bytes = now;
  return static_cast<std::byte*>(memory) + kHeader;
}

void CountedFree(void* pointer) noexcept {
  if (pointer == nullptr) return;
  void* memory = static_cast<std::byte*>(pointer) - kHeader;
  size_t size;
  std::memcpy(&size, memory, sizeof size);
  live_bytes -= size;
  std::free(memory);
}

}  // namespace

// Ordinary allocations are counted apart: the cache's objects and lists.
std::atomic<size_t> plain_bytes{0};

void* operator new(size_t size, const std::nothrow_t&) noexcept {
  auto* memory = static_cast<std::byte*>(std::malloc(size + alignof(std::max_align_t)));
  if (memory == nullptr) return nullptr;
  std::memcpy(memory, &size, sizeof size);
  plain_bytes += size;
  return memory + alignof(std::max_align_t);
}
void* operator new(size_t size) {
  if (void* memory = operator new(size, std::nothrow)) return memory;
  throw std::bad_alloc();
}
void* operator new[](size_t size) { return operator new(size); }
void* operator new[](size_t size, const std::nothrow_t&) noexcept { return operator new(size, std::nothrow); }
void operator delete(void* pointer) noexcept {
  if (pointer == nullptr) return;
  std::byte* memory = static_cast<std::byte*>(pointer) - alignof(std::max_align_t);
  size_t size;
  std::memcpy(&size, memory, sizeof size);
  plain_bytes -= size;
  std::free(memory);
}
void operator delete(void* pointer, size_t) noexcept { operator delete(pointer); }
void operator delete(void* pointer, const std::nothrow_t&) noexcept { operator delete(pointer); }
void operator delete[](void* pointer) noexcept { operator delete(pointer); }
void operator delete[](void* pointer, size_t) noexcept { operator delete(pointer); }
void operator delete[](void* pointer, const std::nothrow_t&) noexcept { operator delete(pointer); }

void* operator new(size_t size, std::align_val_t, const std::nothrow_t&) noexcept { return CountedAllocate(size); }
void* operator new(size_t size, std::align_val_t) {
  if (void* memory = CountedAllocate(size)) return memory;
  throw std::bad_alloc();
}
void operator delete(void* pointer, std::align_val_t) noexcept { CountedFree(pointer); }
void operator delete(void* pointer, size_t, std::align_val_t) noexcept { CountedFree(pointer); }
void operator delete(void* pointer, std::align_val_t, const std::nothrow_t&) noexcept { CountedFree(pointer); }

namespace lesskv {
namespace {

using namespace testing_support;  // NOLINT

class CacheMemory : public testing::Test {
 private:
  const ThreadPool pool_{1};
  const ThreadScope scope_{pool_};
};

// Kernels keep work memory a thread, which no sequence owns: a first run takes it, so that the measured one does not.
void WarmUp(const std::string& spec, const TinyShape& shape, const TempSidecar& sidecar, const Text& text,
            const std::vector<LifeStep>& life) {
  SequenceCache cache(MakeConfig(spec, shape, sidecar));
  size_t seen = 0;
  for (const LifeStep& step : life) {
    Live(cache, text, seen, step);
    seen += step.n;
  }
}

// Beside the counted bytes a sequence owns its objects and lists: some hundred bytes a head, whatever it has seen.
TEST_F(CacheMemory, WhatIsNotCountedIsBookkeeping) {
  for (const TinyShape& shape : kTinyShapes) {
    const TempSidecar sidecar(shape);
    const Text text = RandomText(shape, 120, 1);
    for (const std::string& spec : LegalSpecs(shape)) {
      SCOPED_TRACE(spec + ", " + shape.Name());
      const auto config = MakeConfig(spec, shape, sidecar);
      WarmUp(spec, shape, sidecar, text, UsualLife());
      const size_t base = plain_bytes;
      SequenceCache cache(config);
      size_t seen = 0;
      for (const LifeStep& step : UsualLife()) {
        Live(cache, text, seen, step);
        seen += step.n;
      }
      EXPECT_LE(plain_bytes - base, 2048 + 768 * shape.n_layers * shape.n_kv_heads);
    }
  }
}

// Each request of a server makes a config of its own.
TEST_F(CacheMemory, TrainedPartsOfConfigsAreThereOnce) {
  const TempSidecar sidecar(kTinyShapes[3]);
  const CacheShape shape = MakeCacheShape(kTinyShapes[3]);
  for (const std::string spec : {"h2o(16)+less", "full+balanced(2, group=32)", "full+csr(4)", "kvzap(160, scope=head)"}) {
    const auto bytes = [] { return live_bytes + plain_bytes; };
    const size_t before = bytes();
    const auto first = CacheConfig::Create(CacheSpec::Parse(spec), shape, {}, sidecar.source());
    const size_t one = bytes() - before;
    const auto second = CacheConfig::Create(CacheSpec::Parse(spec), shape, {}, sidecar.source());
    const size_t two = bytes() - before;
    EXPECT_LT(two - one, one / 2) << spec;
  }
}

// At every moment of a life: inside steps, between them, with clones and restored caches beside.
TEST_F(CacheMemory, CountedEqualsAllocated) {
  for (const TinyShape& shape : kTinyShapes) {
    const TempSidecar sidecar(shape);
    const Text text = RandomText(shape, 120, 1);
    for (const std::string& spec : LegalSpecs(shape)) {
      SCOPED_TRACE(spec + ", " + shape.Name());
      const auto config = MakeConfig(spec, shape, sidecar);
      const bool waits = config->global().budgeter->scope() == AllocationScope::kModel;
      WarmUp(spec, shape, sidecar, text, UsualLife());
      const size_t base = live_bytes, plain_base = plain_bytes;
      peak_bytes = base;
      {
        SequenceCache cache(config);
        ASSERT_EQ(cache.Stats().kv_bytes, 0u);
        ASSERT_EQ(live_bytes, base);
        size_t seen = 0;
        for (const LifeStep& step : UsualLife()) {
          const size_t chunk =
              step.kind == StepKind::kPrompt && config->prefill_chunk() > 0 ? config->prefill_chunk() : step.n;
          for (size_t done = 0; done < step.n; done += chunk) {
            const size_t n = std::min(chunk, step.n - done);
            const StepKind kind = chunk == step.n || step.kind != StepKind::kPrompt ? step.kind : StepKind::kStream;
            cache.BeginStep(n, kind);
            ASSERT_EQ(cache.Stats().kv_bytes, live_bytes - base) << "begun after " << seen;
            RunLayers(cache, shape, text, seen, n);
            // Layers that wait for the model's budgets hold votes and positions in lists, counted beside the buffers.
            ASSERT_GE(cache.Stats().kv_bytes, live_bytes - base) << "attended after " << seen;
            if (waits) {
              ASSERT_LE(cache.Stats().kv_bytes, live_bytes - base + plain_bytes - plain_base) << "attended after " << seen;
            } else {
              ASSERT_EQ(cache.Stats().kv_bytes, live_bytes - base) << "attended after " << seen;
            }
            cache.EndStep();
            seen += n;
            ASSERT_EQ(cache.Stats().kv_bytes, live_bytes - base) << "ended after " << seen;
          }
          if (step.kind == StepKind::kPrompt) cache.EndPrompt();
          ASSERT_GE(cache.Stats().kv_bytes_peak, peak_bytes - base);
          if (!waits) {
            ASSERT_EQ(cache.Stats().kv_bytes_peak, peak_bytes - base);
          }
        }
        const auto clone = cache.Clone();
        ASSERT_EQ(cache.Stats().kv_bytes + clone->Stats().kv_bytes, live_bytes - base);
        SequenceCache restored(config);
        const auto bytes = cache.Serialize();
        restored.Restore(bytes.data(), bytes.size());
        ASSERT_EQ(cache.Stats().kv_bytes + clone->Stats().kv_bytes + restored.Stats().kv_bytes, live_bytes - base);
      }
      ASSERT_EQ(live_bytes, base) << "something was not freed";
    }
  }
}

// Bytes that the rows of `rows` tokens take in all layers and heads, f32, without slack.
size_t RowBytes(const TinyShape& shape, size_t layers, size_t rows) {
  return layers * shape.n_kv_heads * rows * shape.head_dim * 2 * sizeof(float);
}

// After a long prompt only the budget is held, and never more than one layer in full beside it. Masking instead of
// freeing would fail all three bounds.
TEST_F(CacheMemory, EvictedRowsAreGivenBack) {
  const TinyShape shape{6, 4, 2, 32, 4096};
  const TempSidecar sidecar(shape);
  const size_t n = 2000, budget = 100, slack_rows = 40;  // tiles, positions, scores
  const Text text = RandomText(shape, n + 4, 2);
  for (const char* policy :
       {"h2o(100)+f32", "tova(100)+f32", "window(100)+f32", "snapkv(100)+f32", "h2o(100)+less+f32"}) {
    SCOPED_TRACE(policy);
    const size_t held = RowBytes(shape, 6, budget + slack_rows);
    WarmUp(policy, shape, sidecar, text, {{n, StepKind::kPrompt}, {1, StepKind::kDecode}});
    const size_t base = live_bytes;
    peak_bytes = base;
    {
      SequenceCache one_shot(MakeConfig(policy, shape, sidecar));
      Live(one_shot, text, 0, {n, StepKind::kPrompt});
      EXPECT_LE(live_bytes - base, held);
      EXPECT_GE(live_bytes - base, RowBytes(shape, 6, budget));
      EXPECT_LE(peak_bytes - base, held + RowBytes(shape, 1, n + slack_rows));
      EXPECT_GE(peak_bytes - base, RowBytes(shape, 1, n));
      Feed(one_shot, text, n, 1, StepKind::kDecode);
      EXPECT_LE(live_bytes - base, RowBytes(shape, 6, budget + 2 * slack_rows));
    }
    peak_bytes = live_bytes.load();
    SequenceCache chunked(MakeConfig(std::string(policy) + "+prefill(chunk=64)", shape, sidecar));
    Live(chunked, text, 0, {n, StepKind::kPrompt});
    EXPECT_LE(peak_bytes - base, held + RowBytes(shape, 1, 64 + slack_rows));
  }
}

// A text shorter than a budget takes memory for its own rows, and more as it grows; what it holds is what it always would.
TEST_F(CacheMemory, AShortTextDoesNotTakeItsBudget) {
  const TinyShape shape{3, 4, 2, 32, 4096};
  const TempSidecar sidecar(shape);
  const Text text = RandomText(shape, 1500, 6);
  for (const std::string selector : {"h2o(1000)", "window(1000)", "tova(1000)", "h2o(1000)+split", "h2o(1000)+zigzag", "h2o(1000)+ada",
                                     "kvzap(1000, scope=head)", "snapkv(1000)+ada", "h2o(1000)+kivi(2)", "h2o(1000)+q4+recent"}) {
    SCOPED_TRACE(selector);
    const bool rows_in_f16 = selector.find("kivi") == std::string::npos && selector.find("q4") == std::string::npos;
    const auto config = MakeConfig(selector, shape, sidecar);
    SequenceCache cache(config), full(MakeConfig("full", shape, sidecar));
    const auto live = [&](size_t seen, const LifeStep& step) {
      const Outputs got = Live(cache, text, seen, step), want = Live(full, text, seen, step);
      for (size_t l = 0; l < shape.n_layers && rows_in_f16 && seen + step.n <= 900; ++l)
        ASSERT_EQ(std::memcmp(got[l].data(), want[l].data(), want[l].size() * sizeof(float)), 0) << "after " << seen;
    };
    live(0, {100, StepKind::kPrompt});
    EXPECT_LE(cache.Stats().kv_bytes, RowBytes(shape, 3, 256) / 2 + 60000);  // beside rows the residue of codecs: windows, sinks
    size_t seen = 100, before = 0;
    for (; seen < 1400; ++seen) {
      live(seen, {1, StepKind::kDecode});
      const size_t bytes = cache.Stats().kv_bytes;
      ASSERT_LE(bytes, RowBytes(shape, 3, seen + 128 + seen / 8) / 2 + 60000) << "after " << seen;
      EXPECT_GE(bytes, before) << "after " << seen;
      before = selector.starts_with("kvzap") ? 0 : bytes;  // its heads keep other numbers of rows from step to step
      if (seen % 100 != 28) continue;
      SequenceCache restored(config);
      const std::vector<std::byte> saved = cache.Serialize();
      restored.Restore(saved.data(), saved.size());
      EXPECT_LE(restored.Stats().kv_bytes, bytes + 4096);  // tiles of heads that grow
      const std::unique_ptr<SequenceCache> clone = cache.Clone();
      for (size_t i = seen + 1; i < seen + 4; ++i)
        ASSERT_EQ(Feed(restored, text, i, 1, StepKind::kDecode), Feed(*clone, text, i, 1, StepKind::kDecode));
    }
  }
}

// Memory and bytes are flat however long a bounded cache decodes.
TEST_F(CacheMemory, BoundedCachesDoNotGrow) {
  const TinyShape& shape = kTinyShapes[1];
  const TempSidecar sidecar(shape);
  const Text text = RandomText(shape, 230, 3);
  for (const char* spec : {"h2o(11)+less", "tova(9)+f32", "window(9, positions=cache)", "h2o(11)+pyramid(3)"}) {
    SequenceCache cache(MakeConfig(spec, shape, sidecar));
    Live(cache, text, 0, {30, StepKind::kPrompt});
    Feed(cache, text, 30, 1, StepKind::kDecode);
    const size_t bytes = live_bytes;
    for (size_t i = 31; i < 230; ++i) {
      Feed(cache, text, i, 1, StepKind::kDecode);
      ASSERT_EQ(live_bytes, bytes) << spec;
    }
  }
}

// Whichever allocation of a step's reservation fails, the cache is as it was, and the step can be begun again.
void ExpectFailedReservationsLeaveNothing(const std::shared_ptr<const CacheConfig>& config, const TinyShape& shape,
                                          const Text& text) {
  SequenceCache plain(config), cache(config);
  size_t seen = 0, failures = 0;
  for (const LifeStep step :
       {LifeStep{30, StepKind::kPrompt}, LifeStep{1, StepKind::kDecode}, LifeStep{120, StepKind::kStream},
        LifeStep{1, StepKind::kDecode}, LifeStep{60, StepKind::kPrompt}}) {
    const auto before = cache.Serialize();
    const size_t bytes = cache.Stats().kv_bytes;
    for (long fail_at = 0;; ++fail_at) {
      allocations_until_failure = fail_at;
      bool failed = false;
      try {
        cache.BeginStep(step.n, step.kind);
      } catch (const Error& error) {
        failed = true;
        EXPECT_EQ(error.code(), ErrorCode::kOutOfMemory);
      }
      allocations_until_failure = -1;
      if (!failed) break;
      ++failures;
      ASSERT_TRUE(cache.Serialize() == before) << "allocation " << fail_at;
      ASSERT_LE(cache.Stats().kv_bytes, bytes);
    }
    plain.BeginStep(step.n, step.kind);
    const Outputs got = RunLayers(cache, shape, text, seen, step.n);
    const Outputs want = RunLayers(plain, shape, text, seen, step.n);
    for (size_t l = 0; l < shape.n_layers; ++l)
      ASSERT_EQ(std::memcmp(got[l].data(), want[l].data(), want[l].size() * sizeof(float)), 0);
    cache.EndStep();
    plain.EndStep();
    seen += step.n;
  }
  EXPECT_GT(failures, 0u);
  EXPECT_TRUE(cache.Serialize() == plain.Serialize());
  EXPECT_EQ(cache.Stats().kv_bytes, plain.Stats().kv_bytes);
}

TEST_F(CacheMemory, FailedReservationLeavesTheCacheAsItWas) {
  for (const TinyShape& shape : {kTinyShapes[1], kTinyShapes[2]}) {
    const TempSidecar sidecar(shape);
    const Text text = RandomText(shape, 240, 4);
    for (const std::string& spec : LegalSpecs(shape)) {
      SCOPED_TRACE(spec + ", " + shape.Name());
      ExpectFailedReservationsLeaveNothing(MakeConfig(spec, shape, sidecar), shape, text);
    }
  }
}

// Where layers have caches of several kinds, those that had begun are taken back, too.
TEST_F(CacheMemory, FailedReservationOfLocalLayersLeavesTheCacheAsItWas) {
  const TinyShape& shape = kTinyShapes[1];
  const Text text = RandomText(shape, 240, 5);
  CacheShape mixed = MakeCacheShape(shape);
  mixed.layers[0].window = 9;
  mixed.layers[2].window = 50;
  for (const char* spec : {"full", "h2o(40)+f32", "h2o(40)+bf16"}) {
    SCOPED_TRACE(spec);
    ExpectFailedReservationsLeaveNothing(CacheConfig::Create(CacheSpec::Parse(spec), mixed), shape, text);
  }
}

// What a clone has in common with its original is there once, whoever is freed first, and each counts it as its own.
TEST_F(CacheMemory, ClonesShareWhatWillNotChange) {
  const TinyShape shape{3, 2, 1, 32, 4096};  // no allocation of 2 MiB, which would not go through operator new
  const TempSidecar sidecar(shape);
  const size_t n = 2000, n_clones = 16;
  const Text text = RandomText(shape, n + 300, 5);
  const auto total = [](const std::vector<std::unique_ptr<SequenceCache>>& caches) {
    std::map<const void*, size_t> times;
    size_t bytes = 0;
    for (const auto& cache : caches) {
      bytes += cache->Stats().kv_bytes;
      for (const SharedPart& part : cache->ShareableParts())
        if (times[part.memory]++ > 0) bytes -= part.bytes;
    }
    return bytes;
  };
  // Bytes of a clone's own: rows of two blocks at most, and what is exact or in the head's own atoms.
  for (const auto& [spec, tail_rows] : std::vector<std::pair<std::string, size_t>>{
           {"full+f32", 128}, {"full+q8", 64}, {"full+kivi(2)", 256}, {"full+csr(4, window=9)", 256},
           {"full+q4+recent(32)", 128}, {"full+f32+cluster(200)", 256}}) {
    SCOPED_TRACE(spec);
    WarmUp(spec, shape, sidecar, text, {{n, StepKind::kPrompt}, {300, StepKind::kStream}});
    const size_t base = live_bytes;
    {
      std::vector<std::unique_ptr<SequenceCache>> caches;
      caches.push_back(std::make_unique<SequenceCache>(MakeConfig(spec, shape, sidecar)));
      Live(*caches[0], text, 0, {n, StepKind::kPrompt});
      const size_t one = live_bytes - base, tail = RowBytes(shape, 3, tail_rows);
      ASSERT_EQ(one, caches[0]->Stats().kv_bytes);
      for (size_t i = 0; i < n_clones; ++i) caches.push_back(caches[i / 2]->Clone());
      EXPECT_LE(live_bytes - base, one + n_clones * tail);
      ASSERT_EQ(live_bytes - base, total(caches));
      for (const auto& cache : caches) EXPECT_EQ(cache->Stats().kv_bytes, one);
      for (size_t i = 0; i < caches.size(); i += 3) Live(*caches[i], text, n, {300, StepKind::kStream});
      ASSERT_EQ(live_bytes - base, total(caches));
      caches.erase(caches.begin());
      ASSERT_EQ(live_bytes - base, total(caches));
      caches.erase(caches.begin() + 3, caches.begin() + 9);
      ASSERT_EQ(live_bytes - base, total(caches));
      caches.erase(caches.begin(), caches.end() - 1);
      ASSERT_EQ(live_bytes - base, caches[0]->Stats().kv_bytes);
      ASSERT_EQ(live_bytes - base, total(caches));
    }
    ASSERT_EQ(live_bytes, base) << "something was not freed";
  }
}

// Whichever allocation of a clone fails, and of a step of one that shares: both are as they were.
TEST_F(CacheMemory, FailedClonesLeaveTheCacheAsItWas) {
  const TinyShape shape{3, 4, 2, 32, 1024};
  const TempSidecar sidecar(shape);
  const Text text = RandomText(shape, 800, 6);
  for (const std::string spec :
       {"full+f32", "full+kivi(2)", "full+csr(4, window=9)", "full+f32+cluster(200)", "h2o(60)+less"}) {
    SCOPED_TRACE(spec);
    const auto config = MakeConfig(spec, shape, sidecar);
    SequenceCache cache(config);
    Live(cache, text, 0, {400, StepKind::kPrompt});
    const auto saved = cache.Serialize();
    std::unique_ptr<SequenceCache> clone;
    size_t failures = 0;
    const auto each_failure = [&](const std::function<void()>& attempt) {
      const size_t before = live_bytes;
      for (long fail_at = 0;; ++fail_at) {
        allocations_until_failure = fail_at;
        bool failed = false;
        try {
          attempt();
        } catch (const Error& error) {
          failed = true;
          EXPECT_EQ(error.code(), ErrorCode::kOutOfMemory);
        }
        allocations_until_failure = -1;
        if (!failed) return;
        ++failures;
        ASSERT_LE(live_bytes, before) << "allocation " << fail_at;
        ASSERT_TRUE(cache.Serialize() == saved) << "allocation " << fail_at;
        ASSERT_TRUE(clone == nullptr || clone->Serialize() == saved) << "allocation " << fail_at;
      }
    };
    each_failure([&] { clone = cache.Clone(); });
    EXPECT_GT(failures, 0u);
    failures = 0;
    each_failure([&] { clone->BeginStep(300, StepKind::kStream); });
    EXPECT_GT(failures, 0u);
    RunLayers(*clone, shape, text, 400, 300);
    clone->EndStep();
    Live(cache, text, 400, {300, StepKind::kStream});
    EXPECT_TRUE(clone->Serialize() == cache.Serialize());
  }
}

}  // namespace
}  // namespace lesskv
