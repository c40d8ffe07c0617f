// Sequences that nobody runs at the moment, kept because a later prompt may begin with what they have read: a
// conversation whose next turn comes, or a beginning that several texts share.
#pragma once

#include <cstddef>
#include <cstdint>
#include <list>
#include <memory>
#include <span>
#include <unordered_set>
#include <vector>

#include "engine/engine.h"

namespace lesskv {

// Whether nothing ever leaves such a cache: then any piece of a text may be read by itself (what codes rows meets those
// of earlier pieces coded), and what of it is protected does not matter.
bool NeverEvicts(const CacheConfig& config);

// Whether a cache of `held` that has seen the first n tokens of a prompt can go on with it under `wanted`: the same
// method, and, where tokens leave, the same protected ones among these n.
bool SameBeginning(const CacheConfig& held, const CacheConfig& wanted, size_t n);

// Those of the set's spans that lie among the first n positions, cut where these end.
std::vector<ProtectedSpan> SpansBefore(const ProtectedSet& set, size_t n);

// How many tokens both begin with.
size_t CommonPrefix(std::span<const int32_t> a, std::span<const int32_t> b);

// `sequence` as one of `config`: protected spans that the next turn brings hold from then on. As it is where they are
// the same or do not matter. Throws Error when the spans do not fit.
Sequence Adopt(Sequence sequence, const std::shared_ptr<const CacheConfig>& config);

// Memory of several caches, each part once.
class SharedMemory {
 public:
  // The bytes of those parts that are here already; takes in the others.
  size_t Add(const std::vector<SharedPart>& parts);
  size_t BytesOf(const std::vector<SharedPart>& parts) const;  // that are here

 private:
  std::unordered_set<const void*> parts_;
};

// What a prompt is looked up for.
struct Beginning {
  std::span<const int32_t> prompt;
  const CacheConfig& config;
};

// Of one thread.
class PrefixCache {
 public:
  struct Entry {
    std::shared_ptr<Sequence> sequence;  // may be shared with who saves it, who only reads it
    bool shared = false;                 // several texts begin so: copies are handed out
    size_t bytes = 0;                    // as if it were alone
    size_t counted = 0;                  // of these, in memory that is counted with others (CountShared)
    size_t running = 0;                  // of these, with running texts
    size_t own_bytes() const { return bytes - counted; }
  };

  // The one that has seen most of the prompt's beginning, and less than all of it; null: none. Counts as used.
  const Entry* Find(const Beginning& beginning);
  // The same, without counting as used.
  const Entry* Look(const Beginning& beginning) const;
  // How many of the prompt's first tokens, at most, some sequence here has seen, too.
  size_t LongestCommon(const Beginning& beginning) const;

  // Keeps a sequence, which must not be interrupted. Nothing where an equal one is kept already.
  std::shared_ptr<const Sequence> Add(Sequence sequence, bool shared);
  // Gives one of ours away: a copy of it where it is `read`, by who saves it.
  Sequence Take(const Entry* entry, bool read);
  static Sequence Copy(const Entry* entry) { return entry->sequence->Clone(); }
  // Lets one of ours go. Returns its bytes.
  size_t Drop(const Entry* entry);

  // Counts memory that caches share once: that of `running` with the running texts, what the others share with
  // whichever was used last. Until the next call caches that come count in full.
  void CountShared(const SharedMemory& running);

  const std::list<Entry>& entries() const { return entries_; }
  size_t size() const { return entries_.size(); }
  size_t bytes() const { return bytes_; }  // of all entries, shared memory once

 private:
  std::list<Entry>::const_iterator Longest(const Beginning& beginning) const;
  std::list<Entry>::iterator At(const Entry* entry);
  void Remove(std::list<Entry>::iterator entry);

  std::list<Entry> entries_;  // the last used first
  size_t bytes_ = 0;
};

}  // namespace lesskv
