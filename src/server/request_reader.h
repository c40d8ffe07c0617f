// The bodies of requests, in OpenAI's form (docs/server.md): read and checked against what the operator allows.
#pragma once

#include <chrono>
#include <cstddef>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "chat/chat_template.h"
#include "engine/engine.h"
#include "format/json_reader.h"
#include "server/scheduler.h"
#include "tokenizer/tokenizer.h"

namespace lesskv {

// What a request asks for and cannot have, with a name for programs as OpenAI's: "model_not_found".
class RequestError : public FieldError {
 public:
  RequestError(ErrorCode code, std::string field, std::string name, const std::string& message)
      : FieldError(code, std::move(field), message), name_(std::move(name)) {}
  const std::string& name() const { return name_; }  // empty: none

 private:
  std::string name_;
};
RequestError NoSuchModel(const std::string& asked, const std::string& served);

// What the operator allows.
struct ApiLimits {
  size_t ctx = 0;
  size_t max_prompt = 0;     // tokens
  size_t max_output = 0;     // tokens; also what is generated at most where a request does not say
  size_t max_protected = 0;  // tokens that a request may protect
  size_t max_choices = 1;    // texts of one request; no more than may run at once
  std::chrono::seconds max_time{600};
  // One of each spec that requests may name; the first is the default. Those of requests are made from these, so that
  // trained parts are read once.
  std::vector<std::shared_ptr<const CacheConfig>> configs = {};
  std::vector<std::string> Specs() const;  // of configs, canonical
};

// What requests are read against. All of it outlives the requests.
struct ApiContext {
  const Engine& engine;
  const Tokenizer& tokenizer;
  const ChatTemplate* chat = nullptr;  // null: the model has no template that is known
  std::string model_name;
  ApiLimits limits;
};

enum class TextForm { kCompletion, kChat, kResponse };

// A request for one text, or several of one prompt.
struct TextRequest {
  JobRequest job;
  TextForm form = TextForm::kCompletion;
  bool stream = false;
  bool include_usage = false;  // of a stream
};

// Throw Error (kInvalidArgument) with one sentence that names the field; kNotFound for another model's name.
TextRequest ParseChatRequest(std::string_view body, const ApiContext& context);
TextRequest ParseCompletionRequest(std::string_view body, const ApiContext& context);
TextRequest ParseResponseRequest(std::string_view body, const ApiContext& context);
// The fields that such a request may have.
std::vector<std::string> RequestFields(TextForm form);
std::string Tokenize(std::string_view body, const ApiContext& context);
std::string Detokenize(std::string_view body, const ApiContext& context);
std::string ApplyTemplate(std::string_view body, const ApiContext& context);

}  // namespace lesskv
