// The API's description is true: every path in it is answered, every field of a request is taken, every field of an
// answer is described; and nothing is left out.
#include <set>

#include "server/embedded.h"
#include "server/server_harness.h"

namespace lesskv::server_test {
namespace {

class OpenApiTest : public ServerTest {
 protected:
  const Json& Schema(const Json& schema) const {
    if (!schema.contains("$ref")) return schema;
    const std::string name = schema["$ref"].get<std::string>();
    return api_["components"]["schemas"].at(name.substr(name.rfind('/') + 1));
  }

  // Where a value is not what a schema says; empty: nowhere.
  std::string Difference(const Json& value, const Json& reference, const std::string& where) const {
    const Json& schema = Schema(reference);
    if (schema.value("nullable", false) && value.is_null()) return "";
    if (!schema.contains("type")) return "";
    const std::string type = schema["type"];
    const bool right = type == "object"    ? value.is_object()
                       : type == "array"   ? value.is_array()
                       : type == "string"  ? value.is_string()
                       : type == "boolean" ? value.is_boolean()
                       : type == "integer" ? value.is_number_integer()
                                           : value.is_number();
    if (!right) return where + ": not " + type;
    std::string found;
    if (type == "array" && schema.contains("items"))
      for (size_t i = 0; i < value.size() && found.empty(); ++i)
        found = Difference(value[i], schema["items"], fmt::format("{}[{}]", where, i));
    if (type != "object" || !schema.contains("properties")) return found;
    for (const auto& [key, item] : value.items()) {
      if (!schema["properties"].contains(key)) return where + "." + key + ": not described";
      if (found.empty()) found = Difference(item, schema["properties"][key], where + "." + key);
    }
    for (const Json& key : schema["required"])
      if (!value.contains(key.get<std::string>())) return where + "." + key.get<std::string>() + ": missing";
    return found;
  }

  // A request with the fields that must be there.
  Json Least(const Json& schema) const {
    Json body = Json::object();
    for (const Json& key : schema["required"]) {
      const std::string name = key;
      body[name] = schema["properties"][name].at("example");
    }
    if (schema["properties"].contains("max_output_tokens"))
      body.update({{"max_output_tokens", 12}, {"temperature", 0}});
    if (schema["properties"].contains("max_tokens")) body.update({{"max_tokens", 12}, {"temperature", 0}});
    return body;
  }

  const Json& AnswerSchema(const Json& operation) const {
    return operation["responses"]["200"]["content"]["application/json"]["schema"];
  }

