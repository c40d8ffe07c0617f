// Finds whole tokens in text: control tokens such as <|im_end|>, and the user-defined tokens of a vocabulary.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string_view>
#include <unordered_map>
#include <unordered_set>
#include <vector>

namespace lesskv {

// A stretch of text, or one token found in it. White space that belongs to a token is in no fragment.
struct TextFragment {
  std::string_view text;
  int32_t id;  // -1: plain text
};

// A trie of token texts. Immutable after the last Add; Split is then thread-safe.
class SpecialTokenMatcher {
 public:
  // `text` is not empty; of the same text added twice the first id counts. `takes_spaces`: ASCII white space behind the
  // token belongs to it.
  void Add(std::string_view text, int32_t id, bool takes_spaces = false);

  // Cuts `text` from left to right: where tokens begin, the longest of them is taken. This is what HF tokenizers do;
  // llama.cpp looks for the longest token in the whole text first, which differs only where tokens overlap.
  std::vector<TextFragment> Split(std::string_view text) const;

 private:
  // Length of the longest token that begins at text[pos], 0 for none; sets `id`.
  size_t LongestAt(std::string_view text, size_t pos, int32_t& id) const;

  std::unordered_map<uint64_t, uint32_t> edges_;  // node << 8 | byte
  std::vector<int32_t> node_ids_ = {-1};          // token that ends at the node; node 0 is the root
  std::array<bool, 256> begins_token_ = {};
  std::unordered_set<int32_t> takes_spaces_;
};

}  // namespace lesskv
