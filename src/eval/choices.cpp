#include "eval/choices.h"

#include <algorithm>
#include <cctype>
#include <cmath>

#include "base/check.h"
#include "base/error.h"
#include "eval/json_lines.h"
#include "eval/metrics.h"
#include "eval/stopwatch.h"
#include "eval/text_windows.h"
#include "format/json_reader.h"

namespace lesskv {
namespace {

std::string LowerFirst(std::string text) {
  if (!text.empty()) text[0] = static_cast<char>(std::tolower(static_cast<unsigned char>(text[0])));
  return text;
}

std::string Replaced(std::string_view text, std::string_view what, const std::string& by) {
  std::string out(text);
  const size_t at = out.find(what);
  return at == std::string::npos ? out : out.replace(at, what.size(), by);
}

// 1 and 1.0 are labels; numbers between, text and truth values are not.
size_t Label(const Json& label) {
  const double value = label.is_number() ? label.get<double>() : -1;
  if (value < 0 || value > 1e6 || value != std::floor(value))
    Fail(ErrorCode::kBadFile, "the label must be a whole number from 0, found {}", label.dump());
  return static_cast<size_t>(value);
}

ChoiceQuestion MakeQuestion(const Json& record, std::string_view question_template) {
  const std::string q = record.at("q");
  ChoiceQuestion question;
  question.label = Label(record.at("label"));
  const std::vector<std::string> choices = record.at("choices");
  std::string rest;
  if (record.contains("asks_for")) {
    const bool cause = record.at("asks_for").get<std::string>() == "cause";
    question.prompt = (q.ends_with('.') ? q.substr(0, q.size() - 1) : q) + (cause ? " because" : " so");
    for (const std::string& choice : choices) question.continuations.push_back(" " + LowerFirst(choice));
    return question;
  }
  const size_t blank = q.find('_');
  if (blank != std::string::npos && blank > 0 && q[blank - 1] == ' ' && q.find('_', blank + 1) == std::string::npos) {
    question.prompt = q.substr(0, blank - 1);
    rest = q.substr(blank + 1);
  } else {
    question.prompt = Replaced(question_template, "{q}", q);
  }
  for (const std::string& choice : choices) question.continuations.push_back(" " + choice + rest);
  return question;
}

// Token ids of a question whose prompt is followed by each continuation.
struct TokenizedQuestion {
  std::vector<int32_t> prompt;
  std::vector<std::vector<int32_t>> continuations;
  std::vector<size_t> bytes;
  size_t label = 0;

