#include "chat_turns.h"

namespace lesskv {

void AddChatOptions(CLI::App& command, ChatOptions& options) {
  command
      .add_option("--chat-template", options.format,
                  "Chat format (default: recognised in the model's file): " + ChatFormatNames())
      ->option_text("NAME");
  const auto set_system = [&options](const std::string& text) { options.system = text; };  // "" is a prompt, too
  command
      .add_option_function<std::string>("--system", set_system,
                                        "System prompt (default: the chat format's, if it has one)")
      ->option_text("TEXT");
  command.add_flag("--special", options.parse_special, "Special tokens written in questions count as such");
}

ChatTemplate ChooseChatTemplate(const OpenedModel& opened, const ChatOptions& options) {
  constexpr const char* kKey = "tokenizer.chat_template";
  const GgufFile& file = opened.model->file();
  const std::string jinja = file.Find(kKey) == nullptr ? "" : file.Get<std::string>(kKey);
  return ChatTemplate::Choose(options.format, jinja, *opened.tokenizer, file.name());
}

ChatTurn FirstTurn(const Tokenizer& tokenizer, const ChatTemplate& chat, const ChatOptions& options,
                   const std::string& question) {
  std::vector<ChatMessage> messages;
  if (options.system) messages.push_back({ChatRole::kSystem, *options.system});
  messages.push_back({ChatRole::kUser, question});
  ChatTokens tokens = EncodeConversation(tokenizer, chat, messages, options.parse_special);
  ChatTurn turn{std::move(tokens.ids), {}};
  for (const TokenSpan& span : tokens.fixed)
    turn.fixed.push_back({static_cast<int32_t>(span.begin), static_cast<int32_t>(span.end)});
  return turn;
}

std::vector<int32_t> NextTurn(const Tokenizer& tokenizer, const ChatTemplate& chat, const ChatOptions& options,
                              const Sequence& sequence, std::optional<int32_t> pending, const std::string& question) {
  std::vector<int32_t> tokens;
  if (pending && !tokenizer.IsEndOfGeneration(*pending)) tokens.push_back(*pending);
  const int32_t last = !tokens.empty() ? tokens[0] : sequence.tokens().empty() ? -1 : sequence.tokens().back();
  const bool at_start = last < 0 || tokenizer.Type(last) == TokenType::kControl;
  const ChatEncoding encoding{.begins_text = false, .at_start = at_start, .parse_special = options.parse_special};
  const std::vector<int32_t> added = EncodeChat(tokenizer, chat.RenderNext(question), encoding).ids;
  tokens.insert(tokens.end(), added.begin(), added.end());
  return tokens;
}

}  // namespace lesskv
