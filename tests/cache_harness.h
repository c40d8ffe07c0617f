// What the cache's tests share: random texts pushed straight through SequenceCache, without a model, and the list of
// specs that the registry says can be combined.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include "base/rng.h"
#include "kvcache/residual/sidecar.h"
#include "kvcache/sequence_cache.h"

namespace lesskv::testing_support {

struct TinyShape {
  size_t n_layers, n_heads, n_kv_heads, head_dim;
  size_t ctx = 240;

  size_t group() const { return n_heads / n_kv_heads; }
  size_t rotary_dims() const { return head_dim / 2 * 2; }
  std::string Name() const;
};

// Multi-head, grouped, multi-query, and a head size that block codecs take; odd sizes where possible.
inline constexpr TinyShape kTinyShapes[] = {{2, 2, 2, 7}, {3, 4, 2, 5}, {2, 3, 1, 9}, {2, 4, 2, 32}};

// rotary_dims 0: keys and queries are taken as they are.
CacheShape MakeCacheShape(const TinyShape& shape, size_t rotary_dims);
CacheShape MakeCacheShape(const TinyShape& shape);

// Unrotated queries, keys and values of a text, per layer [n, heads, head_dim].
struct Text {
  size_t n = 0;
  std::vector<std::vector<float>> q, k, v;
};
// A query or key of the tests' models at a position, by RoPE's definition in double.
std::vector<double> Rotated(const TinyShape& shape, const float* x, size_t position);

Text RandomText(const TinyShape& shape, size_t n, uint64_t seed, float scale = 1.5f);

// One step over tokens [first, first + n) of the text; outputs [n_layers][n, n_heads, head_dim].
using Outputs = std::vector<std::vector<float>>;
Outputs Feed(SequenceCache& cache, const Text& text, size_t first, size_t n, StepKind kind);
// Bit for bit.
bool Same(const Outputs& a, const Outputs& b);
// Append and Attend of all layers: the step without its beginning and end.
Outputs RunLayers(KvCache& cache, const TinyShape& shape, const Text& text, size_t first, size_t n);

// One step of a life: kPrompt stands for a whole prompt, fed as the spec says, EndPrompt included.
struct LifeStep {
  size_t n;
  StepKind kind;
};
// Prompt, generation, a second turn, generation.
std::vector<LifeStep> UsualLife();
size_t Tokens(const std::vector<LifeStep>& life);
// Feeds one step (several where a prompt comes in chunks), from token `first` on.
Outputs Live(SequenceCache& cache, const Text& text, size_t first, const LifeStep& step);

// A sidecar file with weights that matter (an untrained one is next to nothing), removed with the object.
class TempSidecar {
 public:
  // input_width: of what enters a layer; 0: as MakeCacheShape has it.
  explicit TempSidecar(const TinyShape& shape, FeatureKind kind = FeatureKind::kGelu, size_t input_width = 0);
  ~TempSidecar();
  SidecarSource source() const { return {path_, sidecar_.model_fingerprint}; }
  const std::string& path() const { return path_; }
  const Sidecar& sidecar() const { return sidecar_; }

 private:
  void AddDictionaries(const TinyShape& shape, Rng& rng);
  void AddBalance(const TinyShape& shape, Rng& rng);

  std::string path_;
  Sidecar sidecar_;
};

std::shared_ptr<const CacheConfig> MakeConfig(const std::string& spec, const TinyShape& shape,
                                              const TempSidecar& sidecar, std::vector<ProtectedSpan> protect = {});

// Every method's example alone and every legal pair of examples (joined to an evicting selector where neither of them
// selects), then combinations of three and more. Only those whose codec takes the shape's head size.
std::vector<std::string> LegalSpecs(const TinyShape& shape);
// Codecs that give back what they were given, bit for bit.
bool IsLossless(const std::string& spec);

std::vector<std::vector<int32_t>> AllResident(const SequenceCache& cache, const TinyShape& shape);
std::vector<int32_t> Resident(const SequenceCache& cache, size_t layer, size_t kv_head);

// Largest |a - b| relative to the largest |b|.
double RelativeError(const std::vector<float>& a, const std::vector<float>& b);

// Path of a file in the shared test data; empty when it is not there.
std::string SharedFile(const std::string& relative);

}  // namespace lesskv::testing_support
