// The memory for caches: what admitted texts may come to take is reserved, and in what that leaves stay the caches of
// texts that have ended, idle until a prompt begins like theirs. Behind these is the store, where there is one.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>

#include "engine/engine.h"
#include "server/prefix_cache.h"
#include "server/running_text.h"
#include "server/scheduler_options.h"
#include "server/session_store.h"
#include "server/waiting_texts.h"

namespace lesskv {

// Of the thread that runs the texts, but for what says otherwise.
class CacheMemory {
 public:
  // All must outlive it. `running`: in the order they began. `store` may be null.
  CacheMemory(const SchedulerOptions& options, SessionStore* store, const RunningTexts& running)
      : options_(options), store_(store), running_(running) {}

  // Reserves a text's bytes; false: they are not there. Where it can only have them beside running texts that share its
  // beginning, it `joins`: then it has to begin at once.
  bool Reserve(WaitingText& text);
  void Release(size_t bytes);
  // What admitted texts may come to take together, memory that several share once. From any thread.
  size_t reserved() const { return taken_; }

  // Has the store look for more of the prompt than idle caches have seen; null: there is nothing to wait for.
  std::shared_ptr<StoreLookup> AskStore(const JobRequest& request);
  // A sequence for the text, which has its bytes: one that has seen its prompt's beginning, `stored` or an idle one, or
  // a new one. CountShared has to follow when the text is among the running ones, or has failed.
  Sequence Begin(const WaitingText& text, std::optional<Sequence> stored);
  // Where the prompt stops to be like that of another text, so that a third one need not read this again (KeepShared):
  // where the cache's method lets a prompt be read in pieces. 0: nowhere.
  size_t SharedBeginning(const RunningText& text) const;

  // Counts memory that running texts share once, after any has come or gone. `reserved` is what texts reserve that have
  // come, or, negative, have ended: what is reserved and what of it is shared change together.
  void CountShared(std::ptrdiff_t reserved = 0);

  // A copy of a running text's cache, as far as there is room for it.
  void KeepShared(const RunningText& text);
  // The cache of a text that has ended.
  void KeepEnded(Sequence sequence);
  // Lets an idle cache go that has rows on a disk. False: there is none.
  bool MakeRoomOnDisk();

  const PrefixCache& idle() const { return idle_; }
  uint64_t dropped() const { return dropped_; }  // idle caches that had to make room. From any thread

 private:
  std::optional<Sequence> FindBeginning(const JobRequest& request, std::optional<Sequence> stored);
  void Count();
  bool Fits(size_t bytes) const { return options_.kv_memory == 0 || bytes <= options_.kv_memory; }
  bool HasRoom(size_t more) const { return Fits(taken_ + idle_.bytes() + more); }
  void MakeRoom(const PrefixCache::Entry* spared, size_t more = 0);
  bool DropIdle(const PrefixCache::Entry* spared, bool on_disk);
  void Keep(Sequence sequence, bool shared);
  void ReturnMemory(size_t bytes);

  const SchedulerOptions& options_;
  SessionStore* const store_;
  const RunningTexts& running_;
  PrefixCache idle_;
  const PrefixCache::Entry* beginning_ = nullptr;  // what the text that begins at the moment goes on with or copies
  size_t reserved_ = 0, shared_ = 0;               // of which so much is there once for several texts
  std::atomic<size_t> taken_ = 0;                  // the difference
  std::atomic<uint64_t> dropped_ = 0;
  size_t unreturned_ = 0;  // bytes freed since the system got memory back
};

}  // namespace lesskv
