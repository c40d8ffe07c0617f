// A regression guard for the hot kernels, run by `make bench-check`: each is timed in turns with its scalar reference
// in the same run, and the ratio of the best times must stay above a bound. Ratios hold on a busy machine where times do
// not. Bounds are about half of what was seen with AVX-512 and apply where the processor has AVX-512; elsewhere every
// kernel must at least not be slower than its reference. Decode steps of whole caches are timed beside a window's of as
// many rows: what score bookkeeping and the LESS state may cost. Products of one
// token with weights that no cache holds are timed beside a plain read of the same bytes, and 8-bit products of many
// tokens beside float32 ones. Exit status 1 when a bound is broken.
#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "base/aligned.h"
#include "base/plain_read.h"
#include "base/rng.h"
#include "base/threads.h"
#include "cache_feeder.h"
#include "kernels/attention/attention.h"
#include "kernels/basic/basic.h"
#include "kernels/basic/cpu.h"
#include "kernels/linear/linear.h"
#include "kernels/quants/quants.h"
#include "kvcache/memory.h"

namespace lesskv {
namespace {

constexpr int kRounds = 7;

double Seconds() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

struct Guard {
  bool broken = false;

  // Times the work with the active kernels and with the scalar ones, in turns.
  void Check(const std::string& name, double bound, const std::function<void()>& work) {
    const Isa active = ActiveIsa();
    double ours = 1e9, reference = 1e9;
    for (int i = 0; i < kRounds; ++i) {
      for (const bool scalar : {false, true}) {
        ForceIsa(scalar ? Isa::kScalar : active);
        double& best = scalar ? reference : ours;
        const double start = Seconds();
        work();
        best = std::min(best, Seconds() - start);
      }
    }
    ForceIsa(active);
    const double ratio = reference / ours, wanted = active >= Isa::kAvx512 ? bound : 1.0;
    const bool ok = active == Isa::kScalar || ratio >= wanted;
    broken |= !ok;
    std::printf("%-34s %8.1f times the scalar kernel, at least %4.1f expected  %s\n", name.c_str(), ratio, wanted,
                ok ? "ok" : "BROKEN");
    std::fflush(stdout);
  }
};

std::vector<float> Normals(size_t n, uint64_t seed) {
  Rng rng(seed);
  std::vector<float> x(n);
  for (float& v : x) v = rng.Normal();
  return x;
}

// Rows of n_in weights, all alike.
void FillRows(DType type, size_t n_out, size_t n_in, std::byte* rows) {
  const std::vector<float> row = Normals(n_in, 1);
  for (size_t o = 0; o < n_out; ++o) QuantizeRow(type, row.data(), n_in, rows + o * RowBytes(type, n_in));
}

struct Weights {
  std::vector<std::byte> bytes;
  WeightView view;

