// KIVI (Liu et al., ICML 2024, arXiv 2402.02750): 2, 3 or 4 bits, keys per channel, values per token, an exact window.
#include "kvcache/codec/exact_codec.h"
#include "kvcache/codec/kivi_store.h"
#include "kvcache/codec/row_store.h"
#include "kvcache/registry.h"

namespace lesskv {
namespace {

class KiviCodec final : public PrunableCodec {
 public:
  explicit KiviCodec(const KiviOptions& options) : options_(options) {}
  CodecTraits traits() const override {
    return {.group_rows = options_.group,
            .window_rows = options_.window,
            .gives_full_keys = options_.pruned == 0,
            .rewrites_rows = false};
  }
  std::unique_ptr<KvStore> MakeStore(ByteCounter& counter, const StoreShape& shape) const override {
    return std::make_unique<KiviStore>(counter, shape, options_);
  }
  const RowTypes* first_prompt_types() const override { return options_.pruned == 0 ? &kF16Rows : nullptr; }
  size_t channel_unit() const override { return kGroupedChannels; }
  std::unique_ptr<const Codec> Pruned(double ratio) const override {
    KiviOptions options = options_;
    options.pruned = ratio;
    return std::make_unique<KiviCodec>(options);
  }

 private:
  KiviOptions options_;
};

KiviOptions Options(const Arguments& a) {
  const auto bits = [&](std::string_view side) { return a.Count(a.Has(side) ? side : "bits"); };
  return {bits("k"), bits("v"), a.Count("group"), a.Count("window"), a.Text("rotate") == "true"};
}

void Validate(const Arguments& a) {
  if (a.Has("bits") && a.Has("k") && a.Has("v"))
    Fail(ErrorCode::kInvalidArgument, "cache spec: kivi's bits are those of keys and values, and k and v are given, too");
  if (a.Count("window") % a.Count("group") != 0)
    Fail(ErrorCode::kInvalidArgument,
         "cache spec: kivi's window must be a multiple of its group of {} (such as window={}), not {}", a.Count("group"),
         std::max<size_t>(a.Count("group"), 128), a.Count("window"));
}

std::unique_ptr<const Codec> Make(const Arguments& a, const MethodContext& context) {
  const KiviOptions options = Options(a);
  for (const LayerShape& layer : context.layers) {
    if (layer.window > 0) return std::make_unique<ExactCodec>();
    if (!Supports(options.Keys(layer.head_dim)[0]) || !Supports(options.Values(layer.head_dim)))
      Fail(ErrorCode::kInvalidArgument,
           "codec kivi needs a head size that is a multiple of its group of {}, or a smaller multiple of 16, at most "
           "512; this model's is {}",
           options.group, layer.head_dim);
  }
  return std::make_unique<KiviCodec>(options);
}

constexpr Parameter kParameters[] = {
    {.name = "bits", .kind = Parameter::Kind::kWord, .default_value = "2", .help = "bits of a code", .choices = "2|3|4",
     .positional = true},
    {.name = "k", .kind = Parameter::Kind::kWord, .default_value = "", .help = "bits of keys, where they differ",
     .choices = "2|3|4"},
    {.name = "v", .kind = Parameter::Kind::kWord, .default_value = "", .help = "bits of values, where they differ",
     .choices = "2|3|4"},
    {.name = "group", .kind = Parameter::Kind::kWord, .default_value = "32",
     .help = "tokens, or channels of a value (a head's if it has fewer), that share a scale",
     .choices = "16|32|64|128|256"},
    {.name = "window", .kind = Parameter::Kind::kCount, .default_value = "128",
     .help = "most recent tokens kept in f16, a multiple of the group; under a budget at most half of it", .min = 16,
     .max = 65536},
    {.name = "rotate", .kind = Parameter::Kind::kWord, .default_value = "false",
     .help = "values are coded behind an orthonormal Hadamard transform along the head, with scales fitted to all "
             "numbers of a group instead of its extremes",
     .choices = "true|false"},
};

}  // namespace

extern const Method kKiviMethod{
    .name = "kivi",
    .stage = Stage::kCodec,
    .summary = "2, 3 or 4 bits, keys per channel in groups of tokens, values per token, the most recent ones exact",
    .reference = "arXiv 2402.02750",
    .parameters = kParameters,
    .traits = [](const Arguments&) { return MethodTraits{.rewrites_rows = false, .plain_rows = true, .groups_rows = true, .needs_known_rows = true}; },
    .validate = Validate,
    .make_codec = Make,
};

}  // namespace lesskv
