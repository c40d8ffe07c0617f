// The server as clients see it, over loopback: texts, streams, many at once, clients that vanish, requests that make no
// sense.
#include <filesystem>

#include "server/server_harness.h"

namespace lesskv::server_test {
namespace {

TEST_F(ServerTest, ACompletionIsWhatTheEngineSays) {
  Start();
  const Reply reply = Complete({});
  ASSERT_EQ(reply.status, 200) << reply.body;
  const GenerateResult alone = Alone("the tea", 12);
  const Json json = reply.json();
  EXPECT_EQ(json["object"], "text_completion");
  EXPECT_EQ(json["model"], "tiny");
  EXPECT_EQ(json["choices"][0]["text"], alone.text);
  EXPECT_EQ(json["choices"][0]["finish_reason"], "length");
  const Json& usage = json["usage"];
  EXPECT_EQ(usage["prompt_tokens"], alone.prompt_tokens);
  EXPECT_EQ(usage["completion_tokens"], 12);
  EXPECT_EQ(usage["total_tokens"], alone.prompt_tokens + 12);
  EXPECT_EQ(usage["kv"]["spec"], "full");
  EXPECT_EQ(usage["kv"]["rows"], alone.prompt_tokens + 11);  // the last token is not fed
  EXPECT_EQ(usage["kv"]["evicted"], 0);
  EXPECT_GT(usage["kv"]["bytes"], 0);
}

TEST_F(ServerTest, AStreamHasTheSameText) {
  Start();
  Json body = {{"messages",
                {{{"role", "system"}, {"content", "the"}},
                 {{"role", "user"}, {"content", {{{"type", "text"}, {"text", "tea"}}}}}}},
               {"temperature", 1.5},
               {"max_completion_tokens", 20}};
  Reply whole;
  for (int seed = 0; seed < 20; ++seed) {  // some answers end at once
    body["seed"] = seed;
    whole = Post("/v1/chat/completions", body);
    ASSERT_EQ(whole.status, 200) << whole.body;
    if (whole.json()["usage"]["completion_tokens"] == 20) break;
  }
  EXPECT_EQ(whole.json()["choices"][0]["message"]["role"], "assistant");
  Json streamed = body;
  streamed.update({{"stream", true}, {"stream_options", {{"include_usage", true}}}});
  const Reply stream = Post("/v1/chat/completions", streamed);
  EXPECT_NE(stream.head.find("text/event-stream"), std::string::npos);
  const std::vector<Json> events = Events(stream);
  ASSERT_GE(events.size(), 4u);
  EXPECT_EQ(events[0]["choices"][0]["delta"]["role"], "assistant");
  std::string text;
  for (size_t i = 1; i + 2 < events.size(); ++i) text += events[i]["choices"][0]["delta"]["content"].get<std::string>();
  EXPECT_EQ(text, whole.json()["choices"][0]["message"]["content"]);
  EXPECT_EQ(events[events.size() - 2]["choices"][0]["finish_reason"], "length");
  EXPECT_EQ(events.back()["usage"]["completion_tokens"], 20);
  EXPECT_EQ(events.back()["usage"]["kv"], whole.json()["usage"]["kv"]);
  EXPECT_EQ(events.back()["choices"], Json::array());
}

// It knows no chunks: the events end with the connection.
TEST_F(ServerTest, AStreamGoesToAClientOfHttp10) {
  Start();
  std::string request = RequestText("POST", "/v1/completions", R"({"prompt":"the","max_tokens":3,"stream":true})");
  request.replace(request.find("HTTP/1.1"), 8, "HTTP/1.0");
  const Reply reply = Call(request);
  EXPECT_EQ(reply.status, 200);
  EXPECT_EQ(reply.head.find("Transfer-Encoding"), std::string::npos) << reply.head;
  EXPECT_NE(reply.head.find("Connection: close"), std::string::npos) << reply.head;
  EXPECT_GE(Events(reply).size(), 2u);
}

TEST_F(ServerTest, ManyAtOnceAreAsEachAlone) {
  Start();
  std::vector<std::string> prompts, texts(8);  // as many as may wait
  // Has all places until the others have come, so that they begin together.
  GenerationOptions endless;
  endless.sampler.temperature = 0;
  endless.max_tokens = 150000;
  endless.ignore_end = true;
  const auto first = scheduler_->Submit({.prompt = tokenizer_->Encode("the tea", true, true),
                                         .options = endless,
                                         .config = engine_.MakeCacheConfig(CacheSpec::Parse("window(24)"), kCtx),
                                         .choices = 3});
  ASSERT_TRUE(Soon([&] { return scheduler_->Metrics().running == 3; }));
  for (size_t i = 0; i < texts.size(); ++i)
    prompts.push_back(std::string(5 + 13 * i, static_cast<char>('a' + i)) + " the");
  std::vector<std::thread> clients;
  for (size_t i = 0; i < texts.size(); ++i)
    clients.emplace_back([&, i] {
      const bool stream = i % 2 == 1;
      const Reply reply = Complete({{"prompt", prompts[i]},
                                    {"max_tokens", 60},
                                    {"stream", stream},
                                    {"kv_policy", i % 3 == 0 ? "h2o(24)" : "full"}});
      if (!stream) {
        texts[i] = reply.json()["choices"][0]["text"];
        return;
      }
      for (const Json& event : Events(reply)) texts[i] += event["choices"][0]["text"].get<std::string>();
    });
  EXPECT_TRUE(Soon([&] { return scheduler_->Metrics().queued == texts.size(); }));
  first->Cancel();
  for (std::thread& client : clients) client.join();
  size_t generated = 0;
  for (size_t i = 0; i < texts.size(); ++i) {
    const GenerateResult alone = Alone(prompts[i], 60, i % 3 == 0 ? "h2o(24)" : "full");
    EXPECT_EQ(texts[i], alone.text) << i;
    generated += alone.generated_tokens;
  }
  ASSERT_TRUE(Soon([&] { return scheduler_->Metrics().running == 0; }));  // they are counted when they have been told
  const SchedulerMetrics metrics = scheduler_->Metrics();
  const size_t before = first->Wait(0ms).generated_tokens();
  EXPECT_EQ(metrics.jobs_finished, texts.size());
  EXPECT_EQ(metrics.generated_tokens, before + generated);
  EXPECT_LT(metrics.steps, before / 3 + generated);  // steps were shared
  EXPECT_EQ(metrics.kv_bytes_reserved, 0u);
}

TEST_F(ServerTest, SamplingAndStopsAreTheRequests) {
  Start();
  const auto text = [&](const Json& more) { return Complete(more).json()["choices"][0]["text"].get<std::string>(); };
  const std::string a = text({{"temperature", 1.5}, {"seed", 7}, {"max_tokens", 40}});
  EXPECT_EQ(a, text({{"temperature", 1.5}, {"seed", 7}, {"max_tokens", 40}}));
  EXPECT_NE(a, text({{"temperature", 1.5}, {"seed", 8}, {"max_tokens", 40}}));
  EXPECT_EQ(text({}), text({{"temperature", 1.5}, {"top_k", 1}}));
  const std::string whole = text({});
  ASSERT_GT(whole.size(), 4u);
  const Json stopped = Complete({{"stop", {whole.substr(3, 2)}}}).json();
  EXPECT_EQ(stopped["choices"][0]["text"], whole.substr(0, whole.find(whole.substr(3, 2))));
  EXPECT_EQ(stopped["choices"][0]["finish_reason"], "stop");
}

TEST_F(ServerTest, PenaltiesCountWhatIsGeneratedAndNotThePrompt) {
  Start();
  const auto text = [&](const Json& more) { return Complete(more).json()["choices"][0]["text"].get<std::string>(); };
  EXPECT_NE(text({{"max_tokens", 40}, {"frequency_penalty", 1}}), text({{"max_tokens", 40}}));
  EXPECT_NE(text({{"max_tokens", 40}, {"presence_penalty", 2}}), text({{"max_tokens", 40}}));
  EXPECT_EQ(text({{"max_tokens", 40}, {"presence_penalty", 0}}), text({{"max_tokens", 40}}));
  // The first token is free whatever the prompt says: a prompt of the token itself does not weaken it.
  const std::string prompt = std::string(20, text({{"max_tokens", 1}}).at(0));
  EXPECT_EQ(text({{"prompt", prompt}, {"max_tokens", 1}, {"frequency_penalty", 2}, {"presence_penalty", 2}}),
            text({{"prompt", prompt}, {"max_tokens", 1}}));
}

TEST_F(ServerTest, CachePoliciesAreWhatTheOperatorAllows) {
  Start();
  const Json body = {{"kv_policy", "window(24)"}, {"max_tokens", 60}, {"ignore_eos", true}};
  const Json kv = Complete(body).json()["usage"]["kv"];
  EXPECT_EQ(kv["spec"], "window(24)");
  EXPECT_EQ(kv["rows"], 24);
  EXPECT_GT(kv["evicted"], 30);
  EXPECT_EQ(Complete({{"kv_policy", "window(25)"}}).status, 400);
  // The protected tokens take their place in the budget, and must fit it.
  EXPECT_EQ(Complete({{"kv_policy", "window(24)"}, {"protected_spans", {{0, 3}}}}).status, 200);
  EXPECT_EQ(Complete({{"protected_spans", {{0, 3}, {2, 1}}}}).status, 400);
  const Reply many = Complete({{"prompt", std::string(60, 'x')}, {"protected_spans", {{0, 21}}}});
  EXPECT_EQ(many.status, 400);
  EXPECT_NE(many.body.find("at most 20 tokens"), std::string::npos);
}

TEST_F(ServerTest, RequestsThatMakeNoSenseAreNamed) {
  Start();
  const struct {
    Json more;
    int status;
    std::string said;
  } kCases[] = {
      {{{"temperature", -1}}, 400, "request: temperature: expected a number in [0, 1000], found -1"},
      {{{"temperature", "hot"}}, 400, "temperature: expected a number"},
      {{{"temperature", 1e300}}, 400, "temperature"},
      {{{"top_p", 1.5}}, 400, "request: top_p: expected a number in [0, 1]"},
      {{{"top_k", -1}}, 400, "request: top_k: expected 0 (all) or more, found -1"},
      {{{"top_k", 1.5}}, 400, "top_k: expected a whole number"},
      {{{"max_tokens", 0}}, 400, "max_tokens: expected a number in [1, 150000]"},
      {{{"max_tokens", 150001}}, 400, "max_tokens"},
      {{{"max_tokens", -5}}, 400, "max_tokens: expected a count"},
      {{{"n", 0}}, 400, "n: expected a number in [1, 3]"},
      {{{"n", 4}}, 400, "n: expected a number in [1, 3]"},
      {{{"n", 1e9}}, 400, "n: expected a count"},
      {{{"n", -1}}, 400, "n: expected a count"},
      {{{"n", 2}, {"stream", true}, {"kv_stats", 1}}, 400, "kv_stats: expected none with n above 1"},
      {{{"logprobs", 6}}, 400, "logprobs: expected a number in [0, 5]"},
      {{{"logprobs", -1}}, 400, "logprobs: expected a count"},
      {{{"logprobs", true}}, 400, "logprobs: expected a count"},
      {{{"top_logprobs", 2}}, 400, "'top_logprobs': lesskv has no such field"},
      {{{"seed", 1.5}}, 400, "seed: expected a whole number"},
      {{{"seed", 1e20}}, 400, "seed: expected a whole number"},
      {{{"stop", ""}}, 400, "stop"},
      {{{"stop", {1}}}, 400, "stop"},
      {{{"stream", "yes"}}, 400, "stream: expected true or false"},
      {{{"stream_options", {{"include_usage", true}}}}, 400, "stream_options: expected none without stream"},
      {{{"logit_bias", Json::array()}}, 400, "logit_bias: expected an object"},
      {{{"logit_bias", {{"272", 1}}}}, 400, "logit_bias: expected keys that are token ids below 272, found '272'"},
      {{{"logit_bias", {{"-1", 1}}}}, 400, "token ids below 272"},
      {{{"logit_bias", {{"the", 1}}}}, 400, "token ids below 272, found 'the'"},
      {{{"logit_bias", {{"7", 100.5}}}}, 400, "logit_bias: 7: expected a number in [-100, 100]"},
      {{{"logit_bias", {{"7", "much"}}}}, 400, "logit_bias: 7: expected a number"},
      {{{"best_of", 2}}, 400, "'best_of': lesskv has no such field: texts are not compared; n gives all of them"},
      {{{"echo", true}}, 400, "'echo': lesskv has no such field: the prompt is not given back"},
      {{{"tool_choice", "required"}}, 400, "'tool_choice': lesskv has no such field: models call no tools here"},
      {{{"nonsense", 1}}, 400, "'nonsense': lesskv has no such field"},
      {{{"presence_penalty", 2.5}}, 400, "request: presence_penalty: expected a number in [-2, 2], found 2.5"},
      {{{"frequency_penalty", -1e9}}, 400, "frequency_penalty: expected a number in [-2, 2]"},
      {{{"frequency_penalty", "0"}}, 400, "frequency_penalty: expected a number"},
      {{{"kv_policy", "h2o("}}, 400, ""},
      {{{"kv_policy", "less(file=\"/etc/passwd\")+h2o(24)"}}, 400, "one that the operator allows"},
      {{{"protected_spans", {{0, 1e9}}}}, 400, "protected_spans"},
      {{{"protected_spans", 3}}, 400, "protected_spans: expected an array"},
      {{{"prompt", Json::array()}}, 400, "the prompt is empty"},
      {{{"prompt", {1, 272}}}, 400, "prompt: expected token ids below 272"},
      {{{"prompt", {"a", "b"}}}, 400, "several prompts are several requests"},
      {{{"prompt", {{1, 2}, {3}}}}, 400, "several prompts are several requests"},
      {{{"prompt", Json::array({Json::array({Json::array({1})})})}}, 400, "prompt: expected token ids"},
      {{{"prompt", Json::array({nullptr})}}, 400, "prompt: expected a text"},
      {{{"prompt", std::string(501, 'x')}}, 400, "at most 500 are allowed"},
      {{{"prompt", nullptr}}, 400, "prompt: expected a text"},
      {{{"model", "gpt"}}, 404, "there is no model 'gpt', only 'tiny'"},
  };
  for (const auto& test : kCases) {
    const Reply reply = Complete(test.more);
    EXPECT_EQ(reply.status, test.status) << test.more;
    const Json error = reply.json()["error"];
    EXPECT_NE(error["message"].get<std::string>().find(test.said), std::string::npos) << reply.body;
    // OpenAI's form: the field's name, and a name for programs or nothing.
    EXPECT_TRUE(error["param"].is_string()) << reply.body;
    const std::string param = error["param"].is_string() ? error["param"] : "";
    EXPECT_TRUE(test.more.size() > 1 || param.starts_with(test.more.begin().key())) << reply.body;
    const bool long_prompt = test.said == "at most 500 are allowed";
    EXPECT_EQ(error["code"], test.status == 404 ? Json("model_not_found")
                             : long_prompt      ? Json("context_length_exceeded")
                                                : Json());
  }
  const Json messages = {{{"role", "user"}, {"content", "x"}}};
  const std::pair<Json, std::string> chats[] = {
      {{{"logprobs", 1}}, "logprobs: expected true or false"},
      {{{"top_logprobs", 1}}, "top_logprobs: expected none without logprobs"},
      {{{"logprobs", false}, {"top_logprobs", 1}}, "top_logprobs: expected none without logprobs"},
      {{{"logprobs", true}, {"top_logprobs", 21}}, "top_logprobs: expected a number in [0, 20]"},
      {{{"response_format", {{"type", "json_object"}}}}, "what is generated is not constrained"},
      {{{"response_format", "text"}}, "response_format: expected an object"},
      {{{"tools", Json::array({Json::object()})}}, "'tools': lesskv has no such field: models call no tools here"},
      {{{"store", true}}, "'store': lesskv has no such field"},
      {{{"modalities", {"text", "audio"}}}, "'modalities': lesskv has no such field: models write text only"},
      {{{"messages", {{{"role", "user"}, {"content", "x"}, {"name", "me"}}}}},
       "request: messages: 0: 'name': lesskv has no such field"},
      {{{"messages", {{{"role", "user"}, {"content", {{{"type", "text"}, {"text", "x"}, {"cache_control", 1}}}}}}}},
       "request: messages: 0: content: 0: 'cache_control': lesskv has no such field"},
  };
  for (const auto& [more, said] : chats) {
    Json body = {{"messages", messages}};
    body.update(more);
    const Reply reply = Post("/v1/chat/completions", body);
    EXPECT_EQ(reply.status, 400) << more;
    EXPECT_NE(reply.body.find(said), std::string::npos) << reply.body;
  }
  EXPECT_EQ(Post("/v1/chat/completions", {{"messages", Json::array()}}).status, 400);
  EXPECT_EQ(Post("/v1/chat/completions", {{"messages", {{{"role", "judge"}, {"content", "x"}}}}}).status, 400);
  EXPECT_EQ(Post("/v1/chat/completions", {{"messages", {{{"role", "user"}}}}}).status, 400);
  EXPECT_EQ(Complete({}).status, 200);
}

// A prompt leaves room for one token, and none is asked for that has no room.
TEST_F(ServerTest, TheContextIsFilledAndNotPassed) {
  Start();
  ApiContext context = *context_;
  context.limits.ctx = 10;
  const auto most = [&](size_t n_prompt, size_t n_wanted) {
    const Json body = {{"prompt", std::vector<int32_t>(n_prompt, 'x')}, {"max_tokens", n_wanted}};
    return ParseCompletionRequest(body.dump(), context).job.options.max_tokens;
  };
  EXPECT_EQ(most(4, 5), 5u);
  EXPECT_EQ(most(4, 7), 6u);
  EXPECT_EQ(most(9, 7), 1u);
  EXPECT_THROW(most(10, 7), RequestError);
}

TEST_F(ServerTest, StopTextsAreFew) {
  Start();
  std::vector<std::string> stops(16, "no such text");
  EXPECT_EQ(Complete({{"stop", stops}}).status, 200);
  stops.push_back("nor this");
  EXPECT_EQ(Complete({{"stop", stops}}).status, 400);
}

// What clients send although they want nothing of it.
TEST_F(ServerTest, FieldsThatAskForNothingAreTaken) {
  Start();
  const std::string text = Complete({}).json()["choices"][0]["text"];
  for (const char* const field : {"stop", "logprobs", "n", "logit_bias", "best_of", "tools", "stream_options", "seed"})
    EXPECT_EQ(Complete({{field, nullptr}}).json()["choices"][0]["text"], text) << field;
  EXPECT_EQ(Complete({{"logit_bias", Json::object()}, {"stop", Json::array()}, {"n", 1}}).status, 200);
  EXPECT_EQ(Complete({{"prompt", Json::array({"the tea"})}}).json()["choices"][0]["text"], text);
  const Json ids = tokenizer_->Encode("the tea", true, true);
  EXPECT_EQ(Complete({{"prompt", Json::array({ids})}}).json()["choices"][0]["text"], text);
  const Json chat = {{"messages", {{{"role", "user"}, {"content", "x"}, {"refusal", nullptr}, {"tool_calls", nullptr}}}},
                     {"response_format", {{"type", "text"}}},
                     {"max_tokens", 3},
                     {"max_completion_tokens", 2},
                     {"tools", nullptr}};
  EXPECT_EQ(Post("/v1/chat/completions", chat).status, 200);
  for (const Json& more : std::vector<Json>{{{"tools", Json::array()}, {"tool_choice", "auto"}},
                                            {{"store", false}, {"metadata", Json::object()}},
                                            {{"parallel_tool_calls", true}, {"service_tier", "auto"}},
                                            {{"modalities", {"text"}}}}) {
    Json body = chat;
    body.update(more);
    EXPECT_EQ(Post("/v1/chat/completions", body).status, 200) << more;
  }
  const Json response = {{"input", "the tea"}, {"max_output_tokens", 2}, {"text", {{"format", {{"type", "text"}}}}}};
  EXPECT_EQ(Post("/v1/responses", response).status, 200);
  EXPECT_EQ(Complete({{"stream", true}, {"stream_options", {{"include_obfuscation", false}}}}).status, 200);
  EXPECT_EQ(Complete({{"echo", false}, {"best_of", 1}, {"suffix", ""}}).json()["choices"][0]["text"], text);
  EXPECT_EQ(Complete({{"seed", -1}}).json()["choices"][0]["text"], text);  // any whole number of 64 bits
  const Json drawn = {{"temperature", 3}, {"seed", -1}};
  EXPECT_EQ(Complete(drawn).json()["choices"][0]["text"], Complete(drawn).json()["choices"][0]["text"]);
}

// Two bytes of the body would take a hundred of memory.
TEST_F(ServerTest, ABodyOfManyPartsIsRefused) {
  Start({.http = {.port = 0, .max_body = 1 << 20}});
  const auto said = [&](size_t n) {
    std::string parts = "[]";
    for (size_t i = 1; i < n; ++i) parts += ",[]";
    return Call(RequestText("POST", "/v1/completions", R"({"prompt":[)" + parts + "]}")).body;
  };
  EXPECT_NE(said(99998).find("several prompts are several requests"), std::string::npos);
  EXPECT_NE(said(99999).find("the body has 100001 arrays and objects, at most 100000 are allowed"), std::string::npos);
}

TEST_F(ServerTest, GarbageDoesNotHurt) {
  Start();
  for (const std::string body : {"", "{", "[1]", "\"x\"", "{\"prompt\": \"\xff\xfe\"}", "nul"}) {
    const Reply reply = Call(RequestText("POST", "/v1/completions", body));
    EXPECT_EQ(reply.status, 400) << body;
    EXPECT_TRUE(reply.json().contains("error")) << reply.body;
  }
  EXPECT_EQ(Call(RequestText("POST", "/v1/completions", "[1]")).json()["error"]["message"],
            "the body is not a JSON object");
  const std::string half = Call(RequestText("POST", "/v1/completions", R"({"prompt": "\ud800"})")).body;
  EXPECT_NE(half.find("the body is not valid JSON: parse error at line 1, column 19"), std::string::npos) << half;
  EXPECT_EQ(Call(RequestText("POST", "/v1/completions", std::string(1 << 17, ' '))).status, 413);
  EXPECT_EQ(Call(RequestText("POST", "/v1/completions", std::string(60000, '['))).status, 400);
  const std::string nested = std::string(30000, '[') + std::string(30000, ']');
  for (const char* const path : {"/v1/completions", "/v1/chat/completions", "/v1/responses", "/tokenize", "/detokenize", "/apply-template"})
    for (const char* const field : {"prompt", "stop", "messages", "input", "content", "tokens", "anything"}) {
      const Reply reply = Call(RequestText("POST", path, fmt::format(R"({{"{}":{}}})", field, nested)));
      EXPECT_EQ(reply.status, 400) << path << field;
      EXPECT_NE(reply.body.find("nests arrays and objects deeper than 64 levels"), std::string::npos) << reply.body;
    }
  EXPECT_EQ(Get("/nothing").status, 404);
  EXPECT_EQ(Get("/nothing").json()["error"]["param"], nullptr);
  const Reply other_method = Get("/v1/completions");
  EXPECT_EQ(other_method.status, 405);
  EXPECT_EQ(Call(RequestText("GRAB", "/v1/completions", "")).status, 405);
  EXPECT_EQ(Call(RequestText("GRAB", "/nothing", "")).status, 404);
  EXPECT_EQ(Get("/openapiXjson").status, 404);
  EXPECT_EQ(Get("/health?a=b?c#d").status, 200);
  EXPECT_NE(other_method.head.find("Allow: POST"), std::string::npos) << other_method.head;
  Rng rng(3);
  for (int i = 0; i < 200; ++i) {
    std::string bytes = i % 2 == 0 ? "" : RequestText("POST", "/v1/completions", R"({"prompt":"the","max_tokens":3})");
    for (int n = 0; n < 30; ++n) {
      const char c = static_cast<char>(rng.Below(256));
      if (bytes.size() < 100)
        bytes += c;
      else
        bytes[rng.Below(bytes.size())] = c;
    }
    const Connection connection(port_);
    connection.Send(bytes);
    connection.EndSending();
    connection.All();
  }
  EXPECT_EQ(Complete({}).status, 200);
}

TEST_F(ServerTest, AClientThatVanishesEndsItsText) {
  Start();
  LongStream().reset();
  EXPECT_TRUE(Soon([&] { return scheduler_->Metrics().jobs_cancelled == 1; }));
  {
    const Connection connection(port_);
    const Json body = {{"prompt", "the tea"},
                       {"temperature", 0},
                       {"max_tokens", 150000},
                       {"ignore_eos", true},
                       {"kv_policy", "window(24)"}};
    connection.Send(RequestText("POST", "/v1/completions", body.dump()));
    EXPECT_TRUE(Soon([&] { return scheduler_->Metrics().running == 1; }));
  }
  EXPECT_TRUE(Soon([&] { return scheduler_->Metrics().jobs_cancelled == 2; }));
  EXPECT_TRUE(Soon([&] {  // a moment after it is counted
    const SchedulerMetrics metrics = scheduler_->Metrics();
    return metrics.running == 0 && metrics.kv_bytes_reserved == 0;
  }));
}

// As "echo ... | nc" asks.
TEST_F(ServerTest, WhoHasEndedItsSideIsAnswered) {
  Start();
  for (const char* const path : {"/health", "/openapi.json", "/nothing"}) {
    const Connection connection(port_);
    connection.Send(RequestText("GET", path, ""));
    connection.EndSending();
    EXPECT_EQ(ParseReply(connection.All()).status, std::string_view(path) == "/nothing" ? 404 : 200) << path;
  }
}

TEST_F(ServerTest, AFullQueueIsTold) {
  Start({.scheduler = {.max_running = 1, .max_queued = 1, .step_tokens = 16}});
  auto running = LongStream();
  Connection waiting(port_);
  waiting.Send(RequestText("POST", "/v1/completions", R"({"prompt":"the","max_tokens":3})"));
  ASSERT_TRUE(Soon([&] { return scheduler_->Metrics().queued == 1; }));
  const Reply refused = Complete({});
  EXPECT_EQ(refused.status, 429);
  EXPECT_NE(refused.head.find("Retry-After: 1"), std::string::npos);
  EXPECT_EQ(refused.json()["error"]["type"], "rate_limit_error");
  running.reset();
  EXPECT_EQ(ParseReply(waiting.All()).status, 200);
  EXPECT_EQ(scheduler_->Metrics().jobs_rejected, 1u);
}

// Who begins at once does not wait: also who asks as soon as it has its answer, and several that come together.
TEST_F(ServerTest, WithoutAQueueNobodyWaits) {
  Start({.scheduler = {.max_running = 3, .max_queued = 0, .step_tokens = 16}});
  EXPECT_EQ(Complete({{"n", 3}, {"max_tokens", 2}}).status, 200);
  GenerationOptions options;
  options.sampler.temperature = 0;
  options.max_tokens = 2;
  for (int i = 0; i < 500; ++i) {
    const auto job = scheduler_->Submit({.prompt = tokenizer_->Encode("the tea", true, true),
                                         .options = options,
                                         .config = engine_.MakeCacheConfig(CacheSpec::Parse("full"), kCtx),
                                         .choices = 3});
    while (!job->Wait(1s).ended()) {
    }
  }
  options.max_tokens = 150000;
  options.ignore_end = true;
  const JobRequest request{.prompt = tokenizer_->Encode("the tea", true, true),
                           .options = options,
                           .config = engine_.MakeCacheConfig(CacheSpec::Parse("window(24)"), kCtx)};
  std::vector<std::shared_ptr<Job>> jobs;
  for (int i = 0; i < 3; ++i) jobs.push_back(scheduler_->Submit(request));
  EXPECT_THROW(scheduler_->Submit(request), BusyError);
  ASSERT_TRUE(Soon([&] { return scheduler_->Metrics().running == 3; }));
  EXPECT_EQ(Complete({}).status, 429);
  jobs[1]->Cancel();
  ASSERT_TRUE(Soon([&] { return scheduler_->Metrics().running == 2; }));
  EXPECT_EQ(Complete({}).status, 200);
  EXPECT_EQ(Complete({{"n", 2}}).status, 429);
  for (const auto& job : jobs) job->Cancel();
}

TEST_F(ServerTest, CachesKeepToTheirMemory) {
  const auto config = engine_.MakeCacheConfig(CacheSpec::Parse("full"), kCtx);
  const size_t one = config->Plan(tokenizer_->Encode("the tea", true, true).size(), 300).bytes_peak;
  Start({.scheduler = {.max_running = 3, .max_queued = 8, .kv_memory = one + one / 2, .step_tokens = 16}});
  std::vector<std::thread> clients;
  for (int i = 0; i < 4; ++i)
    clients.emplace_back([&] {
      const Json answer = Complete({{"max_tokens", 300}, {"ignore_eos", true}}).json();
      EXPECT_EQ(answer["usage"]["completion_tokens"], 300);
    });
  size_t most = 0;
  while (scheduler_->Metrics().jobs_finished < 4) {
    most = std::max(most, scheduler_->Metrics().running);
    EXPECT_LE(scheduler_->Metrics().kv_bytes, one + one / 2);
  }
  for (std::thread& client : clients) client.join();
  EXPECT_LE(most, 1u);
  EXPECT_GE(scheduler_->Metrics().steps, 4u * 300);  // none was shared
  const Reply large = Complete({{"max_tokens", 3000}});
  EXPECT_EQ(large.status, 400);
  EXPECT_NE(large.body.find("the text's cache may take"), std::string::npos);
}

// The value of a line of /metrics; -1: there is none.
double Metric(const std::string& text, const std::string& name) {
  const size_t at = text.find("\n" + name + " ");
  return at == std::string::npos ? -1 : std::stod(text.substr(at + name.size() + 2));
}

TEST_F(ServerTest, MetricsTellPoliciesApart) {
  const std::string folder = std::filesystem::temp_directory_path().string();
  const std::string offloaded = CacheSpec::Parse(fmt::format("cluster(24, skip=0, offload=\"{}\")", folder)).ToString();
  Start({.kv = {"full", "window(24)", "h2o(24)+merge", offloaded}});
  Json body = {{"kv_policy", "h2o(24)+merge"}, {"max_tokens", 60}, {"ignore_eos", true}};
  const Json merged = Complete(body).json()["usage"]["kv"];
  body = {{"kv_policy", offloaded}, {"prompt", std::vector<int32_t>(480, 'x')}, {"ignore_eos", true}};
  const Reply recalled = Complete(body);
  ASSERT_EQ(recalled.status, 200) << recalled.body;
  const auto stream = LongStream();
  ASSERT_TRUE(Soon([&] { return scheduler_->Slots().size() == 1 && scheduler_->Slots()[0].generated_tokens > 100; }));
  const std::string text = Get("/metrics").body;
  const auto of = [&](const std::string& name, const std::string& spec) {
    return Metric(text, fmt::format("lesskv_spec_{}{{spec=\"{}\"}}", name, spec));
  };
  EXPECT_GT(merged["merged"], 0);
  EXPECT_NEAR(of("tokens_merged_total", "h2o(24)+merge"), merged["merged"].get<double>(), 1e-3);
  EXPECT_NEAR(of("tokens_evicted_total", "h2o(24)+merge"), merged["evicted"].get<double>(), 1e-3);
  EXPECT_EQ(of("tokens_absorbed_total", "h2o(24)+merge"), 0);
  EXPECT_NEAR(Metric(text, "lesskv_tokens_merged_total"), merged["merged"].get<double>(), 1e-3);
  EXPECT_EQ(of("requests_running", "h2o(24)+merge"), 0);
  EXPECT_EQ(of("idle", "h2o(24)+merge"), 1);
  EXPECT_GT(of("idle_bytes", "h2o(24)+merge"), 0);
  EXPECT_EQ(of("requests_running", "window(24)"), 1);
  EXPECT_EQ(of("tokens_resident", "window(24)"), 24);
  EXPECT_GT(of("kv_bytes", "window(24)"), 0);
  EXPECT_GT(of("kv_logical_bytes", "window(24)"), of("kv_bytes", "window(24)") / 4);
  EXPECT_EQ(Metric(text, "lesskv_kv_bytes"), of("kv_bytes", "window(24)"));
  EXPECT_EQ(of("kv_bytes", "full"), -1);  // no text had it
  std::string label = offloaded;
  for (size_t at = 0; (at = label.find('"', at)) != std::string::npos; at += 2) label.insert(at, "\\");
  // Each of 11 generated tokens was read by the heads of a group, each of which recalled 24 - 16 rows.
  const ModelConfig& model = engine_.model().config();
  EXPECT_EQ(of("tokens_recalled_total", label), 11 * 8 * static_cast<double>(model.n_heads / model.n_kv_heads)) << text;
  EXPECT_EQ(Metric(text, "lesskv_tokens_recalled_total"), of("tokens_recalled_total", label));
}

TEST_F(ServerTest, SpecsInMetricsAreEscapedAndFew) {
  SchedulerMetrics metrics;
  metrics.specs["a\"b\\c\nd"].idle = 3;
  EXPECT_NE(MetricsText(metrics).find("\nlesskv_spec_idle{spec=\"a\\\"b\\\\c\\nd\"} 3\n"), std::string::npos)
      << MetricsText(metrics);
  for (size_t i = 0; i < 100; ++i) metrics.Of(std::to_string(i)).idle = 1;
  EXPECT_EQ(metrics.specs.size(), SchedulerMetrics::kMostSpecs + 1);
  EXPECT_EQ(metrics.Of("5").idle, 1u);
  EXPECT_EQ(&metrics.Of("99"), &metrics.Of(SchedulerMetrics::kOtherSpecs));
}

TEST_F(ServerTest, KeysAreAskedFor) {
  Start({.http = {.port = 0, .api_keys = {"secret"}}});
  EXPECT_EQ(Get("/health").status, 200);
  EXPECT_EQ(Get("/v1/models").status, 401);
  EXPECT_EQ(Get("/v1/models", "Authorization: Bearer secreT\r\n").status, 401);
  EXPECT_EQ(Get("/v1/models", "Authorization: Bearer secret1\r\n").status, 401);
  EXPECT_EQ(Get("/v1/models", "Authorization: Bearer secret\r\n").status, 200);
  EXPECT_EQ(Get("/v1/models", "Authorization: bearer secret\r\n").status, 200);
  for (const char* const other : {"secret", "Basic secret", "Bearer", "Bearer  secre", "Bearersecret", "Bearer SECRET"})
    EXPECT_EQ(Get("/v1/models", fmt::format("Authorization: {}\r\n", other)).status, 401) << other;
  EXPECT_EQ(Complete({}).status, 401);
  EXPECT_TRUE(SameSecret("ab", "ab"));
  EXPECT_FALSE(SameSecret("ab", "abc"));
  EXPECT_FALSE(SameSecret("abc", "ab"));
  EXPECT_FALSE(SameSecret("", "a"));
}

TEST_F(ServerTest, OthersAreServedWithAKeyOnly) {
  Start();
  EXPECT_THROW(HttpServer(*context_, *scheduler_, {.host = "0.0.0.0", .port = 0}), Error);
  EXPECT_NO_THROW(HttpServer(*context_, *scheduler_, {.host = "0.0.0.0", .port = 0, .api_keys = {"k"}}));
  EXPECT_TRUE(IsLoopback("127.0.0.1"));
  EXPECT_FALSE(IsLoopback("127.0.0.1.example.org"));
  EXPECT_THROW(HttpServer(*context_, *scheduler_, {.port = port_}).Bind(), Error);
}

// Whoever runs it must be able to tell such an end from one that was asked for.
TEST_F(ServerTest, TheEndOfTheListeningSocketIsTold) {
  Start();
  for (const bool asked : {true, false}) {
    HttpServer server(*context_, *scheduler_, {.port = 0});
    const int port = server.Bind();
    bool stopped = !asked;
    std::thread thread([&] { stopped = server.Listen(); });
    {
      const Connection connection(port);
      connection.Send(RequestText("GET", "/health", ""));
      EXPECT_EQ(ParseReply(connection.All()).status, 200);
    }
    if (asked) server.Stop();
    sockaddr_in address{};
    for (int fd = 3; !asked && fd < 1000; ++fd) {
      socklen_t size = sizeof address;
      int listens = 0;
      if (::getsockname(fd, reinterpret_cast<sockaddr*>(&address), &size) != 0) continue;
      if (ntohs(address.sin_port) != port) continue;
      size = sizeof listens;
      if (::getsockopt(fd, SOL_SOCKET, SO_ACCEPTCONN, &listens, &size) == 0 && listens != 0) ::shutdown(fd, SHUT_RDWR);
    }
    thread.join();
    EXPECT_EQ(stopped, asked);
  }
}

TEST_F(ServerTest, TheOtherPathsAnswer) {
  Start();
  const Json ids = Post("/tokenize", {{"content", "the tea"}, {"add_special", true}}).json()["tokens"];
  EXPECT_EQ(ids, tokenizer_->Encode("the tea", true, true));
  Json rest = ids;
  rest.erase(0);
  EXPECT_EQ(Post("/detokenize", {{"tokens", rest}}).json()["content"], "the tea");
  EXPECT_EQ(Post("/detokenize", {{"tokens", {272}}}).status, 400);
  EXPECT_EQ(Get("/v1/models").json()["data"][0]["id"], "tiny");
  EXPECT_EQ(Get("/props").json()["kv_policies"], (Json{"full", "window(24)", "h2o(24)"}));
  Complete({});
  ASSERT_TRUE(Soon([&] { return scheduler_->Metrics().running == 0; }));
  const std::string metrics = Get("/metrics").body;
  EXPECT_NE(metrics.find("\nlesskv_generated_tokens_total 12\n"), std::string::npos) << metrics;
  EXPECT_NE(metrics.find("\nlesskv_requests_finished_total 1\n"), std::string::npos);
}

TEST_F(ServerTest, TimeIsLimited) {
  Start({.max_time = 0s});
  const Reply late = Complete({});
  EXPECT_EQ(late.status, 504);
  EXPECT_EQ(late.json()["error"]["code"], "timeout");
  EXPECT_NE(late.body.find("time ran out"), std::string::npos);
}

// Nothing of a whole answer has been sent when it fails, however far it has come.
TEST_F(ServerTest, AWholeAnswerThatFailsLateHasItsStatus) {
  Start({.max_time = 1s});
  // One token for ever: neither chance nor a template's stops end the text.
  const Json endless = {{"logit_bias", {{std::to_string(tokenizer_->Encode("a", false, false)[0]), 100}}},
                        {"temperature", 0},
                        {"max_tokens", 150000},
                        {"kv_policy", "window(24)"}};
  const std::pair<std::string, Json> requests[] = {
      {"/v1/completions", {{"prompt", "the tea"}}},
      {"/v1/chat/completions", {{"messages", {{{"role", "user"}, {"content", "the tea"}}}}}}};
  for (auto [path, body] : requests) {
    body.update(endless);
    const Reply late = Post(path, body);
    EXPECT_EQ(late.status, 504) << path << late.body;
    EXPECT_EQ(late.json()["error"]["code"], "timeout");
  }
  EXPECT_GT(scheduler_->Metrics().generated_tokens, 10u);
}

TEST_F(ServerTest, TheModelIsFoundByItsName) {
  Start();
  EXPECT_EQ(Get("/v1/models/tiny").json(), Get("/v1/models").json()["data"][0]);
  const Reply other = Get("/v1/models/org%2Fmodel");
  EXPECT_EQ(other.status, 404);
  EXPECT_EQ(other.json()["error"]["message"], "there is no model 'org/model', only 'tiny'");
  EXPECT_EQ(other.json()["error"]["code"], "model_not_found");
  EXPECT_EQ(Get("/v1/models/" + std::string(8000, 'x')).status, 404);
  EXPECT_EQ(Get("/v1/models/").status, 404);
  EXPECT_EQ(Post("/v1/models/tiny", {}).status, 405);
}

TEST_F(ServerTest, TheEndOfTheServerEndsItsTexts) {
  Start({.scheduler = {.max_running = 1, .max_queued = 8, .step_tokens = 16}});
  const auto stream = LongStream();
  const Connection waiting(port_);
  waiting.Send(RequestText("POST", "/v1/completions", R"({"prompt":"the","max_tokens":3})"));
  ASSERT_TRUE(Soon([&] { return scheduler_->Metrics().queued == 1; }));
  scheduler_->Stop();
  EXPECT_NE(stream->All().find("the server is stopping"), std::string::npos);
  EXPECT_EQ(ParseReply(waiting.All()).status, 503);
  const Reply late = Complete({});
  EXPECT_EQ(late.status, 503);
  EXPECT_NE(late.head.find("Retry-After"), std::string::npos);
}

}  // namespace
}  // namespace lesskv::server_test
