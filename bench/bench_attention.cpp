// How fast attention is: decode in GB/s of rows (each byte of keys and values counted once, whatever the group) beside
// a plain read of as many bytes measured in between, because other programs come and go; prefill in GFLOP/s beside a
// loop of nothing but multiply-adds. Every path is compared with the scalar one before it is timed.
//
//   bench_attention [--types f32,f16,bf16,q8,q4] [--rows 2048,8192,16384,32768] [--prefill 512,4096] [--threads N]
//                   [--repeat 7] [--megabytes 160] [--shapes gqa,mha] [--queries 1] [--block 256] [--no-decode]
//                   [--no-prefill]
//
// gqa is a layer of a 1-billion-parameter Llama (8 KV heads of 64, group 4), mha of a 4096-wide model (32 KV heads of
// 128, group 1). Heads lie in regions of --block rows, as a growing cache keeps them (0: in one). Layers are repeated
// until they no longer fit a last-level cache. Times are the best of the repeats, a layer; the share is that of the
// plain read's best.
#ifdef __x86_64__
#include <immintrin.h>
#endif

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <string>
#include <vector>

#include "base/check.h"
#include "base/error.h"
#include "base/plain_read.h"
#include "base/rng.h"
#include "base/threads.h"
#include "kernels/attention/attention.h"
#include "kernels/basic/cpu.h"
#include "kvcache/memory.h"

namespace lesskv {
namespace {

struct Options {
  std::vector<std::string> types = {"f32", "f16", "bf16", "q8", "q4"};
  std::vector<std::string> shapes = {"gqa", "mha"};
  std::vector<size_t> rows = {2048, 8192, 16384, 32768};
  std::vector<size_t> prefill = {512, 4096};
  int threads = 0;
  int repeat = 7;
  size_t megabytes = 160;
  size_t block = 256;
  size_t queries = 1;
  bool decode = true, fill = true;
};

struct Shape {
  std::string name;
  size_t n_kv_heads, group, dim;
};

double Seconds() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

RowType ParseType(const std::string& name) {
  for (RowType type : {RowType::kF32, RowType::kF16, RowType::kBF16, RowType::kQ8, RowType::kQ4}) {
    if (Name(type) == name) return type;
  }
  Fail(ErrorCode::kInvalidArgument, "--types: f32, f16, bf16, q8 or q4 expected, found {}", name);
}

// ---- Layers of random rows

struct Head {
  std::vector<RowSpan> keys, values;
};

// Each head in regions of `block` rows, keys then values, like the cache's growing heads; 0: in one region.
class Layer {
 public:
  Layer(RowType type, const Shape& shape, size_t n_rows, size_t block)
      : keys_{type, RowSide::kKeys, shape.dim}, values_{type, RowSide::kValues, shape.dim}, heads_(shape.n_kv_heads) {
    const size_t rows = block > 0 ? block : n_rows;
    const size_t capacity = (rows + kTileRows - 1) / kTileRows * kTileRows;
    const size_t key_bytes = RegionBytes(keys_, capacity), region_bytes = key_bytes + RegionBytes(values_, capacity);
    const size_t n_regions = (n_rows + rows - 1) / rows;
    data_ = CountedBuffer(counter_, region_bytes * n_regions * heads_.size());
    const std::byte* region = data_.data();
    for (Head& head : heads_) {
      for (size_t r = 0; r < n_rows; r += rows, region += region_bytes) {
        const size_t n = std::min(rows, n_rows - r);
        head.keys.push_back({.format = keys_, .rows = region, .n_rows = n});
        head.values.push_back({.format = values_, .rows = region + key_bytes, .n_rows = n});
      }
    }
  }

  void FillRandom(uint64_t seed) {
    constexpr size_t kDistinct = 64;
    Rng rng(seed);
    std::vector<float> x(kDistinct * keys_.head_dim);
    for (float& v : x) v = rng.Normal();
    ParallelFor(heads_.size(), [&](size_t h) {
      for (const std::vector<RowSpan>* side : {&heads_[h].keys, &heads_[h].values}) {
        for (const RowSpan& span : *side) {
          for (size_t r = 0; r < span.n_rows; r += kDistinct)
            WriteRows(span.format, const_cast<std::byte*>(span.rows), r, std::min(kDistinct, span.n_rows - r), x.data(),
                      keys_.head_dim);
        }
      }
    });
  }
  void CopyFrom(const Layer& other) { std::memcpy(data_.data(), other.data_.data(), data_.size()); }

