#include "eval/ruler_tasks.h"

#include <gtest/gtest.h>

#include <map>
#include <set>
#include <sstream>

#include "base/error.h"
#include "eval/ruler.h"
#include "eval/test_model.h"
#include "eval/text_windows.h"

namespace lesskv {
namespace {

using testing_support::Bundled;

std::vector<RulerQuestion> Questions() {
  std::vector<RulerQuestion> questions;
  for (int i = 0; i < 40; ++i)
    questions.push_back({fmt::format("Who rules land {}?", i), {fmt::format("Land {} is ruled by Queen Ada {} since long ago.", i, i)},
                         {fmt::format("Queen Ada {} ", i), "nobody at all"}});
  for (int i = 0; i < 20; ++i)
    questions.push_back({fmt::format("Where does the king of isle {} live?", i),
                         {fmt::format("King Bo {} is the king of isle {}.", i, i), fmt::format("King Bo {} lives in Hut {} by the sea.", i, i)},
                         {fmt::format("Hut {}", i)}});
  return questions;
}

RulerTasks Tasks() { return RulerTasks(*Bundled().tokenizer, ReadTextFile(testing_support::kSampleText), Questions()); }

// What a reader finds: for each key (what stands before " is: ") its values.
std::map<std::string, std::set<std::string>> ReadNeedles(const std::string& document) {
  std::map<std::string, std::set<std::string>> values;
  const std::string begin = "One of the special magic ", middle = "s for ", is = " is: ";
  for (size_t at = document.find(begin); at != std::string::npos; at = document.find(begin, at + 1)) {
    const size_t key = document.find(middle, at) + middle.size(), value = document.find(is, key);
    values[document.substr(key, value - key)].insert(document.substr(value + is.size(), document.find('.', value) - value - is.size()));
  }
  return values;
}

std::string Between(const std::string& text, const std::string& begin, const std::string& end) {
  const size_t at = text.find(begin) + begin.size();
  return text.substr(at, text.find(end, at) - at);
}

std::set<std::string> Asked(const std::string& question) {
  std::set<std::string> keys;
  std::istringstream list(Between(question, " for ", " in the text"));
  for (std::string word; list >> word;) {
    if (word.back() == ',') word.pop_back();
    if (word != "and") keys.insert(word);
  }
  return keys;
}

TEST(RulerTasksTest, AReaderFindsTheAnswersOfNeedleTasks) {
  struct Shape {
    RulerKind kind;
    size_t least_keys, most_keys, asked, answers;
  };
  constexpr size_t kMany = 1000;
  for (const Shape& shape : {Shape{RulerKind::kSingle1, 1, 1, 1, 1}, {RulerKind::kSingle2, 1, 1, 1, 1}, {RulerKind::kSingle3, 1, 1, 1, 1},
                             {RulerKind::kMultiKey1, 4, 4, 1, 1}, {RulerKind::kMultiKey2, 8, kMany, 1, 1}, {RulerKind::kMultiKey3, 3, kMany, 1, 1},
                             {RulerKind::kMultiValue, 1, 1, 1, 4}, {RulerKind::kMultiQuery, 4, 4, 4, 4}})
    for (uint64_t seed = 0; seed < 4; ++seed) {
      const RulerSample sample = Tasks().Make(shape.kind, 500, seed);
      const auto needles = ReadNeedles(sample.document);
      EXPECT_GE(needles.size(), shape.least_keys) << sample.document;
      EXPECT_LE(needles.size(), shape.most_keys) << sample.document;
      std::set<std::string> answers;
      const std::set<std::string> asked = Asked(sample.question);
      EXPECT_EQ(asked.size(), shape.asked);
      for (const std::string& key : asked) {
        ASSERT_TRUE(needles.contains(key)) << key << sample.document;
        answers.insert(needles.at(key).begin(), needles.at(key).end());
      }
      EXPECT_EQ(answers, std::set<std::string>(sample.answers.begin(), sample.answers.end()));
      EXPECT_EQ(sample.answers.size(), shape.answers);
      EXPECT_FALSE(sample.any);
      EXPECT_EQ(sample.answers[0].size(), shape.kind == RulerKind::kSingle3 || shape.kind == RulerKind::kMultiKey3 ? 36u : 7u);
    }
}

TEST(RulerTasksTest, AReaderFollowsTheChainOfVariables) {
  const RulerSample sample = Tasks().Make(RulerKind::kVariables, 600, 3);
  std::map<std::string, std::string> values;
  std::istringstream lines(sample.document);
  for (std::string word, name, equals, right; lines >> word;) {
    if (word != "VAR") continue;
    lines >> name >> equals >> right;
    if (right == "VAR") {
      lines >> right;
      ASSERT_TRUE(values.contains(right)) << "copied before it was assigned: " << right;
      right = values[right];
    }
    values[name] = right;
  }
  const std::string value = Between(sample.question, "have the value ", " in the text");
  std::set<std::string> names;
  for (const auto& [name, own] : values)
    if (own == value) names.insert(name);
  EXPECT_EQ(names.size(), 5u);
  EXPECT_EQ(names, std::set<std::string>(sample.answers.begin(), sample.answers.end()));
}

std::map<std::string, size_t> CountWords(const std::string& text) {
  std::map<std::string, size_t> times;
  std::istringstream words(text.substr(text.find('\n')));
  for (std::string word; words >> word;) ++times[word];
  return times;
}

TEST(RulerTasksTest, TheAskedWordsAreTheMostFrequentOnes) {
  struct Case {
    RulerKind kind;
    size_t length, common, rare;  // times, where they are fixed
  };
  for (const Case& c : {Case{RulerKind::kCommon, 900, 6, 1}, {RulerKind::kCommon, 4096, 30, 3}, {RulerKind::kFrequent, 900, 0, 0}}) {
    const RulerSample sample = Tasks().Make(c.kind, c.length, 5);
    const std::set<std::string> answers(sample.answers.begin(), sample.answers.end());
    EXPECT_EQ(answers.size(), c.kind == RulerKind::kCommon ? 10u : 3u);
    size_t least = SIZE_MAX, most_other = 0, found = 0;
    for (const auto& [word, times] : CountWords(sample.document)) {
      if (word == "..." || word.ends_with('.')) continue;  // the noise; a list's numbers
      found += answers.contains(word);
      if (answers.contains(word)) least = std::min(least, times);
      else most_other = std::max(most_other, times);
      if (c.common == 0) continue;
      EXPECT_EQ(times, answers.contains(word) ? c.common : c.rare) << word;
    }
    EXPECT_EQ(found, answers.size()) << "every asked word stands in the text";
    EXPECT_GT(least, most_other);
    EXPECT_GT(most_other, 0u);
  }
}

TEST(RulerTasksTest, AQuestionHasItsOwnParagraphAmongOthers) {
  const RulerSample sample = Tasks().Make(RulerKind::kQuestion1, 300, 1);
  const std::string land = Between(sample.question, "Who rules land ", "?");
  EXPECT_NE(sample.document.find(fmt::format("Land {} is ruled by", land)), std::string::npos);
  EXPECT_NE(sample.document.find("Document 3:"), std::string::npos);
  EXPECT_EQ(RulerScore(sample, fmt::format("It is queen ada {} of old", land)), 1);  // either answer is enough
  EXPECT_EQ(RulerScore(sample, "It is Queen Eve"), 0);
}

// Of a question that takes two paragraphs both are there, once each, not always side by side.
TEST(RulerTasksTest, AQuestionOfSeveralParagraphsHasAllOfThem) {
  size_t apart = 0;
  for (uint64_t seed = 0; seed < 12; ++seed) {
    const RulerSample sample = Tasks().Make(RulerKind::kQuestion2, 300, seed);
    const std::string isle = Between(sample.question, "king of isle ", " live?");
    const std::string first = fmt::format("King Bo {} is the king of isle {}.", isle, isle),
                      second = fmt::format("King Bo {} lives in Hut {} by the sea.", isle, isle);
    const size_t a = sample.document.find(first), b = sample.document.find(second);
    ASSERT_NE(a, std::string::npos);
    ASSERT_NE(b, std::string::npos);
    EXPECT_EQ(sample.document.find(first, a + 1), std::string::npos);
    EXPECT_EQ(sample.document.find(second, b + 1), std::string::npos);
    apart += (a < b ? b - a - first.size() : a - b - second.size()) > 40;
    EXPECT_EQ(RulerScore(sample, fmt::format("in Hut {}, they say", isle)), 1);
  }
  EXPECT_GT(apart, 3u);
}

TEST(RulerTasksTest, FilesHoldQuestionsOfBothKinds) {
  const auto questions = ParseRulerQuestions(R"({"question": "a?", "context": "b", "answers": ["c"]}
{"question": "d?", "context": ["e", "f"], "answers": ["g", "h"]}
{"question": "i?", "context": ["j"], "answers": ["k"]})", "file");
  ASSERT_EQ(questions.size(), 3u);
  EXPECT_EQ(questions[0].kind(), RulerKind::kQuestion1);
  EXPECT_EQ(questions[1].kind(), RulerKind::kQuestion2);
  EXPECT_EQ(questions[1].contexts, (std::vector<std::string>{"e", "f"}));
  EXPECT_EQ(questions[2].kind(), RulerKind::kQuestion1);
  EXPECT_EQ(std::size(kRulerKinds), 13u);
}

// Every kind: as long as asked for, less than the next unit of its own; the same for the same seed, another for another.
TEST(RulerTasksTest, DocumentsFillTheirLength) {
  for (const RulerKind kind : kRulerKinds) {
    const size_t length = 700;
    const RulerSample sample = Tasks().Make(kind, length, 9);
    const size_t tokens = sample.document_ids.size() + sample.question_ids.size();
    EXPECT_LE(tokens, length) << Name(kind);
    EXPECT_GE(tokens, length - 120) << Name(kind);
    EXPECT_EQ(sample.document_ids[0], Bundled().tokenizer->bos());
    EXPECT_EQ(Tasks().Make(kind, length, 9).document, sample.document);
    EXPECT_NE(Tasks().Make(kind, length, 10).document, sample.document);
    EXPECT_EQ(ParseRulerKind(std::string(Name(kind))), kind);
  }
}

TEST(RulerTasksTest, ScoresAreTheShareOfAnswersNamed) {
  RulerSample all;
  all.answers = {"12", "Ab", "77", "5"};
  EXPECT_EQ(RulerScore(all, "aB and 12"), 0.5);
  EXPECT_EQ(RulerScore(all, ""), 0);
}

TEST(RulerTasksTest, RefusesWhatCannotBeMade) {
  const RulerTasks bare(*Bundled().tokenizer, "", {});
  EXPECT_THROW(bare.Make(RulerKind::kSingle2, 500, 1), Error);
  EXPECT_THROW(bare.Make(RulerKind::kQuestion1, 500, 1), Error);
  EXPECT_THROW(RulerTasks(*Bundled().tokenizer, "", {{"q", {"one"}, {"a"}}}).Make(RulerKind::kQuestion2, 500, 1), Error);
  for (const RulerKind kind : kRulerKinds) EXPECT_THROW(Tasks().Make(kind, 30, 1), Error) << Name(kind);
  EXPECT_THROW(ParseRulerKind("niah"), Error);
  for (const char* bad : {"", "{}", "{\"question\":\"a\",\"context\":\"b\",\"answers\":[]}", "[1", "{\"question\":1,\"context\":\"b\",\"answers\":[\"a\"]}",
                          "{\"question\":\"a\",\"context\":\"b\",\"answers\":[\"\"]}",
                          "{\"question\":\"a\",\"context\":[],\"answers\":[\"a\"]}", "{\"question\":\"a\",\"context\":[2],\"answers\":[\"a\"]}"})
    EXPECT_THROW(ParseRulerQuestions(bad, "f"), Error) << bad;
}

Report Evaluate(const std::vector<std::string>& specs, RulerOptions options) {
  options.length = 330;
  return EvaluateRuler(Bundled().Setup(specs, 470), options);
}

// The bundled model answers few of these, but a cache that keeps every row answers as the full one does, whoever asks when.
TEST(RulerTest, AFullCacheOfAnotherNameScoresTheSame) {
  for (const auto ask : {RecallOptions::Ask::kWithPrompt, RecallOptions::Ask::kAfterPrompt}) {
    const Report report = Evaluate({"full", "h2o(470)", "window(12)"}, {.kinds = {RulerKind::kFrequent, RulerKind::kVariables}, .samples = 2, .ask = ask});
    for (const char* key : {"score_fwe", "score_vt"}) {
      const double full = report.rows[0].at(key).get<double>();
      EXPECT_EQ(report.rows[1].at(key).get<double>(), full);
      EXPECT_LE(report.rows[2].at(key).get<double>(), 1);
    }
    EXPECT_EQ(report.rows[2].at("tokens_resident"), 12);
  }
}

TEST(RulerTest, TasksThatTheFullCacheFailsAreNotAveraged) {
  const Report report = Evaluate({"full", "window(12)"}, {.kinds = {RulerKind::kFrequent, RulerKind::kVariables}, .samples = 2});
  const Json& full = report.rows[0];
  size_t passed = 0;
  for (const char* task : {"fwe", "vt"}) passed += full.at(fmt::format("score_{}", task)).get<double>() >= 0.5;
  for (const Json& row : report.rows) EXPECT_EQ(row.at("tasks_averaged").size(), passed);
  // Without a full cache beside it nothing is left out.
  EXPECT_EQ(Evaluate({"window(12)"}, {.kinds = {RulerKind::kFrequent, RulerKind::kVariables}, .samples = 2}).rows[0].at("tasks_averaged").size(), 2u);
}

// Tasks that differ add nothing to the error of their average: of two, one right half the time and one never, it is half of the
// first one's error.
TEST(RulerTest, TheAverageErrsByWhatItsTasksErr) {
  RulerOptions options{.kinds = {RulerKind::kQuestion1, RulerKind::kQuestion2}, .samples = 8, .questions = Questions()};
  for (size_t i = 0; i < options.questions.size(); ++i)
    options.questions[i].answers = {i < 40 && i % 2 == 0 ? " " : "what no text has"};
  const Json row = Evaluate({"window(12)"}, options).rows[0];
  const double error = row.at("score_qa_1_se").get<double>();
  EXPECT_GT(error, 0);
  EXPECT_EQ(row.at("score_qa_2"), 0);
  EXPECT_DOUBLE_EQ(row.at("average").get<double>(), row.at("score_qa_1").get<double>() / 2);
  EXPECT_DOUBLE_EQ(row.at("average_se").get<double>(), error / 2);
}

TEST(RulerTest, RefusesALengthThatLeavesNoRoomForAnswers) {
  EXPECT_THROW(EvaluateRuler(Bundled().Setup({"full"}, 300), {.kinds = {RulerKind::kSingle1}, .length = 200}), Error);
  EXPECT_THROW(EvaluateRuler(Bundled().Setup({"full"}, 300), {}), Error);
}

}  // namespace
}  // namespace lesskv
