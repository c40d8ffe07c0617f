#include "tokenizer/pre_tokenizer.h"

#define PCRE2_CODE_UNIT_WIDTH 8
#include <fmt/ranges.h>
#include <pcre2.h>

#include <algorithm>
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

// The patterns that the models' own tokenizer files give. kGpt2Pattern (Radford et al. 2019) is the first, the others
// descend from it.
constexpr std::string_view kLlama3Pattern =
    R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|)"
    R"(\s+(?!\S)|\s+)";
constexpr std::string_view kQwen2Pattern =
    R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|)"
    R"(\s+(?!\S)|\s+)";

constexpr std::string_view kQwen35Pattern =
    R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|)"
    R"(\s+(?!\S)|\s+)";
constexpr std::string_view kSeedCoderPattern =
    R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1}| ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+|)"
    R"(\s+(?!\S)|\s+)";
constexpr std::string_view kMiniCpm5Pattern =
    R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}+| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|)"
    R"(\s+(?!\S)|\s+)";
constexpr std::string_view kUfakzekaPattern =
    R"([^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)";

// A word is upper case, then lower case: "camelCase" is two. Mistral's Tekken and OpenAI's o200k differ in digits and
// contractions.
constexpr std::string_view kTekkenPattern =
    R"([^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|)"
    R"([^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|)"
    R"(\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+)";
constexpr std::string_view kGpt4oPattern =
    R"([^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|)"
    R"([^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|)"
    R"(\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+)";

// DeepSeek's first tokenizer lists its letters: Latin, Greek, Cyrillic, Georgian, Cherokee and others that have case,
// as some Unicode version had them; Armenian without its small letters.
constexpr std::string_view kDeepSeekLlmLetters =
    R"(\s?[A-Za-z\x{B5}\x{C0}-\x{D6}\x{D8}-\x{F6}\x{F8}-\x{1BA}\x{1BC}-\x{1BF}\x{1C4}-\x{293}\x{295}-\x{2AF})"
    R"(\x{370}-\x{373}\x{376}\x{377}\x{37B}-\x{37D}\x{37F}\x{386}\x{388}-\x{38A}\x{38C}\x{38E}-\x{3A1}\x{3A3}-\x{3F5})"
    R"(\x{3F7}-\x{481}\x{48A}-\x{52F}\x{531}-\x{556}\x{10A0}-\x{10C5}\x{13A0}-\x{13F5}\x{13F8}-\x{13FD})"
    R"(\x{1C90}-\x{1CBA}\x{1CBD}-\x{1CBF}\x{1D00}-\x{1D2B}\x{1D6B}-\x{1D77}\x{1D79}-\x{1D9A}\x{1E00}-\x{1F15})"
    R"(\x{1F18}-\x{1F1D}\x{1F20}-\x{1F45}\x{1F48}-\x{1F4D}\x{1F50}-\x{1F57}\x{1F59}\x{1F5B}\x{1F5D}\x{1F5F}-\x{1F7D})"
    R"(\x{1F80}-\x{1FB4}\x{1FB6}-\x{1FBC}\x{1FBE}\x{1FC2}-\x{1FC4}\x{1FC6}-\x{1FCC}\x{1FD0}-\x{1FD3}\x{1FD6}-\x{1FDB})"
    R"(\x{1FE0}-\x{1FEC}\x{1FF2}-\x{1FF4}\x{1FF6}-\x{1FFC}\x{2102}\x{2107}\x{210A}-\x{2113}\x{2115}\x{2119}-\x{211D})"
    R"(\x{2124}\x{2126}\x{2128}\x{212A}-\x{212D}\x{212F}-\x{2134}\x{2139}\x{213C}-\x{213F}\x{2145}-\x{2149}\x{214E})"
    R"(\x{2183}\x{2184}\x{2C00}-\x{2C7B}\x{2C7E}-\x{2CE4}\x{2CEB}-\x{2CEE}\x{2CF2}\x{2CF3}\x{A640}-\x{A66D})"
    R"(\x{A680}-\x{A69B}\x{A722}-\x{A76F}\x{A771}-\x{A787}\x{A78B}-\x{A78E}\x{AB70}-\x{ABBF}\x{FB00}-\x{FB06})"
    R"(\x{FB13}-\x{FB17}\x{FF21}-\x{FF3A}\x{FF41}-\x{FF5A}\x{10400}-\x{1044F}\x{104B0}-\x{104D3}\x{104D8}-\x{104FB})"
    R"(\x{10C80}-\x{10CB2}\x{10CC0}-\x{10CF2}\x{118A0}-\x{118DF}\x{1E900}-\x{1E943}]+)";
