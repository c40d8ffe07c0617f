#include "tokenizer/sentence_piece.h"

#include <algorithm>

#include "base/check.h"
#include "base/error.h"
#include "tokenizer/symbol_merger.h"
#include "tokenizer/utf8.h"

namespace lesskv {
namespace {

constexpr std::string_view kSpace = "\xE2\x96\x81";  // U+2581, a space inside a piece

std::string EscapeSpaces(std::string_view text, bool with_prefix) {
  std::string result;
  result.reserve(text.size() + text.size() / 4 + kSpace.size());
  if (with_prefix) result += kSpace;
  for (const char c : text) {
    if (c == ' ') {
      result += kSpace;
    } else {
      result += c;
    }
  }
  return result;
}

}  // namespace

SentencePieceModel::SentencePieceModel(const Vocabulary& vocabulary)
    : vocabulary_(vocabulary),
      unk_(vocabulary.unk ? static_cast<int32_t>(*vocabulary.unk) : -1),
      adds_space_prefix_(vocabulary.add_space_prefix.value_or(true)) {
  byte_ids_.fill(-1);
  for (size_t i = 0; i < vocabulary.tokens.size(); ++i) {
    const std::string& text = vocabulary.tokens[i];
    const auto type = static_cast<TokenType>(vocabulary.types[i]);
    const auto id = static_cast<int32_t>(i);
    if (type == TokenType::kByte) {
      byte_ids_[ParseByteToken(text).value()] = id;
    } else if (type != TokenType::kControl && type != TokenType::kUnknown && !text.empty()) {
      pieces_.emplace(text, id);
      longest_piece_ = std::max(longest_piece_, text.size());
    }
  }
  const auto missing = std::find(byte_ids_.begin(), byte_ids_.end(), -1);
  if (missing != byte_ids_.end() && unk_ < 0) {
    Fail(ErrorCode::kBadFile, "{}: the vocabulary has neither a token <0x{:02X}> for that byte nor an unknown token",
         vocabulary.name, missing - byte_ids_.begin());
  }
}

int32_t SentencePieceModel::FindPiece(std::string_view text) const {
  if (text.size() > longest_piece_) return -1;
  const auto found = pieces_.find(text);
  return found == pieces_.end() ? -1 : found->second;
}

void SentencePieceModel::AppendFallback(std::string_view text, std::vector<int32_t>& ids) const {
  const auto byte_id = [&](char c) { return byte_ids_[static_cast<uint8_t>(c)]; };
  if (std::any_of(text.begin(), text.end(), [&](char c) { return byte_id(c) < 0; })) {
    ids.push_back(unk_);
    return;
  }
  for (const char c : text) ids.push_back(byte_id(c));
}

void SentencePieceModel::Encode(std::string_view text, bool at_start, std::vector<int32_t>& ids) const {
  if (text.empty()) return;
  CHECK(text.size() < kMaxTextBytes);  // escaping makes it three times as long at most
  const std::string escaped = EscapeSpaces(text, at_start && adds_space_prefix_);
  const auto view = [&](const Symbol& symbol) { return std::string_view(escaped).substr(symbol.begin, symbol.length); };

  std::vector<Symbol> symbols;
  symbols.reserve(escaped.size());
  for (size_t pos = 0; pos < escaped.size();) {
    const size_t n = std::max<size_t>(Utf8CharBytes(escaped, pos), 1);
    const int32_t id = FindPiece(std::string_view(escaped).substr(pos, n));
    symbols.push_back({static_cast<uint32_t>(pos), static_cast<uint32_t>(n), id});
    pos += n;
  }
  MergeSymbols<float>(symbols, [&](const Symbol& left, const Symbol& right) -> std::optional<Merge<float>> {
    const int32_t id = FindPiece({escaped.data() + left.begin, left.length + right.length});
    if (id < 0) return std::nullopt;
    return Merge<float>{-vocabulary_.scores[static_cast<size_t>(id)], id};
  });
  for (const Symbol& symbol : symbols) {
    if (symbol.length == 0) continue;
    if (symbol.id >= 0) {
      ids.push_back(symbol.id);
    } else {
      AppendFallback(view(symbol), ids);
    }
  }
}

std::string SentencePieceModel::PieceBytes(std::string_view text, bool is_byte) const {
  if (is_byte) return std::string(1, static_cast<char>(ParseByteToken(text).value()));
  std::string result;
  for (size_t pos = 0; pos < text.size();) {
    const bool is_space = text.substr(pos, kSpace.size()) == kSpace;
    result += is_space ? ' ' : text[pos];
    pos += is_space ? kSpace.size() : 1;
  }
  return result;
}

}  // namespace lesskv
