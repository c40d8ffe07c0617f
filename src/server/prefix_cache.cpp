#include "server/prefix_cache.h"

#include <algorithm>
#include <limits>
#include <utility>

#include "base/check.h"

namespace lesskv {
namespace {

// Room for ids that has not been written to takes no memory.
size_t BytesOf(const Sequence& sequence) {
  return sequence.Stats().kv_bytes + sequence.tokens().size() * sizeof(int32_t);
}

}  // namespace

std::vector<ProtectedSpan> SpansBefore(const ProtectedSet& set, size_t n) {
  std::vector<ProtectedSpan> spans;
  for (const ProtectedSpan& span : set.spans())
    if (static_cast<size_t>(span.begin) < n)
      spans.push_back({span.begin, static_cast<int32_t>(std::min<size_t>(static_cast<size_t>(span.end), n))});
  return spans;
}

bool NeverEvicts(const CacheConfig& config) { return config.Budgets(1).empty(); }

bool SameBeginning(const CacheConfig& held, const CacheConfig& wanted, size_t n) {
  if (held.spec_text() != wanted.spec_text() || held.shape().ctx != wanted.shape().ctx) return false;
  const auto same = [](const ProtectedSpan& a, const ProtectedSpan& b) { return a.begin == b.begin && a.end == b.end; };
  return NeverEvicts(wanted) ||
         std::ranges::equal(SpansBefore(held.protect(), n), SpansBefore(wanted.protect(), n), same);
}

size_t CommonPrefix(std::span<const int32_t> a, std::span<const int32_t> b) {
  const auto end = std::ranges::mismatch(a, b).in1;
  return static_cast<size_t>(end - a.begin());
}

Sequence Adopt(Sequence sequence, const std::shared_ptr<const CacheConfig>& config) {
  constexpr size_t kAll = std::numeric_limits<int32_t>::max();
  if (SameBeginning(sequence.config(), *config, kAll)) return sequence;
  auto cache = std::make_unique<SequenceCache>(config);
  const std::vector<std::byte> bytes = sequence.cache().Serialize();
  cache->Restore(bytes.data(), bytes.size());
  return Sequence(std::move(cache), sequence.tokens());
}

size_t SharedMemory::Add(const std::vector<SharedPart>& parts) {
  size_t bytes = 0;
  for (const SharedPart& part : parts)
    if (!parts_.insert(part.memory).second) bytes += part.bytes;
  return bytes;
}

size_t SharedMemory::BytesOf(const std::vector<SharedPart>& parts) const {
  size_t bytes = 0;
  for (const SharedPart& part : parts)
    if (parts_.contains(part.memory)) bytes += part.bytes;
  return bytes;
}

void PrefixCache::CountShared(const SharedMemory& running) {
  SharedMemory all = running;
  bytes_ = 0;
  for (Entry& entry : entries_) {
    const std::vector<SharedPart> parts = entry.sequence->cache().ShareableParts();
    entry.running = running.BytesOf(parts);
    entry.counted = all.Add(parts);
    bytes_ += entry.own_bytes();
  }
}

std::list<PrefixCache::Entry>::const_iterator PrefixCache::Longest(const Beginning& beginning) const {
  auto best = entries_.end();
  for (auto entry = entries_.begin(); entry != entries_.end(); ++entry) {
    const std::vector<int32_t>& tokens = entry->sequence->tokens();
    const bool longest = best == entries_.end() || tokens.size() > best->sequence->tokens().size();
    if (longest && tokens.size() < beginning.prompt.size() &&
        SameBeginning(entry->sequence->config(), beginning.config, tokens.size()) &&
        CommonPrefix(tokens, beginning.prompt) == tokens.size())
      best = entry;
  }
  return best;
}

const PrefixCache::Entry* PrefixCache::Look(const Beginning& beginning) const {
  const auto best = Longest(beginning);
  return best == entries_.end() ? nullptr : &*best;
}

const PrefixCache::Entry* PrefixCache::Find(const Beginning& beginning) {
  const auto best = Longest(beginning);
  if (best == entries_.end()) return nullptr;
  entries_.splice(entries_.begin(), entries_, best);
  return &entries_.front();
}

size_t PrefixCache::LongestCommon(const Beginning& beginning) const {
  size_t most = 0;
  for (const Entry& entry : entries_) {
    const size_t n = CommonPrefix(entry.sequence->tokens(), beginning.prompt);
    if (n > most && SameBeginning(entry.sequence->config(), beginning.config, n)) most = n;
  }
  return most;
}

std::shared_ptr<const Sequence> PrefixCache::Add(Sequence sequence, bool shared) {
  CHECK(!sequence.interrupted() && !sequence.tokens().empty());
  const auto equal = std::ranges::find_if(entries_, [&](const Entry& entry) {
    return entry.sequence->tokens() == sequence.tokens() &&
           SameBeginning(entry.sequence->config(), sequence.config(), sequence.tokens().size());
  });
  if (equal != entries_.end()) {
    equal->shared = equal->shared || shared;
    entries_.splice(entries_.begin(), entries_, equal);
    return nullptr;
  }
  const size_t bytes = BytesOf(sequence);
  entries_.push_front({std::make_shared<Sequence>(std::move(sequence)), shared, bytes});
  bytes_ += bytes;
  return entries_.front().sequence;
}

void PrefixCache::Remove(std::list<Entry>::iterator entry) {
  bytes_ -= entry->own_bytes();
  entries_.erase(entry);
}

std::list<PrefixCache::Entry>::iterator PrefixCache::At(const Entry* entry) {
  const auto at = std::ranges::find_if(entries_, [&](const Entry& other) { return &other == entry; });
  CHECK(at != entries_.end());
  return at;
}

Sequence PrefixCache::Take(const Entry* entry, bool read) {
  const auto at = At(entry);
  Sequence sequence = read ? Copy(entry) : std::move(*at->sequence);
  Remove(at);
  return sequence;
}

size_t PrefixCache::Drop(const Entry* entry) {
  const size_t bytes = entry->own_bytes();
  Remove(At(entry));
  return bytes;
}

}  // namespace lesskv
