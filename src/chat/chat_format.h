// How model families write a conversation, as data: the texts around each message.
#pragma once

#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace lesskv {

// Texts around one role's messages. "{bos}" and "{eos}" stand for the vocabulary's own tokens.
struct ChatMarks {
  std::string_view before, after;
  std::string_view gap = "";  // behind `after`, where something follows
};

enum class ChatTrim {
  kNone,
  kAnswers,    // white space around answers goes
  kMessages,   // around questions and answers, and around a system prompt that is a message of its own
  kQuestions,  // as kMessages, but a system prompt inside a question counts as part of it
};

struct ChatFormat {
  std::string_view name;
  std::string_view prologue = "";  // in front of everything
  bool system_is_message = true;   // false: it lies inside the next question, in front of its text
  ChatMarks system, question, answer;
  std::string_view answer_prompt = "";  // where the model begins to answer; may be shorter than answer.before
  ChatTrim trim = ChatTrim::kNone;
  std::string_view default_system = "";       // used when the conversation has none
  std::string_view default_system_head = "";  // in front of every system prompt, which then is never left out
  std::string_view stop = "";                 // a text that ends an answer, where the format has no token for it
};

// All known formats.
std::span<const ChatFormat> ChatFormats();

// "chatml, llama2, ...", for people.
std::string ChatFormatNames();

// What a model file's chat template says.
struct RecognisedFormat {
  const ChatFormat* format;
  std::string default_system;    // the format's own, or one that stands in the template
  bool begins_with_bos = false;  // the template puts the BOS token in front of everything
};

// The format that the Jinja text of `tokenizer.chat_template` writes, told by texts that only this format's templates
// contain; nothing when there are none, or when the template also writes what the format does not (written_texts.h).
// Never a guess: a text that two formats could have written is not recognised.
std::optional<RecognisedFormat> RecogniseChatFormat(std::string_view jinja);

}  // namespace lesskv
