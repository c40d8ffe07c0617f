#include "server/session_store.h"

#include <xxhash.h>

#include <algorithm>
#include <utility>

#include "base/error.h"
#include "engine/session.h"

namespace lesskv {
namespace {

constexpr size_t kMostWaiting = 8;  // beside the one in work
constexpr int kFinders = 4;  // so that small conversations do not wait for a large one

// Hashes of a text's beginnings, shorter ones first.
class TokenHash {
 public:
  TokenHash() { XXH3_64bits_reset(state_.get()); }
  uint64_t Of(std::span<const int32_t> tokens, size_t n) {
    XXH3_64bits_update(state_.get(), tokens.data() + done_, (n - done_) * sizeof(int32_t));
    done_ = n;
    return XXH3_64bits_digest(state_.get());
  }

 private:
  struct Free {
    void operator()(XXH3_state_t* state) const { XXH3_freeState(state); }
  };
  std::unique_ptr<XXH3_state_t, Free> state_{XXH3_createState()};
  size_t done_ = 0;
};

// What must be the same beside the first n tokens.
uint64_t SettingHash(const std::string& fingerprint, const CacheConfig& config, size_t n) {
  std::string text = fmt::format("{}\n{}\n{}\n", fingerprint, SessionSpec(config), config.shape().ctx);
  if (!NeverEvicts(config))
    for (const ProtectedSpan& span : SpansBefore(config.protect(), n))
      text += fmt::format("{}-{},", span.begin, span.end);
  return XXH3_64bits(text.data(), text.size());
}

// About what its value takes.
size_t ValueBytes(const Sequence& sequence) {
  const CacheStats stats = sequence.Stats();
  return stats.kv_bytes - stats.kv_bytes_slack + sequence.tokens().size() * sizeof(int32_t);
}

}  // namespace

SessionStore::SessionStore(const Engine& engine, std::unique_ptr<StoreBackend> backend, LogLine log)
    : engine_(engine), backend_(std::move(backend)), log_(std::move(log)) {
  writer_ = std::thread([this] { Write(); });
  for (int i = 0; i < kFinders; ++i) finders_.emplace_back([this] { LookUp(); });
}

SessionStore::~SessionStore() {
  {
    const std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  work_.notify_all();
  writer_.join();
  for (std::thread& finder : finders_) finder.join();
}

SessionName SessionStore::NameOf(const Sequence& sequence) const {
  const std::vector<int32_t>& tokens = sequence.tokens();
  const size_t n = tokens.size();
  return {TokenHash().Of(tokens, n), SettingHash(engine_.model().FingerprintText(), sequence.config(), n), n};
}

void SessionStore::Save(std::shared_ptr<const Sequence> sequence) {
  const std::lock_guard lock(mutex_);
  if (to_write_.size() > kMostWaiting || ValueBytes(*sequence) > backend_->MaxBytes()) {
    ++metrics_.skipped;
    return;
  }
  to_write_.push_back(std::move(sequence));
  work_.notify_all();
}

void SessionStore::Write() {
  std::unique_lock lock(mutex_);
  for (;;) {
    work_.wait(lock, [&] { return stopping_ || !to_write_.empty(); });
    if (to_write_.empty()) return;
    std::shared_ptr<const Sequence> sequence = to_write_.front();
    writing_ = true;
    lock.unlock();
    WriteOne(*sequence);
    lock.lock();
    writing_ = false;
    to_write_.pop_front();  // whoever wants it now need not copy it
    lock.unlock();
    sequence.reset();  // which takes its time where nobody else has it
    lock.lock();
  }
}

bool SessionStore::Saves(const Sequence& sequence) const {
  const std::lock_guard lock(mutex_);
  return std::ranges::any_of(to_write_, [&](const auto& other) { return other.get() == &sequence; });
}

bool SessionStore::LetGo(const Sequence& sequence) {
  const std::lock_guard lock(mutex_);
  const auto found = std::ranges::find_if(to_write_, [&](const auto& other) { return other.get() == &sequence; });
  if (found == to_write_.end()) return true;
  if (writing_ && found == to_write_.begin()) return false;
  to_write_.erase(found);
  ++metrics_.skipped;
  return true;
}

void SessionStore::WriteOne(const Sequence& sequence) {
  const SessionName name = NameOf(sequence);
  const auto is_damaged = [&] {
    const std::lock_guard lock(mutex_);
    return damaged_.contains(name);
  };
  try {
    if (!is_damaged() && backend_->Touch(name)) return;
    const std::vector<std::byte> bytes = SessionBytes(engine_, sequence, std::nullopt);
    if (bytes.size() > backend_->MaxBytes()) return Count(&StoreMetrics::skipped);
    backend_->Write(name, bytes);
    const std::lock_guard lock(mutex_);
    damaged_.erase(name);
    ++metrics_.saved;
  } catch (const StoreGone&) {
    Count(&StoreMetrics::unreachable);
    Count(&StoreMetrics::skipped);
  } catch (const std::exception& error) {
    Log(fmt::format("a conversation could not be saved: {}", error.what()));
    Count(&StoreMetrics::skipped);
  }
}

std::shared_ptr<StoreLookup> SessionStore::Find(std::span<const int32_t> prompt,
                                                std::shared_ptr<const CacheConfig> config, size_t longer_than) {
  auto lookup = std::make_shared<StoreLookup>(prompt, std::move(config), longer_than);
  if (prompt.size() < longer_than + 2) return nullptr;
  if (!backend_->remote() && Present(Names(*lookup)).empty()) return nullptr;
  const std::lock_guard lock(mutex_);
  to_find_.push_back(lookup);
  work_.notify_all();
  return lookup;
}

void SessionStore::LookUp() {
  std::unique_lock lock(mutex_);
  for (;;) {
    work_.wait(lock, [&] { return stopping_ || !to_find_.empty(); });
    if (stopping_) return;
    const std::shared_ptr<StoreLookup> lookup = to_find_.front().lock();
    to_find_.pop_front();
    if (lookup == nullptr) continue;
    lock.unlock();
    lookup->found_ = LookUpOne(*lookup);
    lookup->done_.store(true, std::memory_order_release);
    lock.lock();
  }
}

std::optional<Sequence> SessionStore::LookUpOne(const StoreLookup& lookup) {
  constexpr size_t kAtOnce = 512;  // the next turn of a conversation finds it among the longest
  try {
    const std::vector<SessionName> names = Names(lookup);
    for (size_t begin = 0; begin < names.size(); begin += kAtOnce)
      for (const SessionName& name : Present(std::span(names).subspan(begin, std::min(kAtOnce, names.size() - begin))))
        if (std::optional<Sequence> sequence = Open(name, lookup)) return sequence;
  } catch (const StoreGone&) {
    Count(&StoreMetrics::unreachable);
  } catch (const std::exception& error) {
    Log(fmt::format("no stored conversation could be looked for: {}", error.what()));
  }
  return std::nullopt;
}

// What there may be, the longest first.
std::vector<SessionName> SessionStore::Names(const StoreLookup& lookup) {
  const std::string fingerprint = engine_.model().FingerprintText();
  std::vector<SessionName> names;
  TokenHash hash;
  for (const size_t n : backend_->Lengths()) {
    if (n >= lookup.prompt_.size()) break;
    if (n <= lookup.longer_than_) continue;
    names.push_back({hash.Of(lookup.prompt_, n), SettingHash(fingerprint, *lookup.config_, n), n});
  }
  std::ranges::reverse(names);
  const std::lock_guard lock(mutex_);
  std::erase_if(names, [&](const SessionName& name) { return damaged_.contains(name); });
  return names;
}

std::vector<SessionName> SessionStore::Present(std::span<const SessionName> names) {
  const std::vector<bool> there = backend_->Has(names);
  std::vector<SessionName> present;
  for (size_t i = 0; i < names.size(); ++i)
    if (there[i]) present.push_back(names[i]);
  return present;
}

std::optional<Sequence> SessionStore::Open(const SessionName& name, const StoreLookup& lookup) {
  std::optional<Sequence> sequence;
  try {
    backend_->Read(name, [&](std::span<const std::byte> bytes) { sequence = Parse(bytes, name, lookup); });
    if (sequence) Count(&StoreMetrics::restored);
    return sequence;
  } catch (const StoreGone&) {
    throw;
  } catch (const Error& error) {
    Log(fmt::format("a stored conversation is passed over: {}", error.what()));
    // What cannot be read for lack of memory, files or room on a disk may be whole.
    if (error.code() != ErrorCode::kBadFile && error.code() != ErrorCode::kMismatch) return std::nullopt;
    const std::lock_guard lock(mutex_);
    damaged_.insert(name);
    ++metrics_.damaged;
    return std::nullopt;
  }
}

Sequence SessionStore::Parse(std::span<const std::byte> bytes, const SessionName& name,
                             const StoreLookup& lookup) const {
  const std::string where = backend_->Where(name);
  const CacheConfig& wanted = *lookup.config_;
  Session session = ParseSession(bytes, where, engine_, wanted);
  const Sequence& sequence = session.sequence;
  const size_t n = name.n_tokens;
  if (sequence.tokens().size() != n || CommonPrefix(sequence.tokens(), lookup.prompt_) != n ||
      !SameBeginning(sequence.config(), wanted, n))
    Fail(ErrorCode::kMismatch, "{}: the session is not the one that its name says", where);
  return std::move(session.sequence);
}

StoreMetrics SessionStore::Metrics() const {
  StoreMetrics metrics;
  {
    const std::lock_guard lock(mutex_);
    metrics = metrics_;
  }
  metrics.usage = backend_->Usage();
  return metrics;
}

void SessionStore::Count(uint64_t StoreMetrics::*what) {
  const std::lock_guard lock(mutex_);
  ++(metrics_.*what);
}

void SessionStore::Log(const std::string& line) const {
  if (log_) log_(line);
}

}  // namespace lesskv
