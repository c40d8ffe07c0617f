// lesskv chat: a conversation, on a terminal or over a pipe.
#include <fmt/format.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>

#include "base/error.h"
#include "base/memory.h"
#include "commands.h"
#include "conversation.h"
#include "line_reader.h"
#include "prompt_bar.h"

namespace lesskv {
namespace {

constexpr std::string_view kHelp =
    "/stats      rows and bytes of the cache, what left it, against the full cache\n"
    "/kv SPEC    go on with another cache: the conversation is read into it anew\n"
    "/save FILE  write the conversation's cache to a session file\n"
    "/load FILE  go on from a session file of the same model, cache spec and context length\n"
    "/clear      begin anew\n"
    "/help       this list\n"
    "/exit       end; so does the end of the input (Ctrl-D)\n"
    "A line that ends in \\ goes on in the next one. A question that begins with / is written with two.\n"
    "Ctrl-C stops an answer; while a line is typed it empties it.\n";

struct ChatCommandOptions {
  ModelOptions model;
  ConversationOptions conversation;
  SamplingFlags sampling;
  int64_t keep = 0;
  bool has_keep = false;
};

void AddOptions(CLI::App& command, ChatCommandOptions& o) {
  AddModelOptions(command, o.model);
  AddModelLoading(command, o.model.loading);
  AddCacheOption(command, o.conversation.kv);
  AddChatOptions(command, o.conversation.chat);
  command
      .add_option("--keep", o.keep,
                  "Protect the first N tokens from eviction, -1: the whole first turn (default: "
                  "the chat template's own tokens and the system prompt)")
      ->option_text("N");
  AddSamplingOptions(command, o.sampling, "Tokens an answer has at most, -1: until it or the context ends");
}

std::string Percent(size_t part, size_t whole) {
  return whole == 0 ? "-" : fmt::format("{:.1f} %", 100.0 * static_cast<double>(part) / static_cast<double>(whole));
}

std::string StatsText(const Conversation& conversation) {
  if (conversation.empty()) return fmt::format("cache    {}: empty\n", conversation.spec().ToString());
  const Sequence& sequence = conversation.sequence();
  const CacheStats stats = sequence.Stats();
  std::string text = fmt::format("cache    {}\n", sequence.config().spec_text());
  text += fmt::format("context  {} of {} tokens\n", stats.tokens_seen, sequence.config().shape().ctx);
  text +=
      fmt::format("rows     {:.1f} a KV head stay, {:.1f} have left, {} are protected\n", stats.tokens_resident,
                  static_cast<double>(stats.tokens_seen) - stats.tokens_resident, sequence.config().protect().size());
  text += fmt::format("bytes    {} now, {} at most; a full f16 cache: {} (now {} of it)\n", HumanBytes(stats.kv_bytes),
                      HumanBytes(stats.kv_bytes_peak), HumanBytes(stats.kv_bytes_full),
                      Percent(stats.kv_bytes, stats.kv_bytes_full));
  if (const size_t bytes = sequence.config().sidecar_bytes()) text += fmt::format("sidecar  {}\n", HumanBytes(bytes));
  return text;
}

class Chat {
 public:
  Chat(const OpenedModel& opened, const ConversationOptions& options)
      : ctx_(opened.ctx), stop_(StopOnInterrupt()), conversation_(opened, options) {}

  // Until the input ends. On a terminal what cannot be done is told and the conversation goes on; on a pipe it ends the
  // program, as nobody is there to answer.
  void Run() {
    if (lines_.on_terminal()) Say("/help lists what can be done beside asking.\n");
    for (bool more = true; more;) {
      const std::optional<std::string> line = ReadLine();
      if (!line) {
        if (lines_.on_terminal()) Say("\n");  // the cursor stands behind the prompt
        break;
      }
      try {
        more = Handle(*line);
      } catch (const Error& error) {
        if (!lines_.on_terminal()) throw;
        Say("{}\n", error.what());
      }
    }
  }

 private:
  std::optional<std::string> ReadLine() {
    std::optional<std::string> line = lines_.Read("> ");
    while (line && line->ends_with('\\')) {
      line->back() = '\n';
      const std::optional<std::string> more = lines_.Read("  ");
      if (!more) break;
      *line += *more;
    }
    return line;
  }

