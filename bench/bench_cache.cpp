// What the cache costs a decode step, without the model: append, attend, observe, evict and absorb, for each spec, at
// several numbers of tokens seen. Random keys and values stand for text; times are medians, and since other programs
// come and go the specs take turns and the ratio to the first spec is the number to look at.
//
//   bench_cache [--kv SPEC]... [--seen 1024,32768] [--layers 4] [--kv-heads 8] [--group 4] [--dim 64] [--ctx 81920]
//               [--hidden 512] [--rank 8] [--threads 2] [--repeat 41] [--random-rows] [--clones N]
//
// With --clones a second table says what N clones of each cache take, in memory that they share and in memory of their
// own.
//
// The default specs answer two questions at a context of 81,920 tokens, 5 % of which are 4,096 rows: what h2o's score
// bookkeeping costs beside a window of as many rows, and what LESS adds (random feature maps, written to a temporary
// file).
#include <CLI/CLI.hpp>
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "base/threads.h"
#include "cache_feeder.h"
#include "kernels/basic/cpu.h"
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
  bool random_rows = false;
  size_t clones = 0;
};

double Seconds() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

// A cache and random activations to feed it.
struct Subject {
  std::string name;
  std::unique_ptr<SequenceCache> cache;
  std::vector<double> times;
};

double Median(std::vector<double> values) {
  std::nth_element(values.begin(), values.begin() + static_cast<std::ptrdiff_t>(values.size() / 2), values.end());
  return values[values.size() / 2];
}

// Of all caches, memory that they share once.
size_t Bytes(const std::vector<std::unique_ptr<SequenceCache>>& caches) {
  std::set<const void*> seen;
  size_t bytes = 0;
  for (const auto& cache : caches) {
    bytes += cache->Stats().kv_bytes;
    for (const SharedPart& part : cache->ShareableParts())
      if (!seen.insert(part.memory).second) bytes -= part.bytes;
  }
  return bytes;
}

void MeasureClones(const SequenceCache& cache, const std::string& name, size_t n) {
  constexpr double kMiB = 1 << 20;
  for (const bool apart : {false, true}) {
    std::vector<std::unique_ptr<SequenceCache>> clones;
    std::vector<double> times;
    for (size_t i = 0; i < n; ++i) {
      const double start = Seconds();
      clones.push_back(apart ? cache.CloneApart() : cache.Clone());
      times.push_back(Seconds() - start);
    }
    std::printf("%-36s %10zu %10zu %10s %14.2f %14.2f %14.1f\n", name.c_str(), cache.tokens_seen(), n,
                apart ? "apart" : "shared", static_cast<double>(cache.Stats().kv_bytes) / kMiB,
                static_cast<double>(Bytes(clones)) / kMiB, Median(times) * 1e6);
  }
}

void Run(const Options& options) {
  const ThreadPool pool(options.threads);
  const ThreadScope scope(pool);
  const CacheShape shape = CacheShape::Uniform(options.layers, options.kv_heads * options.group, options.kv_heads,
                                               options.dim, options.ctx, {.n_dims = options.dim}, AutoCompute());
  std::vector<std::unique_ptr<SequenceCache>> caches =
      bench::MakeCaches(options.specs, shape, options.rank, options.hidden);
  std::vector<Subject> subjects;
  for (size_t i = 0; i < caches.size(); ++i) subjects.push_back({options.specs[i], std::move(caches[i]), {}});

  constexpr size_t kChunk = 256;
  bench::Feeder feeder(shape, kChunk);
  std::printf("%zu layers, %zu query and %zu KV heads of %zu, context %zu, %d threads, %s\n\n", options.layers,
              shape.layers[0].n_heads, options.kv_heads, options.dim, shape.ctx, Threads(), IsaName().c_str());
  std::printf("%-36s %10s %10s %14s %14s %10s\n", "cache", "seen", "rows", "us a step", "us a layer", "ratio");
  for (size_t seen : options.seen) {
    if (options.random_rows) {  // only a new cache can be filled
      caches = bench::MakeCaches(options.specs, shape, options.rank, options.hidden);
      for (size_t i = 0; i < caches.size(); ++i) subjects[i].cache = std::move(caches[i]);
    }
    for (Subject& subject : subjects) {
      if (options.random_rows) subject.cache->FillRandom(seen, 1);
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
                  subject.cache->Stats().tokens_resident, time * 1e6, time * 1e6 / static_cast<double>(options.layers),
                  time / base);
    }
    if (options.clones == 0) continue;
    std::printf("\n%-36s %10s %10s %10s %14s %14s %14s\n", "cache", "seen", "clones", "memory", "MiB of one",
                "MiB of all", "us a clone");
    for (const Subject& subject : subjects) MeasureClones(*subject.cache, subject.name, options.clones);
    std::printf("\n");
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
  app.add_flag("--random-rows", options.random_rows, "Put the tokens there without attending them");
  app.add_option("--clones", options.clones, "Also measure so many clones of each cache");
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
