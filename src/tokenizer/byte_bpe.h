// Byte-level BPE (Sennrich et al. 2016; on bytes: Radford et al. 2019): text is cut by the pre-tokenizer, each piece
// starts as bytes, and of all neighbouring pairs that the merge list names, the earliest in the list merges first.
// Works on bytes and token ids; the printable byte alphabet of the file appears only while loading.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "tokenizer/pre_tokenizer.h"
#include "tokenizer/text_model.h"
#include "tokenizer/vocabulary.h"

namespace lesskv {

class ByteBpeModel final : public TextModel {
 public:
  // `vocabulary` is checked and resolved (vocabulary.h). Throws Error (kBadFile) for: an unknown pre-tokenizer; a merge
  // that is not two texts with one space between them; no token for any single byte. Of a merge listed twice the first
  // place counts. A merge that names or makes a text without a token merges all the same, as in llama.cpp: further
  // merges may make a token of it. Where none does, and where the token is a control token, which text never becomes,
  // its bytes' tokens stand in its place.
  explicit ByteBpeModel(const Vocabulary& vocabulary);

  // Every byte of damaged UTF-8 is encoded as U+FFFD, as llama.cpp does: the patterns are defined on characters.
  // A byte without a token is left out, as HF tokenizers and llama.cpp do: real vocabularies lack control characters
  // that their training text did not have (SmolLM2: 0x04 and others). The file's unknown token is not used: in
  // byte-level vocabularies it is a control token (SmolLM2: <|endoftext|>).
  void Encode(std::string_view text, bool at_start, std::vector<int32_t>& ids) const override;
  // A text that is not of the byte alphabet stands for itself.
  std::string PieceBytes(std::string_view text, bool is_byte) const override;
  bool adds_space_prefix() const override { return false; }
  bool adds_bos_by_default() const override { return pre_tokenizer_.adds_bos(); }
  std::string Describe() const override;

 private:
  struct RankedToken {
    uint32_t rank;
    int32_t id;
  };

  // Pieces of the vocabulary by text; while merges are loaded, texts without a token get ids behind the last token.
  using IdsByText = std::unordered_map<std::string, int32_t>;

  void LoadBytes(const Vocabulary& vocabulary, const IdsByText& pieces);
  void LoadMerges(const Vocabulary& vocabulary, IdsByText& pieces);
  int32_t PieceId(const std::string& text, IdsByText& pieces);
  void LoadWholePieces(const Vocabulary& vocabulary);
  void EncodePiece(std::string_view piece, std::vector<int32_t>& ids) const;

  PreTokenizer pre_tokenizer_;
  std::unordered_map<uint64_t, RankedToken> merges_;       // left id << 32 | right id
  std::unordered_map<std::string, int32_t> whole_pieces_;  // by bytes; filled only where merges are ignored
  std::array<int32_t, 256> byte_ids_;                      // -1: left out
  int32_t n_tokens_;
  std::vector<std::vector<int32_t>> without_token_;  // what stands for id n_tokens_ + i
};

}  // namespace lesskv