  // False to end.
  bool Handle(const std::string& line) {
    if (line.find_first_not_of(" \t\r\n") == std::string::npos) return true;
    if (line[0] == '/' && !line.starts_with("//")) return Command(line);
    Ask(line.starts_with("//") ? line.substr(1) : line);
    return true;
  }

  bool Command(const std::string& line) {
    const size_t space = std::min(line.find(' '), line.size());
    const std::string name = line.substr(0, space);
    const size_t begin = std::min(line.find_first_not_of(' ', space), line.size());
    const std::string argument = line.substr(begin, line.find_last_not_of(' ') + 1 - begin);
    if (name == "/exit" || name == "/quit") return false;
    if (name == "/help")
      Print(kHelp);
    else if (name == "/stats")
      Print(StatsText(conversation_));
    else if (name == "/clear")
      conversation_.Clear();
    else if (name == "/save")
      Save(Required(name, argument, "a file"));
    else if (name == "/load")
      Load(Required(name, argument, "a file"));
    else if (name == "/kv")
      ChangeCache(Required(name, argument, "a cache spec"));
    else
      Fail(ErrorCode::kInvalidArgument, "there is no command \"{}\"; /help lists what there is", name);
    return true;
  }

  static const std::string& Required(const std::string& command, const std::string& argument, const char* what) {
    if (argument.empty()) Fail(ErrorCode::kInvalidArgument, "{} needs {}", command, what);
    return argument;
  }

  void Save(const std::string& path) {
    conversation_.Save(path);
    Say("saved: {}, {} tokens\n", path, conversation_.sequence().tokens().size());
  }

  void Load(const std::string& path) {
    conversation_.Load(path);
    Say("loaded: {}, {} tokens\n", path, conversation_.sequence().tokens().size());
  }

  void ChangeCache(const std::string& spec) {
    conversation_.ChangeCache(spec);
    const size_t n = conversation_.empty() ? 0 : conversation_.sequence().tokens().size();
    Say("cache: {}, {} tokens read\n", conversation_.spec().ToString(), n);
  }

  void Ask(const std::string& question) {
    std::optional<PromptBar> bar;
    GenerateOptions hooks;
    ForgetInterrupt();
    hooks.stop = &stop_;
    hooks.on_prompt_progress = [&](double done) { bar->Show(done); };
    hooks.on_text = [&](std::string_view text) {
      bar->Clear();
      Print(text);
    };
    const GenerateResult result = conversation_.Ask(
        question, hooks, [&](size_t n_tokens, double seconds) { bar.emplace(n_tokens, seconds); });
    bar.reset();
    Print("\n");
    Tell(result);
  }

  void Tell(const GenerateResult& result) const {
    if (result.reason == FinishReason::kContext)
      Say("the context of {} tokens is full: /clear begins anew, --ctx N gives more room\n", ctx_);
    if (result.reason != FinishReason::kInterrupted) return;
    Say("{}\n", result.generated_tokens > 0 ? "stopped" : "stopped: the question was not read");
  }

  static void Print(std::string_view text) {
    WriteResult(text);
    FlushResults();
  }

  size_t ctx_;
  const std::atomic<bool>& stop_;
  Conversation conversation_;
  LineReader lines_;
};

std::optional<size_t> Keep(const ChatCommandOptions& options) {
  if (!options.has_keep) return std::nullopt;
  if (options.keep < -1)
    Fail(ErrorCode::kInvalidArgument, "--keep: expected 0 or more tokens, or -1 for the whole first turn, found {}",
         options.keep);
  return options.keep == -1 ? SIZE_MAX : static_cast<size_t>(options.keep);
}

void Run(ChatCommandOptions& options) {
  if (options.sampling.max_tokens == 0)
    Fail(ErrorCode::kInvalidArgument, "-n: expected 1 or more tokens an answer, or -1 for no limit, found 0");
  options.conversation.keep = Keep(options);
  options.conversation.generation = MakeGenerationOptions(options.sampling);
  const OpenedModel opened = OpenModel(options.model);
  Chat(opened, options.conversation).Run();
}

}  // namespace

void AddChatCommand(CLI::App& app) {
  CLI::App* command = app.add_subcommand("chat", "Talk with a model");
  auto options = std::make_shared<ChatCommandOptions>();
  AddOptions(*command, *options);
  command->callback([command, options] {
    options->has_keep = command->count("--keep") > 0;
    Run(*options);
  });
}

}  // namespace lesskv
