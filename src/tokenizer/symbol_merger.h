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

// The state of one MergeSymbols.
template <typename Key, typename Find>
class SymbolMerger {
 public:
  SymbolMerger(std::vector<Symbol>& symbols, const Find& find) : symbols_(symbols), find_(find) {
    const auto n = static_cast<uint32_t>(symbols.size());
    links_.reserve(n);
    for (uint32_t i = 0; i < n; ++i) links_.push_back({i == 0 ? kNone : i - 1, i + 1 == n ? kNone : i + 1});
    std::vector<Candidate> initial;
    for (uint32_t i = 0; i + 1 < n; ++i) {
      if (const auto found = Look(i, i + 1)) initial.push_back(*found);
    }
    heap_ = Heap(std::less<Candidate>(), std::move(initial));  // in linear time
  }

  void Run() {
    while (!heap_.empty()) {
      const Candidate best = heap_.top();
      heap_.pop();
      if (IsCurrent(best)) Apply(best);
    }
  }

 private:
  static constexpr uint32_t kNone = UINT32_MAX;
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
  using Heap = std::priority_queue<Candidate>;

  std::optional<Candidate> Look(uint32_t left, uint32_t right) const {
    const auto merge = find_(symbols_[left], symbols_[right]);
    if (!merge) return std::nullopt;
    return Candidate{merge->key, left, right, symbols_[left].length + symbols_[right].length, merge->id};
  }

  void Offer(uint32_t left, uint32_t right) {
    if (left == kNone || right == kNone) return;
    if (const auto found = Look(left, right)) heap_.push(*found);
  }

  bool IsCurrent(const Candidate& candidate) const {
    const Symbol& left = symbols_[candidate.left];
    const Symbol& right = symbols_[candidate.right];
    return left.length > 0 && right.length > 0 && left.length + right.length == candidate.length;
  }

  void Apply(const Candidate& candidate) {
    symbols_[candidate.left].length = candidate.length;
    symbols_[candidate.left].id = candidate.id;
    symbols_[candidate.right].length = 0;
    const uint32_t next = links_[candidate.right].next;
    links_[candidate.left].next = next;
    if (next != kNone) links_[next].previous = candidate.left;
    Offer(links_[candidate.left].previous, candidate.left);
    Offer(candidate.left, next);
  }

  std::vector<Symbol>& symbols_;
  const Find& find_;
  std::vector<Links> links_;
  Heap heap_;
};

// `symbols` lie in order. `find(left, right)` returns std::optional<Merge<Key>>: whether and how well two
// neighbours merge; it must depend on the two symbols alone. Afterwards the symbols of length 0 are void.
template <typename Key, typename Find>
void MergeSymbols(std::vector<Symbol>& symbols, const Find& find) {
  SymbolMerger<Key, Find>(symbols, find).Run();
}

}  // namespace lesskv
