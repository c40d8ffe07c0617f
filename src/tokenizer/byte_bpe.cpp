#include "tokenizer/byte_bpe.h"

#include <fmt/format.h>

#include "base/check.h"
#include "base/error.h"
#include "format/gguf.h"
#include "tokenizer/byte_alphabet.h"
#include "tokenizer/symbol_merger.h"
#include "tokenizer/utf8.h"

namespace lesskv {
namespace {

uint64_t PairKey(int32_t left, int32_t right) {
  return static_cast<uint64_t>(static_cast<uint32_t>(left)) << 32 | static_cast<uint32_t>(right);
}

// Whether plain text may become this token.
bool IsPiece(const Vocabulary& vocabulary, size_t id) {
  const auto type = static_cast<TokenType>(vocabulary.types[id]);
  return type != TokenType::kControl && type != TokenType::kUnknown && !vocabulary.tokens[id].empty();
}

std::pair<std::string, std::string> SplitMerge(const Vocabulary& vocabulary, size_t rank) {
  const std::string& merge = vocabulary.merges[rank];
  const size_t space = merge.find(' ');
  if (space == std::string::npos || space == 0 || space + 1 == merge.size() ||
      merge.find(' ', space + 1) != std::string::npos) {
    Fail(ErrorCode::kBadFile, "{}: merge {} is {}, expected two texts with one space between them", vocabulary.name,
         rank, Quoted(merge));
  }
  return {merge.substr(0, space), merge.substr(space + 1)};
}

}  // namespace

ByteBpeModel::ByteBpeModel(const Vocabulary& vocabulary)
    : pre_tokenizer_(PreTokenizer::ForName(vocabulary.pre, vocabulary.name)),
      n_tokens_(static_cast<int32_t>(vocabulary.tokens.size())) {
  IdsByText pieces;
  pieces.reserve(vocabulary.tokens.size());
  for (size_t id = 0; id < vocabulary.tokens.size(); ++id) {
    if (IsPiece(vocabulary, id)) pieces.emplace(vocabulary.tokens[id], static_cast<int32_t>(id));
  }
  LoadBytes(vocabulary, pieces);
  LoadMerges(vocabulary, pieces);
  if (pre_tokenizer_.ignore_merges()) LoadWholePieces(vocabulary);
}

void ByteBpeModel::LoadBytes(const Vocabulary& vocabulary, const IdsByText& pieces) {
  size_t n_found = 0;
  for (size_t byte = 0; byte < 256; ++byte) {
    const auto found = pieces.find(std::string(ByteToAlphabet(static_cast<uint8_t>(byte))));
    byte_ids_[byte] = found == pieces.end() ? -1 : found->second;
    n_found += found != pieces.end();
  }
  if (n_found == 0) Fail(ErrorCode::kBadFile, "{}: the vocabulary has no token for any single byte", vocabulary.name);
}

void ByteBpeModel::LoadMerges(const Vocabulary& vocabulary, IdsByText& pieces) {
  merges_.reserve(vocabulary.merges.size());
  for (size_t rank = 0; rank < vocabulary.merges.size(); ++rank) {
    const auto [left, right] = SplitMerge(vocabulary, rank);
    const uint64_t pair = PairKey(PieceId(left, pieces), PieceId(right, pieces));
    merges_.emplace(pair, RankedToken{static_cast<uint32_t>(rank), PieceId(left + right, pieces)});
  }
}

int32_t ByteBpeModel::PieceId(const std::string& text, IdsByText& pieces) {
  const auto [piece, is_new] = pieces.emplace(text, n_tokens_ + static_cast<int32_t>(without_token_.size()));
  if (is_new) {
    std::vector<int32_t>& ids = without_token_.emplace_back();
    for (const char byte : AlphabetToBytes(text).value_or("")) {
      const int32_t id = byte_ids_[static_cast<uint8_t>(byte)];
      if (id >= 0) ids.push_back(id);
    }
  }
  return piece->second;
}

void ByteBpeModel::LoadWholePieces(const Vocabulary& vocabulary) {
  whole_pieces_.reserve(vocabulary.tokens.size());
  for (size_t id = 0; id < vocabulary.tokens.size(); ++id) {
    if (!IsPiece(vocabulary, id)) continue;
    // Tokens outside the alphabet are special texts; they are found before text gets here.
    if (auto bytes = AlphabetToBytes(vocabulary.tokens[id])) {
      whole_pieces_.emplace(*std::move(bytes), static_cast<int32_t>(id));
    }
  }
}

void ByteBpeModel::Encode(std::string_view text, bool /*at_start*/, std::vector<int32_t>& ids) const {
  CHECK(text.size() < kMaxTextBytes);
  const std::string well_formed = ReplaceInvalidUtf8(text);
  for (const std::string_view piece : pre_tokenizer_.Split(well_formed)) EncodePiece(piece, ids);
}

void ByteBpeModel::EncodePiece(std::string_view piece, std::vector<int32_t>& ids) const {
  if (const auto whole = whole_pieces_.find(std::string(piece)); whole != whole_pieces_.end()) {
    ids.push_back(whole->second);
    return;
  }
  std::vector<Symbol> symbols;
  symbols.reserve(piece.size());
  for (size_t i = 0; i < piece.size(); ++i) {
    const int32_t id = byte_ids_[static_cast<uint8_t>(piece[i])];
    if (id >= 0) symbols.push_back({static_cast<uint32_t>(i), 1, id});
  }
  MergeSymbols<uint32_t>(symbols, [&](const Symbol& left, const Symbol& right) -> std::optional<Merge<uint32_t>> {
    const auto found = merges_.find(PairKey(left.id, right.id));
    if (found == merges_.end()) return std::nullopt;
    return Merge<uint32_t>{found->second.rank, found->second.id};
  });
  for (const Symbol& symbol : symbols) {
    if (symbol.length == 0) continue;
    if (symbol.id < n_tokens_) {
      ids.push_back(symbol.id);
    } else {
      const auto& parts = without_token_[static_cast<size_t>(symbol.id - n_tokens_)];
      ids.insert(ids.end(), parts.begin(), parts.end());
    }
  }
}

std::string ByteBpeModel::PieceBytes(std::string_view text, bool is_byte) const {
  if (is_byte) return std::string(1, static_cast<char>(ParseByteToken(text).value()));
  return AlphabetToBytes(text).value_or(std::string(text));
}

std::string ByteBpeModel::Describe() const { return fmt::format("byte-level BPE ({})", pre_tokenizer_.family()); }

}  // namespace lesskv
