#include "test_methods.h"

#include <algorithm>
#include <cmath>
#include <new>
#include <numeric>

#include "base/check.h"
#include "example_method.h"
#include "kvcache/budget/budgeter.h"
#include "kvcache/codec/codec.h"
#include "kvcache/registry.h"
#include "kvcache/residual/residual.h"

namespace lesskv::testing_support {
namespace {

// ---- plain: rows in the order of their tokens, as floats, read through a RowReader.

struct PlainHead final : public RowReader {
  size_t dim = 0, n_resident = 0;
  std::vector<float> keys, values;  // [rows, dim], the step's own rows last

  void ExpandKeys(size_t first, size_t n, float* out, size_t stride) const override {
    for (size_t i = 0; i < n; ++i)
      for (size_t c = 0; c < dim; ++c) out[c * stride + i] = keys[(first + i) * dim + c];
  }
  void ExpandValues(size_t first, size_t n, float* out, size_t stride) const override {
    for (size_t i = 0; i < n; ++i) std::copy_n(&values[(first + i) * dim], dim, out + i * stride);
  }
};

class PlainStore final : public KvStore {
 public:
  PlainStore(ByteCounter& counter, const StoreShape& shape, size_t group)
      : counter_(&counter), shape_(shape), group_(group), table_(shape.layers), heads_(table_.size()) {
    for (size_t i = 0; i < heads_.size(); ++i) heads_[i].dim = shape.layers[table_.LayerOf(i)].head_dim;
  }
  std::unique_ptr<KvStore> Clone(ByteCounter& counter) const override {
    auto copy = std::make_unique<PlainStore>(counter, shape_, group_);
    copy->heads_ = heads_;
    copy->Count();
    return copy;
  }
  void Reserve(const StepRoom& room) override { n_step_ = room.n_step; }
  void SetBudgets(size_t, std::span<const size_t>) override {}
  void Append(size_t layer, size_t, size_t n, const float* keys, const float* values) override {
    const LayerShape& shape = shape_.layers[layer];
    for (size_t i = 0; i < n; ++i)
      for (size_t h = 0; h < shape.n_kv_heads; ++h) {
        PlainHead& head = heads_[table_(layer, h)];
        const size_t at = (i * shape.n_kv_heads + h) * head.dim;
        head.keys.insert(head.keys.end(), keys + at, keys + at + head.dim);
        head.values.insert(head.values.end(), values + at, values + at + head.dim);
      }
  }
  void AddJobs(const StoreQuery& query, JobList& list) const override {
    const LayerShape& shape = shape_.layers[query.layer];
    for (size_t h = 0; h < shape.n_kv_heads; ++h) {
      const PlainHead& head = heads_[table_(query.layer, h)];
      const size_t n = head.n_resident + query.first_query + query.n_queries, cut = n / 3;
      auto &keys = list.NewSpans(), &values = list.NewSpans();
      // Keys and values cut at different rows, as codecs with windows do.
      if (cut > 0) keys.push_back({{RowType::kF32, RowSide::kKeys, head.dim}, nullptr, 0, cut, &head});
      keys.push_back({{RowType::kF32, RowSide::kKeys, head.dim}, nullptr, cut, n - cut, &head});
      values.push_back({{RowType::kF32, RowSide::kValues, head.dim}, nullptr, 0, n, &head});
      AttentionJob job;
      job.keys = keys;
      job.values = values;
      job.n_past = head.n_resident + query.first_query;
      job.n_queries = query.n_queries;
      job.q = query.queries + h * shape.group() * head.dim;
      job.q_stride = job.out_stride = shape.q_dim();
      job.group = shape.group();
      job.scale = shape.scale;
      if (!query.read_positions.empty() && shape.rope->n_dims() > 0) {
        job.rope = shape.rope.get();
        job.read_positions = query.read_positions[h];
      }
      job.out = query.out + h * shape.group() * head.dim;
      job.lse = query.lse + h * query.n_queries * shape.group();
      list.jobs.push_back(job);
    }
  }
  void ReadRows(size_t layer, size_t h, std::span<const uint32_t> rows, float* keys, float* values) const override {
    const PlainHead& head = heads_[table_(layer, h)];
    for (size_t i = 0; i < rows.size(); ++i) {
      std::copy_n(&head.keys[rows[i] * head.dim], head.dim, keys + i * head.dim);
      std::copy_n(&head.values[rows[i] * head.dim], head.dim, values + i * head.dim);
    }
  }
  void RewriteValues(size_t layer, size_t h, std::span<const uint32_t> rows, const float* values) override {
    PlainHead& head = heads_[table_(layer, h)];
    for (size_t i = 0; i < rows.size(); ++i) std::copy_n(values + i * head.dim, head.dim, &head.values[rows[i] * head.dim]);
  }
  // Rows close ranks and keep their order: every row behind a victim moves.
  SlotMap Close(size_t layer, size_t h, std::span<const Departure> leaving) override {
    PlainHead& head = heads_[table_(layer, h)];
    const size_t n = counter_->only_counts ? head.n_resident + n_step_ : head.keys.size() / head.dim;
    Merge(head, leaving);
    SlotMap map{0, {}, true};
    size_t next = 0;
    for (uint32_t row = 0; row < n; ++row) {
      if (next < leaving.size() && leaving[next].row == row) {
        ++next;
        continue;
      }
      const auto to = static_cast<uint32_t>(map.n_rows++);
      if (to != row || row >= head.n_resident) map.moves.push_back({row, to});
      if (counter_->only_counts) continue;
      std::copy_n(&head.keys[row * head.dim], head.dim, &head.keys[to * head.dim]);
      std::copy_n(&head.values[row * head.dim], head.dim, &head.values[to * head.dim]);
    }
    head.n_resident = map.n_rows;
    if (!counter_->only_counts) head.keys.resize(map.n_rows * head.dim), head.values.resize(map.n_rows * head.dim);
    return map;
  }
  void EndStep() override { Count(); }
  void CancelStep() override {}
  size_t n_rows(size_t layer, size_t h) const override { return heads_[table_(layer, h)].n_resident; }
  size_t GroupedRows(size_t layer, size_t h) const override {
    return (heads_[table_(layer, h)].n_resident + n_step_) / group_ * group_;
  }
  void Save(ByteWriter& out) const override {
    for (const PlainHead& head : heads_) {
      out.Put<uint64_t>(head.n_resident);
      out.Raw(head.keys.data(), head.keys.size() * sizeof(float));
      out.Raw(head.values.data(), head.values.size() * sizeof(float));
    }
  }
  void Load(ByteReader& in, std::span<const size_t>, size_t max_rows) override {
    for (PlainHead& head : heads_) {
      head.n_resident = in.Count(max_rows, "rows");
      head.keys.resize(head.n_resident * head.dim);
      head.values.resize(head.n_resident * head.dim);
      in.Raw(head.keys.data(), head.keys.size() * sizeof(float));
      in.Raw(head.values.data(), head.values.size() * sizeof(float));
    }
    Count();
  }

