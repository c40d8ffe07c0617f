#include "kernels/linear/linear.h"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <numeric>

#include "base/check.h"
#include "base/checked.h"
#include "base/threads.h"
#include "kernels/basic/cpu.h"
#include "kernels/linear/linear_kernels.h"
#include "kernels/quants/quants.h"

namespace lesskv {
namespace {

using internal::Int8Activations;
using internal::Int8Kernels;
using internal::Int8Panel;
using internal::Int8Range;
using internal::kKernelTokens;
using internal::kMaxTileRows;
using internal::kTokenLanes;
using internal::LinearKernels;
using internal::RowBlock;
using internal::TileShape;

constexpr size_t kMaxPackedTokens = 512;   // activations packed at once; longer calls unpack the weights again
constexpr size_t kTaskBytes = 1 << 20;    // weights a task of the few-token path reads: what is fetched ahead beyond its end is lost

const LinearKernels& Kernels([[maybe_unused]] size_t n_in) {
  switch (ActiveIsa()) {
#if defined(__x86_64__)
    case Isa::kAvx2:
      return internal::Avx2LinearKernels();
    case Isa::kAvxVnni:
      return internal::AvxVnniLinearKernels();
    case Isa::kAvx512:
      return internal::Avx512LinearKernels();
    case Isa::kAvx512Bf16:
      return internal::Avx512Bf16LinearKernels();
    case Isa::kAmx:
      // Rows that do not fill its tiles go the other way.
      return n_in % internal::AmxLinearKernels().shape_bf16.multiple == 0 ? internal::AmxLinearKernels()
                                                                          : internal::Avx512Bf16LinearKernels();
#elif defined(__aarch64__)
    case Isa::kNeon:
      return internal::NeonLinearKernels();
    case Isa::kDotprod:
      return internal::DotprodLinearKernels();
#endif
    default:
      return internal::ScalarLinearKernels();
  }
}

// Memory that grows to the largest size asked for and stays: products come thousands of times a second.
class Workspace {
 public:
  template <typename T>
  T* Get(size_t count) {
    const size_t bytes = RoundUp(count * sizeof(T), kAlignment);
    if (bytes > size_) {
      data_.reset();
      data_.reset(static_cast<char*>(::operator new (bytes, std::align_val_t{kAlignment})));
      size_ = bytes;
    }
    return reinterpret_cast<T*>(data_.get());
  }

 private:
  static constexpr size_t kAlignment = 64;
  struct Free {
    void operator()(char* data) const { ::operator delete (data, std::align_val_t{kAlignment}); }
  };
  std::unique_ptr<char, Free> data_;
  size_t size_ = 0;
};

bool IsQuantized(DType type) { return Traits(type).block_elements > 1; }

// Some tokens times matrices of one type and length of rows.
struct Call {
  const LinearKernels& kernels;
  std::span<const LinearTerm> terms;
  const float* x;
  size_t x_stride;
  size_t n_tokens;
  size_t first_token = 0;  // of the terms' y

  DType type() const { return terms[0].w.type; }
  size_t n_in() const { return terms[0].w.n_in; }
  size_t row_bytes() const { return RowBytes(type(), n_in()); }
  size_t MostRows() const {
    size_t most = 0;
    for (const LinearTerm& term : terms) most = std::max(most, term.w.n_out);
    return most;
  }
};

// What a task multiplies: some rows of one of the matrices.
struct Part {
  RowBlock rows;
  float* y;  // of the first of them and the call's first token
  size_t y_stride;

