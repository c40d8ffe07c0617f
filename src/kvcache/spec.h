// The composition language: a cache is written as terms joined by '+', each `name` or `name(value, key=value, ...)`,
// in any order, at most one term a stage: "full", "h2o(5%)+less", "snapkv(1024)+pyramid+bf16", "mix(k=q8, v=q4)".
// Values are numbers, percentages of the context length, words, or quoted strings.
#pragma once

#include <cstddef>
#include <string>
#include <string_view>
#include <vector>

namespace lesskv {

struct SpecArgument {
  std::string key;    // empty: positional
  std::string value;  // without quotes
  bool quoted = false;
};

struct SpecTerm {
  std::string name;
  std::vector<SpecArgument> arguments;
};

// A parsed and validated spec. Immutable.
class CacheSpec {
 public:
  CacheSpec();  // "full"

  // Throws Error (one sentence) for bad syntax, unknown names or options, and terms that cannot be combined.
  static CacheSpec Parse(std::string_view text);

  // The canonical form: stages in their fixed order, defaults left out. Parse(ToString()) gives the same spec.
  const std::string& ToString() const { return canonical_; }

  // The same with the trained artefact of one term named by its fingerprint, `less(sidecar="0123456789abcdef")`, in
  // place of its file.
  std::string ToString(std::string_view term_name, const std::string& fingerprint) const;

  const std::vector<SpecTerm>& terms() const { return terms_; }
  // The term of a stage, or nullptr where the spec leaves it to the default.
  const SpecTerm* Find(std::string_view name) const;

 private:
  std::vector<SpecTerm> terms_;
  std::string canonical_;
};

}  // namespace lesskv
