#include "server/session_store.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>
#include <xxhash.h>

#include <algorithm>
#include <charconv>
#include <filesystem>
#include <utility>
#include <vector>

#include "base/error.h"
#include "engine/session.h"

namespace lesskv {
namespace {

namespace fs = std::filesystem;
constexpr const char* kEnding = ".session";
constexpr size_t kMostWaiting = 8;

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
  std::string text = fmt::format("{}\n{}\n{}\n", fingerprint, config.spec_text(), config.shape().ctx);
  if (!NeverEvicts(config))
    for (const ProtectedSpan& span : SpansBefore(config.protect(), n))
      text += fmt::format("{}-{},", span.begin, span.end);
  return XXH3_64bits(text.data(), text.size());
}

// About what its file takes.
size_t FileBytes(const Sequence& sequence) {
  const CacheStats stats = sequence.Stats();
  return stats.kv_bytes - stats.kv_bytes_slack + sequence.tokens().size() * sizeof(int32_t);
}

std::string FileName(uint64_t tokens, uint64_t setting, size_t n) {
  return fmt::format("{:016x}-{:016x}-{}{}", tokens, setting, n, kEnding);
}

// The number of tokens in a name of ours.
std::optional<size_t> TokensOf(const std::string& name) {
  constexpr size_t kHashes = 2 * 17;
  if (!name.ends_with(kEnding) || name.size() <= kHashes) return std::nullopt;
  const char *const begin = name.data() + kHashes, *const end = name.data() + name.size() - std::string(kEnding).size();
  size_t n = 0;
  const auto [stop, error] = std::from_chars(begin, end, n);
  const bool hashes = name[16] == '-' && name[33] == '-' && name.find_first_not_of("0123456789abcdef-") >= kHashes - 1;
  return error == std::errc() && stop == end && hashes && n > 0 ? std::optional(n) : std::nullopt;
}

// Of a process that was killed while it wrote.
bool IsLeftover(const std::string& name) { return name.ends_with(".tmp") && name.find(kEnding) != std::string::npos; }

}  // namespace

SessionStore::SessionStore(const Engine& engine, StoreOptions options) : engine_(engine), options_(std::move(options)) {
  Scan();
  {
    const std::lock_guard lock(mutex_);
    Trim(0);
  }
  thread_ = std::thread([this] { Write(); });
}