  RowBlock Rows(size_t first, size_t count) const {
    return {rows.type, rows.rows + first * rows.row_bytes, rows.row_bytes, count, rows.n};
  }
};

// Calls body(part) for all rows in one region, step(n_out) rows of a matrix at a time.
template <typename Step, typename Body>
void ForParts(const Call& call, Step&& step, Body&& body) {
  size_t n_tasks = 0;
  for (const LinearTerm& term : call.terms) n_tasks += CeilDiv(term.w.n_out, step(term.w.n_out));
  ParallelFor(n_tasks, [&](size_t task) {
    const LinearTerm* term = call.terms.data();
    size_t own = 0;
    for (; task >= (own = CeilDiv(term->w.n_out, step(term->w.n_out))); ++term) task -= own;
    const size_t rows = step(term->w.n_out), first = task * rows, row_bytes = call.row_bytes();
    const auto* data = static_cast<const uint8_t*>(term->w.data) + first * row_bytes;
    body(Part{{call.type(), data, row_bytes, std::min(rows, term->w.n_out - first), call.n_in()},
              term->y + call.first_token * term->y_stride + first, term->y_stride});
  });
}

// --- Few tokens ---

// Calls body(part); a task takes enough bytes to stream, and few enough that the threads finish together.
template <typename Body>
void ForFewTokensParts(const Call& call, Body&& body) {
  const size_t by_bytes = std::max<size_t>(1, kTaskBytes / call.row_bytes());
  ForParts(call, [&](size_t n_out) { return std::clamp<size_t>(CeilDiv(n_out, 16), 1, by_bytes); }, body);
}

void FewTokensF32(const Call& call) {
  ForFewTokensParts(call, [&](const Part& part) {
    call.kernels.dot_f32(part.rows, call.x, call.x_stride, call.n_tokens, part.y, part.y_stride);
  });
}

// Elements of a token that are multiplied exactly (Int8Activations). Measured on SmolLM2-135M (Q4_1): without them the
// mean divergence from float32 is 3.1e-3 nats, with n / 256 of them 1.0e-3, n / 128 6.1e-4, n / 64 4.2e-4; n / 128 take
// 10 to 25 % of the time of a product of many tokens.
size_t Spikes(size_t n) { return CeilDiv(n, internal::kElementsOfSpike); }

size_t Int8Padded(size_t n) { return RoundUp(n + 32 * Spikes(n), 256); }

size_t Int8Bytes(size_t n, size_t n_tokens) {
  const size_t count = Int8Padded(n) * n_tokens;
  return count + count * 4 / 4 + count * 4 / 16 + count * 4 / 16 + count * 4 / 32;
}

Int8Activations CarveInt8(char* data, size_t n, size_t n_tokens, bool spikes) {
  const size_t count = Int8Padded(n) * n_tokens;
  Int8Activations out;
  out.n_padded = spikes ? Int8Padded(n) : RoundUp(n, 256);
  out.n_spikes = spikes ? Spikes(n) : 0;
  out.q = reinterpret_cast<int8_t*>(data);
  out.init = reinterpret_cast<int32_t*>(data + count);
  out.scale = reinterpret_cast<float*>(data + count * 2);
  out.sum = out.scale + count / 16;
  out.spike = reinterpret_cast<uint32_t*>(out.sum + count / 16);
  return out;
}

// A kernel takes kKernelTokens at most. More pass in shares of about equal size, one after the other over the rows of a
// task, which the first share has brought into the cache.
void FewTokensInt8(const Call& call) {
  constexpr size_t kMaxShares = CeilDiv(kMostFewTokens, kKernelTokens);
  thread_local Workspace workspace;
  const size_t n = call.n_in();
  const size_t n_shares = CeilDiv(call.n_tokens, kKernelTokens), share = CeilDiv(call.n_tokens, n_shares);
  char* data = workspace.Get<char>(n_shares * Int8Bytes(n, share));
  Int8Activations q[kMaxShares];
  for (size_t s = 0; s < n_shares; ++s)
    q[s] = CarveInt8(data + s * Int8Bytes(n, share), n, share, call.kernels.dots_take_spikes);
  for (size_t t = 0; t < call.n_tokens; ++t) {
    call.kernels.quantize(call.type(), call.x + t * call.x_stride, n, t % share, q[t / share]);
  }
  ForFewTokensParts(call, [&](const Part& part) {
    for (size_t s = 0; s < n_shares; ++s) {
      call.kernels.dot_int8(part.rows, q[s], std::min(share, call.n_tokens - s * share),
                            part.y + s * share * part.y_stride, part.y_stride);
    }
  });
}

// --- Many tokens ---

// How a tile works on elements of one kind; "units" are what a tile counts along a row: floats, or bfloat16 pairs.
struct TileF32 {
  using Element = float;
  static constexpr size_t kUnitElements = 1;
  static void Unpack(const LinearKernels& k, const RowBlock& block, float* out, size_t stride) {
    k.unpack_f32(block, out, stride);
  }
  static void Pack(const LinearKernels& k, const float* x, size_t x_stride, size_t n_tokens, size_t n, size_t vectors,
                   float* out) {
    k.pack_f32(x, x_stride, n_tokens, n, vectors, out);
  }
  static void Tile(const LinearKernels& k, const float* const* rows, size_t units, const float* group, size_t vectors,
                   float* acc, bool first) {
    k.tile_f32(rows, units, group, vectors, acc, first);
  }
  static const TileShape& Shape(const LinearKernels& k) { return k.shape_f32; }
};

struct TileBf16 {
  using Element = uint16_t;
  static constexpr size_t kUnitElements = 2;
  static void Unpack(const LinearKernels& k, const RowBlock& block, uint16_t* out, size_t stride) {
    k.unpack_bf16(block, out, stride);
    if (block.n % 2 == 0) return;
    for (size_t r = 0; r < block.n_rows; ++r) out[r * stride + block.n] = 0;
  }
  static void Pack(const LinearKernels& k, const float* x, size_t x_stride, size_t n_tokens, size_t n, size_t vectors,
                   uint16_t* out) {
    k.pack_bf16(x, x_stride, n_tokens, n, vectors, out);
  }
  static void Tile(const LinearKernels& k, const uint16_t* const* rows, size_t units, const uint16_t* group,
                   size_t vectors, float* acc, bool first) {
    k.tile_bf16(rows, units, group, vectors, acc, first);
  }
  static const TileShape& Shape(const LinearKernels& k) { return k.shape_bf16; }
};

// Packed activations: groups of up to group_vectors vectors of tokens, one after the other.
struct Group {
  size_t first_token;
  size_t n_tokens;
  size_t vectors;
};

Group GroupAt(size_t index, size_t n_tokens, size_t group_vectors) {
  const size_t first = index * group_vectors * kTokenLanes;
  const size_t n = std::min(group_vectors * kTokenLanes, n_tokens - first);
  return {first, n, CeilDiv(n, kTokenLanes)};
}

// One task: a part, unpacked in `panel`, times every group.
template <typename Kind>
void MultiplyPanel(const Call& call, const Part& part, const typename Kind::Element* panel, size_t panel_stride,
                   const typename Kind::Element* packed, float* acc) {
  using Element = typename Kind::Element;
  const size_t n_units = CeilDiv(call.n_in(), Kind::kUnitElements), n_rows = part.rows.n_rows;
  const TileShape& shape = Kind::Shape(call.kernels);
  const size_t group_vectors = shape.group_vectors;
  const size_t depth = shape.depth / Kind::kUnitElements;
  for (size_t g = 0; g * group_vectors * kTokenLanes < call.n_tokens; ++g) {
    const Group group = GroupAt(g, call.n_tokens, group_vectors);
    const size_t width = group.vectors * kTokenLanes;
    const size_t tile_rows = shape.rows[group.vectors - 1];
    const Element* x = packed + group.first_token * n_units * Kind::kUnitElements;
    for (size_t unit = 0; unit < n_units; unit += depth) {
      for (size_t row = 0; row < n_rows; row += tile_rows) {
        const Element* rows[kMaxTileRows];
        for (size_t r = 0; r < tile_rows; ++r) {
          rows[r] = panel + std::min(row + r, n_rows - 1) * panel_stride + unit * Kind::kUnitElements;
        }
        Kind::Tile(call.kernels, rows, std::min(depth, n_units - unit), x + unit * width * Kind::kUnitElements,
                   group.vectors, acc + row * width, unit == 0);
      }
    }
    call.kernels.store(acc, width, n_rows, group.n_tokens, part.y + group.first_token * part.y_stride, part.y_stride);
  }
}

// Rows of a task: what fits the panel, and no more than leaves every thread several tasks. A fixed rule, so that the
// split does not depend on the number of threads.
size_t PanelRows(size_t n_in, size_t n_out, size_t element_bytes, const TileShape& shape) {
  const size_t fit = shape.panel_bytes / (n_in * element_bytes) / shape.row_step * shape.row_step;
  const size_t share = RoundUp(CeilDiv(n_out, 8), shape.row_step);
  return std::clamp<size_t>(share, shape.row_step, std::max(fit, shape.row_step));
}

// What a call of at most kMaxPackedTokens works in, in elements; panels and accumulators are a thread's.
template <typename Kind>
struct WorkSizes {
  using Element = typename Kind::Element;
  explicit WorkSizes(const Call& call) {
    const TileShape& shape = Kind::Shape(call.kernels);
    padded = RoundUp(call.n_in(), Kind::kUnitElements);
    group_tokens = shape.group_vectors * kTokenLanes;
    const size_t step = PanelRows(call.n_in(), call.MostRows(), sizeof(Element), shape);
    packed = RoundUp(call.n_tokens, kTokenLanes) * padded;
    // Rows one cache line longer than a power of two: a tile reads many at once, and they must not share a cache set.
    panel_stride = RoundUp(padded * sizeof(Element), 64) / sizeof(Element) + 64 / sizeof(Element);
    panel = step * panel_stride;
    acc = (step + kMaxTileRows) * group_tokens;
  }
  size_t Bytes() const {
    return packed * sizeof(Element) + static_cast<size_t>(Threads()) * (panel * sizeof(Element) + acc * sizeof(float));
  }
  size_t padded, group_tokens, packed, panel_stride, panel, acc;
};

template <typename Kind>
void ManyTokensBlock(const Call& call) {
  using Element = typename Kind::Element;
  const LinearKernels& kernels = call.kernels;
  const WorkSizes<Kind> sizes(call);
  const TileShape& shape = Kind::Shape(kernels);
  thread_local Workspace packed_workspace;
  Element* packed = packed_workspace.Get<Element>(sizes.packed);
  ParallelFor(CeilDiv(call.n_tokens, sizes.group_tokens), [&](size_t g) {
    const Group group = GroupAt(g, call.n_tokens, shape.group_vectors);
    Kind::Pack(kernels, call.x + group.first_token * call.x_stride, call.x_stride, group.n_tokens, call.n_in(),
               group.vectors, packed + group.first_token * sizes.padded);
  });
  thread_local Workspace panel_workspace, acc_workspace;  // a share for each thread
  Element* panels = panel_workspace.Get<Element>(static_cast<size_t>(Threads()) * sizes.panel);
  float* accs = acc_workspace.Get<float>(static_cast<size_t>(Threads()) * sizes.acc);
  const auto step = [&](size_t n_out) { return PanelRows(call.n_in(), n_out, sizeof(Element), shape); };
  ForParts(call, step, [&](const Part& part) {
    const size_t thread = static_cast<size_t>(ThreadIndex());
    Element* panel = panels + thread * sizes.panel;
    Kind::Unpack(kernels, part.rows, panel, sizes.panel_stride);
    MultiplyPanel<Kind>(call, part, panel, sizes.panel_stride, packed, accs + thread * sizes.acc);
  });
}

template <typename Kind>
void ManyTokens(Call call) {
  const size_t n_tokens = call.n_tokens;
  for (size_t t = 0; t < n_tokens; t += kMaxPackedTokens) {
    call.n_tokens = std::min(kMaxPackedTokens, n_tokens - t);
    ManyTokensBlock<Kind>(call);
    call.x += call.n_tokens * call.x_stride;
    call.first_token += call.n_tokens;
  }
}

// --- Many tokens, 8-bit products ---

constexpr size_t kInt8PanelBytes = 192 << 10;  // codes that all tokens of a call pass by: a share of the L2
constexpr size_t kInt8DepthBlocks = 64;        // blocks of 32 codes a group of rows goes on with before the next group
constexpr size_t kInt8TokenBlock = 64;         // tokens that stay in the L2 while the groups of a panel pass by

// What a call of at most kMaxPackedTokens works in; panels are a thread's.
struct Int8Sizes {
  explicit Int8Sizes(const Call& call) : n(call.n_in()), rows(call.kernels.int8->rows) {
    codes = rows * n;
    scales = rows * n / 16;
    group = codes + 2 * scales * sizeof(float);
    panel = TaskRows(call.MostRows()) / rows * group;
  }
  size_t TaskRows(size_t n_out) const {
    const size_t fit = kInt8PanelBytes / n / rows * rows, share = RoundUp(CeilDiv(n_out, 8), rows);
    return std::clamp<size_t>(share, rows, std::max(fit, rows));
  }
  size_t Bytes(size_t n_tokens) const {
    return Int8Bytes(n, n_tokens) + static_cast<size_t>(Threads()) * panel;
  }
  Int8Panel Panel(char* data, size_t index) const {
    char* at = data + index * group;
    auto* scale = reinterpret_cast<float*>(at + codes);
    return {reinterpret_cast<uint8_t*>(at), scale, scale + scales};
  }
  size_t n, rows;                       // elements of a row; rows of a group, which has
  size_t codes, scales, group;          // so many bytes of codes and numbers of scales, in all so many bytes
  size_t panel;                         // bytes of a task's groups
};

// The groups of a panel times all tokens: a group's share of the depth stays in the L1, a block of tokens in the L2.
void MultiplyGroups(const Call& call, const Part& part, const Int8Sizes& sizes, char* panel, const Int8Activations& x) {
  const size_t n_blocks = call.n_in() / 32, n_rows = part.rows.n_rows, row_bytes = part.rows.row_bytes;
  // Memory would rest while a panel is multiplied: the last tokens fetch the part that this thread probably has next.
  const uint8_t* next = part.rows.rows + static_cast<size_t>(Threads()) * n_rows * row_bytes;
  for (size_t t = 0; t < call.n_tokens; t += kInt8TokenBlock) {
    const size_t n_tokens = std::min(kInt8TokenBlock, call.n_tokens - t);
    for (size_t b = 0; b < n_blocks; b += kInt8DepthBlocks) {
      const size_t depth = std::min(kInt8DepthBlocks, n_blocks - b);
      for (size_t row = 0; row < n_rows; row += sizes.rows) {
        const size_t count = std::min(sizes.rows, n_rows - row);
        Int8Range range{b, depth, n_blocks, t, n_tokens};
        if (t + n_tokens == call.n_tokens) {
          range.ahead = next + row * row_bytes;
          range.ahead_bytes = count * row_bytes / n_blocks;
        }
        call.kernels.int8->multiply(call.type(), sizes.Panel(panel, row / sizes.rows), count, x, range,
                                    part.y + t * part.y_stride + row, part.y_stride);
      }
    }
  }
}

void ManyTokensInt8Block(const Call& call) {
  const Int8Kernels& kernels = *call.kernels.int8;
  const Int8Sizes sizes(call);
  thread_local Workspace x_workspace, panel_workspace;  // the panels: a share for each thread
  const Int8Activations x =
      CarveInt8(x_workspace.Get<char>(Int8Bytes(sizes.n, call.n_tokens)), sizes.n, call.n_tokens, true);
  ParallelFor(CeilDiv(call.n_tokens, kKernelTokens), [&](size_t task) {
    const size_t end = std::min(call.n_tokens, (task + 1) * kKernelTokens);
    for (size_t t = task * kKernelTokens; t < end; ++t)
      kernels.quantize(call.type(), call.x + t * call.x_stride, call.n_in(), t, x);
  });
  char* panels = panel_workspace.Get<char>(static_cast<size_t>(Threads()) * sizes.panel);
  ForParts(call, [&](size_t n_out) { return sizes.TaskRows(n_out); }, [&](const Part& part) {
    char* panel = panels + static_cast<size_t>(ThreadIndex()) * sizes.panel;
    for (size_t row = 0; row < part.rows.n_rows; row += sizes.rows) {
      kernels.unpack(part.Rows(row, std::min(sizes.rows, part.rows.n_rows - row)), sizes.Panel(panel, row / sizes.rows));
    }
    MultiplyGroups(call, part, sizes, panel, x);
  });
}

// Without panels the few-token kernel takes all tokens, in turns.
void ManyTokensInt8(Call call) {
  const bool panels = call.kernels.int8 != nullptr;
  const size_t n_tokens = call.n_tokens, most = panels ? kMaxPackedTokens : kMostFewTokens;
  for (size_t t = 0; t < n_tokens; t += most) {
    call.n_tokens = std::min(most, n_tokens - t);
    panels ? ManyTokensInt8Block(call) : FewTokensInt8(call);
    call.x += call.n_tokens * call.x_stride;
    call.first_token += call.n_tokens;
  }
}

}  // namespace

std::string_view ComputeTypeName(ComputeType compute) {
  switch (compute) {
    case ComputeType::kF32: return "f32";
    case ComputeType::kBF16: return "bf16";
    case ComputeType::kInt8: return "int8";
  }
  return "?";
}

ComputeType AutoCompute() {
  switch (ActiveIsa()) {
    case Isa::kAvx2:
    case Isa::kAvxVnni:
    case Isa::kAvx512:
    case Isa::kAvx512Bf16:
    case Isa::kDotprod:
      return ComputeType::kInt8;
    case Isa::kAmx:
      return ComputeType::kBF16;
    default:
      return ComputeType::kF32;
  }
}

bool IsLinearType(DType type) { return IsWeightType(type); }

size_t FewTokens(DType weights, size_t n_in, ComputeType compute) {
  if (compute == ComputeType::kF32) return kKernelTokens;
  const LinearKernels& kernels = Kernels(n_in);
  if (!IsQuantized(weights)) return kernels.few_float;
  if (n_in > kernels.longest_few_int8) return 0;
  if (compute != ComputeType::kInt8 || kernels.int8 == nullptr) return kernels.few_int8;
  return Traits(weights).block_elements == 256 ? kernels.few_panel_256 : kernels.few_panel;
}

size_t LinearWorkBytes(const WeightView& w, size_t n_tokens, ComputeType compute) {
  const LinearTerm term{w, nullptr, 0};
  const Call call{Kernels(w.n_in), {&term, 1}, nullptr, 0, std::min(n_tokens, kMaxPackedTokens)};
  if (n_tokens <= FewTokens(w.type, w.n_in, compute)) return Int8Bytes(w.n_in, RoundUp(n_tokens, 2));
  if (compute == ComputeType::kInt8 && IsQuantized(w.type)) {
    return call.kernels.int8 != nullptr ? Int8Sizes(call).Bytes(call.n_tokens)
                                        : Int8Bytes(w.n_in, RoundUp(kMostFewTokens, 2));
  }
  const bool bf16 = compute != ComputeType::kF32 && call.kernels.tile_bf16 != nullptr;
  return bf16 ? WorkSizes<TileBf16>(call).Bytes() : WorkSizes<TileF32>(call).Bytes();
}

namespace {

void Multiply(const Call& call, ComputeType compute) {
  const bool fast = compute != ComputeType::kF32;
  if (call.n_tokens <= FewTokens(call.type(), call.n_in(), compute)) {
    if (fast && IsQuantized(call.type()))
      FewTokensInt8(call);
    else
      FewTokensF32(call);
  } else if (compute == ComputeType::kInt8 && IsQuantized(call.type())) {
    ManyTokensInt8(call);
  } else if (fast && call.kernels.tile_bf16 != nullptr) {
    ManyTokens<TileBf16>(call);
  } else {
    ManyTokens<TileF32>(call);
  }
}

void CheckTerms(std::span<const LinearTerm> terms, size_t x_stride, size_t n_tokens) {
  for (const LinearTerm& term : terms) {
    const WeightView& w = term.w;
    CHECK(IsLinearType(w.type), "no product with weights of type {}", Traits(w.type).name);
    CHECK(w.n_in > 0, "a weight matrix without columns");
    CHECK(w.n_in == terms[0].w.n_in, "matrices of {} and of {} columns", terms[0].w.n_in, w.n_in);
    CHECK(n_tokens <= 1 || (x_stride >= w.n_in && term.y_stride >= w.n_out), "strides {} and {} of a [{}, {}] matrix",
          x_stride, term.y_stride, w.n_out, w.n_in);
  }
}

// Calls body(terms) for neighbours of one type.
template <typename Body>
void ForTypes(std::span<const LinearTerm> terms, Body&& body) {
  for (size_t first = 0, end = 0; first < terms.size(); first = end) {
    while (end < terms.size() && terms[end].w.type == terms[first].w.type) ++end;
    body(terms.subspan(first, end - first));
  }
}

// Calls body(first, n) for runs of tokens: of texts that are few together, or of texts that are more each.
template <typename Body>
void ForRuns(std::span<const size_t> lengths, size_t few, Body&& body) {
  size_t begin = 0, end = 0;
  bool is_few = false;
  for (const size_t length : lengths) {
    const bool own = length <= few;
    if (own != is_few || (own && end + length - begin > few)) {
      if (end > begin) body(begin, end - begin);
      begin = end;
      is_few = own;
    }
    end += length;
  }
  if (end > begin) body(begin, end - begin);
}

}  // namespace

void Linear(std::span<const LinearTerm> terms, const float* x, size_t x_stride, size_t n_tokens, ComputeType compute) {
  CheckTerms(terms, x_stride, n_tokens);
  if (n_tokens == 0) return;
  ForTypes(terms, [&](std::span<const LinearTerm> own) {
    Multiply({Kernels(own[0].w.n_in), own, x, x_stride, n_tokens}, compute);
  });
}

void Linear(std::span<const LinearTerm> terms, const float* x, size_t x_stride, std::span<const size_t> lengths,
            ComputeType compute) {
  CheckTerms(terms, x_stride, std::accumulate(lengths.begin(), lengths.end(), size_t{0}));
  ForTypes(terms, [&](std::span<const LinearTerm> own) {
    const WeightView& w = own[0].w;
    ForRuns(lengths, FewTokens(w.type, w.n_in, compute), [&](size_t first, size_t n) {
      Multiply({Kernels(w.n_in), own, x + first * x_stride, x_stride, n, first}, compute);
    });
  });
}

void Linear(const WeightView& w, const float* x, size_t x_stride, size_t n_tokens, float* y, size_t y_stride,
            ComputeType compute) {
  const LinearTerm term{w, y, y_stride};
  Linear({&term, 1}, x, x_stride, n_tokens, compute);
}

}  // namespace lesskv
