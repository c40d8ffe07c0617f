#include "kernels/attention/attention.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <list>
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
  switch (ActiveIsa()) {
#if defined(__x86_64__)
    case Isa::kAvx2:
    case Isa::kAvxVnni:
      return avx2::kAttentionKernels;
    case Isa::kAvx512:
    case Isa::kAvx512Bf16:
    case Isa::kAmx:
      return avx512::kAttentionKernels;
#elif defined(__aarch64__)
    case Isa::kNeon:
      return neon::kAttentionKernels;
    case Isa::kDotprod:
      return dotprod::kAttentionKernels;
#endif
    default:
      return scalar::kAttentionKernels;
  }
}

// Cosines and sines of small positions, a table a rope. The read positions of a store that numbers its rows anew are
// small and return with every layer and step; a model's layers may take turns with two ropes.
class RotationTables {
 public:
  static constexpr int32_t kKept = 8192;  // positions

  struct Table {
    double magnitude;
    std::vector<double> frequencies;
    std::vector<float> angles;  // [positions][cosines, sines]
  };

  // The rope's table, of positions [0, n) at least. Stays where it is until the next Trim; its angles until they grow.
  const Table& Get(const RopeTable& rope, size_t n) {
    auto it = std::find_if(tables_.begin(), tables_.end(),
                           [&](const Table& table) {
                             return table.magnitude == rope.magnitude() && table.frequencies == rope.frequencies();
                           });
    if (it == tables_.end()) it = tables_.insert(it, Table{rope.magnitude(), rope.frequencies(), {}});
    tables_.splice(tables_.begin(), tables_, it);
    Grow(rope, n, it->angles);
    return *it;
  }

  // Forgets all but the tables used last.
  void Trim() {
    if (tables_.size() > kMostTables) tables_.resize(kMostTables);
  }

 private:
  static constexpr size_t kMostTables = 4;

  static void Grow(const RopeTable& rope, size_t n, std::vector<float>& angles) {
    const size_t pairs = rope.n_dims() / 2, old = angles.size() / (pairs * 2);
    if (n <= old) return;
    angles.resize(n * pairs * 2);
    ParallelFor(n - old, [&](size_t i) {
      float* to = angles.data() + (old + i) * pairs * 2;
      rope.Angles(static_cast<int32_t>(old + i), to, to + pairs);
    });
  }

  std::list<Table> tables_;  // used last first
};

// Work memory of the calling thread, kept for its next call: calls come for every layer of every token.
class WorkMemory {
 public:
  static WorkMemory& OfThread() {
    thread_local WorkMemory memory;
    return memory;
  }

  // n floats of any content. Grows to the largest number asked for.
  float* Floats(size_t n) {
    if (n > size_) {
      data_.reset();
      size_ = 0;
      data_.reset(static_cast<float*>(::operator new (n * sizeof(float), std::align_val_t{kRegionAlign})));
      size_ = n;
    }
    return data_.get();
  }

  RotationTables rotations;

 private:
  struct Free {
    void operator()(float* p) const { ::operator delete (p, std::align_val_t{kRegionAlign}); }
  };
  std::unique_ptr<float, Free> data_;
  size_t size_ = 0;
};

void CheckSpans(std::span<const RowSpan> spans, RowSide side, size_t head_dim) {
  for (const RowSpan& span : spans) {
    const size_t channels = span.format.head_dim;
    CHECK(span.format.side == side && (span.channels ? channels <= head_dim : channels == head_dim),
          "{} channels in a job of {}", channels, head_dim);
    CHECK(!span.channels || (side == RowSide::kKeys && !span.reader), "some channels are those of keys in a region");
    CHECK(span.reader || Supports(span.format.type, channels), "{} channels of {}", channels, Name(span.format.type));
    CHECK(span.reader || span.rows || span.n_rows == 0, "{} rows nowhere", span.n_rows);
  }
}

