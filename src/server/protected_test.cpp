// What of a chat is protected, and what becomes of that when it does not fit.
#include "server/server_harness.h"

namespace lesskv::server_test {
namespace {

Json Message(const std::string& role, const std::string& content) { return {{"role", role}, {"content", content}}; }

class ProtectedTest : public ServerTest {
 protected:
  // Who is in a layer and KV head at the end, as runs begin, end, ...
  std::vector<int32_t> Resident(Json body, const std::string& path = "/v1/chat/completions") const {
    body.update({{"stream", true}, {"kv_stats", 1}, {"temperature", 0}});
    std::vector<int32_t> runs;
    const Reply reply = Post(path, body);
    EXPECT_EQ(reply.status, 200) << reply.body;
    if (reply.status != 200) return {0, 0};
    for (const Json& event : Events(reply))
      if (event["object"] == "lesskv.kv") runs = event["kv"]["layers"][1][0].get<std::vector<int32_t>>();
    return runs;
  }
};

TEST_F(ProtectedTest, AChatOfManyTurnsGoesOn) {
  Start({.max_prompt = 5000});
  Json messages = {Message("system", "be brief")};
  size_t went_on = 0;
  for (int turn = 0; turn < 40; ++turn) {
    messages.push_back(Message("user", fmt::format("and {}?", turn)));
    const Json body = {{"messages", messages}, {"kv_policy", "h2o(24)"}, {"max_tokens", 3}, {"temperature", 0}};
    const Reply reply = Post("/v1/chat/completions", body);
    ASSERT_EQ(reply.status, 200) << "turn " << turn << ": " << reply.body;
    EXPECT_LE(reply.json()["usage"]["kv"]["rows"], 24);
    went_on += reply.json()["usage"]["prompt_tokens_details"]["cached_tokens"] > 0;
    messages.push_back(reply.json()["choices"][0]["message"]);
  }
  EXPECT_GT(went_on, 0u);  // a turn protects what the one before it did
}

TEST_F(ProtectedTest, OfAChatTheFirstTurnIsProtected) {
  Start({.max_prompt = 5000});
  const Json chat = {Message("system", "x"), Message("user", std::string(40, 'y')), Message("assistant", "z"),
                     Message("user", std::string(40, 'u'))};
  const std::vector<ChatMessage> messages = {{ChatRole::kSystem, "x"}, {ChatRole::kUser, std::string(40, 'y')}};
  const std::vector<TokenSpan> fixed = EncodeChat(*tokenizer_, chat_.Render(messages), {}).fixed;
  ASSERT_GE(fixed.size(), 2u);
  const std::vector<int32_t> runs = Resident({{"messages", chat}, {"kv_policy", "window(24)"}, {"max_tokens", 60}});
  size_t rows = 0;
  for (const TokenSpan& span : fixed) {
    ASSERT_LE(2 * rows + 1, runs.size());
    EXPECT_EQ(runs[2 * rows], static_cast<int32_t>(span.begin));
    EXPECT_EQ(runs[2 * rows + 1], static_cast<int32_t>(span.end));
    ++rows;
  }
  EXPECT_EQ(runs.size(), 2 * fixed.size() + 2);  // and the window, but nothing of the second turn
}

// Newer clients call the system's role the developer's.
TEST_F(ProtectedTest, ADevelopersPromptIsTheSystems) {
  Start({.max_prompt = 5000});
  const auto resident = [&](const char* role) {
    const Json chat = {Message(role, "be brief"), Message("user", std::string(40, 'y'))};
    return Resident({{"messages", chat}, {"kv_policy", "window(24)"}, {"max_tokens", 40}});
  };
  EXPECT_EQ(resident("developer"), resident("system"));
  EXPECT_NE(resident("developer"), resident("user"));
}

TEST_F(ProtectedTest, ALongSystemPromptGivesWay) {
  Start();
  const Json messages = {Message("system", std::string(60, 'x') + " the tea"), Message("user", "y")};
  const Json body = {{"messages", messages}, {"max_tokens", 40}};
  Json h2o = body, window = body;
  h2o["kv_policy"] = "h2o(24)";
  window["kv_policy"] = "window(24)";
  // Half of the rows beside the window of 12: six.
  const std::vector<int32_t> runs = Resident(h2o);
  EXPECT_EQ(runs[0], 0);
  EXPECT_GE(runs[1], 6);
  const std::vector<int32_t> in_window = Resident(window);
  ASSERT_EQ(in_window.size(), 4u);
  EXPECT_EQ(in_window[0], 0);
  EXPECT_EQ(in_window[1], 11);  // 23 would fit beside the newest token
}

TEST_F(ProtectedTest, WhatTheClientAsksForFitsOrIsRefused) {
  Start();
  const Json messages = {Message("system", std::string(60, 'x')), Message("user", std::string(30, 'y'))};
  Json body = {{"messages", messages}, {"kv_policy", "h2o(24)"}, {"max_tokens", 40}, {"protected_spans", {{20, 33}}}};
  const Reply refused = Post("/v1/chat/completions", body);
  EXPECT_EQ(refused.status, 400);
  EXPECT_NE(refused.body.find("protected tokens do not fit"), std::string::npos) << refused.body;
  body["protected_spans"] = {{0, 15}, {20, 35}};  // each fewer than 20, but not both
  const Reply many = Post("/v1/chat/completions", body);
  EXPECT_EQ(many.status, 400);
  EXPECT_NE(many.body.find("at most 20 tokens"), std::string::npos) << many.body;
  const auto status = [&](int end) {
    return Complete({{"prompt", std::vector<int32_t>(10, 'x')}, {"protected_spans", {{5, end}}}}).status;
  };
  EXPECT_EQ(status(10), 200);
  EXPECT_EQ(status(11), 400);
  body["protected_spans"] = {{20, 32}};  // all that h2o may choose, so that the system prompt has nothing
  const std::vector<int32_t> runs = Resident(body);
  EXPECT_EQ(runs[0], 20);
  EXPECT_EQ(runs[1], 32);
}

}  // namespace
}  // namespace lesskv::server_test
