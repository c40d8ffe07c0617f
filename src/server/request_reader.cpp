#include "server/request_reader.h"

#include <fmt/ranges.h>

#include <algorithm>
#include <atomic>
#include <charconv>
#include <cmath>
#include <ctime>
#include <limits>
#include <nlohmann/json.hpp>
#include <span>
#include <utility>

#include "base/error.h"
#include "format/gguf.h"  // Quoted
#include "format/json_reader.h"
#include "kvcache/spec.h"
#include "server/api.h"  // DumpJson

namespace lesskv {
namespace {

using Json = nlohmann::json;
using OrderedJson = nlohmann::ordered_json;

Json ParseBody(std::string_view body) {
  constexpr size_t kMostParts = 100000;  // each takes a hundred bytes of memory where the body has three
  const JsonExtent extent = MeasureJson(body);
  if (extent.levels > kMostJsonLevels)
    Fail(ErrorCode::kInvalidArgument, "the body nests arrays and objects deeper than {} levels", kMostJsonLevels);
  if (extent.parts > kMostParts)
    Fail(ErrorCode::kInvalidArgument, "the body has {} arrays and objects, at most {} are allowed", extent.parts,
         kMostParts);
  Json value;
  try {
    value = Json::parse(body);
  } catch (const Json::exception& error) {
    const std::string_view said = error.what();  // "[json.exception.parse_error.101] parse error at line 1, ..."
    Fail(ErrorCode::kInvalidArgument, "the body is not valid JSON: {}", said.substr(said.find(' ') + 1));
  }
  if (!value.is_object()) Fail(ErrorCode::kInvalidArgument, "the body is not a JSON object");
  return value;
}

// Fields that both kinds of texts have.
constexpr std::string_view kCommon[] = {"model",
                                        "stream",
                                        "stream_options",
                                        "stop",
                                        "seed",
                                        "temperature",
                                        "top_p",
                                        "top_k",
                                        "min_p",
                                        "repeat_penalty",
                                        "repeat_last_n",
                                        "max_tokens",
                                        "n",
                                        "kv_policy",
                                        "kv_stats",
                                        "cache_prompt",
                                        "protected_spans",
                                        "user",
                                        "prompt_cache_key",
                                        "safety_identifier",
                                        "frequency_penalty",
                                        "presence_penalty",
                                        "logit_bias",
                                        "ignore_eos"};

constexpr std::string_view kChat[] = {"messages", "max_completion_tokens", "logprobs", "top_logprobs",
                                      "response_format"};
constexpr std::string_view kCompletion[] = {"prompt", "logprobs"};

constexpr std::string_view kResponse[] = {"model",          "input",           "instructions", "max_output_tokens",
                                          "stream",         "store",           "stop",         "seed",
                                          "temperature",    "top_p",           "top_k",        "min_p",
                                          "repeat_penalty", "repeat_last_n",   "ignore_eos",   "kv_policy",
                                          "kv_stats",       "cache_prompt",    "protected_spans", "user",
                                          "prompt_cache_key", "safety_identifier"};

// What others offer and clients ask for, and what there is in its place.
constexpr std::pair<std::string_view, std::string_view> kOthers[] = {
    {"best_of", "texts are not compared; n gives all of them"},
    {"echo", "the prompt is not given back"},
    {"suffix", "texts go on at their ends only"},
    {"tools", "models call no tools here"},
    {"tool_choice", "models call no tools here"},
    {"tool_calls", "models call no tools here"},
    {"functions", "models call no functions here"},
    {"function_call", "models call no functions here"},
    {"response_format", "what is generated is not constrained"},
    {"grammar", "what is generated is not constrained"},
    {"json_schema", "what is generated is not constrained"},
    {"name", "templates know roles only"},
    {"modalities", "models write text only"},
    {"audio", "models write text only"}};

// Of these fields the values that ask for what is so anyway; many clients send them.
bool AsksForNothing(const std::string& key, const Json& value) {
  static const Json kNothing = {{"background", {false}},
                                {"best_of", {1}},
                                {"echo", {false}},
                                {"functions", {Json::array()}},
                                {"include", {Json::array()}},
                                {"include_obfuscation", {false}},
                                {"metadata", {Json::object()}},
                                {"modalities", {{"text"}}},
                                {"parallel_tool_calls", {false, true}},
                                {"service_tier", {"auto", "default"}},
                                {"store", {false}},
                                {"suffix", {""}},
                                {"text", {{{"format", {{"type", "text"}}}}}},
                                {"tool_choice", {"auto", "none"}},
                                {"tools", {Json::array()}},
                                {"truncation", {"disabled"}}};
  const auto field = kNothing.find(key);
  return value.is_null() || (field != kNothing.end() && std::ranges::find(*field, value) != field->end());
}

bool Has(std::span<const std::string_view> fields, std::string_view key) {
  return std::ranges::find(fields, key) != fields.end();
}

void CheckFields(const JsonReader& reader, std::span<const std::string_view> own,
                 std::span<const std::string_view> common = {}) {
  for (const auto& [key, value] : reader.value().items()) {
    if (Has(own, key) || Has(common, key) || AsksForNothing(key, value)) continue;
    const auto other = std::ranges::find(kOthers, key, [](const auto& pair) { return pair.first; });
    const bool known = other != std::end(kOthers);
    throw FieldError(ErrorCode::kInvalidArgument, reader.Field(key),
                     fmt::format("{}: {}: lesskv has no such field{}{}", reader.where(), Quoted(key), known ? ": " : "",
                                 known ? other->second : ""));
  }
}

// Reads one request. What it finds wrong is Error kBadFile of JsonReader's, or kInvalidArgument; both are 400.
class RequestReader {
 public:
  RequestReader(const Json& body, const ApiContext& context) : r_(body, "request"), c_(context) {}

