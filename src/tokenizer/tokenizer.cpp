#include "tokenizer/tokenizer.h"

#include <fmt/format.h>

#include <utility>

#include "base/check.h"
#include "base/error.h"
#include "tokenizer/byte_bpe.h"
#include "tokenizer/sentence_piece.h"
#include "tokenizer/utf8.h"

namespace lesskv {
namespace {

std::unique_ptr<const TextModel> MakeModel(const Vocabulary& vocabulary) {
  if (vocabulary.model == "llama") return std::make_unique<SentencePieceModel>(vocabulary);
  return std::make_unique<ByteBpeModel>(vocabulary);
}

bool HasOwnText(TokenType type) { return type != TokenType::kControl && type != TokenType::kUnknown; }

// Whether to add BOS or EOS: what the file says, else the default where there is such a token.
bool ResolveAdding(const Vocabulary& vocabulary, const char* what, std::optional<bool> flag, bool by_default,
                   std::optional<uint32_t> id) {
  if (flag.value_or(false) && !id) {
    Fail(ErrorCode::kBadFile, "{}: tokenizer.ggml.add_{}_token is set, but there is no tokenizer.ggml.{}_token_id",
         vocabulary.name, what, what);
  }
  return id && flag.value_or(by_default);
}

}  // namespace

std::unique_ptr<const Tokenizer> Tokenizer::Create(Vocabulary vocabulary) {
  CheckVocabulary(vocabulary);
  ResolveVocabulary(vocabulary);
  return std::unique_ptr<const Tokenizer>(new Tokenizer(std::move(vocabulary)));
}

Tokenizer::Tokenizer(Vocabulary vocabulary) : vocabulary_(std::move(vocabulary)), model_(MakeModel(vocabulary_)) {
  vocabulary_.merges = {};  // now in the model; as text they take megabytes
  LoadPieces();
  LoadSpecialTokens();
  LoadSequenceRules();
}

void Tokenizer::LoadPieces() {
  token_bytes_.reserve(size());
  for (size_t i = 0; i < size(); ++i) {
    const auto id = static_cast<int32_t>(i);
    const std::string& text = vocabulary_.tokens[i];
    token_bytes_.push_back(IsSpecial(id) ? text : model_->PieceBytes(text, Type(id) == TokenType::kByte));
  }
}

void Tokenizer::LoadSpecialTokens() {
  for (size_t i = 0; i < size(); ++i) {
    const auto id = static_cast<int32_t>(i);
    const TokenType type = Type(id);
    const std::string& text = vocabulary_.tokens[i];
    if (text.empty()) continue;
    const bool begins_text = text == "<s>" || text == "<unk>" || text == "<|endoftext|>";
    const bool strips = vocabulary_.strips_behind_special && !begins_text;
    if (type == TokenType::kUserDefined) user_defined_.Add(text, id, strips);
    if (IsSpecial(id)) all_special_.Add(text, id, strips);
  }
}

void Tokenizer::LoadSequenceRules() {
  const Vocabulary& v = vocabulary_;
  add_bos_ = ResolveAdding(v, "bos", v.add_bos, model_->adds_bos_by_default(), v.bos);
  add_eos_ = ResolveAdding(v, "eos", v.add_eos, false, v.eos);
  for (const uint32_t id : v.ends) end_of_generation_.insert(static_cast<int32_t>(id));
}

std::vector<int32_t> Tokenizer::Encode(std::string_view text, bool add_special, bool parse_special,
                                       bool at_start) const {
  std::vector<int32_t> ids;
  if (add_special && add_bos_) ids.push_back(bos());
  const TextPiece piece{text, parse_special};
  EncodePieces({&piece, 1}, at_start, ids);
  if (add_special && add_eos_) ids.push_back(eos());
  return ids;
}

std::optional<int32_t> Tokenizer::FindControlToken(std::string_view text) const {
  const std::vector<TextFragment> fragments = all_special_.Split(text);
  if (fragments.size() != 1 || fragments[0].id < 0 || Type(fragments[0].id) != TokenType::kControl) return std::nullopt;
  return fragments[0].id;
}

std::vector<int32_t> Tokenizer::Encode(std::span<const TextPiece> pieces, bool at_start) const {
  std::vector<int32_t> ids;
  EncodePieces(pieces, at_start, ids);
  return ids;
}

void Tokenizer::EncodePieces(std::span<const TextPiece> pieces, bool at_start, std::vector<int32_t>& ids) const {
  size_t n_bytes = 0;
  for (const TextPiece& piece : pieces) n_bytes += piece.text.size();
  if (n_bytes >= kMaxTextBytes) {
    Fail(ErrorCode::kInvalidArgument, "a text of {} bytes is too long to tokenize, at most {} bytes are supported",
         n_bytes, kMaxTextBytes - 1);
  }
  std::string plain;  // since the last special token
  const auto encode_plain = [&] {
    if (!plain.empty()) model_->Encode(plain, at_start, ids);
    at_start = at_start && plain.empty();
    plain.clear();
  };
  for (const TextPiece& piece : pieces) {
    for (const TextFragment& fragment : (piece.parse_special ? all_special_ : user_defined_).Split(piece.text)) {
      if (fragment.id < 0) {
        plain += fragment.text;
        continue;
      }
      encode_plain();
      ids.push_back(fragment.id);
      at_start = true;
    }
  }
  encode_plain();
}

std::string Tokenizer::Decode(std::span<const int32_t> ids, bool skip_special) const {
  std::string text;
  bool at_start = true;
  for (const int32_t id : ids) AppendText(id, skip_special, at_start, text);
  return text;
}

std::string_view Tokenizer::TokenBytes(int32_t id) const {
  CHECK(id >= 0 && static_cast<size_t>(id) < size(), "token id {} of {}", id, size());
  return token_bytes_[static_cast<size_t>(id)];
}

TokenType Tokenizer::Type(int32_t id) const {
  CHECK(id >= 0 && static_cast<size_t>(id) < size(), "token id {} of {}", id, size());
  return static_cast<TokenType>(vocabulary_.types[static_cast<size_t>(id)]);
}

bool Tokenizer::IsSpecial(int32_t id) const {
  const TokenType type = Type(id);
  return type == TokenType::kUserDefined || !HasOwnText(type);
}

void Tokenizer::AppendText(int32_t id, bool skip_special, bool& at_start, std::string& out) const {
  std::string_view bytes = TokenBytes(id);
  if (IsSpecial(id)) {
    if (HasOwnText(Type(id)) || !skip_special) out += bytes;
    at_start = true;
    return;
  }
  if (at_start && model_->adds_space_prefix() && bytes.starts_with(' ')) bytes.remove_prefix(1);
  out += bytes;
  at_start = false;
}

std::string Tokenizer::Describe() const { return fmt::format("{}, {} tokens", model_->Describe(), size()); }

std::string StreamDecoder::Push(int32_t id) {
  tokenizer_->AppendText(id, skip_special_, at_start_, pending_);
  const size_t whole = pending_.size() - IncompleteUtf8Tail(pending_);
  std::string text = ReplaceInvalidUtf8(std::string_view(pending_).substr(0, whole));
  pending_.erase(0, whole);
  return text;
}

std::string StreamDecoder::Flush() { return ReplaceInvalidUtf8(std::exchange(pending_, {})); }

}  // namespace lesskv
