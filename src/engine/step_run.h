// One step of an engine: checks, begins, runs the model, ends, hands out logits; and what becomes of items that fail on
// the way. Used by engine.cpp only.
#pragma once

#include <exception>
#include <vector>

#include "engine/engine.h"

namespace lesskv {

class Engine::StepRun {
 public:
  StepRun(Engine& engine, const LogitsSink& sink, const StepControl& control)
      : engine_(engine), sink_(sink), control_(control) {}

  void Add(const StepItem& item) { entries_.push_back({item, item.tokens}); }
  // A piece of a prompt. `first_row` is added to the row numbers of its logits: what was fed before it in the same call. The
  // first piece is refused where the whole prompt cannot be read.
  void Add(const StepItem& piece, std::span<const int32_t> prompt, size_t first_row) {
    entries_.push_back({piece, first_row == 0 ? prompt : piece.tokens, first_row});
  }

  // `done` and `share` of the whole call for the progress report: what was done before, how much this step is.
  // Returns false when stopped. Throws what Engine::Step throws.
  bool Run(double done = 0, double share = 1);

  // Whether an item took part to the end.
  bool finished(size_t i) const { return entries_[i].state == State::kFinished; }

 private:
  enum class State { kWaiting, kBegun, kFinished, kFailed };
  struct Entry {
    StepItem item;
    std::span<const int32_t> checked;  // tokens that must be known and fit the context
    size_t first_row = 0;
    State state = State::kWaiting;
    bool took_part = false;         // its rows are among the step's
    size_t in_batch = 0;            // its number in the batch
    const Entry* leader = nullptr;  // whose rows it reads (StepItem::reads_with)
    size_t row = 0;                 // of its first token among the step's
  };

  void Check();
  void CheckItem(const Entry& entry) const;
  const Entry* FindLeader(const Entry& entry) const;
  void BeginAll();
  bool Forward(double done, double share);
  void EndAll();
  void EmitLogits();
  void Fail(Entry& entry, std::exception_ptr why);
  void Interrupt();
  void Pause();
  bool AfterLayer(size_t layers_done, double done, double share);
  size_t CountRows() const;

  Engine& engine_;
  const LogitsSink& sink_;
  const StepControl& control_;
  std::vector<Entry> entries_;
  std::exception_ptr first_failure_;  // where nobody wants to be told of each
};

}  // namespace lesskv