bool HasNarrowKeys(const AttentionJob& job) {
  return std::any_of(job.keys.begin(), job.keys.end(), [](const RowSpan& span) { return span.channels != nullptr; });
}

void CheckRotation(const AttentionJob& job, size_t head_dim) {
  if (!job.read_positions) {
    CHECK(job.key_hadamard_block == 0, "keys that are not rotated are not transformed either");
    return;
  }
  CHECK(job.rope, "read positions without a rotation");
  CHECK(!HasNarrowKeys(job), "keys with some of their channels cannot be rotated");
  CHECK(job.rope->n_dims() <= head_dim, "rotation of {} of {} channels", job.rope->n_dims(), head_dim);
  CHECK(job.key_hadamard_block == 0 || (job.rope->n_dims() > 0 && head_dim % job.key_hadamard_block == 0),
        "blocks of {} in {} channels", job.key_hadamard_block, head_dim);
}

void CheckJob(const AttentionJob& job, size_t n_rows, size_t n_value_rows) {
  CHECK(!job.keys.empty() && !job.values.empty(), "a job without spans");
  const size_t dim = job.values[0].format.head_dim;
  CheckSpans(job.keys, RowSide::kKeys, dim);
  CheckSpans(job.values, RowSide::kValues, dim);
  CHECK(n_rows == n_value_rows, "{} rows of keys, {} of values", n_rows, n_value_rows);
  CHECK(job.group >= 1);
  CHECK(job.n_queries == 0 || (job.q && job.out && job.lse));
  CHECK(n_rows == job.n_past || n_rows == job.n_past + job.n_queries, "{} rows, {} past, {} queries", n_rows,
        job.n_past, job.n_queries);
  CHECK(!job.received || job.n_queries == 1, "sums are made beside one query, not {}", job.n_queries);
  CheckRotation(job, dim);
  CHECK(job.window == 0 || job.past_positions || job.n_past == 0, "a window over {} past rows without positions",
        job.n_past);
  CHECK(job.window == 0 || job.first_position >= 0, "a step at position {}", job.first_position);
}

PrefillShape ShapeOf(const AttentionJob& job) {
  if (job.compute == ComputeType::kF32 || ActiveIsa() < Isa::kAvx512Bf16) return {};
  if (ActiveIsa() == Isa::kAmx && job.values[0].format.head_dim % 32 == 0)
    return {.stacked = 768, .chunk = 32, .padding = 16, .multiply_pairs = amx::MultiplyPairs};
  return {.multiply_pairs = avx512bf16::MultiplyPairs};
}

AttentionView MakeView(const AttentionJob& job, const size_t* key_rows, const size_t* value_rows) {
  AttentionView view = {};
  view.keys = {job.keys.data(), key_rows, job.keys.size()};
  view.values = {job.values.data(), value_rows, job.values.size()};
  view.head_dim = job.values[0].format.head_dim;
  view.narrow_keys = HasNarrowKeys(job);
  view.n_rows = key_rows[job.keys.size()];
  view.n_past = job.n_past;
  view.n_queries = job.n_queries;
  view.group = job.group;
  view.q = job.q;
  view.q_stride = job.q_stride;
  view.scale = job.scale;
  view.bias = job.bias;
  view.window = job.window;
  view.first_position = job.first_position;
  view.past_positions = job.past_positions;
  view.prefill = ShapeOf(job);
  view.out = job.out;
  view.out_stride = job.out_stride;
  view.lse = job.lse;
  view.received = job.received;
  view.received_by_head = job.received_by_head;
  view.probability_stride = RoundUp(view.n_rows, kTileRows);
  if (!job.read_positions) return view;
  view.rotary_pairs = job.rope->n_dims() / 2;
  view.interleaved = job.rope->style() == RopeStyle::kInterleaved;
  view.hadamard_block = job.key_hadamard_block;
  if (job.key_hadamard_block > 0)
    view.hadamard_scale = static_cast<float>(1 / std::sqrt(static_cast<double>(job.key_hadamard_block)));
  return view;
}

