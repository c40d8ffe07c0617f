#include "eval/rouge.h"

#include <algorithm>
#include <cstddef>
#include <map>

namespace lesskv {
namespace {

double F1(size_t overlap, size_t n_text, size_t n_reference) {
  if (overlap == 0) return 0;
  return 2.0 * static_cast<double>(overlap) / static_cast<double>(n_text + n_reference);
}

using Counts = std::map<std::string, size_t>;

// Words are joined by a space, which no word contains.
Counts CountNgrams(const std::vector<std::string>& words, size_t n) {
  Counts counts;
  for (size_t i = 0; i + n <= words.size(); ++i) {
    std::string gram = words[i];
    for (size_t k = 1; k < n; ++k) gram += ' ' + words[i + k];
    ++counts[gram];
  }
  return counts;
}

size_t Total(const Counts& counts) {
  size_t total = 0;
  for (const auto& [gram, count] : counts) total += count;
  return total;
}

double RougeN(const std::vector<std::string>& text, const std::vector<std::string>& reference, size_t n) {
  const Counts a = CountNgrams(text, n), b = CountNgrams(reference, n);
  size_t overlap = 0;
  for (const auto& [gram, count] : a) {
    const auto found = b.find(gram);
    if (found != b.end()) overlap += std::min(count, found->second);
  }
  return F1(overlap, Total(a), Total(b));
}

size_t LongestCommonSubsequence(const std::vector<std::string>& a, const std::vector<std::string>& b) {
  std::vector<size_t> row(b.size() + 1, 0);  // lengths for a[..i], b[..j]
  for (const std::string& word : a) {
    size_t diagonal = 0;
    for (size_t j = 0; j < b.size(); ++j) {
      const size_t above = row[j + 1];
      row[j + 1] = word == b[j] ? diagonal + 1 : std::max(above, row[j]);
      diagonal = above;
    }
  }
  return row.back();
}

}  // namespace

std::vector<std::string> RougeWords(std::string_view text) {
  std::vector<std::string> words;
  bool inside = false;
  for (const char c : text) {
    const bool upper = c >= 'A' && c <= 'Z';
    if (upper || (c >= 'a' && c <= 'z') || (c >= '0' && c <= '9')) {
      if (!inside) words.emplace_back();
      words.back() += upper ? static_cast<char>(c - 'A' + 'a') : c;
      inside = true;
    } else {
      inside = false;
    }
  }
  return words;
}

RougeScores Rouge(std::string_view text, std::string_view reference) {
  const std::vector<std::string> a = RougeWords(text), b = RougeWords(reference);
  return {RougeN(a, b, 1), RougeN(a, b, 2), F1(LongestCommonSubsequence(a, b), a.size(), b.size())};
}

}  // namespace lesskv
