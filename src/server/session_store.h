// Idle sequences outside this process, so that a conversation goes on after a restart too, or in another replica.
//
// A value's name is made of what it is looked up by: a hash of the tokens it has seen, one of model, spec, context
// length and protected spans, and the number of tokens. What is found that way is compared with the prompt once more.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "engine/engine.h"
#include "server/prefix_cache.h"
#include "server/store_backend.h"

namespace lesskv {

struct StoreMetrics {
  uint64_t saved = 0, restored = 0, damaged = 0, skipped = 0;
  uint64_t unreachable = 0;         // look-ups and writes that found the store gone
  std::optional<StoreUsage> usage;  // of all values, where that is known
};

// A stored conversation that is being looked for. Let go of, it is not looked for any more.
class StoreLookup {
 public:
  StoreLookup(std::span<const int32_t> prompt, std::shared_ptr<const CacheConfig> config, size_t longer_than)
      : prompt_(prompt.begin(), prompt.end()), config_(std::move(config)), longer_than_(longer_than) {}
  bool done() const { return done_.load(std::memory_order_acquire); }
  // Once it is done, and once.
  std::optional<Sequence> Take() { return std::move(found_); }

 private:
  friend class SessionStore;
  const std::vector<int32_t> prompt_;
  const std::shared_ptr<const CacheConfig> config_;
  const size_t longer_than_;
  std::optional<Sequence> found_;
  std::atomic<bool> done_ = false;
};

// Thread-safe. Has threads of its own: one writes, in the order things came, a few look up and read.
class SessionStore {
 public:
  using LogLine = std::function<void(const std::string&)>;

  // `log` gets a line about what cannot be read or written, from any thread. The engine must outlive the store.
  SessionStore(const Engine& engine, std::unique_ptr<StoreBackend> backend, LogLine log = {});
  ~SessionStore();  // after what waits was written
  SessionStore(const SessionStore&) = delete;
  SessionStore& operator=(const SessionStore&) = delete;

  // Has it written; not where it is there already, and not (counted as skipped) where the backend does not keep up or
  // it is larger than a value may be.
  void Save(std::shared_ptr<const Sequence> sequence);
  // Whether that still reads it, or will.
  bool Saves(const Sequence& sequence) const;
  // Its memory is wanted: where it still waits to be written, it no more does (counted as skipped). False: it is being
  // written, and read for that.
  bool LetGo(const Sequence& sequence);
  // Looks for the one that has seen most of the prompt's beginning, less than all of it and more than `longer_than`
  // tokens. One that cannot be read is passed over with a line in the log, from then on where it is damaged. Null: there
  // is none, as is known at once.
  std::shared_ptr<StoreLookup> Find(std::span<const int32_t> prompt, std::shared_ptr<const CacheConfig> config,
                                    size_t longer_than);
  StoreMetrics Metrics() const;

 private:
  SessionName NameOf(const Sequence& sequence) const;
  void Write();
  void WriteOne(const Sequence& sequence);
  void LookUp();
  std::optional<Sequence> LookUpOne(const StoreLookup& lookup);
  std::vector<SessionName> Names(const StoreLookup& lookup);
  std::vector<SessionName> Present(std::span<const SessionName> names);
  std::optional<Sequence> Open(const SessionName& name, const StoreLookup& lookup);
  Sequence Parse(std::span<const std::byte> bytes, const SessionName& name, const StoreLookup& lookup) const;
  void Count(uint64_t StoreMetrics::*what);
  void Log(const std::string& line) const;

  const Engine& engine_;
  const std::unique_ptr<StoreBackend> backend_;
  const LogLine log_;
  mutable std::mutex mutex_;  // of what follows
  std::condition_variable work_;
  std::deque<std::shared_ptr<const Sequence>> to_write_;
  bool writing_ = false;  // the first is in work
  std::deque<std::weak_ptr<StoreLookup>> to_find_;
  std::set<SessionName> damaged_;
  StoreMetrics metrics_;
  bool stopping_ = false;
  std::thread writer_;
  std::vector<std::thread> finders_;
};

}  // namespace lesskv
