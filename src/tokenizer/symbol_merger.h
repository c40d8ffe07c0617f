// The merging that both tokenizer models do: a text starts as a row of symbols; of all neighbouring pairs that may
// merge, the best one merges (the leftmost of equals), until no pair may. A heap holds the candidates, so the time is
// O(n log n) however long the text is.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <optional>
#include <queue>
#include <utility>
#include <vector>

namespace lesskv {

// A stretch of the text; length 0: merged into a symbol to the left.
struct Symbol {
  uint32_t begin;
  uint32_t length;
  int32_t id;  // its token, or -1
};

template <typename Key>
struct Merge {
  Key key;     // the smallest merges first
  int32_t id;  // the token that it makes
};

// `symbols` lie in order. `find(left, right)` returns std::optional<Merge<Key>>: whether and how well two
// neighbours merge; it must depend on the two symbols alone. Afterwards the symbols of length 0 are void.
template <typename Key, typename Find>
void MergeSymbols(std::vector<Symbol>& symbols, const Find& find) {
  constexpr uint32_t kNone = UINT32_MAX;
  struct Links {
    uint32_t previous;
    uint32_t next;
  };
  struct Candidate {
    Key key;
    uint32_t left;
    uint32_t right;
    uint32_t length;  // of both together when it was found; if that changed, the candidate is void
    int32_t id;
    bool operator<(const Candidate& other) const {  // the heap's top is the greatest
      return key != other.key ? key > other.key : left > other.left;
    }
  };

  const auto n = static_cast<uint32_t>(symbols.size());
  std::vector<Links> links(n);
  for (uint32_t i = 0; i < n; ++i) links[i] = {i == 0 ? kNone : i - 1, i + 1 == n ? kNone : i + 1};

  std::vector<Candidate> initial;
  const auto candidate = [&](uint32_t left, uint32_t right) -> std::optional<Candidate> {
    if (left == kNone || right == kNone) return std::nullopt;
    const auto merge = find(symbols[left], symbols[right]);
    if (!merge) return std::nullopt;
    return Candidate{merge->key, left, right, symbols[left].length + symbols[right].length, merge->id};
  };
  for (uint32_t i = 0; i + 1 < n; ++i) {
    if (const auto found = candidate(i, i + 1)) initial.push_back(*found);
  }
  std::priority_queue<Candidate> heap(std::less<Candidate>(), std::move(initial));
  const auto offer = [&](uint32_t left, uint32_t right) {
    if (const auto found = candidate(left, right)) heap.push(*found);
  };

  while (!heap.empty()) {
    const Candidate best = heap.top();
    heap.pop();
    Symbol& left = symbols[best.left];
    Symbol& right = symbols[best.right];
    if (left.length == 0 || right.length == 0 || left.length + right.length != best.length) continue;
    left.length += right.length;
    left.id = best.id;
    right.length = 0;
    const uint32_t next = links[best.right].next;
    links[best.left].next = next;
    if (next != kNone) links[next].previous = best.left;
    offer(links[best.left].previous, best.left);
    offer(best.left, next);
  }
}

}  // namespace lesskv
