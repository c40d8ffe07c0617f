// What a run takes of the machine's memory, by the kernel's own count (VmHWM of the child): opening a model maps it
// without reading it, a run takes its weights, its cache and the work memory that `plan` states, and rows that leave the
// cache leave memory, however long the text.
#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <iterator>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "base/error.h"
#include "child_peak.h"
#include "format/gguf.h"
#include "format/gguf_writer.h"

namespace lesskv {
namespace {

namespace fs = std::filesystem;
const std::string kModel = LESSKV_SOURCE_DIR "/models/lesskv-small.gguf";

struct ChildRun {
  size_t peak = 0;  // bytes resident at most
  nlohmann::json result;
};

class PeakMemory : public testing::Test {
 protected:
  void SetUp() override {
#ifdef __SANITIZE_ADDRESS__
    GTEST_SKIP() << "AddressSanitizer keeps freed memory and shadows the rest";
#endif
    folder_ = fs::temp_directory_path() / fmt::format("lesskv_peak_{}", ::getpid());
    fs::create_directories(folder_);
  }
  void TearDown() override {
    if (!folder_.empty()) fs::remove_all(folder_);
  }

  ChildRun Call(std::vector<std::string> arguments) const {
    const std::string out = (folder_ / "out").string();
    const size_t peak = testing_support::PeakOfRun(std::move(arguments), out);
    std::ifstream in(out);
    const std::string text((std::istreambuf_iterator<char>(in)), {});
    return {peak, nlohmann::json::parse(text, nullptr, false)};
  }

