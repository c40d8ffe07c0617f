// Terms without code of their own: what the cache does when nothing else is asked for, and prefill.
#include "kvcache/registry.h"

namespace lesskv {
namespace {

constexpr Parameter kPrefillParameters[] = {
    {.name = "chunk", .kind = Parameter::Kind::kCount, .default_value = "", .help = "tokens a step", .min = 1,
     .max = 1 << 20},
};

}  // namespace

extern const Method kDropMethod{
    .name = "drop",
    .stage = Stage::kResidual,
    .summary = "nothing remains of a token that left",
    .reference = "",
};

extern const Method kAllMethod{
    .name = "all",
    .stage = Stage::kRecall,
    .summary = "every query reads every resident token",
    .reference = "",
};

extern const Method kPrefillMethod{
    .name = "prefill",
    .stage = Stage::kPrefill,
    .summary = "a prompt streams in, chunk by chunk, with eviction in between; memory is bounded by budget + chunk",
    .reference = "",
    .parameters = kPrefillParameters,
    .traits = [](const Arguments& arguments) { return MethodTraits{.prompt_block = arguments.Count("chunk")}; },
    .validate = [](const Arguments& a) { RequireGiven(a, "prefill", "chunk", "prefill(chunk=512)"); },
    .example = "prefill(chunk=512)",
};

}  // namespace lesskv
