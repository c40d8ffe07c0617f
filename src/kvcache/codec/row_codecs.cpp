// Codecs that store each row by itself: one element type for keys and one for values.
#include "kvcache/codec/row_store.h"
#include "kvcache/registry.h"

namespace lesskv {
namespace {

class RowCodec final : public Codec {
 public:
  explicit RowCodec(const RowTypes& types) : types_(types) {}
  std::unique_ptr<KvStore> MakeStore(ByteCounter& counter, const StoreShape& shape) const override {
    return std::make_unique<RowStore>(counter, shape, types_);
  }
  const RowTypes* row_types() const override { return &types_; }

 private:
  RowTypes types_;
};

// Throws Error for head sizes that the types do not take.
std::unique_ptr<const Codec> Make(const RowTypes& types, const MethodContext& context) {
  for (const LayerShape& layer : context.layers)
    for (const RowType type : {types.keys, types.values})
      if (!Supports(type, layer.head_dim))
        Fail(ErrorCode::kInvalidArgument, "codec {} needs a head size that is a multiple of 32; this model's is {}",
             Name(type), layer.head_dim);
  return std::make_unique<RowCodec>(types);
}

RowTypes Both(RowType type, bool rotate = false) { return {type, type, rotate}; }

constexpr Parameter kRotate = {.name = "rotate", .kind = Parameter::Kind::kWord, .default_value = "false",
                               .help = "rows are stored rotated by an orthonormal Hadamard transform along the head "
                                       "(in blocks of its largest power of two), so that a channel that stands out "
                                       "does not cost its neighbours their precision",
                               .choices = "true|false"};
constexpr Parameter kLowBitParameters[] = {kRotate};

bool Rotates(const Arguments& arguments) { return arguments.Text("rotate") == "true"; }

MethodTraits PlainRows(const Arguments&) { return {.plain_rows = true, .movable_rows = true}; }
MethodTraits LowBitTraits(const Arguments& a) { return {.plain_rows = !Rotates(a), .movable_rows = true}; }

RowType ParseRowType(std::string_view name) {
  for (RowType type : {RowType::kF32, RowType::kF16, RowType::kBF16, RowType::kQ8, RowType::kQ4})
    if (Name(type) == name) return type;
  return RowType::kF16;  // unreachable: the word was validated
}

constexpr Parameter kMixParameters[] = {
    {.name = "k", .kind = Parameter::Kind::kWord, .default_value = "f16", .help = "how keys are stored",
     .choices = "f32|f16|bf16|q8|q4"},
    {.name = "v", .kind = Parameter::Kind::kWord, .default_value = "f16", .help = "how values are stored",
     .choices = "f32|f16|bf16|q8|q4"},
    kRotate,
};

void ValidateMix(const Arguments& a) {
  const auto low_bit = [&](std::string_view side) { return a.Text(side) == "q8" || a.Text(side) == "q4"; };
  if (Rotates(a) && !low_bit("k") && !low_bit("v"))
    Fail(ErrorCode::kInvalidArgument,
         "cache spec: rotate=true is for rows of 8 or 4 bits, but mix stores keys as {} and values as {}", a.Text("k"),
         a.Text("v"));
}

}  // namespace

extern const Method kF16Method{
    .name = "f16",
    .stage = Stage::kCodec,
    .summary = "half precision",
    .reference = "",
    .traits = PlainRows,
    .make_codec = [](const Arguments&, const MethodContext& context) { return Make(Both(RowType::kF16), context); },
};

extern const Method kF32Method{
    .name = "f32",
    .stage = Stage::kCodec,
    .summary = "single precision: exact",
    .reference = "",
    .traits = PlainRows,
    .make_codec = [](const Arguments&, const MethodContext& context) { return Make(Both(RowType::kF32), context); },
};

extern const Method kBf16Method{
    .name = "bf16",
    .stage = Stage::kCodec,
    .summary = "bfloat16",
    .reference = "",
    .traits = PlainRows,
    .make_codec = [](const Arguments&, const MethodContext& context) { return Make(Both(RowType::kBF16), context); },
};

extern const Method kQ8Method{
    .name = "q8",
    .stage = Stage::kCodec,
    .summary = "8 bits in blocks of 32 channels with one scale (the content of q8_0)",
    .reference = "",
    .parameters = kLowBitParameters,
    .traits = LowBitTraits,
    .make_codec = [](const Arguments& a, const MethodContext& context) { return Make(Both(RowType::kQ8, Rotates(a)), context); },
};

extern const Method kQ4Method{
    .name = "q4",
    .stage = Stage::kCodec,
    .summary = "4 bits in blocks of 32 channels with one scale (the content of q4_0)",
    .reference = "",
    .parameters = kLowBitParameters,
    .traits = LowBitTraits,
    .make_codec = [](const Arguments& a, const MethodContext& context) { return Make(Both(RowType::kQ4, Rotates(a)), context); },
};

extern const Method kMixMethod{
    .name = "mix",
    .stage = Stage::kCodec,
    .summary = "keys and values stored each in their own way",
    .reference = "",
    .parameters = kMixParameters,
    .traits = LowBitTraits,
    .validate = ValidateMix,
    .make_codec =
        [](const Arguments& a, const MethodContext& context) {
          return Make({ParseRowType(a.Text("k")), ParseRowType(a.Text("v")), Rotates(a)}, context);
        },
    .example = "mix(k=f32, v=bf16)",
};

}  // namespace lesskv
