// What run --chat and chat share: options, the model's chat template, questions to tokens.
#pragma once

#include <CLI/CLI.hpp>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "chat/chat_template.h"
#include "common.h"

namespace lesskv {

struct ChatOptions {
  std::string format;                 // name of a chat format; empty: the model file's own
  std::optional<std::string> system;  // nothing: the format's default, if it has one
  bool parse_special = false;
};
// --chat-template, --system, --special.
void AddChatOptions(CLI::App& command, ChatOptions& options);

ChatTemplate ChooseChatTemplate(const OpenedModel& opened, const ChatOptions& options);

struct ChatTurn {
  std::vector<int32_t> tokens;
  // The template's marks and the system prompt, to be protected from eviction.
  std::vector<ProtectedSpan> fixed;
};
ChatTurn FirstTurn(const Tokenizer& tokenizer, const ChatTemplate& chat, const ChatOptions& options,
                   const std::string& question);

// What to feed to a sequence behind an answer. `pending`: the answer's last token when it was not fed; a token that
// ends a text is left out, because the template writes its own end.
std::vector<int32_t> NextTurn(const Tokenizer& tokenizer, const ChatTemplate& chat, const ChatOptions& options,
                              const Sequence& sequence, std::optional<int32_t> pending, const std::string& question);

}  // namespace lesskv
