#include "engine/session.h"

#include <xxhash.h>

#include <cstring>
#include <string_view>

#include "base/atomic_file.h"
#include "base/error.h"
#include "base/mmap.h"
#include "kvcache/bytes.h"

namespace lesskv {
namespace {

constexpr char kMagic[8] = {'l', 'e', 's', 's', 'k', 'v', 's', 's'};
constexpr size_t kChecksumBytes = sizeof(uint64_t);

void PutText(ByteWriter& out, const std::string& text) {
  out.Put<uint64_t>(text.size());
  out.Raw(text.data(), text.size());
}

std::string GetText(ByteReader& in, const char* what) {
  std::string text(in.Count(std::min<size_t>(in.rest.size(), 4096), what), '\0');
  in.Raw(text.data(), text.size());
  return text;
}

void PutSpans(ByteWriter& out, const std::vector<ProtectedSpan>& spans) {
  out.Put<uint64_t>(spans.size());
  for (const ProtectedSpan& span : spans) {
    out.Put<int32_t>(span.begin);
    out.Put<int32_t>(span.end);
  }
}

std::vector<ProtectedSpan> GetSpans(ByteReader& in) {
  std::vector<ProtectedSpan> spans(in.Count(in.rest.size() / sizeof(ProtectedSpan), "the number of protected spans"));
  for (ProtectedSpan& span : spans) {
    span.begin = in.Get<int32_t>();
    span.end = in.Get<int32_t>();
  }
  return spans;
}

void RequireSame(const std::string& path, const char* what, const std::string& saved, const std::string& wanted) {
  if (saved != wanted)
    Fail(ErrorCode::kMismatch, "{}: the session was made with {} {}, this run has {}", path, what, saved, wanted);
}

std::string WithoutFolder(std::string spec) {
  constexpr std::string_view kFolder = "offload=\"";
  if (const size_t at = spec.find(kFolder); at != std::string::npos) {
    const size_t begin = at + kFolder.size();
    spec.erase(begin, spec.find('"', begin) - begin);
  }
  return spec;
}

// The file's bytes without magic and checksum, both checked.
std::span<const std::byte> CheckedBody(const std::string& path, std::span<const std::byte> file) {
  if (file.size() < sizeof kMagic + kChecksumBytes || std::memcmp(file.data(), kMagic, sizeof kMagic) != 0)
    Fail(ErrorCode::kBadFile, "{}: not a lesskv session file", path);
  const auto covered = file.first(file.size() - kChecksumBytes);
  uint64_t checksum;
  std::memcpy(&checksum, file.data() + covered.size(), kChecksumBytes);
  const auto body = covered.subspan(sizeof kMagic);
  ByteReader version{body};
  if (body.size() >= sizeof(uint32_t)) {
    const auto found = version.Get<uint32_t>();
    if (found != kSessionVersion)
      Fail(ErrorCode::kBadFile, "{}: session format version {} cannot be read, only version {}", path, found,
           kSessionVersion);
  }
  if (XXH3_64bits(covered.data(), covered.size()) != checksum)
    Fail(ErrorCode::kBadFile, "{}: the session file is damaged (its checksum does not match)", path);
  return body;
}

// `make_config` from the session's protected spans.
template <typename MakeConfig>
Session Parse(std::span<const std::byte> bytes, const std::string& where, const Engine& engine,
              const MakeConfig& make_config) {
  ByteReader in{CheckedBody(where, bytes)};
  in.Get<uint32_t>();
  RequireSame(where, "the model with fingerprint", GetText(in, "the fingerprint's length"),
              engine.model().FingerprintText());
  const std::string saved_spec = WithoutFolder(GetText(in, "the spec's length"));  // earlier files have it
  const uint64_t saved_ctx = in.Get<uint64_t>();
  std::shared_ptr<const CacheConfig> config = make_config(GetSpans(in));
  RequireSame(where, "cache spec", saved_spec, WithoutFolder(config->spec_text()));
  RequireSame(where, "a context length of", std::to_string(saved_ctx), std::to_string(config->shape().ctx));

  const auto n_vocab = static_cast<int32_t>(engine.model().config().n_vocab);
  const auto pending = in.Get<int32_t>();
  std::vector<int32_t> tokens(in.Count(in.rest.size() / sizeof(int32_t), "the number of tokens"));
  in.Raw(tokens.data(), tokens.size() * sizeof(int32_t));
  for (const int32_t token : tokens)
    if (token < 0 || token >= n_vocab) Fail(ErrorCode::kBadFile, "{}: token {} is not in the vocabulary", where, token);
  if (pending < -1 || pending >= n_vocab)
    Fail(ErrorCode::kBadFile, "{}: token {} is not in the vocabulary", where, pending);

  auto cache = std::make_unique<SequenceCache>(std::move(config));
  cache->Restore(in.rest.data(), in.rest.size());
  Session session{Sequence(std::move(cache), std::move(tokens)), std::nullopt};
  if (pending >= 0) session.pending_token = pending;
  return session;
}

}  // namespace

std::string SessionSpec(const CacheConfig& config) { return WithoutFolder(config.spec_text()); }

std::vector<std::byte> SessionBytes(const Engine& engine, const Sequence& sequence,
                                    std::optional<int32_t> pending_token) {
  const CacheConfig& config = sequence.config();
  ByteWriter out;
  out.Raw(kMagic, sizeof kMagic);
  out.Put<uint32_t>(kSessionVersion);
  PutText(out, engine.model().FingerprintText());
  PutText(out, SessionSpec(config));
  out.Put<uint64_t>(config.shape().ctx);
  PutSpans(out, config.protect().spans());
  out.Put<int32_t>(pending_token.value_or(-1));
  out.Put<uint64_t>(sequence.tokens().size());
  out.Raw(sequence.tokens().data(), sequence.tokens().size() * sizeof(int32_t));
  const std::vector<std::byte> cache = sequence.cache().Serialize();
  out.Raw(cache.data(), cache.size());
  out.Put<uint64_t>(XXH3_64bits(out.bytes.data(), out.bytes.size()));
  return std::move(out.bytes);
}

void SaveSession(const std::string& path, const Engine& engine, const Sequence& sequence,
                 std::optional<int32_t> pending_token) {
  const std::vector<std::byte> bytes = SessionBytes(engine, sequence, pending_token);
  AtomicFile file(path);
  file.Write(bytes);
  file.Commit();
}

Session LoadSession(const std::string& path, const Engine& engine, const CacheSpec& spec, size_t ctx) {
  const MappedFile file = MappedFile::Open(path);
  return Parse(file.bytes(), path, engine, [&](std::vector<ProtectedSpan> spans) {
    return engine.MakeCacheConfig(spec, ctx, std::move(spans));
  });
}

Session ParseSession(std::span<const std::byte> bytes, const std::string& where, const Engine& engine,
                     const CacheConfig& config) {
  return Parse(bytes, where, engine,
               [&](std::vector<ProtectedSpan> spans) { return config.WithProtected(std::move(spans)); });
}

}  // namespace lesskv
