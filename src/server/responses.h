// Answers in the form of OpenAI's Responses API: one output message of one text.
#pragma once

#include <cstdint>
#include <string>

#include "server/api.h"

namespace lesskv {

class ResponseAnswer final : public TextAnswer {
 public:
  using TextAnswer::TextAnswer;

  std::string FirstEvent() override;
  std::string TextEvent(const std::string& text) override;
  std::string LastEvents(const JobState& state) override;
  std::string ErrorEvent(const ApiError& error) override;
  std::string Body(const std::string& text, const JobState& state) override;

 private:
  using OrderedJson = nlohmann::ordered_json;
  std::string Event(const char* type, OrderedJson fields);
  OrderedJson Response(const char* status, OrderedJson output, const JobState* state) const;
  OrderedJson Item(const char* status, OrderedJson content) const;
  OrderedJson Part(const std::string& text) const;

  int sequence_ = 0;  // of the events
  std::string text_;  // sent so far
};

}  // namespace lesskv
