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
  // that is not two tokens with one space between them or whose result is no token; no token for any single byte. Of a
  // merge listed twice the first place counts.
  explicit ByteBpeModel(const Vocabulary& vocabulary);

  // Every byte of damaged UTF-8 is encoded as U+FFFD, as llama.cpp does: the patterns are defined on characters.
  // A byte without a token becomes the unknown token; without one it is left out, as HF tokenizers and llama.cpp do:
  // real vocabularies lack control characters that their training text did not have (SmolLM2: 0x04 and others).
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

  void LoadMerges(const Vocabulary& vocabulary);
  void LoadBytes(const Vocabulary& vocabulary);
  void LoadWholePieces(const Vocabulary& vocabulary);
  void EncodePiece(std::string_view piece, std::vector<int32_t>& ids) const;

  PreTokenizer pre_tokenizer_;
  std::unordered_map<uint64_t, RankedToken> merges_;       // left id << 32 | right id
  std::unordered_map<std::string, int32_t> whole_pieces_;  // by bytes; filled only where merges are ignored
  std::array<int32_t, 256> byte_ids_;                      // the unknown token if it has none; -1: left out
  int32_t unk_;                                            // -1: none
};

}  // namespace lesskv