 private:
  static void Merge(PlainHead& head, std::span<const Departure> leaving) {
    for (std::vector<float>* x : {&head.keys, &head.values}) {
      std::vector<float> merged = *x;
      for (const Departure& d : leaving)
        if (d.fate == Fate::kMerge)
          for (size_t c = 0; c < head.dim; ++c)
            merged[d.target * head.dim + c] += d.share * ((*x)[d.row * head.dim + c] - (*x)[d.target * head.dim + c]);
      *x = std::move(merged);
    }
  }
  void Count() {
    size_t bytes = 0;
    for (const PlainHead& head : heads_) bytes += head.n_resident * head.dim * 2 * sizeof(float);
    counted_ = CountedBytes();
    counted_ = CountedBytes(*counter_, bytes);
  }

  ByteCounter* counter_;
  StoreShape shape_;
  size_t group_;
  HeadTable table_;
  std::vector<PlainHead> heads_;
  CountedBytes counted_;
  size_t n_step_ = 0;
};

class PlainCodec final : public Codec {
 public:
  PlainCodec(bool rotated, size_t group) : rotated_(rotated), group_(group) {}
  CodecTraits traits() const override { return {.group_rows = group_, .unrotated_keys = !rotated_}; }
  std::unique_ptr<KvStore> MakeStore(ByteCounter& counter, const StoreShape& shape) const override {
    return std::make_unique<PlainStore>(counter, shape, group_);
  }