  fs::path folder_;
};

// 16,000 tokens read in chunks: beyond what a one-token run takes, the full cache costs its counted bytes and the small
// one its own, about a twentieth.
TEST_F(PeakMemory, WhatLeftTheCacheLeftMemory) {
  std::ifstream sample(LESSKV_SOURCE_DIR "/docs/sample.txt");
  const std::string text((std::istreambuf_iterator<char>(sample)), {});
  const std::string path = (folder_ / "long.txt").string();
  std::ofstream long_text(path);
  for (int i = 0; i < 13; ++i) long_text << text << "\n";  // some 1,200 tokens each
  long_text.close();
  const auto run = [&](const std::string& spec, const std::vector<std::string>& prompt) {
    std::vector<std::string> arguments = {"run", "-m", kModel, "--ctx", "16384", "-n", "1", "-t", "1", "--json",
                                          "--kv", spec};
    arguments.insert(arguments.end(), prompt.begin(), prompt.end());
    return Call(arguments);
  };
  const std::string chunk = "+prefill(chunk=512)";
  // The base has the work memory of a whole chunk, and a cache of one chunk.
  std::string first_chunk = text.substr(0, 2000);
  const ChildRun base = run("full" + chunk, {"-p", first_chunk});
  const ChildRun full = run("full" + chunk, {"-f", path});
  const ChildRun small = run("h2o(5%)" + chunk, {"-f", path});
  ASSERT_GT(full.result["tokens_seen"], 15000);
  ASSERT_EQ(full.result["tokens_seen"], small.result["tokens_seen"]);
  const auto peak = [](const ChildRun& r) { return r.result["kv_bytes_peak"].get<double>(); };
  const auto beyond = [&](const ChildRun& r) {
    return static_cast<double>(r.peak) - static_cast<double>(base.peak) + peak(base);
  };
  fmt::print("beyond the base: full {:.0f} of {:.0f} bytes counted, small {:.0f} of {:.0f}\n", beyond(full), peak(full),
             beyond(small), peak(small));
  EXPECT_LT(peak(small), 0.1 * peak(full));
  const double slack = 4 << 20;  // text, tokens, allocator
  EXPECT_NEAR(beyond(full), peak(full), slack);
  EXPECT_NEAR(beyond(small), peak(small), slack);
  EXPECT_LT(beyond(small), 0.25 * beyond(full));
}

// The bundled model with its layers repeated up to n_layers, and its embedding n_embeddings times in a row: valid, and
// as large as one likes.
void WriteLargeModel(const std::string& path, uint32_t n_layers, size_t n_embeddings) {
  constexpr uint32_t kBundledLayers = 4;
  const GgufFile bundled = GgufFile::Open(kModel);
  GgufWriter writer;
  for (const auto& [key, value] : bundled.metadata()) {
    if (key == "llama.block_count")
      writer.Add(key, n_layers);
    else if (key != "llama.vocab_size")  // optional; what the embedding has otherwise
      writer.Add(key, value);
  }
  const auto add = [&](const std::string& name, const GgufTensor& tensor) {
    writer.AddTensor(name, tensor.type, std::span(tensor.ne.data(), tensor.n_dims), tensor.data);
  };
  for (const GgufTensor& tensor : bundled.tensors())
    if (!std::string_view(tensor.name).starts_with("blk.") && tensor.name != "token_embd.weight")
      add(std::string(tensor.name), tensor);
  const GgufTensor& embedding = *bundled.FindTensor("token_embd.weight");
  writer.AddTensor(embedding.name, embedding.type, {embedding.ne[0], embedding.ne[1] * n_embeddings},
                   [&](ByteSink& sink) {
                     for (size_t i = 0; i < n_embeddings; ++i) sink.Write(embedding.data);
                   });
  for (uint32_t layer = 0; layer < n_layers; ++layer) {
    const std::string from = fmt::format("blk.{}.", layer % kBundledLayers), to = fmt::format("blk.{}.", layer);
    for (const GgufTensor& tensor : bundled.tensors())
      if (std::string_view(tensor.name).starts_with(from)) add(to + std::string(tensor.name).substr(from.size()), tensor);
  }
  writer.Write(path);
}

TEST_F(PeakMemory, APlanReadsNoWeights) {
  const std::string wide = (folder_ / "wide.gguf").string();
  WriteLargeModel(wide, 4, 60);
  const ChildRun small = Call({"plan", "-m", kModel, "-o", "json"}), large = Call({"plan", "-m", wide, "-o", "json"});
  ASSERT_GT(large.result[0]["weight_bytes"], 50'000'000);
  EXPECT_NEAR(static_cast<double>(large.peak), static_cast<double>(small.peak), 4 << 20);
}

TEST_F(PeakMemory, ARunTakesItsWeightsItsCacheAndTheStatedWork) {
  const std::string deep = (folder_ / "deep.gguf").string();
  WriteLargeModel(deep, 60, 1);
  std::ifstream sample(LESSKV_SOURCE_DIR "/docs/sample.txt");
  const std::string prompt((std::istreambuf_iterator<char>(sample)), {});
  // What the bounds are for a run, beside what it takes before: program, libraries, tokenizer. Those come from a run that
  // needs next to nothing else.
  struct Stated {
    double kv, all;
  };
  const auto state = [&](const std::string& model, const ChildRun& run, const std::string& spec) -> Stated {
    const auto tokens = std::to_string(run.result["prompt_tokens"].get<size_t>());
    const ChildRun plan = Call({"plan", "-m", model, "-t", "2", "-p", tokens, "-n", "2", "-o", "json", "--kv", spec});
    const auto bytes = [&](const char* key) { return plan.result[0][key].get<double>(); };
    return {bytes("kv_bytes_peak"), bytes("weight_bytes") + bytes("kv_bytes_peak") + bytes("work_bytes")};
  };
  const ChildRun least = Call({"run", "-m", kModel, "-p", "a", "-n", "1", "-t", "2", "--json"});
  const double before = static_cast<double>(least.peak) - state(kModel, least, "full").all;
  for (const std::string loading : {"--mmap", "--no-mmap"}) {
    for (const std::string spec : {"full", "h2o(5%)+prefill(chunk=128)"}) {
      const ChildRun run = Call({"run", "-m", deep, loading, "-p", prompt, "-n", "2", "-t", "2", "--json", "--kv", spec});
      const Stated stated = state(deep, run, spec);
      EXPECT_EQ(run.result["kv_bytes_peak"].get<double>(), stated.kv);
      const double taken = static_cast<double>(run.peak) - before;
      fmt::print("{} {}: {:.1f} MB taken, {:.1f} MB stated\n", loading, spec, taken * 1e-6, stated.all * 1e-6);
      EXPECT_LT(taken, stated.all + (4 << 20));  // attention's scratch, halves of large pages, the allocator's remains
      EXPECT_GT(taken, 0.8 * stated.all);
    }
  }
}

}  // namespace
}  // namespace lesskv
