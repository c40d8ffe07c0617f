// The sidecar: what was trained for one model, as a GGUF file beside it (NAME.less.gguf for NAME.gguf): feature maps of
// the LESS state, a division of the budget among its heads, scores of rows, dictionaries of `csr`, matrices of `balanced`,
// or several of these.
// docs/formats.md, section "Sidecar", lists keys and tensors. Parameters are kept here as they were trained (unfolded,
// float32 in memory); FeatureMaps turns them into what runs.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "base/dtype.h"

namespace lesskv {

// How a feature vector leaves its map (last layer of phi and psi).
enum class FeatureKind {
  kGelu,  // the paper: phi = |GELU(GELU(q A1) A2)|, psi = |g W3| with g like phi without its absolute value
  kExp,   // ours: exp(GELU(x A1 + b1) A2 + b2) for both; positive, and with the range that softmax mass has
};

std::string FeatureKindName(FeatureKind kind);  // "gelu", "exp"
FeatureKind ParseFeatureKind(const std::string& name);

struct SidecarShape {
  size_t n_layers = 0;
  size_t n_heads = 0;     // query heads: one phi each
  size_t n_kv_heads = 0;  // one psi each
  size_t head_dim = 0;    // D
  size_t rank = 8;        // R, features
  size_t hidden = 512;    // R', hidden width
  FeatureKind kind = FeatureKind::kGelu;

  bool operator==(const SidecarShape&) const = default;
  std::string ToString() const;
};

// Parameters of one net for all its heads, row-major.
struct NetParams {
  std::vector<float> w1;  // [heads, D, R']: A1 or B1 of the paper
  std::vector<float> w2;  // [heads, R', R]: A2 or B2
  std::vector<float> b1;  // [heads, R'], kExp only
  std::vector<float> b2;  // [heads, R], kExp only
};

struct LayerParams {
  NetParams phi, psi;
  // kGelu only; psi = |u + (u X) * d2|, u = |d| * g.
  std::vector<float> d, d2;  // [n_kv_heads, R]
  std::vector<float> x;      // [n_kv_heads, R, R]
  // What psi takes the keys to be spread around, times the softmax scale; empty: 0. As exp(q.k) = exp(q.c) exp(q.(k - c)), the
  // log-mass of what a query q reads is ln(phi(q) z) + q.c: where keys carry large biases, exponents too large for features.
  std::vector<float> center;  // [n_kv_heads, D]

  bool empty() const { return phi.w1.empty(); }
};

// What the maps were trained for; told to the user, never used to compute.
struct SidecarTraining {
  std::vector<std::string> policies;  // specs, "h2o(5%)"
  uint64_t tokens = 0;                // distinct training tokens
  uint32_t ctx = 0;
  uint32_t epochs = 0;
  uint64_t seed = 0;
  std::vector<float> validation;           // a layer: mean squared error of the validation sequences, best epoch
  std::vector<float> validation_baseline;  // a layer: the same for Baseline+ (selector with rank / 2 more rows)
  std::vector<std::string> history;        // a line for each later change of the maps: joint refinement, train mass
};

// How the rows of a budget are best divided among the KV heads of a model's global layers (`split`): measured shares.
struct SidecarBudgets {
  std::vector<size_t> n_kv_heads;  // of each global layer
  std::vector<float> ratios;       // ascending, in (0, 1): shares of all rows that may stay
  std::vector<float> shares;       // [ratios, heads]: the share of its own rows that a head then keeps, in [0, 1]
  uint64_t tokens = 0;             // distinct training tokens

  bool empty() const { return shares.empty(); }
  size_t n_heads() const;
  bool operator==(const SidecarBudgets&) const = default;
};

// What rows of a KV head are worth by the layer's input (`kvzap`): score = bias + weight x.
struct SidecarScores {
  static constexpr size_t kQuantiles = 99;

  std::vector<size_t> n_kv_heads;  // of each global layer
  size_t width = 0;                // of the input
  std::vector<float> weight;       // [heads, width]
  std::vector<float> bias;         // [heads]
  std::vector<float> r2;           // [heads]: squared correlation with the measured scores of texts left out
  std::vector<float> quantiles;    // [heads, kQuantiles]: the 1, 2, ... 99 % ones of its scores of the training texts; or none
  uint64_t tokens = 0;             // distinct training tokens

