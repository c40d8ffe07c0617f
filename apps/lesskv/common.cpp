#include "common.h"

#include <fmt/format.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <csignal>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <iostream>
#include <iterator>

#include "base/error.h"

namespace lesskv {
namespace {

std::atomic<bool> g_interrupted{false};
static_assert(std::atomic<bool>::is_always_lock_free, "set from a signal handler");

void OnInterrupt(int) {
  g_interrupted = true;
  std::signal(SIGINT, SIG_DFL);
}

[[noreturn]] void FailWriting() {
  Fail(ErrorCode::kIo, "standard output cannot be written: {}", std::strerror(errno));
}

}  // namespace

void AddModelOptions(CLI::App& command, ModelOptions& options) {
  command.add_option("-m,--model", options.model, "Model file (GGUF)")->required()->option_text("MODEL");
  command.add_option("-c,--ctx", options.ctx, "Context length in tokens; percentages of a cache spec refer to it "
                                              "(default: what the model was trained for)")->option_text("N");
  command.add_option("-t,--threads", options.threads, "Threads (default: all CPUs)")->option_text("N");
  command.add_option("--compute", options.compute, "Arithmetic of products: auto (bf16 where the CPU has it), f32, bf16")
      ->option_text("TYPE");
}

void AddModelLoading(CLI::App& command, ModelLoading& loading) {
  const auto add = [&](const char* name, ModelLoading value, const char* text) {
    return command.add_flag_callback(name, [&loading, value] { loading = value; }, text);
  };
  CLI::Option* map = add("--mmap", ModelLoading::kMap, "Map the model's file: starts at once, shares memory");
  CLI::Option* read = add("--no-mmap", ModelLoading::kRead,
                          "Read the model into memory in large pages: decodes faster (default: this for large files "
                          "where memory allows)");
  map->excludes(read);
}

void AddCacheOption(CLI::App& command, std::string& spec) {
  command.add_option("--kv", spec, "Cache spec, such as full or h2o(5%)+less; lesskv methods lists the terms")
      ->capture_default_str()->option_text("SPEC");
}

void AddSamplingOptions(CLI::App& command, SamplingFlags& flags, const std::string& max_tokens_text) {
  command.add_option("-n,--predict", flags.max_tokens, max_tokens_text)->capture_default_str()->option_text("N");
  command.add_option("--stop", flags.stops, "Stop before this text or control token; may be repeated")
      ->option_text("TEXT")->allow_extra_args(false);
  SamplerOptions& s = flags.sampler;
  command.add_option("--temp", s.temperature, "Temperature; 0: always the likeliest token")->capture_default_str();
  command.add_option("--top-k", s.top_k, "Sample from the K likeliest tokens, 0: all")->capture_default_str();
  command.add_option("--top-p", s.top_p, "Sample from the likeliest tokens that together reach P, 1: all")
      ->capture_default_str();
  command.add_option("--min-p", s.min_p, "Leave out tokens less likely than P times the likeliest, 0: none")
      ->capture_default_str();
  command.add_option("--repeat-penalty", s.repeat_penalty, "Weaken tokens seen lately, 1: off")->capture_default_str();
  command.add_option("--repeat-last-n", s.repeat_last_n, "How many last tokens count as lately, -1: all")
      ->capture_default_str();
  command.add_option("--seed", s.seed, "Seed of the sampling")->capture_default_str();
}

GenerationOptions MakeGenerationOptions(const SamplingFlags& flags) {
  if (flags.max_tokens < 1 && flags.max_tokens != -1)
    Fail(ErrorCode::kInvalidArgument, "-n: expected 1 or more tokens, or -1 for no limit, found {}", flags.max_tokens);
  GenerationOptions options;
  options.sampler = flags.sampler;
  options.max_tokens = flags.max_tokens == -1 ? 0 : static_cast<size_t>(flags.max_tokens);
  options.stops = flags.stops;
  Validate(options);
  return options;
}

OpenedModel OpenModel(const ModelOptions& options) {
  const ComputeChoice compute = ParseComputeChoice(options.compute);
  OpenedModel opened;
  opened.model = Model::Load(options.model, options.loading);
  opened.tokenizer = Tokenizer::Create(LoadVocabulary(opened.model->file()));
  const ModelConfig& config = opened.model->config();
  if (opened.tokenizer->size() > config.n_vocab)
    Fail(ErrorCode::kBadFile, "{}: the tokenizer has {} tokens, the model only {}", options.model,
         opened.tokenizer->size(), config.n_vocab);
  opened.engine = std::make_unique<Engine>(opened.model, EngineOptions{.threads = options.threads, .compute = compute});
  opened.ctx = options.ctx == 0 ? config.train_ctx : options.ctx;
  constexpr size_t kMaxContext = size_t{1} << 30;  // positions are 32-bit
  if (opened.ctx > kMaxContext)
    Fail(ErrorCode::kInvalidArgument, "--ctx: expected at most {}, found {}", kMaxContext, opened.ctx);
  if (opened.ctx > config.train_ctx)
    fmt::print(stderr, "warning: a context of {} tokens is more than the {} that the model was trained for\n",
               opened.ctx, config.train_ctx);
  return opened;
}

std::string ReadText(const std::string& path) {
  if (path == "-") {
    std::string text((std::istreambuf_iterator<char>(std::cin)), std::istreambuf_iterator<char>());
    if (std::cin.bad()) Fail(ErrorCode::kIo, "standard input cannot be read");
    return text;
  }
  struct stat status {};
  if (stat(path.c_str(), &status) == 0 && S_ISDIR(status.st_mode))
    Fail(ErrorCode::kInvalidArgument, "{}: expected a text file, found a directory", path);
  std::ifstream file(path, std::ios::binary);
  if (!file) Fail(ErrorCode::kNotFound, "{} cannot be read: {}", path, std::strerror(errno));
  std::string text((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
  if (file.bad()) Fail(ErrorCode::kIo, "{} cannot be read: {}", path, std::strerror(errno));
  return text;
}

std::string PromptText(const std::string* prompt, const std::string* file) {
  if (prompt != nullptr && file != nullptr)
    Fail(ErrorCode::kInvalidArgument, "a prompt comes from -p or from -f, not from both");
  if (prompt != nullptr) return *prompt;
  if (file == nullptr && !StdinIsPipe())
    Fail(ErrorCode::kInvalidArgument, "there is no prompt: give -p TEXT, -f FILE or a pipe");
  std::string text = ReadText(file != nullptr ? *file : "-");
  if (text.ends_with('\n')) text.pop_back();
  return text;
}

bool StdinIsPipe() {
  struct stat status {};
  if (fstat(STDIN_FILENO, &status) != 0) return false;
  return S_ISFIFO(status.st_mode) || S_ISREG(status.st_mode) || S_ISSOCK(status.st_mode);
}

bool StderrIsTerminal() { return isatty(STDERR_FILENO) != 0; }

void WriteResult(std::string_view text) {
  if (std::fwrite(text.data(), 1, text.size(), stdout) != text.size()) FailWriting();
}

void FlushResults() {
  std::cout.flush();
  if (std::fflush(stdout) != 0 || std::cout.fail()) FailWriting();
}

const std::atomic<bool>& StopOnInterrupt() {
  std::signal(SIGINT, OnInterrupt);
  return g_interrupted;
}

void ForgetInterrupt() {
  g_interrupted = false;
  std::signal(SIGINT, OnInterrupt);
}

ProgressBar::ProgressBar(std::string label) : label_(std::move(label)), enabled_(StderrIsTerminal()) {}

void ProgressBar::Show(double done) {
  const int percent = static_cast<int>(done * 100);
  if (!enabled_ || percent == shown_percent_) return;
  shown_percent_ = percent;
  constexpr int kWidth = 40;
  const int full = percent * kWidth / 100;
  fmt::print(stderr, "\r{} [{}{}] {:3}%", label_, std::string(static_cast<size_t>(full), '#'),
             std::string(static_cast<size_t>(kWidth - full), '.'), percent);
  std::fflush(stderr);
}

void ProgressBar::Clear() {
  if (shown_percent_ >= 0) fmt::print(stderr, "\r\033[K");
  shown_percent_ = -1;
}

}  // namespace lesskv
