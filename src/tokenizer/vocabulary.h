// A vocabulary as a model file describes it: plain data, not yet trusted. Tokenizer::Create checks it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace lesskv {

class GgufFile;

// tokenizer.ggml.token_type, numbered as in the file (the numbers of SentencePiece).
enum class TokenType : int32_t {
  kUndefined = 0,    // treated as kNormal
  kNormal = 1,       // a piece of text
  kUnknown = 2,      // stands for what has no piece
  kControl = 3,      // <s>, <|im_end|>, ...: never made from plain text, no text of its own
  kUserDefined = 4,  // always found whole in the text, before anything else is split
  kUnused = 5,       // a piece like any other
  kByte = 6,         // <0x0A>: one byte, where no piece fits (SentencePiece only)
};

struct Vocabulary {
  std::string name;  // of the file, for messages

  std::string model;                // tokenizer.ggml.model: "llama" (SentencePiece) or "gpt2" (byte-level BPE)
  std::string pre;                  // tokenizer.ggml.pre: the pre-tokenizer, BPE only; empty is "default"
  std::vector<std::string> tokens;  // text by id; BPE pieces in the byte alphabet (byte_alphabet.h)
  std::vector<float> scores;        // one a token; SentencePiece only
  std::vector<int32_t> types;       // TokenType by id; empty: see ResolveVocabulary
  std::vector<std::string> merges;  // "left right", best first; BPE only

  std::optional<uint32_t> bos;  // tokenizer.ggml.bos_token_id, ...; absent: see ResolveVocabulary
  std::optional<uint32_t> eos;
  std::optional<uint32_t> eot;
  std::optional<uint32_t> unk;
  // Other tokens that end a generation: eom_token_id, fim_pad_token_id, fim_rep_token_id, fim_sep_token_id. After
  // ResolveVocabulary all that do, eos and eot among them; one may occur twice.
  std::vector<uint32_t> ends;

  std::optional<bool> add_bos;  // absent: the default of the model or pre-tokenizer
  std::optional<bool> add_eos;
  std::optional<bool> add_space_prefix;  // SentencePiece only: BPE pieces carry their spaces themselves
  // White space behind special tokens is left out, as Phi-3's tokenizer does. No key says so: models named Phi-3 do.
  bool strips_behind_special = false;
};

// More tokens than any known vocabulary by far; a token count above it is refused before anything is built from it.
inline constexpr size_t kMaxTokens = size_t{1} << 24;

// Reads the tokenizer.ggml.* metadata. Throws Error when a key has the wrong type or a needed one is absent; what the
// values mean together is checked later. An id of 2^32 - 1 means "none", as converters write it.
Vocabulary LoadVocabulary(const GgufFile& file);

// Throws Error (kBadFile) with a sentence unless: the model is known; there is at least one token and at most
// kMaxTokens; scores (if any; SentencePiece needs them) and types (if any) have one entry a token; scores are finite;
// types are known; no two non-empty tokens have the same text; special ids are in range; byte tokens have the form
// <0xXX>. An empty token is allowed: it keeps its id, is never produced by encoding and decodes to nothing.
void CheckVocabulary(const Vocabulary& vocabulary);

// The checks on sizes alone, so that they can be tested without 16 million tokens. `n_scores` and `n_types`: 0 if none.
void CheckVocabularySizes(const std::string& name, size_t n_tokens, size_t n_scores, size_t n_types);

// Fills in what the file left out. Requires CheckVocabulary to have passed.
//   types   absent: all normal, but <0xXX> is a byte (SentencePiece), and bos, eos, eot, ends are control, unk unknown
//   ids     SentencePiece: bos 1, eos 2, unk 0, where those tokens are control or unknown ones, as llama.cpp assumes
//   ends    tokens whose text is known to end a generation (<|im_end|>, <|file_sep|>, ...: the list stands in
//           vocabulary.cpp) are added, whatever eos_token_id says
//   eot     absent: the first of that list that ends a turn
// A text of that list that nobody writes by chance is made a control token if it is not: models that call it normal run
// on for ever. Others (</s>, also a tag of HTML) count only where they are control tokens.
void ResolveVocabulary(Vocabulary& vocabulary);

// The value of "<0xXX>" (two hexadecimal digits), if `text` has this form.
std::optional<uint8_t> ParseByteToken(std::string_view text);

}  // namespace lesskv
