#include "server/api.h"

#include <algorithm>
#include <atomic>
#include <ctime>
#include <utility>

#include "base/error.h"
#include "server/logprobs.h"

namespace lesskv {
namespace {

using OrderedJson = nlohmann::ordered_json;

std::string NextId(TextForm form) {
  static std::atomic<uint64_t> next = 1;
  return fmt::format("{}-{:x}-{}",
                     form == TextForm::kChat       ? "chatcmpl"
                     : form == TextForm::kResponse ? "resp"
                                                   : "cmpl",
                     static_cast<uint64_t>(std::time(nullptr)), next++);
}

const char* FinishText(FinishReason reason) {
  return reason == FinishReason::kEndOfText || reason == FinishReason::kStopString ? "stop" : "length";
}

}  // namespace

OrderedJson TextOrNull(const std::string& text) { return text.empty() ? OrderedJson() : OrderedJson(text); }

std::string DumpJson(const OrderedJson& value) {
  return value.dump(-1, ' ', false, OrderedJson::error_handler_t::replace);
}

OrderedJson ApiError::Body() const {
  return {{"error", {{"message", message}, {"type", type}, {"param", TextOrNull(param)}, {"code", TextOrNull(code)}}}};
}

std::vector<std::pair<std::string, std::string>> ApiError::Headers() const {
  if (status == 401) return {{"WWW-Authenticate", "Bearer"}};
  if (status == 429 || status == 503) return {{"Retry-After", "1"}};
  return {};
}

ApiError ToApiError(const Error& error) {
  if (const auto* const busy = dynamic_cast<const BusyError*>(&error))
    return busy->stopping() ? ApiError{503, "server_error", error.what()}
                            : ApiError{429, "rate_limit_error", error.what(), {}, "rate_limit_exceeded"};
  std::string param, code;
  if (const auto* const field = dynamic_cast<const FieldError*>(&error)) param = field->field();
  if (const auto* const request = dynamic_cast<const RequestError*>(&error)) code = request->name();
  switch (error.code()) {
    case ErrorCode::kInvalidArgument:
    case ErrorCode::kBadFile:
    case ErrorCode::kMismatch:
      return {400, "invalid_request_error", error.what(), param, code};
    case ErrorCode::kNotFound:
      return {404, "not_found_error", error.what(), param, code};
    case ErrorCode::kOutOfMemory:
      return {503, "server_error", error.what()};
    default:
      return {500, "server_error", error.what()};
  }
}

std::string SlotsText(const Scheduler& scheduler) {
  OrderedJson slots = OrderedJson::array();
  for (const SlotState& slot : scheduler.Slots())
    slots.push_back({{"kv_policy", slot.spec},
                     {"prompt_tokens", slot.prompt_tokens},
                     {"prompt_read", slot.prompt_read},
                     {"cached_tokens", slot.cached_tokens},
                     {"generated_tokens", slot.generated_tokens},
                     {"rows", slot.tokens_resident},
                     {"bytes", slot.kv_bytes},
                     {"bytes_reserved", slot.kv_bytes_reserved}});
  const SchedulerMetrics metrics = scheduler.Metrics();
  return DumpJson(
      {{"running", std::move(slots)},
       {"free", scheduler.options().max_running - std::min(scheduler.options().max_running, metrics.running)},
       {"queued", metrics.queued},
       {"idle", metrics.idle},
       {"idle_bytes", metrics.idle_bytes}});
}

TextAnswer::TextAnswer(const ApiContext& context, const TextRequest& request)
    : model_name_(context.model_name),
      chat_(request.form == TextForm::kChat),
      include_usage_(request.include_usage),
      logprobs_(request.job.options.logprobs.has_value()),
      prompt_tokens_(request.job.prompt.size()),
      spec_(request.job.config->spec_text()),
      id_(NextId(request.form)),
      created_(std::time(nullptr)),
      finished_(request.job.choices) {}

OrderedJson TextAnswer::Head(bool chunk) const {
  const char* const object = !chat_ ? "text_completion" : chunk ? "chat.completion.chunk" : "chat.completion";
  return {{"id", id_}, {"object", object}, {"created", created_}, {"model", model_name_}};
}

namespace {

std::string Event(const OrderedJson& value) { return "data: " + DumpJson(value) + "\n\n"; }

OrderedJson Choice(size_t index, const char* key, OrderedJson content, OrderedJson logprobs, const char* finish) {
  OrderedJson choice = {{"index", index}, {key, std::move(content)}, {"logprobs", std::move(logprobs)}, {"finish_reason", nullptr}};
  if (finish != nullptr) choice["finish_reason"] = finish;
  return choice;
}

// The caches of all choices together.
CacheStats Sum(const JobState& state) {
  CacheStats sum;
  for (const ChoiceState& choice : state.choices) {
    sum.tokens_resident += choice.stats.tokens_resident;
    sum.tokens_dropped += choice.stats.tokens_dropped;
    sum.tokens_absorbed += choice.stats.tokens_absorbed;
    sum.tokens_merged += choice.stats.tokens_merged;
    sum.kv_bytes += choice.stats.kv_bytes;
    sum.kv_bytes_peak += choice.stats.kv_bytes_peak;
    sum.kv_bytes_full += choice.stats.kv_bytes_full;
  }
  return sum;
}

}  // namespace

OrderedJson TextAnswer::Kv(const CacheStats& stats) const {
  return {{"spec", spec_},
          {"rows", stats.tokens_resident},
          {"bytes", stats.kv_bytes},
          {"bytes_peak", stats.kv_bytes_peak},
          {"bytes_full", stats.kv_bytes_full},
          {"evicted", stats.tokens_dropped + stats.tokens_absorbed + stats.tokens_merged},
          {"absorbed", stats.tokens_absorbed},
          {"merged", stats.tokens_merged}};
}

OrderedJson TextAnswer::Usage(const JobState& state) const {
  return {{"prompt_tokens", prompt_tokens_},
          {"completion_tokens", state.generated_tokens()},
          {"total_tokens", prompt_tokens_ + state.generated_tokens()},
          {"prompt_tokens_details", {{"cached_tokens", state.cached_tokens}}},
          {"kv", Kv(Sum(state))}};
}

std::string TextAnswer::ChoiceEvent(OrderedJson choice) const {
  OrderedJson event = Head(true);
  event["choices"] = OrderedJson::array();
  event["choices"].push_back(std::move(choice));
  return Event(event);
}

std::string TextAnswer::FirstEvent() {
  std::string events;
  for (size_t i = 0; chat_ && i < finished_.size(); ++i)
    events += ChoiceEvent(Choice(i, "delta", {{"role", "assistant"}, {"content", ""}}, nullptr, nullptr));
  return events;
}

OrderedJson TextAnswer::Logprobs(const ChoiceState& news) const {
  if (!logprobs_) return nullptr;
  return chat_ ? ChatLogprobs(news.new_tokens) : CompletionLogprobs(news.new_tokens);
}

// What each choice has said since the last time, and that it has ended.
std::string TextAnswer::News(const JobState& state) {
  std::string events;
  for (size_t i = 0; i < state.choices.size(); ++i) {
    const ChoiceState& choice = state.choices[i];
    if (choice.picture) events += KvEvent(*choice.picture);
    if (!choice.new_text.empty() || !choice.new_tokens.empty()) events += TextEvent(i, choice);
    if (choice.finish && !finished_[i]) events += FinishEvent(i, *choice.finish);
    finished_[i] = choice.finish.has_value();
  }
  return events;
}

std::string TextAnswer::TextEvent(size_t choice, const ChoiceState& news) {
  OrderedJson logprobs = news.new_tokens.empty() ? nullptr : Logprobs(news);
  return ChoiceEvent(chat_ ? Choice(choice, "delta", {{"content", news.new_text}}, std::move(logprobs), nullptr)
                           : Choice(choice, "text", news.new_text, std::move(logprobs), nullptr));
}

std::string TextAnswer::FinishEvent(size_t choice, FinishReason reason) {
  return ChoiceEvent(chat_ ? Choice(choice, "delta", OrderedJson::object(), nullptr, FinishText(reason))
                           : Choice(choice, "text", "", nullptr, FinishText(reason)));
}

std::string TextAnswer::KvEvent(const CachePicture& picture) const {
  OrderedJson event = Head(true);
  event["object"] = "lesskv.kv";
  event["choices"] = OrderedJson::array();  // so that clients that know no such event pass it over
  OrderedJson kv = Kv(picture.stats);
  kv["seen"] = picture.stats.tokens_seen;
  kv["layers"] = picture.layers;
  event["kv"] = std::move(kv);
  return Event(event);
}

std::string TextAnswer::LastEvents(const JobState& state) {
  std::string events;
  if (include_usage_) {
    OrderedJson usage = Head(true);
    usage["choices"] = OrderedJson::array();
    usage["usage"] = Usage(state);
    events += Event(usage);
  }
  return events + "data: [DONE]\n\n";
}

std::string TextAnswer::ErrorEvent(const ApiError& error) { return Event(error.Body()); }

std::string TextAnswer::Body(const JobState& state) {
  OrderedJson body = Head(false);
  body["choices"] = OrderedJson::array();
  for (size_t i = 0; i < state.choices.size(); ++i) {
    const ChoiceState& choice = state.choices[i];
    const char* const finish = FinishText(*choice.finish);
    body["choices"].push_back(
        chat_ ? Choice(i, "message", {{"role", "assistant"}, {"content", choice.new_text}}, Logprobs(choice), finish)
              : Choice(i, "text", choice.new_text, Logprobs(choice), finish));
  }
  body["usage"] = Usage(state);
  return DumpJson(body);
}

}  // namespace lesskv