SessionStore::~SessionStore() {
  {
    const std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  work_.notify_all();
  thread_.join();
}

void SessionStore::Scan() {
  struct Found {
    std::string name;
    fs::file_time_type time;
    size_t bytes;
  };
  std::vector<Found> found;
  try {
    // What was said is nobody else's business.
    if (fs::create_directories(options_.directory)) fs::permissions(options_.directory, fs::perms::owner_all);
    for (const fs::directory_entry& entry : fs::directory_iterator(options_.directory)) {
      const std::string name = entry.path().filename().string();
      if (!entry.is_regular_file()) continue;
      if (IsLeftover(name)) fs::remove(entry.path());
      if (TokensOf(name)) found.push_back({name, entry.last_write_time(), entry.file_size()});
    }
  } catch (const fs::filesystem_error& error) {
    Fail(ErrorCode::kIo, "the session store {} cannot be used: {}", options_.directory, error.code().message());
  }
  if (::access(options_.directory.c_str(), W_OK | X_OK) != 0)
    Fail(ErrorCode::kIo, "the session store {} cannot be written", options_.directory);
  std::ranges::sort(found, {}, &Found::time);
  for (const Found& file : found) {
    const size_t n = *TokensOf(file.name);
    files_[file.name] = {n, file.bytes, ++clock_, false};
    ++lengths_[n];
    metrics_.bytes += file.bytes;
  }
}

void SessionStore::Save(std::shared_ptr<const Sequence> sequence) {
  const std::vector<int32_t>& tokens = sequence->tokens();
  const std::string name =
      FileName(TokenHash().Of(tokens, tokens.size()),
               SettingHash(engine_.model().FingerprintText(), sequence->config(), tokens.size()), tokens.size());
  const std::lock_guard lock(mutex_);
  const auto there = files_.find(name);
  if (there != files_.end() && !there->second.damaged) {
    there->second.used = ++clock_;
    return;
  }
  if (queue_.size() >= kMostWaiting || FileBytes(*sequence) > options_.max_bytes) {
    ++metrics_.skipped;
    return;
  }
  queue_.emplace_back(name, std::move(sequence));
  work_.notify_all();
}

void SessionStore::Write() {
  std::unique_lock lock(mutex_);
  for (;;) {
    work_.wait(lock, [&] { return stopping_ || !queue_.empty(); });
    if (queue_.empty()) return;
    const auto [name, sequence] = std::move(queue_.front());
    queue_.pop_front();
    Trim(FileBytes(*sequence));
    lock.unlock();
    WriteOne(*sequence, name);
    lock.lock();
    Trim(0);
  }
}

void SessionStore::WriteOne(const Sequence& sequence, const std::string& name) {
  try {
    SaveSession(Path(name), engine_, sequence, std::nullopt);
    const size_t bytes = fs::file_size(Path(name)), n = sequence.tokens().size();
    const std::lock_guard lock(mutex_);
    if (const auto there = files_.find(name); there != files_.end()) Forget(there);
    files_[name] = {n, bytes, ++clock_, false};
    ++lengths_[n];
    metrics_.bytes += bytes;
    ++metrics_.saved;
  } catch (const std::exception& error) {
    Log(fmt::format("a conversation could not be saved: {}", error.what()));
    const std::lock_guard lock(mutex_);
    ++metrics_.skipped;
  }
}

void SessionStore::Forget(Files::iterator file) {
  metrics_.bytes -= file->second.bytes;
  if (--lengths_[file->second.tokens] == 0) lengths_.erase(file->second.tokens);
  files_.erase(file);
}

void SessionStore::Trim(size_t more) {
  while (!files_.empty() && metrics_.bytes + more > options_.max_bytes) {
    const auto oldest = std::ranges::min_element(files_, {}, [](const auto& file) { return file.second.used; });
    ::unlink(Path(oldest->first).c_str());
    Forget(oldest);
    ++metrics_.removed;
  }
}

std::optional<Sequence> SessionStore::Load(const Beginning& beginning, size_t longer_than) {
  std::vector<std::pair<std::string, size_t>> candidates;
  {
    const std::lock_guard lock(mutex_);
    TokenHash hash;
    for (const auto& [n, count] : lengths_) {
      if (n >= beginning.prompt.size()) break;
      if (n <= longer_than) continue;
      std::string name = FileName(hash.Of(beginning.prompt, n),
                                  SettingHash(engine_.model().FingerprintText(), beginning.config, n), n);
      const auto file = files_.find(name);
      if (file != files_.end() && !file->second.damaged) candidates.emplace_back(std::move(name), n);
    }
  }
  for (auto longest = candidates.rbegin(); longest != candidates.rend(); ++longest)
    if (std::optional<Sequence> sequence = Open(longest->first, beginning, longest->second)) return sequence;
  return std::nullopt;
}

std::optional<Sequence> SessionStore::Open(const std::string& name, const Beginning& beginning, size_t n) {
  const std::string path = Path(name);
  try {
    Session session = LoadSession(path, engine_, beginning.config.spec(), beginning.config.shape().ctx);
    const Sequence& sequence = session.sequence;
    if (sequence.tokens().size() != n || CommonPrefix(sequence.tokens(), beginning.prompt) != n ||
        !SameBeginning(sequence.config(), beginning.config, n))
      Fail(ErrorCode::kMismatch, "{}: the session is not the one that its name says", path);
    ::utimensat(AT_FDCWD, path.c_str(), nullptr, 0);  // used now; where that fails, it only is removed earlier
    const std::lock_guard lock(mutex_);
    if (const auto file = files_.find(name); file != files_.end()) file->second.used = ++clock_;
    ++metrics_.restored;
    return std::move(session.sequence);
  } catch (const Error& error) {
    Log(fmt::format("a stored conversation is passed over: {}", error.what()));
    const std::lock_guard lock(mutex_);
    if (const auto file = files_.find(name); file != files_.end()) file->second.damaged = true;
    ++metrics_.damaged;
    return std::nullopt;
  }
}

StoreMetrics SessionStore::Metrics() const {
  const std::lock_guard lock(mutex_);
  StoreMetrics metrics = metrics_;
  metrics.files = files_.size();
  return metrics;
}

std::string SessionStore::Path(const std::string& name) const { return (fs::path(options_.directory) / name).string(); }

void SessionStore::Log(const std::string& line) const {
  if (options_.log) options_.log(line);
}

}  // namespace lesskv
