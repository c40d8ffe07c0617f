// How fast the products with weight matrices are, beside what the machine can read: every number that is bound by
// memory is shown with its share of a plain read of the same bytes, measured in between, because other programs come
// and go. Each path is compared with the scalar one before it is timed.
//
//   bench_linear [--types Q4_0,Q8_0] [--tokens 1,2,4,16,512] [--threads 2] [--repeat 9] [--layers 4] [--compute bf16]
//                [--cpu-time] [--onednn]
//
// The matrices are those of a 1-billion-parameter Llama (2048 wide, 8192 inside, 32 query and 8 KV heads of 64), a few
// layers of them, more than the last-level cache holds. GB/s, share and GFLOP/s come from the best times. --cpu-time
// takes processor time for the clock: with one thread what a machine without other programs would take, nearly.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <numeric>
#include <oneapi/dnnl/dnnl.hpp>
#include <span>
#include <string>
#include <vector>

#include "base/aligned.h"
#include "base/check.h"
#include "base/error.h"
#include "base/plain_read.h"
#include "base/rng.h"
#include "base/threads.h"
#include "kernels/basic/cpu.h"
#include "kernels/linear/linear.h"
#include "kernels/quants/random_row.h"
#include "kvcache/memory.h"

namespace lesskv {
namespace {

struct Options {
  std::vector<std::string> types = {"F16", "BF16", "Q8_0", "Q4_0", "Q4_K", "Q6_K"};
  std::vector<size_t> tokens = {1, 2, 4, 16, 512};
  int threads = 0;
  int repeat = 9;
  size_t layers = 4;
  ComputeType compute = ComputeType::kBF16;
  bool onednn = false;
};

bool g_cpu_time = false;

double Seconds() {
  if (g_cpu_time) return static_cast<double>(std::clock()) / CLOCKS_PER_SEC;
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

double Median(std::vector<double> values) {
  std::nth_element(values.begin(), values.begin() + static_cast<std::ptrdiff_t>(values.size() / 2), values.end());
  return values[values.size() / 2];
}

// --- Weights ---

struct Shape {
  size_t n_out, n_in;
};
constexpr Shape kLayer[] = {{2048, 2048}, {512, 2048},  {512, 2048}, {2048, 2048},
                            {8192, 2048}, {8192, 2048}, {2048, 8192}};

ByteCounter g_bytes;

struct Weights {
  CountedBuffer bytes;  // in large pages, as a model's may be
  std::vector<WeightView> matrices;
  size_t n_weights = 0;
};

// Random rows; a few are made and repeated, since the values do not matter to the clock.
Weights MakeWeights(DType type, size_t layers) {
  Weights w;
  size_t total = 0;
  for (const Shape& s : kLayer) total += s.n_out * RowBytes(type, s.n_in);
  w.bytes = CountedBuffer(g_bytes, total * layers);
  size_t offset = 0;
  Rng rng(1);
  constexpr size_t kDistinct = 16;
  for (size_t l = 0; l < layers; ++l) {
    for (const Shape& s : kLayer) {
      const size_t row_bytes = RowBytes(type, s.n_in);
      std::byte* data = w.bytes.data() + offset;
      for (size_t o = 0; o < kDistinct; ++o) RandomRow(type, s.n_in, rng, data + o * row_bytes);
      for (size_t o = kDistinct; o < s.n_out; ++o) {
        std::memcpy(data + o * row_bytes, data + (o % kDistinct) * row_bytes, row_bytes);
      }
      w.matrices.push_back({type, s.n_out, s.n_in, data});
      w.n_weights += s.n_out * s.n_in;
      offset += s.n_out * row_bytes;
    }
  }
  return w;
}

std::span<const std::byte> Bytes(const WeightView& m) {
  return {static_cast<const std::byte*>(m.data), m.n_out * RowBytes(m.type, m.n_in)};
}

// --- Checks ---

double NormalizedError(const std::vector<float>& expected, const std::vector<float>& found) {
  double error = 0, power = 0;
  for (size_t i = 0; i < expected.size(); ++i) {
    error += std::pow(static_cast<double>(expected[i]) - found[i], 2);
    power += std::pow(static_cast<double>(expected[i]), 2);
  }
  return error / power;
}

void Verify(const Weights& w, size_t n_tokens, std::span<const float> x, ComputeType compute, double bound) {
  WeightView view = w.matrices[0];
  view.n_out = 32;
  const Isa isa = ActiveIsa();
  const auto is_few = [&] { return n_tokens <= FewTokens(view.type, view.n_in, compute); };
  const bool few = is_few();
  std::vector<float> expected(n_tokens * view.n_out), found(expected.size());
  ForceIsa(Isa::kScalar);
  const bool tiles_round = few || compute != ComputeType::kBF16 || isa >= Isa::kAvx512Bf16;
  const bool no_spikes = few && compute != ComputeType::kF32 && isa >= Isa::kAvx2;
  if (is_few() != few || !tiles_round || no_spikes) bound = 2e-4;  // what is rounded differs
  Linear(view, x.data(), view.n_in, n_tokens, expected.data(), view.n_out, compute);
  ForceIsa(isa);
  Linear(view, x.data(), view.n_in, n_tokens, found.data(), view.n_out, compute);
  const double error = NormalizedError(expected, found);
  CHECK(error < bound, "wrong answer: normalised error {}", error);
}

// --- Timing ---

// Times of repeated passes over all matrices: the median pass, and the sum of each matrix's best time, which hardly
// depends on what else the machine does.
struct Times {
  std::vector<double> passes;
  std::vector<double> best;

  void Begin(size_t n_matrices) {
    best.resize(n_matrices, 1e9);
    passes.push_back(0);
  }
  void Add(size_t matrix, double seconds) {
    passes.back() += seconds;
    best[matrix] = std::min(best[matrix], seconds);
  }
  double Best() const { return std::accumulate(best.begin(), best.end(), 0.0); }
};

void BenchType(DType type, const Options& options) {
  const Weights w = MakeWeights(type, options.layers);
  for (size_t n_tokens : options.tokens) {
    AlignedVector<float> x(n_tokens * 8192), y(n_tokens * 8192);
    Rng rng(2);
    for (float& v : x) v = rng.Normal();
    Verify(w, n_tokens, x, options.compute, 1e-6);
    Times products, reads;
    for (int r = 0; r < options.repeat; ++r) {
      reads.Begin(w.matrices.size());
      for (size_t m = 0; m < w.matrices.size(); ++m) reads.Add(m, PlainReadSeconds(Bytes(w.matrices[m])));
      products.Begin(w.matrices.size());
      for (size_t m = 0; m < w.matrices.size(); ++m) {
        const WeightView& view = w.matrices[m];
        const double start = Seconds();
        Linear(view, x.data(), view.n_in, n_tokens, y.data(), view.n_out, options.compute);
        products.Add(m, Seconds() - start);
      }
    }
    const double gigabytes = static_cast<double>(w.bytes.size()) * 1e-9;
    const double gigaflop = 2.0 * static_cast<double>(w.n_weights * n_tokens) * 1e-9;
    const double best = products.Best(), median = Median(products.passes), read = reads.Best();
    std::printf("| %-6s | %6zu | %9.3f | %9.3f | %7.1f | %7.1f | %5.0f%% | %7.1f |\n", Traits(type).name.data(),
                n_tokens, median * 1e3, best * 1e3, gigabytes / best, gigabytes / read, 100 * read / best,
                gigaflop / best);
    std::fflush(stdout);
  }
}

// oneDNN's product of 512 rows in bfloat16 with weights already in its own layout: what a library that ignores packing
// and unpacking reaches.
void BenchOneDnn(const Options& options) {
  using dnnl::memory;
  dnnl::engine engine(dnnl::engine::kind::cpu, 0);
  dnnl::stream stream(engine);
  for (const Shape& s : {Shape{2048, 2048}, Shape{8192, 2048}, Shape{2048, 8192}}) {
    const auto m = memory::dim{512}, k = static_cast<memory::dim>(s.n_in), n = static_cast<memory::dim>(s.n_out);
    const memory::desc x({m, k}, memory::data_type::bf16, memory::format_tag::ab);
    const memory::desc w({k, n}, memory::data_type::bf16, memory::format_tag::any);
    const memory::desc y({m, n}, memory::data_type::f32, memory::format_tag::ab);
    const dnnl::matmul::primitive_desc description(dnnl::matmul::desc(x, w, y), engine);
    dnnl::matmul product(description);
    memory mx(x, engine), mw(description.weights_desc(), engine), my(y, engine);
    std::memset(mx.get_data_handle(), 0, x.get_size());
    std::memset(mw.get_data_handle(), 0, description.weights_desc().get_size());
    std::vector<double> seconds;
    for (int r = 0; r < options.repeat + 1; ++r) {
      const double start = Seconds();
      product.execute(stream, {{DNNL_ARG_SRC, mx}, {DNNL_ARG_WEIGHTS, mw}, {DNNL_ARG_DST, my}});
      stream.wait();
      seconds.push_back(Seconds() - start);
    }
    const double flops = 2.0 * 512 * static_cast<double>(s.n_in * s.n_out);
    std::printf("oneDNN bf16 [512, %zu] x [%zu, %zu], packed weights: %.1f GFLOP/s (best %.1f)\n", s.n_in, s.n_in,
                s.n_out, flops / Median(seconds) * 1e-9,
                flops / *std::min_element(seconds.begin(), seconds.end()) * 1e-9);
  }
}

std::vector<std::string> Split(const std::string& list) {
  std::vector<std::string> items(1);
  for (char c : list) {
    if (c == ',') {
      items.emplace_back();
    } else {
      items.back() += c;
    }
  }
  return items;
}

DType TypeNamed(const std::string& name) {
  for (uint32_t t = 0; t < 64; ++t) {
    const DTypeTraits* traits = FindDType(t);
    if (traits != nullptr && traits->name == name && IsLinearType(static_cast<DType>(t))) return static_cast<DType>(t);
  }
  Fail(ErrorCode::kInvalidArgument, "--types: no weights of type \"{}\"", name);
}

ComputeType ComputeNamed(const std::string& name) {
  for (const ComputeType compute : {ComputeType::kF32, ComputeType::kBF16, ComputeType::kInt8}) {
    if (name == ComputeTypeName(compute)) return compute;
  }
  if (name == "auto") return AutoCompute();
  Fail(ErrorCode::kInvalidArgument, "--compute: expected auto, f32, bf16 or int8, found \"{}\"", name);
}

size_t ParseCount(const std::string& flag, const std::string& text) {
  char* end = nullptr;
  const unsigned long value = std::strtoul(text.c_str(), &end, 10);
  if (end == text.c_str() || *end != '\0' || value == 0 || value > 4096) {
    Fail(ErrorCode::kInvalidArgument, "{}: a number from 1 to 4096 expected, found \"{}\"", flag, text);
  }
  return value;
}

Options Parse(int argc, char** argv) {
  Options options;
  for (int i = 1; i < argc; ++i) {
    const std::string flag = argv[i];
    if (flag == "--cpu-time") {
      g_cpu_time = true;
    } else if (flag == "--onednn") {
      options.onednn = true;
    } else if (i + 1 == argc) {
      Fail(ErrorCode::kInvalidArgument, "unknown option {} or its value is missing", flag);
    } else if (flag == "--types") {
      options.types = Split(argv[++i]);
    } else if (flag == "--compute") {
      options.compute = ComputeNamed(argv[++i]);
    } else if (flag == "--tokens") {
      options.tokens.clear();
      for (const std::string& item : Split(argv[++i])) options.tokens.push_back(ParseCount(flag, item));
    } else if (flag == "--threads") {
      options.threads = static_cast<int>(ParseCount(flag, argv[++i]));
    } else if (flag == "--repeat") {
      options.repeat = static_cast<int>(ParseCount(flag, argv[++i]));
    } else if (flag == "--layers") {
      options.layers = ParseCount(flag, argv[++i]);
    } else {
      Fail(ErrorCode::kInvalidArgument, "unknown option {}", flag);
    }
  }
  return options;
}

int Main(int argc, char** argv) {
  const Options options = Parse(argc, argv);
  const ThreadPool pool(options.threads);
  const ThreadScope scope(pool);
  std::printf("isa %s, %d threads, compute %s, %zu layers, median of %d\n", IsaName().c_str(), Threads(),
              std::string(ComputeTypeName(options.compute)).c_str(), options.layers, options.repeat);
  if (options.onednn) BenchOneDnn(options);
  std::printf("| type   | tokens | median ms | best ms   | GB/s    | read    | share  | GFLOP/s |\n");
  std::printf("|--------|--------|-----------|-----------|---------|---------|--------|---------|\n");
  for (const std::string& name : options.types) BenchType(TypeNamed(name), options);
  return 0;
}

}  // namespace
}  // namespace lesskv

int main(int argc, char** argv) {
  try {
    return lesskv::Main(argc, argv);
  } catch (const lesskv::Error& error) {
    std::fprintf(stderr, "bench_linear: %s\n", error.what());
    return error.ExitStatus();
  }
}
