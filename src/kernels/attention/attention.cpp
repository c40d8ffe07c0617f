#include "kernels/attention/attention.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <memory>
#include <new>
#include <vector>

#include "base/check.h"
#include "base/checked.h"
#include "base/threads.h"
#include "kernels/attention/attention_isa.h"
#include "kernels/basic/cpu.h"

namespace lesskv {
namespace {

const AttentionKernels& Kernels() {
#ifdef __x86_64__
  switch (ActiveIsa()) {
    case Isa::kScalar:
      return scalar::kAttentionKernels;
    case Isa::kAvx2:
      return avx2::kAttentionKernels;
    case Isa::kAvx512:
    case Isa::kAvx512Bf16:
    case Isa::kAmx:
      return avx512::kAttentionKernels;
  }
#endif
  return scalar::kAttentionKernels;
}

// Memory that grows to the largest size asked for and stays with the calling thread: calls come for every layer of
// every token.
class WorkMemory {
 public:
  float* Get(size_t n) {
    if (n > size_) {
      data_.reset();
      size_ = 0;
      data_.reset(static_cast<float*>(::operator new (n * sizeof(float), std::align_val_t{64})));
      size_ = n;
    }
    return data_.get();
  }

 private:
  struct Free {
    void operator()(float* p) const { ::operator delete (p, std::align_val_t{64}); }
  };
  std::unique_ptr<float, Free> data_;
  size_t size_ = 0;
};

// Angles of read positions, as the kernels want them. The read positions of a store that numbers its rows anew are
// small and return with every layer and step, so their cosines and sines are kept.
class RotationAngles {
 public:
  // [tile][cosines, sines][pairs][16] for the rows, the last tile filled up with its last row.
  void Fill(const RopeTable& rope, const int32_t* positions, size_t n_rows, float* out) {
    const size_t pairs = rope.n_dims() / 2;
    if (rope.frequencies() != frequencies_) {
      frequencies_ = rope.frequencies();
      kept_.clear();
    }
    int32_t largest = -1;
    for (size_t r = 0; r < n_rows; ++r) {
      if (positions[r] < kKept) largest = std::max(largest, positions[r]);
    }
    Keep(rope, static_cast<size_t>(largest + 1), pairs);
    std::vector<float> fresh(static_cast<size_t>(Threads()) * pairs * 2);
    ParallelFor(CeilDiv(n_rows, kTileRows), [&](size_t tile) {
      float* to = out + tile * pairs * 2 * kTileRows;
      for (size_t lane = 0; lane < kTileRows; ++lane) {
        const int32_t position = positions[std::min(n_rows - 1, tile * kTileRows + lane)];
        const float* angles;
        if (position < kKept) {
          angles = kept_.data() + static_cast<size_t>(position) * pairs * 2;
        } else {
          float* own = fresh.data() + static_cast<size_t>(ThreadIndex()) * pairs * 2;
          rope.Angles(position, own, own + pairs);
          angles = own;
        }
        for (size_t i = 0; i < 2 * pairs; ++i) to[i * kTileRows + lane] = angles[i];
      }
    });
  }

 private:
  static constexpr int32_t kKept = 8192;

  void Keep(const RopeTable& rope, size_t n, size_t pairs) {
    const size_t old = pairs == 0 ? n : kept_.size() / (pairs * 2);
    if (n <= old) return;
    kept_.resize(n * pairs * 2);
    ParallelFor(n - old, [&](size_t i) {
      float* to = kept_.data() + (old + i) * pairs * 2;
      rope.Angles(static_cast<int32_t>(old + i), to, to + pairs);
    });
  }