 private:
  bool rotated_;
  size_t group_;
};

constexpr Parameter kPlainParameters[] = {{.name = "rotated", .kind = Parameter::Kind::kWord, .default_value = "false",
                                           .help = "keys are kept rotated", .choices = "true|false"},
                                          {.name = "group", .kind = Parameter::Kind::kCount, .default_value = "1",
                                           .help = "rows that leave together", .min = 1, .max = 64}};
const Method kPlain{.name = "plain", .stage = Stage::kCodec, .summary = "floats in the order of the text",
                    .reference = "", .parameters = kPlainParameters,
                    .traits = [](const Arguments& a) { return MethodTraits{.groups_rows = a.Count("group") > 1}; },
                    .make_codec = [](const Arguments& a, const MethodContext&) -> std::unique_ptr<const Codec> {
                      return std::make_unique<PlainCodec>(a.Text("rotated") == "true", a.Count("group"));
                    }};

// ---- scaled: stores doubled values through another codec's store.

class ScaledStore final : public KvStore {
 public:
  ScaledStore(std::unique_ptr<KvStore> inner, std::vector<LayerShape> layers) : inner_(std::move(inner)), layers_(std::move(layers)) {}
  std::unique_ptr<KvStore> Clone(ByteCounter& counter) const override {
    return std::make_unique<ScaledStore>(inner_->Clone(counter), layers_);
  }
  void Reserve(const StepRoom& room) override { inner_->Reserve(room); }
  void SetBudgets(size_t layer, std::span<const size_t> budgets) override { inner_->SetBudgets(layer, budgets); }
  void Append(size_t layer, size_t first, size_t n, const float* keys, const float* values) override {
    std::vector<float> doubled(values, values + n * layers_[layer].kv_dim());
    for (float& x : doubled) x *= 2;
    inner_->Append(layer, first, n, keys, doubled.data());
  }
  void AddJobs(const StoreQuery& query, JobList& list) const override { inner_->AddJobs(query, list); }
  void Finish(const StoreQuery& query) const override {
    inner_->Finish(query);
    for (size_t i = 0; i < query.n_queries * layers_[query.layer].q_dim(); ++i) query.out[i] /= 2;
  }
  void ReadRows(size_t layer, size_t h, std::span<const uint32_t> rows, float* keys, float* values) const override {
    inner_->ReadRows(layer, h, rows, keys, values);
    for (size_t i = 0; i < rows.size() * layers_[layer].head_dim; ++i) values[i] /= 2;
  }
  SlotMap Close(size_t layer, size_t h, std::span<const Departure> leaving) override { return inner_->Close(layer, h, leaving); }
  void EndStep() override { inner_->EndStep(); }
  void CancelStep() override { inner_->CancelStep(); }
  size_t n_rows(size_t layer, size_t h) const override { return inner_->n_rows(layer, h); }
  void Save(ByteWriter& out) const override { inner_->Save(out); }
  void Load(ByteReader& in, std::span<const size_t> budgets, size_t max_rows) override { inner_->Load(in, budgets, max_rows); }

 private:
  std::unique_ptr<KvStore> inner_;
  std::vector<LayerShape> layers_;
};

class ScaledCodec final : public Codec {
 public:
  explicit ScaledCodec(std::unique_ptr<const Codec> inner) : inner_(std::move(inner)) {}
  CodecTraits traits() const override { return inner_->traits(); }
  std::unique_ptr<KvStore> MakeStore(ByteCounter& counter, const StoreShape& shape) const override {
    return std::make_unique<ScaledStore>(inner_->MakeStore(counter, shape), shape.layers);
  }

