#include <algorithm>
#include <set>
#include <utility>

#include "chat/chat_template.h"

namespace lesskv {
namespace {

bool IsOurs(const ChatPiece& piece) { return piece.kind == ChatPiece::Kind::kMarks; }
bool IsFixed(const ChatPiece& piece) { return IsOurs(piece) || piece.kind == ChatPiece::Kind::kSystem; }

bool HasLetters(std::string_view text) { return text.find_first_not_of(" \t\r\n") != std::string_view::npos; }

// The template's marks that the tokenizer would find in any text, because the file calls them user-defined tokens.
std::set<std::string_view> MarksFoundAnywhere(const Tokenizer& tokenizer, std::span<const ChatPiece> pieces) {
  std::set<std::string_view> marks;
  for (const ChatPiece& piece : pieces) {
    if (!IsOurs(piece)) continue;
    for (const int32_t id : tokenizer.Encode(piece.text, false, true))
      if (tokenizer.Type(id) == TokenType::kUserDefined && HasLetters(tokenizer.TokenBytes(id)))
        marks.insert(tokenizer.TokenBytes(id));
  }
  return marks;
}

// Cuts `text` inside every mark: no token is found across pieces, so that a mark stays text.
void AppendCut(std::string_view text, const std::set<std::string_view>& marks, std::vector<TextPiece>& out) {
  size_t begin = 0;
  for (size_t at = 0; at < text.size(); ++at) {
    const auto here = [&](std::string_view mark) { return text.substr(at).starts_with(mark); };
    if (std::none_of(marks.begin(), marks.end(), here)) continue;
    out.push_back({text.substr(begin, at + 1 - begin)});
    begin = at + 1;
  }
  out.push_back({text.substr(begin)});
}

class Encoder {
 public:
  Encoder(const Tokenizer& tokenizer, std::span<const ChatPiece> pieces, const ChatEncoding& encoding)
      : tokenizer_(tokenizer), pieces_(pieces), encoding_(encoding), marks_(MarksFoundAnywhere(tokenizer, pieces)) {}

  // The tokens of the first n pieces.
  std::vector<int32_t> First(size_t n) const {
    std::vector<TextPiece> texts;
    for (const ChatPiece& piece : pieces_.first(n)) {
      if (IsOurs(piece) || encoding_.parse_special) {
        texts.push_back({piece.text, true});
      } else {
        AppendCut(piece.text, marks_, texts);
      }
    }
    std::vector<int32_t> ids = tokenizer_.Encode(texts, encoding_.at_start);
    const bool wants_bos = encoding_.begins_text && tokenizer_.add_bos();
    if (wants_bos && (ids.empty() || ids[0] != tokenizer_.bos())) ids.insert(ids.begin(), tokenizer_.bos());
    return ids;
  }

 private:
  const Tokenizer& tokenizer_;
  std::span<const ChatPiece> pieces_;
  ChatEncoding encoding_;
  std::set<std::string_view> marks_;
};

}  // namespace

ChatTokens EncodeChat(const Tokenizer& tokenizer, std::span<const ChatPiece> pieces, const ChatEncoding& encoding) {
  const Encoder encoder(tokenizer, pieces, encoding);
  ChatTokens tokens{encoder.First(pieces.size()), {}};
  for (size_t i = 0; i < pieces.size();) {
    if (!IsFixed(pieces[i])) {
      ++i;
      continue;
    }
    const size_t begin = i == 0 ? 0 : encoder.First(i).size();
    while (i < pieces.size() && IsFixed(pieces[i])) ++i;
    const size_t end = std::min(encoder.First(i).size(), tokens.ids.size());
    if (begin < end) tokens.fixed.push_back({begin, end});
  }
  return tokens;
}

ChatTokens EncodeConversation(const Tokenizer& tokenizer, const ChatTemplate& chat,
                              std::span<const ChatMessage> messages, bool parse_special) {
  const ChatEncoding encoding{.parse_special = parse_special};
  const auto question = std::ranges::find(messages, ChatRole::kUser, &ChatMessage::role);
  const auto n_first = static_cast<size_t>(question - messages.begin()) + (question == messages.end() ? 0 : 1);
  ChatTokens tokens = EncodeChat(tokenizer, chat.Render(messages.first(n_first)), encoding);
  if (n_first == messages.size()) return tokens;
  const std::vector<ChatPiece> pieces = chat.Render(messages);
  const std::vector<int32_t> first = std::move(tokens.ids);
  tokens.ids = Encoder(tokenizer, pieces, encoding).First(pieces.size());
  // The mark's last token may have become one with the answer's first.
  const auto same = static_cast<size_t>(std::ranges::mismatch(first, tokens.ids).in1 - first.begin());
  for (TokenSpan& span : tokens.fixed) span = {std::min(span.begin, same), std::min(span.end, same)};
  std::erase_if(tokens.fixed, [](const TokenSpan& span) { return span.begin == span.end; });
  return tokens;
}

}  // namespace lesskv
