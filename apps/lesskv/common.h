// What the commands share: options that mean the same everywhere, opening a model, reading text, writing results,
// Ctrl-C, progress.
#pragma once

#include <CLI/CLI.hpp>
#include <atomic>
#include <cstddef>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "engine/engine.h"
#include "engine/generate.h"
#include "tokenizer/tokenizer.h"

namespace lesskv {

// -m, -c/--ctx, -t/--threads, --compute.
struct ModelOptions {
  std::string model;
  size_t ctx = 0;  // 0: the trained context
  int threads = 0;
  std::string compute = "auto";
  ModelLoading loading = ModelLoading::kAuto;
};
void AddModelOptions(CLI::App& command, ModelOptions& options);
// --mmap and --no-mmap, for commands that compute with the weights.
void AddModelLoading(CLI::App& command, ModelLoading& loading);

// --kv, one spec.
void AddCacheOption(CLI::App& command, std::string& spec);

// -n, --stop and the sampler's options.
struct SamplingFlags {
  int64_t max_tokens = -1;
  std::vector<std::string> stops;
  SamplerOptions sampler;
};
void AddSamplingOptions(CLI::App& command, SamplingFlags& flags, const std::string& max_tokens_text);
// Throws Error naming the option for what cannot be used.
GenerationOptions MakeGenerationOptions(const SamplingFlags& flags);

struct OpenedModel {
  std::shared_ptr<const Model> model;
  std::unique_ptr<const Tokenizer> tokenizer;
  std::unique_ptr<Engine> engine;
  size_t ctx = 0;
};
// Opens the model and its tokenizer, which must have as many tokens as the model's vocabulary. A context beyond the
// trained one is a warning on stderr.
OpenedModel OpenModel(const ModelOptions& options);

// The whole file, or standard input for "-". Throws Error with the reason.
std::string ReadText(const std::string& path);
// What -p gives, or the file that -f gives, or standard input where it is a pipe; null: not given. A last newline of a
// file or pipe is left out. Throws Error when there is no prompt, or both.
std::string PromptText(const std::string* prompt, const std::string* file);
bool StdinIsPipe();
bool StderrIsTerminal();

// Results go to standard output, checked: what cannot be written is Error kIo.
void WriteResult(std::string_view text);
void FlushResults();

// The flag that Ctrl-C sets from now on. A second Ctrl-C ends the process at once.
const std::atomic<bool>& StopOnInterrupt();
// Takes the flag back: the next Ctrl-C is the first one again.
void ForgetInterrupt();

// A bar on stderr when that is a terminal; nothing otherwise.
class ProgressBar {
 public:
  explicit ProgressBar(std::string label);
  ~ProgressBar() { Clear(); }
  ProgressBar(const ProgressBar&) = delete;
  ProgressBar& operator=(const ProgressBar&) = delete;
  void Show(double done);  // in [0, 1]
  void Clear();

 private:
  std::string label_;
  bool enabled_;
  int shown_percent_ = -1;
};

}  // namespace lesskv
