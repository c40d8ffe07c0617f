// Text to token ids and back, from the vocabulary inside a model file.
//
// Two kinds are supported, named by tokenizer.ggml.model: "llama" (sentence_piece.h) and "gpt2" (byte_bpe.h). Control
// and user-defined tokens are cut out of the text first (special_tokens.h).
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <unordered_set>
#include <vector>

#include "tokenizer/special_tokens.h"
#include "tokenizer/text_model.h"
#include "tokenizer/vocabulary.h"

namespace lesskv {

struct TextPiece {
  std::string_view text;
  bool parse_special = false;
};

// Immutable and thread-safe.
class Tokenizer {
 public:
  // Throws Error (kBadFile) with a sentence for a vocabulary that cannot be used: see CheckVocabulary, the two models'
  // constructors, and: add_bos or add_eos set without such a token.
  static std::unique_ptr<const Tokenizer> Create(Vocabulary vocabulary);

  Tokenizer(const Tokenizer&) = delete;
  Tokenizer& operator=(const Tokenizer&) = delete;

  // The ids of `text`.
  //   add_special    puts BOS before and EOS behind where the vocabulary wants that (add_bos(), add_eos())
  //   parse_special  texts of control tokens ("<|im_end|>") in `text` become those tokens; else they are plain text.
  //                  User-defined tokens are found in any case
  //   at_start       nothing, or a special token, comes before (IsAtStart): SentencePiece then begins with a space
  // Damaged UTF-8 is no error: its bytes survive as byte tokens (SentencePiece) or become U+FFFD each (BPE). Time and
  // memory are nearly linear in the text. Throws Error (kInvalidArgument) for a text of kMaxTextBytes or more.
  std::vector<int32_t> Encode(std::string_view text, bool add_special, bool parse_special, bool at_start = true) const;

  // Whether a text behind `before` stands at a start: nothing comes before it, or a special token does.
  bool IsAtStart(std::span<const int32_t> before) const { return before.empty() || IsSpecial(before.back()); }

  // The ids of pieces of one text, one behind the other: what is between special tokens becomes tokens as a whole,
  // across the pieces, but special tokens are parsed only inside a piece that says so, and none is found across pieces.
  // No BOS, no EOS. `at_start`: nothing, or a special token, comes before. Throws as Encode does.
  std::vector<int32_t> Encode(std::span<const TextPiece> pieces, bool at_start) const;

  // The text of `ids`, all of which are in [0, size()) (CHECK). Undoes Encode: the space that SentencePiece puts before
  // a text, or behind a special token, is taken away. Control and unknown tokens appear only without `skip_special`.
  // The result may be damaged UTF-8: ids may stand for single bytes. See StreamDecoder for text that is always whole.
  std::string Decode(std::span<const int32_t> ids, bool skip_special = true) const;

  // The bytes of one token as they are, spaces included; of a control token its text. The view lives as long as *this.
  std::string_view TokenBytes(int32_t id) const;

  // Appends what `id` adds to a text. `at_start`: nothing, or a special token, came before; updated. Decode and
  // StreamDecoder are loops over this.
  void AppendText(int32_t id, bool skip_special, bool& at_start, std::string& out) const;

  size_t size() const { return vocabulary_.tokens.size(); }
  TokenType Type(int32_t id) const;

  // Ids of special tokens; -1 when the vocabulary has none.
  int32_t bos() const { return IdOrNone(vocabulary_.bos); }
  int32_t eos() const { return IdOrNone(vocabulary_.eos); }
  int32_t eot() const { return IdOrNone(vocabulary_.eot); }
  int32_t unk() const { return IdOrNone(vocabulary_.unk); }
  bool add_bos() const { return add_bos_; }
  bool add_eos() const { return add_eos_; }

  // The control token with this text, if there is one.
  std::optional<int32_t> FindControlToken(std::string_view text) const;

  // Whether generation stops at this token: EOS, end of turn or message, what separates files, or a token whose text is
  // known for it (ResolveVocabulary).
  bool IsEndOfGeneration(int32_t id) const { return end_of_generation_.contains(id); }

  // For people: "SentencePiece, 32000 tokens".
  std::string Describe() const;

 private:
  explicit Tokenizer(Vocabulary vocabulary);

  bool IsSpecial(int32_t id) const;  // control, unknown or user-defined
  static int32_t IdOrNone(std::optional<uint32_t> id) { return id ? static_cast<int32_t>(*id) : -1; }
  void EncodePieces(std::span<const TextPiece> pieces, bool at_start, std::vector<int32_t>& ids) const;
  void LoadPieces();
  void LoadSpecialTokens();
  void LoadSequenceRules();

  Vocabulary vocabulary_;
  std::unique_ptr<const TextModel> model_;
  std::vector<std::string> token_bytes_;
  SpecialTokenMatcher user_defined_;  // found always
  SpecialTokenMatcher all_special_;   // found with parse_special
  std::unordered_set<int32_t> end_of_generation_;
  bool add_bos_ = false;
  bool add_eos_ = false;
};

// Decodes ids as they are generated. What Push returns is always well-formed UTF-8: a character whose bytes come in
// several tokens is held back until it is whole, and a byte that belongs to no character becomes U+FFFD. All pieces
// together equal ReplaceInvalidUtf8(Decode(ids)). Not thread-safe; the tokenizer must outlive it.
class StreamDecoder {
 public:
  // `at_start`: the ids are a text of their own, so a space that SentencePiece puts in front is taken away. Give false
  // for ids that continue a prompt.
  StreamDecoder(const Tokenizer& tokenizer, bool skip_special, bool at_start)
      : tokenizer_(&tokenizer), skip_special_(skip_special), at_start_(at_start) {}

  // The text that is certain after `id`; often empty.
  std::string Push(int32_t id);

  // What is held back, as U+FFFD for each byte. The decoder then is as if no character were pending.
  std::string Flush();

  bool unfinished() const { return !pending_.empty(); }  // something is held back

 private:
  const Tokenizer* tokenizer_;
  bool skip_special_;
  bool at_start_;
  std::string pending_;  // the first bytes of a character, 3 at most
};

}  // namespace lesskv