  size_t LongestTokens() const {
    size_t longest = 0;
    for (const auto& ids : continuations) longest = std::max(longest, ids.size());
    return prompt.size() + longest;
  }
};

// The ids of prompt + continuation are those of the whole text; where the tokenizer joins the two (as SentencePiece
// may) the shared prompt ends earlier for all choices.
TokenizedQuestion Tokenize(const Tokenizer& tokenizer, const std::string& before, const ChoiceQuestion& question) {
  TokenizedQuestion result;
  result.label = question.label;
  const std::string prompt = before + question.prompt;
  std::vector<std::vector<int32_t>> wholes;
  size_t shared = tokenizer.Encode(prompt, false, false).size();
  for (const std::string& continuation : question.continuations) {
    wholes.push_back(tokenizer.Encode(prompt + continuation, false, false));
    const auto& first = wholes.front();
    const auto& last = wholes.back();
    const auto differ = std::mismatch(first.begin(), first.end(), last.begin(), last.end());
    if (wholes.size() > 1) shared = std::min(shared, static_cast<size_t>(differ.first - first.begin()));
    shared = std::min(shared, last.size() - 1);
    result.bytes.push_back(continuation.size());
  }
  if (tokenizer.add_bos()) result.prompt.push_back(tokenizer.bos());
  const auto cut = static_cast<std::ptrdiff_t>(shared);
  result.prompt.insert(result.prompt.end(), wholes[0].begin(), wholes[0].begin() + cut);
  for (const auto& whole : wholes) result.continuations.emplace_back(whole.begin() + cut, whole.end());
  return result;
}

double LogProbability(std::span<const float> logits, int32_t token) {
  return logits[static_cast<size_t>(token)] - LogMass(logits);
}

// Adds the log-likelihoods of all but the first token of each of a question's continuations.
void ScoreChoices(const EvalSetup& setup, const Sequence& prompt, const TokenizedQuestion& question,
                  std::vector<double>& scores, FeedCost& cost, StatsTally& stats) {
  const auto& continuations = question.continuations;
  std::vector<Sequence> sequences;
  for (size_t c = 0; c < continuations.size(); ++c) sequences.push_back(prompt.Clone());
  const Stopwatch watch;
  for (size_t at = 0;; ++at) {
    std::vector<StepItem> items;
    for (size_t c = 0; c < continuations.size(); ++c) {
      if (at + 1 >= continuations[c].size()) continue;
      items.push_back({&sequences[c], {&continuations[c][at], 1}, LogitsRows::kLast, c});
    }
    if (items.empty()) break;
    setup.engine->Decode(items, [&](std::span<const LogitsRow> rows) {
      for (const LogitsRow& row : rows) {
        scores[row.tag] += LogProbability(row.logits, continuations[row.tag][at + 1]);
      }
    });
    cost.tokens += items.size();
  }
  cost.seconds += watch.Seconds();
  for (const Sequence& sequence : sequences) stats.Add(sequence.Stats());
}

size_t Best(std::span<const double> scores) {
  return static_cast<size_t>(std::max_element(scores.begin(), scores.end()) - scores.begin());
}

std::string SolvedShots(const ChoicesOptions& options) {
  std::string text;
  for (size_t i = 0; i < options.shots; ++i) {
    const ChoiceQuestion& shot = options.questions[i];
    text += shot.prompt + shot.continuations[shot.label] + "\n\n";
  }
  return text;
}

// Everything gathered about one subject.
struct ChoicesTally {
  ClusteredMean plain, normalised;
  FeedCost cost;
  StatsTally stats;
  size_t tokens_scored = 0;

  void Add(const TokenizedQuestion& question, std::vector<double> scores) {
    plain.AddOne(Best(scores) == question.label);
    for (size_t c = 0; c < scores.size(); ++c) scores[c] /= static_cast<double>(question.bytes[c]);
    normalised.AddOne(Best(scores) == question.label);
    for (const auto& ids : question.continuations) tokens_scored += ids.size();
  }