  TextRequest Chat() {
    CheckFields(r_, kChat, kCommon);
    RequireTemplate();
    if (r_.Has("response_format") && r_.Object("response_format").Text("type") != "text")
      r_.Refuse("response_format", R"({"type": "text"}: what is generated is not constrained)");
    TextRequest request = ReadChat(Messages("messages"), TextForm::kChat);
    const bool logprobs = r_.TruthOr("logprobs", false);
    if (r_.Has("top_logprobs") && !logprobs) r_.Refuse("top_logprobs", "none without logprobs: true");
    if (logprobs) request.job.options.logprobs = Likeliest("top_logprobs", 20);
    return request;
  }

  TextRequest Response() {
    CheckFields(r_, kResponse);
    RequireTemplate();
    if (r_.TruthOr("store", false)) r_.Refuse("store", "false: nothing is kept under a response's name");
    std::vector<ChatMessage> messages;
    if (r_.Has("instructions")) messages.push_back({ChatRole::kSystem, r_.Text("instructions")});
    const Json* const input = r_.Find("input");
    if (input != nullptr && input->is_array())
      for (ChatMessage& message : Messages("input")) messages.push_back(std::move(message));
    else
      messages.push_back({ChatRole::kUser, r_.Text("input")});
    return ReadChat(messages, TextForm::kResponse);
  }

  // The conversation as the model reads it.
  std::string Template() {
    CheckFields(r_, std::span(kChat).first(1));
    RequireTemplate();
    std::string text;
    for (const ChatPiece& piece : c_.chat->Render(Messages("messages"))) text += piece.text;
    return text;
  }

  TextRequest Completion() {
    CheckFields(r_, kCompletion, kCommon);
    TextRequest request = Read(Prompt(), {});
    if (r_.Has("logprobs")) request.job.options.logprobs = Likeliest("logprobs", 5);
    return request;
  }

 private:
  TextRequest ReadChat(const std::vector<ChatMessage>& messages, TextForm form) {
    const ChatTokens tokens = EncodeConversation(c_.tokenizer, *c_.chat, messages);
    std::vector<ProtectedSpan> fixed;
    for (const TokenSpan& span : tokens.fixed)
      fixed.push_back({static_cast<int32_t>(span.begin), static_cast<int32_t>(span.end)});
    TextRequest request = Read(tokens.ids, fixed);
    if (!c_.chat->stop().empty()) request.job.options.stops.emplace_back(c_.chat->stop());
    request.form = form;
    return request;
  }

  void RequireTemplate() const {
    if (c_.chat == nullptr)
      Fail(ErrorCode::kInvalidArgument, "this model has no chat template; /v1/completions takes plain text");
  }

