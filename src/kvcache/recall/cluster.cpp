// ClusterKV (arXiv 2412.03213): queries read the clusters of keys that fit them best.
#include <unistd.h>

#include <filesystem>

#include "kvcache/recall/cluster_store.h"
#include "kvcache/registry.h"

namespace lesskv {
namespace {

// A codec of rows that lie by themselves, whose rows are clustered.
class ClusterCodec final : public Codec {
 public:
  ClusterCodec(std::unique_ptr<const Codec> inner, const ClusterOptions& options)
      : inner_(std::move(inner)), options_(options) {}
  CodecTraits traits() const override { return inner_->traits(); }
  std::unique_ptr<KvStore> MakeStore(ByteCounter& counter, const StoreShape& shape) const override {
    return std::make_unique<ClusterStore>(counter, shape, *inner_->row_types(), options_);
  }
  const RowTypes* first_prompt_types() const override { return inner_->first_prompt_types(); }
  std::string artefact() const override { return inner_->artefact(); }
  size_t ArtefactBytes() const override { return inner_->ArtefactBytes(); }

 private:
  std::unique_ptr<const Codec> inner_;
  ClusterOptions options_;
};

std::unique_ptr<const Codec> Make(const Arguments& a, const MethodContext& context,
                                  std::unique_ptr<const Codec> inner) {
  ClusterOptions options;
  options.budget = a.Rows("rows", context.ctx);
  options.by_group = a.Text("share") == "group";
  options.sinks = a.Count("sinks");
  options.size = a.Count("size");
  options.every = a.Count("every");
  options.added = a.Count("add");
  options.passes = a.Count("passes");
  options.skip = a.Count("skip");
  options.folder = a.Text("offload");
  options.cache_rows = a.Has("cache") ? a.Rows("cache", context.ctx) : 0;
  if (context.ctx > 0) options.ctx = context.ctx;
  if (!options.folder.empty() &&
      (!std::filesystem::is_directory(options.folder) || access(options.folder.c_str(), W_OK) != 0))
    Fail(ErrorCode::kNotFound, "cluster: offload expects a folder to write to, and \"{}\" is none", options.folder);
  if (inner->row_types() == nullptr)
    Fail(ErrorCode::kInvalidArgument,
         "cluster puts rows beside others like them, but this codec's do not lie by themselves");
  if (options.budget <= options.sinks)
    Fail(ErrorCode::kInvalidArgument, "cluster reads {} rows, which must be more than its {} sinks", options.budget,
         options.sinks);
  if (options.skip >= context.layers.size() && !context.layers.empty())
    Fail(ErrorCode::kInvalidArgument, "cluster leaves the first {} layers as they are, but this model has only {}",
         options.skip, context.layers.size());
  return std::make_unique<ClusterCodec>(std::move(inner), options);
}

void Validate(const Arguments& a) {
  RequireGiven(a, "cluster", "rows", "cluster(1024)");
  if (a.Has("cache") && !a.Has("offload"))
    Fail(ErrorCode::kInvalidArgument, "cache spec: cluster's cache is of rows that are offloaded; give offload, too");
  if (a.Count("add") > a.Count("every"))
    Fail(ErrorCode::kInvalidArgument, "cache spec: cluster: {} tokens cannot become {} clusters", a.Count("every"),
         a.Count("add"));
}

constexpr Parameter kParameters[] = {
    {.name = "rows",
     .kind = Parameter::Kind::kRows,
     .default_value = "",
     .help = "rows that a generated token reads, sinks included, recent rows of no cluster not",
     .min = 1,
     .positional = true},
    {.name = "share",
     .kind = Parameter::Kind::kWord,
     .default_value = "head",
     .help = "each query head reads its own rows, or a group those that its mean query asks for",
     .choices = "head|group"},
    {.name = "sinks",
     .kind = Parameter::Kind::kCount,
     .default_value = "16",
     .help = "first tokens, in no cluster and always read",
     .min = 0,
     .max = 65536},
    {.name = "size",
     .kind = Parameter::Kind::kCount,
     .default_value = "80",
     .help = "tokens a cluster of a prompt, on the average",
     .min = 1,
     .max = 65536},
    {.name = "every",
     .kind = Parameter::Kind::kCount,
     .default_value = "320",
     .help = "tokens after which those generated, or of chunks, become clusters; always read until then",
     .min = 1,
     .max = 1 << 20},
    {.name = "add",
     .kind = Parameter::Kind::kCount,
     .default_value = "4",
     .help = "clusters that they become",
     .min = 1,
     .max = 65536},
    {.name = "passes",
     .kind = Parameter::Kind::kCount,
     .default_value = "4",
     .help = "passes of k-means at most (the paper: 20)",
     .min = 0,
     .max = 1000},
    {.name = "skip",
     .kind = Parameter::Kind::kCount,
     .default_value = "2",
     .help = "first layers that are always read whole",
     .min = 0,
     .max = 65536},
    {.name = "offload",
     .kind = Parameter::Kind::kText,
     .default_value = "",
     .help = "a folder: clusters lie in a file there, not in memory"},
    {.name = "cache",
     .kind = Parameter::Kind::kRows,
     .default_value = "",
     .help = "rows a head of offloaded clusters, the last read, that are in memory; twice what a token reads when not "
             "given; at most the context's",
     .min = 1},
};

}  // namespace

extern const Method kClusterMethod{
    .name = "cluster",
    .stage = Stage::kRecall,
    .summary = "every token stays; a generated one reads the clusters of keys that its query points to",
    .reference = "arXiv 2412.03213",
    .parameters = kParameters,
    .traits = [](const Arguments&) { return MethodTraits{.recalls_all = true, .moves_rows = true}; },
    .validate = Validate,
    .make_wrapper = Make,
    .example = "cluster(1024)",
};

}  // namespace lesskv