  void AddTo(Json& row) const {
    row["accuracy"] = plain.Mean();
    row["accuracy_se"] = plain.StandardError();
    row["accuracy_normalised"] = normalised.Mean();
    row["accuracy_normalised_se"] = normalised.StandardError();
    row["tokens_scored"] = tokens_scored;
  }
};

// Asks all subjects of a group.
void Ask(const EvalSetup& setup, std::span<const size_t> group, const TokenizedQuestion& question, std::span<ChoicesTally> tallies) {
  const auto& continuations = question.continuations;
  std::vector<std::vector<double>> scores(group.size(), std::vector<double>(continuations.size(), 0));
  std::vector<Sequence> prompts;
  std::vector<Sequence*> sequences;
  prompts.reserve(group.size());
  for (const size_t s : group) sequences.push_back(&prompts.emplace_back(setup.subjects[s].config));
  const Stopwatch watch;
  ReadPrompt(setup, sequences, question.prompt, [&](size_t i, std::span<const float> logits) {
    for (size_t c = 0; c < continuations.size(); ++c) scores[i][c] = LogProbability(logits, continuations[c][0]);
  });
  const FeedCost cost{question.prompt.size(), watch.Seconds(), group.size()};
  for (size_t i = 0; i < group.size(); ++i) {
    ChoicesTally& tally = tallies[group[i]];
    tally.cost += cost;
    ScoreChoices(setup, prompts[i], question, scores[i], tally.cost, tally.stats);
    tally.Add(question, scores[i]);
  }
}

// The questions that are asked and fit the context; the others are counted.
std::vector<TokenizedQuestion> ChooseQuestions(const EvalSetup& setup, const ChoicesOptions& options, size_t& skipped) {
  if (options.questions.size() <= options.shots) {
    Fail(ErrorCode::kInvalidArgument, "{}: {} questions leave none to ask behind {} shots", options.source,
         options.questions.size(), options.shots);
  }
  const std::string shots = SolvedShots(options);
  const size_t n_rest = options.questions.size() - options.shots;
  std::vector<TokenizedQuestion> questions;
  for (const size_t i : EvenlySpaced(n_rest, options.limit == 0 ? n_rest : options.limit)) {
    TokenizedQuestion question = Tokenize(*setup.tokenizer, shots, options.questions[options.shots + i]);
    if (question.LongestTokens() > setup.ctx || question.prompt.empty()) {
      ++skipped;
    } else {
      questions.push_back(std::move(question));
    }
  }
  if (questions.empty()) {
    Fail(ErrorCode::kInvalidArgument, "{}: no question fits a context of {} tokens", options.source, setup.ctx);
  }
  return questions;
}

std::vector<Column> ChoicesColumns() {
  std::vector<Column> columns = SubjectColumns();
  columns.push_back({"questions", "questions", Column::Style::kCount});
  columns.push_back({"accuracy", "right %", Column::Style::kPercent, 1, "accuracy_se"});
  columns.push_back({"accuracy_normalised", "per byte %", Column::Style::kPercent, 1, "accuracy_normalised_se"});
  AppendCacheColumns(columns);
  return columns;
}

}  // namespace

std::vector<ChoiceQuestion> ParseChoices(std::string_view json_lines, const std::string& name,
                                         std::string_view question_template) {
  std::vector<ChoiceQuestion> questions;
  const auto read = [&](std::string_view line, const std::string& where) {
    ChoiceQuestion question;
    try {
      question = MakeQuestion(ParseJson<Json>(line), question_template);
    } catch (const Error& error) {
      Fail(error.code(), "{}: {}", where, error.what());
    }
    if (question.continuations.size() < 2 || question.label >= question.continuations.size())
      Fail(ErrorCode::kBadFile, "{}: expected 2 choices or more and a label among them, found {} and {}", where,
           question.continuations.size(), question.label);
    questions.push_back(std::move(question));
  };
  ReadJsonLines(json_lines, name, "an object with q, choices and label", read);
  return questions;
}

Report EvaluateChoices(const EvalSetup& setup, const ChoicesOptions& options) {
  size_t skipped = 0, done = 0;
  const std::vector<TokenizedQuestion> questions = ChooseQuestions(setup, options, skipped);
  Report report;
  std::vector<ChoicesTally> tallies(setup.subjects.size());
  for (const std::vector<size_t>& group : setup.PromptGroups())
    for (const TokenizedQuestion& question : questions) {
      Ask(setup, group, question, tallies);
      setup.Progress(done += group.size(), questions.size() * setup.subjects.size());
      setup.CheckStop();
    }
  for (size_t s = 0; s < tallies.size(); ++s) {
    const Subject& subject = setup.subjects[s];
    const ChoicesTally& tally = tallies[s];
    Json row = BeginRow(setup, subject, "choices");
    AddProtocol(row, {.mode = Protocol::Mode::kContinue});
    row["prompt"] = nullptr;  // each question's own
    row["file"] = options.source;
    row["shots"] = options.shots;
    row["questions"] = questions.size();
    row["skipped"] = skipped;
    tally.AddTo(row);
    AddCacheStats(row, tally.stats.stats(), *subject.config);
    AddCost(row, tally.cost);
    report.rows.push_back(row);
  }
  report.columns = ChoicesColumns();
  if (skipped > 0) {
    report.notes.push_back(fmt::format("{} questions are longer than the context and were left out", skipped));
  }
  return report;
}

}  // namespace lesskv
