// What the commands share: options that mean the same everywhere, opening a model, reading text, writing results and
// words for people, progress.
#pragma once

#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

#include "base/interrupt.h"
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
// --seed: a number, or -1 for one that chance chooses and that is told on stderr.
void AddSeed(CLI::App& command, uint64_t& seed, const char* help);
// After all options are there: numbers must be decimal and within their type's range, and no value may be empty but a
// prompt. CLI11 alone reads 010 as eight, what is too large as the largest there is, and nothing as zero.
void RequirePlainValues(CLI::App& app);
// An option of numbers or words between commas, none of them empty (CLI11's own lists leave empty ones out), each of
// which `check` takes.
template <typename Item>
CLI::Option* AddList(CLI::App& command, const std::string& names, std::vector<Item>& values, const std::string& help,
                     const CLI::Validator& check = {});
// --mmap and --no-mmap, for commands that compute with the weights.
void AddModelLoading(CLI::App& command, ModelLoading& loading);

// --kv, one spec.
void AddCacheOption(CLI::App& command, std::string& spec);

// -n, --stop and the sampler's options.
struct SamplingFlags {
  int64_t max_tokens = -1;
  std::vector<std::string> stops;
  bool ignore_eos = false;
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
// What -p gives, or the file that -f gives, or standard input where it is a pipe; null: not given. What editors add to a
// file is left out, of pipes too: a byte order mark and the last line's end. Throws Error when there is no prompt, or both.
std::string PromptText(const std::string* prompt, const std::string* file);
bool StdinIsPipe();
// Refuses a path of `option` where no file can be written, before anything is computed: a folder, one in a folder that
// is not there or cannot be written, a read-only file.
void CheckOutputPath(const std::string& option, const std::string& path);

// Results go to standard output, checked: what cannot be written is Error kIo.
void WriteResult(std::string_view text);
void FlushResults();

// Words for people go to standard error. Where they cannot be written the work goes on, and the program says so by its
// exit status.
void Say(std::string_view text);
template <typename... Args>
void Say(fmt::format_string<Args...> format, Args&&... args) {
  Say(std::string_view(fmt::format(format, std::forward<Args>(args)...)));
}
bool WordsWereLost();

// One line at the end of a terminal's stderr that is written again and again, cut to the terminal's width; nothing where
// stderr is something else or the terminal cannot overwrite (TERM=dumb). Uses no escape sequences and no colour.
class StatusLine {
 public:
  StatusLine();
  bool enabled() const { return enabled_; }
  size_t width() const;  // columns that can be used
  void Set(const std::string& text);
  void Clear();

 private:
  bool enabled_;
  size_t shown_ = 0;  // columns
};

// A bar on a terminal, nothing elsewhere. A wait of more than `long_seconds` (0: no wait is long) is announced either
// way: the bar then moves on its own with the time that is left, and where there is none a line a minute tells it.
class ProgressBar {
 public:
  explicit ProgressBar(std::string label, double long_seconds = 0)
      : label_(std::move(label)), long_seconds_(long_seconds) {}
  ~ProgressBar() { Clear(); }
  ProgressBar(const ProgressBar&) = delete;
  ProgressBar& operator=(const ProgressBar&) = delete;

  void Show(double done);  // in [0, 1]
  void Expect(double seconds);  // about so long in all; what Show says corrects it
  void Clear();

 private:
  using Clock = std::chrono::steady_clock;
  struct Now {
    double done, seconds_left;
  };
  double Elapsed() const { return std::chrono::duration<double>(Clock::now() - begin_).count(); }
  void Announce(double seconds);
  Now Estimate() const;
  void Draw();
  void Tick();

  const std::string label_;
  const double long_seconds_;
  StatusLine line_;
  int shown_percent_ = -1;
  // Of an announced wait: the rest is guarded by the mutex while the thread runs.
  std::thread ticker_;
  std::mutex mutex_;
  std::condition_variable wake_;
  bool ending_ = false;
  double done_ = 0, at_done_ = 0;  // share done, and the seconds since the beginning when it was told
  double expected_ = 0;            // seconds in all; 0: not known
  const Clock::time_point begin_ = Clock::now();
};

}  // namespace lesskv
