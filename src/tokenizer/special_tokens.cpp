#include "tokenizer/special_tokens.h"

#include <algorithm>

#include "base/check.h"

namespace lesskv {

void SpecialTokenMatcher::Add(std::string_view text, int32_t id, bool takes_spaces) {
  CHECK(!text.empty());
  if (takes_spaces) takes_spaces_.insert(id);
  begins_token_[static_cast<uint8_t>(text[0])] = true;
  uint64_t node = 0;
  for (const char c : text) {
    const auto next = static_cast<uint32_t>(node_ids_.size());
    const auto [edge, is_new] = edges_.emplace(node << 8 | static_cast<uint8_t>(c), next);
    if (is_new) node_ids_.push_back(-1);
    node = edge->second;
  }
  if (node_ids_[node] < 0) node_ids_[node] = id;
}

size_t SpecialTokenMatcher::LongestAt(std::string_view text, size_t pos, int32_t& id) const {
  size_t longest = 0;
  uint64_t node = 0;
  for (size_t i = pos; i < text.size(); ++i) {
    const auto edge = edges_.find(node << 8 | static_cast<uint8_t>(text[i]));
    if (edge == edges_.end()) break;
    node = edge->second;
    if (node_ids_[node] >= 0) {
      id = node_ids_[node];
      longest = i + 1 - pos;
    }
  }
  return longest;
}

std::vector<TextFragment> SpecialTokenMatcher::Split(std::string_view text) const {
  std::vector<TextFragment> fragments;
  size_t plain = 0;  // where the plain text before `pos` begins
  const auto flush = [&](size_t end) {
    if (plain < end) fragments.push_back({text.substr(plain, end - plain), -1});
  };
  for (size_t pos = 0; pos < text.size();) {
    int32_t id = -1;
    const size_t length = begins_token_[static_cast<uint8_t>(text[pos])] ? LongestAt(text, pos, id) : 0;
    if (length == 0) {
      ++pos;
      continue;
    }
    flush(pos);
    fragments.push_back({text.substr(pos, length), id});
    pos += length;
    if (takes_spaces_.contains(id)) pos = std::min(text.find_first_not_of(" \t\n\v\f\r", pos), text.size());
    plain = pos;
  }
  flush(text.size());
  return fragments;
}

}  // namespace lesskv
