// What the cache costs a decode step, without the model: append, attend, observe, evict and absorb, for each spec, at
// several numbers of tokens seen. Random keys and values stand for text; times are medians, and since other programs
// come and go the specs take turns and the ratio to the first spec is the number to look at.
//
//   bench_cache [--kv SPEC]... [--seen 1024,32768] [--layers 4] [--kv-heads 8] [--group 4] [--dim 64] [--ctx 81920]
//               [--hidden 512] [--rank 8] [--threads 2] [--repeat 41]
//
// The default specs answer two questions at a context of 81,920 tokens, 5 % of which are 4,096 rows: what h2o's score
// bookkeeping costs beside a window of as many rows, and what LESS adds (random feature maps, written to a temporary
// file).
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include "base/rng.h"
#include "base/threads.h"
#include "kernels/cpu.h"
#include "kvcache/residual/sidecar.h"
#include "kvcache/sequence_cache.h"

namespace lesskv {
namespace {

struct Options {
  std::vector<std::string> specs;
  std::vector<size_t> seen = {4096, 32768};
  size_t layers = 4, kv_heads = 8, group = 4, dim = 64, ctx = 81920;
  size_t hidden = 512, rank = 8;
  int threads = 0;
  size_t repeat = 41;
};

double Seconds() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

// A cache and random activations to feed it.
struct Subject {
  std::string name;
  std::unique_ptr<SequenceCache> cache;
  std::vector<double> times;
};

class Feeder {
 public:
  Feeder(const CacheShape& shape, size_t most_tokens) : shape_(shape), rng_(1) {
    Fill(keys_, most_tokens * shape.n_kv_heads * shape.head_dim);
    Fill(values_, most_tokens * shape.n_kv_heads * shape.head_dim);
    Fill(queries_, most_tokens * shape.n_heads * shape.head_dim);
    out_.resize(queries_.size());
  }

  void Step(SequenceCache& cache, size_t n, StepKind kind) {
    cache.BeginStep(n, kind);
    for (size_t layer = 0; layer < shape_.n_layers; ++layer) {
      cache.Append(layer, keys_.data(), values_.data());
      cache.Attend(layer, queries_.data(), out_.data());
    }
    cache.EndStep();
  }

 private:
  void Fill(std::vector<float>& x, size_t n) {
    x.resize(n);
    for (float& value : x) value = rng_.Normal();
  }

  CacheShape shape_;
  Rng rng_;
  std::vector<float> keys_, values_, queries_, out_;
};

double Median(std::vector<double> values) {
  std::nth_element(values.begin(), values.begin() + static_cast<std::ptrdiff_t>(values.size() / 2), values.end());
  return values[values.size() / 2];
}

void Run(const Options& options) {
  SetThreads(options.threads);
  CacheShape shape{.n_layers = options.layers,
                   .n_heads = options.kv_heads * options.group,
                   .n_kv_heads = options.kv_heads,
                   .head_dim = options.dim,
                   .ctx = options.ctx,
                   .rope = RopeTable({.n_dims = options.dim}),
                   .compute = AutoCompute()};
  const std::string sidecar = fmt::format("{}/bench_cache_{}.less.gguf",
                                          std::filesystem::temp_directory_path().string(), getpid());
  WriteSidecar(sidecar, InitialSidecar({.n_layers = options.layers, .n_heads = shape.n_heads,
                                        .n_kv_heads = shape.n_kv_heads, .head_dim = shape.head_dim,
                                        .rank = options.rank, .hidden = options.hidden}, 1));
  std::vector<Subject> subjects;
  for (const std::string& spec : options.specs)
    subjects.push_back({spec, std::make_unique<SequenceCache>(
                                  CacheConfig::Create(CacheSpec::Parse(spec), shape, {}, {sidecar, 0})), {}});
  std::filesystem::remove(sidecar);

  constexpr size_t kChunk = 256;
  Feeder feeder(shape, kChunk);
  std::printf("%zu layers, %zu query and %zu KV heads of %zu, context %zu, %d threads, %s\n\n", shape.n_layers,
              shape.n_heads, shape.n_kv_heads, shape.head_dim, shape.ctx, Threads(), IsaName().c_str());
  std::printf("%-36s %10s %10s %14s %14s %10s\n", "cache", "seen", "rows", "us a step", "us a layer", "ratio");
  for (size_t seen : options.seen) {
    for (Subject& subject : subjects) {
      while (subject.cache->tokens_seen() < seen)
        feeder.Step(*subject.cache, std::min(kChunk, seen - subject.cache->tokens_seen()), StepKind::kStream);
      subject.times.clear();
    }
    for (size_t i = 0; i < options.repeat; ++i) {
      for (Subject& subject : subjects) {
        feeder.Step(*subject.cache, 1, StepKind::kDecode);  // warms what the others have driven out of the caches
        const double start = Seconds();
        feeder.Step(*subject.cache, 1, StepKind::kDecode);
        subject.times.push_back(Seconds() - start);
      }
    }
    const double base = Median(subjects[0].times);
    for (const Subject& subject : subjects) {
      const double time = Median(subject.times);
      std::printf("%-36s %10zu %10.0f %14.1f %14.1f %10.3f\n", subject.name.c_str(), seen,
                  subject.cache->Stats().tokens_resident, time * 1e6, time * 1e6 / static_cast<double>(shape.n_layers),
                  time / base);
    }
  }
}

}  // namespace
}  // namespace lesskv

int main(int argc, char** argv) {
  lesskv::Options options;
  CLI::App app("Cost of a cache in a decode step");
  app.add_option("--kv", options.specs, "Cache spec; the first one is the base of the ratios")->allow_extra_args(false);
  app.add_option("--seen", options.seen, "Tokens seen")->delimiter(',');
  app.add_option("--layers", options.layers);
  app.add_option("--kv-heads", options.kv_heads);
  app.add_option("--group", options.group);
  app.add_option("--dim", options.dim);
  app.add_option("--ctx", options.ctx);
  app.add_option("--hidden", options.hidden);
  app.add_option("--rank", options.rank);
  app.add_option("--threads", options.threads);
  app.add_option("--repeat", options.repeat);
  CLI11_PARSE(app, argc, argv);
  if (options.specs.empty()) options.specs = {"window(5%)", "h2o(5%)", "tova(5%)", "h2o(5%)+less"};
  try {
    lesskv::Run(options);
  } catch (const lesskv::Error& error) {
    std::fprintf(stderr, "bench_cache: %s\n", error.what());
    return error.ExitStatus();
  }
  return 0;
}
