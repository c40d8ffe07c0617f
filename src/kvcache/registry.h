// The methods a spec can name: one `Method` each, defined beside its implementation and listed once in registry.cpp.
// Help text, the documentation table, the legal pairs, shared tests and benchmark grids all come from this table.
#pragma once

#include <cstddef>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/error.h"
#include "kvcache/cache_shape.h"
#include "kvcache/spec.h"

namespace lesskv {

class Selector;
class Budgeter;
class Residual;
class Codec;

// The five questions of the cache; what refines the answer to two of them: how heads of a layer share its budget, and a
// wrapper of the codec, which changes what another codec stores; and prefill (about time rather than space). The order is
// that of canonical specs.
enum class Stage { kSelect, kBudget, kShare, kResidual, kCodec, kWrap, kRecall, kPrefill };
inline constexpr Stage kStages[] = {Stage::kSelect, Stage::kBudget, Stage::kShare,  Stage::kResidual,
                                    Stage::kCodec,  Stage::kWrap,   Stage::kRecall, Stage::kPrefill};
std::string_view Name(Stage stage);
// The stage's term when a spec names none: "full", "uniform", "drop", "f16", "all"; "" for share, wrap and prefill.
std::string_view DefaultTerm(Stage stage);

struct Parameter {
  enum class Kind {
    kRows,   // rows per KV head: a whole number, or a percentage of the context length ("5%")
    kCount,  // a whole number in [min, max]
    kReal,   // a number in [min, max]
    kWord,   // one of `choices`, separated by '|'
    kText,   // a quoted string
  };
  std::string_view name;
  Kind kind;
  std::string_view default_value;  // empty: none
  std::string_view help;
  std::string_view choices = {};
  double min = 0;
  double max = 1e9;
  bool positional = false;  // may be given without its name, first
};

// A term's arguments, checked against the method's parameters.
class Arguments {
 public:
  Arguments(std::span<const Parameter> parameters, const SpecTerm& term) : parameters_(parameters), term_(&term) {}

  bool Has(std::string_view name) const;             // given in the spec
  std::string_view Text(std::string_view name) const;  // as written, or the default
  size_t Count(std::string_view name) const;
  double Real(std::string_view name) const;
  // Rows for a context length: floor(percent / 100 * ctx / divisor), or floor(count / divisor).
  size_t Rows(std::string_view name, size_t ctx, size_t divisor = 1) const;

