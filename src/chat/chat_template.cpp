#include "chat/chat_template.h"

#include <algorithm>
#include <utility>

#include "base/error.h"

namespace lesskv {
namespace {

using Kind = ChatPiece::Kind;

// What Python's str.strip() takes away.
constexpr std::string_view kWhiteSpace[] = {
    " ",      "\t",     "\n",     "\v",     "\f",     "\r",     "\x1c",   "\x1d",   "\x1e",   "\x1f",
    "\u0085", "\u00A0", "\u1680", "\u2000", "\u2001", "\u2002", "\u2003", "\u2004", "\u2005", "\u2006",
    "\u2007", "\u2008", "\u2009", "\u200A", "\u2028", "\u2029", "\u202F", "\u205F", "\u3000"};

std::string_view TrimLeft(std::string_view text) {
  for (bool found = true; found;) {
    found = false;
    for (const std::string_view space : kWhiteSpace) {
      if (!text.starts_with(space)) continue;
      text.remove_prefix(space.size());
      found = true;
    }
  }
  return text;
}

std::string_view TrimRight(std::string_view text) {
  for (bool found = true; found;) {
    found = false;
    for (const std::string_view space : kWhiteSpace) {
      if (!text.ends_with(space)) continue;
      text.remove_suffix(space.size());
      found = true;
    }
  }
  return text;
}

// Takes white space away from both ends of the pieces from `first` on, as if they were one text.
void Trim(std::vector<ChatPiece>& pieces, size_t first) {
  while (pieces.size() > first) {
    pieces[first].text = TrimLeft(pieces[first].text);
    if (!pieces[first].text.empty()) break;
    pieces.erase(pieces.begin() + static_cast<std::ptrdiff_t>(first));
  }
  while (pieces.size() > first) {
    pieces.back().text = TrimRight(pieces.back().text);
    if (!pieces.back().text.empty()) break;
    pieces.pop_back();
  }
}

bool NeedsEos(const ChatFormat& format) {
  for (const ChatMarks& marks : {format.system, format.question, format.answer})
    if (marks.after.find("{eos}") != std::string_view::npos) return true;
  return false;
}

std::string TokenText(const Tokenizer& tokenizer, int32_t id) {
  return id < 0 ? std::string() : std::string(tokenizer.TokenBytes(id));
}

const ChatFormat& FormatNamed(const std::string& name) {
  for (const ChatFormat& format : ChatFormats())
    if (format.name == name) return format;
  Fail(ErrorCode::kInvalidArgument, "--chat-template: expected one of {}; found \"{}\"", ChatFormatNames(), name);
}

}  // namespace

// Appends the parts of a conversation to pieces.
class ChatTemplate::Writer {
 public:
  explicit Writer(const ChatTemplate& chat) : chat_(chat), format_(*chat.format_) {}

  void Marks(std::string_view text) {
    for (size_t at = 0; at < text.size();) {
      const size_t brace = std::min(text.find('{', at), text.size());
      Add(Kind::kMarks, text.substr(at, brace - at));
      const std::string_view word = text.substr(brace, 5);
      if (word == "{bos}") Add(Kind::kMarks, chat_.bos_);
      if (word == "{eos}") Add(Kind::kMarks, chat_.eos_);
      at = brace + word.size();
    }
  }

  void Message(const ChatMessage& message) {
    Gap();
    switch (message.role) {
      case ChatRole::kSystem:
        return System(message.content);
      case ChatRole::kUser:
        return Question(message.content);
      case ChatRole::kAssistant:
        return Around(format_.answer, Kind::kAssistant, Trimmed(message.content));
    }
  }

  // Behind a message, when something follows.
  void Gap() { Marks(std::exchange(gap_, {})); }
  void EndAnswer() {
    Marks(format_.answer.after);
    gap_ = format_.answer.gap;
  }

  std::vector<ChatPiece> Finish() {
    if (has_system_)
      Fail(ErrorCode::kInvalidArgument,
           "the chat template {} puts a system prompt into a question, and none follows it", format_.name);
    return std::move(pieces_);
  }

 private:
  void Add(Kind kind, std::string_view text) {
    if (!text.empty()) pieces_.push_back({kind, std::string(text)});
  }