  Weights(DType type, size_t n_out, size_t n_in)
      : bytes(n_out * RowBytes(type, n_in)), view{type, n_out, n_in, bytes.data()} {
    FillRows(type, n_out, n_in, bytes.data());
  }
};

void CheckProducts(Guard& guard, DType type, size_t n_tokens, double bound) {
  constexpr size_t kOut = 512, kIn = 1024;
  const Weights weights(type, kOut, kIn);
  const std::vector<float> x = Normals(n_tokens * kIn, 2);
  std::vector<float> y(n_tokens * kOut);
  guard.Check(fmt::format("product {}, {} tokens", Traits(type).name, n_tokens), bound,
              [&] { Linear(weights.view, x.data(), kIn, n_tokens, y.data(), kOut, AutoCompute()); });
}

// Many tokens in 8-bit products beside float32 ones, with the active kernels.
void CheckInt8(Guard& guard, DType type, size_t n_tokens, double bound) {
  constexpr size_t kOut = 512, kIn = 1024;
  const Weights weights(type, kOut, kIn);
  const std::vector<float> x = Normals(n_tokens * kIn, 2);
  std::vector<float> y(n_tokens * kOut);
  double best[2] = {1e9, 1e9};
  for (int i = 0; i < 3 * kRounds; ++i) {
    for (const ComputeType compute : {ComputeType::kF32, ComputeType::kInt8}) {
      const double start = Seconds();
      Linear(weights.view, x.data(), kIn, n_tokens, y.data(), kOut, compute);
      double& least = best[compute == ComputeType::kInt8];
      least = std::min(least, Seconds() - start);
    }
  }
  const double ratio = best[0] / best[1];
  const bool ok = ratio >= bound || ActiveIsa() == Isa::kScalar;
  guard.broken |= !ok;
  std::printf("%-34s %8.2f times the float32 product, at least %4.2f expected  %s\n",
              fmt::format("int8 product {}, {} tokens", Traits(type).name, n_tokens).c_str(), ratio, bound,
              ok ? "ok" : "BROKEN");
}

// Eight tokens beside 64, which are worth unpacking every row for.
void CheckFew(Guard& guard, DType type, size_t n_out, double most) {
  constexpr size_t kIn = 2048, kFew = 8, kMany = 64;
  const Weights weights(type, n_out, kIn);
  AlignedVector<float> x(kMany * kIn), y(kMany * n_out);
  std::ranges::copy(Normals(x.size(), 2), x.begin());
  double few = 1e9, many = 1e9;
  for (int i = 0; i < 3 * kRounds; ++i) {
    for (const size_t n_tokens : {kFew, kMany}) {
      const double start = Seconds();
      Linear(weights.view, x.data(), kIn, n_tokens, y.data(), n_out, AutoCompute());
      double& least = n_tokens == kFew ? few : many;
      least = std::min(least, Seconds() - start);
    }
  }
  const bool ok = few / many <= most || ActiveIsa() == Isa::kScalar;
  guard.broken |= !ok;
  std::printf("%-34s %8.2f of what %zu take, at most %4.2f expected  %s\n",
              fmt::format("product {}, {} tokens", Traits(type).name, kFew).c_str(), few / many, kMany, most,
              ok ? "ok" : "BROKEN");
}

// One token's product with rows that end within a step of the kernels, beside rows a third longer that do not.
void CheckRowEnds(Guard& guard, DType type) {
  constexpr size_t kOut = 1536, kShort = 576, kLong = 768;
  const Weights weights[2] = {{type, kOut, kShort}, {type, kOut, kLong}};
  const std::vector<float> x = Normals(kLong, 2);
  std::vector<float> y(kOut);
  double best[2] = {1e9, 1e9};
  for (int i = 0; i < 10 * kRounds; ++i) {
    for (size_t which : {0, 1}) {
      const double start = Seconds();
      Linear(weights[which].view, x.data(), kLong, 1, y.data(), kOut, AutoCompute());
      best[which] = std::min(best[which], Seconds() - start);
    }
  }
  const bool ok = best[0] <= best[1] || ActiveIsa() == Isa::kScalar;
  guard.broken |= !ok;
  std::printf("%-34s %8.2f of what rows of %zu take, at most 1.00 expected  %s\n",
              fmt::format("product {}, rows of {}", Traits(type).name, kShort).c_str(), best[0] / best[1], kLong,
              ok ? "ok" : "BROKEN");
}

// One token's product with 128 MiB of weights, beside a plain read of the same bytes.
void CheckStreaming(Guard& guard, DType type, double least_share) {
  constexpr size_t kIn = 2048;
  const size_t row_bytes = RowBytes(type, kIn), n_out = (size_t{128} << 20) / row_bytes;
  const std::vector<float> x = Normals(kIn, 2);
  ByteCounter counter;
  CountedBuffer weights(counter, n_out * row_bytes);  // in large pages
  FillRows(type, n_out, kIn, weights.data());
  std::vector<float> y(n_out);
  double ours = 1e9, plain = 1e9;
  for (int i = 0; i < kRounds; ++i) {
    plain = std::min(plain, PlainReadSeconds({weights.data(), weights.size()}));
    const double start = Seconds();
    Linear({type, n_out, kIn, weights.data()}, x.data(), kIn, 1, y.data(), n_out, AutoCompute());
    ours = std::min(ours, Seconds() - start);
  }
  const double share = plain / ours;
  const bool ok = share >= least_share || ActiveIsa() < Isa::kAvx512;
  guard.broken |= !ok;
  std::printf("%-34s %8.2f of a plain read's speed, at least %4.2f expected  %s\n",
              fmt::format("streaming {}", Traits(type).name).c_str(), share, least_share, ok ? "ok" : "BROKEN");
}

void CheckAttention(Guard& guard, RowType type, size_t n_queries, double bound, double sums_bound) {
  constexpr size_t kRows = 2048, kDim = 64, kGroup = 4;
  const RowFormat keys{type, RowSide::kKeys, kDim}, values{type, RowSide::kValues, kDim};
  const size_t bytes = RegionBytes(keys, kRows) + RegionBytes(values, kRows);
  std::vector<std::byte> memory(bytes + kRegionAlign);
  void* aligned = memory.data();
  size_t space = memory.size();
  std::byte* const region = static_cast<std::byte*>(std::align(kRegionAlign, bytes, aligned, space));
  const std::vector<float> rows = Normals(kRows * kDim, 3), q = Normals(n_queries * kGroup * kDim, 4);
  WriteRows(keys, region, 0, kRows, rows.data(), kDim);
  WriteRows(values, region + RegionBytes(keys, kRows), 0, kRows, rows.data(), kDim);
  const RowSpan key_span{.format = keys, .rows = region, .n_rows = kRows};
  const RowSpan value_span{.format = values, .rows = region + RegionBytes(keys, kRows), .n_rows = kRows};
  std::vector<float> out(q.size()), lse(n_queries * kGroup), sums(kGroup * kRows);
  AttentionJob job;
  job.keys = {&key_span, 1};
  job.values = {&value_span, 1};
  job.n_past = kRows - n_queries;
  job.n_queries = n_queries;
  job.q = q.data();
  job.q_stride = job.out_stride = kGroup * kDim;
  job.group = kGroup;
  job.scale = 0.125f;
  job.compute = AutoCompute();
  job.out = out.data();
  job.lse = lse.data();
  guard.Check(fmt::format("attention {}, {} queries", Name(type), n_queries), bound, [&] { Attend({&job, 1}); });
  ColumnSumJob column;
  column.attention = job;
  column.lse = lse.data();
  column.sums = sums.data();
  guard.Check(fmt::format("column sums {}, {} queries", Name(type), n_queries), sums_bound,
              [&] { ColumnSums({&column, 1}); });
}

// What a decode step of a cache takes, beside a window of as many rows: 4,096 rows of 8 KV heads, as in bench_cache.
void CheckSteps(Guard& guard) {
  constexpr size_t kRows = 4096, kChunk = 256;
  const struct {
    const char* spec;
    double most, most_avx2;  // times the window's
  } bounds[] = {{"window(4096)", 1, 1},       {"h2o(4096)", 1.15, 1.40},  {"tova(4096)", 1.15, 1.40},
                {"h2o(4096)+less", 1.40, 1.75}, {"full+q8", 0.95, 1.20},    {"full+q4", 0.95, 1.20},
                {"full+kivi(2)", 0.80, 1.10}, {"full+kivi(4)", 0.95, 1.35}};
  const CacheShape shape = CacheShape::Uniform(2, 32, 8, 64, 2 * kRows, {.n_dims = 64}, AutoCompute());
  std::vector<std::string> specs;
  for (const auto& bound : bounds) specs.push_back(bound.spec);
  const auto caches = bench::MakeCaches(specs, shape, 8, 128);
  bench::Feeder feeder(shape, kChunk);
  for (const auto& cache : caches)
    while (cache->tokens_seen() < kRows + kChunk) feeder.Step(*cache, kChunk, StepKind::kStream);
  std::vector<double> best(caches.size(), 1e9);
  for (int i = 0; i < 5 * kRounds; ++i) {
    for (size_t c = 0; c < caches.size(); ++c) {
      feeder.Step(*caches[c], 1, StepKind::kDecode);  // warms what the others have driven out
      const double start = Seconds();
      feeder.Step(*caches[c], 1, StepKind::kDecode);
      best[c] = std::min(best[c], Seconds() - start);
    }
  }
  for (size_t c = 1; c < caches.size(); ++c) {
    const double ratio = best[c] / best[0];
    const double most = ActiveIsa() >= Isa::kAvx512 ? bounds[c].most : bounds[c].most_avx2;
    const bool ok = ratio <= most || ActiveIsa() < Isa::kAvx2;
    guard.broken |= !ok;
    std::printf("%-34s %8.2f times a window's step, at most  %4.2f expected  %s\n", bounds[c].spec, ratio, most,
                ok ? "ok" : "BROKEN");
  }
}

}  // namespace
}  // namespace lesskv