// The jobs of one call and how the kernels see them.
struct Batch {
  std::vector<const AttentionJob*> jobs;
  std::vector<size_t> span_rows;  // the spans' first rows and the end: of each job the keys', then the values'
  std::vector<AttentionView> views;

  size_t size() const { return jobs.size(); }
};

// Checks the jobs.
Batch MakeBatch(std::vector<const AttentionJob*> jobs) {
  Batch batch = {std::move(jobs), {}, {}};
  const auto list = [&](std::span<const RowSpan> spans) {
    batch.span_rows.push_back(0);
    for (const RowSpan& span : spans) batch.span_rows.push_back(batch.span_rows.back() + span.n_rows);
  };
  for (const AttentionJob* job : batch.jobs) {
    list(job->keys);
    list(job->values);
  }
  const size_t* next = batch.span_rows.data();
  batch.views.reserve(batch.size());
  for (const AttentionJob* job : batch.jobs) {
    const size_t *key_rows = next, *value_rows = key_rows + job->keys.size() + 1;
    next = value_rows + job->values.size() + 1;
    CheckJob(*job, key_rows[job->keys.size()], value_rows[job->values.size()]);
    batch.views.push_back(MakeView(*job, key_rows, value_rows));
  }
  return batch;
}

// ---- Angles of read positions: [tile][cosines, sines][pairs][16], the last tile filled up with its last row

bool Rotates(const AttentionView& view) { return view.rotary_pairs > 0 && view.n_rows > 0 && view.n_queries > 0; }

// Heads of a sequence follow one another and read at the same positions.
bool SharesAnglesBefore(const Batch& batch, size_t j) {
  return j > 0 && Rotates(batch.views[j - 1]) && batch.jobs[j - 1]->read_positions == batch.jobs[j]->read_positions &&
         batch.jobs[j - 1]->rope == batch.jobs[j]->rope && batch.views[j - 1].n_rows == batch.views[j].n_rows;
}

// Of job j's own angles; 0 when it has none or shares those of the job before.
size_t AngleFloats(const Batch& batch, size_t j) {
  const AttentionView& view = batch.views[j];
  if (!Rotates(view) || SharesAnglesBefore(batch, j)) return 0;
  return RoundUp(view.n_rows, kTileRows) * view.rotary_pairs * 2;
}

size_t AngleFloats(const Batch& batch) {
  size_t floats = 0;
  for (size_t j = 0; j < batch.size(); ++j) floats += AngleFloats(batch, j);
  return floats;
}

struct AngleTask {
  const AttentionJob* job;
  const RotationTables::Table* table;
  size_t n_rows, first_tile;
  float* out;  // of the first tile
};
constexpr size_t kTilesATask = 8;

// `own`: n_dims floats of the calling task's.
void FillAngles(const AngleTask& task, float* own) {
  const RopeTable& rope = *task.job->rope;
  const size_t width = rope.n_dims(), n_tiles = CeilDiv(task.n_rows, kTileRows);
  float* to = task.out;
  for (size_t tile = task.first_tile; tile < std::min(n_tiles, task.first_tile + kTilesATask); ++tile) {
    for (size_t lane = 0; lane < kTileRows; ++lane) {
      const int32_t position = task.job->read_positions[std::min(task.n_rows - 1, tile * kTileRows + lane)];
      const float* angles = own;
      if (position < RotationTables::kKept)
        angles = task.table->angles.data() + static_cast<size_t>(position) * width;
      else
        rope.Angles(position, own, own + width / 2);
      for (size_t i = 0; i < width; ++i) to[i * kTileRows + lane] = angles[i];
    }
    to += width * kTileRows;
  }
}

// The table of a job's rope, with all small positions that it reads at.
const RotationTables::Table& TableOf(const AttentionJob& job, size_t n_rows, RotationTables& tables) {
  int32_t largest = -1;
  for (size_t r = 0; r < n_rows; ++r) {
    const int32_t position = job.read_positions[r];
    if (position < RotationTables::kKept) largest = std::max(largest, position);
  }
  return tables.Get(*job.rope, static_cast<size_t>(largest + 1));
}

