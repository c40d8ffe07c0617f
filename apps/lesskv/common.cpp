#include "common.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <fmt/ranges.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <iostream>
#include <iterator>
#include <random>

#include "base/atomic_file.h"
#include "base/error.h"

namespace lesskv {
namespace {

std::atomic<bool> g_words_lost{false};

[[noreturn]] void FailWriting() {
  Fail(ErrorCode::kIo, "standard output cannot be written: {}", std::strerror(errno));
}

// Reads a decimal number; what is wrong with it, or nothing.
template <typename Number>
std::string ReadNumber(std::string_view text, Number& value) {
  const std::string_view digits = text.substr(text.starts_with('+') ? 1 : 0);
  const auto [end, error] = std::from_chars(digits.data(), digits.data() + digits.size(), value);
  if (error == std::errc::result_out_of_range) return fmt::format("{} is out of range", text);
  if (error == std::errc() && end == digits.data() + digits.size()) return {};
  const char* kind = std::is_floating_point_v<Number> ? "a number"
                     : std::is_unsigned_v<Number>     ? "a whole number from 0"
                                                      : "a whole number";
  return fmt::format("expected {}, found \"{}\"", kind, text);
}

// Leaves the number as CLI11 reads it rightly: without zeros in front.
template <typename Number>
CLI::Validator PlainNumber() {
  const auto check = [](std::string& text) {
    Number value{};
    std::string wrong = ReadNumber(text, value);
    if (wrong.empty()) text = fmt::format("{}", value);
    return wrong;
  };
  return CLI::Validator(check, "");
}

CLI::Validator NotEmpty() {
  return CLI::Validator([](std::string& text) { return std::string(text.empty() ? "expected a value, found an empty one" : ""); },
                        "");
}

// 42+1.5, 42-inf: a token and what is added to its logit.
TokenBias ReadBias(const std::string& text) {
  TokenBias bias{};
  const size_t sign = std::min(text.find_first_of("+-"), text.size());
  if (!ReadNumber(text.substr(0, sign), bias.token).empty() || !ReadNumber(text.substr(sign), bias.bias).empty())
    throw CLI::ValidationError(
        "--logit-bias", fmt::format("expected a token and a number such as 42+1.5 or 42-inf, found \"{}\"", text));
  return bias;
}

std::string ReadAll(int fd, const std::string& name) {
  std::string text;
  for (;;) {
    constexpr size_t kPiece = size_t{1} << 16;
    const size_t before = text.size();
    text.resize(before + kPiece);
    const ssize_t n = ::read(fd, text.data() + before, kPiece);
    const int error = errno;
    text.resize(before + static_cast<size_t>(std::max<ssize_t>(0, n)));
    if (n == 0) return text;
    if (n < 0 && error != EINTR) Fail(ErrorCode::kIo, "{} cannot be read: {}", name, std::strerror(error));
  }
}

std::string HumanTime(double seconds) {
  const auto s = static_cast<long>(seconds + 0.5);
  if (s < 90) return fmt::format("{} s", s);
  if (s < 90 * 60) return fmt::format("{} min", (s + 30) / 60);
  return fmt::format("{:.1f} h", seconds / 3600);
}

}  // namespace

void AddModelOptions(CLI::App& command, ModelOptions& options) {
  command.add_option("-m,--model", options.model, "Model file (GGUF)")->required()->option_text("MODEL");
  command.add_option("-c,--ctx", options.ctx, "Context length in tokens; percentages of a cache spec refer to it "
                                              "(default: what the model was trained for)")->option_text("N");
  command.add_option("-t,--threads", options.threads, "Threads (default: all CPUs)")
      ->check(CLI::Range(0, ThreadPool::kMaxThreads))->option_text("N");
  command.add_option("--compute", options.compute, "Arithmetic of products: auto (bf16 with AMX, int8 "
                                                  "elsewhere, f32 where a CPU has neither), f32, bf16, int8")
      ->capture_default_str()->option_text("TYPE");
}

void AddSeed(CLI::App& command, uint64_t& seed, const char* help) {
  const auto choose = [&seed](const std::string& text) {
    if (text == "-1") {
      seed = std::random_device()();
      return Say("seed        {}\n", seed);
    }
    if (const std::string wrong = ReadNumber(text, seed); !wrong.empty())
      throw CLI::ValidationError("--seed", wrong + " (-1: chance chooses)");
  };
  command.add_option_function<std::string>("--seed", choose, std::string(help) + "; -1: chance chooses one, which is told")
      ->option_text("N")->default_str(fmt::format("{}", seed));
}

void RequirePlainValues(CLI::App& app) {
  for (CLI::Option* option : app.get_options()) {
    const std::string type = option->get_type_name();
    const std::string kind = type.substr(0, type.find(':'));
    if (kind == "INT") option->transform(PlainNumber<int64_t>());
    else if (kind == "UINT") option->transform(PlainNumber<uint64_t>());
    else if (kind == "FLOAT") option->transform(PlainNumber<double>());
    else if (option->get_items_expected_min() > 0 && !option->check_lname("prompt") && !option->check_lname("system"))
      option->transform(NotEmpty());
  }
  for (CLI::App* command : app.get_subcommands({})) RequirePlainValues(*command);
}

template <typename Item>
CLI::Option* AddList(CLI::App& command, const std::string& names, std::vector<Item>& values, const std::string& help,
                     const CLI::Validator& check) {
  const std::string name = names.substr(names.rfind(',') + 1);
  const auto read = [&values, name, check](const std::vector<std::string>& given) {
    values.clear();
    for (std::string items = fmt::format("{},", fmt::join(given, ",")); !items.empty();) {
      std::string item = items.substr(0, items.find(','));
      items.erase(0, item.size() + 1);
      std::string wrong;
      Item value{};
      if constexpr (std::is_arithmetic_v<Item>) {
        wrong = ReadNumber(item, value);
      } else {
        if (item.empty()) wrong = "expected a value, found an empty one";
        value = item;
      }
      if (wrong.empty()) wrong = check(item);
      if (!wrong.empty()) throw CLI::ValidationError(name, wrong);
      values.push_back(value);
    }
  };
  return command.add_option_function<std::vector<std::string>>(names, read, help)
      ->default_str(fmt::format("{}", fmt::join(values, ",")));
}

template CLI::Option* AddList(CLI::App&, const std::string&, std::vector<int>&, const std::string&,
                              const CLI::Validator&);
template CLI::Option* AddList(CLI::App&, const std::string&, std::vector<size_t>&, const std::string&,
                              const CLI::Validator&);
template CLI::Option* AddList(CLI::App&, const std::string&, std::vector<double>&, const std::string&,
                              const CLI::Validator&);
template CLI::Option* AddList(CLI::App&, const std::string&, std::vector<std::string>&, const std::string&,
                              const CLI::Validator&);

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
  command.add_option("--frequency-penalty", s.frequency_penalty,
                     "Weaken tokens by so much for each time they were generated, -2 to 2, 0: off")->capture_default_str();
  command.add_option("--presence-penalty", s.presence_penalty,
                     "Weaken tokens that were generated by so much, -2 to 2, 0: off")->capture_default_str();
  command.add_option_function<std::vector<std::string>>(
      "--logit-bias",
      [&s](const auto& given) { std::ranges::transform(given, std::back_inserter(s.logit_bias), ReadBias); },
      "Make token TOKEN likelier (+) or less likely (-) by BIAS, up to 100; -inf: never; may be repeated")
      ->option_text("TOKEN(+/-)BIAS")->allow_extra_args(false);
  command.add_flag("--ignore-eos", flags.ignore_eos, "Never choose a token that ends the text");
  AddSeed(command, s.seed, "Seed of the sampling");
}