  void Around(const ChatMarks& marks, Kind kind, std::string_view text) {
    Marks(marks.before);
    Add(kind, text);
    Marks(marks.after);
    gap_ = marks.gap;
  }

  std::string_view Trimmed(std::string_view text) const {
    return format_.trim == ChatTrim::kNone ? text : TrimLeft(TrimRight(text));
  }

  void System(const std::string& text) {
    if (!format_.system_is_message) {
      system_ += text;
      has_system_ = true;
      return;
    }
    Marks(format_.system.before);
    Marks(format_.default_system_head);
    Add(Kind::kSystem, format_.trim == ChatTrim::kMessages ? Trimmed(text) : text);
    Marks(format_.system.after);
    gap_ = format_.system.gap;
  }

  void Question(const std::string& text) {
    Marks(format_.question.before);
    const size_t first = pieces_.size();
    if (std::exchange(has_system_, false)) Around(format_.system, Kind::kSystem, std::exchange(system_, {}));
    Add(Kind::kUser, format_.trim == ChatTrim::kMessages ? Trimmed(text) : text);
    if (format_.trim == ChatTrim::kQuestions) Trim(pieces_, first);
    Marks(format_.question.after);
    gap_ = format_.question.gap;
  }

  const ChatTemplate& chat_;
  const ChatFormat& format_;
  std::vector<ChatPiece> pieces_;
  std::string_view gap_;
  std::string system_;  // waits for the question that it is put into
  bool has_system_ = false;
};

ChatTemplate::ChatTemplate(const ChatFormat& format, std::string default_system, std::string bos, std::string eos)
    : ChatTemplate({&format, std::move(default_system)}, std::move(bos), std::move(eos)) {}

ChatTemplate::ChatTemplate(const RecognisedFormat& found, std::string bos, std::string eos)
    : format_(found.format),
      default_system_(found.default_system),
      prologue_(found.begins_with_bos ? "{bos}" : found.format->prologue),
      bos_(std::move(bos)),
      eos_(std::move(eos)) {}

ChatTemplate ChatTemplate::Choose(const std::string& name, const std::string& jinja, const Tokenizer& tokenizer,
                                  const std::string& file) {
  if (name.empty() && jinja.empty())
    Fail(ErrorCode::kInvalidArgument,
         "{}: the model has no chat template of its own; name one with --chat-template: {}", file, ChatFormatNames());
  std::optional<RecognisedFormat> found;
  if (name.empty()) {
    found = RecogniseChatFormat(jinja);
  } else {
    const ChatFormat& format = FormatNamed(name);
    found = RecognisedFormat{&format, std::string(format.default_system)};
  }
  if (!found)
    Fail(ErrorCode::kInvalidArgument,
         "{}: the model's chat template is none of those known here; name one with "
         "--chat-template: {}",
         file, ChatFormatNames());
  if (NeedsEos(*found->format) && tokenizer.eos() < 0)
    Fail(ErrorCode::kInvalidArgument, "{}: the chat template {} needs an end-of-text token, which the vocabulary lacks",
         file, found->format->name);
  return ChatTemplate(*found, TokenText(tokenizer, tokenizer.bos()), TokenText(tokenizer, tokenizer.eos()));
}

std::vector<ChatPiece> ChatTemplate::Render(std::span<const ChatMessage> messages, bool answer_prompt) const {
  if (messages.empty()) Fail(ErrorCode::kInvalidArgument, "a conversation needs at least one message, found none");
  Writer writer(*this);
  writer.Marks(prologue_);
  const bool has_default = !default_system_.empty() || !format_->default_system_head.empty();
  if (messages[0].role != ChatRole::kSystem && has_default) writer.Message({ChatRole::kSystem, default_system_});
  for (const ChatMessage& message : messages) writer.Message(message);
  if (answer_prompt) {
    writer.Gap();
    writer.Marks(format_->answer_prompt);
  }
  return writer.Finish();
}

std::vector<ChatPiece> ChatTemplate::RenderNext(const std::string& question) const {
  Writer writer(*this);
  writer.EndAnswer();
  writer.Message({ChatRole::kUser, question});
  writer.Gap();
  writer.Marks(format_->answer_prompt);
  return writer.Finish();
}

}  // namespace lesskv
