// What CSR must show, through the store and the whole cache: attention that is that of a plain implementation in double,
// codes that depend on nothing but their row, exact windows, online atoms, and bytes.
#include <gtest/gtest.h>

#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <functional>
#include <numeric>

#include "base/error.h"
#include "base/rng.h"
#include "base/threads.h"
#include "kernels/basic/cpu.h"
#include "kernels/quants/half.h"
#include "kvcache/codec/csr_store.h"
#include "kvcache/sequence_cache.h"

namespace lesskv {
namespace {

constexpr size_t kDim = 32, kHeads = 4, kKvHeads = 2, kAtoms = 80, kChunk = kDim / 2;

RopeConfig Rope() { return {.n_dims = kDim, .base = 100.0, .frequency_factors = {}}; }

LayerShape Shape(size_t n_heads = kHeads, size_t n_kv_heads = kKvHeads) {
  return {n_heads, n_kv_heads, kDim, UsualScale(kDim), std::make_shared<RopeTable>(Rope()), 0};
}

SidecarDictionaries Dictionaries(size_t n_layers = 1, size_t dim = kDim, size_t n_atoms = kAtoms) {
  SidecarDictionaries d;
  d.head_dim = dim;
  d.n_atoms = n_atoms;
  Rng rng(5);
  const auto fill = [&](size_t width, std::vector<uint16_t>& halves) {
    for (size_t i = 0; i < n_layers * n_atoms; ++i) {
      std::vector<float> atom(width);
      double square = 0;
      for (float& x : atom) x = rng.Normal(), square += double(x) * x;
      for (const float x : atom) halves.push_back(FloatToHalf(static_cast<float>(x / std::sqrt(square))));
    }
  };
  for (uint32_t l = 0; l < n_layers; ++l) d.key_of.push_back(l), d.value_of.push_back(l);
  fill(dim, d.keys);
  fill(dim / 2, d.values);
  return d;
}

struct Rows {
  std::vector<float> q, k, v;
  explicit Rows(size_t n, size_t n_heads = kHeads, size_t n_kv_heads = kKvHeads) {
    Rng rng(7);
    for (auto* x : {&q, &k, &v}) x->resize(n * (x == &q ? n_heads : n_kv_heads) * kDim);
    for (auto* x : {&q, &k, &v})
      for (float& f : *x) f = rng.Normal();
  }
};

// A store of one layer that nothing leaves.
struct Subject {
  ByteCounter counter;
  LayerShape shape;
  std::unique_ptr<CsrStore> store;
  size_t seen = 0;

  explicit Subject(const CsrOptions& options, const LayerShape& s = Shape(), size_t n_atoms = kAtoms) : shape(s) {
    store = std::make_unique<CsrStore>(counter, StoreShape{{shape}, ComputeType::kF32, true, true}, options,
                                       std::make_shared<CsrDictionaries>(Dictionaries(1, s.head_dim), n_atoms));
  }

