// CSR (arXiv 2412.11741): keys and values as sums of a few atoms of dictionaries trained beforehand.
#include "kvcache/codec/csr_store.h"
#include "kvcache/codec/exact_codec.h"
#include "kvcache/registry.h"
#include "kvcache/residual/find_sidecar.h"

namespace lesskv {
namespace {

class CsrCodec final : public Codec {
 public:
  CsrCodec(const CsrOptions& options, std::shared_ptr<const CsrDictionaries> dictionaries, std::string artefact)
      : options_(options), dictionaries_(std::move(dictionaries)), artefact_(std::move(artefact)) {}
  CodecTraits traits() const override { return {.rewrites_rows = false, .unrotated_keys = true}; }
  std::unique_ptr<KvStore> MakeStore(ByteCounter& counter, const StoreShape& shape) const override {
    return std::make_unique<CsrStore>(counter, shape, options_, dictionaries_);
  }
  std::string artefact() const override { return artefact_; }
  size_t ArtefactBytes() const override { return dictionaries_->Bytes(); }

 private:
  CsrOptions options_;
  std::shared_ptr<const CsrDictionaries> dictionaries_;
  std::string artefact_;
};

void Validate(const Arguments& a) {
  for (const char* name : {"s", "sample"})
    if (a.Count(name) % SidecarDictionaries::kValueChunks != 0)
      Fail(ErrorCode::kInvalidArgument, "cache spec: csr's {} must be even, since a value is coded in two halves, not {}",
           name, a.Count(name));
}

void CheckShape(const SidecarDictionaries& d, const MethodContext& context, const std::string& path) {
  if (d.key_of.size() != context.layers.size())
    Fail(ErrorCode::kMismatch, "{}: dictionaries for {} layers, but the model has {} (global ones)", path, d.key_of.size(),
         context.layers.size());
  for (const LayerShape& layer : context.layers)
    if (layer.head_dim != d.head_dim)
      Fail(ErrorCode::kMismatch, "{}: dictionaries for heads of {}, but the model's have {}", path, d.head_dim,
           layer.head_dim);
}

std::unique_ptr<const Codec> Make(const Arguments& a, const MethodContext& context) {
  if (context.layers.empty() || context.layers[0].window > 0) return std::make_unique<ExactCodec>();
  for (const LayerShape& layer : context.layers)
    if (layer.head_dim % SidecarDictionaries::kValueChunks != 0 || layer.head_dim > kMostAtomChannels)
      Fail(ErrorCode::kInvalidArgument, "codec csr needs an even head size of at most {}; this model's is {}",
           kMostAtomChannels, layer.head_dim);
  const FoundSidecar found = FindSidecar(a, context.sidecar, "csr", "dictionaries", "csr");
  const auto dictionaries = ShareTrained<CsrDictionaries>(
      found, context.sidecar, fmt::format("csr {}", a.Has("atoms") ? a.Count("atoms") : 0), [&](const Sidecar& sidecar) {
        const SidecarDictionaries& d = sidecar.dictionaries;
        if (d.empty())
          Fail(ErrorCode::kNotFound, "{}: holds no dictionaries (train them with 'lesskv train csr')", found.path);
        CheckShape(d, context, found.path);
        const size_t n_atoms = a.Has("atoms") ? a.Count("atoms") : d.n_atoms;
        if (n_atoms > d.n_atoms)
          Fail(ErrorCode::kMismatch, "{}: dictionaries of {} atoms, csr asks for {}", found.path, d.n_atoms, n_atoms);
        return std::make_shared<const CsrDictionaries>(d, n_atoms);
      });
  const size_t n_atoms = dictionaries->n_atoms();
  const CsrOptions options{a.Count("s"), a.Count("window"), a.Count("sample"), a.Count("guard"),
                           a.Text("coefficients") == "f8" ? CoefficientType::kE4m3 : CoefficientType::kF16};
  if (n_atoms + options.own() > kMostAtoms)
    Fail(ErrorCode::kInvalidArgument, "codec csr: {} atoms and {} of a sequence's own are more than the {} that an index can "
                                      "name", n_atoms, options.own(), kMostAtoms);
  return std::make_unique<CsrCodec>(options, dictionaries, found.fingerprint);
}

constexpr Parameter kParameters[] = {
    {.name = "s", .kind = Parameter::Kind::kCount, .default_value = "8",
     .help = "atoms a key, and a value (half of them each half): 8 s bytes a row, 32 s / head size bits a number", .min = 2,
     .max = 128, .positional = true},
    {.name = "atoms", .kind = Parameter::Kind::kCount, .default_value = "",
     .help = "the first atoms of each dictionary, the most used ones; when not given: all", .min = 1, .max = 65536},
    {.name = "window", .kind = Parameter::Kind::kCount, .default_value = "0",
     .help = "most recent tokens kept in f16; under a budget at most half of it", .max = 65536},
    {.name = "coefficients", .kind = Parameter::Kind::kWord, .default_value = "f16",
     .help = "of a pair: f16, or f8 (e4m3), 6 s bytes a row instead of 8 s", .choices = "f16|f8"},
    {.name = "sample", .kind = Parameter::Kind::kCount, .default_value = "0",
     .help = "atoms a head taken from the end of the sequence's first step (the paper: 128), f16, the sequence's own",
     .max = 16384},
    {.name = "guard", .kind = Parameter::Kind::kCount, .default_value = "0",
     .help = "atoms a head for vectors that the others code badly (the paper: 256), likewise", .max = 16384},
    {.name = "file", .kind = Parameter::Kind::kText, .default_value = "",
     .help = "the sidecar with the trained dictionaries; when not given it is found as that of less"},
    {.name = "sidecar", .kind = Parameter::Kind::kText, .default_value = "",
     .help = "the fingerprint that the sidecar must have, 16 hexadecimal digits"},
};

}  // namespace

extern const Method kCsrMethod{
    .name = "csr",
    .stage = Stage::kCodec,
    .summary = "keys before rotation and values as sums of a few atoms of trained dictionaries",
    .reference = "arXiv 2412.11741",
    .parameters = kParameters,
    .traits = [](const Arguments&) {
          return MethodTraits{.rewrites_rows = false, .needs_known_rows = true, .reads_sidecar = true};
        },
    .validate = Validate,
    .make_codec = Make,
};

}  // namespace lesskv
