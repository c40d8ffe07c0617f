#include "server/cache_memory.h"

#include <malloc.h>

#include <algorithm>
#include <new>
#include <utility>

namespace lesskv {

bool CacheMemory::Reserve(WaitingText& text) {
  if (!Fits(taken_ + text.bytes)) {
    const JobRequest& request = text.job->request();
    const PrefixCache::Entry* const idle = request.reuse ? idle_.Look({request.prompt, *request.config}) : nullptr;
    if (idle == nullptr || !Fits(taken_ + text.bytes - idle->running)) return false;
    text.joins = true;
    beginning_ = idle;
    shared_ += idle->running;  // until its cache is there
  }
  reserved_ += text.bytes;
  taken_ = reserved_ - shared_;
  return true;
}

void CacheMemory::Release(size_t bytes) {
  reserved_ -= bytes;
  taken_ = reserved_ - shared_;
}

std::shared_ptr<StoreLookup> CacheMemory::AskStore(const JobRequest& request) {
  if (store_ == nullptr || !request.reuse) return nullptr;
  const PrefixCache::Entry* const idle = idle_.Find({request.prompt, *request.config});
  return store_->Find(request.prompt, request.config, idle == nullptr ? 0 : idle->sequence->tokens().size());
}

Sequence CacheMemory::Begin(const WaitingText& text, std::optional<Sequence> stored) {
  const JobRequest& request = text.job->request();
  if (request.reuse) {
    try {
      if (std::optional<Sequence> found = FindBeginning(request, std::move(stored)))
        return Adopt(std::move(*found), request.config);
    } catch (const Error&) {  // such as spans that fit the budget when a prompt is read anew only
      if (text.joins) throw;
      beginning_ = nullptr;
    }
  }
  MakeRoom(nullptr);
  return Sequence(request.config);
}

// The sequence, idle or just brought from the store, that has seen most of the prompt. One that several texts begin
// with stays, as far as there is room for it beside its copy.
std::optional<Sequence> CacheMemory::FindBeginning(const JobRequest& request, std::optional<Sequence> stored) {
  const PrefixCache::Entry* const idle = idle_.Find({request.prompt, *request.config});
  if (stored && (idle == nullptr || idle->sequence->tokens().size() < stored->tokens().size())) {
    MakeRoom(nullptr);
    return stored;
  }
  if (idle == nullptr) return std::nullopt;
  beginning_ = idle;
  MakeRoom(idle);
  if (idle->shared && HasRoom(0)) return PrefixCache::Copy(idle);
  beginning_ = nullptr;
  return idle_.Take(idle, store_ != nullptr && !store_->LetGo(*idle->sequence));
}

size_t CacheMemory::SharedBeginning(const RunningText& text) const {
  const JobRequest& request = text.job->request();
  const size_t chunk = request.config->prefill_chunk();
  if (!request.reuse || options_.max_idle == 0 || SeesPromptWhole(*request.config)) return 0;
  size_t n = idle_.LongestCommon({request.prompt, *request.config});
  for (const auto& other : running_) {
    const size_t common = CommonPrefix(other->job->request().prompt, request.prompt);
    if (common > n && SameBeginning(other->sequence.config(), *request.config, common)) n = common;
  }
  const size_t rest = chunk == 0 ? kShortestPiece : 1;
  n = std::min(n, request.prompt.size() - std::min(request.prompt.size(), rest));
  if (n < text.cached + options_.min_shared) return 0;
  return chunk == 0 ? n : text.cached + (n - text.cached) / chunk * chunk;  // pieces stay as they would be
}

void CacheMemory::CountShared(std::ptrdiff_t reserved) {
  beginning_ = nullptr;
  reserved_ += static_cast<size_t>(reserved);
  Count();
}

// Shared memory counts with the text that began first, and with idle caches where no text has it. Shared rows do not
// change, so that what a text may still take is not less for them.
void CacheMemory::Count() {
  SharedMemory running;
  shared_ = 0;
  for (const auto& text : running_) {
    text->counted = running.Add(text->sequence.cache().ShareableParts());
    shared_ += text->counted;
  }
  if (beginning_ != nullptr) shared_ += running.Add(beginning_->sequence->cache().ShareableParts());
  idle_.CountShared(running);
  taken_ = reserved_ - shared_;
}

// Lets idle caches go, those first that were not used for longest, until so many bytes more fit.
void CacheMemory::MakeRoom(const PrefixCache::Entry* spared, size_t more) {
  Count();
  while (idle_.size() > options_.max_idle || !HasRoom(more)) {
    if (!DropIdle(spared, false)) return;
    Count();
  }
}

bool CacheMemory::MakeRoomOnDisk() { return DropIdle(nullptr, true); }

// Lets the idle cache go that was not used for longest, of all but `spared` or of those that have rows on a disk:
// rather one that does not wait to be saved, for which the store holds it. False: there is none.
bool CacheMemory::DropIdle(const PrefixCache::Entry* spared, bool on_disk) {
  const auto waits = [&](const PrefixCache::Entry& entry) {
    return store_ != nullptr && store_->Saves(*entry.sequence);
  };
  const PrefixCache::Entry* dropped = nullptr;
  for (const PrefixCache::Entry& entry : idle_.entries()) {  // the last used first
    if (&entry == spared || (on_disk && entry.sequence->Stats().recall.file_bytes == 0)) continue;
    if (dropped == nullptr || !waits(entry) || waits(*dropped)) dropped = &entry;
  }
  if (dropped == nullptr) return false;
  if (store_ != nullptr) store_->LetGo(*dropped->sequence);
  ReturnMemory(idle_.Drop(dropped));
  ++dropped_;
  return true;
}

void CacheMemory::KeepShared(const RunningText& text) {
  size_t bytes = text.sequence.Stats().kv_bytes;
  for (const SharedPart& part : text.sequence.cache().ShareableParts()) bytes -= part.bytes;
  MakeRoom(nullptr, bytes);
  if (!HasRoom(bytes)) return;
  try {
    Keep(text.sequence.Clone(), true);
  } catch (const Error&) {  // no memory for a copy: the text goes on all the same
  } catch (const std::bad_alloc&) {
  }
}

void CacheMemory::KeepEnded(Sequence sequence) {
  const size_t bytes = sequence.Stats().kv_bytes;
  Keep(std::move(sequence), false);
  if (options_.max_idle == 0) ReturnMemory(bytes);
}

void CacheMemory::Keep(Sequence sequence, bool shared) {
  if (options_.max_idle == 0 || sequence.interrupted() || sequence.tokens().empty()) return;
  const std::shared_ptr<const Sequence> kept = idle_.Add(std::move(sequence), shared);
  if (kept != nullptr && store_ != nullptr) store_->Save(kept);
  MakeRoom(nullptr);
}

// What the C library has been given back it would keep for itself.
void CacheMemory::ReturnMemory(size_t bytes) {
  constexpr size_t kWorthwhile = size_t{1} << 20;
  unreturned_ += bytes;
  if (unreturned_ < kWorthwhile) return;
  ::malloc_trim(0);
  unreturned_ = 0;
}

}  // namespace lesskv
