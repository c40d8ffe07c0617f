// lesskv run: a prompt in, text out.
#include <fmt/format.h>
#include <unistd.h>

#include <filesystem>
#include <memory>
#include <optional>

#include "base/error.h"
#include "chat_turns.h"
#include "commands.h"
#include "common.h"
#include "engine/generate.h"
#include "base/memory.h"
#include "engine/resident_runs.h"
#include "engine/run_info.h"
#include "engine/session.h"
#include "prompt_bar.h"

namespace lesskv {
namespace {

struct RunOptions {
  ModelOptions model;
  std::string prompt, file;
  bool has_prompt = false, has_file = false;
  SamplingFlags sampling;
  std::string kv = "full";
  int64_t keep = 0;
  bool has_keep = false;
  std::vector<std::string> protect;
  bool chat = false;
  ChatOptions chat_options;
  std::string session;
  bool json = false, kv_stats = false;
};

void AddOptions(CLI::App& command, RunOptions& o) {
  AddModelOptions(command, o.model);
  AddModelLoading(command, o.model.loading);
  command.add_option("-p,--prompt", o.prompt, "Prompt")->option_text("TEXT");
  command.add_option("-f,--file", o.file, "File with the prompt, - for standard input; a byte order mark and a "
                                         "last newline are left out")
      ->option_text("FILE");
  AddCacheOption(command, o.kv);
  command.add_option("--keep", o.keep, "Protect the first N tokens of the prompt from eviction, -1: all (default: 0; "
                                       "with --chat the template's own tokens and the system prompt)")
      ->option_text("N");
  command.add_option("--protect", o.protect, "Protect tokens A up to, not including, B; may be repeated")
      ->option_text("A:B")->allow_extra_args(false);
  AddSamplingOptions(command, o.sampling, "Tokens to generate, -1: until the text or the context ends");
  CLI::Option* chat = command.add_flag("--chat", o.chat, "The prompt is a question, put in the model's chat template");
  AddChatOptions(command, o.chat_options);
  for (const char* name : {"--chat-template", "--system", "--special"}) command.get_option(name)->needs(chat);
  command.add_option("--session", o.session,
                     "Go on from the cache in this file if it exists, and save the cache in it at the end")
      ->option_text("FILE");
  command.add_flag("--json", o.json, "Print one JSON object instead of the text");
  command.add_flag("--kv-stats", o.kv_stats, "Also tell what each layer and KV head of the cache holds at the end");
}

// An empty prompt is a text's beginning, which only a model with a BOS token can continue.
std::vector<int32_t> PromptTokens(const Tokenizer& tokenizer, const std::string& text) {
  std::vector<int32_t> tokens = tokenizer.Encode(text, true, true);
  if (tokens.empty() && tokenizer.bos() >= 0) tokens.push_back(tokenizer.bos());
  if (tokens.empty())
    Fail(ErrorCode::kInvalidArgument, "the prompt is empty, and this model has no BOS token to begin a text with");
  return tokens;
}

// A later turn: the last turn's last token, which has not been fed yet, then the new text. An empty text goes on
// generating where the last turn stopped.
std::vector<int32_t> TurnTokens(const Tokenizer& tokenizer, const Session& session, const std::string& text) {
  std::vector<int32_t> tokens;
  if (session.pending_token) tokens.push_back(*session.pending_token);
  const bool at_start = tokenizer.IsAtStart(tokens.empty() ? session.sequence.tokens() : tokens);
  const std::vector<int32_t> added = tokenizer.Encode(text, false, true, at_start);
  tokens.insert(tokens.end(), added.begin(), added.end());
  if (tokens.empty()) Fail(ErrorCode::kInvalidArgument, "the prompt is empty, and the session holds no token to go on from");
  return tokens;
}

std::vector<int32_t> LaterTokens(const RunOptions& options, const OpenedModel& opened, const ChatTemplate* chat,
                                 const Session& session, const std::string& text) {
  if (chat == nullptr) return TurnTokens(*opened.tokenizer, session, text);
  return NextTurn(*opened.tokenizer, *chat, options.chat_options, session.sequence, session.pending_token, text);
}

// The sequence to run and the tokens to feed it: a fresh one, or that of the session file.
struct Start {
  Sequence sequence;
  std::vector<int32_t> tokens;
  bool goes_on = false;  // nothing but the session's own last token is fed
};

ProtectedSpan ParseSpan(const std::string& text, size_t n_prompt) {
  unsigned long begin = 0, end = 0;
  char rest = 0;
  const bool digits = !text.empty() && text.find_first_not_of("0123456789:") == std::string::npos && text.size() < 20;
  if (!digits || std::sscanf(text.c_str(), "%lu:%lu%c", &begin, &end, &rest) != 2 || begin >= end || end > n_prompt)
    Fail(ErrorCode::kInvalidArgument, "--protect: expected A:B with A < B and B at most the {} tokens of the prompt, found \"{}\"",
         n_prompt, text);
  return {static_cast<int32_t>(begin), static_cast<int32_t>(end)};
}

// `fixed`: what is protected when the user says nothing about the beginning.
std::vector<ProtectedSpan> ProtectedSpans(const RunOptions& options, size_t n_prompt,
                                          std::vector<ProtectedSpan> fixed) {
  std::vector<ProtectedSpan> spans;
  if (!options.has_keep) spans = std::move(fixed);
  for (const std::string& text : options.protect) spans.push_back(ParseSpan(text, n_prompt));
  if (options.keep < -1)
    Fail(ErrorCode::kInvalidArgument, "--keep: expected 0 or more tokens, or -1 for the whole prompt, found {}",
         options.keep);
  const size_t keep = options.keep == -1 ? n_prompt : std::min(n_prompt, static_cast<size_t>(options.keep));
  if (keep > 0) spans.push_back({0, static_cast<int32_t>(keep)});
  return spans;
}

// `chat`: null without --chat.
Start MakeStart(const RunOptions& options, const OpenedModel& opened, const ChatTemplate* chat, const CacheSpec& spec,
                const std::string& text) {
  const Engine& engine = *opened.engine;
  if (!options.session.empty()) CheckOutputPath("--session", options.session);  // written at the very end
  if (options.session.empty() || !std::filesystem::exists(options.session)) {
    ChatTurn turn = chat == nullptr ? ChatTurn{PromptTokens(*opened.tokenizer, text), {}}
                                    : FirstTurn(*opened.tokenizer, *chat, options.chat_options, text);
    auto spans = ProtectedSpans(options, turn.tokens.size(), std::move(turn.fixed));
    return {Sequence(engine.MakeCacheConfig(spec, opened.ctx, std::move(spans))), std::move(turn.tokens)};
  }
  if (options.keep != 0 || !options.protect.empty())
    Fail(ErrorCode::kInvalidArgument, "--keep and --protect are for a session's first turn; {} has its own protected tokens",
         options.session);
  if (options.chat_options.system)
    Fail(ErrorCode::kInvalidArgument, "--system is for a session's first turn; {} has begun already", options.session);
  Session session = LoadSession(options.session, engine, spec, opened.ctx);
  std::vector<int32_t> tokens = LaterTokens(options, opened, chat, session, text);
  const bool goes_on = chat == nullptr && text.empty() && session.pending_token.has_value();
  return {std::move(session.sequence), std::move(tokens), goes_on};
}

Json ResultJson(const Engine& engine, const Sequence& sequence, const GenerateResult& result, const RunOptions& options) {
  Json json;
  json["text"] = result.text;
  json["finish"] = FinishName(result.reason);
  json["prompt_tokens"] = result.prompt_tokens;
  json["generated_tokens"] = result.generated_tokens;
  json["prefill_seconds"] = result.prefill_seconds;
  json["decode_seconds"] = result.decode_seconds;
  json["prefill_tokens_per_second"] = result.PrefillTokensPerSecond();
  json["decode_tokens_per_second"] = result.DecodeTokensPerSecond();
  AddCacheStats(json, sequence.Stats(), sequence.config());
  if (options.kv_stats) AddHeadStats(json, sequence.cache());
  AddRunInfo(json, engine, sequence.config(), options.sampling.sampler.seed);
  return json;
}

void Report(const Sequence& sequence, const GenerateResult& result) {
  const CacheStats stats = sequence.Stats();
  if (result.reason == FinishReason::kContext) Say("stopped: the context is full\n");
  if (result.reason == FinishReason::kInterrupted) Say("stopped: interrupted\n");
  Say("prompt      {} tokens, {:.2f} s, {:.1f} tokens/s\n", result.prompt_tokens, result.prefill_seconds,
      result.PrefillTokensPerSecond());
  Say("generated   {} tokens, {:.2f} s, {:.1f} tokens/s\n", result.generated_tokens, result.decode_seconds,
      result.DecodeTokensPerSecond());
  Say("cache       {}: {} now, {} at most, {:.0f} of {} tokens; a full f16 cache: {}\n", sequence.config().spec_text(),
      HumanBytes(stats.kv_bytes), HumanBytes(stats.kv_bytes_peak), stats.tokens_resident, stats.tokens_seen,
      HumanBytes(stats.kv_bytes_full));
  if (const LocalLayers local = CountLocal(sequence.config().shape()); local.n_layers > 0)
    Say("local       {} layers keep a window of {} tokens; the spec and the tokens above are the other layers'\n",
        local.n_layers, local.window);
  const RecallStats& recall = stats.recall;
  if (recall.queries > 0)
    Say("recall      {:.0f} rows read a query\n", static_cast<double>(recall.rows_read) / static_cast<double>(recall.queries));
  if (recall.rows_offloaded > 0)
    Say("offloaded   {:.0f} of {} tokens, a file of {}; {:.1f} % of what was asked for was in memory, {} were read\n",
        stats.tokens_offloaded, stats.tokens_seen, HumanBytes(recall.file_bytes), HitRate(recall) * 100,
        HumanBytes(recall.bytes_read));
  if (const size_t bytes = sequence.config().sidecar_bytes()) Say("sidecar     {}\n", HumanBytes(bytes));
}

// A line a layer: the rows of its KV heads, and the share of them that lies in the last quarter of the text.
void ReportHeads(const SequenceCache& cache) {
  const ResidentRuns layers = ReadResidentRuns(cache);
  const auto recent = static_cast<int32_t>(cache.tokens_seen() - cache.tokens_seen() / 4);
  Say("layer       rows of each KV head (of them among the last quarter of the text)\n");
  for (size_t layer = 0; layer < layers.size(); ++layer) {
    std::string line;
    for (const std::vector<int32_t>& runs : layers[layer]) {
      size_t late = 0;
      for (size_t i = 0; i + 1 < runs.size(); i += 2)
        late += static_cast<size_t>(std::max(0, runs[i + 1] - std::max(runs[i], recent)));
      line += fmt::format("  {} ({})", CountRows(runs), late);
    }
    Say("{:<10}{}\n", layer, line);
  }
}

void Run(const RunOptions& options) {
  GenerateOptions generate{MakeGenerationOptions(options.sampling)};
  generate.sequence_goes_on = !options.session.empty();
  const CacheSpec spec = CacheSpec::Parse(options.kv);
  const std::string prompt =
      PromptText(options.has_prompt ? &options.prompt : nullptr, options.has_file ? &options.file : nullptr);

  OpenedModel opened = OpenModel(options.model);
  Engine& engine = *opened.engine;
  std::optional<ChatTemplate> chat;
  if (options.chat) chat = ChooseChatTemplate(opened, options.chat_options);
  if (chat && !chat->stop().empty()) generate.stops.emplace_back(chat->stop());
  Start start = MakeStart(options, opened, chat ? &*chat : nullptr, spec, prompt);
  Sequence& sequence = start.sequence;
  generate.prompt_was_generated = start.goes_on;

  generate.stop = &StopOnInterrupt();
  const double seconds = EstimatePrompt(engine, engine.MakeCacheConfig(spec, opened.ctx), sequence.tokens().size(),
                                        start.tokens.size(), generate.stop);
  PromptBar bar(start.tokens.size(), seconds);
  generate.on_prompt_progress = [&](double done) { bar.Show(done); };
  generate.on_text = [&](std::string_view text) {
    bar.Clear();
    if (options.json) return;
    WriteResult(text);
    FlushResults();
  };
  const GenerateResult result = Generate(engine, *opened.tokenizer, sequence, start.tokens, generate);
  bar.Clear();
  if (sequence.interrupted() || (result.reason == FinishReason::kInterrupted && result.generated_tokens == 0))
    Fail(ErrorCode::kRuntime, "interrupted while the prompt was being read");
  WriteResult(options.json ? Dump(ResultJson(engine, sequence, result, options)) + "\n" : "\n");
  FlushResults();
  if (!options.session.empty())  // after the text, which should not be lost where the session finds no room
    SaveSession(options.session, engine, sequence, result.pending_token);
  if (options.json) return;
  Report(sequence, result);
  if (options.kv_stats) ReportHeads(sequence.cache());
}

}  // namespace

void AddRunCommand(CLI::App& app) {
  CLI::App* command = app.add_subcommand("run", "Continue a prompt");
  auto options = std::make_shared<RunOptions>();
  AddOptions(*command, *options);
  command->callback([command, options] {
    options->has_prompt = command->count("--prompt") > 0;
    options->has_file = command->count("--file") > 0;
    options->has_keep = command->count("--keep") > 0;
    Run(*options);
  });
}

}  // namespace lesskv
