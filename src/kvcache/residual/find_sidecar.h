// Where a term that reads a trained artefact finds its sidecar: options `file` and `sidecar`, else beside the model.
#pragma once

#include <string>
#include <string_view>

#include "kvcache/registry.h"

namespace lesskv {

struct FoundSidecar {
  std::string path, fingerprint;
};

// `what` is trained by 'lesskv train COMMAND'. Throws Error when there is no file, or not the one that the term names.
FoundSidecar FindSidecar(const Arguments& arguments, const SidecarSource& source, std::string_view method,
                         std::string_view what, std::string_view command);

}  // namespace lesskv
