#include "eval/match_bytes.h"

#include <algorithm>
#include <optional>
#include <string>

#include "base/error.h"
#include "kvcache/registry.h"

namespace lesskv {
namespace {

using Config = std::shared_ptr<const CacheConfig>;

// Makes rivals of one subject for one life of a sequence.
class RivalMaker {
 public:
  RivalMaker(const EvalSetup& setup, const Config& config, size_t n_prompt, size_t n_decode)
      : setup_(setup), config_(config), n_prompt_(n_prompt), n_decode_(n_decode), bytes_(Bytes(config)) {}

  std::vector<Subject> Make() const {
    return config_->spec().Find(Stage::kResidual) != nullptr ? ResidualRivals() : PlainRivals();
  }

 private:
  size_t Bytes(const Config& config) const { return config->Plan(n_prompt_, n_decode_).bytes_end; }

  // Nothing for a spec that cannot be used, such as a window too small for its sinks.
  Config TryConfig(const std::string& spec) const {
    try {
      return setup_.MakeConfig(CacheSpec::Parse(spec));
    } catch (const Error&) {
      return nullptr;
    }
  }

  // The largest n in [low, ctx] for which make(n) is a cache of at most the subject's bytes; nothing when there is
  // none.
  template <typename MakeConfig>
  Config LargestThatFits(size_t low, const MakeConfig& make) const {
    Config best;
    size_t high = setup_.ctx;
    while (low <= high) {
      const size_t middle = low + (high - low) / 2;
      const Config config = make(middle);
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
  Config Bare(size_t extra) const {
    const CacheSpec bare = config_->spec().Without(Stage::kResidual);
    return TryConfig((extra > 0 ? bare.WithExtraRows(extra) : bare).ToString());
  }

  std::vector<Subject> ResidualRivals() const {
    std::vector<Subject> rivals;
    Add(rivals, Bare(0), "bare selector");
    if (!config_->spec().TakesExtraRows()) return rivals;
    // Baseline+ of the LESS paper: a state of rank R is what R / 2 rows take.
    const size_t state_rows = config_->global().residual->StateFloats() / (config_->global().layers[0].head_dim + 1) / 2;
    Add(rivals, Bare(state_rows), "rank/2 extra rows");
    const auto bare = [&](size_t extra) { return Bare(extra); };
    const Config fitting = LargestThatFits(1, bare), bought = Bare(RowsForState());
    const bool more = fitting != nullptr && (bought == nullptr || RowsEnd(fitting) > RowsEnd(bought));
    Add(rivals, more ? fitting : bought, "equal bytes");
    return rivals;
  }

  double RowsEnd(const Config& config) const { return config->Plan(n_prompt_, n_decode_).rows_end; }

  // Arenas are rounded up, so the rows that fit may be fewer than the state's bytes pay for; the rival gets the better
  // of both. A row's price, scores and positions included, is that of many rows, where rounding does not count.
  size_t RowsForState() const {
    const size_t many = setup_.ctx;
    const Config bare = Bare(0), large = Bare(many);
    if (bare == nullptr || large == nullptr || Bytes(large) <= Bytes(bare) || bytes_ <= Bytes(bare)) return 0;
    const double row_bytes = static_cast<double>(Bytes(large) - Bytes(bare)) / static_cast<double>(many);
    return static_cast<size_t>(static_cast<double>(bytes_ - Bytes(bare)) / row_bytes);
  }

  std::vector<Subject> PlainRivals() const {
    std::vector<Subject> rivals;
    const CacheSpec& spec = config_->spec();
    const SpecTerm* prefill = spec.Find(Stage::kPrefill);
    std::string tail = prefill == nullptr ? "" : "+" + ToString(*prefill);
    if (const size_t block = config_->prefill_chunk(); prefill == nullptr && block > 0 && block < n_prompt_)
      tail = fmt::format("+prefill(chunk={})", block);  // the rival reads the prompt in the same blocks
    for (const Method* method : Methods()) {
      if (method->stage != Stage::kSelect || !TraitsOf(ParseTerm(method->Example())).is_rival) continue;
      if (spec.Find(method->name) != nullptr && spec.terms().size() == (tail.empty() ? 1u : 2u)) continue;  // itself
      const auto make = [&](size_t rows) { return TryConfig(fmt::format("{}({}){}", method->name, rows, tail)); };
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
    if (subject.config->global().selector->SaysHowMany())
      Fail(ErrorCode::kInvalidArgument, "--match-bytes: the bytes of '{}' depend on the text, so that no rival has as many",
           subject.config->spec_text());
    for (const Subject& rival : RivalMaker(setup, subject.config, n_prompt, n_decode).Make()) {
      if (!known(asked, rival) && !known(setup.subjects, rival)) setup.subjects.push_back(rival);
    }
  }
}

}  // namespace lesskv