// Computes the angles of all jobs to `memory`; `scratch` has scratch_floats floats a thread, n_dims at least.
void PlaceAngles(Batch& batch, RotationTables& tables, float* memory, float* scratch, size_t scratch_floats) {
  std::vector<AngleTask> tasks;
  for (size_t j = 0; j < batch.size(); ++j) {
    AttentionView& view = batch.views[j];
    if (!Rotates(view)) continue;
    view.angles = SharesAnglesBefore(batch, j) ? batch.views[j - 1].angles : memory;
    const size_t floats = AngleFloats(batch, j), tile_floats = view.rotary_pairs * 2 * kTileRows;
    if (floats == 0) continue;
    const RotationTables::Table& table = TableOf(*batch.jobs[j], view.n_rows, tables);
    for (size_t tile = 0; tile * tile_floats < floats; tile += kTilesATask)
      tasks.push_back({batch.jobs[j], &table, view.n_rows, tile, memory + tile * tile_floats});
    memory += floats;
  }
  ParallelFor(tasks.size(), [&](size_t t) {
    FillAngles(tasks[t], scratch + static_cast<size_t>(ThreadIndex()) * scratch_floats);
  });
  tables.Trim();
}

// ---- Latest positions of blocks of rows, for windows

// Of the view's, which are as long as floats.
size_t LatestFloats(const AttentionView& view) {
  return view.window == 0 ? 0 : RoundUp(CeilDiv(view.n_rows, kBlockRows), kTileRows);
}

size_t LatestFloats(const Batch& batch) {
  size_t floats = 0;
  for (const AttentionView& view : batch.views) floats += LatestFloats(view);
  return floats;
}

void PlaceLatest(Batch& batch, float* memory) {
  static_assert(sizeof(int32_t) == sizeof(float));
  for (AttentionView& view : batch.views) {
    if (view.window == 0) continue;
    auto* latest = reinterpret_cast<int32_t*>(memory);
    view.latest = latest;
    memory += LatestFloats(view);
    for (size_t begin = 0; begin < view.n_rows; begin += kBlockRows) {
      const size_t end = std::min(view.n_rows, begin + kBlockRows), past = std::min(end, view.n_past);
      int32_t largest = -1;
      for (size_t r = begin; r < past; ++r) largest = std::max(largest, view.past_positions[r]);
      if (end > view.n_past)
        largest = std::max(largest, view.first_position + static_cast<int32_t>(end - 1 - view.n_past));
      latest[begin / kBlockRows] = largest;
    }
  }
}

// ---- Tasks

struct Task {
  size_t job;
  size_t index;   // decode: split; prefill: first query; column sums: row block
  size_t offset;  // decode: where its partial result lies
};

