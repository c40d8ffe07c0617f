// The bodies of answers, in OpenAI's form (docs/server.md). No HTTP here.
#pragma once

#include <cstddef>
#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "server/request_reader.h"
#include "server/scheduler.h"

namespace lesskv {

// Errors in OpenAI's form, with the status they are sent with.
struct ApiError {
  int status;
  std::string type, message;
  std::string param = {}, code = {};  // the field, and a name for programs; empty: none
  nlohmann::ordered_json Body() const;
  std::vector<std::pair<std::string, std::string>> Headers() const;
};
// An Error of ours: a caller's mistake is 400, no memory 503, anything else 500; BusyError 429, or 503 where the server
// ends.
ApiError ToApiError(const Error& error);

nlohmann::ordered_json TextOrNull(const std::string& text);

// What runs now, one object a text, and how many wait.
std::string SlotsText(const Scheduler& scheduler);

// Writes the answer to one request, as an object at the end or as a stream of events. This class is for completions of
// both kinds.
class TextAnswer {
 public:
  TextAnswer(const ApiContext& context, const TextRequest& request);
  virtual ~TextAnswer() = default;

  // Events, each with its "data: " and empty line.
  virtual std::string FirstEvent();  // of a chat: the role
  std::string News(const JobState& state);
  virtual std::string LastEvents(const JobState& state);  // the usage where it was asked for, [DONE]
  virtual std::string ErrorEvent(const ApiError& error);
  // The whole object. `state`: all of it, put together.
  virtual std::string Body(const JobState& state);

 protected:
  virtual std::string TextEvent(size_t choice, const ChoiceState& news);
  virtual std::string FinishEvent(size_t choice, FinishReason reason);  // why a choice ended
  nlohmann::ordered_json Kv(const CacheStats& stats) const;
  const std::string& model_name() const { return model_name_; }
  size_t prompt_tokens() const { return prompt_tokens_; }
  const std::string& id() const { return id_; }
  int64_t created() const { return created_; }

 private:
  nlohmann::ordered_json Head(bool chunk) const;
  std::string KvEvent(const CachePicture& picture) const;
  std::string ChoiceEvent(nlohmann::ordered_json choice) const;
  nlohmann::ordered_json Usage(const JobState& state) const;
  nlohmann::ordered_json Logprobs(const ChoiceState& news) const;

  const std::string model_name_;
  const bool chat_, include_usage_, logprobs_;
  const size_t prompt_tokens_;
  const std::string spec_;
  const std::string id_;
  const int64_t created_;
  std::vector<bool> finished_;  // choices whose end has been told
};

// As JSON text; damaged UTF-8 is replaced.
std::string DumpJson(const nlohmann::ordered_json& value);
// Prometheus' text form.
std::string MetricsText(const SchedulerMetrics& metrics);
std::string MetricsText(const StoreMetrics& metrics);

}  // namespace lesskv
