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

std::unordered_map<std::string_view, int32_t> PiecesByText(const Vocabulary& vocabulary) {
  std::unordered_map<std::string_view, int32_t> result;
  result.reserve(vocabulary.tokens.size());
  for (size_t id = 0; id < vocabulary.tokens.size(); ++id) {
    if (IsPiece(vocabulary, id)) result.emplace(vocabulary.tokens[id], static_cast<int32_t>(id));
  }
  return result;
}

}  // namespace

ByteBpeModel::ByteBpeModel(const Vocabulary& vocabulary)
    : pre_tokenizer_(PreTokenizer::ForName(vocabulary.pre, vocabulary.name)),
      unk_(vocabulary.unk ? static_cast<int32_t>(*vocabulary.unk) : -1) {
  LoadBytes(vocabulary);
  LoadMerges(vocabulary);
  if (pre_tokenizer_.ignore_merges()) LoadWholePieces(vocabulary);
}

void ByteBpeModel::LoadBytes(const Vocabulary& vocabulary) {
  const auto pieces = PiecesByText(vocabulary);
  size_t n_found = 0;
  for (size_t byte = 0; byte < 256; ++byte) {
    const auto found = pieces.find(ByteToAlphabet(static_cast<uint8_t>(byte)));
    byte_ids_[byte] = found == pieces.end() ? unk_ : found->second;
    n_found += found != pieces.end();
  }
  if (n_found == 0) Fail(ErrorCode::kBadFile, "{}: the vocabulary has no token for any single byte", vocabulary.name);
}

void ByteBpeModel::LoadMerges(const Vocabulary& vocabulary) {
  const auto pieces = PiecesByText(vocabulary);
  merges_.reserve(vocabulary.merges.size());
  for (size_t rank = 0; rank < vocabulary.merges.size(); ++rank) {
    const std::string_view merge = vocabulary.merges[rank];
    const size_t space = merge.find(' ');
    if (space == std::string_view::npos || space == 0 || space + 1 == merge.size() ||
        merge.find(' ', space + 1) != std::string_view::npos) {
      Fail(ErrorCode::kBadFile, "{}: merge {} is {}, expected two tokens with one space between them", vocabulary.name,
           rank, Quoted(merge));
    }
    const std::string_view left = merge.substr(0, space);
    const std::string_view right = merge.substr(space + 1);
    const auto find = [&](std::string_view text) {
      const auto found = pieces.find(text);
      if (found == pieces.end()) {
        Fail(ErrorCode::kBadFile, "{}: merge {} ({}) needs {}, which is not a token", vocabulary.name, rank,
             Quoted(merge), Quoted(text));
      }
      return found->second;
    };
    const int32_t left_id = find(left);
    const int32_t right_id = find(right);
    const int32_t whole_id = find(fmt::format("{}{}", left, right));
    merges_.emplace(PairKey(left_id, right_id), RankedToken{static_cast<uint32_t>(rank), whole_id});
  }
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
    if (symbol.length > 0) ids.push_back(symbol.id);
  }
}

std::string ByteBpeModel::PieceBytes(std::string_view text, bool is_byte) const {
  if (is_byte) return std::string(1, static_cast<char>(ParseByteToken(text).value()));
  return AlphabetToBytes(text).value_or(std::string(text));
}

std::string ByteBpeModel::Describe() const { return fmt::format("byte-level BPE ({})", pre_tokenizer_.family()); }

}  // namespace lesskv
