// Codecs that store each row by itself: one element type for keys and one for values.
#include "kvcache/registry.h"

namespace lesskv {
namespace {

RowTypes Both(RowType type, bool rotate = false) { return {type, type, rotate}; }

constexpr Parameter kRotate = {.name = "rotate", .kind = Parameter::Kind::kWord, .default_value = "false",
                               .help = "rows are stored rotated by an orthonormal Hadamard transform along the head "
                                       "(in blocks of its largest power of two), so that a channel that stands out "
                                       "does not cost its neighbours their precision",
                               .choices = "true|false"};
constexpr Parameter kLowBitParameters[] = {kRotate};

bool Rotates(const Arguments& arguments) { return arguments.Text("rotate") == "true"; }

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
    .row_types = [](const Arguments&) { return Both(RowType::kF16); },
};

extern const Method kF32Method{
    .name = "f32",
    .stage = Stage::kCodec,
    .summary = "single precision: exact",
    .reference = "",
    .row_types = [](const Arguments&) { return Both(RowType::kF32); },
};

extern const Method kBf16Method{
    .name = "bf16",
    .stage = Stage::kCodec,
    .summary = "bfloat16",
    .reference = "",
    .row_types = [](const Arguments&) { return Both(RowType::kBF16); },
};

extern const Method kQ8Method{
    .name = "q8",
    .stage = Stage::kCodec,
    .summary = "8 bits in blocks of 32 channels with one scale (the content of q8_0)",
    .reference = "",
    .parameters = kLowBitParameters,
    .row_types = [](const Arguments& a) { return Both(RowType::kQ8, Rotates(a)); },
};

extern const Method kQ4Method{
    .name = "q4",
    .stage = Stage::kCodec,
    .summary = "4 bits in blocks of 32 channels with one scale (the content of q4_0)",
    .reference = "",
    .parameters = kLowBitParameters,
    .row_types = [](const Arguments& a) { return Both(RowType::kQ4, Rotates(a)); },
};

extern const Method kMixMethod{
    .name = "mix",
    .stage = Stage::kCodec,
    .summary = "keys and values stored each in their own way",
    .reference = "",
    .parameters = kMixParameters,
    .validate = ValidateMix,
    .row_types =
        [](const Arguments& a) { return RowTypes{ParseRowType(a.Text("k")), ParseRowType(a.Text("v")), Rotates(a)}; },
    .example = "mix(k=f32, v=bf16)",
};

}  // namespace lesskv