  TextRequest Read(std::vector<int32_t> prompt, const std::vector<ProtectedSpan>& fixed) {
    CheckModel();
    TextRequest request;
    request.stream = r_.TruthOr("stream", false);
    if (r_.Has("stream_options")) {
      if (!request.stream) r_.Refuse("stream_options", "none without stream");
      constexpr std::string_view kFields[] = {"include_usage"};
      CheckFields(r_.Object("stream_options"), kFields);
      request.include_usage = r_.Object("stream_options").TruthOr("include_usage", false);
    }
    for (const char* const unused : {"user", "prompt_cache_key", "safety_identifier"}) r_.TextOr(unused, "");  // must be texts
    request.job.choices = Choices();
    request.job.reuse = r_.TruthOr("cache_prompt", true);
    request.job.kv_every = KvEvery(request);
    CheckLength(prompt);
    request.job.options = Options(prompt.size());
    request.job.options.sampler.seed = Seed(request.job.choices);
    request.job.config = Config(prompt.size(), fixed);
    request.job.prompt = std::move(prompt);
    request.job.deadline = std::chrono::steady_clock::now() + c_.limits.max_time;
    return request;
  }

  // How many tokens are to be shown that might have come in the place of each; OpenAI's bounds.
  size_t Likeliest(const char* key, uint32_t most) const {
    const uint32_t n = r_.CountOr(key, 0);
    if (n > most) r_.Refuse(key, fmt::format("a number in [0, {}]", most));
    return n;
  }

  size_t Choices() const {
    const uint32_t n = r_.CountOr("n", 1);
    if (n < 1 || n > c_.limits.max_choices) r_.Refuse("n", fmt::format("a number in [1, {}]", c_.limits.max_choices));
    return n;
  }

  size_t KvEvery(const TextRequest& request) const {
    constexpr uint32_t kMost = 10000;
    if (!r_.Has("kv_stats")) return 0;
    if (request.job.choices > 1) r_.Refuse("kv_stats", "none with n above 1");
    const uint32_t every = r_.Count("kv_stats");
    if (!request.stream || every < 1 || every > kMost)
      r_.Refuse("kv_stats", fmt::format("tokens between two events of a stream, in [1, {}]", kMost));
    return every;
  }

  void CheckModel() const {
    if (r_.Has("model") && r_.Text("model") != c_.model_name)
      throw NoSuchModel(r_.Text("model"), c_.model_name);
  }

  void CheckLength(const std::vector<int32_t>& prompt) const {
    const std::string field(r_.AnyOf({"messages", "input", "prompt"}));
    if (prompt.empty()) throw FieldError(ErrorCode::kInvalidArgument, field, "the prompt is empty");
    const size_t most = std::min(c_.limits.max_prompt, c_.limits.ctx - 1);
    if (prompt.size() > most)
      throw RequestError(ErrorCode::kInvalidArgument, field, "context_length_exceeded",
                         fmt::format("the prompt has {} tokens, at most {} are allowed", prompt.size(), most));
  }

  std::vector<ChatMessage> Messages(const char* key) const {
    std::vector<ChatMessage> messages;
    for (const Json& item : r_.Array(key)) {
      if (!item.is_object()) r_.Refuse(key, "an array of objects");
      const JsonReader message(item, fmt::format("request: {}: {}", key, messages.size()));
      constexpr std::string_view kFields[] = {"role", "content", "type"};
      // Items of a response's input may be such as a response had, with all that it said of them.
      const bool strict = std::string_view(key) == "messages";
      if (strict) CheckFields(message, kFields);
      if (message.TextOr("type", "message") != "message") message.Refuse("type", "\"message\"");
      messages.push_back({Role(message), Content(message, strict)});
    }
    if (messages.empty()) r_.Refuse(key, "at least one");
    return messages;
  }

  static ChatRole Role(const JsonReader& message) {
    const std::string role = message.Text("role");
    if (role == "system" || role == "developer") return ChatRole::kSystem;
    if (role == "user") return ChatRole::kUser;
    if (role == "assistant") return ChatRole::kAssistant;
    message.Refuse("role", R"("system", "user" or "assistant")");
  }

