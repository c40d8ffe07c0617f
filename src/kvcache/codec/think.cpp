// ThinK (Xu et al., ICLR 2025, arXiv 2407.21018): old keys without the channels that matter least to the queries.
#include "base/check.h"
#include "kvcache/codec/think_store.h"
#include "kvcache/registry.h"

namespace lesskv {
namespace {

class ThinkCodec final : public Codec {
 public:
  ThinkCodec(const RowTypes& types, const ThinkOptions& options) : types_(types), options_(options) {}
  CodecTraits traits() const override {
    return {.apart_rows = options_.window,
            .grows = options_.generated_full,
            .gives_full_keys = false,
            .rewrites_rows = false};
  }
  std::unique_ptr<KvStore> MakeStore(ByteCounter& counter, const StoreShape& shape) const override {
    return std::make_unique<ThinkStore>(counter, shape, types_, options_);
  }

 private:
  RowTypes types_;
  ThinkOptions options_;
};

ThinkOptions Options(const Arguments& a) { return {a.Real("ratio"), a.Count("window"), a.Text("generated") == "full"}; }

// Around a codec that has a window of exact rows itself: what it codes loses channels as it is coded.
void RefuseOwnWindow(const Arguments& a) {
  if (a.Has("window"))
    Fail(ErrorCode::kInvalidArgument,
         "think(window={}): the codec here has an exact window itself, beside which think has none; give its window "
         "(such as kivi(window=64))",
         a.Count("window"));
  if (a.Text("generated") == "full")
    Fail(ErrorCode::kInvalidArgument,
         "think(generated=full) would keep what is generated whole, which the codec here codes as its window moves on");
}

std::unique_ptr<const Codec> Make(const Arguments& a, const MethodContext& context,
                                  std::unique_ptr<const Codec> inner) {
  const ThinkOptions options = Options(a);
  const RowTypes* types = inner->row_types();
  const auto* prunable = dynamic_cast<const PrunableCodec*>(inner.get());
  CHECK(types != nullptr || prunable != nullptr, "a codec that keeps channels apart says how");
  if (prunable != nullptr) RefuseOwnWindow(a);
  const size_t unit = types != nullptr ? ChannelUnit(types->keys) : prunable->channel_unit();
  for (const LayerShape& layer : context.layers) {
    if (options.ratio * static_cast<double>(layer.head_dim) < 1 - 1e-9) return inner;  // not a single channel
    if (KeptChannels(options.ratio, layer.head_dim, unit) == layer.head_dim)
      Fail(ErrorCode::kInvalidArgument,
           "think({}) would prune nothing: keys of this codec keep a multiple of {} channels, and this model's heads "
           "have {}",
           a.Real("ratio"), unit, layer.head_dim);
  }
  if (prunable != nullptr) return prunable->Pruned(options.ratio);
  return std::make_unique<ThinkCodec>(*types, options);
}

constexpr Parameter kParameters[] = {
    {.name = "ratio",
     .kind = Parameter::Kind::kReal,
     .default_value = "0.4",
     .help = "share of a head's key channels that is pruned, rounded down (q8 and q4 keep a multiple of 32, kivi of 16)",
     .min = 0,
     .max = 0.99,
     .positional = true},
    {.name = "window",
     .kind = Parameter::Kind::kCount,
     .default_value = "32",
     .help = "newest rows of a head, whose keys stay whole; of kivi its own window instead",
     .min = 1,
     .max = 65536},
    {.name = "generated",
     .kind = Parameter::Kind::kWord,
     .default_value = "pruned",
     .help = "keys that leave the window while decoding lose their channels too, or stay whole (the paper's form)",
     .choices = "pruned|full"},
};

}  // namespace

extern const Method kThinkMethod{
    .name = "think",
    .stage = Stage::kWrap,
    .summary =
        "old keys without the channels that matter least to a prompt's last queries; values and the newest keys whole",
    .reference = "arXiv 2407.21018",
    .parameters = kParameters,
    .traits =
        [](const Arguments& a) {
          return MethodTraits{.acts_in_stream = a.Text("generated") == "pruned",
                              .gives_full_keys = false,
                              .rewrites_rows = false,
                              .needs_plain_rows = true,
                              .fixes_rotation = true};
        },
    .make_wrapper = Make,
};

}  // namespace lesskv
