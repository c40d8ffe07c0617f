#include "kvcache/codec/csr_store.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>

#include "base/check.h"
#include "base/checked.h"
#include "base/threads.h"
#include "kernels/basic/basic.h"
#include "kernels/quants/half.h"
#include "kvcache/codec/head_job.h"

namespace lesskv {
namespace {

constexpr RowSide kSides[] = {RowSide::kKeys, RowSide::kValues};
constexpr size_t kCodedAtOnce = 48;      // rows a task
constexpr size_t kMostCsrPairs = 128;    // of a row
constexpr float kGuarded = 0.5f;         // relative residuals above it get an atom of their own
constexpr float kWorthAnAtom = 4e-3f;    // below it a vector is an atom already
constexpr double kGuardedAtFirst = 0.75;  // of the places

// Coefficients as halves, to memory of their type and back.
void PutCoefficients(CoefficientType type, std::span<const uint16_t> halves, std::byte* to) {
  if (type == CoefficientType::kF16)
    std::memcpy(to, halves.data(), halves.size_bytes());
  else
    for (size_t i = 0; i < halves.size(); ++i) to[i] = std::byte{FloatToE4m3(HalfToFloat(halves[i]))};
}

void GetCoefficients(CoefficientType type, const std::byte* from, std::span<uint16_t> halves) {
  if (type == CoefficientType::kF16)
    std::memcpy(halves.data(), from, halves.size_bytes());
  else
    for (size_t i = 0; i < halves.size(); ++i) halves[i] = E4m3ToHalf(std::to_integer<uint8_t>(from[i]));
}

}  // namespace

// ---- Dictionaries

CsrDictionaries::CsrDictionaries(const SidecarDictionaries& from, size_t n_atoms)
    : head_dim_(from.head_dim), n_atoms_(n_atoms), key_of_(from.key_of), value_of_(from.value_of) {
  const auto take = [&](const std::vector<uint16_t>& halves, size_t dim, std::vector<Dictionary>& out) {
    for (size_t at = 0; at < halves.size(); at += from.n_atoms * dim) {
      const auto begin = halves.begin() + static_cast<ptrdiff_t>(at);
      Dictionary& d = out.emplace_back();
      d.rows.assign(begin, begin + static_cast<ptrdiff_t>(n_atoms * dim));
      d.lanes = AtomLanes(d.rows, dim);
    }
  };
  take(from.keys, head_dim_, keys_);
  take(from.values, head_dim_ / SidecarDictionaries::kValueChunks, values_);
}

size_t CsrDictionaries::Bytes() const {
  size_t halves = 0;
  for (const auto* side : {&keys_, &values_})
    for (const Dictionary& d : *side) halves += d.rows.size() + d.lanes.size();
  return halves * sizeof(uint16_t);
}

// ---- Coded rows of one head

Atoms CsrStore::Head::AllAtoms(RowSide side) const {
  Atoms atoms = formats->Of(side).atoms;
  const Own& own = Of(side);
  atoms.own = {reinterpret_cast<const uint16_t*>(own.memory.data()), nullptr, own.n_own};
  return atoms;
}

CsrStore::Codes CsrStore::Head::At(RowSide side, size_t row) const {
  const size_t pairs = formats->RowPairs(), slot = row % block_rows;
  std::byte* at = const_cast<std::byte*>(blocks[row / block_rows].data());
  if (side == RowSide::kValues) at += block_rows * formats->SideBytes();
  auto* indices = reinterpret_cast<uint16_t*>(at);
  return {indices + slot * pairs, reinterpret_cast<std::byte*>(indices + block_rows * pairs) + slot * formats->CoefficientBytes()};
}

void CsrStore::Head::Decode(RowSide side, size_t first, size_t n, float* out, size_t stride) const {
  const Coding& coding = formats->Of(side);
  const Atoms atoms = AllAtoms(side);
  for (size_t i = 0; i < n; ++i) {
    const Codes codes = At(side, first + i);
    uint16_t coefficients[kMostCsrPairs];
    GetCoefficients(formats->coefficients, codes.coefficients, {coefficients, formats->RowPairs()});
    DecodeAtoms(atoms, coding.pairs, codes.indices, coefficients, coding.n_chunks, out + i * stride, atoms.dim);
  }
}

void CsrStore::Head::ExpandKeys(size_t first, size_t n, float* out, size_t stride) const {
  float rows[kTileRows * kMostAtomChannels];
  const size_t d = formats->exact.keys.head_dim;
  for (size_t i = 0; i < n; i += kTileRows) {
    const size_t count = std::min(kTileRows, n - i);
    Decode(RowSide::kKeys, first + i, count, rows, d);
    for (size_t c = 0; c < d; ++c)
      for (size_t r = 0; r < count; ++r) out[c * stride + i + r] = rows[r * d + c];
  }
}

void CsrStore::Head::ExpandValues(size_t first, size_t n, float* out, size_t stride) const {
  Decode(RowSide::kValues, first, n, out, stride);
}

// ---- Room

CsrStore::CsrStore(ByteCounter& counter, const StoreShape& shape, const CsrOptions& options,
                   std::shared_ptr<const CsrDictionaries> dictionaries)
    : counter_(&counter),
      shape_(shape),
      options_(options),
      dictionaries_(std::move(dictionaries)),
      table_(shape.layers),
      heads_(table_.size()),
      staging_(shape.layers, RowType::kF16, RowType::kF16) {
  for (size_t l = 0; l < shape.layers.size(); ++l) {
    const LayerShape& layer = shape.layers[l];
    constexpr size_t kChunks = SidecarDictionaries::kValueChunks;
    formats_.push_back({{RowType::kF16, RowType::kF16, layer.head_dim},
                        {dictionaries_->Keys(l), 1, options.pairs},
                        {dictionaries_->Values(l), kChunks, options.pairs / kChunks},
                        options.coefficients});
  }
  CHECK(options.pairs <= kMostCsrPairs, "{} pairs a row", options.pairs);
  for (size_t i = 0; i < heads_.size(); ++i) {
    heads_[i].formats = &formats_[table_.LayerOf(i)];
    if (shape.grows) heads_[i].block_rows = kCsrBlockRows;
  }
}

// A window of another size with the same rows, the oldest in slot 0.
void CsrStore::ResizeWindow(Head& head, size_t rows) {
  if (head.window.rows == rows) return;
  const ExactFormats& f = head.formats->exact;
  ExactRows window = ExactRows::Make(*counter_, f, rows);
  for (const RowSide side : kSides) CopyRing(f, side, head.window, head.first_exact, head.n_exact, window);
  head.window = std::move(window);
  head.first_exact = 0;
}

// A bounded head's only block, with the same coded rows.
void CsrStore::ResizeArena(Head& head, size_t rows) {
  if (head.block_rows == rows && !head.blocks.empty()) return;
  Head resized;
  resized.formats = head.formats;
  resized.block_rows = rows;
  resized.blocks.emplace_back(*counter_, rows * head.formats->RowBytes());
  const size_t kept = head.blocks.empty() ? 0 : std::min(rows, head.n_coded);
  for (const RowSide side : kSides) {
    if (kept == 0 || resized.blocks[0].data() == nullptr) break;
    const Codes from = head.At(side, 0), to = resized.At(side, 0);
    std::memcpy(to.indices, from.indices, kept * head.formats->RowPairs() * sizeof(uint16_t));
    std::memcpy(to.coefficients, from.coefficients, kept * head.formats->CoefficientBytes());
  }
  head.blocks = std::move(resized.blocks);
  head.block_rows = rows;
}

void CsrStore::Grow(Head& head, size_t rows) {
  while (head.Capacity() < rows) head.blocks.emplace_back(*counter_, head.block_rows * head.formats->RowBytes());
}

// Gives back blocks without coded rows.
void CsrStore::Trim(Head& head) {
  while (!head.blocks.empty() && head.Capacity() - head.block_rows >= head.n_coded) head.blocks.pop_back();
}

// Their size does not depend on the text, so that a plan knows it.
void CsrStore::ReserveOwn(Head& head) {
  for (const RowSide side : kSides)
    if (Own& own = head.Of(side); own.memory.size() == 0)
      own.memory = CountedBuffer(*counter_, options_.own() * head.formats->Of(side).atoms.dim * sizeof(uint16_t));
}

void CsrStore::ReserveHead(size_t i, const StepRoom& room) {
  Head& head = heads_[i];
  const size_t window = WindowOf(i), all = head.n_rows() + room.n_step;
  if (options_.own() > 0) ReserveOwn(head);
  if (options_.window > 0) ResizeWindow(head, std::max(head.window.rows, RoundUp(window, kTileRows)));
  if (!shape_.grows) {
    if (head.Capacity() < budgets_[i]) ResizeArena(head, budgets_[i]);
  } else if (room.evicts) {
    Grow(head, std::min(all, std::max(head.n_rows(), budgets_[i])));
  } else {
    const size_t exact = head.n_exact + room.n_step;
    Grow(head, head.n_coded + exact - std::min(exact, window));
  }
}

void CsrStore::Reserve(const StepRoom& room) {
  CHECK(!room.defers && !room.budgets_later, "csr knows its rows before a prompt");
  const std::vector<size_t> before = budgets_;
  for (Head& head : heads_) {
    head.rows_before = head.blocks.empty() ? 0 : head.block_rows;
    head.window_before = head.window.rows;
  }
  try {
    budgets_.assign(room.budgets.begin(), room.budgets.end());
    for (size_t i = 0; i < heads_.size(); ++i) ReserveHead(i, room);
    staging_.Reserve(*counter_, room.n_step, false);
  } catch (...) {
    budgets_ = before;
    CancelStep();
    throw;
  }
  n_step_ = room.n_step;
  evicts_ = room.evicts;
  is_prompt_ = room.is_prompt;
  has_open_ = false;
}

void CsrStore::SetBudgets(size_t, std::span<const size_t>) { CHECK(false, "csr knows its rows before a prompt"); }

// Without memory for a smaller copy the larger one stays, which the next step uses.
void CsrStore::CancelStep() {
  const bool has_rows = std::any_of(heads_.begin(), heads_.end(), [](const Head& head) { return head.n_rows() > 0; });
  for (Head& head : heads_) {
    for (const RowSide side : kSides)
      if (!has_rows) head.Of(side) = Own{};
    try {
      if (shape_.grows)
        Trim(head);
      else if (head.rows_before == 0)
        head.blocks.clear(), head.block_rows = 0;
      else
        ResizeArena(head, head.rows_before);
      if (head.window_before == 0)
        head.window = ExactRows{};
      else
        ResizeWindow(head, head.window_before);
    } catch (const std::exception&) {
    }
  }
  staging_.Free();
  n_step_ = 0;
}

void CsrStore::EndStep() {
  CodeLayer();
  for (size_t i = 0; i < heads_.size(); ++i) {
    if (shape_.grows)
      Trim(heads_[i]);
    else if (evicts_)
      ResizeArena(heads_[i], budgets_[i]);
    if (evicts_ && options_.window > 0) ResizeWindow(heads_[i], RoundUp(WindowOf(i), kTileRows));
  }
  if (is_prompt_) staging_.Free();
  n_step_ = 0;
}

std::unique_ptr<KvStore> CsrStore::Clone(ByteCounter& counter) const {
  auto copy = std::make_unique<CsrStore>(counter, shape_, options_, dictionaries_);
  copy->budgets_ = budgets_;
  for (size_t i = 0; i < heads_.size(); ++i) {
    const Head& from = heads_[i];
    Head& to = copy->heads_[i];
    for (size_t b = 0; b < from.blocks.size(); ++b)
      to.blocks.push_back(b < SettledBlocks(from) ? from.blocks[b].Share(counter) : from.blocks[b].Clone(counter));
    to.block_rows = from.block_rows;
    to.n_coded = from.n_coded;
    to.n_exact = from.n_exact;
    to.first_exact = from.first_exact;
    to.window = from.window.Clone(counter);
    for (const RowSide side : kSides)
      to.Of(side) = {from.Of(side).memory.Clone(counter), from.Of(side).n_own, from.Of(side).n_sampled};
  }
  copy->staging_.CopyFrom(staging_, counter);
  return copy;
}

void CsrStore::AddShareable(std::vector<SharedPart>& parts) const {
  for (const Head& head : heads_)
    for (size_t b = 0; b < SettledBlocks(head); ++b) parts.push_back({head.blocks[b].data(), head.blocks[b].size()});
}

size_t CsrStore::SlackBytes(std::span<const size_t> budgets) const {
  size_t bytes = 0;
  for (size_t i = 0; i < heads_.size(); ++i) {
    const Head& head = heads_[i];
    const size_t needed = std::max(head.n_coded, budgets.empty() ? 0 : budgets[i]);
    bytes += (head.Capacity() - std::min(head.Capacity(), needed)) * head.formats->RowBytes();
  }
  return bytes;
}

// ---- Steps

void CsrStore::Append(size_t layer, size_t first, size_t n, const float* keys, const float* values) {
  if (first == 0) {  // the staging area is the next layer's
    CodeLayer();
    has_open_ = true;
    open_layer_ = layer;
    open_.resize(Layer(layer).n_kv_heads);
  }
  WriteExact(formats_[layer].exact, Layer(layer), first, n, keys, values,
             [&](size_t h) -> const ExactRows& { return Staging(h); });
}

AttentionJob CsrStore::Job(const StoreQuery& query, size_t kv_head, JobList& list) const {
  const LayerShape& layer = Layer(query.layer);
  const Head& head = At(query.layer, kv_head);
  const Formats& f = *head.formats;
  const size_t n_step = query.first_query + query.n_queries;
  const size_t straight = std::min(head.n_exact, head.window.rows - head.first_exact);
  std::vector<RowSpan>* sides[] = {&list.NewSpans(), &list.NewSpans()};
  for (const RowSide side : kSides) {
    std::vector<RowSpan>& spans = *sides[side == RowSide::kKeys ? 0 : 1];
    const RowFormat& format = f.exact.Of(side);
    spans.push_back({format, nullptr, 0, head.n_coded, &head});
    spans.push_back({format, head.window.Region(f.exact, side), head.first_exact, straight});
    spans.push_back({format, head.window.Region(f.exact, side), 0, head.n_exact - straight});
    spans.push_back({format, Staging(kv_head).Region(f.exact, side), 0, n_step});
  }
  AttentionJob job = HeadJob(query, layer, kv_head, shape_.compute);
  job.keys = *sides[0];
  job.values = *sides[1];
  job.n_past = head.n_rows() + query.first_query;
  return job;
}

void CsrStore::AddJobs(const StoreQuery& query, JobList& list) const {
  for (size_t h = 0; h < Layer(query.layer).n_kv_heads; ++h) list.jobs.push_back(Job(query, h, list));
}

void CsrStore::ReadExact(const Head& head, size_t kv_head, RowSide side, size_t n_exact, size_t row, float* out) const {
  const Formats& f = *head.formats;
  const bool own = row >= n_exact;
  const ExactRows& from = own ? Staging(kv_head) : head.window;
  const size_t slot = own ? row - n_exact : (head.first_exact + row) % from.rows;
  lesskv::ReadRows(f.exact.Of(side), from.Region(f.exact, side), slot, 1, out, f.exact.keys.head_dim);
}

void CsrStore::ReadRows(size_t layer, size_t kv_head, std::span<const uint32_t> rows, float* keys,
                        float* values) const {
  const Head& head = At(layer, kv_head);
  const size_t d = Layer(layer).head_dim;
  for (size_t i = 0; i < rows.size(); ++i)
    for (const RowSide side : kSides) {
      float* out = (side == RowSide::kKeys ? keys : values) + i * d;
      if (rows[i] < head.n_coded)
        head.Decode(side, rows[i], 1, out, d);
      else
        ReadExact(head, kv_head, side, head.n_exact, rows[i] - head.n_coded, out);
    }
}

std::span<const uint16_t> CsrStore::Indices(size_t layer, size_t kv_head, RowSide side, size_t row) const {
  return {At(layer, kv_head).At(side, row).indices, options_.pairs};
}

// Coded rows move at once, what is to be coded waits in open_.
SlotMap CsrStore::Close(size_t layer, size_t kv_head, std::span<const Departure> leaving) {
  Head& head = At(layer, kv_head);
  const size_t was_coded = head.n_coded, all = head.n_rows() + n_step_, window = WindowOf(table_(layer, kv_head));
  CHECK(evicts_ || leaving.empty(), "{} rows leave in a step that evicts nothing", leaving.size());
  const bool first_step = all == n_step_ && head.Of(RowSide::kKeys).n_own + head.Of(RowSide::kValues).n_own == 0;
  Open open{was_coded, head.n_exact, first_step, {}, {}, {}};
  size_t next = 0;
  while (next < leaving.size() && leaving[next].row < was_coded) ++next;
  const std::span<const Departure> coded_leaving = leaving.first(next);
  for (size_t row = was_coded; row < all; ++row) {
    if (next < leaving.size() && leaving[next].row == row)
      ++next;
    else
      open.rows.push_back(static_cast<uint32_t>(row));
  }
  const size_t n_code = open.rows.size() - std::min(open.rows.size(), window);
  SlotMap map = PlanCompaction(was_coded, n_code, coded_leaving);
  map.at_once = options_.window > 0;
  const size_t n_coded = map.n_rows;
  open.slots.resize(n_code);
  for (RowMove& move : map.moves) {
    if (move.from >= was_coded) {
      open.slots[move.from - was_coded] = move.to;
      move.from = open.rows[move.from - was_coded];
      continue;
    }
    for (const RowSide side : kSides) {
      if (counter_->only_counts) break;
      const Codes from = head.At(side, move.from), to = head.At(side, move.to);
      std::copy_n(from.indices, options_.pairs, to.indices);
      std::copy_n(from.coefficients, head.formats->CoefficientBytes(), to.coefficients);
    }
  }
  for (size_t j = n_code; j < open.rows.size(); ++j)
    map.moves.push_back({open.rows[j], static_cast<uint32_t>(n_coded + j - n_code)});
  map.n_rows = n_coded + open.rows.size() - n_code;
  head.n_coded = n_coded;
  head.n_exact = map.n_rows - n_coded;
  if (!counter_->only_counts) open_[kv_head] = std::move(open);
  return map;
}

// ---- Coding

// Codes what the closed layer left open.
void CsrStore::CodeLayer() {
  if (!has_open_) return;
  has_open_ = false;
  struct Task {
    size_t kv_head, first, n;
  };
  std::vector<Task> tasks;
  const size_t n_kv = Layer(open_layer_).n_kv_heads;
  for (size_t h = 0; h < n_kv; ++h) {
    Head& head = At(open_layer_, h);
    Open& open = open_[h];
    if (open.first_step && options_.sample > 0) TakeSample(head, h);
    const size_t n = open.slots.size();
    if (options_.guard > 0)
      for (const RowSide side : kSides) open.residuals[side == RowSide::kValues].resize(n * head.formats->Of(side).n_chunks);
    for (size_t first = 0; first < n; first += kCodedAtOnce) tasks.push_back({h, first, std::min(kCodedAtOnce, n - first)});
  }
  ParallelFor(tasks.size(), [&](size_t t) {
    CodeRows(At(open_layer_, tasks[t].kv_head), tasks[t].kv_head, tasks[t].first, tasks[t].n);
  });
  ParallelFor(n_kv, [&](size_t h) {
    Head& head = At(open_layer_, h);
    if (options_.guard > 0) FillGuard(head, h);
    KeepExact(head, h);
  });
  open_ = {};
}

bool CsrStore::AddAtom(Head& head, RowSide side, const float* x) const {
  Own& own = head.Of(side);
  const size_t dim = head.formats->Of(side).atoms.dim;
  const float length = std::sqrt(Dot(x, x, dim));
  if (own.n_own >= options_.own() || !(length > 0) || !std::isfinite(length)) return false;
  auto* atom = reinterpret_cast<uint16_t*>(own.memory.data()) + own.n_own * dim;
  for (size_t c = 0; c < dim; ++c) atom[c] = FloatToHalf(x[c] / length);
  ++own.n_own;
  return true;
}

// The last vectors of the step, whether they stay or not.
void CsrStore::TakeSample(Head& head, size_t kv_head) {
  std::vector<float> row(head.formats->exact.keys.head_dim);
  for (const RowSide side : kSides) {
    const Coding& coding = head.formats->Of(side);
    const size_t n = std::min(n_step_, options_.sample / coding.n_chunks);
    for (size_t i = n_step_ - n; i < n_step_; ++i) {
      ReadExact(head, kv_head, side, 0, i, row.data());
      for (size_t chunk = 0; chunk < coding.n_chunks; ++chunk) AddAtom(head, side, &row[chunk * coding.atoms.dim]);
    }
    head.Of(side).n_sampled = head.Of(side).n_own;
  }
}

void CsrStore::CodeRows(Head& head, size_t kv_head, size_t first, size_t n) {
  const size_t d = head.formats->exact.keys.head_dim, pairs = options_.pairs;
  std::vector<float> rows(n * d);
  std::vector<uint16_t> indices(n * pairs), coefficients(n * pairs);
  const Open& open = open_[kv_head];
  for (const RowSide side : kSides) {
    const Coding& coding = head.formats->Of(side);
    for (size_t i = 0; i < n; ++i)
      ReadExact(head, kv_head, side, open.was_exact, open.rows[first + i] - open.was_coded, &rows[i * d]);
    std::vector<float>& residuals = open_[kv_head].residuals[side == RowSide::kValues];
    EncodeAtoms(head.AllAtoms(side), coding.pairs, rows.data(), n * coding.n_chunks, coding.atoms.dim, indices.data(),
                coefficients.data(), residuals.empty() ? nullptr : &residuals[first * coding.n_chunks], options_.coefficients);
    for (size_t i = 0; i < n; ++i) {
      const Codes to = head.At(side, open.slots[first + i]);
      std::copy_n(&indices[i * pairs], pairs, to.indices);
      PutCoefficients(options_.coefficients, {&coefficients[i * pairs], pairs}, to.coefficients);
    }
  }
}

// Gives the vector of a code an atom of its own, if there is room, and codes it again.
void CsrStore::CodeAgain(Head& head, size_t kv_head, RowSide side, size_t at) {
  const Coding& coding = head.formats->Of(side);
  const Open& open = open_[kv_head];
  const size_t row = at / coding.n_chunks, chunk = at % coding.n_chunks;
  std::vector<float> x(head.formats->exact.keys.head_dim);
  ReadExact(head, kv_head, side, open.was_exact, open.rows[row] - open.was_coded, x.data());
  const float* vector = &x[chunk * coding.atoms.dim];
  if (!AddAtom(head, side, vector)) return;
  const Codes to = head.At(side, open.slots[row]);
  std::vector<uint16_t> coefficients(coding.pairs);
  EncodeAtoms(head.AllAtoms(side), coding.pairs, vector, 1, coding.atoms.dim, to.indices + chunk * coding.pairs,
              coefficients.data(), nullptr, options_.coefficients);
  PutCoefficients(options_.coefficients, coefficients, to.coefficients + chunk * head.formats->CoefficientBytes() / coding.n_chunks);
}

void CsrStore::FillGuard(Head& head, size_t kv_head) {
  const bool first_step = open_[kv_head].first_step;
  for (const RowSide side : kSides) {
    const std::vector<float>& residuals = open_[kv_head].residuals[side == RowSide::kValues];
    const Own& own = head.Of(side);
    const size_t room = options_.guard - std::min(options_.guard, own.n_own - own.n_sampled);
    std::vector<size_t> worst;
    const float bound = first_step ? kWorthAnAtom : kGuarded;
    for (size_t i = 0; i < residuals.size(); ++i)
      if (residuals[i] > bound) worst.push_back(i);
    if (first_step)
      std::stable_sort(worst.begin(), worst.end(), [&](size_t a, size_t b) { return residuals[a] > residuals[b]; });
    const auto most = first_step ? static_cast<size_t>(kGuardedAtFirst * static_cast<double>(options_.guard)) : room;
    worst.resize(std::min({worst.size(), most, room}));
    for (const size_t at : worst) CodeAgain(head, kv_head, side, at);
  }
}

// The exact rows that stay, in the order they came: the oldest leave the ring, the step's enter it.
void CsrStore::KeepExact(Head& head, size_t kv_head) {
  const Open& open = open_[kv_head];
  const Formats& f = *head.formats;
  const auto n_code = open.slots.size();
  if (head.n_exact == 0) {
    head.first_exact = 0;
    return;
  }
  // While none of the ring's rows but the oldest leave, they stay where they are.
  const size_t from_ring = static_cast<size_t>(
      std::lower_bound(open.rows.begin(), open.rows.end(), open.was_coded + open.was_exact) - open.rows.begin());
  const size_t stay = from_ring - std::min(from_ring, n_code);
  const size_t old = head.first_exact, first = stay == 0 ? 0 : (old + open.was_exact - stay) % head.window.rows;
  const bool packed = stay == 0 || open.rows[n_code] == open.was_coded + open.was_exact - stay;
  if (packed) head.first_exact = first;
  for (const RowSide side : kSides)
    for (size_t j = packed ? stay : 0; j < head.n_exact; ++j) {
      const size_t from = open.rows[n_code + j] - open.was_coded, to = (head.first_exact + j) % head.window.rows;
      std::byte* const ring = head.window.Region(f.exact, side);
      if (from >= open.was_exact)
        CopyRow(f.exact.Of(side), Staging(kv_head).Region(f.exact, side), from - open.was_exact, ring, to);
      else if ((old + from) % head.window.rows != to)
        CopyRow(f.exact.Of(side), ring, (old + from) % head.window.rows, ring, to);
    }
}

// ---- Saved state

void CsrStore::Save(ByteWriter& out) const {
  for (size_t i = 0; i < heads_.size(); ++i) {
    const Head& head = heads_[i];
    const size_t kv_head = i - table_(table_.LayerOf(i), 0), pairs = options_.pairs;
    out.Put<uint64_t>(head.n_coded);
    out.Put<uint64_t>(head.n_exact);
    for (const RowSide side : kSides) {
      const Own& own = head.Of(side);
      out.Put<uint64_t>(own.n_own);
      out.Put<uint64_t>(own.n_sampled);
      out.Raw(own.memory.data(), own.n_own * head.formats->Of(side).atoms.dim * sizeof(uint16_t));
      for (size_t row = 0; row < head.n_coded; ++row) {
        const Codes codes = head.At(side, row);
        out.Raw(codes.indices, pairs * sizeof(uint16_t));
        out.Raw(codes.coefficients, head.formats->CoefficientBytes());
      }
      std::vector<float> row(head.formats->exact.keys.head_dim);
      for (size_t r = 0; r < head.n_exact; ++r) {
        ReadExact(head, kv_head, side, head.n_exact, r, row.data());
        for (const float x : row) out.Put<uint16_t>(FloatToHalf(x));
      }
    }
  }
}

void CsrStore::Load(ByteReader& in, std::span<const size_t> budgets, size_t max_rows) {
  if (std::any_of(budgets.begin(), budgets.end(), [](size_t rows) { return rows > 0; }))
    budgets_.assign(budgets.begin(), budgets.end());
  for (size_t i = 0; i < heads_.size(); ++i) LoadHead(i, in, shape_.grows ? max_rows : budgets[i], max_rows > 0);
}

// `begun`: it has seen rows, of which none need be left.
void CsrStore::LoadHead(size_t i, ByteReader& in, size_t most_rows, bool begun) {
  Head& head = heads_[i];
  const Formats& f = *head.formats;
  const size_t n_coded = in.Count(most_rows, "a head's number of coded rows");
  const size_t n_exact = in.Count(std::min(most_rows - n_coded, WindowOf(i)), "a head's number of exact rows");
  if (shape_.grows)
    Grow(head, n_coded);
  else if (most_rows > 0)
    ResizeArena(head, most_rows);
  if (begun && options_.own() > 0) ReserveOwn(head);
  if (begun && options_.window > 0) ResizeWindow(head, RoundUp(WindowOf(i), kTileRows));
  head.n_coded = n_coded;
  std::vector<float> row(f.exact.keys.head_dim);
  for (const RowSide side : kSides) {
    Own& own = head.Of(side);
    own.n_own = in.Count(begun ? options_.own() : 0, "a head's number of atoms");
    own.n_sampled = in.Count(std::min(own.n_own, options_.sample), "a head's number of sampled atoms");
    if (own.n_own - own.n_sampled > options_.guard)
      Fail(ErrorCode::kBadFile, "saved cache: a guard of {} atoms, {} are possible", own.n_own - own.n_sampled, options_.guard);
    LoadOwn(head, side, in);
    LoadCodes(head, side, in);
    for (size_t r = 0; r < n_exact; ++r) {
      for (float& x : row) x = HalfToFloat(in.Get<uint16_t>());
      WriteRows(f.exact.Of(side), head.window.Region(f.exact, side), r, 1, row.data(), row.size());
    }
  }
  head.n_exact = n_exact;
}

void CsrStore::LoadOwn(Head& head, RowSide side, ByteReader& in) const {
  Own& own = head.Of(side);
  const size_t dim = head.formats->Of(side).atoms.dim;
  in.Raw(own.memory.data(), own.n_own * dim * sizeof(uint16_t));
  const std::span<const uint16_t> halves = std::as_const(own.memory).As<uint16_t>();
  for (size_t i = 0; i < own.n_own; ++i) {
    double square = 0;
    for (size_t c = 0; c < dim; ++c) square += std::pow(HalfToFloat(halves[i * dim + c]), 2);
    if (!(std::fabs(square - 1) < 0.01)) Fail(ErrorCode::kBadFile, "saved cache: an atom has length {}", std::sqrt(square));
  }
}

void CsrStore::LoadCodes(Head& head, RowSide side, ByteReader& in) const {
  const size_t n_atoms = head.AllAtoms(side).size();
  for (size_t row = 0; row < head.n_coded; ++row) {
    const Codes codes = head.At(side, row);
    in.Raw(codes.indices, options_.pairs * sizeof(uint16_t));
    in.Raw(codes.coefficients, head.formats->CoefficientBytes());
    for (size_t g = 0; g < options_.pairs; ++g)
      if (codes.indices[g] >= n_atoms)
        Fail(ErrorCode::kBadFile, "saved cache: a code names atom {} of {}", codes.indices[g], n_atoms);
  }
}

}  // namespace lesskv
