// SentencePiece BPE (Kudo and Richardson 2018), as llama.cpp runs it: of all neighbouring pieces whose concatenation is
// a token, the one with the highest score merges first, the leftmost of equals. Spaces are written as U+2581.
// Characters without a token fall back to byte tokens <0xXX>, and without those to the unknown token.
//
// Control, unknown and byte tokens are never made from text, as in SentencePiece itself (llama.cpp would make </s> of
// "</" and "s>"): what the user writes cannot end a turn.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "tokenizer/text_model.h"
#include "tokenizer/vocabulary.h"

namespace lesskv {

class SentencePieceModel final : public TextModel {
 public:
  // `vocabulary` is checked and resolved (vocabulary.h) and outlives the model. Throws Error (kBadFile) when a byte has
  // no token and there is no unknown token.
  explicit SentencePieceModel(const Vocabulary& vocabulary);

  // Bytes of damaged UTF-8 go through byte fallback one by one, so they survive encoding and decoding.
  void Encode(std::string_view text, bool at_start, std::vector<int32_t>& ids) const override;
  std::string PieceBytes(std::string_view text, bool is_byte) const override;
  bool adds_space_prefix() const override { return adds_space_prefix_; }
  bool adds_bos_by_default() const override { return true; }
  std::string Describe() const override { return "SentencePiece"; }

 private:
  int32_t FindPiece(std::string_view text) const;
  void AppendFallback(std::string_view text, std::vector<int32_t>& ids) const;

  const Vocabulary& vocabulary_;
  std::unordered_map<std::string_view, int32_t> pieces_;  // keys are views of the vocabulary's texts
  size_t longest_piece_ = 0;
  std::array<int32_t, 256> byte_ids_;  // -1: none
  int32_t unk_;                        // -1: none
  bool adds_space_prefix_;
};

}  // namespace lesskv
