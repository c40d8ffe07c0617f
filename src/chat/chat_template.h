// Conversations to the text, and to the tokens, that a model was trained to read.
//
// What a user says can never pose as the template: every stretch of text says where it comes from, and only the
// template's own marks become special tokens.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "chat/chat_format.h"
#include "tokenizer/tokenizer.h"

namespace lesskv {

enum class ChatRole { kSystem, kUser, kAssistant };

struct ChatMessage {
  ChatRole role;
  std::string content;
};

// A stretch of a written conversation; never empty.
struct ChatPiece {
  enum class Kind { kMarks, kSystem, kUser, kAssistant };
  Kind kind;
  std::string text;
};

class ChatTemplate {
 public:
  // `bos`, `eos`: the texts of the vocabulary's tokens; empty when it has none.
  ChatTemplate(const ChatFormat& format, std::string default_system, std::string bos, std::string eos);
  ChatTemplate(const RecognisedFormat& found, std::string bos, std::string eos);

  // The template of a model file. `name`: of a format; empty: as recognised in `jinja`, the file's own
  // tokenizer.chat_template. Throws Error kInvalidArgument, naming the known formats, when there is none with that
  // name, `jinja` is empty or not recognised, or the format needs an end token that the vocabulary lacks. `file`: for
  // messages.
  static ChatTemplate Choose(const std::string& name, const std::string& jinja, const Tokenizer& tokenizer,
                             const std::string& file);

  std::string_view name() const { return format_->name; }
  // A text that ends an answer, where the format has no token for it; else empty.
  std::string_view stop() const { return format_->stop; }

  // The whole conversation, with the mark behind which the model answers when `answer_prompt`. Roles may come in any
  // order, but where the format puts a system prompt inside a question, one must follow (Error kInvalidArgument). At
  // least one message.
  std::vector<ChatPiece> Render(std::span<const ChatMessage> messages, bool answer_prompt = true) const;

  // What follows an answer, whose own end has not been read: that end, the next question, the mark of the next answer.
  std::vector<ChatPiece> RenderNext(const std::string& question) const;

 private:
  class Writer;

  const ChatFormat* format_;
  std::string default_system_;
  std::string_view prologue_;
  std::string bos_, eos_;
};

// Half-open.
struct TokenSpan {
  size_t begin = 0, end = 0;
};

struct ChatTokens {
  std::vector<int32_t> ids;
  // Marks and system prompts, ascending and disjoint. A token across a border belongs to what comes first.
  std::vector<TokenSpan> fixed;
};

struct ChatEncoding {
  bool begins_text = true;     // BOS comes first where the vocabulary or the template wants one; never two
  bool at_start = true;        // a special token, or nothing, comes before
  bool parse_special = false;  // special tokens in what people say are parsed, too
};
ChatTokens EncodeChat(const Tokenizer& tokenizer, std::span<const ChatPiece> pieces, const ChatEncoding& encoding);

// A whole conversation, from its beginning to the mark of the next answer. `fixed` are those of the first turn alone,
// up to the mark behind the first question: what is protected does not grow with every turn.
ChatTokens EncodeConversation(const Tokenizer& tokenizer, const ChatTemplate& chat,
                              std::span<const ChatMessage> messages, bool parse_special = false);

}  // namespace lesskv
