// What readers of requests must bear: any bytes at all. For the tests and the fuzzers.
#pragma once

#include <algorithm>
#include <string>
#include <string_view>

#include "server/api.h"
#include "server/http_request.h"

namespace lesskv {

// Bodies that make sense, for mutations to begin with.
inline constexpr std::string_view kSomeBodies[] = {
    R"x({"prompt":"the tea","max_tokens":3,"temperature":0.5,"stop":["a","b"],"kv_policy":"h2o(24)"})x",
    R"x({"prompt":["the"],"n":2,"logprobs":5,"logit_bias":{"5":-100,"271":1e1},"frequency_penalty":-2,"ignore_eos":true,
        "echo":null})x",
    R"x({"messages":[{"role":"user","content":"y","name":null}],"logprobs":true,"top_logprobs":20,"n":3,"seed":9,
        "presence_penalty":1.5,"response_format":{"type":"text"}})x",
    R"x({"prompt":[1,2,300],"stream":true,"stream_options":{"include_usage":true},"kv_stats":3,"seed":1})x",
    R"x({"messages":[{"role":"system","content":"x"},{"role":"user","content":[{"type":"text","text":"é\u0000"}]}]})x",
    R"x({"messages":[{"role":"user","content":"y"}],"protected_spans":[[0,1],[1,2]],"max_completion_tokens":9})x",
    R"x({"input":[{"role":"user","content":"z"}],"instructions":"i","store":false,"max_output_tokens":2})x",
    R"x({"content":"the tea","add_special":true,"parse_special":false})x",
    R"x({"tokens":[1,2,3,271]})x",
};

// Each reader takes the body, or refuses it with an error that is the client's. How many take it.
inline int TakeBody(std::string_view body, const ApiContext& context) {
  const auto take = [](auto&& read) {
    try {
      read();
      return 1;
    } catch (const Error& error) {
      if (ToApiError(error).status >= 500) throw;
      return 0;
    }
  };
  int taken = take([&] { ParseChatRequest(body, context); });
  taken += take([&] { ParseCompletionRequest(body, context); });
  taken += take([&] { ParseResponseRequest(body, context); });
  taken += take([&] { Tokenize(body, context); });
  taken += take([&] { Detokenize(body, context); });
  return taken + take([&] { ApplyTemplate(body, context); });
}

// The same for what comes over a connection, in pieces of that size: it ends, or is refused. How many requests were whole.
inline int TakeRequests(std::string_view bytes, size_t piece) {
  HttpReader reader(1 << 16, [&] {
    const std::string_view more = bytes.substr(0, piece);
    bytes.remove_prefix(more.size());
    return more;
  });
  int whole = 0;
  try {
    for (; const auto head = reader.Head(); ++whole) reader.Body(*head);
  } catch (const ApiError&) {
  }
  return whole;
}

}  // namespace lesskv
