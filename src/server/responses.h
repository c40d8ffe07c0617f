// Answers in the form of OpenAI's Responses API: one output message of one text, the only choice.
#pragma once

#include <cstdint>
#include <string>

#include "server/api.h"

namespace lesskv {

class ResponseAnswer final : public TextAnswer {
 public:
  using TextAnswer::TextAnswer;

  std::string FirstEvent() override;
  std::string LastEvents(const JobState& state) override;
  std::string ErrorEvent(const ApiError& error) override;
  std::string Body(const JobState& state) override;

 private:
  std::string TextEvent(size_t choice, const ChoiceState& news) override;
  std::string FinishEvent(size_t choice, FinishReason reason) override;
  using OrderedJson = nlohmann::ordered_json;
  std::string Event(const char* type, OrderedJson fields);
  OrderedJson Response(const char* status, OrderedJson output, const JobState* state) const;
  OrderedJson Item(const char* status, OrderedJson content) const;
  OrderedJson Part(const std::string& text) const;

  int sequence_ = 0;  // of the events
  std::string text_;  // sent so far
};

}  // namespace lesskv
