// Sequences that nobody runs at the moment, kept because a later prompt may begin with what they have read: a
// conversation whose next turn comes, or a beginning that several texts share.
#pragma once

#include <cstddef>
#include <cstdint>
#include <list>
#include <memory>
#include <span>
#include <vector>

#include "engine/engine.h"

namespace lesskv {

// Whether nothing ever leaves such a cache: then it does not matter in which pieces a text is read, nor what of it is
// protected.
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

// What a prompt is looked up for.
struct Beginning {
  std::span<const int32_t> prompt;
  const CacheConfig& config;
};

// Of one thread.
class PrefixCache {
 public:
  struct Entry {
    std::shared_ptr<Sequence> sequence;  // may be shared with who saves it, and then is only read
    bool shared = false;                 // several texts begin so: copies are handed out
    size_t bytes = 0;
  };

  // The one that has seen most of the prompt's beginning, and less than all of it; null: none. Counts as used.
  const Entry* Find(const Beginning& beginning);
  // How many of the prompt's first tokens, at most, some sequence here has seen, too.
  size_t LongestCommon(const Beginning& beginning) const;

  // Keeps a sequence, which must not be interrupted. Nothing where an equal one is kept already.
  std::shared_ptr<const Sequence> Add(Sequence sequence, bool shared);
  // Gives one of ours away. A copy of it, where somebody still saves it.
  Sequence Take(const Entry* entry);
  static Sequence Copy(const Entry* entry) { return entry->sequence->Clone(); }
  // Lets the one that was not used for longest go, but not `spared`. Returns its bytes; 0: there is none.
  size_t DropOldest(const Entry* spared = nullptr);
  // Likewise of those that have rows on a disk.
  size_t DropOldestOnDisk();

  const std::list<Entry>& entries() const { return entries_; }
  size_t size() const { return entries_.size(); }
  size_t bytes() const { return bytes_; }

 private:
  void Remove(std::list<Entry>::iterator entry);

  std::list<Entry> entries_;  // the last used first
  size_t bytes_ = 0;
};

}  // namespace lesskv
