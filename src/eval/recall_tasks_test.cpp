#include "eval/recall_tasks.h"

#include <gtest/gtest.h>

#include <fstream>
#include <map>
#include <set>
#include <sstream>

#include "base/error.h"
#include "eval/test_model.h"

namespace lesskv {
namespace {

using testing_support::Bundled;

RecallTasks MakeTasks() {
  return RecallTasks(*Bundled().tokenizer, {EvalWords().begin(), EvalWords().end()},
                     ReadTextFile(testing_support::kSampleText));
}

std::vector<std::string> Lines(const std::string& text) {
  std::vector<std::string> lines;
  std::istringstream stream(text);
  for (std::string line; std::getline(stream, line);) lines.push_back(line);
  return lines;
}

// The answer as a reader would find it, without the generator's knowledge.
std::string SolveStatement(const std::string& prompt) {
  const std::string question = Lines(prompt).back();  // "The code of KEY is"
  std::string answer;
  size_t found = 0;
  for (const std::string& line : Lines(prompt.substr(0, prompt.size() - question.size()))) {
    if (!line.starts_with(question + " ")) continue;
    answer = line.substr(question.size(), line.size() - question.size() - 1);  // without the full stop
    ++found;
  }
  EXPECT_EQ(found, 1u) << prompt;
  return answer;
}

std::string SolveVariable(const std::string& prompt, size_t& copies) {
  std::map<std::string, std::string> values;
  std::map<std::string, size_t> depth;
  for (const std::string& line : Lines(prompt)) {
    const size_t equals = line.find(" = ");
    if (equals == std::string::npos) continue;
    const std::string name = line.substr(0, equals), right = line.substr(equals + 3);
    EXPECT_FALSE(values.contains(name)) << "assigned twice: " << name;
    const bool copy = values.contains(right);
    EXPECT_TRUE(copy || std::isdigit(static_cast<unsigned char>(right[0]))) << line;
    values[name] = copy ? values[right] : right;
    depth[name] = copy ? depth[right] + 1 : 0;
    EXPECT_LE(depth[name], 2u);
  }
  std::string name = Lines(prompt).back().substr(std::string("The value of ").size());
  name.resize(name.size() - 3);  // " is"
  copies = depth[name];
  return " " + values[name];
}

TEST(RecallTasksTest, TheWordsAreTheListThatTrainingAvoids) {
  std::ifstream file(LESSKV_SOURCE_DIR "/tools/reference_model/eval_words.txt");
  std::vector<std::string> words;
  for (std::string word; file >> word;) words.push_back(word);
  EXPECT_EQ(words.size(), 400u);
  EXPECT_TRUE(std::equal(words.begin(), words.end(), EvalWords().begin(), EvalWords().end()));
}

TEST(RecallTasksTest, AnswersCanBeFoundInThePrompt) {
  const RecallTasks tasks = MakeTasks();
  std::set<size_t> chains;
  for (uint64_t seed = 0; seed < 20; ++seed) {
    for (const RecallKind kind : {RecallKind::kKeyNumber, RecallKind::kKeyWord, RecallKind::kNeedle}) {
      const RecallSample sample = tasks.Make(kind, 200, 0.05 * static_cast<double>(seed), seed);
      EXPECT_EQ(SolveStatement(sample.prompt_text), sample.answer_text) << Name(kind);
    }
    const RecallSample sample = tasks.Make(RecallKind::kVariable, 200, 0.04 * static_cast<double>(seed), seed);
    size_t copies = 0;
    EXPECT_EQ(SolveVariable(sample.prompt_text, copies), sample.answer_text);
    chains.insert(copies);
  }
  EXPECT_EQ(chains, (std::set<size_t>{0, 1, 2}));
}

TEST(RecallTasksTest, PromptsFillTheirLength) {
  const RecallTasks tasks = MakeTasks();
  for (const RecallKind kind : kRecallKinds) {
    for (const size_t length : {64, 200, 777}) {
      for (uint64_t seed = 0; seed < 4; ++seed) {
        const RecallSample sample = tasks.Make(kind, length, 0.5, seed);
        EXPECT_LE(sample.prompt.size(), length) << Name(kind);
        EXPECT_GE(sample.prompt.size() + 20, length) << Name(kind);
        EXPECT_EQ(sample.prompt[0], Bundled().tokenizer->bos());
      }
    }
  }
}

// What is asked may have a few tokens more than what was allowed for before that was known.
TEST(RecallTasksTest, AQuestionOfALongerKeyFits) {
  const RecallTasks tasks(*Bundled().tokenizer, {"sea", "sky", "zqzqzq", "qzqzqz", "zqqzqz", "qzzqzq", "zzqqzz", "qqzzqq"}, "");
  for (const size_t length : {100, 103, 106, 109})
    for (uint64_t seed = 0; seed < 100; ++seed)
      EXPECT_LE(tasks.Make(RecallKind::kKeyNumber, length, 0.5, seed).prompt.size(), length);
}

TEST(RecallTasksTest, TokensAreThoseOfTheWholeText) {
  const RecallTasks tasks = MakeTasks();
  const Tokenizer& tokenizer = *Bundled().tokenizer;
  for (const RecallKind kind : kRecallKinds) {
    const RecallSample sample = tasks.Make(kind, 150, 0.3, 7);
    std::vector<int32_t> ids = sample.prompt;
    ids.insert(ids.end(), sample.answer.begin(), sample.answer.end());
    EXPECT_EQ(ids, tokenizer.Encode(sample.prompt_text + sample.answer_text, true, false)) << Name(kind);
    const std::string question = tokenizer.Decode(std::span(sample.prompt).subspan(sample.question));
    EXPECT_NE(question.find("of"), std::string::npos) << question;
    EXPECT_EQ(question.find(sample.answer_text), std::string::npos);
    EXPECT_LE(question.size(), 60u) << question;
  }
}

TEST(RecallTasksTest, DepthIsWhereTheAnswerStands) {
  const RecallTasks tasks = MakeTasks();
  for (const RecallKind kind : kRecallKinds) {
    EXPECT_EQ(tasks.Make(kind, 400, 0, 3).depth, 0) << Name(kind);
    for (const double depth : {0.25, 0.5, 0.75, 1.0}) {
      // A needle stands between paragraphs, so only near the wanted place.
      const double tolerance = kind == RecallKind::kNeedle ? 0.25 : 0.08;
      EXPECT_NEAR(tasks.Make(kind, 400, depth, 3).depth, depth, tolerance) << Name(kind);
    }
  }
}

TEST(RecallTasksTest, SeedsDecideEverything) {
  const RecallTasks tasks = MakeTasks();
  for (const RecallKind kind : kRecallKinds) {
    EXPECT_EQ(tasks.Make(kind, 200, 0.5, 1).prompt, tasks.Make(kind, 200, 0.5, 1).prompt);
    EXPECT_NE(tasks.Make(kind, 200, 0.5, 1).prompt, tasks.Make(kind, 200, 0.5, 2).prompt);
  }
}

TEST(RecallTasksTest, RefusesWhatCannotBeMade) {
  const RecallTasks tasks = MakeTasks();
  EXPECT_THROW(tasks.Make(RecallKind::kKeyNumber, 12, 0.5, 1), Error);
  const RecallTasks no_text(*Bundled().tokenizer, {"one", "two"}, "");
  EXPECT_THROW(no_text.Make(RecallKind::kNeedle, 200, 0.5, 1), Error);
  EXPECT_NO_THROW(no_text.Make(RecallKind::kKeyWord, 200, 0.5, 1));  // numbers are keys beyond the words
  EXPECT_THROW(RecallTasks(*Bundled().tokenizer, {"one"}, ""), Error);
  EXPECT_THROW(ParseRecallKind("sudoku"), Error);
}

}  // namespace
}  // namespace lesskv
