// Cuts text into the pieces that byte-level BPE merges separately. Which cuts a vocabulary was trained with is named by
// tokenizer.ggml.pre; a name stands for a list of regular expressions, applied in turn: each cuts every piece that the
// ones before it left into its matches and what lies between them. Look-ahead sees the piece, not the text around it.
//
// Letters, numbers and punctuation are those of PCRE2's Unicode tables (Unicode 14 in Debian 12), so characters that
// were assigned later may be cut differently than by a tokenizer with newer tables. No text is lost either way.
#pragma once

#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace lesskv {

struct PreTokenizerFamily;  // the patterns and defaults that names share

// The patterns of cuts that tokenizer files name instead of spelling them out.
inline constexpr std::string_view kGpt2Pattern =
    R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";
inline constexpr std::string_view kDigitPattern = R"(\p{N})";
inline constexpr std::string_view kPunctuationPattern = R"([\p{P}$+<=>^~|`]+)";

// Immutable and thread-safe; copies share the compiled patterns.
class PreTokenizer {
 public:
  // `name` as in tokenizer.ggml.pre; an empty one is "default", as llama.cpp reads files older than the key.
  // Throws Error (kBadFile) that names an unknown one and the known ones; `file` is for its message.
  static PreTokenizer ForName(std::string_view name, const std::string& file);

  // The first name that stands for exactly these patterns.
  static std::optional<std::string_view> FindName(std::span<const std::string> patterns, bool ignore_merges);

  // Every known name, aliases included.
  static std::vector<std::string_view> Names();

  // The pieces of `text` in order, none empty; their concatenation is `text`, whose bytes they are views of.
  // Requires well-formed UTF-8 (ReplaceInvalidUtf8).
  std::vector<std::string_view> Split(std::string_view text) const;

  // The name of the family, "gpt-2" for "mpt".
  std::string_view family() const;
  // A piece that is a token as a whole becomes that token, even where merges would not lead to it (Llama 3).
  bool ignore_merges() const { return ignore_merges_; }
  // Whether a sequence begins with BOS when the file does not say.
  bool adds_bos() const { return adds_bos_; }

 private:
  class Pattern;

  PreTokenizer(const PreTokenizerFamily& family, bool ignore_merges, bool adds_bos);

  const PreTokenizerFamily* family_;
  bool ignore_merges_;
  bool adds_bos_;
  std::vector<std::shared_ptr<const Pattern>> patterns_;
};

}  // namespace lesskv
