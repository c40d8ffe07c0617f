// lesskv eval: what a cache costs in quality, measured through the cache itself, with its bytes and speed beside it.
#include <CLI/CLI.hpp>
#include <algorithm>
#include <memory>
#include <sstream>
#include <string>
#include <vector>

#include "base/error.h"
#include "commands.h"
#include "common.h"
#include "eval/choices.h"
#include "eval/divergence.h"
#include "eval/heat_map.h"
#include "eval/match_bytes.h"
#include "eval/perplexity.h"
#include "eval/recall.h"
#include "eval/ruler.h"
#include "eval/report.h"
#include "eval/setup.h"
#include "eval/summarize.h"
#include "eval/text_windows.h"
#include "eval/window_batch.h"

namespace lesskv {
namespace {

// What every evaluation takes.
struct CommonOptions {
  ModelOptions model;
  std::vector<std::string> specs;
  std::string output = "table";
  uint64_t seed = 0;
  size_t batch = 16, keep = 0;
  bool match_bytes = false;
};

// For counts: a negative number would otherwise become a huge one.
CLI::Range AtLeast(int64_t low) { return CLI::Range(low, int64_t{1} << 30); }

constexpr size_t kStep = 8;

// `step`, `prompt`: 0 where not given. What the mode would not read is refused: it tells of a mode that was forgotten.
Protocol ReadProtocol(const std::string& mode, size_t step, size_t prompt) {
  const Protocol protocol{.mode = ParseMode(mode), .step = step == 0 ? kStep : step, .prompt = prompt};
  const bool stream = protocol.mode == Protocol::Mode::kStream;
  if (stream && prompt != 0) Fail(ErrorCode::kInvalidArgument, "--prompt is for --mode continue, the mode is stream");
  if (!stream && step != 0) Fail(ErrorCode::kInvalidArgument, "--step is for --mode stream, the mode is continue");
  return protocol;
}

void AddStep(CLI::App& command, size_t& step) {
  command.add_option("--step", step, "Tokens a step of --mode stream")->check(AtLeast(1))->option_text("N")
      ->default_str(std::to_string(kStep));
}

struct ProtocolOptions {
  std::string mode = "stream";
  size_t step = 0, prompt = 0;  // 0: not given
  std::string protocol = "lesskv";

  // For texts: `ctx` is the length of their windows.
  Protocol Parse(size_t ctx) const {
    if (protocol != "lesskv" && protocol != "llama")
      Fail(ErrorCode::kInvalidArgument, "--protocol: expected lesskv or llama, found '{}'", protocol);
    const bool llama = protocol == "llama";
    Protocol result = ReadProtocol(mode, step, prompt);
    result.llama_windows = llama;
    if (llama && result.mode == Protocol::Mode::kContinue && prompt == 0) result.prompt = ctx / 2;
    CheckProtocol(result, ctx);
    return result;
  }
};

void AddCommonOptions(CLI::App& command, CommonOptions& o) {
  AddModelOptions(command, o.model);
  AddModelLoading(command, o.model.loading);
  command.add_option("--kv", o.specs, "Cache spec, such as full or h2o(5%)+less; may be repeated (default: full)")
      ->option_text("SPEC")
      ->allow_extra_args(false);
  command.add_flag("--match-bytes", o.match_bytes, "Add to each cache its nearest rivals at equal bytes");
  command.add_option("-o,--output", o.output, "table, md, csv or json")->option_text("FORMAT")->capture_default_str();
  command.add_option("--keep", o.keep, "Protect the first N tokens of every text from eviction, in every cache alike")
      ->check(CLI::Range(0, 1 << 20))->option_text("N")
      ->capture_default_str();
  AddSeed(command, o.seed, "Seed of generated tasks and sampling");
}

void AddBatch(CLI::App& command, CommonOptions& o) {
  command
      .add_option("--batch", o.batch,
                  "Texts that go through the model together, at most; fewer when their caches "
                  "would take more than 1 GiB")
      ->option_text("N")
      ->check(CLI::Range(1, 1024))
      ->capture_default_str();
}

// An evaluation about to run: the model, what stops it and shows progress, and the setup that points to them.
struct Session {
  explicit Session(const CommonOptions& options, const char* label) : bar(label) {
    format = ParseOutputFormat(options.output);
    std::vector<CacheSpec> specs;
    for (const std::string& text : options.specs) specs.push_back(CacheSpec::Parse(text));
    if (specs.empty()) specs.emplace_back();
    opened = OpenModel(options.model);
    setup.engine = opened.engine.get();
    setup.tokenizer = opened.tokenizer.get();
    setup.ctx = opened.ctx;
    setup.seed = options.seed;
    setup.batch = options.batch;
    setup.keep = options.keep;
    for (const CacheSpec& spec : specs) setup.subjects.push_back({setup.MakeConfig(spec)});
    setup.stop = &StopOnInterrupt();
    setup.progress = [this](double done) { bar.Show(done); };
  }
  Session(const Session&) = delete;
  Session& operator=(const Session&) = delete;

