// The part of a tokenizer that knows how text becomes pieces: SentencePiece or byte-level BPE.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace lesskv {

// Symbols address text with 32 bits; a text of 1 GiB or more is refused long before that overflows.
inline constexpr size_t kMaxTextBytes = size_t{1} << 30;

// Immutable and thread-safe.
class TextModel {
 public:
  virtual ~TextModel() = default;

  // Appends the ids of `text`, which holds no special tokens and may hold damaged UTF-8.
  // `at_start`: nothing, or a special token, comes before it.
  virtual void Encode(std::string_view text, bool at_start, std::vector<int32_t>& ids) const = 0;

  // The bytes that the piece with this text in the vocabulary stands for (normal, unused and byte tokens).
  virtual std::string PieceBytes(std::string_view text, bool is_byte) const = 0;

  // Whether Encode puts a space before a text `at_start`, which decoding then takes away again.
  virtual bool adds_space_prefix() const = 0;

  // Whether a sequence begins with BOS when the file does not say.
  virtual bool adds_bos_by_default() const = 0;

  // For people: "SentencePiece", "byte-level BPE (llama-bpe)".
  virtual std::string Describe() const = 0;
};

}  // namespace lesskv
