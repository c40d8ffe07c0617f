// libFuzzer on session files. Their checksum is put right before they are read, so that what lies behind it is reached.
#include <xxhash.h>

#include <cstdint>
#include <cstring>
#include <vector>

#include "engine/session.h"
#include "fuzz_engine.h"

extern "C" size_t LLVMFuzzerMutate(uint8_t* data, size_t size, size_t max_size);

namespace lesskv {
namespace {

constexpr const char* kSpecs[] = {"full", "window(24)", "h2o(24)", "snapkv(24)"};
constexpr size_t kCtx = 256;

// Sessions of all specs, each after the same few tokens.
const std::vector<std::vector<std::byte>>& Sessions() {
  static const std::vector<std::vector<std::byte>> sessions = [] {
    std::vector<std::vector<std::byte>> all;
    for (const char* const spec : kSpecs) {
      Sequence sequence(FuzzEngine().MakeCacheConfig(CacheSpec::Parse(spec), kCtx));
      std::vector<int32_t> tokens;
      for (int32_t i = 0; i < 40; ++i) tokens.push_back(3 + i % 200);
      FuzzEngine().Prefill({{.sequence = &sequence, .tokens = tokens}});
      all.push_back(SessionBytes(FuzzEngine(), sequence, 5));
    }
    return all;
  }();
  return sessions;
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
    const CacheSpec spec = CacheSpec::Parse(kSpecs[data[0] % std::size(kSpecs)]);
    const Session session = ParseSession(file, "session", FuzzEngine(), *FuzzEngine().MakeCacheConfig(spec, kCtx));
    SessionBytes(FuzzEngine(), session.sequence, session.pending_token);
  } catch (const Error&) {
  }
  return 0;
}

extern "C" size_t LLVMFuzzerCustomMutator(uint8_t* data, size_t size, size_t max_size, unsigned seed) {
  using namespace lesskv;
  const size_t i = seed % std::size(kSpecs);
  const std::vector<std::byte>& session = Sessions()[i];
  if (seed / 8 % 8 != 0 || session.size() + 1 > max_size) return LLVMFuzzerMutate(data, size, max_size);
  data[0] = static_cast<uint8_t>(i);
  std::memcpy(data + 1, session.data(), session.size());
  size = session.size() + 1;
  // A few bytes of it, which may be a length or a position: what libFuzzer does to the whole would mostly move the rest.
  size_t at = 1 + seed / 64 % session.size(), n = std::min<size_t>(8, size - at);
  for (size_t k = 0; k < n && (seed >> k) % 3 != 0; ++k) data[at + k] = static_cast<uint8_t>(seed >> (k * 3));
  return size;
}
