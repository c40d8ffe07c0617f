// balanced, ours: KIVI's rows with keys behind a trained matrix and bits where they count, values behind a Hadamard
// transform, and exact rows where they count: the first ones and a full window of the newest.
#include <algorithm>

#include "kvcache/codec/exact_codec.h"
#include "kvcache/codec/kivi_store.h"
#include "kvcache/codec/row_store.h"
#include "kvcache/registry.h"
#include "kvcache/residual/find_sidecar.h"

namespace lesskv {
namespace {

class BalancedCodec final : public Codec {
 public:
  BalancedCodec(const KiviOptions& options, std::string artefact) : options_(options), artefact_(std::move(artefact)) {}
  CodecTraits traits() const override {
    return {.group_rows = options_.group, .window_rows = RoundUp(options_.window, options_.group), .rewrites_rows = false};
  }
  std::unique_ptr<KvStore> MakeStore(ByteCounter& counter, const StoreShape& shape) const override {
    return std::make_unique<KiviStore>(counter, shape, options_);
  }
  const RowTypes* first_prompt_types() const override { return &kF16Rows; }
  std::string artefact() const override { return artefact_; }
  size_t ArtefactBytes() const override { return options_.bases->Bytes(); }

 private:
  KiviOptions options_;
  std::string artefact_;
};

void Validate(const Arguments& a) {
  if (a.Has("bits") && a.Has("k") && a.Has("v"))
    Fail(ErrorCode::kInvalidArgument,
         "cache spec: balanced's bits are those of keys and values, and k and v are given, too");
}

void CheckShape(const SidecarBalance& b, const MethodContext& context, const std::string& path) {
  if (b.n_kv_heads.size() != context.layers.size())
    Fail(ErrorCode::kMismatch, "{}: matrices for {} layers, but the model has {} (global ones)", path, b.n_kv_heads.size(),
         context.layers.size());
  for (size_t l = 0; l < context.layers.size(); ++l)
    if (context.layers[l].head_dim != b.head_dim || context.layers[l].n_kv_heads != b.n_kv_heads[l])
      Fail(ErrorCode::kMismatch, "{}: matrices for {} heads of {} in layer {}, but the model has {} of {}", path,
           b.n_kv_heads[l], b.head_dim, l, context.layers[l].n_kv_heads, context.layers[l].head_dim);
}

std::unique_ptr<const Codec> Make(const Arguments& a, const MethodContext& context) {
  if (context.layers.empty() || context.layers[0].window > 0) return std::make_unique<ExactCodec>();
  const auto bits = [&](std::string_view side) { return a.Count(a.Has(side) ? side : "bits"); };
  KiviOptions options{bits("k"), bits("v"), a.Count("group"), a.Count("window"), true};
  options.sinks = a.Count("sinks");
  options.lags = true;
  for (const LayerShape& layer : context.layers) {
    const std::vector<GroupFormat> keys = BalancedParts(options.key_bits, options.group, layer.head_dim);
    if (!std::all_of(keys.begin(), keys.end(), [](const GroupFormat& part) { return Supports(part); }) || !Supports(options.Values(layer.head_dim)))
      Fail(ErrorCode::kInvalidArgument,
           "codec balanced needs a head size that is a multiple of its group of {}, or a smaller multiple of 16, at most "
           "512; this model's is {}",
           options.group, layer.head_dim);
  }
  const FoundSidecar found = FindSidecar(a, context.sidecar, "balanced", "matrices", "balance");
  std::vector<size_t> parts;
  for (const GroupFormat& part : BalancedParts(options.key_bits, options.group, context.layers[0].head_dim))
    parts.push_back(part.head_dim);
  const std::string what = fmt::format("balanced {} {}", options.key_bits, options.group);
  options.bases = ShareTrained<KeyBases>(found, context.sidecar, what, [&](const Sidecar& sidecar) {
    if (sidecar.balance.empty())
      Fail(ErrorCode::kNotFound, "{}: holds no matrices for keys (train them with 'lesskv train balance')", found.path);
    CheckShape(sidecar.balance, context, found.path);
    return KeyBases::Create(sidecar.balance, parts, found.path);
  });
  return std::make_unique<BalancedCodec>(options, found.fingerprint);
}

constexpr Parameter kParameters[] = {
    {.name = "bits", .kind = Parameter::Kind::kWord, .default_value = "2",
     .help = "bits of a code; of keys on average: with 2 and 3 a quarter of the channels has more, a quarter fewer", .choices = "2|3|4",
     .positional = true},
    {.name = "k", .kind = Parameter::Kind::kWord, .default_value = "", .help = "bits of keys, where they differ",
     .choices = "2|3|4"},
    {.name = "v", .kind = Parameter::Kind::kWord, .default_value = "", .help = "bits of values, where they differ",
     .choices = "2|3|4"},
    {.name = "group", .kind = Parameter::Kind::kWord, .default_value = "64",
     .help = "tokens, or channels of a value (a head's if it has fewer), that share a scale", .choices = "16|32|64|128|256"},
    {.name = "window", .kind = Parameter::Kind::kCount, .default_value = "64",
     .help = "most recent tokens kept in f16, and up to a group more keys; under a budget at most half of it", .min = 1,
     .max = 65536},
    {.name = "sinks", .kind = Parameter::Kind::kCount, .default_value = "4",
     .help = "first rows kept in f16, for as long as their group stays", .max = 15},
    {.name = "file", .kind = Parameter::Kind::kText, .default_value = "",
     .help = "the sidecar with the trained matrices; when not given it is found as that of less"},
    {.name = "sidecar", .kind = Parameter::Kind::kText, .default_value = "",
     .help = "the fingerprint that the sidecar must have, 16 hexadecimal digits"},
};

}  // namespace

extern const Method kBalancedMethod{
    .name = "balanced",
    .stage = Stage::kCodec,
    .summary = "2, 3 or 4 bits, keys per channel behind a trained matrix with bits where they count, values per token",
    .reference = "",
    .parameters = kParameters,
    .traits = [](const Arguments&) {
          return MethodTraits{.rewrites_rows = false, .fixes_rotation = true, .groups_rows = true, .needs_known_rows = true,
                              .reads_sidecar = true};
        },
    .validate = Validate,
    .make_codec = Make,
};

}  // namespace lesskv