constexpr std::string_view kDeepSeekLlmPunctuation =
    R"(\s?[!-/:-~\x{FF01}-\x{FF0F}\x{FF1A}-\x{FF5E}\x{2018}-\x{201F}\x{3000}-\x{3002}]+)";
// "\s+$", written so that it is not tried again at every space of a long run.
constexpr std::string_view kSpacesAtEnd = R"((?<!\s)\s++$)";
constexpr std::string_view kDeepSeekCjk = R"([\x{4E00}-\x{9FA5}\x{800}-\x{4E00}\x{AC00}-\x{D7FF}]+)";
constexpr std::string_view kDeepSeekV3Pattern =
    R"([!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|)"
    R"(\s*[\r\n]+|\s+(?!\S)|\s+)";

constexpr std::string_view kNewline = R"([\r\n])", kUpTo3Digits = R"(\p{N}{1,3})",
                           k3AsciiDigits = "[0-9][0-9][0-9]";

constexpr std::array kGpt2 = {kGpt2Pattern};
constexpr std::array kLlama3 = {kLlama3Pattern};
constexpr std::array kQwen2 = {kQwen2Pattern};
constexpr std::array kQwen35 = {kQwen35Pattern};
constexpr std::array kSmolLm = {kDigitPattern, kGpt2Pattern};
constexpr std::array kFalcon = {kPunctuationPattern, kGpt2Pattern, k3AsciiDigits};
constexpr std::array kDefault = {std::string_view(R"([\p{P}$+<=>^~|]+)"), kGpt2Pattern, std::string_view(R"(\p{N}+)"),
                                 k3AsciiDigits};
constexpr std::array kTekken = {kTekkenPattern};
constexpr std::array kGpt4o = {kGpt4oPattern};
constexpr std::array kSeedCoder = {kSeedCoderPattern};
constexpr std::array kMiniCpm5 = {kUpTo3Digits, kMiniCpm5Pattern};
constexpr std::array kUfakzeka = {kUfakzekaPattern};
constexpr std::array kDeepSeekLlm = {kNewline,     kDeepSeekLlmLetters, kDeepSeekLlmPunctuation,
                                     kSpacesAtEnd, kDeepSeekCjk,        kDigitPattern};
constexpr std::array kDeepSeekCoder = {kNewline, std::string_view(R"(\s?\p{L}+)"), std::string_view(R"(\s?\p{P}+)"),
                                       kDeepSeekCjk, kDigitPattern};
constexpr std::array kDeepSeekV3 = {
    kUpTo3Digits, std::string_view(R"([\x{4E00}-\x{9FA5}\x{3040}-\x{309F}\x{30A0}-\x{30FF}]+)"), kDeepSeekV3Pattern};
constexpr std::array kViking = {std::string_view(R"( ?[^(\s|.,!?…。，、।۔،)]+)"), kDigitPattern};

constexpr PreTokenizerFamily kGpt2Family = {"gpt-2", kGpt2};
constexpr PreTokenizerFamily kLlama3Family = {"llama-bpe", kLlama3};
constexpr PreTokenizerFamily kQwen2Family = {"qwen2", kQwen2};
constexpr PreTokenizerFamily kQwen35Family = {"qwen35", kQwen35};
constexpr PreTokenizerFamily kSmolLmFamily = {"smollm", kSmolLm};
constexpr PreTokenizerFamily kFalconFamily = {"falcon", kFalcon};
constexpr PreTokenizerFamily kDefaultFamily = {"default", kDefault};
constexpr PreTokenizerFamily kTekkenFamily = {"tekken", kTekken};
constexpr PreTokenizerFamily kGpt4oFamily = {"gpt-4o", kGpt4o};
constexpr PreTokenizerFamily kSeedCoderFamily = {"seed-coder", kSeedCoder};
constexpr PreTokenizerFamily kMiniCpm5Family = {"minicpm5", kMiniCpm5};
constexpr PreTokenizerFamily kUfakzekaFamily = {"ufakzeka", kUfakzeka};
constexpr PreTokenizerFamily kDeepSeekLlmFamily = {"deepseek-llm", kDeepSeekLlm};
constexpr PreTokenizerFamily kDeepSeekCoderFamily = {"deepseek-coder", kDeepSeekCoder};
constexpr PreTokenizerFamily kDeepSeekV3Family = {"deepseek-v3", kDeepSeekV3};
constexpr PreTokenizerFamily kVikingFamily = {"viking", kViking};