  // One step, whose queries nobody asks.
  void Step(const Rows& rows, size_t n) {
    const size_t kv = shape.kv_dim();
    store->Reserve({.n_step = n, .is_prompt = true, .budgets = {}});
    store->Append(0, 0, n, &rows.k[seen * kv], &rows.v[seen * kv]);
    for (size_t h = 0; h < shape.n_kv_heads; ++h) store->Close(0, h, {});
    store->EndStep();
    seen += n;
  }
  std::vector<std::byte> Saved() const {
    ByteWriter out;
    store->Save(out);
    return out.bytes;
  }
  std::vector<float> Read(RowSide side, size_t h, size_t n) const {
    std::vector<uint32_t> rows(n);
    std::iota(rows.begin(), rows.end(), 0u);
    std::vector<float> keys(n * kDim), values(n * kDim);
    store->ReadRows(0, h, rows, keys.data(), values.data());
    return side == RowSide::kKeys ? keys : values;
  }
};

// |x - y| / |x| of each vector of `width` channels of head h.
std::vector<double> Errors(const std::vector<float>& read, const std::vector<float>& rows, size_t h, size_t width) {
  std::vector<double> errors;
  for (size_t i = 0; i < read.size(); i += width) {
    double error = 0, power = 0;
    for (size_t c = i; c < i + width; ++c) {
      const double x = rows[(c / kDim * kKvHeads + h) * kDim + c % kDim];
      error += std::pow(read[c] - x, 2), power += x * x;
    }
    errors.push_back(std::sqrt(error / power));
  }
  return errors;
}

TEST(Csr, CodesDoNotDependOnSteps) {
  const Rows rows(200);
  for (const size_t window : {0, 1, 9, 40}) {
    const CsrOptions options{
        .pairs = 4, .window = window, .coefficients = window == 9 ? CoefficientType::kE4m3 : CoefficientType::kF16};
    Subject one(options);
    for (size_t l = 1; l <= 130; ++l) {
      one.Step(rows, 1);
      ASSERT_EQ(one.store->coded_rows(0, 1), l - std::min(l, window));
      if (l != 1 && l != 9 && l != 10 && l != 41 && l != 130) continue;
      for (const size_t chunk : {l, size_t{7}, size_t{50}}) {
        Subject other(options);
        while (other.seen < l) other.Step(rows, std::min(chunk, l - other.seen));
        EXPECT_TRUE(other.Saved() == one.Saved()) << l << " tokens in steps of " << chunk << ", window of " << window;
      }
    }
    // The window's rows are as they came, to f16.
    const std::vector<float> keys = one.Read(RowSide::kKeys, 1, 130), values = one.Read(RowSide::kValues, 1, 130);
    for (size_t i = (130 - window) * kDim; i < 130 * kDim; ++i) {
      const size_t at = (i / kDim * kKvHeads + 1) * kDim + i % kDim;
      ASSERT_EQ(keys[i], HalfToFloat(FloatToHalf(rows.k[at])));
      ASSERT_EQ(values[i], HalfToFloat(FloatToHalf(rows.v[at])));
    }
  }
}

// Rows that move, and those of a head whose room changes, read as before.
TEST(Csr, CodesStayAsTheyAreWhereRowsMove) {
  const Rows rows(60);
  for (const CoefficientType type : {CoefficientType::kF16, CoefficientType::kE4m3}) {
    ByteCounter counter;
    CsrStore store(counter, StoreShape{{Shape()}, ComputeType::kF32, true, false}, {.pairs = 4, .coefficients = type},
                   std::make_shared<CsrDictionaries>(Dictionaries(), kAtoms));
    SlotMap map;  // of head 1
    const auto step = [&](size_t first, size_t n, size_t budget, const std::vector<Departure>& leaving) {
      const std::vector<size_t> budgets(kKvHeads, budget);
      store.Reserve({.n_step = n, .evicts = true, .is_prompt = true, .budgets = budgets});
      store.Append(0, 0, n, &rows.k[first * kKvHeads * kDim], &rows.v[first * kKvHeads * kDim]);
      for (size_t h = 0; h < kKvHeads; ++h) map = store.Close(0, h, leaving);
      store.EndStep();
    };
    const auto read = [&](uint32_t row) {
      std::vector<float> both(2 * kDim);
      store.ReadRows(0, 1, {&row, 1}, both.data(), both.data() + kDim);
      return both;
    };
    step(0, 40, 40, {});
    std::vector<std::vector<float>> want;
    for (uint32_t row = 0; row < 40; ++row) want.push_back(read(row));
    std::vector<Departure> leaving;
    for (uint32_t row = 1; row < 20; row += 2) leaving.push_back({row, Fate::kDrop});
    step(40, 1, 60, leaving);
    ASSERT_EQ(map.n_rows, 31u);
    want.push_back(read(map.moves[0].to));
    for (const RowMove& move : map.moves) want[move.to] = want[move.from];
    EXPECT_GE(map.moves.size(), 9u);
    for (uint32_t row = 0; row < 31; ++row) EXPECT_EQ(read(row), want[row]) << row;
  }
}

// A layer is coded with its own dictionaries: as alone, where those are the only ones.
TEST(Csr, LayersHaveTheirOwnDictionaries) {
  const SidecarDictionaries both = Dictionaries(2);
  const LayerShape shape = Shape();
  const Rows rows(40);
  const auto read = [&](const SidecarDictionaries& d, size_t n_layers, size_t layer) {
    ByteCounter counter;
    CsrStore store(counter, StoreShape{std::vector<LayerShape>(n_layers, shape), ComputeType::kF32, true, true}, {.pairs = 8},
                   std::make_shared<CsrDictionaries>(d, kAtoms));
    store.Reserve({.n_step = 40, .is_prompt = true, .budgets = {}});
    for (size_t l = 0; l < n_layers; ++l) {
      store.Append(l, 0, 40, rows.k.data(), rows.v.data());
      for (size_t h = 0; h < kKvHeads; ++h) store.Close(l, h, {});
    }
    store.EndStep();
    std::vector<uint32_t> all(40);
    std::iota(all.begin(), all.end(), 0u);
    std::pair<std::vector<float>, std::vector<float>> out{std::vector<float>(40 * kDim), std::vector<float>(40 * kDim)};
    store.ReadRows(layer, 1, all, out.first.data(), out.second.data());
    return out;
  };
  for (const size_t layer : {size_t{0}, size_t{1}}) {
    SidecarDictionaries one = both;
    one.key_of = one.value_of = {0};
    const auto part = [&](std::vector<uint16_t>& halves) {
      const auto half = static_cast<ptrdiff_t>(halves.size() / 2);
      halves = {halves.begin() + static_cast<ptrdiff_t>(layer) * half, halves.begin() + static_cast<ptrdiff_t>(layer + 1) * half};
    };
    part(one.keys);
    part(one.values);
    EXPECT_EQ(read(both, 2, layer), read(one, 1, 0)) << layer;
  }
}

TEST(Csr, MorePairsSayMore) {
  const Rows rows(60);
  double before = 1;
  for (const size_t pairs : {2, 4, 8, 16}) {
    Subject subject({.pairs = pairs});
    subject.Step(rows, 60);
    double mean = 0;
    for (const RowSide side : {RowSide::kKeys, RowSide::kValues})
      for (const double error : Errors(subject.Read(side, 0, 60), side == RowSide::kKeys ? rows.k : rows.v, 0, kDim))
        mean += error / 120;
    EXPECT_LT(mean, before - 0.05) << pairs;
    before = mean;
  }
  Subject few({.pairs = 8}, Shape(), 20), all({.pairs = 8});  // and so do more atoms
  few.Step(rows, 60), all.Step(rows, 60);
  const auto sum = [](const std::vector<double>& x) { return std::accumulate(x.begin(), x.end(), 0.0); };
  EXPECT_LT(sum(Errors(all.Read(RowSide::kKeys, 1, 60), rows.k, 1, kDim)), sum(Errors(few.Read(RowSide::kKeys, 1, 60), rows.k, 1, kDim)));
}

// The sample's own vectors are atoms: one pair says them.
TEST(Csr, SampledVectorsAreNearlyExact) {
  const Rows rows(90);
  Subject subject({.pairs = 2, .sample = 16});
  subject.Step(rows, 60);
  subject.Step(rows, 30);
  for (size_t h = 0; h < kKvHeads; ++h) {
    EXPECT_EQ(subject.store->own_atoms(0, h, RowSide::kKeys), 16u);
    EXPECT_EQ(subject.store->own_atoms(0, h, RowSide::kValues), 16u);
    const std::vector<double> keys = Errors(subject.Read(RowSide::kKeys, h, 90), rows.k, h, kDim);
    const std::vector<double> values = Errors(subject.Read(RowSide::kValues, h, 90), rows.v, h, kChunk);
    for (size_t i = 0; i < 90; ++i) {
      const bool sampled = i >= 44 && i < 60;
      EXPECT_EQ(keys[i] <= 2e-3, sampled) << i;
      EXPECT_EQ(subject.store->Indices(0, h, RowSide::kKeys, i)[0] >= kAtoms && keys[i] <= 2e-3, sampled) << i;
    }
    for (size_t i = 0; i < 180; ++i) EXPECT_EQ(values[i] <= 2e-3, i >= 104 && i < 120) << i;
  }
}

// The worst vectors of the first step get three quarters of the places, later ones above half their length the rest; what
// was coded before reads as it did.
TEST(Csr, GuardTakesWhatIsCodedBadly) {
  const Rows rows(100);
  Subject plain({.pairs = 2}), guarded({.pairs = 2, .guard = 12});
  plain.Step(rows, 60), guarded.Step(rows, 60);
  for (const RowSide side : {RowSide::kKeys, RowSide::kValues}) {
    const std::vector<float>& x = side == RowSide::kKeys ? rows.k : rows.v;
    const size_t width = side == RowSide::kKeys ? kDim : kChunk;
    std::vector<double> before = Errors(plain.Read(side, 0, 60), x, 0, width), after = Errors(guarded.Read(side, 0, 60), x, 0, width);
    EXPECT_EQ(guarded.store->own_atoms(0, 0, side), 9u);
    std::vector<size_t> order(before.size());
    std::iota(order.begin(), order.end(), 0u);
    std::sort(order.begin(), order.end(), [&](size_t a, size_t b) { return before[a] > before[b]; });
    for (size_t i = 0; i < order.size(); ++i) {
      if (i < 9)
        EXPECT_LE(after[order[i]], 2e-3) << i;
      else
        EXPECT_EQ(after[order[i]], before[order[i]]) << i;
    }
  }
  const std::vector<float> held = guarded.Read(RowSide::kKeys, 0, 60);
  for (size_t i = 0; i < 40; ++i) guarded.Step(rows, 1);
  EXPECT_EQ(guarded.store->own_atoms(0, 0, RowSide::kKeys), 12u);
  const std::vector<float> keys = guarded.Read(RowSide::kKeys, 0, 100);
  EXPECT_TRUE(std::equal(held.begin(), held.end(), keys.begin()));
  const std::vector<double> later = Errors(keys, rows.k, 0, kDim);
  EXPECT_EQ(std::count_if(later.begin() + 60, later.end(), [](double e) { return e <= 2e-3; }), 3);
}

// 8 bytes a pair of key and value and row, or 6, whatever is in it; the table of the paper for heads of 128.
TEST(Csr, BytesAreThoseOfThePairs) {
  for (const auto& [pairs, bytes, type] :
       {std::tuple<size_t, size_t, CoefficientType>{4, 16, CoefficientType::kF16}, {6, 24, CoefficientType::kF16}, {8, 32, CoefficientType::kF16},
        {16, 64, CoefficientType::kF16}, {4, 12, CoefficientType::kE4m3}, {8, 24, CoefficientType::kE4m3}, {2, 6, CoefficientType::kE4m3}}) {
    LayerShape shape = Shape(2, 1);
    shape.head_dim = 128;
    ByteCounter counter;
    CsrStore store(counter, {{shape}, ComputeType::kF32, true, true}, {.pairs = pairs, .coefficients = type},
                   std::make_shared<CsrDictionaries>(Dictionaries(1, 128), kAtoms));
    const std::vector<float> x(512 * 128, 0.25f);
    store.Reserve({.n_step = 512, .is_prompt = true, .budgets = {}});
    store.Append(0, 0, 512, x.data(), x.data());
    store.Close(0, 0, {});
    store.EndStep();
    EXPECT_EQ(counter.now, 512 * 2 * bytes);
  }
  Subject own({.pairs = 4, .window = 20, .sample = 8, .guard = 5});
  own.Step(Rows(1), 1);
  const size_t atoms = 13 * (kDim + kChunk) * 2, window = 32 * kDim * 2 * 2, codes = 0;
  EXPECT_EQ(own.counter.now, kKvHeads * (atoms + window + codes));
}

// ---- The whole cache

struct TempDictionaries {
  std::string path;
  explicit TempDictionaries(const SidecarDictionaries& d = Dictionaries(), const char* name = "dictionaries") {
    path = (std::filesystem::temp_directory_path() / fmt::format("lesskv-csr-{}-{}.less.gguf", name, getpid())).string();
    Sidecar sidecar;
    sidecar.dictionaries = d;
    WriteSidecar(path, sidecar);
  }
  ~TempDictionaries() { std::filesystem::remove(path); }
};

std::shared_ptr<const CacheConfig> Config(const std::string& spec, const TempDictionaries& file, size_t n_kv_heads = kKvHeads) {
  return CacheConfig::Create(CacheSpec::Parse(spec), CacheShape::Uniform(1, kHeads, n_kv_heads, kDim, 240, Rope()), {},
                             {file.path, 0});
}

std::vector<float> Feed(SequenceCache& cache, const Rows& rows, size_t n, StepKind kind, size_t n_kv_heads = kKvHeads) {
  const size_t seen = cache.tokens_seen();
  std::vector<float> out(n * kHeads * kDim);
  cache.BeginStep(n, kind);
  cache.Append(0, &rows.k[seen * n_kv_heads * kDim], &rows.v[seen * n_kv_heads * kDim]);
  cache.Attend(0, &rows.q[seen * kHeads * kDim], out.data());
  cache.EndStep();
  return out;
}

// All of it in double, from the paper's formulas: what the codes of some vector come to.
std::vector<double> Pursuit(std::vector<double> x, const uint16_t* atoms, size_t dim, size_t pairs, bool f8) {
  std::vector<double> sum(dim);
  for (size_t g = 0; g < pairs; ++g) {
    double best = 0;
    size_t pick = 0;
    for (size_t i = 0; i < kAtoms; ++i) {
      double dot = 0;
      for (size_t c = 0; c < dim; ++c) dot += x[c] * HalfToFloat(atoms[i * dim + c]);
      if (std::fabs(dot) > std::fabs(best)) best = dot, pick = i;
    }
    const auto product = static_cast<float>(best);
    const double c_rounded = HalfToFloat(f8 ? E4m3ToHalf(FloatToE4m3(product)) : FloatToHalf(product));
    for (size_t c = 0; c < dim; ++c) {
      const double part = c_rounded * HalfToFloat(atoms[pick * dim + c]);
      sum[c] += part, x[c] -= part;
    }
  }
  return sum;
}

void Rotate(std::vector<double>& x, size_t position) {
  for (size_t i = 0; i < kDim / 2; ++i) {
    const double angle = static_cast<double>(position) * std::pow(100.0, -2.0 * static_cast<double>(i) / kDim);
    const double a = x[2 * i], b = x[2 * i + 1];
    x[2 * i] = a * std::cos(angle) - b * std::sin(angle);
    x[2 * i + 1] = a * std::sin(angle) + b * std::cos(angle);
  }
}

// Outputs of the query at `token` over `held` positions, those before `exact_from` coded.
std::vector<double> Plain(const Rows& rows, const SidecarDictionaries& d, size_t pairs, size_t token, size_t kv_head,
                          const std::vector<Position>& held, size_t exact_from, bool f8) {
  std::vector<std::vector<double>> keys, values;
  for (const Position p : held) {
    const auto at = static_cast<size_t>(ToInt(p));
    const auto row = [&](const std::vector<float>& x) {
      std::vector<double> out;
      for (size_t c = 0; c < kDim; ++c) out.push_back(HalfToFloat(FloatToHalf(x[(at * kKvHeads + kv_head) * kDim + c])));
      return out;
    };
    std::vector<double> key = row(rows.k), value = row(rows.v);
    if (at < exact_from) {
      key = Pursuit(key, d.keys.data(), kDim, pairs, f8);
      std::vector<double> low(value.begin(), value.begin() + kChunk), high(value.begin() + kChunk, value.end());
      value = Pursuit(low, d.values.data(), kChunk, pairs / 2, f8);
      const std::vector<double> rest = Pursuit(high, d.values.data(), kChunk, pairs / 2, f8);
      value.insert(value.end(), rest.begin(), rest.end());
    }
    Rotate(key, at);
    keys.push_back(key), values.push_back(value);
  }
  std::vector<double> out;
  for (size_t g = 0; g < kHeads / kKvHeads; ++g) {
    const size_t head = kv_head * (kHeads / kKvHeads) + g;
    std::vector<double> q, p, sum(kDim);
    for (size_t c = 0; c < kDim; ++c) q.push_back(rows.q[(token * kHeads + head) * kDim + c]);
    Rotate(q, token);
    double total = 0;
    for (const auto& key : keys) {
      p.push_back(std::exp(std::inner_product(q.begin(), q.end(), key.begin(), 0.0) / std::sqrt(double(kDim))));
      total += p.back();
    }
    for (size_t r = 0; r < p.size(); ++r)
      for (size_t c = 0; c < kDim; ++c) sum[c] += p[r] / total * values[r][c];
    out.insert(out.end(), sum.begin(), sum.end());
  }
  return out;
}

// Decoding over rows that stay, leave and are coded as they fall out of the window.
TEST(Csr, AttentionIsThatOfAPlainImplementation) {
  const TempDictionaries file;
  const SidecarDictionaries d = Dictionaries();
  const Rows rows(160);
  for (const Isa isa : AvailableIsas()) {
    ForceIsa(isa);
    for (const auto& [spec, pairs, window] : {std::tuple<const char*, size_t, size_t>{"full+csr(6)", 6, 0},
                                              {"full+csr(4, window=11)", 4, 11},
                                              {"window(40, sinks=3)+csr(8)", 8, 0},
                                              {"h2o(30)+csr(4, window=6)", 4, 6},
                                              {"full+csr(6, coefficients=f8)", 6, 0},
                                              {"h2o(30)+csr(4, window=6, coefficients=f8)", 4, 6}}) {
      SequenceCache cache(Config(spec, file));
      Feed(cache, rows, 70, StepKind::kPrompt);
      for (size_t i = 0; i < 12; ++i) {
        const size_t token = cache.tokens_seen();
        std::vector<std::vector<Position>> held;
        for (size_t h = 0; h < kKvHeads; ++h) {
          held.push_back(cache.ResidentPositions(0, h));
          held.back().push_back(Position(static_cast<int32_t>(token)));
        }
        const std::vector<float> out = Feed(cache, rows, 1, StepKind::kDecode);
        for (size_t h = 0; h < kKvHeads; ++h) {
          const std::vector<double> want = Plain(rows, d, pairs, token, h, held[h], token - window, std::string(spec).find("f8") != std::string::npos);
          double error = 0, power = 0;
          for (size_t c = 0; c < want.size(); ++c)
            error += std::pow(out[h * want.size() + c] - want[c], 2), power += want[c] * want[c];
          ASSERT_LE(error / power, 1e-9) << spec << ", " << IsaName(isa) << ", token " << token << ", head " << h;
        }
      }
    }
  }
  ForceIsa(BestIsa());
}

TEST(Csr, GroupedEqualsRepeatedHeads) {
  const TempDictionaries file;
  const Rows grouped(100);
  Rows repeated(100, kHeads, kHeads);
  repeated.q = grouped.q;
  for (size_t t = 0; t < 100; ++t)
    for (size_t h = 0; h < kHeads; ++h)
      for (size_t c = 0; c < kDim; ++c) {
        repeated.k[(t * kHeads + h) * kDim + c] = grouped.k[(t * kKvHeads + h / 2) * kDim + c];
        repeated.v[(t * kHeads + h) * kDim + c] = grouped.v[(t * kKvHeads + h / 2) * kDim + c];
      }
  const std::string spec = "full+csr(4, window=5, sample=6, guard=4)";
  SequenceCache a(Config(spec, file)), b(Config(spec, file, kHeads));
  Feed(a, grouped, 60, StepKind::kPrompt), Feed(b, repeated, 60, StepKind::kPrompt, kHeads);
  for (size_t i = 0; i < 10; ++i) {
    const std::vector<float> x = Feed(a, grouped, 1, StepKind::kDecode), y = Feed(b, repeated, 1, StepKind::kDecode, kHeads);
    for (size_t c = 0; c < x.size(); ++c) ASSERT_NEAR(x[c], y[c], 1e-5);
  }
}

// Codes are of keys before rotation: where a row stands does not matter.
TEST(Csr, PositionsDoNotChangeCodes) {
  const Rows rows(80);
  Rows later = rows;
  const size_t shift = 17 * kKvHeads * kDim;
  for (auto* x : {&later.k, &later.v}) std::rotate(x->begin(), x->end() - shift, x->end());
  Subject a({.pairs = 4}), b({.pairs = 4});
  a.Step(rows, 60), b.Step(later, 77);
  for (size_t i = 0; i < 60; ++i)
    for (const RowSide side : {RowSide::kKeys, RowSide::kValues}) {
      const auto x = a.store->Indices(0, 1, side, i), y = b.store->Indices(0, 1, side, i + 17);
      ASSERT_TRUE(std::equal(x.begin(), x.end(), y.begin()));
    }
}

TEST(Csr, ThreadsDoNotChangeABit) {
  const Rows rows(200);
  const CsrOptions options{.pairs = 4, .window = 7, .sample = 10, .guard = 9};
  std::vector<std::byte> saved[2];
  for (const int n : {1, 2}) {
    const ThreadPool pool(n);
    const ThreadScope scope(pool);
    Subject subject(options);
    subject.Step(rows, 150);
    for (size_t i = 0; i < 20; ++i) subject.Step(rows, 1);
    saved[n - 1] = subject.Saved();
  }
  EXPECT_TRUE(saved[0] == saved[1]);
}

std::string Refusal(const std::function<void()>& run) {
  try {
    run();
  } catch (const Error& error) {
    return error.what();
  }
  return "accepted";
}

TEST(Csr, RefusesWhatCannotWork) {
  EXPECT_EQ(CacheSpec::Parse("csr(8)").ToString(), "full+csr");
  EXPECT_EQ(CacheSpec::Parse("csr(atoms=100, s=4, window=16)").ToString(), CacheSpec::Parse("csr(4, window=16, atoms=100)").ToString());
  for (const char* spec : {"csr(3)", "csr(0)", "csr(4, sample=7)", "csr(atoms=0)", "csr(4, coefficients=8)", "csr(4)+q4"})
    EXPECT_THROW(CacheSpec::Parse(spec), Error) << spec;
  EXPECT_NE(Refusal([] { CacheSpec::Parse("h2o(64)+csr+merge"); }).find("cannot change a row that is stored"), std::string::npos);
  EXPECT_NE(Refusal([] { CacheSpec::Parse("h2o(64)+csr+zigzag"); }).find("must know its rows before"), std::string::npos);
  const TempDictionaries file;
  const auto refusal = [&](const std::string& spec) { return Refusal([&] { Config(spec, file); }); };
  EXPECT_EQ(refusal("csr"), "accepted");
  EXPECT_EQ(refusal("csr(atoms=80)"), "accepted");
  EXPECT_NE(refusal("csr(atoms=81)").find("dictionaries of 80 atoms, csr asks for 81"), std::string::npos);
  const std::string untrained = Refusal([] {
    CacheConfig::Create(CacheSpec::Parse("csr"), CacheShape::Uniform(1, kHeads, kKvHeads, kDim, 240, Rope()));
  });
  EXPECT_NE(untrained.find("train them with 'lesskv train csr'"), std::string::npos) << untrained;
  const TempDictionaries other(Dictionaries(2), "layers"), narrow(Dictionaries(1, 16), "narrow");
  EXPECT_NE(Refusal([&] { Config("csr", other); }).find("dictionaries for 2 layers"), std::string::npos);
  EXPECT_NE(Refusal([&] { Config("csr", narrow); }).find("dictionaries for heads of 16"), std::string::npos);
}

// A saved cache with a code that names no atom, or one that is not an atom, is refused.
TEST(Csr, DamagedCodesAreRefused) {
  const TempDictionaries file;
  const Rows rows(60);
  SequenceCache cache(Config("full+csr(4, sample=4)", file));
  Feed(cache, rows, 20, StepKind::kPrompt);
  const std::vector<std::byte> saved = cache.Serialize();
  size_t refused = 0;
  for (size_t at = 40; at + 1 < saved.size(); at += 7) {
    std::vector<std::byte> bad = saved;
    bad[at] = bad[at + 1] = std::byte{0x77};
    SequenceCache other(Config("full+csr(4, sample=4)", file));
    try {
      other.Restore(bad.data(), bad.size());
      Feed(other, rows, 1, StepKind::kDecode);  // sound enough to go on
    } catch (const Error&) {
      ++refused;
    }
  }
  EXPECT_GT(refused, saved.size() / 7 / 4);
}

}  // namespace
}  // namespace lesskv
