// The registry's entry for LESS: finds the sidecar and makes the residual of less.h.
#include "kvcache/cache_config.h"
#include "kvcache/registry.h"
#include "kvcache/residual/find_sidecar.h"
#include "kvcache/residual/less.h"

namespace lesskv {
namespace {

constexpr Parameter kParameters[] = {
    {.name = "file", .kind = Parameter::Kind::kText, .default_value = "",
     .help = "the sidecar with the trained feature maps; when not given: NAME.less.gguf beside the model NAME.gguf, or "
             "another .less.gguf there or one folder up that was trained for the same model in any quantisation"},
    {.name = "sidecar", .kind = Parameter::Kind::kText, .default_value = "",
     .help = "the fingerprint that the sidecar must have, 16 hexadecimal digits"},
    {.name = "clamp", .kind = Parameter::Kind::kWord, .default_value = "false",
     .help = "clamp features and mass at 1e-6 as the authors' decode code does", .choices = "true|false"},
};

MadeResidual Make(const Arguments& arguments, const MethodContext& context) {
  const SidecarSource& source = context.sidecar;
  const FoundSidecar found = FindSidecar(arguments, source, "less", "feature maps", "less");
  auto maps = ShareTrained<FeatureMaps>(found, source, "less",
                                        [&](const Sidecar& sidecar) { return FeatureMaps::OfFile(sidecar, found.path); });
  const LessOptions options{.clamp = arguments.Text("clamp") == "true"};
  return {MakeLessResidual(options, context.layers, std::move(maps)), found.fingerprint};
}

}  // namespace

extern const Method kLessMethod{
    .name = "less",
    .stage = Stage::kResidual,
    .summary = "tokens that leave are folded into a small recurrent state that later queries read",
    .reference = "arXiv 2402.09398",
    .parameters = kParameters,
    .traits = [](const Arguments&) { 
          return MethodTraits{.needs_true_positions = true,
                              .needs_eviction = true,
                              .needs_full_keys = true,
                              .reads_sidecar = true};
        },
    .make_residual = Make,
};

}  // namespace lesskv
