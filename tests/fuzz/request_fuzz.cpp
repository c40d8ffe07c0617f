// libFuzzer on what clients send: the bodies of requests, and the bytes of connections.
#include <cstdint>
#include <cstring>
#include <iterator>

#include "fuzz_engine.h"
#include "server/any_body.h"

extern "C" size_t LLVMFuzzerMutate(uint8_t* data, size_t size, size_t max_size);

namespace lesskv {
namespace {

constexpr std::string_view kConnections[] = {
    "POST /v1/completions?x HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\nExpect: 100-continue\r\n\r\nabcGET / HTTP/1.0\r\n\r\n",
    "POST /a HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n2;a=b\r\nab\r\n0\r\nX: y\r\n\r\n"};

const ApiContext& Context() {
  static const ChatTemplate chat = ChatTemplate::Choose("plain", "", FuzzTokenizer(), "model");
  static const ApiContext context = [] {
    ApiLimits limits{.ctx = 1000, .max_prompt = 500, .max_output = 100, .max_protected = 20, .max_choices = 3};
    for (const char* const spec : {"full", "window(24)", "h2o(24)"})
      limits.configs.push_back(FuzzEngine().MakeCacheConfig(CacheSpec::Parse(spec), limits.ctx));
    return ApiContext{FuzzEngine(), FuzzTokenizer(), &chat, "tiny", limits};
  }();
  return context;
}

}  // namespace
}  // namespace lesskv

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::string_view bytes(reinterpret_cast<const char*>(data), size);
  lesskv::TakeBody(bytes, lesskv::Context());
  lesskv::TakeRequests(bytes, 1 + size % 7);
  return 0;
}

// Now and then something that makes sense, so that mutations begin behind the parsers, too.
extern "C" size_t LLVMFuzzerCustomMutator(uint8_t* data, size_t size, size_t max_size, unsigned seed) {
  constexpr size_t kBodies = std::size(lesskv::kSomeBodies), kAll = kBodies + std::size(lesskv::kConnections);
  if (seed % 64 == 0) {
    const size_t i = seed / 64 % kAll;
    const std::string_view text = i < kBodies ? lesskv::kSomeBodies[i] : lesskv::kConnections[i - kBodies];
    size = std::min(text.size(), max_size);
    std::memcpy(data, text.data(), size);
  }
  return LLVMFuzzerMutate(data, size, max_size);
}