  // A text, or an array of parts, which must be texts.
  static std::string Content(const JsonReader& message, bool strict) {
    const Json* const content = message.Find("content");
    if (content == nullptr || !content->is_array()) return message.Text("content");
    std::string text;
    for (size_t i = 0; i < content->size(); ++i) {
      const Json& part = (*content)[i];
      if (!part.is_object()) message.Refuse("content", "a text, or an array of parts");
      const JsonReader reader(part, fmt::format("{}: content: {}", message.where(), i));
      constexpr std::string_view kTexts[] = {"text", "input_text", "output_text"};
      if (!Has(kTexts, reader.Text("type"))) reader.Refuse("type", R"("text", "input_text" or "output_text")");
      constexpr std::string_view kFields[] = {"type", "text"};
      if (strict) CheckFields(reader, kFields);
      text += reader.Text("text");
    }
    return text;
  }

  // A text, or token ids; clients that know several prompts put the only one into an array.
  std::vector<int32_t> Prompt() const {
    const Json* const prompt = r_.Find("prompt");
    const bool several = prompt != nullptr && prompt->is_array() && !prompt->empty() && !prompt->front().is_number();
    if (!several) return PromptOf(r_);
    if (prompt->size() != 1)
      r_.Refuse("prompt", "one text, or the token ids of one: several prompts are several requests");
    const Json only = {{"prompt", prompt->front()}};
    return PromptOf(JsonReader(only, r_.where()));
  }

  std::vector<int32_t> PromptOf(const JsonReader& reader) const {
    const Json* const prompt = reader.Find("prompt");
    if (prompt == nullptr || !prompt->is_array()) return c_.tokenizer.Encode(reader.Text("prompt"), true, true);
    return Ids(reader, "prompt", c_.tokenizer);
  }

 public:
  static std::vector<int32_t> Ids(const JsonReader& reader, const char* key, const Tokenizer& tokenizer) {
    std::vector<int32_t> ids;
    for (const Json& id : reader.Array(key)) {
      if (!id.is_number_unsigned() || id.get<uint64_t>() >= tokenizer.size())
        reader.Refuse(key, fmt::format("token ids below {}", tokenizer.size()),
                      Quoted(id.dump(-1, ' ', true, Json::error_handler_t::replace)));
      ids.push_back(id.get<int32_t>());
    }
    return ids;
  }

 private:
  float Number(const char* key, float fallback) const { return static_cast<float>(r_.RealOr(key, fallback)); }

  int32_t Whole(const char* key, int32_t fallback) const {
    const double value = r_.RealOr(key, fallback);
    if (value != std::floor(value) || std::abs(value) > std::numeric_limits<int32_t>::max())
      r_.Refuse(key, "a whole number of 32 bits");
    return static_cast<int32_t>(value);
  }

  GenerationOptions Options(size_t n_prompt) const {
    GenerationOptions options;
    SamplerOptions& s = options.sampler;
    s.temperature = Number("temperature", 1.0f);  // as OpenAI's
    s.top_p = Number("top_p", 1.0f);
    s.top_k = Whole("top_k", 0);
    s.min_p = Number("min_p", 0.0f);
    s.repeat_penalty = Number("repeat_penalty", 1.0f);
    s.repeat_last_n = Whole("repeat_last_n", s.repeat_last_n);
    s.frequency_penalty = Number("frequency_penalty", 0.0f);
    s.presence_penalty = Number("presence_penalty", 0.0f);
    s.logit_bias = Biases();
    options.ignore_end = r_.TruthOr("ignore_eos", false);
    options.stops = Stops();
    options.max_tokens = MaxTokens(n_prompt);
    CheckOptions(options);
    return options;
  }

  // The engine names options as the command line does: "--top-p: expected ...".
  void CheckOptions(const GenerationOptions& options) const {
    try {
      Validate(options);
    } catch (const Error& error) {
      const std::string_view said = error.what();
      const size_t colon = said.find(": ");
      if (!said.starts_with("--") || colon == std::string_view::npos) throw;
      std::string field(said.substr(2, colon - 2));
      std::ranges::replace(field, '-', '_');
      if (field == "temp") field = "temperature";
      throw FieldError(error.code(), field, fmt::format("{}: {}{}", r_.where(), field, said.substr(colon)));
    }
  }

