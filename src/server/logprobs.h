// Log-probabilities of generated tokens in OpenAI's two forms.
#pragma once

#include <nlohmann/json.hpp>
#include <span>

#include "engine/logprobs.h"

namespace lesskv {

// Of chats: {"content": [{"token", "logprob", "bytes", "top_logprobs"}, ...], "refusal": null}. A token that is no whole
// UTF-8 is written as "\xc3\xa9"; one that is never shown has a name and no bytes.
nlohmann::ordered_json ChatLogprobs(std::span<const GeneratedToken> tokens);

// Of completions: {"tokens", "token_logprobs", "top_logprobs", "text_offset"}; here such a token is
// "bytes:\xc3\xa9". The token that was chosen is among the likeliest in any case.
nlohmann::ordered_json CompletionLogprobs(std::span<const GeneratedToken> tokens);

}  // namespace lesskv