  const Json api_ = Json::parse(OpenApiText());
};

TEST_F(OpenApiTest, EveryRouteIsDescribedAndEveryDescribedOneIsThere) {
  Start();
  std::set<std::string> described;
  for (const auto& [path, methods] : api_["paths"].items())
    for (const auto& [method, operation] : methods.items())
      described.insert((method == "get" ? "GET " : "POST ") + path);
  EXPECT_EQ(described, std::set<std::string>(server_->Routes().begin(), server_->Routes().end()));
  EXPECT_EQ(Get("/openapi.json").json(), api_);
}

TEST_F(OpenApiTest, WhatIsReadIsAsDescribed) {
  Start();
  const auto running = LongStream();
  for (const auto& [path, methods] : api_["paths"].items()) {
    if (!methods.contains("get")) continue;
    const size_t name = path.find("{id}");
    const Reply reply = Get(name == std::string::npos ? path : path.substr(0, name) + "tiny");
    ASSERT_EQ(reply.status, 200) << path;
    const Json& content = methods["get"]["responses"]["200"]["content"];
    const std::string type = content.begin().key();
    EXPECT_NE(reply.head.find("Content-Type: " + type), std::string::npos) << path << reply.head;
    if (type != "application/json") continue;
    EXPECT_EQ(Difference(reply.json(), AnswerSchema(methods["get"]), path), "");
  }
  EXPECT_EQ(Get("/slots").json()["running"].size(), 1u);
}

TEST_F(OpenApiTest, EveryFieldOfARequestIsTaken) {
  Start();
  for (const auto& [path, methods] : api_["paths"].items()) {
    if (!methods.contains("post")) continue;
    const Json& operation = methods["post"];
    const Json& schema = Schema(operation["requestBody"]["content"]["application/json"]["schema"]);
    const Reply least = Post(path, Least(schema));
    ASSERT_EQ(least.status, 200) << path << least.body;
    EXPECT_EQ(Difference(least.json(), AnswerSchema(operation), path), "");
    for (const auto& [key, field] : schema["properties"].items()) {
      Json body = Least(schema);
      body[key] = key == "stream_options" ? Json{{"include_usage", true}} : field.at("example");
      if (key == "stream_options" || key == "kv_stats") body["stream"] = true;
      if (key == "top_logprobs") body["logprobs"] = true;
      const Reply reply = Post(path, body);
      EXPECT_EQ(reply.status, 200) << path << " " << key << " " << reply.body;
      const bool whole = !body.value("stream", false);
      EXPECT_EQ(whole ? Difference(reply.json(), AnswerSchema(operation), path) : "", "") << key;
      if (key == "max_completion_tokens") continue;  // takes the place of max_tokens
      body[key] = Json{{"no", "such value"}};
      EXPECT_EQ(Post(path, body).status, 400) << path << " " << key;
    }
    Json other = Least(schema);
    other["no_such_field"] = 1;
    const Reply refused = Post(path, other);
    EXPECT_EQ(refused.status, 400) << path;
    EXPECT_EQ(Difference(refused.json(), api_["components"]["schemas"]["Error"], path), "");
  }
}

TEST_F(OpenApiTest, EventsAreAsDescribed) {
  Start();
  for (const char* const path : {"/v1/chat/completions", "/v1/completions"}) {
    const Json& operation = api_["paths"][path]["post"];
    const Json& schema = Schema(operation["requestBody"]["content"]["application/json"]["schema"]);
    Json body = Least(schema);
    body.update({{"stream", true}, {"kv_stats", 1}, {"stream_options", {{"include_usage", true}}}});
    body["logprobs"] = schema["properties"]["logprobs"]["example"];
    std::set<std::string> seen;
    for (const Json& event : Events(Post(path, body))) {
      EXPECT_EQ(Difference(event, operation["responses"]["200"]["content"]["text/event-stream"]["x-event"], path), "");
      for (const auto& [key, value] : event.items()) seen.insert(key);
    }
    EXPECT_EQ(seen, (std::set<std::string>{"choices", "created", "id", "kv", "model", "object", "usage"})) << path;
  }
}

TEST_F(OpenApiTest, AResponseIsItsEventsPutTogether) {
  Start();
  Json body = {{"input", {{{"role", "user"}, {"content", {{{"type", "input_text"}, {"text", "the tea"}}}}}}},
               {"instructions", "x"},
               {"temperature", 1.5},
               {"seed", 3},
               {"max_output_tokens", 12}};
  const Json whole = Post("/v1/responses", body).json();
  body["stream"] = true;
  body["kv_stats"] = 4;
  const std::string stream = Post("/v1/responses", body).body;
  std::string text, last;
  int next = 0;
  for (size_t pos = 0; pos < stream.size();) {
    const size_t end = stream.find("\n\n", pos);
    const std::string lines = stream.substr(pos, end - pos);
    pos = end + 2;
    const Json event = Json::parse(lines.substr(lines.find("data: ") + 6));
    const Json& schema =
        api_["paths"]["/v1/responses"]["post"]["responses"]["200"]["content"]["text/event-stream"]["x-event"];
    EXPECT_EQ(Difference(event, schema, "event"), "");
    if (event.contains("kv")) continue;
    EXPECT_EQ(lines.substr(0, lines.find('\n')), "event: " + event["type"].get<std::string>());
    EXPECT_EQ(event["sequence_number"], next++);
    if (event["type"] == "response.output_text.delta") text += event["delta"].get<std::string>();
    last = event["type"];
    if (!event.contains("response") || next == 1) continue;
    EXPECT_EQ(event["response"]["output"][0]["content"], whole["output"][0]["content"]);
    EXPECT_EQ(event["response"]["usage"]["output_tokens"], whole["usage"]["output_tokens"]);
  }
  EXPECT_EQ(whole["output"][0]["content"][0]["text"], text);
  EXPECT_EQ(whole["error"], nullptr);  // clients read these fields unasked
  EXPECT_EQ(whole["usage"]["output_tokens_details"]["reasoning_tokens"], 0);
  EXPECT_EQ(last, "response." + whole["status"].get<std::string>());
}

// What the parser knows and the description does not would go unseen above.
TEST_F(OpenApiTest, NoFieldOfARequestIsLeftOut) {
  for (const auto& [schema, fields] : {std::pair{"ChatRequest", RequestFields(TextForm::kChat)},
                                       {"CompletionRequest", RequestFields(TextForm::kCompletion)},
                                       {"ResponseRequest", RequestFields(TextForm::kResponse)}}) {
    std::set<std::string> described;
    for (const auto& [key, field] : api_["components"]["schemas"][schema]["properties"].items()) described.insert(key);
    EXPECT_EQ(described, std::set<std::string>(fields.begin(), fields.end()));
  }
}

TEST_F(OpenApiTest, ThePageBringsEverythingWithIt) {
  Start({.http = {.port = 0, .api_keys = {"secret"}}});
  const Reply page = Get("/");
  EXPECT_EQ(page.status, 200);
  EXPECT_NE(page.head.find("Content-Security-Policy: default-src 'none'"), std::string::npos);
  EXPECT_EQ(page.body, PageHtml());
  for (const char* const outside : {"http:", "https:", "src=", "@import", "url("})
    EXPECT_EQ(page.body.find(outside), std::string::npos) << outside;
  // What its script reads is what the API has.
  const Json& schemas = api_["components"]["schemas"];
  for (const char* const field :
       {"seen", "rows", "layers", "bytes", "bytes_full", "evicted", "absorbed", "merged", "spec"}) {
    EXPECT_NE(page.body.find(std::string("kv.") + field), std::string::npos) << field;
    EXPECT_TRUE(schemas["Picture"]["properties"].contains(field)) << field;
  }
  for (const char* const field : {"kv_policies", "max_output", "chat_template", "model"})
    EXPECT_TRUE(page.body.find(std::string("props.") + field) != std::string::npos &&
                schemas["Props"]["properties"].contains(field))
        << field;
}

}  // namespace
}  // namespace lesskv::server_test
