#include "tokenizer/vocabulary.h"

#include <algorithm>
#include <array>
#include <cctype>
#include <cmath>
#include <limits>
#include <string_view>
#include <unordered_map>
#include <utility>

#include "base/error.h"
#include "format/gguf.h"

namespace lesskv {
namespace {

// Whether a token of such a text ends a generation.
enum class EndsAs {
  kMark,     // it is a control token, whatever type the file gives it
  kText,     // it ends a generation, but where the file has it as text, text it stays: tokenized as everything else
  kControl,  // only where the file has it as a control token
};

struct EndText {
  std::string_view text;
  EndsAs as;
  bool ends_turn = false;
};

// Texts of tokens that end a generation, those of turns from the most specific on. These are the ones llama.cpp goes by
// (llama-vocab.cpp, October 2026) for the models that we run; which of them a model has is only known by text.
constexpr EndText kEndTexts[] = {
    {"<|eot_id|>", EndsAs::kMark, true},
    {"<|im_end|>", EndsAs::kMark, true},
    {"<|end|>", EndsAs::kMark, true},
    {"<end_of_turn>", EndsAs::kMark, true},
    {"<turn|>", EndsAs::kMark, true},
    {"<end_of_utterance>", EndsAs::kMark, true},
    {"<|end_of_text|>", EndsAs::kMark, true},
    {"<|endoftext|>", EndsAs::kMark, true},
    {"<\uFF5Cend\u2581of\u2581sentence\uFF5C>", EndsAs::kMark, true},  // DeepSeek
    {"<EOT>", EndsAs::kMark, true},
    {"_<EOT>", EndsAs::kMark, true},
    {"\u2581<EOT>", EndsAs::kMark, true},  // CodeLlama
    {"[EOT]", EndsAs::kControl, true},
    {"<|eom_id|>", EndsAs::kMark},
    {"<|return|>", EndsAs::kMark},
    // Where a tool is called, or has its say.
    {"<|call|>", EndsAs::kMark},
    {"<|calls|>", EndsAs::kMark},
    {"<|flush|>", EndsAs::kMark},
    {"<|tool_response>", EndsAs::kMark},
    {"[e~[", EndsAs::kMark},
    // Between files and repositories: a model that completes code has said all when it writes one.
    {"<|fim_pad|>", EndsAs::kMark},
    {"<|fim_repo|>", EndsAs::kMark},
    {"<|repo_name|>", EndsAs::kMark},
    {"<|file_sep|>", EndsAs::kMark},
    {"<fim-pad>", EndsAs::kControl},
    {"<fim_pad>", EndsAs::kControl},
    {"<fim-repo>", EndsAs::kControl},
    {"<reponame>", EndsAs::kControl},
    {"<REPO>", EndsAs::kControl},
    {"<PAD>", EndsAs::kControl},
    {"[PAD]", EndsAs::kControl},
    {"</s>", EndsAs::kText},  // in Qwen's and Gemma's vocabularies a tag of HTML
    {"<eos>", EndsAs::kControl},
    {"[EOS]", EndsAs::kControl},
};

constexpr std::string_view kEndKeys[] = {"tokenizer.ggml.eom_token_id", "tokenizer.ggml.fim_pad_token_id",
                                         "tokenizer.ggml.fim_rep_token_id", "tokenizer.ggml.fim_sep_token_id"};

std::optional<uint32_t> ReadId(const GgufFile& file, std::string_view key) {
  if (file.Find(key) == nullptr) return std::nullopt;
  // Converters write -1 for "none", either as such or wrapped to 32 bits.
  const int64_t id = file.Get<int64_t>(key);
  if (id == -1 || id == std::numeric_limits<uint32_t>::max()) return std::nullopt;
  if (!std::in_range<uint32_t>(id))
    Fail(ErrorCode::kBadFile, "{}: {} is {}, which is no token id", file.name(), key, id);
  return static_cast<uint32_t>(id);
}

std::optional<bool> ReadFlag(const GgufFile& file, std::string_view key) {
  if (file.Find(key) == nullptr) return std::nullopt;
  return file.Get<bool>(key);
}

std::vector<std::string> ReadStrings(const GgufFile& file, std::string_view key) {
  const auto strings = file.Strings(key);
  return {strings.begin(), strings.end()};
}

bool IsPhi3(std::string name) {
  for (char& c : name) c = static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
  return name.find("phi-3") != std::string::npos || name.find("phi3") != std::string::npos;
}

void CheckTypes(const Vocabulary& vocabulary) {
  for (size_t id = 0; id < vocabulary.types.size(); ++id) {
    const int32_t type = vocabulary.types[id];
    if (type < 0 || type > static_cast<int32_t>(TokenType::kByte)) {
      Fail(ErrorCode::kBadFile, "{}: token {} has type {}, expected 0 to 6", vocabulary.name, id, type);
    }
    if (type == static_cast<int32_t>(TokenType::kByte) && !ParseByteToken(vocabulary.tokens[id])) {
      Fail(ErrorCode::kBadFile, "{}: token {} is a byte, expected a text like <0x0A>, found {}", vocabulary.name, id,
           Quoted(vocabulary.tokens[id]));
    }
  }
}

void CheckScores(const Vocabulary& vocabulary) {
  if (vocabulary.model == "llama" && vocabulary.scores.empty()) {
    Fail(ErrorCode::kBadFile, "{}: a SentencePiece vocabulary needs tokenizer.ggml.scores, found none",
         vocabulary.name);
  }
  for (size_t id = 0; id < vocabulary.scores.size(); ++id) {
    if (!std::isfinite(vocabulary.scores[id])) {
      Fail(ErrorCode::kBadFile, "{}: the score of token {} is {}, expected a finite number", vocabulary.name, id,
           vocabulary.scores[id]);
    }
  }
}

void CheckUnique(const Vocabulary& vocabulary) {
  std::unordered_map<std::string_view, size_t> ids;
  ids.reserve(vocabulary.tokens.size());
  for (size_t id = 0; id < vocabulary.tokens.size(); ++id) {
    if (vocabulary.tokens[id].empty()) continue;
    const auto [found, is_new] = ids.emplace(vocabulary.tokens[id], id);
    if (!is_new) {
      Fail(ErrorCode::kBadFile, "{}: tokens {} and {} have the same text {}", vocabulary.name, found->second, id,
           Quoted(vocabulary.tokens[id]));
    }
  }
}

void CheckId(const Vocabulary& vocabulary, std::string_view what, std::optional<uint32_t> id) {
  if (id && *id >= vocabulary.tokens.size()) {
    Fail(ErrorCode::kBadFile, "{}: the {} token is {}, but there are {} tokens", vocabulary.name, what, *id,
         vocabulary.tokens.size());
  }
}

bool HasType(const Vocabulary& vocabulary, size_t id, TokenType type) {
  return vocabulary.types[id] == static_cast<int32_t>(type);
}

void SetType(Vocabulary& vocabulary, std::optional<uint32_t> id, TokenType type) {
  if (id) vocabulary.types[*id] = static_cast<int32_t>(type);
}

void ResolveTypes(Vocabulary& vocabulary) {
  if (!vocabulary.types.empty()) return;
  vocabulary.types.assign(vocabulary.tokens.size(), static_cast<int32_t>(TokenType::kNormal));
  const bool sentence_piece = vocabulary.model == "llama";
  if (sentence_piece) {
    for (uint32_t id = 0; id < vocabulary.tokens.size(); ++id) {
      if (ParseByteToken(vocabulary.tokens[id])) SetType(vocabulary, id, TokenType::kByte);
    }
    // Without types, the usual places are the only hint; only bracketed texts are believed.
    constexpr std::array<std::pair<std::string_view, TokenType>, 3> kUsual = {
        {{"<unk>", TokenType::kUnknown}, {"<s>", TokenType::kControl}, {"</s>", TokenType::kControl}}};
    for (uint32_t id = 0; id < kUsual.size() && id < vocabulary.tokens.size(); ++id) {
      if (vocabulary.tokens[id] == kUsual[id].first) SetType(vocabulary, id, kUsual[id].second);
    }
  }
  SetType(vocabulary, vocabulary.unk, TokenType::kUnknown);
  for (const auto id : {vocabulary.bos, vocabulary.eos, vocabulary.eot}) SetType(vocabulary, id, TokenType::kControl);
  for (const uint32_t id : vocabulary.ends) SetType(vocabulary, id, TokenType::kControl);
}

void ResolveSentencePieceIds(Vocabulary& vocabulary) {
  const auto fill = [&](std::optional<uint32_t>& id, uint32_t usual, TokenType type) {
    if (!id && usual < vocabulary.tokens.size() && HasType(vocabulary, usual, type)) id = usual;
  };
  fill(vocabulary.unk, 0, TokenType::kUnknown);
  fill(vocabulary.bos, 1, TokenType::kControl);
  fill(vocabulary.eos, 2, TokenType::kControl);
}

void ResolveEnds(Vocabulary& vocabulary) {
  std::unordered_map<std::string_view, uint32_t> found;
  for (uint32_t id = 0; id < vocabulary.tokens.size(); ++id) {
    const std::string& text = vocabulary.tokens[id];
    if (std::any_of(std::begin(kEndTexts), std::end(kEndTexts), [&](const EndText& end) { return end.text == text; }))
      found.emplace(text, id);
  }
  for (const EndText& end : kEndTexts) {
    const auto at = found.find(end.text);
    if (at == found.end()) continue;
    if (end.as == EndsAs::kControl && !HasType(vocabulary, at->second, TokenType::kControl)) continue;
    if (end.as == EndsAs::kMark) SetType(vocabulary, at->second, TokenType::kControl);
    vocabulary.ends.push_back(at->second);
    if (end.ends_turn && !vocabulary.eot) vocabulary.eot = at->second;
  }
  for (const auto id : {vocabulary.eos, vocabulary.eot}) {
    if (id) vocabulary.ends.push_back(*id);
  }
}

}  // namespace

Vocabulary LoadVocabulary(const GgufFile& file) {
  Vocabulary vocabulary;
  vocabulary.name = file.name();
  vocabulary.model = file.Get<std::string>("tokenizer.ggml.model");
  vocabulary.pre = file.GetOr<std::string>("tokenizer.ggml.pre", "");
  vocabulary.tokens = ReadStrings(file, "tokenizer.ggml.tokens");
  vocabulary.scores = file.GetOr<std::vector<float>>("tokenizer.ggml.scores", {});
  vocabulary.types = file.GetOr<std::vector<int32_t>>("tokenizer.ggml.token_type", {});
  if (vocabulary.model == "gpt2") vocabulary.merges = ReadStrings(file, "tokenizer.ggml.merges");
  vocabulary.bos = ReadId(file, "tokenizer.ggml.bos_token_id");
  vocabulary.eos = ReadId(file, "tokenizer.ggml.eos_token_id");
  vocabulary.eot = ReadId(file, "tokenizer.ggml.eot_token_id");
  vocabulary.unk = ReadId(file, "tokenizer.ggml.unknown_token_id");
  for (const std::string_view key : kEndKeys) {
    if (const auto id = ReadId(file, key)) vocabulary.ends.push_back(*id);
  }
  vocabulary.add_bos = ReadFlag(file, "tokenizer.ggml.add_bos_token");
  vocabulary.add_eos = ReadFlag(file, "tokenizer.ggml.add_eos_token");
  vocabulary.add_space_prefix = ReadFlag(file, "tokenizer.ggml.add_space_prefix");
  vocabulary.strips_behind_special = IsPhi3(file.GetOr<std::string>("general.name", ""));
  return vocabulary;
}

void CheckVocabularySizes(const std::string& name, size_t n_tokens, size_t n_scores, size_t n_types) {
  if (n_tokens == 0) Fail(ErrorCode::kBadFile, "{}: the vocabulary has no tokens", name);
  if (n_tokens > kMaxTokens) {
    Fail(ErrorCode::kBadFile, "{}: the vocabulary has {} tokens, at most {} are supported", name, n_tokens, kMaxTokens);
  }
  if (n_scores != 0 && n_scores != n_tokens) {
    Fail(ErrorCode::kBadFile, "{}: the vocabulary has {} tokens but {} scores", name, n_tokens, n_scores);
  }
  if (n_types != 0 && n_types != n_tokens) {
    Fail(ErrorCode::kBadFile, "{}: the vocabulary has {} tokens but {} token types", name, n_tokens, n_types);
  }
}

void CheckVocabulary(const Vocabulary& vocabulary) {
  if (vocabulary.model != "llama" && vocabulary.model != "gpt2") {
    Fail(ErrorCode::kBadFile, "{}: tokenizer.ggml.model is {}, expected 'llama' or 'gpt2'", vocabulary.name,
         Quoted(vocabulary.model));
  }
  CheckVocabularySizes(vocabulary.name, vocabulary.tokens.size(), vocabulary.scores.size(), vocabulary.types.size());
  CheckTypes(vocabulary);
  CheckScores(vocabulary);
  CheckUnique(vocabulary);
  CheckId(vocabulary, "beginning-of-sequence", vocabulary.bos);
  CheckId(vocabulary, "end-of-sequence", vocabulary.eos);
  CheckId(vocabulary, "end-of-turn", vocabulary.eot);
  for (const uint32_t id : vocabulary.ends) CheckId(vocabulary, "end-of-message or fill-in-the-middle", id);
  CheckId(vocabulary, "unknown", vocabulary.unk);
}

void ResolveVocabulary(Vocabulary& vocabulary) {
  ResolveTypes(vocabulary);
  if (vocabulary.model == "llama") ResolveSentencePieceIds(vocabulary);
  ResolveEnds(vocabulary);
}

std::optional<uint8_t> ParseByteToken(std::string_view text) {
  if (text.size() != 6 || text.substr(0, 3) != "<0x" || text[5] != '>') return std::nullopt;
  int value = 0;
  for (const char c : text.substr(3, 2)) {
    const bool digit = c >= '0' && c <= '9';
    const bool upper = c >= 'A' && c <= 'F';
    const bool lower = c >= 'a' && c <= 'f';
    if (!digit && !upper && !lower) return std::nullopt;
    value = value * 16 + (digit ? c - '0' : upper ? c - 'A' + 10 : c - 'a' + 10);
  }
  return static_cast<uint8_t>(value);
}

}  // namespace lesskv
