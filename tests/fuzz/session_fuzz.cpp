// libFuzzer on session files. Their checksum is put right before they are read, so that what lies behind it is reached.
#include <xxhash.h>

#include <cstdint>
#include <cstring>
#include <iterator>
#include <memory>
#include <span>
#include <vector>

#include "engine/session.h"

extern "C" size_t LLVMFuzzerMutate(uint8_t* data, size_t size, size_t max_size);

namespace lesskv {
namespace {

// Of each kind of store and of what lies beside rows, as far as nothing need be trained for it.
constexpr const char* kSpecs[] = {"full",
                                  "full+q8",
                                  "full+q4",
                                  "full+mix(k=q8, v=q4, rotate=true)",
                                  "full+q4+recent(8)",
                                  "full+kivi(2, window=32)",
                                  "full+kivi(4, window=32, rotate=true)",
                                  "full+think(0.5, window=8)",
                                  "full+cluster(16, sinks=4, size=8, every=16, skip=0)",
                                  "window(24)",
                                  "h2o(24)+q4",
                                  "h2o(96)+kivi(3, window=32)",
                                  "h2o(24)+merge(weighted=true)",
                                  "snapkv(24, window=8)+ada(0.5)",
                                  "h2o(32)+match(every=32)",
                                  "cascade(24, block=8)",
                                  "elastic(0.5)"};
constexpr size_t kCtx = 256;

// A model with heads of 64 channels, which all codecs take.
Engine& SessionEngine() {
  static Engine engine(Model::Load(LESSKV_SOURCE_DIR "/models/lesskv-small.gguf"),
                       {.threads = 1, .compute = ComputeChoice::kF32});
  return engine;
}

struct Subject {
  std::shared_ptr<const CacheConfig> config;
  std::vector<std::byte> session;
};

// Of all specs, each after the same tokens: a prompt and, so that rows that were exact are coded, some single ones.
const std::vector<Subject>& Subjects() {
  static const std::vector<Subject> subjects = [] {
    std::vector<Subject> all;
    for (const char* const spec : kSpecs) {
      const auto config = SessionEngine().MakeCacheConfig(CacheSpec::Parse(spec), kCtx);
      Sequence sequence(config);
      std::vector<int32_t> tokens;
      for (int32_t i = 0; i < 70; ++i) tokens.push_back(3 + i % 200);
      SessionEngine().Prefill({{.sequence = &sequence, .tokens = tokens}});
      for (const int32_t token : std::span(tokens).first(5)) SessionEngine().Decode({{&sequence, {&token, 1}}});
      all.push_back({config, SessionBytes(SessionEngine(), sequence, 5)});
    }
    return all;
  }();
  return subjects;
}

}  // namespace
}  // namespace lesskv

// The first byte says which spec is asked for; the session follows.
extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace lesskv;
  if (size < 1 + sizeof(uint64_t)) return 0;
  std::vector<std::byte> file(size - 1);
  std::memcpy(file.data(), data + 1, file.size());
  const size_t covered = file.size() - sizeof(uint64_t);
  const uint64_t checksum = XXH3_64bits(file.data(), covered);
  std::memcpy(file.data() + covered, &checksum, sizeof(checksum));
  try {
    const Subject& subject = Subjects()[data[0] % std::size(kSpecs)];
    Session session = ParseSession(file, "session", SessionEngine(), *subject.config);
    SessionBytes(SessionEngine(), session.sequence, session.pending_token);
    if (checksum % 16 != 0 || session.sequence.tokens().size() >= kCtx) return 0;  // a step takes its time
    const int32_t token = 7;
    SessionEngine().Decode({{&session.sequence, {&token, 1}}});
  } catch (const Error&) {
  }
  return 0;
}

extern "C" size_t LLVMFuzzerCustomMutator(uint8_t* data, size_t size, size_t max_size, unsigned seed) {
  using namespace lesskv;
  const size_t i = seed % std::size(kSpecs);
  const std::vector<std::byte>& session = Subjects()[i].session;
  if (seed / 8 % 8 != 0 || session.size() + 1 > max_size) return LLVMFuzzerMutate(data, size, max_size);
  data[0] = static_cast<uint8_t>(i);
  std::memcpy(data + 1, session.data(), session.size());
  size = session.size() + 1;
  // A few bytes of it, which may be a length or a position: what libFuzzer does to the whole would mostly move the rest.
  size_t at = 1 + seed / 64 % session.size(), n = std::min<size_t>(8, size - at);
  for (size_t k = 0; k < n && (seed >> k) % 3 != 0; ++k) data[at + k] = static_cast<uint8_t>(seed >> (k * 3));
  return size;
}
