#include "kvcache/residual/find_sidecar.h"

#include <filesystem>
#include <map>
#include <mutex>

#include "base/error.h"
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

std::shared_ptr<const void> internal::ShareTrained(const FoundSidecar& found, const SidecarSource& source,
                                                   const std::string& what,
                                                   const std::function<std::shared_ptr<const void>(const Sidecar&)>& make) {
  static std::mutex mutex;
  static std::map<std::string, std::weak_ptr<const void>> shared;
  const auto fresh = [&] {
    const Sidecar sidecar = ReadSidecar(found.path);
    CheckModel(sidecar, found.path, source.model_fingerprint, source.model_identity);
    return make(sidecar);
  };
  if (source.model_fingerprint == 0) return fresh();  // of no model in particular
  std::error_code unknown;  // a time of which nothing is known is none: the fingerprint remains
  const auto written = std::filesystem::last_write_time(found.path, unknown).time_since_epoch().count();
  const std::string key = fmt::format("{} {} {} {:x} {:x} {}", what, found.fingerprint, written, source.model_fingerprint,
                                      source.model_identity, found.path);
  const std::lock_guard lock(mutex);
  std::erase_if(shared, [](const auto& entry) { return entry.second.expired(); });
  if (const auto known = shared.find(key); known != shared.end())
    if (auto made = known->second.lock()) return made;
  auto made = fresh();
  shared[key] = made;
  return made;
}

}  // namespace lesskv