 private:
  std::unique_ptr<const Codec> inner_;
};

const Method kScaled{.name = "scaled", .stage = Stage::kWrap, .summary = "values are stored doubled", .reference = "",
                     .traits = [](const Arguments&) { return MethodTraits{.rewrites_rows = false}; },
                     .make_wrapper = [](const Arguments&, const MethodContext&, std::unique_ptr<const Codec> inner)
                         -> std::unique_ptr<const Codec> { return std::make_unique<ScaledCodec>(std::move(inner)); }};

// ---- Budgets decided late.

class ByVote final : public Budgeter {
 public:
  std::vector<size_t> Allocate(const BudgetRequest& request) const override {
    return std::vector<size_t>(request.n_heads(), request.rows);
  }
  AllocationScope scope() const override { return AllocationScope::kLayer; }
  // The head with the largest single vote gets two rows of every other head.
  void AllocateLayer(const LayerRows& layer, std::span<size_t> budgets) const override {
    size_t best = 0;
    float most = -1;
    for (size_t h = 0; h < layer.heads.size(); ++h)
      for (const float vote : layer.heads[h].votes)
        if (vote > most) most = vote, best = h;
    for (size_t h = 0; h < budgets.size(); ++h) {
      if (h == best) continue;
      const size_t moved = std::min<size_t>(2, budgets[h] - std::min<size_t>(budgets[h], 8));
      budgets[h] -= moved;
      budgets[best] += moved;
    }
  }
};

class ByNeed final : public Budgeter {
 public:
  std::vector<size_t> Allocate(const BudgetRequest& request) const override {
    return std::vector<size_t>(request.n_heads(), request.rows);
  }
  AllocationScope scope() const override { return AllocationScope::kModel; }
  Observation Measures() const override {
    return {.queries = Observation::Queries::kLast, .last = 4, .by_query_head = true};
  }
  // Rows that hold nine tenths of the last queries' attention, mean over query heads (the uncertainty of ZigZagKV).
  double Need(const LayerRows& layer) const override {
    double rows = 0, heads = 0;
    for (const HeadRows& head : layer.heads)
      for (size_t g = 0; g < layer.group; ++g) {
        std::vector<float> a(head.measured.begin() + static_cast<ptrdiff_t>(g * head.n_rows()),
                             head.measured.begin() + static_cast<ptrdiff_t>((g + 1) * head.n_rows()));
        std::sort(a.rbegin(), a.rend());
        const double all = std::accumulate(a.begin(), a.end(), 0.0);
        CHECK(std::abs(all - std::min<double>(4, static_cast<double>(layer.n_step))) < 1e-3, "attention of {}", all);
        double sum = 0;
        for (size_t r = 0; r < a.size() && sum < 0.9 * all; ++r) sum += a[r], ++rows;
        ++heads;
      }
    return rows / heads;
  }
  // The layer that needs most takes a row a head from each other layer.
  void AllocateModel(const BudgetRequest& request, std::span<const LayerRows> layers, std::span<size_t> budgets) const override {
    size_t best = 0;
    for (size_t l = 0; l < layers.size(); ++l)
      if (layers[l].need > layers[best].need) best = l;
    const size_t n = request.n_kv_heads[0];
    for (size_t l = 0; l < layers.size(); ++l)
      for (size_t h = 0; h < n && l != best; ++h) --budgets[l * n + h], ++budgets[best * n + h];
  }
};

MethodTraits LateTraits(const Arguments&) { return {.needs_eviction = true, .acts_in_stream = false}; }
const Method kByVote{.name = "by_vote", .stage = Stage::kBudget, .summary = "test", .reference = "", .traits = LateTraits,
                     .make_budgeter = [](const Arguments&, const MethodContext&) -> std::unique_ptr<const Budgeter> {
                       return std::make_unique<ByVote>();
                     }};
const Method kByNeed{.name = "by_need", .stage = Stage::kBudget, .summary = "test", .reference = "", .traits = LateTraits,
                     .make_budgeter = [](const Arguments&, const MethodContext&) -> std::unique_ptr<const Budgeter> {
                       return std::make_unique<ByNeed>();
                     }};

// ---- average: a row that leaves is averaged half and half with the nearest earlier row that stays, if there is one.

class Average final : public Residual {
 public:
  void Decide(const LayerRows& layer, size_t h, std::span<Departure> departures) const override {
    const HeadRows& head = layer.heads[h];
    std::vector<char> leaves(head.n_rows());
    for (const Departure& d : departures) leaves[d.row] = 1;
    std::vector<char> taken(head.n_rows());
    for (Departure& d : departures) {
      int32_t best = -1;
      for (uint32_t r = 0; r < head.n_rows(); ++r)
        if (!leaves[r] && ToInt(head.positions[r]) < ToInt(head.positions[d.row]) && ToInt(head.positions[r]) > best) {
          best = ToInt(head.positions[r]);
          d.target = r;
        }
      if (best < 0 || taken[d.target]++) continue;
      d.fate = Fate::kMerge;
      d.share = 0.5f;
    }
  }
};

const Method kAverage{.name = "average", .stage = Stage::kResidual, .summary = "test", .reference = "",
                      .traits = [](const Arguments&) { return MethodTraits{.needs_eviction = true, .needs_rewrites = true}; },
                      .make_residual = [](const Arguments&, const MethodContext&) -> MadeResidual {
                        return {std::make_unique<Average>(), ""};
                      }};

// ---- fails: no memory for what rows leave behind.

class Fails final : public Residual {
 public:
  size_t StateFloats() const override { return 1; }
  void Absorb(size_t, std::span<const EvictedRows>) const override { throw std::bad_alloc(); }
};

const Method kFails{.name = "fails", .stage = Stage::kResidual, .summary = "test", .reference = "",
                    .traits = [](const Arguments&) { return MethodTraits{.needs_eviction = true}; },
                    .make_residual = [](const Arguments&, const MethodContext&) -> MadeResidual {
                      return {std::make_unique<Fails>(), ""};
                    }};

}  // namespace

void RegisterTestMethods() {
  for (const Method* method : {&example::kSampleMethod, &kPlain, &kScaled, &kByVote, &kByNeed, &kAverage, &kFails})
    if (FindMethod(method->name) == nullptr) RegisterMethod(*method);
}

}  // namespace lesskv::testing_support
