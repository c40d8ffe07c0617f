// Codecs that store each row by itself: one element type for keys and one for values.
#include "kvcache/registry.h"

namespace lesskv {
namespace {

RowTypes Both(RowType type) { return {type, type, false}; }

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
};

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
    .row_types = [](const Arguments&) { return Both(RowType::kQ8); },
};

extern const Method kQ4Method{
    .name = "q4",
    .stage = Stage::kCodec,
    .summary = "4 bits in blocks of 32 channels with one scale (the content of q4_0)",
    .reference = "",
    .row_types = [](const Arguments&) { return Both(RowType::kQ4); },
};

extern const Method kMixMethod{
    .name = "mix",
    .stage = Stage::kCodec,
    .summary = "keys and values stored each in their own way",
    .reference = "",
    .parameters = kMixParameters,
    .row_types = [](const Arguments& a) { return RowTypes{ParseRowType(a.Text("k")), ParseRowType(a.Text("v")), false}; },
    .example = "mix(k=f32, v=bf16)",
};

}  // namespace lesskv