  // {"TOKEN ID": BIAS, ...}
  std::vector<TokenBias> Biases() const {
    std::vector<TokenBias> biases;
    if (!r_.Has("logit_bias")) return biases;
    const JsonReader map = r_.Object("logit_bias");
    for (const auto& [key, value] : map.value().items()) {
      uint32_t id = 0;
      const auto [end, error] = std::from_chars(key.data(), key.data() + key.size(), id);
      if (error != std::errc() || end != key.data() + key.size() || id >= c_.tokenizer.size())
        r_.Refuse("logit_bias", fmt::format("keys that are token ids below {}", c_.tokenizer.size()), Quoted(key));
      const double bias = map.Real(key);
      if (std::abs(bias) > 100) map.Refuse(key, "a number in [-100, 100]");
      biases.push_back({static_cast<int32_t>(id), static_cast<float>(bias)});
    }
    return biases;
  }

  // That of the first choice; the others have the next ones. Without one, every request has others.
  uint64_t Seed(size_t n_choices) const {
    static std::atomic<uint64_t> next = static_cast<uint64_t>(std::time(nullptr)) << 20;
    if (!r_.Has("seed")) return next.fetch_add(n_choices);
    const Json& seed = *r_.Find("seed");
    if (!seed.is_number_integer()) r_.Refuse("seed", "a whole number of 64 bits");
    return seed.is_number_unsigned() ? seed.get<uint64_t>() : static_cast<uint64_t>(seed.get<int64_t>());
  }

  std::vector<std::string> Stops() const {
    constexpr size_t kMost = 16, kLongest = 1024;
    std::vector<std::string> stops;
    if (!r_.Has("stop")) return stops;
    const Json stop = *r_.Find("stop");
    for (const Json& text : stop.is_array() ? stop : Json::array({stop})) {
      if (!text.is_string() || text.get<std::string>().empty() || text.get<std::string>().size() > kLongest ||
          stops.size() == kMost)
        r_.Refuse("stop", fmt::format("up to {} texts of 1 to {} bytes", kMost, kLongest));
      stops.push_back(text.get<std::string>());
    }
    return stops;
  }

  size_t MaxTokens(size_t n_prompt) const {
    const std::string_view key = r_.AnyOf({"max_completion_tokens", "max_output_tokens", "max_tokens"});
    const size_t room = c_.limits.ctx - n_prompt, most = std::min(c_.limits.max_output, room);
    if (!r_.Has(key)) return most;
    const uint32_t wanted = r_.Count(key);
    if (wanted < 1 || wanted > c_.limits.max_output)
      r_.Refuse(key, fmt::format("a number in [1, {}]", c_.limits.max_output));
    return std::min<size_t>(wanted, room);
  }

  // What the operator allows, without protected spans.
  const CacheConfig& Allowed() const {
    if (!r_.Has("kv_policy")) return *c_.limits.configs[0];
    const std::string spec = Policy(r_.Text("kv_policy")).ToString();
    const std::vector<std::string> allowed = c_.limits.Specs();
    const auto found = std::ranges::find(allowed, spec);
    if (found == allowed.end())
      r_.Refuse("kv_policy", fmt::format("one that the operator allows: {}", fmt::join(allowed, ", ")));
    return *c_.limits.configs[static_cast<size_t>(found - allowed.begin())];
  }

  static CacheSpec Policy(const std::string& text) {
    try {
      return CacheSpec::Parse(text);
    } catch (const Error& error) {
      throw FieldError(error.code(), "kv_policy", error.what());
    }
  }

  // The client's spans fit or are refused. `fixed`, which nobody asked for, gives way: where it does not fit, its first
  // tokens are protected, in half of the rows that it could have, so that the method still has rows to choose.
  std::shared_ptr<const CacheConfig> Config(size_t n_prompt, const std::vector<ProtectedSpan>& fixed) const {
    const CacheConfig& allowed = Allowed();
    const std::vector<ProtectedSpan> asked = AskedSpans(n_prompt);
    const auto make = [&](size_t n_fixed) {
      std::vector<ProtectedSpan> spans = FirstOf(fixed, n_fixed);
      spans.insert(spans.end(), asked.begin(), asked.end());
      return allowed.WithProtected(std::move(spans));
    };
    const auto fits = [&](size_t n_fixed) {
      try {
        return make(n_fixed) != nullptr;
      } catch (const Error&) {
        return false;
      }
    };
    const size_t n = ProtectedSet(fixed).size();
    if (n == 0 || fits(n)) return make(n);
    size_t most = 0;
    for (size_t end = n; end - most > 1;) {
      const size_t middle = most + (end - most) / 2;
      (fits(middle) ? most : end) = middle;
    }
    return make(most / 2);
  }

