#include "server/logprobs.h"

#include <fmt/format.h>

#include <algorithm>

#include "tokenizer/utf8.h"

namespace lesskv {
namespace {

using OrderedJson = nlohmann::ordered_json;

// JSON has no infinities; OpenAI says this of tokens that are hardly possible.
double Finite(double logprob) { return std::max(logprob, -9999.0); }

std::string TokenText(const TokenLogprob& token, std::string_view before_bytes) {
  if (ReplaceInvalidUtf8(token.text) == token.text) return token.text;
  std::string text(before_bytes);
  for (const char c : token.text) text += fmt::format("\\x{:02x}", static_cast<unsigned char>(c));
  return text;
}

OrderedJson ChatToken(const TokenLogprob& token) {
  OrderedJson bytes = nullptr;
  if (!token.special) {
    bytes = OrderedJson::array();
    for (const char c : token.text) bytes.push_back(static_cast<unsigned char>(c));
  }
  return {{"token", TokenText(token, "")}, {"logprob", Finite(token.logprob)}, {"bytes", std::move(bytes)}};
}

}  // namespace

OrderedJson ChatLogprobs(std::span<const GeneratedToken> tokens) {
  OrderedJson content = OrderedJson::array();
  for (const GeneratedToken& token : tokens) {
    OrderedJson entry = ChatToken(token);
    entry["top_logprobs"] = OrderedJson::array();
    for (const TokenLogprob& other : token.likeliest) entry["top_logprobs"].push_back(ChatToken(other));
    content.push_back(std::move(entry));
  }
  OrderedJson result;
  result["content"] = std::move(content);
  result["refusal"] = nullptr;
  return result;
}

OrderedJson CompletionLogprobs(std::span<const GeneratedToken> tokens) {
  OrderedJson result;
  for (const char* const key : {"tokens", "token_logprobs", "top_logprobs", "text_offset"})
    result[key] = OrderedJson::array();
  for (const GeneratedToken& token : tokens) {
    const auto text = [](const TokenLogprob& t) { return TokenText(t, "bytes:"); };
    result["tokens"].push_back(text(token));
    result["token_logprobs"].push_back(Finite(token.logprob));
    OrderedJson likeliest = OrderedJson::object();
    for (const TokenLogprob& other : token.likeliest)
      likeliest.emplace(text(other), Finite(other.logprob));  // of equal texts the likeliest
    likeliest.emplace(text(token), Finite(token.logprob));
    result["top_logprobs"].push_back(std::move(likeliest));
    result["text_offset"].push_back(token.offset);
  }
  return result;
}

}  // namespace lesskv