GenerationOptions MakeGenerationOptions(const SamplingFlags& flags) {
  if (flags.max_tokens < -1)
    Fail(ErrorCode::kInvalidArgument, "-n: expected 0 or more tokens, or -1 for no limit, found {}", flags.max_tokens);
  GenerationOptions options;
  options.sampler = flags.sampler;
  options.max_tokens =
      flags.max_tokens == -1 ? GenerationOptions::kNoLimit : static_cast<size_t>(flags.max_tokens);
  options.stops = flags.stops;
  options.ignore_end = flags.ignore_eos;
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
    Say("warning: a context of {} tokens is more than the {} that the model was trained for\n",
        opened.ctx, config.train_ctx);
  return opened;
}

std::string ReadText(const std::string& path) {
  if (path == "-") return ReadAll(STDIN_FILENO, "standard input");
  const int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (fd < 0) Fail(ErrorCode::kNotFound, "{} cannot be read: {}", path, std::strerror(errno));
  struct Closer {
    int fd;
    ~Closer() { ::close(fd); }
  } const closer{fd};
  struct stat status {};
  if (fstat(fd, &status) == 0 && S_ISDIR(status.st_mode))
    Fail(ErrorCode::kInvalidArgument, "{}: expected a text file, found a directory", path);
  return ReadAll(fd, path);
}