  // The spans' first n tokens.
  static std::vector<ProtectedSpan> FirstOf(const std::vector<ProtectedSpan>& spans, size_t n) {
    std::vector<ProtectedSpan> first;
    for (const ProtectedSpan& span : spans) {
      const auto taken = static_cast<int32_t>(std::min(n, static_cast<size_t>(span.end - span.begin)));
      if (taken > 0) first.push_back({span.begin, span.begin + taken});
      n -= static_cast<size_t>(taken);
    }
    return first;
  }

  // [[begin, end], ...], half-open positions of the prompt's tokens.
  std::vector<ProtectedSpan> AskedSpans(size_t n_prompt) const {
    std::vector<ProtectedSpan> spans;
    if (!r_.Has("protected_spans")) return spans;
    size_t total = 0;
    for (const Json& item : r_.Array("protected_spans")) {
      const bool pair =
          item.is_array() && item.size() == 2 && item[0].is_number_unsigned() && item[1].is_number_unsigned();
      const uint64_t begin = pair ? item[0].get<uint64_t>() : 0, end = pair ? item[1].get<uint64_t>() : 0;
      if (begin >= end || end > n_prompt)
        r_.Refuse("protected_spans", fmt::format("pairs [begin, end) of the prompt's {} tokens", n_prompt),
                  Quoted(item.dump()));
      total += end - begin;
      if (total > c_.limits.max_protected)
        r_.Refuse("protected_spans", fmt::format("at most {} tokens", c_.limits.max_protected), "more");
      spans.push_back({static_cast<int32_t>(begin), static_cast<int32_t>(end)});
    }
    return spans;
  }

  const JsonReader r_;
  const ApiContext& c_;
};

}  // namespace

std::vector<std::string> ApiLimits::Specs() const {
  std::vector<std::string> specs;
  for (const auto& config : configs) specs.push_back(config->spec().ToString());
  return specs;
}

RequestError NoSuchModel(const std::string& asked, const std::string& served) {
  return {ErrorCode::kNotFound, "model", "model_not_found",
          fmt::format("there is no model {}, only {}", Quoted(asked), Quoted(served))};
}

TextRequest ParseChatRequest(std::string_view body, const ApiContext& context) {
  const Json json = ParseBody(body);
  return RequestReader(json, context).Chat();
}

TextRequest ParseCompletionRequest(std::string_view body, const ApiContext& context) {
  const Json json = ParseBody(body);
  return RequestReader(json, context).Completion();
}

TextRequest ParseResponseRequest(std::string_view body, const ApiContext& context) {
  const Json json = ParseBody(body);
  return RequestReader(json, context).Response();
}

std::vector<std::string> RequestFields(TextForm form) {
  if (form == TextForm::kResponse) return {std::begin(kResponse), std::end(kResponse)};
  std::vector<std::string> fields(std::begin(kCommon), std::end(kCommon));
  const std::span<const std::string_view> own =
      form == TextForm::kChat ? std::span<const std::string_view>(kChat) : kCompletion;
  fields.insert(fields.end(), own.begin(), own.end());
  return fields;
}

std::string Tokenize(std::string_view body, const ApiContext& context) {
  const Json json = ParseBody(body);
  const JsonReader reader(json, "request");
  constexpr std::string_view kFields[] = {"content", "add_special", "parse_special"};
  CheckFields(reader, kFields);
  OrderedJson answer;
  answer["tokens"] = context.tokenizer.Encode(reader.Text("content"), reader.TruthOr("add_special", false),
                                              reader.TruthOr("parse_special", true));
  return DumpJson(answer);
}

std::string Detokenize(std::string_view body, const ApiContext& context) {
  const Json json = ParseBody(body);
  const JsonReader reader(json, "request");
  constexpr std::string_view kFields[] = {"tokens"};
  CheckFields(reader, kFields);
  const std::vector<int32_t> ids = RequestReader::Ids(reader, "tokens", context.tokenizer);
  OrderedJson answer;
  answer["content"] = context.tokenizer.Decode(ids, false);
  return DumpJson(answer);
}

std::string ApplyTemplate(std::string_view body, const ApiContext& context) {
  const Json json = ParseBody(body);
  OrderedJson answer;
  answer["prompt"] = RequestReader(json, context).Template();
  return DumpJson(answer);
}

}  // namespace lesskv
