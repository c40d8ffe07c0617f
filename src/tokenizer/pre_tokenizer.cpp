#include "tokenizer/pre_tokenizer.h"

#define PCRE2_CODE_UNIT_WIDTH 8
#include <fmt/ranges.h>
#include <pcre2.h>

#include <array>
#include <limits>
#include <span>

#include "base/check.h"
#include "base/error.h"
#include "format/gguf.h"

namespace lesskv {

struct PreTokenizerFamily {
  std::string_view name;
  std::span<const std::string_view> patterns;
};

namespace {

// The patterns that the models' own tokenizer files give. Radford et al. 2019 is the first, the others descend from it.
constexpr std::string_view kGpt2Pattern =
    R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";
constexpr std::string_view kLlama3Pattern =
    R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|)"
    R"(\s+(?!\S)|\s+)";
constexpr std::string_view kQwen2Pattern =
    R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|)"
    R"(\s+(?!\S)|\s+)";

constexpr std::array kGpt2 = {kGpt2Pattern};
constexpr std::array kLlama3 = {kLlama3Pattern};
constexpr std::array kQwen2 = {kQwen2Pattern};
constexpr std::array kSmolLm = {std::string_view(R"(\p{N})"), kGpt2Pattern};
constexpr std::array kFalcon = {std::string_view(R"([\p{P}$+<=>^~|`]+)"), kGpt2Pattern,
                                std::string_view("[0-9][0-9][0-9]")};
constexpr std::array kDefault = {std::string_view(R"([\p{P}$+<=>^~|]+)"), kGpt2Pattern, std::string_view(R"(\p{N}+)"),
                                 std::string_view("[0-9][0-9][0-9]")};

constexpr PreTokenizerFamily kGpt2Family = {"gpt-2", kGpt2};
constexpr PreTokenizerFamily kLlama3Family = {"llama-bpe", kLlama3};
constexpr PreTokenizerFamily kQwen2Family = {"qwen2", kQwen2};
constexpr PreTokenizerFamily kSmolLmFamily = {"smollm", kSmolLm};
constexpr PreTokenizerFamily kFalconFamily = {"falcon", kFalcon};
constexpr PreTokenizerFamily kDefaultFamily = {"default", kDefault};

struct NamedFamily {
  std::string_view name;
  const PreTokenizerFamily* family;
  bool llama3_defaults = false;
};

// The names llama.cpp knows for these patterns. Its other names are for patterns that no supported model uses.
constexpr NamedFamily kNames[] = {
    {"default", &kDefaultFamily},
    {"gpt-2", &kGpt2Family},
    {"gpt-neox", &kGpt2Family},
    {"phi-2", &kGpt2Family},
    {"mpt", &kGpt2Family},
    {"olmo", &kGpt2Family},
    {"jais", &kGpt2Family},
    {"gigachat", &kGpt2Family},
    {"exaone4", &kGpt2Family},
    {"a.x-4.0", &kGpt2Family},
    {"mellum", &kGpt2Family},
    {"llama-bpe", &kLlama3Family, true},
    {"llama3", &kLlama3Family, true},
    {"llama-v3", &kLlama3Family, true},
    {"falcon3", &kLlama3Family, true},
    {"dbrx", &kLlama3Family},
    {"smaug-bpe", &kLlama3Family},
    {"qwen2", &kQwen2Family},
    {"deepseek-r1-qwen", &kQwen2Family},
    {"megrez", &kQwen2Family},
    {"stablelm2", &kQwen2Family},
    {"smollm", &kSmolLmFamily},
    {"starcoder", &kSmolLmFamily},
    {"refact", &kSmolLmFamily},
    {"command-r", &kSmolLmFamily},
    {"codeshell", &kSmolLmFamily},
    {"exaone", &kSmolLmFamily},
    {"minerva-7b", &kSmolLmFamily},
    {"falcon", &kFalconFamily},
};

// \s and \S as the Unicode property White_Space: PCRE2's own \s also holds U+180E, which the models' tokenizers do not.
std::string WithUnicodeWhitespace(std::string_view pattern) {
  std::string result;
  for (size_t i = 0; i < pattern.size(); ++i) {
    const std::string_view escape = pattern.substr(i, 2);
    if (escape == R"(\s)" || escape == R"(\S)") {
      result += escape[1] == 's' ? R"(\p{White_Space})" : R"(\P{White_Space})";
      ++i;
    } else {
      result += pattern[i];
    }
  }
  return result;
}

