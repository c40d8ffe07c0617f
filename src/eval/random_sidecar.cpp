#include "eval/random_sidecar.h"

#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <filesystem>

#include "base/error.h"
#include "kvcache/residual/sidecar.h"

namespace lesskv {

RandomSidecar::RandomSidecar(const Model& model, size_t rank, size_t hidden, uint64_t seed)
    : path_((std::filesystem::temp_directory_path() / "lesskv_random_XXXXXX").string()),
      fingerprint_(model.fingerprint()) {
  const int file = mkstemp(path_.data());
  if (file < 0) Fail(ErrorCode::kIo, "{}: a temporary file cannot be made: {}", path_, std::strerror(errno));
  close(file);
  const ModelConfig& config = model.config();
  const CacheShape shape = model.MakeCacheShape(config.train_ctx, ComputeType::kF32);
  try {
    Sidecar sidecar = InitialSidecar({.n_layers = config.n_layers - CountLocal(shape).n_layers,
                                      .n_heads = config.n_heads,
                                      .n_kv_heads = config.n_kv_heads,
                                      .head_dim = config.head_dim,
                                      .rank = rank,
                                      .hidden = hidden},
                                     seed);
    sidecar.model_fingerprint = fingerprint_;
    WriteSidecar(path_, sidecar);
  } catch (...) {
    std::remove(path_.c_str());
    throw;
  }
}

RandomSidecar::~RandomSidecar() { std::remove(path_.c_str()); }

}  // namespace lesskv
