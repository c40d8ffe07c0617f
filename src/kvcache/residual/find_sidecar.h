// Where a term that reads a trained artefact finds its sidecar: options `file` and `sidecar`, else beside the model.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <string_view>

#include "kvcache/registry.h"
#include "kvcache/residual/sidecar.h"

namespace lesskv {

struct FoundSidecar {
  std::string path, fingerprint;
};

// `what` is trained by 'lesskv train COMMAND'. Throws Error when there is no file, or not the one that the term names.
FoundSidecar FindSidecar(const Arguments& arguments, const SidecarSource& source, std::string_view method,
                         std::string_view what, std::string_view command);

namespace internal {
std::shared_ptr<const void> ShareTrained(const FoundSidecar& found, const SidecarSource& source, const std::string& what,
                                         const std::function<std::shared_ptr<const void>(const Sidecar&)>& make);
}

// What `make` makes of the sidecar, which belongs to the model (CheckModel). All who ask for the same of the same file
// and model share one, as long as anybody holds it: `what` says what it is, with everything but these that `make` uses.
template <typename T>
std::shared_ptr<const T> ShareTrained(const FoundSidecar& found, const SidecarSource& source, const std::string& what,
                                      const std::function<std::shared_ptr<const T>(const Sidecar&)>& make) {
  return std::static_pointer_cast<const T>(internal::ShareTrained(found, source, what, make));
}

}  // namespace lesskv