  bool empty() const { return weight.empty(); }
  bool operator==(const SidecarScores&) const = default;
};

// Dictionaries whose atoms keys and values are sums of (`csr`): unit vectors, f16, the most used ones first. Keys are coded
// before rotation and whole, values in kValueChunks contiguous chunks.
struct SidecarDictionaries {
  static constexpr size_t kValueChunks = 2;

  size_t head_dim = 0, n_atoms = 0;
  std::vector<uint32_t> key_of, value_of;  // the dictionary of each global layer; neighbours may share one
  std::vector<uint16_t> keys;              // [key dictionaries, n_atoms, head_dim]
  std::vector<uint16_t> values;            // [value dictionaries, n_atoms, head_dim / kValueChunks]
  uint64_t tokens = 0;                     // distinct training tokens
  uint32_t pairs = 0;                      // what they were trained for: pairs of a key

  bool empty() const { return n_atoms == 0; }
  bool operator==(const SidecarDictionaries&) const = default;
};

// Matrices behind which keys are coded (`balanced`), one a KV head, f16: keys times B and queries times the inverse of B
// transposed have the same covariance, which is diagonal, its largest entries first (balanced truncation: Moore, IEEE
// Transactions on Automatic Control 26, 1981). Of keys as they are stored, behind RoPE.
struct SidecarBalance {
  size_t head_dim = 0;
  std::vector<size_t> n_kv_heads;  // of each global layer
  std::vector<uint16_t> keys;      // B [heads, head_dim, head_dim], row-major: z_j = sum over c of k_c B[c, j]
  uint64_t tokens = 0;             // training tokens
  uint64_t positions = 0;          // up to which they were rotated

  bool empty() const { return keys.empty(); }
  bool operator==(const SidecarBalance&) const = default;
};

struct Sidecar {
  SidecarShape shape;  // all 0 where there are no maps
  uint64_t model_fingerprint = 0;  // of the file it was trained on
  uint64_t model_identity = 0;     // of the model in any quantisation; 0 in sidecars of earlier versions
  std::string model_name;
  SidecarTraining training;
  DType matrix_type = DType::kBF16;  // of w1 and w2 in the file: kBF16 or kF32
  std::vector<LayerParams> layers;   // n_layers; layers that were not trained (--layers A-B) are empty
  SidecarBudgets budgets;
  SidecarScores scores;
  SidecarDictionaries dictionaries;
  SidecarBalance balance;

  bool has_maps() const { return shape.n_layers > 0; }
};

// Feature maps before training: uniform matrices; d = d2 = 1e-4, so that the untrained state weighs next to nothing.
// For kExp the last bias of psi does the same: psi is about 1e-4.
Sidecar InitialSidecar(const SidecarShape& shape, uint64_t seed);

// Throws Error kBadFile / kNotFound naming the key or tensor, what was expected and what was found: wrong kind of
// file, unknown version, a shape that is absurd or does not agree, numbers that are not finite.
Sidecar ReadSidecar(const std::string& path);
void WriteSidecar(const std::string& path, const Sidecar& sidecar);

// One that is there already, whose parts a training is to keep; nothing where there is none. Throws as ReadSidecar and
// CheckModel do.
std::optional<Sidecar> ExistingSidecar(const std::string& path, uint64_t model_fingerprint, uint64_t model_identity);

// Refuses (Error kMismatch) a sidecar whose model is another one: neither the same file nor the same model in another
// quantisation. A fingerprint of 0 checks nothing.
void CheckModel(const Sidecar& sidecar, const std::string& path, uint64_t model_fingerprint, uint64_t model_identity);

// The identity that a file names, without reading its maps; nothing for other files and for sidecars without one.
std::optional<uint64_t> SidecarIdentity(const std::string& path);

// Adds `shift` to the log-mass of every state: psi times exp(shift), in the bias of its last layer (kExp) or in d (kGelu).
void ShiftLogMass(Sidecar& sidecar, float shift);

// Gives `to` what it lacks of all that `from` holds beside maps.
void AddOtherParts(const Sidecar& from, Sidecar& to);

// Joins parts that were trained apart (--layers A-B): same model and shape, every layer in exactly one part. Of what they
// hold beside maps the first of each kind.
Sidecar MergeSidecars(const std::vector<std::string>& paths);

}  // namespace lesskv
