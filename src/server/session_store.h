// Idle sequences on disk, as session files (docs/formats.md), so that a conversation goes on after a restart too.
//
// A file's name is made of what it is looked up by: a hash of the tokens it has seen, one of model, spec, context
// length and protected spans, and the number of tokens. What is found that way is compared with the prompt once more.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>

#include "engine/engine.h"
#include "server/prefix_cache.h"

namespace lesskv {

struct StoreOptions {
  std::string directory;                             // made where there is none
  size_t max_bytes = size_t{4} << 30;                // of all files; the ones not used for longest are removed
  std::function<void(const std::string&)> log = {};  // a line about a file that cannot be read or written
};

struct StoreMetrics {
  uint64_t saved = 0, restored = 0, damaged = 0, removed = 0, skipped = 0;
  size_t files = 0, bytes = 0;
};

// Thread-safe. Files are written by a thread of its own, in the order they came, each as a whole or not at all.
class SessionStore {
 public:
  // Takes up what the directory holds. Throws Error(kIo) when it cannot be made or read. The engine must outlive it.
  SessionStore(const Engine& engine, StoreOptions options);
  ~SessionStore();  // after what waits was written
  SessionStore(const SessionStore&) = delete;
  SessionStore& operator=(const SessionStore&) = delete;

  // Has it written; not where it is there already, and not (counted as skipped) where the disk does not keep up or it
  // is larger than all files may be.
  void Save(std::shared_ptr<const Sequence> sequence);
  // The one that has seen most of the prompt's beginning, less than all of it and more than `longer_than` tokens. A
  // file that is damaged is passed over from then on, with a line in the log.
  std::optional<Sequence> Load(const Beginning& beginning, size_t longer_than);
  StoreMetrics Metrics() const;

 private:
  struct File {
    size_t tokens = 0, bytes = 0;
    uint64_t used = 0;  // larger: later
    bool damaged = false;
  };
  using Files = std::map<std::string, File>;  // by name

  void Scan();
  void Write();
  void WriteOne(const Sequence& sequence, const std::string& name);
  void Trim(size_t more);  // with the mutex held
  void Forget(Files::iterator file);
  std::optional<Sequence> Open(const std::string& name, const Beginning& beginning, size_t n);
  std::string Path(const std::string& name) const;
  void Log(const std::string& line) const;

  const Engine& engine_;
  const StoreOptions options_;
  mutable std::mutex mutex_;  // of what follows
  std::condition_variable work_;
  std::deque<std::pair<std::string, std::shared_ptr<const Sequence>>> queue_;
  Files files_;
  std::map<size_t, size_t> lengths_;  // tokens -> files of that many
  uint64_t clock_ = 0;
  StoreMetrics metrics_;
  bool stopping_ = false;
  std::thread thread_;
};

}  // namespace lesskv