std::string PromptText(const std::string* prompt, const std::string* file) {
  if (prompt != nullptr && file != nullptr)
    Fail(ErrorCode::kInvalidArgument, "a prompt comes from -p or from -f, not from both");
  if (prompt != nullptr) return *prompt;
  if (file == nullptr && !StdinIsPipe())
    Fail(ErrorCode::kInvalidArgument, "there is no prompt: give -p TEXT, -f FILE or a pipe");
  std::string text = ReadText(file != nullptr ? *file : "-");
  constexpr std::string_view kByteOrderMark = "\xef\xbb\xbf";
  if (text.starts_with(kByteOrderMark)) text.erase(0, kByteOrderMark.size());
  if (text.ends_with('\n')) text.resize(text.size() - (text.ends_with("\r\n") ? 2 : 1));
  return text;
}

bool StdinIsPipe() {
  struct stat status {};
  if (fstat(STDIN_FILENO, &status) != 0) return false;
  const mode_t mode = status.st_mode;
  return S_ISFIFO(mode) || S_ISREG(mode) || S_ISSOCK(mode) || S_ISDIR(mode);  // of a folder reading says what is wrong
}

void CheckOutputPath(const std::string& option, const std::string& path) {
  struct stat info {};
  const bool exists = ::stat(path.c_str(), &info) == 0;
  if (!exists && errno != ENOENT) Fail(ErrorCode::kInvalidArgument, "{} {}: {}", option, path, std::strerror(errno));
  if (exists && S_ISDIR(info.st_mode))
    Fail(ErrorCode::kInvalidArgument, "{} {}: expected a file, found a folder", option, path);
  if (exists && !S_ISREG(info.st_mode))
    Fail(ErrorCode::kInvalidArgument, "{} {}: it exists and is not a regular file", option, path);
  if (IsReadOnlyFile(path))
    Fail(ErrorCode::kInvalidArgument, "{} {}: the file is read-only", option, path);
  std::filesystem::path folder = std::filesystem::path(path).parent_path();
  if (folder.empty()) folder = ".";
  std::error_code ignored;
  if (!std::filesystem::is_directory(folder, ignored))
    Fail(ErrorCode::kInvalidArgument, "{} {}: there is no folder {}", option, path, folder.string());
  if (::access(folder.c_str(), W_OK) != 0)
    Fail(ErrorCode::kInvalidArgument, "{} {}: the folder {} cannot be written", option, path, folder.string());
}

void WriteResult(std::string_view text) {
  if (std::fwrite(text.data(), 1, text.size(), stdout) != text.size()) FailWriting();
}

void FlushResults() {
  std::cout.flush();
  if (std::fflush(stdout) != 0 || std::cout.fail()) FailWriting();
}

