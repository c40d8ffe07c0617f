#include "server/responses.h"

namespace lesskv {

std::string ResponseAnswer::Event(const char* type, OrderedJson fields) {
  OrderedJson event = {{"type", type}, {"sequence_number", sequence_++}};
  event.update(fields);
  return fmt::format("event: {}\ndata: {}\n\n", type, DumpJson(event));
}

ResponseAnswer::OrderedJson ResponseAnswer::Part(const std::string& text) const {
  return {{"type", "output_text"}, {"text", text}, {"annotations", OrderedJson::array()}};
}

ResponseAnswer::OrderedJson ResponseAnswer::Item(const char* status, OrderedJson content) const {
  return {{"type", "message"},
          {"id", "msg_" + id()},
          {"status", status},
          {"role", "assistant"},
          {"content", std::move(content)}};
}

// `state`: at the end only.
ResponseAnswer::OrderedJson ResponseAnswer::Response(const char* status, OrderedJson output,
                                                     const JobState* state) const {
  OrderedJson response = {{"id", id()},       {"object", "response"},  {"created_at", created()},
                          {"status", status}, {"model", model_name()}, {"output", std::move(output)}};
  response["error"] = nullptr;  // one that fails is told by an event or a status of its own
  response["incomplete_details"] = nullptr;
  response["usage"] = nullptr;
  if (state == nullptr) return response;
  if (response["status"] == "incomplete") response["incomplete_details"] = {{"reason", "max_output_tokens"}};
  response["usage"] = {{"input_tokens", prompt_tokens()},
                       {"output_tokens", state->generated_tokens()},
                       {"total_tokens", prompt_tokens() + state->generated_tokens()},
                       {"input_tokens_details", {{"cached_tokens", state->cached_tokens}}},
                       {"output_tokens_details", {{"reasoning_tokens", 0}}},
                       {"kv", Kv(state->choices[0].stats)}};
  return response;
}

namespace {
const char* StatusOf(const JobState& state) {
  const std::optional<FinishReason> finish = state.choices[0].finish;
  const bool whole = finish == FinishReason::kEndOfText || finish == FinishReason::kStopString;
  return whole ? "completed" : "incomplete";
}
}  // namespace

std::string ResponseAnswer::FirstEvent() {
  const OrderedJson none = OrderedJson::array();
  std::string events = Event("response.created", {{"response", Response("in_progress", none, nullptr)}});
  events += Event("response.output_item.added", {{"output_index", 0}, {"item", Item("in_progress", none)}});
  events += Event("response.content_part.added",
                  {{"item_id", "msg_" + id()}, {"output_index", 0}, {"content_index", 0}, {"part", Part("")}});
  return events;
}

std::string ResponseAnswer::TextEvent(size_t, const ChoiceState& news) {
  text_ += news.new_text;
  return Event("response.output_text.delta",
               {{"item_id", "msg_" + id()}, {"output_index", 0}, {"content_index", 0}, {"delta", news.new_text}});
}

std::string ResponseAnswer::FinishEvent(size_t, FinishReason) { return ""; }  // the last events say it

std::string ResponseAnswer::LastEvents(const JobState& state) {
  const OrderedJson part = Part(text_);
  OrderedJson content = OrderedJson::array({part});
  const OrderedJson item = Item(StatusOf(state), std::move(content)),
                    place = {{"item_id", "msg_" + id()}, {"output_index", 0}, {"content_index", 0}};
  OrderedJson text_done = place, part_done = place;
  text_done["text"] = text_;
  part_done["part"] = part;
  const bool whole = item["status"] == "completed";
  std::string events = Event("response.output_text.done", std::move(text_done));
  events += Event("response.content_part.done", std::move(part_done));
  events += Event("response.output_item.done", {{"output_index", 0}, {"item", item}});
  events += Event(whole ? "response.completed" : "response.incomplete",
                  {{"response", Response(StatusOf(state), OrderedJson::array({item}), &state)}});
  return events;
}

std::string ResponseAnswer::ErrorEvent(const ApiError& error) {
  return Event("error", {{"code", TextOrNull(error.code)}, {"message", error.message}, {"param", TextOrNull(error.param)}});
}

std::string ResponseAnswer::Body(const JobState& state) {
  OrderedJson content = OrderedJson::array({Part(state.choices[0].new_text)});
  return DumpJson(Response(StatusOf(state), OrderedJson::array({Item(StatusOf(state), std::move(content))}), &state));
}

}  // namespace lesskv