struct Plan {
  std::vector<Task> tasks;
  std::vector<size_t> first_partial;  // a job
  size_t partial_floats = 0;
  size_t scratch_floats = 0;  // a thread
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

Plan PlanColumns(const AttentionKernels& kernels, const std::vector<AttentionView>& views) {
  Plan plan;
  for (size_t j = 0; j < views.size(); ++j) {
    plan.scratch_floats = std::max(plan.scratch_floats, kernels.scratch_floats(views[j]));
    // The first rows are seen by the most queries: the longest tasks start first.
    for (size_t block = 0; block < CeilDiv(views[j].n_rows, kBlockRows); ++block) plan.tasks.push_back({j, block, 0});
  }
  return plan;
}

// Of the probabilities of a view that wants to know what its rows received.
size_t ProbabilityFloats(const AttentionView& view) {
  return view.received ? view.group * view.probability_stride : 0;
}

size_t ProbabilityFloats(const std::vector<AttentionView>& views) {
  size_t floats = 0;
  for (const AttentionView& view : views) floats += ProbabilityFloats(view);
  return floats;
}

void PlaceProbabilities(std::vector<AttentionView>& views, float* memory) {
  for (AttentionView& view : views) {
    view.probabilities = view.received ? memory : nullptr;
    memory += ProbabilityFloats(view);
  }
}

// Runs a plan of Attend.
void RunTasks(const AttentionKernels& kernels, const Plan& plan, const std::vector<AttentionView>& views,
              float* partials, float* scratch) {
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

}  // namespace

// Out of line, so that no kernel's translation unit makes a copy of them: see attention_isa.h.
RowReader::~RowReader() = default;
void RowReader::ExpandKeys(size_t, size_t, float*, size_t) const { CHECK(false, "a reader of values has no keys"); }
void RowReader::ExpandValues(size_t, size_t, float*, size_t) const { CHECK(false, "a reader of keys has no values"); }
bool RowReader::Scores(size_t, size_t, const float*, size_t, float*, size_t) const { return false; }
bool RowReader::AddValues(size_t, size_t, const float*, size_t, size_t, float*, size_t) const { return false; }

void Attend(std::span<const AttentionJob> jobs) {
  if (jobs.empty()) return;
  std::vector<const AttentionJob*> list;
  for (const AttentionJob& job : jobs) list.push_back(&job);
  const AttentionKernels& kernels = Kernels();
  Batch batch = MakeBatch(std::move(list));
  const Plan plan = PlanTasks(kernels, batch.views);

  const size_t n_threads = static_cast<size_t>(Threads());
  const size_t angle_floats = AngleFloats(batch), latest_floats = LatestFloats(batch);
  const size_t probability_floats = ProbabilityFloats(batch.views);
  WorkMemory& memory = WorkMemory::OfThread();
  float* const angles = memory.Floats(angle_floats + latest_floats + probability_floats + plan.partial_floats +
                                      plan.scratch_floats * n_threads);
  float* const latest = angles + angle_floats;
  float* const probabilities = latest + latest_floats;
  float* const partials = probabilities + probability_floats;
  float* const scratch = partials + plan.partial_floats;

  PlaceAngles(batch, memory.rotations, angles, scratch, plan.scratch_floats);
  PlaceLatest(batch, latest);
  PlaceProbabilities(batch.views, probabilities);
  RunTasks(kernels, plan, batch.views, partials, scratch);
}

void ColumnSums(std::span<const ColumnSumJob> jobs) {
  if (jobs.empty()) return;
  std::vector<const AttentionJob*> list;
  for (const ColumnSumJob& job : jobs) list.push_back(&job.attention);
  const AttentionKernels& kernels = Kernels();
  Batch batch = MakeBatch(std::move(list));
  const Plan plan = PlanColumns(kernels, batch.views);
  for (size_t j = 0; j < jobs.size(); ++j) {
    CHECK((jobs[j].lse && jobs[j].sums) || batch.views[j].n_queries == 0 || batch.views[j].n_rows == 0);
  }

  const size_t n_threads = static_cast<size_t>(Threads());
  const size_t angle_floats = AngleFloats(batch), latest_floats = LatestFloats(batch);
  WorkMemory& memory = WorkMemory::OfThread();
  float* const angles = memory.Floats(angle_floats + latest_floats + plan.scratch_floats * n_threads);
  float* const latest = angles + angle_floats;
  float* const scratch = latest + latest_floats;
  PlaceAngles(batch, memory.rotations, angles, scratch, plan.scratch_floats);
  PlaceLatest(batch, latest);
  ParallelFor(plan.tasks.size(), [&](size_t t) {
    const Task& task = plan.tasks[t];
    const ColumnSumJob& job = jobs[task.job];
    const ColumnView view = {batch.views[task.job], job.lse, job.first_query, job.weights, job.sums,
                             job.by_head};
    kernels.column_sums(view, task.index, scratch + static_cast<size_t>(ThreadIndex()) * plan.scratch_floats);
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
