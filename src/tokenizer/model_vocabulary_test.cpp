// The vocabularies of models that people have, on texts that make tokenizers differ: SmolLM2 (smollm2.gguf) and
// Qwen 2.5 (qwen.gguf), byte-level BPE, and Gemma 3 (gemma3.gguf), SentencePiece with 262,144 tokens. The files lie in
// LESSKV_MODELS or models/cache; what is expected comes from the package `tokenizers`
// (tools/golden/make_tokenizer_vectors.py --models).
#include <fmt/format.h>
#include <gtest/gtest.h>

#include <map>
#include <memory>
#include <set>

#include "format/gguf.h"
#include "tokenizer/test_data.h"
#include "tokenizer/tokenizer.h"

namespace lesskv {
namespace {

using Ids = std::vector<int32_t>;

const nlohmann::json& ModelVectors() {
  static const auto vectors = ReadJson(std::filesystem::path(LESSKV_SOURCE_DIR) / "tests/data/tokenizers/models.json");
  return vectors;
}

std::string Fnv1a(const Ids& ids) {
  uint64_t value = 0xCBF29CE484222325;
  for (const int32_t id : ids) value = (value ^ static_cast<uint32_t>(id)) * 0x100000001B3;
  return fmt::format("{:016x}", value);
}

class ModelVocabulary : public testing::TestWithParam<const char*> {
 protected:
  void SetUp() override {
    const auto path = ModelFile(GetParam());
    if (!std::filesystem::exists(path)) GTEST_SKIP() << path << " is not there";
    tokenizer_ = Tokenizer::Create(LoadVocabulary(GgufFile::Open(path.string())));
  }

  // Byte-level vocabularies turn damaged bytes into U+FFFD, SentencePiece keeps them.
  bool KeepsBytes() const { return tokenizer_->Describe().starts_with("SentencePiece"); }

  std::unique_ptr<const Tokenizer> tokenizer_;
};

// Gemma's GGUF files write the tokens of runs of spaces with spaces, as text has them; in the original a literal U+2581
// makes them, too, which such a file cannot say (llama.cpp reads it as we do).
TEST_P(ModelVocabulary, MatchesTokenizers) {
  const auto& vectors = ModelVectors().at("texts");
  const auto& expected = ModelVectors().at(GetParam()).at("ids");
  for (size_t i = 0; i < vectors.size(); ++i) {
    const std::string text = vectors[i];
    if (KeepsBytes() && text.find("\u2581") != std::string::npos) continue;
    EXPECT_EQ(tokenizer_->Encode(text, false, true), expected[i].get<Ids>()) << testing::PrintToString(text);
  }
}

// Not: a literal U+2581, which SentencePiece reads as a space, and control characters, some of which SmolLM2 lacks.
TEST_P(ModelVocabulary, DecodingUndoesEncoding) {
  for (const std::string text : ModelVectors().at("texts")) {
    if (text.find("\u2581") != std::string::npos || text.find('\x01') != std::string::npos) continue;
    EXPECT_EQ(tokenizer_->Decode(tokenizer_->Encode(text, false, true), /*skip_special=*/false), text);
  }
}

TEST_P(ModelVocabulary, ALongTextWithoutSpacesIsFine) {
  std::string letters;
  for (size_t i = 0; i < 100000; ++i) letters += static_cast<char>('a' + (i * i * 7 + i / 3) % 26);
  for (const auto& [name, text] : {std::pair{"letters", letters}, std::pair{"same", std::string(100000, 'a')}}) {
    const Ids ids = tokenizer_->Encode(text, false, true);
    const auto& expected = ModelVectors().at(GetParam()).at(name);
    EXPECT_EQ(ids.size(), expected.at("count").get<size_t>()) << name;
    EXPECT_EQ(Fnv1a(ids), expected.at("fnv1a").get<std::string>()) << name;
  }
}

TEST_P(ModelVocabulary, DamagedUtf8) {
  Rng rng(9);
  for (int i = 0; i < 300; ++i) {
    const std::string bytes = RandomBytes(rng, 40) + " caf\xC3 \xF0\x9F\x98";
    const Ids ids = tokenizer_->Encode(bytes, false, true);
    if (KeepsBytes()) {
      ASSERT_EQ(tokenizer_->Decode(ids), bytes);
    } else {
      ASSERT_EQ(ids, tokenizer_->Encode(ReplaceInvalidUtf8(bytes), false, true));
    }
  }
}

TEST_P(ModelVocabulary, KnowsItsEnds) {
  const std::map<std::string, std::set<int32_t>> ends = {
      {"smollm2.gguf", {0, 2, 4}},                                      // <|endoftext|>, <|im_end|>, <reponame>
      {"qwen.gguf", {128247, 151643, 151645, 151662, 151663, 151664}},  // </s>, the same, <|fim_pad|>, what parts files
      {"gemma3.gguf", {1, 106, 212}}};                                  // <eos>, <end_of_turn>, </s>
  std::set<int32_t> found;
  for (int32_t id = 0; static_cast<size_t>(id) < tokenizer_->size(); ++id)
    if (tokenizer_->IsEndOfGeneration(id)) found.insert(id);
  EXPECT_EQ(found, ends.at(GetParam()));
}

INSTANTIATE_TEST_SUITE_P(All, ModelVocabulary, testing::Values("smollm2.gguf", "qwen.gguf", "gemma3.gguf"),
                         [](const auto& test) {
                           const std::string file = test.param;
                           return file.substr(0, file.find('.'));
                         });

}  // namespace
}  // namespace lesskv