 private:
  const Parameter& Find(std::string_view name) const;
  std::span<const Parameter> parameters_;
  const SpecTerm* term_;
};

// For Method::validate: throws Error unless the parameter is given; `example` shows how.
void RequireGiven(const Arguments& arguments, std::string_view method, std::string_view parameter,
                  std::string_view example);

// What decides whether terms can be combined.
struct MethodTraits {
  bool renumbers_positions = false;   // select: keys are read at cache-relative positions
  bool needs_true_positions = false;  // residual: is trained on keys rotated to their true positions
  bool evicts = false;                // select: tokens leave at all
  bool needs_eviction = false;        // budget, residual: makes no sense when no token leaves
  bool acts_in_stream = true;         // select, budget, wrap: defined while text streams in, so that a prompt may, too
  size_t prompt_block = 0;            // select, prefill: tokens a step of a prompt; 0: all in one
  bool gives_full_keys = true;        // codec, wrap: rows can be read back with all their channels
  bool needs_full_keys = false;       // residual
  bool rewrites_rows = true;          // codec, wrap: a row can be changed after it was written
  bool needs_rewrites = false;        // select, residual
  bool plain_rows = false;            // codec: keys are stored channel by channel, so that some can be left out
  bool needs_plain_rows = false;      // wrap
  bool fixes_rotation = false;        // codec, wrap: keys cannot be rotated any more once they are stored
  bool groups_rows = false;           // codec: rows leave in groups
  bool needs_single_rows = false;     // select: rows leave one by one
  bool needs_known_rows = false;      // select, residual, codec: budgets must be known before a prompt, not cut at its end
  bool fits_rows = false;             // residual: changes weights and values of rows that stay
  bool divides_rows = false;          // select: divides its rows at a prompt's end itself (Method::make_divider) where no budget or share term does
  bool insists_on_scope = false;      // select: in a way that the spec asks for, so that no such term may
  bool says_how_many = false;         // select: how many rows stay is known only when they are chosen, a head at a time
  bool same_rows = false;             // select: all layers and heads hold as many rows, which no budget divides
  bool takes_no_fit = false;          // select: gives rows a meaning that a fit would take from them
  bool recalls_all = false;           // recall: chooses among all tokens, so that none may leave
  bool moves_rows = false;            // recall, wrap: moves single rows, so that they must lie by themselves
  bool movable_rows = false;          // codec, wrap: each row lies by itself (Codec::row_types) and can be moved
  bool reads_sidecar = false;         // a trained artefact of the model
  bool votes_by_head = false;         // select: rows have votes, those of each head its own
  bool needs_votes_by_head = false;   // share
  bool is_rival = false;              // select: what other methods are measured against at equal bytes
};

// What a method may know of where it will work.
struct MethodContext {
  std::span<const LayerShape> layers;  // the global ones, which the spec is about
  size_t ctx = 0;
  ComputeType compute = ComputeType::kF32;
  const SidecarSource& sidecar;
  size_t input_width = 0;  // of CacheShape
};

// A residual, and what identifies the trained artefact it reads (a fingerprint; empty: none).
struct MadeResidual {
  std::unique_ptr<const Residual> residual;
  std::string artefact;
};

struct Method {
  std::string_view name;
  Stage stage;
  std::string_view summary;
  std::string_view reference;  // paper
  std::span<const Parameter> parameters = {};
  MethodTraits (*traits)(const Arguments&) = nullptr;
  void (*validate)(const Arguments&) = nullptr;  // throws Error for arguments that contradict each other

  // The stage's factory; the others are null. `drop`, `all` and `prefill` have none.
  std::unique_ptr<const Selector> (*make_selector)(const Arguments&, const MethodContext&) = nullptr;
  std::unique_ptr<const Budgeter> (*make_budgeter)(const Arguments&, const MethodContext&) = nullptr;
  // Around the spec's budgeter.
  std::unique_ptr<const Budgeter> (*make_sharer)(const Arguments&, const MethodContext&,
                                                 std::unique_ptr<const Budgeter> layers) = nullptr;
  // Of a selector that divides its rows itself: in place of the spec's budgeter.
  std::unique_ptr<const Budgeter> (*make_divider)(const Arguments&, const MethodContext&) = nullptr;
  MadeResidual (*make_residual)(const Arguments&, const MethodContext&) = nullptr;
  std::unique_ptr<const Codec> (*make_codec)(const Arguments&, const MethodContext&) = nullptr;
  // Around the spec's codec: of a wrap, and of what recalls.
  std::unique_ptr<const Codec> (*make_wrapper)(const Arguments&, const MethodContext&,
                                               std::unique_ptr<const Codec> inner) = nullptr;

  // An example of the term for shared tests and tables, such as "h2o(5%)"; the name itself when empty.
  std::string_view example = {};
  // Another one where arguments change what the term can be combined with, such as "window(5%, positions=cache)".
  std::string_view variant = {};

  std::string_view Example() const { return example.empty() ? name : example; }
};

std::span<const Method* const> Methods();
const Method* FindMethod(std::string_view name);

// Adds a method from outside the library, which must outlive all use of specs; before any other thread parses one.
// Throws Error when the name is taken.
void RegisterMethod(const Method& method);

// The traits of a method as a checked term uses it.
MethodTraits TraitsOf(const SpecTerm& term);

// Why two methods (as used in one spec) cannot be combined, or nothing when they can.
std::optional<std::string> Conflict(const Method& a, const MethodTraits& a_traits, const Method& b,
                                    const MethodTraits& b_traits);
// The same for two terms, such as methods' examples and variants: the table of legal pairs.
std::optional<std::string> Conflict(const SpecTerm& a, const SpecTerm& b);
// The same for the two methods' example terms.
std::optional<std::string> Conflict(const Method& a, const Method& b);

}  // namespace lesskv
