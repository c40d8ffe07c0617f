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

enum class Stage;

// A trained artefact that a term reads.
struct Artefact {
  std::string term;
  std::string fingerprint;
};

// One term by itself: syntax, name, arguments. Throws Error.
SpecTerm ParseTerm(std::string_view text);
// As in canonical specs.
std::string ToString(const SpecTerm& term);

// A parsed and validated spec. Immutable.
class CacheSpec {
 public:
  CacheSpec();  // "full"

  // Throws Error (one sentence) for bad syntax, unknown names or options, and terms that cannot be combined.
  static CacheSpec Parse(std::string_view text);

  // The canonical form: stages in their fixed order, defaults left out. Parse(ToString()) gives the same spec.
  const std::string& ToString() const { return canonical_; }

  // The same with trained artefacts named by their fingerprints, `less(sidecar="0123456789abcdef")`, in place of files.
  std::string ToString(const std::vector<Artefact>& artefacts) const;

  const std::vector<SpecTerm>& terms() const { return terms_; }
  // The term of that name, or nullptr.
  const SpecTerm* Find(std::string_view name) const;
  // The term that answers a stage's question, or nullptr where the spec leaves it to the default.
  const SpecTerm* Find(Stage stage) const;

  // The spec without its term of a stage (and so without what only makes sense beside it: Error where nothing is left).
  CacheSpec Without(Stage stage) const;
  // The spec with `extra` more rows for its selector (its parameter `extra`); Error where the selector takes none.
  CacheSpec WithExtraRows(size_t extra) const;
  bool TakesExtraRows() const;

 private:
  static CacheSpec Make(const std::vector<SpecTerm>& terms, std::string_view text);

  std::vector<SpecTerm> terms_;
  std::string canonical_;
};

}  // namespace lesskv
