// Conversations of several turns with a server, and what they must say.
#pragma once

#include <filesystem>
#include <fstream>
#include <string>
#include <vector>

#include "server/server_harness.h"

namespace lesskv::server_test {

namespace fs = std::filesystem;
inline const std::vector<std::string> kSpecs = {"full", "h2o(24)", "window(24)", "window(24)+prefill(chunk=8)",
                                                "tova(24)", "cascade(24, block=8)"};

inline std::vector<int32_t> Joined(std::vector<int32_t> a, const std::vector<int32_t>& b) {
  a.insert(a.end(), b.begin(), b.end());
  return a;
}

// A conversation as one sequence of an engine of its own reads it, turn by turn.
class Streamed {
 public:
  Streamed(const Engine& like, const Tokenizer& tokenizer, const std::string& spec,
           std::vector<ProtectedSpan> spans = {})
      : engine_(like.shared_model(), {.threads = 1, .compute = ComputeChoice::kF32, .batch_invariant = true}),
        tokenizer_(tokenizer),
        sequence_(engine_.MakeCacheConfig(CacheSpec::Parse(spec), kCtx, std::move(spans))) {}

  std::string Say(const std::vector<int32_t>& ids, size_t n = 30) {
    GenerateOptions options;
    options.sampler = {.temperature = 0};
    options.max_tokens = n;
    options.ignore_end = true;
    std::vector<int32_t> turn = ids;
    if (pending_) turn.insert(turn.begin(), *pending_);
    const GenerateResult result = Generate(engine_, tokenizer_, sequence_, turn, options);
    pending_ = result.pending_token;
    return result.text;
  }
  size_t seen() const { return sequence_.tokens().size(); }
  const Sequence& sequence() const { return sequence_; }
  double rows() const { return sequence_.Stats().tokens_resident; }
  std::vector<int32_t> text() const { return Joined(sequence_.tokens(), {*pending_}); }

 private:
  Engine engine_;
  const Tokenizer& tokenizer_;
  Sequence sequence_;
  std::optional<int32_t> pending_;
};

class ReuseTest : public ServerTest {
 protected:
  void SetUp() override {
    folder_ = fs::temp_directory_path() / fmt::format("lesskv_store_{}", ::getpid());
    fs::remove_all(folder_);
  }
  void TearDown() override {
    ServerTest::TearDown();
    fs::remove_all(folder_);
  }

  std::vector<int32_t> Ids(const std::string& text) const { return tokenizer_->Encode(text, false, true); }
  // As long as it is asked to be, whatever tokens it has.
  Json Ask(const std::vector<int32_t>& prompt, Json more = Json::object()) const {
    more["prompt"] = prompt;
    more["ignore_eos"] = true;
    if (!more.contains("max_tokens")) more["max_tokens"] = 30;
    const Reply reply = Complete(more);
    EXPECT_EQ(reply.status, 200) << reply.body;
    return reply.json();
  }
  static size_t Cached(const Json& answer) {
    return answer["usage"]["prompt_tokens_details"]["cached_tokens"].get<size_t>();
  }
  static std::string Text(const Json& answer) { return answer["choices"][0]["text"].get<std::string>(); }
  bool Saved(uint64_t n) const {
    return Soon([&] { return store_->Metrics().saved == n; });
  }

  // A server reads a text, as `alone` does, and ends: it lies in the store.
  void StoreSea(const Options& options, Streamed& alone) {
    Start(options);
    alone.Say(Ids("the sea"));
    Ask(Ids("the sea"));
    ASSERT_TRUE(Saved(1));
    Stop();
  }

  fs::path folder_;
};

// Another byte at `at`.
inline void Damage(const fs::path& path, size_t at) {
  std::fstream file(path, std::ios::in | std::ios::out | std::ios::binary);
  file.seekg(static_cast<std::streamoff>(at));
  const int byte = file.get();
  file.seekp(static_cast<std::streamoff>(at));
  file.put(static_cast<char>(byte ^ 0x55));
}

}  // namespace lesskv::server_test