  std::span<const std::byte> bytes() const { return {data_.data(), data_.size()}; }
  const Head& head(size_t h) const { return heads_[h]; }

 private:
  RowFormat keys_, values_;
  std::vector<Head> heads_;
  ByteCounter counter_;
  CountedBuffer data_;  // in large pages, as a cache's are
};

struct Step {
  Step(const Shape& s, size_t queries) : shape(s), n_queries(queries) {
    Rng rng(5);
    q.resize(n_queries * width());
    for (float& v : q) v = rng.Normal();
    out.resize(q.size());
    lse.resize(n_queries * shape.n_kv_heads * shape.group);
  }
  size_t width() const { return shape.n_kv_heads * shape.group * shape.dim; }

  std::vector<AttentionJob> Jobs(const Layer& layer, size_t n_past, ComputeType compute) {
    std::vector<AttentionJob> jobs(shape.n_kv_heads);
    for (size_t h = 0; h < jobs.size(); ++h) {
      AttentionJob& job = jobs[h];
      job.keys = layer.head(h).keys;
      job.values = layer.head(h).values;
      job.n_past = n_past;
      job.n_queries = n_queries;
      job.q = q.data() + h * shape.group * shape.dim;
      job.out = out.data() + h * shape.group * shape.dim;
      job.q_stride = job.out_stride = width();
      job.lse = lse.data() + h * n_queries * shape.group;
      job.group = shape.group;
      job.scale = 1 / std::sqrt(static_cast<float>(shape.dim));
      job.compute = compute;
    }
    return jobs;
  }