  // A life of prompt and decoded tokens at whose end the bytes of rivals are matched.
  void AddRivalsIfAsked(const CommonOptions& options, size_t n_prompt) {
    if (options.match_bytes) AddRivals(setup, n_prompt, setup.ctx - n_prompt);
  }

  void Print(const Report& report) {
    bar.Clear();
    WriteResult(Format(report, format));
    FlushResults();
  }

  OutputFormat format;
  ProgressBar bar;
  OpenedModel opened;
  EvalSetup setup;
};

struct TextOptions {
  CommonOptions common;
  ProtocolOptions protocol;
  std::vector<std::string> texts;
  size_t max_windows = 0;
};

void AddTextOptions(CLI::App& command, TextOptions& o) {
  AddCommonOptions(command, o.common);
  AddBatch(command, o.common);
  command.add_option("--text", o.texts, "Text file; may be repeated")
      ->required()
      ->option_text("FILE")
      ->allow_extra_args(false);
  command.add_option("--max-windows", o.max_windows, "Windows of --ctx tokens, evenly spaced over the texts; 0: all")
      ->check(AtLeast(0))->option_text("N")
      ->capture_default_str();
  command
      .add_option("--mode", o.protocol.mode,
                  "stream: text is fed --step tokens at a time, evicting in between; "
                  "continue: --prompt tokens at once, then one token a step")
      ->option_text("MODE")
      ->capture_default_str();
  command
      .add_option("--protocol", o.protocol.protocol,
                  "lesskv: every token of each window is scored; llama: windows and scored halves of llama-perplexity")
      ->option_text("NAME")
      ->capture_default_str();
  AddStep(command, o.protocol.step);
  command.add_option("--prompt", o.protocol.prompt, "Tokens that --mode continue reads before scoring")
      ->check(AtLeast(1))->option_text("N");
}

void AddPerplexity(CLI::App& parent) {
  CLI::App* command = parent.add_subcommand("perplexity", "How well text is predicted, by token, word and byte");
  auto o = std::make_shared<TextOptions>();
  AddTextOptions(*command, *o);
  auto pair_distance = std::make_shared<size_t>(0);
  auto block = std::make_shared<size_t>(0);
  command
      ->add_option("--by-block", *block,
                   "Also report each block of N tokens of a window apart (json, csv): its perplexity and the time a token took; "
                   "tables show the first, the last and the worst")
      ->check(AtLeast(1))
      ->option_text("N");
  command
      ->add_option("--by-pair", *pair_distance,
                   "Also report apart the tokens that with the token before them are new to the window, that repeat a "
                   "pair of the last N tokens, and that repeat one only farther back")
      ->check(AtLeast(1))
      ->option_text("N");
  command->callback([o, pair_distance, block] {
    Session session(o->common, "perplexity");
    const Protocol protocol = o->protocol.Parse(session.setup.ctx);
    session.AddRivalsIfAsked(o->common, protocol.prompt);
    session.Print(EvaluatePerplexity(session.setup, {o->texts, o->max_windows, protocol, *pair_distance, *block}));
  });
}

void AddDivergence(CLI::App& parent) {
  CLI::App* command = parent.add_subcommand("divergence", "How far predictions are from the full cache's");
  auto o = std::make_shared<TextOptions>();
  AddTextOptions(*command, *o);
  command->callback([o] {
    Session session(o->common, "divergence");
    const Protocol protocol = o->protocol.Parse(session.setup.ctx);
    session.AddRivalsIfAsked(o->common, protocol.prompt);
    session.Print(EvaluateDivergence(session.setup, {o->texts, o->max_windows, protocol}));
  });
}

struct RecallFlags {
  CommonOptions common;
  std::vector<std::string> tasks = {"kv"};
  std::vector<size_t> lengths;
  std::vector<double> depths = {0, 0.25, 0.5, 0.75, 1};
  size_t samples = 20;
  std::string words, text, heat_map, mode = "continue", ask = "with";
  size_t step = 0;  // 0: not given
};

RecallOptions::Ask ParseAsk(const std::string& text) {
  if (text == "with") return RecallOptions::Ask::kWithPrompt;
  if (text == "after") return RecallOptions::Ask::kAfterPrompt;
  Fail(ErrorCode::kInvalidArgument, "--ask: expected with or after, found '{}'", text);
}

RecallOptions ReadRecallFlags(const RecallFlags& flags) {
  RecallOptions options;
  options.kinds.clear();
  for (const std::string& task : flags.tasks) options.kinds.push_back(ParseRecallKind(task));
  options.lengths = flags.lengths;
  options.depths = flags.depths;
  options.samples = flags.samples;
  options.protocol = ReadProtocol(flags.mode, flags.step, 0);
  options.ask = ParseAsk(flags.ask);
  if (!flags.text.empty()) options.text = ReadText(flags.text);
  if (!flags.words.empty()) {
    std::istringstream words(ReadText(flags.words));
    for (std::string word; words >> word;) options.words.push_back(word);
    if (options.words.size() < 2) {
      Fail(ErrorCode::kInvalidArgument, "{}: expected 2 words or more, found {}", flags.words, options.words.size());
    }
  }
  return options;
}

void AddRecall(CLI::App& parent) {
  CLI::App* command = parent.add_subcommand("recall", "Answers to questions about something far back in the prompt");
  auto o = std::make_shared<RecallFlags>();
  AddCommonOptions(*command, o->common);
  AddBatch(*command, o->common);
  AddList(*command, "--task", o->tasks, "kv, kv_words, needle or variable; several with commas")
      ->option_text("TASK,...");
  AddList(*command, "--length", o->lengths, "Prompt lengths in tokens, with commas (default: the context)", AtLeast(1))
      ->option_text("N,...");
  AddList(*command, "--depths", o->depths, "Where the answer stands, 0 (first) to 1 (last), with commas")
      ->option_text("X,...");
  command->add_option("--samples", o->samples, "Questions of each task, length and depth")
      ->check(AtLeast(1))->option_text("N")->capture_default_str();
  command->add_option("--words", o->words, "File with the words of keys and values (default: a built-in list)")
      ->option_text("FILE");
  command->add_option("--text", o->text, "Real text in which needle tasks hide their sentence")->option_text("FILE");
  command->add_option("--heatmap", o->heat_map, "Write accuracy by length and depth as a picture (.svg or .html)")
      ->option_text("FILE");
  command->add_option("--mode", o->mode, "How prompts are read: continue (at once) or stream (--step tokens at a time)")
      ->option_text("MODE")->capture_default_str();
  AddStep(*command, o->step);
  command->add_option("--ask", o->ask, "The question comes with the prompt, or after it was read and compressed")
      ->option_text("WHEN")->capture_default_str();
  command->callback([o] {
    const RecallOptions options = ReadRecallFlags(*o);
    if (!o->heat_map.empty()) {
      CheckHeatMapPath(o->heat_map);
      CheckOutputPath("--heatmap", o->heat_map);
    }
    Session session(o->common, "recall");
    session.AddRivalsIfAsked(o->common, session.setup.ctx - std::min(session.setup.ctx, RecallOptions::kAnswerRoom));
    const Report report = EvaluateRecall(session.setup, options);
    session.Print(report);  // first: the picture's file may turn out not to be writable
    if (!o->heat_map.empty()) WriteHeatMap(o->heat_map, report);
  });
}

void AddRuler(CLI::App& parent) {
  CLI::App* command = parent.add_subcommand("ruler", "Scores of the synthetic tasks of RULER (arXiv 2404.06654)");
  struct Flags {
    CommonOptions common;
    std::vector<std::string> tasks = {"all"};
    std::string text, questions, ask = "after";
    size_t length = 0, samples = 20;
  };
  auto o = std::make_shared<Flags>();
  AddCommonOptions(*command, o->common);
  AddBatch(*command, o->common);
  AddList(*command, "--task", o->tasks,
          "niah_single_1 to _3, niah_multikey_1 to _3, niah_multivalue, niah_multiquery, vt, cwe, fwe, qa_1, qa_2; "
          "several with commas; all: all of them, qa_1 and qa_2 where --qa holds such questions")
      ->option_text("TASK,...");
  command->add_option("--length", o->length, "Tokens of document and question (default: the context less 128)")
      ->check(AtLeast(1))->option_text("N");
  command->add_option("--samples", o->samples, "Documents of each task")->check(AtLeast(1))->option_text("N")->capture_default_str();
  command->add_option("--text", o->text, "Real text in which most niah tasks hide their needles")->option_text("FILE");
  command->add_option("--qa", o->questions, "JSON lines with question, answers and context: a text, for qa_1, or a list of texts, for qa_2")->option_text("FILE");
  command->add_option("--ask", o->ask, "The question comes with the document, or after it was read and compressed")
      ->option_text("WHEN")->capture_default_str();
  command->callback([o] {
    RulerOptions options{.length = o->length, .samples = o->samples, .ask = ParseAsk(o->ask)};
    if (!o->text.empty()) options.text = ReadText(o->text);
    if (!o->questions.empty()) options.questions = ParseRulerQuestions(ReadText(o->questions), o->questions);
    for (const std::string& task : o->tasks) {
      if (task != "all") {
        options.kinds.push_back(ParseRulerKind(task));
        continue;
      }
      for (const RulerKind kind : kRulerKinds) {
        const auto asks = [&](const RulerQuestion& question) { return question.kind() == kind; };
        if (kind < RulerKind::kQuestion1 || std::any_of(options.questions.begin(), options.questions.end(), asks))
          options.kinds.push_back(kind);
      }
    }
    Session session(o->common, "ruler");
    session.AddRivalsIfAsked(o->common, o->length != 0 ? o->length : session.setup.ctx - std::min(session.setup.ctx, RulerOptions::kAnswerRoom));
    session.Print(EvaluateRuler(session.setup, options));
  });
}

struct FileFlags {
  CommonOptions common;
  std::string file;
  size_t limit = 0;
};

void AddFileOptions(CLI::App& command, FileFlags& o, const char* what) {
  AddCommonOptions(command, o.common);
  command.add_option("--file", o.file, what)->required()->option_text("FILE");
  command.add_option("--limit", o.limit, "At most N of them, evenly spaced; 0: all")
      ->check(AtLeast(0))->option_text("N")->capture_default_str();
}

void AddChoices(CLI::App& parent) {
  CLI::App* command = parent.add_subcommand("choices", "Multiple choice by likelihood");
  struct Flags : FileFlags {
    size_t shots = 0;
    std::string question_template = "Question: {q}\nAnswer:";
  };
  auto o = std::make_shared<Flags>();
  AddFileOptions(*command, *o, "JSON lines with q, choices and label");
  command->add_option("--shots", o->shots, "First questions of the file that stand solved before each other one")
      ->check(AtLeast(0))->option_text("N")->capture_default_str();
  command->add_option("--template", o->question_template, "Prompt of a question, {q} standing for it")
      ->option_text("TEXT");
  command->callback([o] {
    if (o->question_template.find("{q}") == std::string::npos) {
      Fail(ErrorCode::kInvalidArgument, "--template: expected {{q}} in it, found '{}'", o->question_template);
    }
    const ChoicesOptions options{ParseChoices(ReadText(o->file), o->file, o->question_template), o->file, o->shots,
                                 o->limit};
    Session session(o->common, "choices");
    session.AddRivalsIfAsked(o->common, session.setup.ctx - 1);
    session.Print(EvaluateChoices(session.setup, options));
  });
}

void AddSummarize(CLI::App& parent) {
  CLI::App* command = parent.add_subcommand("summarize", "ROUGE of continuations, such as summaries of articles");
  struct Flags : FileFlags {
    SummarizeOptions options;
    std::string against = "reference";
  };
  auto o = std::make_shared<Flags>();
  AddFileOptions(*command, *o, "JSON lines with article (the whole prompt) and summary_gt");
  command->add_option("-n,--predict", o->options.max_tokens, "Tokens to generate")
      ->check(AtLeast(1))->option_text("N")->capture_default_str();
  command->add_option("--against", o->against, "reference: the file's summaries; full: what the full cache writes")
      ->option_text("WHAT")->capture_default_str();
  command->add_option("--temp", o->options.sampler.temperature, "Temperature; 0: always the likeliest token")
      ->option_text("T")->capture_default_str();
  command->add_option("--stop", o->options.stops, "Stop before this text; may be repeated (default: ###)")
      ->option_text("TEXT")->allow_extra_args(false);
  command->callback([o] {
    using Against = SummarizeOptions::Against;
    if (o->against != "reference" && o->against != "full") {
      Fail(ErrorCode::kInvalidArgument, "--against: expected reference or full, found '{}'", o->against);
    }
    o->options.against = o->against == "full" ? Against::kFull : Against::kReference;
    o->options.source = o->file;
    o->options.limit = o->limit;
    o->options.tasks = ParseSummaryTasks(ReadText(o->file), o->file);
    Validate(o->options.sampler);
    Session session(o->common, "summarize");
    session.AddRivalsIfAsked(o->common, session.setup.ctx - 1);
    session.Print(EvaluateSummaries(session.setup, o->options));
  });
}

}  // namespace

void AddEvalCommand(CLI::App& app) {
  CLI::App* command = app.add_subcommand("eval", "Measure what a cache costs in quality, with its bytes and speed");
  command->require_subcommand(1);
  AddPerplexity(*command);
  AddDivergence(*command);
  AddRecall(*command);
  AddRuler(*command);
  AddChoices(*command);
  AddSummarize(*command);
}

}  // namespace lesskv