struct NamedFamily {
  std::string_view name;
  const PreTokenizerFamily* family;
  bool ignore_merges = false;
  bool adds_bos = false;
};

// The names by which llama.cpp knows these patterns, and its defaults. Its other names are for patterns that no model
// of a supported architecture uses (superbpe, kimi-k2, afmoe, exaone-moe, youtu, ...); they are refused.
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
    {"trillion", &kGpt2Family},
    {"granite-docling", &kGpt2Family},
    {"llama-bpe", &kLlama3Family, true, true},
    {"llama3", &kLlama3Family, true, true},
    {"llama-v3", &kLlama3Family, true, true},
    {"falcon3", &kLlama3Family, true, true},
    {"falcon-h1", &kLlama3Family, true, true},
    {"pixtral", &kLlama3Family, true, true},
    {"midm-2.0", &kLlama3Family, true, true},
    {"lfm2", &kLlama3Family, true, true},
    {"dbrx", &kLlama3Family},
    {"smaug-bpe", &kLlama3Family},
    {"chatglm-bpe", &kLlama3Family},
    {"glm4", &kLlama3Family},
    {"qwen2", &kQwen2Family},
    {"deepseek-r1-qwen", &kQwen2Family},
    {"megrez", &kQwen2Family},
    {"stablelm2", &kQwen2Family},
    {"hunyuan", &kQwen2Family},
    {"kormo", &kQwen2Family},
    {"f2llmv2", &kQwen2Family},
    {"solar-open", &kQwen2Family},
    {"grok-2", &kQwen2Family},
    {"qwen35", &kQwen35Family},
    {"smollm", &kSmolLmFamily},
    {"starcoder", &kSmolLmFamily},
    {"refact", &kSmolLmFamily},
    {"command-r", &kSmolLmFamily},
    {"codeshell", &kSmolLmFamily},
    {"exaone", &kSmolLmFamily},
    {"minerva-7b", &kSmolLmFamily},
    {"mellum2", &kSmolLmFamily},
    {"falcon", &kFalconFamily},
    {"tekken", &kTekkenFamily, true, true},
    {"gpt-4o", &kGpt4oFamily},
    {"llama4", &kGpt4oFamily},
    {"kanana2", &kGpt4oFamily},
    {"seed-coder", &kSeedCoderFamily},
    {"minicpm5", &kMiniCpm5Family, true},
    {"ufakzeka", &kUfakzekaFamily},
    {"deepseek-llm", &kDeepSeekLlmFamily},
    {"deepseek-coder", &kDeepSeekCoderFamily},
    {"deepseek-v3", &kDeepSeekV3Family},
    {"hunyuan-dense", &kDeepSeekV3Family},
    {"joyai-llm", &kDeepSeekV3Family},
    {"viking", &kVikingFamily},
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

PreTokenizer::PreTokenizer(const PreTokenizerFamily& family, bool ignore_merges, bool adds_bos)
    : family_(&family), ignore_merges_(ignore_merges), adds_bos_(adds_bos) {
  for (const std::string_view pattern : family.patterns) patterns_.push_back(std::make_shared<const Pattern>(pattern));
}

PreTokenizer PreTokenizer::ForName(std::string_view name, const std::string& file) {
  if (name.empty()) name = "default";
  for (const NamedFamily& known : kNames) {
    if (known.name == name) return PreTokenizer(*known.family, known.ignore_merges, known.adds_bos);
  }
  Fail(ErrorCode::kBadFile, "{}: the pre-tokenizer {} is not known; known are {}", file, Quoted(name),
       fmt::join(Names(), ", "));
}

std::optional<std::string_view> PreTokenizer::FindName(std::span<const std::string> patterns, bool ignore_merges) {
  for (const NamedFamily& known : kNames) {
    if (known.ignore_merges == ignore_merges && std::ranges::equal(known.family->patterns, patterns)) return known.name;
  }
  return std::nullopt;
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

}  // namespace lesskv
