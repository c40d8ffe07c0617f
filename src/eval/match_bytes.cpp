#include "eval/match_bytes.h"

#include <algorithm>
#include <optional>
#include <string>

#include "base/error.h"
#include "kvcache/registry.h"
#include "kvcache/residual/sidecar.h"

namespace lesskv {
namespace {

using Config = std::shared_ptr<const CacheConfig>;

std::string TermText(const SpecTerm& term) {
  std::string text = term.name;
  for (size_t i = 0; i < term.arguments.size(); ++i) {
    const SpecArgument& argument = term.arguments[i];
    text += i == 0 ? "(" : ", ";
    if (!argument.key.empty()) text += argument.key + "=";
    text += argument.quoted ? '"' + argument.value + '"' : argument.value;
  }
  return term.arguments.empty() ? text : text + ")";
}

Stage StageOf(const SpecTerm& term) { return FindMethod(term.name)->stage; }

// Makes rivals of one subject for one life of a sequence.
class RivalMaker {
 public:
  RivalMaker(const EvalSetup& setup, const Config& config, size_t n_prompt, size_t n_decode)
      : setup_(setup), config_(config), n_prompt_(n_prompt), n_decode_(n_decode), bytes_(Bytes(config)) {}

  std::vector<Subject> Make() const {
    const SpecTerm* less = config_->spec().Find("less");
    return less != nullptr ? LessRivals(*less) : PlainRivals();
  }

 private:
  size_t Bytes(const Config& config) const { return config->Plan(n_prompt_, n_decode_).bytes_end; }

  // Nothing for a spec that cannot be used, such as a window too small for its sinks.
  Config TryConfig(const std::string& spec) const {
    try {
      return setup_.engine->MakeCacheConfig(CacheSpec::Parse(spec), setup_.ctx);
    } catch (const Error&) {
      return nullptr;
    }
  }

  // The largest n in [low, ctx] for which make(n) is a cache of at most the subject's bytes; nothing when there is
  // none.
  template <typename MakeSpec>
  Config LargestThatFits(size_t low, const MakeSpec& make) const {
    Config best;
    size_t high = setup_.ctx;
    while (low <= high) {
      const size_t middle = low + (high - low) / 2;
      const Config config = TryConfig(make(middle));
      const bool fits = config == nullptr || Bytes(config) <= bytes_;  // too small to be a cache: more rows
      if (fits && config != nullptr) best = config;
      if (fits) {
        low = middle + 1;
      } else {
        high = middle - 1;
      }
    }
    return best;
  }

  // The subject's spec without its residual, with `extra` more rows.
  std::string BareSpec(size_t extra) const {
    std::string text;
    for (SpecTerm term : config_->spec().terms()) {
      if (StageOf(term) == Stage::kResidual) continue;
      if (StageOf(term) == Stage::kSelect && extra > 0) AddExtra(term, extra);
      text += (text.empty() ? "" : "+") + TermText(term);
    }
    return text;
  }

  static void AddExtra(SpecTerm& term, size_t extra) {
    for (SpecArgument& argument : term.arguments) {
      if (argument.key != "extra") continue;
      argument.value = std::to_string(std::stoul(argument.value) + extra);
      return;
    }
    term.arguments.push_back({"extra", std::to_string(extra), false});
  }

  bool TakesExtra() const {
    for (const SpecTerm& term : config_->spec().terms()) {
      if (StageOf(term) != Stage::kSelect) continue;
      const auto parameters = FindMethod(term.name)->parameters;
      return std::any_of(parameters.begin(), parameters.end(), [](const Parameter& p) { return p.name == "extra"; });
    }
    return false;
  }

  size_t Rank(const SpecTerm& less) const {
    for (const SpecArgument& argument : less.arguments) {
      if (argument.key == "file") return ReadSidecar(argument.value).shape.rank;
    }
    return ReadSidecar(setup_.engine->model().Sidecar().path).shape.rank;
  }

  std::vector<Subject> LessRivals(const SpecTerm& less) const {
    std::vector<Subject> rivals;
    Add(rivals, TryConfig(BareSpec(0)), "bare selector");
    if (!TakesExtra()) return rivals;
    Add(rivals, TryConfig(BareSpec(Rank(less) / 2)), "rank/2 extra rows");
    const auto bare = [&](size_t extra) { return BareSpec(extra); };
    const Config fitting = LargestThatFits(1, bare), bought = TryConfig(BareSpec(RowsForState()));
    const bool more = fitting != nullptr && (bought == nullptr || RowsEnd(fitting) > RowsEnd(bought));
    Add(rivals, more ? fitting : bought, "equal bytes");
    return rivals;
  }

  double RowsEnd(const Config& config) const { return config->Plan(n_prompt_, n_decode_).rows_end; }

  // Arenas are rounded up, so the rows that fit may be fewer than the state's bytes pay for; the rival gets the better
  // of both. A row's price, scores and positions included, is that of many rows, where rounding does not count.
  size_t RowsForState() const {
    const size_t many = setup_.ctx;
    const Config bare = TryConfig(BareSpec(0)), large = TryConfig(BareSpec(many));
    if (bare == nullptr || large == nullptr || Bytes(large) <= Bytes(bare) || bytes_ <= Bytes(bare)) return 0;
    const double row_bytes = static_cast<double>(Bytes(large) - Bytes(bare)) / static_cast<double>(many);
    return static_cast<size_t>(static_cast<double>(bytes_ - Bytes(bare)) / row_bytes);
  }

  std::vector<Subject> PlainRivals() const {
    std::vector<Subject> rivals;
    std::string prefill;
    for (const SpecTerm& term : config_->spec().terms()) {
      if (StageOf(term) == Stage::kPrefill) prefill = "+" + TermText(term);
    }
    for (const char* name : {"window", "h2o"}) {
      const SpecTerm* own = config_->spec().Find(name);
      if (own != nullptr && config_->spec().terms().size() == (prefill.empty() ? 1u : 2u)) continue;  // itself
      const auto make = [&](size_t rows) { return std::string(name) + "(" + std::to_string(rows) + ")" + prefill; };
      Add(rivals, LargestThatFits(1, make), "equal bytes");
    }
    return rivals;
  }

  void Add(std::vector<Subject>& rivals, const Config& config, const char* match) const {
    if (config != nullptr) rivals.push_back({config, config_->spec_text(), match});
  }

  const EvalSetup& setup_;
  const Config& config_;
  size_t n_prompt_, n_decode_, bytes_;
};

}  // namespace

void AddRivals(EvalSetup& setup, size_t n_prompt, size_t n_decode) {
  std::vector<Subject> asked = std::move(setup.subjects);
  setup.subjects.clear();
  const auto known = [&](const std::vector<Subject>& list, const Subject& subject) {
    const std::string& spec = subject.config->spec().ToString();
    return std::any_of(list.begin(), list.end(), [&](const Subject& s) { return s.config->spec().ToString() == spec; });
  };
  const Subject full{setup.engine->MakeCacheConfig(CacheSpec(), setup.ctx)};
  if (!known(asked, full)) setup.subjects.push_back(full);
  for (const Subject& subject : asked) {
    setup.subjects.push_back(subject);
    if (subject.config->spec().ToString() == full.config->spec().ToString()) continue;
    for (const Subject& rival : RivalMaker(setup, subject.config, n_prompt, n_decode).Make()) {
      if (!known(asked, rival) && !known(setup.subjects, rival)) setup.subjects.push_back(rival);
    }
  }
}

}  // namespace lesskv
