// What several tokenizer tests need: the committed vectors of tests/data/tokenizers, and shared data where it lies.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <vector>

#include "base/error.h"
#include "base/rng.h"
#include "tokenizer/utf8.h"
#include "tokenizer/vocabulary.h"

namespace lesskv {

inline nlohmann::json ReadJson(const std::filesystem::path& path) {
  std::ifstream file(path);
  return nlohmann::json::parse(file);  // throws, and so fails the test, when the file is not there
}

inline const nlohmann::json& BpeVectors() {
  static const auto vectors =
      ReadJson(std::filesystem::path(LESSKV_SOURCE_DIR) / "tests/data/tokenizers/byte_bpe.json");
  return vectors;
}

inline const nlohmann::json& SentencePieceVectors() {
  static const auto vectors =
      ReadJson(std::filesystem::path(LESSKV_SOURCE_DIR) / "tests/data/tokenizers/sentence_piece.json");
  return vectors;
}

// The small trained vocabularies of the committed vectors.
inline Vocabulary SmallBpe(std::string_view pre) {
  const auto& vectors = BpeVectors();
  Vocabulary vocabulary;
  vocabulary.name = "small-bpe";
  vocabulary.model = "gpt2";
  vocabulary.pre = pre;
  vocabulary.tokens = vectors.at("tokens").get<std::vector<std::string>>();
  vocabulary.merges = vectors.at("merges").get<std::vector<std::string>>();
  vocabulary.types.assign(vocabulary.tokens.size(), static_cast<int32_t>(TokenType::kNormal));
  const auto set_types = [&](const char* key, TokenType type) {
    for (const auto& text : vectors.at(key)) {
      const auto found = std::find(vocabulary.tokens.begin(), vocabulary.tokens.end(), text.get<std::string>());
      vocabulary.types.at(static_cast<size_t>(found - vocabulary.tokens.begin())) = static_cast<int32_t>(type);
    }
  };
  set_types("control", TokenType::kControl);
  set_types("user_defined", TokenType::kUserDefined);
  return vocabulary;
}

inline Vocabulary SmallSentencePiece() {
  const auto& vectors = SentencePieceVectors();
  Vocabulary vocabulary;
  vocabulary.name = "small-sentence-piece";
  vocabulary.model = "llama";
  vocabulary.tokens = vectors.at("tokens").get<std::vector<std::string>>();
  vocabulary.scores = vectors.at("scores").get<std::vector<float>>();
  vocabulary.types = vectors.at("types").get<std::vector<int32_t>>();
  return vocabulary;
}

// LESSKV_SHARED_DIR, or the folder "shared" beside the checkout; where it is absent, tests skip.
inline std::filesystem::path SharedFile(std::string_view relative) {
  const char* const shared = std::getenv("LESSKV_SHARED_DIR");
  const auto root = shared != nullptr ? std::filesystem::path(shared)
                                      : std::filesystem::path(LESSKV_SOURCE_DIR).parent_path() / "shared";
  return root / relative;
}

// A file of a whole model: in the folder LESSKV_MODELS or in models/cache of the checkout; where it is absent, tests
// skip.
inline std::filesystem::path ModelFile(std::string_view name) {
  const char* const models = std::getenv("LESSKV_MODELS");
  const auto folder =
      models != nullptr ? std::filesystem::path(models) : std::filesystem::path(LESSKV_SOURCE_DIR) / "models/cache";
  return folder / name;
}

// Well-formed text of up to `max_characters` characters from all planes, rich in spaces, digits and ASCII.
inline std::string RandomText(Rng& rng, uint64_t max_characters) {
  std::string text;
  for (uint64_t n = rng.Below(max_characters + 1); n > 0; --n) {
    switch (rng.Below(6)) {
      case 0:
        text += " \t\n\r  "[rng.Below(6)];
        break;
      case 1:
        text += static_cast<char>('0' + rng.Below(10));
        break;
      case 2:
        AppendUtf8(static_cast<char32_t>(rng.Below(0xD800)), text);
        break;
      case 3:
        AppendUtf8(static_cast<char32_t>(0xE000 + rng.Below(0x102000)), text);
        break;
      default:
        text += static_cast<char>(' ' + rng.Below(95));
        break;
    }
  }
  return text;
}

inline std::string RandomBytes(Rng& rng, uint64_t max_bytes) {
  std::string bytes;
  for (uint64_t n = rng.Below(max_bytes + 1); n > 0; --n) {
    // Half of them lead and continuation bytes, so that almost-characters are common.
    bytes += static_cast<char>(rng.Below(2) == 0 ? 0x80 + rng.Below(128) : rng.Below(256));
  }
  return bytes;
}

// The message of the Error that `action` throws; fails the test when it throws none.
template <typename Action>
std::string ErrorOf(Action&& action) {
  try {
    action();
  } catch (const Error& error) {
    return error.what();
  }
  ADD_FAILURE() << "no Error was thrown";
  return "";
}

}  // namespace lesskv