  std::vector<double> frequencies_;
  std::vector<float> kept_;  // [positions][cosines, sines]
};

struct Workspace {
  WorkMemory scratch, partials, probabilities, angle_memory;
  RotationAngles angles;
  std::vector<size_t> span_rows;  // the spans' first rows and the end, of each job the keys', then the values'
};

Workspace& ThreadWorkspace() {
  thread_local Workspace workspace;
  return workspace;
}

void CheckSpans(std::span<const RowSpan> spans, RowSide side, size_t head_dim) {
  for (const RowSpan& span : spans) {
    CHECK(span.format.side == side && span.format.head_dim == head_dim, "{} channels in a job of {}",
          span.format.head_dim, head_dim);
    CHECK(span.reader || Supports(span.format.type, head_dim), "{} channels of {}", head_dim, Name(span.format.type));
    CHECK(span.reader || span.rows || span.n_rows == 0, "{} rows nowhere", span.n_rows);
  }
}

void CheckJob(const AttentionJob& job, size_t n_rows, size_t n_value_rows) {
  CHECK(!job.keys.empty() && !job.values.empty(), "a job without spans");
  const size_t dim = job.keys[0].format.head_dim;
  CheckSpans(job.keys, RowSide::kKeys, dim);
  CheckSpans(job.values, RowSide::kValues, dim);
  CHECK(n_rows == n_value_rows, "{} rows of keys, {} of values", n_rows, n_value_rows);
  CHECK(job.group >= 1);
  CHECK(job.n_queries == 0 || (job.q && job.out && job.lse));
  CHECK(n_rows == job.n_past || n_rows == job.n_past + job.n_queries, "{} rows, {} past, {} queries", n_rows,
        job.n_past, job.n_queries);
  CHECK(!job.received || job.n_queries == 1, "sums are made beside one query, not {}", job.n_queries);
  CHECK(!job.read_positions || job.rope, "read positions without a rotation");
  CHECK(!job.read_positions || job.rope->n_dims() <= dim, "rotation of {} of {} channels", job.rope->n_dims(), dim);
  CHECK(!job.bias && job.window == 0 && !job.received_by_head, "not yet");
  CHECK(job.key_hadamard_block == 0 || (job.read_positions && dim % job.key_hadamard_block == 0));
}

PrefillShape ShapeOf(const AttentionJob& job) {
  if (job.compute != ComputeType::kBF16 || ActiveIsa() < Isa::kAvx512Bf16) return {};
  if (ActiveIsa() == Isa::kAmx && job.keys[0].format.head_dim % 32 == 0)
    return {.stacked = 768, .chunk = 32, .padding = 16, .multiply_pairs = amx::MultiplyPairs};
  return {.multiply_pairs = avx512bf16::MultiplyPairs};
}

AttentionView MakeView(const AttentionJob& job, const size_t* key_rows, const size_t* value_rows) {
  AttentionView view = {};
  view.keys = {job.keys.data(), key_rows, job.keys.size()};
  view.values = {job.values.data(), value_rows, job.values.size()};
  view.head_dim = job.keys[0].format.head_dim;
  view.n_rows = key_rows[job.keys.size()];
  view.n_past = job.n_past;
  view.n_queries = job.n_queries;
  view.group = job.group;
  view.q = job.q;
  view.q_stride = job.q_stride;
  view.scale = job.scale;
  view.prefill = ShapeOf(job);
  view.out = job.out;
  view.out_stride = job.out_stride;
  view.lse = job.lse;
  view.received = job.received;
  view.probability_stride = RoundUp(view.n_rows, kTileRows);
  return view;
}

// The views of n jobs; job(i) gives the i-th.
template <typename JobAt>
std::vector<AttentionView> MakeViews(size_t n, JobAt&& job_at) {
  Workspace& workspace = ThreadWorkspace();
  std::vector<size_t>& rows = workspace.span_rows;
  rows.clear();
  const auto list_rows = [&](std::span<const RowSpan> spans) {
    rows.push_back(0);
    for (const RowSpan& span : spans) rows.push_back(rows.back() + span.n_rows);
  };
  for (size_t j = 0; j < n; ++j) {
    list_rows(job_at(j).keys);
    list_rows(job_at(j).values);
  }
  std::vector<AttentionView> views(n);
  const size_t* next = rows.data();
  for (size_t j = 0; j < n; ++j) {
    const AttentionJob& job = job_at(j);
    const size_t *key_rows = next, *value_rows = key_rows + job.keys.size() + 1;
    next = value_rows + job.values.size() + 1;
    CheckJob(job, key_rows[job.keys.size()], value_rows[job.values.size()]);
    views[j] = MakeView(job, key_rows, value_rows);
  }
  // Heads that read at the same positions share the angles.
  std::vector<size_t> first(n, 0);
  size_t floats = 0;
  auto source = [&](size_t j) {
    size_t i = 0;
    while (job_at(i).read_positions != job_at(j).read_positions || job_at(i).rope != job_at(j).rope ||
           views[i].n_rows != views[j].n_rows) {
      ++i;
    }
    return i;
  };
  for (size_t j = 0; j < n; ++j) {
    const AttentionJob& job = job_at(j);
    if (!job.read_positions || source(j) != j) continue;
    first[j] = floats;
    floats += RoundUp(views[j].n_rows, kTileRows) * job.rope->n_dims();
  }
  float* memory = floats > 0 ? workspace.angle_memory.Get(floats) : nullptr;
  for (size_t j = 0; j < n; ++j) {
    const AttentionJob& job = job_at(j);
    if (!job.read_positions || job.rope->n_dims() == 0 || views[j].n_rows == 0) continue;
    const size_t i = source(j);
    views[j].angles = memory + first[i];
    views[j].rotary_pairs = job.rope->n_dims() / 2;
    views[j].hadamard_block = job.key_hadamard_block;
    if (job.key_hadamard_block > 0)
      views[j].hadamard_scale = static_cast<float>(1 / std::sqrt(static_cast<double>(job.key_hadamard_block)));
    views[j].interleaved = job.rope->style() == RopeStyle::kInterleaved;
    if (i == j) workspace.angles.Fill(*job.rope, job.read_positions, views[j].n_rows, memory + first[j]);
  }
  return views;
}

struct Task {
  size_t job;
  size_t index;   // decode: split; prefill: first query; column sums: row block
  size_t offset;  // decode: where its partial result lies
};

struct Plan {
  std::vector<Task> tasks;
  std::vector<size_t> first_partial;  // a job
  size_t partial_floats = 0;
  size_t scratch_floats = 0;
};

bool IsDecode(const AttentionView& view) { return view.n_queries > 0 && view.n_queries <= kDecodeQueries; }

size_t QueriesPerTask(const AttentionView& view) { return std::max<size_t>(1, view.prefill.stacked / view.group); }

Plan PlanTasks(const AttentionKernels& kernels, const std::vector<AttentionView>& views) {
  Plan plan;
  plan.first_partial.resize(views.size());
  for (size_t j = 0; j < views.size(); ++j) {
    const AttentionView& view = views[j];
    if (view.n_queries == 0) continue;
    plan.scratch_floats = std::max(plan.scratch_floats, kernels.scratch_floats(view));
    if (view.n_queries > kDecodeQueries) {
      // The last queries see the most rows: the longest tasks start first.
      const size_t step = QueriesPerTask(view);
      for (size_t tile = CeilDiv(view.n_queries, step); tile-- > 0;) plan.tasks.push_back({j, tile * step, 0});
      continue;
    }
    plan.first_partial[j] = plan.partial_floats;
    for (size_t split = 0; split < CeilDiv(view.n_rows, kSplitRows); ++split) {
      plan.tasks.push_back({j, split, plan.partial_floats});
      plan.partial_floats += kernels.partial_floats(view);
    }
  }
  return plan;
}

// Memory for the probabilities of the views that want to know what their rows received.
void GiveProbabilities(WorkMemory& memory, std::vector<AttentionView>& views) {
  size_t floats = 0;
  for (const AttentionView& view : views) floats += view.received ? view.group * view.probability_stride : 0;
  float* next = floats > 0 ? memory.Get(floats) : nullptr;
  for (AttentionView& view : views) {
    if (!view.received) continue;
    view.probabilities = next;
    next += view.group * view.probability_stride;
  }
}

}  // namespace

// Out of line, so that no kernel's translation unit makes a copy of them: see attention_isa.h.
RowReader::~RowReader() = default;
void RowReader::ExpandKeys(size_t, size_t, float*, size_t) const { CHECK(false, "a reader of values has no keys"); }
void RowReader::ExpandValues(size_t, size_t, float*, size_t) const { CHECK(false, "a reader of keys has no values"); }
bool RowReader::Scores(size_t, size_t, const float*, size_t, float*, size_t) const { return false; }
bool RowReader::AddValues(size_t, size_t, const float*, size_t, size_t, float*, size_t) const { return false; }

void Attend(std::span<const AttentionJob> jobs) {
  if (jobs.empty()) return;
  const AttentionKernels& kernels = Kernels();
  std::vector<AttentionView> views = MakeViews(
      jobs.size(), [&](size_t j) -> auto& { return jobs[j]; });
  const Plan plan = PlanTasks(kernels, views);
  Workspace& workspace = ThreadWorkspace();
  GiveProbabilities(workspace.probabilities, views);
  float* scratch = workspace.scratch.Get(plan.scratch_floats * static_cast<size_t>(Threads()));
  float* partials = workspace.partials.Get(plan.partial_floats);
  const auto n_splits = [&](size_t j) { return CeilDiv(views[j].n_rows, kSplitRows); };
  const auto merge = [&](size_t j) { kernels.merge_splits(views[j], partials + plan.first_partial[j], n_splits(j)); };
  // Whoever finishes a job's last split merges them all: a second parallel region would cost as much as 2,000 rows.
  const auto splits_left = std::make_unique<std::atomic<size_t>[]>(views.size());
  for (size_t j = 0; j < views.size(); ++j) {
    splits_left[j].store(n_splits(j), std::memory_order_relaxed);
    if (n_splits(j) == 0 && IsDecode(views[j])) merge(j);
  }
  ParallelFor(plan.tasks.size(), [&](size_t t) {
    const Task& task = plan.tasks[t];
    const AttentionView& view = views[task.job];
    float* own = scratch + static_cast<size_t>(ThreadIndex()) * plan.scratch_floats;
    if (!IsDecode(view)) {
      kernels.prefill(view, task.index, std::min(QueriesPerTask(view), view.n_queries - task.index), own);
      return;
    }
    kernels.decode(view, task.index, own, partials + task.offset);
    if (splits_left[task.job].fetch_sub(1, std::memory_order_acq_rel) == 1) merge(task.job);
  });
}

void ColumnSums(std::span<const ColumnSumJob> jobs) {
  if (jobs.empty()) return;
  const AttentionKernels& kernels = Kernels();
  const std::vector<AttentionView> views = MakeViews(
      jobs.size(), [&](size_t j) -> auto& { return jobs[j].attention; });
  std::vector<Task> tasks;
  size_t scratch_floats = 0;
  for (size_t j = 0; j < jobs.size(); ++j) {
    CHECK(!jobs[j].by_head, "not yet");
    CHECK((jobs[j].lse && jobs[j].sums) || views[j].n_queries == 0 || views[j].n_rows == 0);
    scratch_floats = std::max(scratch_floats, kernels.scratch_floats(views[j]));
    // The first rows are seen by the most queries: the longest tasks start first.
    for (size_t block = 0; block < CeilDiv(views[j].n_rows, kBlockRows); ++block) tasks.push_back({j, block, 0});
  }
  float* scratch = ThreadWorkspace().scratch.Get(scratch_floats * static_cast<size_t>(Threads()));
  ParallelFor(tasks.size(), [&](size_t t) {
    const ColumnSumJob& job = jobs[tasks[t].job];
    const ColumnView view = {views[tasks[t].job], job.lse, job.first_query, job.weights, job.sums};
    kernels.column_sums(view, tasks[t].index, scratch + static_cast<size_t>(ThreadIndex()) * scratch_floats);
  });
}

void Merge(float* out, float* lse, const float* other_out, float other_lse, size_t head_dim) {
  constexpr float kNothing = -std::numeric_limits<float>::infinity();
  if (other_lse == kNothing) return;
  if (*lse == kNothing) {
    std::copy(other_out, other_out + head_dim, out);
    *lse = other_lse;
    return;
  }
  const float largest = std::max(*lse, other_lse);
  const float mine = std::exp(*lse - largest), other = std::exp(other_lse - largest);
  const float total = mine + other;
  for (size_t i = 0; i < head_dim; ++i) out[i] = (mine * out[i] + other * other_out[i]) / total;
  *lse = largest + std::log(total);
}

}  // namespace lesskv