template <auto Free>
struct Deleter {
  template <typename T>
  void operator()(T* object) const {
    Free(object);
  }
};
using CodePtr = std::unique_ptr<pcre2_code, Deleter<pcre2_code_free>>;
using MatchDataPtr = std::unique_ptr<pcre2_match_data, Deleter<pcre2_match_data_free>>;
using MatchContextPtr = std::unique_ptr<pcre2_match_context, Deleter<pcre2_match_context_free>>;

CodePtr Compile(std::string_view pattern) {
  const std::string text = WithUnicodeWhitespace(pattern);
  int error = 0;
  PCRE2_SIZE offset = 0;
  CodePtr code(pcre2_compile(reinterpret_cast<PCRE2_SPTR>(text.data()), text.size(), PCRE2_UTF | PCRE2_UCP, &error,
                             &offset, nullptr));
  CHECK(code != nullptr, "pattern {} does not compile: error {} at {}", text, error, offset);
  pcre2_jit_compile(code.get(), PCRE2_JIT_COMPLETE);  // where it is not possible, pcre2_match interprets the pattern
  return code;
}

}  // namespace

// One compiled pattern; matching is const and allocates what it needs.
class PreTokenizer::Pattern {
 public:
  explicit Pattern(std::string_view text) : code_(Compile(text)), context_(pcre2_match_context_create(nullptr)) {
    CHECK(context_ != nullptr);
    // The patterns are ours and take linear time: no limit is needed, and long runs of spaces must not hit one.
    pcre2_set_match_limit(context_.get(), std::numeric_limits<uint32_t>::max());
    pcre2_set_heap_limit(context_.get(), std::numeric_limits<uint32_t>::max());
  }

  // Appends the matches in each of `pieces`, and what lies between them, to `result`.
  void Split(const std::vector<std::string_view>& pieces, std::vector<std::string_view>& result) const {
    const MatchDataPtr match(pcre2_match_data_create_from_pattern(code_.get(), nullptr));
    CHECK(match != nullptr);
    for (const std::string_view piece : pieces) SplitPiece(piece, match.get(), result);
  }

 private:
  void SplitPiece(std::string_view piece, pcre2_match_data* match, std::vector<std::string_view>& result) const {
    const auto append = [&](size_t begin, size_t end) {
      if (begin < end) result.push_back(piece.substr(begin, end - begin));
    };
    size_t done = 0;
    while (done < piece.size()) {
      // The text is known to be well-formed; checking it again at every match would take quadratic time.
      const int rc = pcre2_match(code_.get(), reinterpret_cast<PCRE2_SPTR>(piece.data()), piece.size(), done,
                                 PCRE2_NO_UTF_CHECK, match, context_.get());
      if (rc == PCRE2_ERROR_NOMATCH) break;
      if (rc < 0) Fail(ErrorCode::kRuntime, "splitting {} bytes of text failed with PCRE2 error {}", piece.size(), rc);
      const PCRE2_SIZE* const span = pcre2_get_ovector_pointer(match);
      CHECK(span[0] >= done && span[1] > span[0] && span[1] <= piece.size(), "a pattern matched nothing");
      append(done, span[0]);
      append(span[0], span[1]);
      done = span[1];
    }
    append(done, piece.size());
  }

  CodePtr code_;
  MatchContextPtr context_;
};

PreTokenizer::PreTokenizer(const PreTokenizerFamily& family, bool with_llama3_defaults)
    : family_(&family), llama3_defaults_(with_llama3_defaults) {
  for (const std::string_view pattern : family.patterns) patterns_.push_back(std::make_shared<const Pattern>(pattern));
}

PreTokenizer PreTokenizer::ForName(std::string_view name, const std::string& file) {
  if (name.empty()) name = "default";
  for (const NamedFamily& known : kNames) {
    if (known.name == name) return PreTokenizer(*known.family, known.llama3_defaults);
  }
  Fail(ErrorCode::kBadFile, "{}: the pre-tokenizer {} is not known; known are {}", file, Quoted(name),
       fmt::join(Names(), ", "));
}

std::vector<std::string_view> PreTokenizer::Names() {
  std::vector<std::string_view> names;
  for (const NamedFamily& known : kNames) names.push_back(known.name);
  return names;
}

std::vector<std::string_view> PreTokenizer::Split(std::string_view text) const {
  std::vector<std::string_view> pieces;
  if (!text.empty()) pieces.push_back(text);
  std::vector<std::string_view> next;
  for (const auto& pattern : patterns_) {
    next.clear();
    pattern->Split(pieces, next);
    pieces.swap(next);
  }
  return pieces;
}

std::string_view PreTokenizer::family() const { return family_->name; }
bool PreTokenizer::ignore_merges() const { return llama3_defaults_; }
bool PreTokenizer::adds_bos() const { return llama3_defaults_; }

}  // namespace lesskv