  Shape shape;
  size_t n_queries;
  std::vector<float> q, out, lse;
};

// Compares the active instruction set with the scalar one.
double Verify(Step& step, const std::vector<AttentionJob>& jobs, double bound) {
  Attend(jobs);
  const std::vector<float> found = step.out;
  const Isa isa = ActiveIsa();
  ForceIsa(Isa::kScalar);
  Attend(jobs);
  ForceIsa(isa);
  double error = 0, power = 0;
  for (size_t i = 0; i < found.size(); ++i) {
    error += std::pow(static_cast<double>(found[i]) - step.out[i], 2);
    power += std::pow(static_cast<double>(step.out[i]), 2);
  }
  CHECK(error <= bound * power, "wrong answer: normalised error {}, at most {} expected", error / power, bound);
  return error / power;
}

// ---- What the machine can do

#ifdef __x86_64__
__attribute__((target("avx512f"))) float MultiplyAdds(size_t n) {
  __m512 sum[16];
  for (__m512& s : sum) s = _mm512_set1_ps(1.0f);
  const __m512 a = _mm512_set1_ps(0.999f), b = _mm512_set1_ps(0.001f);
  for (size_t i = 0; i < n; ++i) {
    for (__m512& s : sum) s = _mm512_fmadd_ps(s, a, b);
  }
  for (size_t i = 1; i < 16; ++i) sum[0] = _mm512_add_ps(sum[0], sum[i]);
  float lanes[16];
  _mm512_storeu_ps(lanes, sum[0]);
  return lanes[0];
}
#endif

// GFLOP/s of all threads doing nothing but 16-lane multiply-adds; 0 where that is not known.
double PeakGflops() {
#ifdef __x86_64__
  if (BestIsa() < Isa::kAvx512) return 0;
  constexpr size_t kRounds = 100000;
  const size_t n_tasks = static_cast<size_t>(Threads());
  std::vector<float> results(n_tasks * 16);
  const double start = Seconds();
  ParallelFor(n_tasks, [&](size_t t) { results[t * 16] = MultiplyAdds(kRounds); });
  const double seconds = Seconds() - start;
  CHECK(results[0] != 42, "keeps the multiply-adds from being optimised away");
  return static_cast<double>(n_tasks * kRounds) * 16 * 16 * 2 / seconds * 1e-9;
#else
  return 0;
#endif
}

// ---- Tables

double Bound(RowType type) {
  return type == RowType::kF32 || type == RowType::kF16 || type == RowType::kBF16 ? 1e-9 : 1e-6;
}

double Sum(const std::vector<double>& x) {
  double sum = 0;
  for (double v : x) sum += v;
  return sum;
}

void BenchDecode(const Options& options, const Shape& shape) {
  std::printf("\nDecode, %s: %zu KV heads of %zu, group %zu, queries %zu\n\n", shape.name.c_str(), shape.n_kv_heads,
              shape.dim, shape.group, options.queries);
  std::printf(
      "| rows | type | us a layer | GB/s | plain read GB/s | share | time against f16 "
      "|\n|---|---|---|---|---|---|---|\n");
  for (size_t n_rows : options.rows) {
    double f16_time = 0;
    std::vector<std::string> types = options.types;
    for (const std::string& name : types) {
      const RowType type = ParseType(name);
      Step step(shape, options.queries);
      std::vector<std::unique_ptr<Layer>> layers;
      size_t bytes = 0;
      while (bytes < options.megabytes << 20 || layers.size() < 2) {
        layers.push_back(std::make_unique<Layer>(type, shape, n_rows, options.block));
        if (layers.size() == 1)
          layers[0]->FillRandom(n_rows);
        else
          layers.back()->CopyFrom(*layers[0]);
        bytes += layers.back()->bytes().size();
      }
      Verify(step, step.Jobs(*layers[0], n_rows - options.queries, ComputeType::kF32), Bound(type));
      std::vector<double> ours(layers.size(), 1e9), plain(layers.size(), 1e9);
      for (int r = 0; r < options.repeat; ++r) {
        for (size_t l = 0; l < layers.size(); ++l) {
          const std::vector<AttentionJob> jobs = step.Jobs(*layers[l], n_rows - options.queries, ComputeType::kF32);
          const double start = Seconds();
          Attend(jobs);
          ours[l] = std::min(ours[l], Seconds() - start);
        }
        for (size_t l = 0; l < layers.size(); ++l) {
          plain[l] = std::min(plain[l], PlainReadSeconds(layers[l]->bytes()));
        }
      }
      const double ours_layer = Sum(ours) / static_cast<double>(layers.size());
      const double gb = static_cast<double>(bytes) * 1e-9;
      if (type == RowType::kF16) f16_time = ours_layer;
      std::printf("| %zu | %s | %.0f | %.1f | %.1f | %.0f %% | %.2f |\n", n_rows, name.c_str(), ours_layer * 1e6,
                  gb / Sum(ours), gb / Sum(plain), 100 * Sum(plain) / Sum(ours), f16_time / ours_layer);
      std::fflush(stdout);
    }
  }
}

void BenchPrefill(const Options& options, const Shape& shape) {
  std::printf(
      "\nPrefill, %s\n\n| past | queries | type | compute | ms a layer | GFLOP/s | share of peak | column sums ms |\n"
      "|---|---|---|---|---|---|---|---|\n",
      shape.name.c_str());
  for (size_t past : {size_t{0}, size_t{4096}}) {
    for (size_t n_queries : options.prefill) {
      for (const std::string& name : options.types) {
        for (ComputeType compute : {ComputeType::kF32, ComputeType::kBF16}) {
          const RowType type = ParseType(name);
          Layer layer(type, shape, past + n_queries, options.block);
          layer.FillRandom(1);
          {
            Step small(shape, 33);
            Layer few(type, shape, 333, options.block);
            few.FillRandom(1);
            Verify(small, small.Jobs(few, 300, compute), compute == ComputeType::kBF16 ? 3e-5 : Bound(type));
          }
          Step step(shape, n_queries);
          const std::vector<AttentionJob> jobs = step.Jobs(layer, past, compute);
          std::vector<float> sums(shape.n_kv_heads * shape.group * (past + n_queries));
          std::vector<ColumnSumJob> column_jobs;
          for (size_t h = 0; h < jobs.size(); ++h) {
            column_jobs.push_back({jobs[h], jobs[h].lse, 0, nullptr, &sums[h * shape.group * (past + n_queries)]});
          }
          double best = 1e9, best_sums = 1e9, peak = 0;
          for (int r = 0; r < options.repeat; ++r) {
            double start = Seconds();
            Attend(jobs);
            best = std::min(best, Seconds() - start);
            start = Seconds();
            ColumnSums(column_jobs);
            best_sums = std::min(best_sums, Seconds() - start);
            peak = std::max(peak, PeakGflops());
          }
          const double pairs =
              static_cast<double>(n_queries) * (static_cast<double>(past) + (static_cast<double>(n_queries) + 1) / 2);
          const double gflops =
              pairs * static_cast<double>(4 * shape.dim * shape.group * shape.n_kv_heads) / best * 1e-9;
          std::printf("| %zu | %zu | %s | %s | %.2f | %.0f | %.0f %% | %.2f |\n", past, n_queries, name.c_str(),
                      std::string(ComputeTypeName(compute)).c_str(), best * 1e3, gflops,
                      peak > 0 ? 100 * gflops / peak : 0, best_sums * 1e3);
          std::fflush(stdout);
        }
      }
    }
  }
}

// ---- Command line

std::vector<std::string> Split(const std::string& text) {
  std::vector<std::string> parts;
  for (size_t begin = 0; begin <= text.size();) {
    const size_t end = std::min(text.find(',', begin), text.size());
    parts.push_back(text.substr(begin, end - begin));
    begin = end + 1;
  }
  return parts;
}

size_t Number(const std::string& name, const std::string& text) {
  char* end = nullptr;
  const unsigned long long value = std::strtoull(text.c_str(), &end, 10);
  if (text.empty() || *end != '\0' || value == 0) {
    Fail(ErrorCode::kInvalidArgument, "{}: a positive whole number expected, found {}", name, text);
  }
  return value;
}

std::vector<size_t> Numbers(const std::string& name, const std::string& text) {
  std::vector<size_t> numbers;
  for (const std::string& part : Split(text)) numbers.push_back(Number(name, part));
  return numbers;
}

Options Parse(int argc, char** argv) {
  Options options;
  for (int i = 1; i < argc; ++i) {
    const std::string name = argv[i];
    if (name == "--no-decode") {
      options.decode = false;
      continue;
    }
    if (name == "--no-prefill") {
      options.fill = false;
      continue;
    }
    if (i + 1 == argc) Fail(ErrorCode::kInvalidArgument, "{}: a value expected, found the end", name);
    const std::string value = argv[++i];
    if (name == "--types")
      options.types = Split(value);
    else if (name == "--shapes")
      options.shapes = Split(value);
    else if (name == "--rows")
      options.rows = Numbers(name, value);
    else if (name == "--prefill")
      options.prefill = Numbers(name, value);
    else if (name == "--threads")
      options.threads = static_cast<int>(Number(name, value));
    else if (name == "--repeat")
      options.repeat = static_cast<int>(Number(name, value));
    else if (name == "--queries")
      options.queries = Number(name, value);
    else if (name == "--block")
      options.block = value == "0" ? 0 : Number(name, value);
    else if (name == "--megabytes")
      options.megabytes = Number(name, value);
    else
      Fail(ErrorCode::kInvalidArgument, "unknown option {}", name);
  }
  return options;
}

Shape FindShape(const std::string& name) {
  if (name == "gqa") return {"gqa", 8, 4, 64};
  if (name == "mha") return {"mha", 32, 1, 128};
  Fail(ErrorCode::kInvalidArgument, "--shapes: gqa or mha expected, found {}", name);
}

void Main(int argc, char** argv) {
  const Options options = Parse(argc, argv);
  SetThreads(options.threads);
  std::printf("isa %s, %d threads, best of %d, peak %.0f GFLOP/s\n", IsaName().c_str(), Threads(), options.repeat,
              PeakGflops());
  for (const std::string& name : options.shapes) {
    const Shape shape = FindShape(name);
    if (options.decode) BenchDecode(options, shape);
    if (options.fill) BenchPrefill(options, shape);
  }
}

}  // namespace
}  // namespace lesskv

int main(int argc, char** argv) {
  try {
    lesskv::Main(argc, argv);
    return 0;
  } catch (const lesskv::Error& error) {
    std::fprintf(stderr, "bench_attention: %s\n", error.what());
    return error.ExitStatus();
  }
}