int main() {
  using namespace lesskv;  // NOLINT
  const ThreadPool pool(1);
  const ThreadScope scope(pool);
  Guard guard;
  const struct {
    DType type;
    double one, many;  // bounds for one token and for 64
  } products[] = {{DType::kF16, 10, 3.5}, {DType::kBF16, 6, 3.5}, {DType::kQ8_0, 9, 3.5},
                  {DType::kQ4_0, 15, 3.5}, {DType::kQ4_K, 10, 3.5}, {DType::kQ6_K, 40, 4}};
  for (const auto& product : products) {
    CheckProducts(guard, product.type, 1, product.one);
    CheckProducts(guard, product.type, 64, product.many);
  }
  CheckInt8(guard, DType::kQ8_0, 64, 1.0);  // signed codes cost AVX2 most of what they bring
  for (const DType type : {DType::kQ4_1, DType::kQ4_K, DType::kQ6_K}) CheckInt8(guard, type, 64, 1.2);
  for (const DType type : {DType::kQ4_0, DType::kQ4_K, DType::kQ6_K}) CheckInt8(guard, type, 8, 1.5);
  for (const DType type : {DType::kQ4_0, DType::kQ4_K, DType::kQ6_K}) CheckInt8(guard, type, 1, 1.0);
  for (const DType type : {DType::kQ4_0, DType::kQ4_1, DType::kQ8_0}) CheckRowEnds(guard, type);
  if (ActiveIsa() != Isa::kAmx) {  // the matrix unit takes more than four tokens in tiles
    CheckFew(guard, DType::kF16, 512, 0.3);
    for (const DType type : {DType::kQ4_K, DType::kQ6_K}) CheckFew(guard, type, 8192, 0.25);  // larger than caches
  }
  for (const DType type : {DType::kBF16, DType::kQ8_0, DType::kQ4_0, DType::kQ4_K}) CheckStreaming(guard, type, 0.6);
  const struct {
    RowType type;
    double one, one_sums;
  } rows[] = {{RowType::kF16, 10, 2.5}, {RowType::kQ8, 12, 4.5}, {RowType::kQ4, 15, 5}};
  for (const auto& row : rows) {
    CheckAttention(guard, row.type, 1, row.one, row.one_sums);
    CheckAttention(guard, row.type, 64, 5, 3);
  }
  CheckSteps(guard);
  return guard.broken ? 1 : 0;
}