void Say(std::string_view text) {
  if (std::fwrite(text.data(), 1, text.size(), stderr) != text.size() || std::fflush(stderr) != 0) g_words_lost = true;
}

bool WordsWereLost() { return g_words_lost; }

StatusLine::StatusLine() {
  const char* terminal = std::getenv("TERM");
  enabled_ = isatty(STDERR_FILENO) != 0 && terminal != nullptr && *terminal != '\0' && std::strcmp(terminal, "dumb") != 0;
}

// The last column stays free: some terminals go to the next line when it is written.
size_t StatusLine::width() const {
  winsize size{};
  const bool known = ioctl(STDERR_FILENO, TIOCGWINSZ, &size) == 0 && size.ws_col > 1;
  return known ? size.ws_col - size_t{1} : 79;
}

void StatusLine::Set(const std::string& text) {
  if (!enabled_) return;
  const std::string line = text.substr(0, width());
  const size_t behind = std::min(shown_, width()) - std::min({shown_, width(), line.size()});
  Say("\r{}{}{}", line, std::string(behind, ' '), std::string(behind, '\b'));
  shown_ = line.size();
}

void StatusLine::Clear() {
  if (shown_ == 0) return;
  Set("");
  Say("\r");
}

void ProgressBar::Show(double done) {
  if (done > 0) Expect(Elapsed() / done);
  const std::lock_guard lock(mutex_);
  done_ = done;
  at_done_ = Elapsed();
  Draw();
}

ProgressBar::Now ProgressBar::Estimate() const {
  if (expected_ <= 0) return {done_, 0};
  const double elapsed = Elapsed();
  const double total = done_ > 0 ? std::max(elapsed, at_done_ / done_) : std::max(elapsed, expected_);
  return {std::max(done_, std::min(0.99, elapsed / total)), total - elapsed};
}

void ProgressBar::Draw() {
  const Now now = Estimate();
  const int percent = static_cast<int>(now.done * 100);
  if (!line_.enabled() || (expected_ <= 0 && percent == shown_percent_)) return;
  shown_percent_ = percent;
  const std::string left = expected_ > 0 ? fmt::format("  {} left", HumanTime(now.seconds_left)) : "";
  const size_t around = label_.size() + std::strlen(" [] 100%") + left.size();
  const size_t width = std::min<size_t>(40, line_.width() - std::min(line_.width(), around));
  const size_t full = static_cast<size_t>(percent) * width / 100;
  const std::string bar = width < 8 ? "" : fmt::format(" [{}{}]", std::string(full, '#'), std::string(width - full, '.'));
  line_.Set(fmt::format("{}{} {:3}%{}", label_, bar, percent, left));
}

void ProgressBar::Expect(double seconds) {
  const bool is_long = long_seconds_ > 0 && seconds - Elapsed() > long_seconds_;
  if (is_long && expected_ == 0) Announce(seconds);
}

void ProgressBar::Announce(double seconds) {
  Clear();
  expected_ = seconds;
  Say("{}: about {}\n", label_, HumanTime(seconds));
  try {
    ticker_ = std::thread([this] { Tick(); });
  } catch (const std::system_error&) {  // no thread to be had: the bar moves when Show is called
  }
}

void ProgressBar::Tick() {
  std::unique_lock lock(mutex_);
  const std::chrono::seconds pause(line_.enabled() ? 1 : 60);
  while (!wake_.wait_for(lock, pause, [&] { return ending_; })) {
    if (line_.enabled()) {
      Draw();
    } else {
      const Now now = Estimate();
      Say("{}: {:.0f} %, about {} left\n", label_, now.done * 100, HumanTime(now.seconds_left));
    }
  }
}

void ProgressBar::Clear() {
  if (ticker_.joinable()) {
    {
      const std::lock_guard lock(mutex_);
      ending_ = true;
    }
    wake_.notify_all();
    ticker_.join();
    ending_ = false;
  }
  expected_ = done_ = 0;
  shown_percent_ = -1;
  line_.Clear();
}

}  // namespace lesskv
