#include "kvcache/residual/find_sidecar.h"

#include <filesystem>

#include "format/gguf.h"

namespace lesskv {

FoundSidecar FindSidecar(const Arguments& arguments, const SidecarSource& source, std::string_view method,
                         std::string_view what, std::string_view command) {
  const bool named = arguments.Has("file");
  const std::string path(named ? arguments.Text("file") : std::string_view(source.path));
  if (!named && (path.empty() || !std::filesystem::exists(path)))
    Fail(ErrorCode::kNotFound, "{0} needs trained {1}: {2} (train them with 'lesskv train {3}', or name them: "
         "{0}(file=\"...\"))", method, what, path.empty() ? "this model has no sidecar" : "there is no " + path, command);
  const std::string fingerprint = FingerprintString(GgufFile::Open(path).Fingerprint());
  if (arguments.Has("sidecar") && arguments.Text("sidecar") != fingerprint)
    Fail(ErrorCode::kMismatch, "{}: {} has fingerprint {}, the spec asks for {}", method, path, fingerprint,
         arguments.Text("sidecar"));
  return {path, fingerprint};
}

}  // namespace lesskv
