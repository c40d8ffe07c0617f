// ROUGE (Lin 2004): how much of a reference's wording a text shares.
#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace lesskv {

// The words that ROUGE compares: runs of ASCII letters and digits, in lower case; every other byte separates. No
// stemming, no stop words. Equals the tokenisation of Google's rouge_score with use_stemmer=False.
std::vector<std::string> RougeWords(std::string_view text);

// F1 of precision and recall, each in [0, 1]; 0 when either text has no n-gram.
struct RougeScores {
  double rouge1 = 0;   // words, counted at most as often as in the other text
  double rouge2 = 0;   // pairs of neighbouring words, likewise
  double rouge_l = 0;  // longest common subsequence of the whole texts (sentences are not split)
};

RougeScores Rouge(std::string_view text, std::string_view reference);

}  // namespace lesskv
