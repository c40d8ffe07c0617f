// What a SequenceCache is made of. Included by this folder's source files only.
#pragma once

#include <memory>
#include <vector>

#include "kvcache/policy_cache.h"
#include "kvcache/sequence_cache.h"

namespace lesskv {

struct SequenceCache::Impl {
  explicit Impl(std::shared_ptr<const CacheConfig> c) : config(std::move(c)) {
    for (const LayerPolicy& policy : config->policies()) parts.push_back(std::make_unique<PolicyCache>(policy, counter));
  }

  ByteCounter counter;  // first: outlives everything that is counted
  std::shared_ptr<const CacheConfig> config;
  std::vector<std::unique_ptr<PolicyCache>> parts;  // one a policy: the global layers first
  size_t tokens_seen = 0;
  bool in_step = false;
  StepInfo step;

  PolicyCache& global() { return *parts[0]; }
  const PolicyCache& global() const { return *parts[0]; }
  void Begin(size_t n_tokens, StepKind kind);
  void Cancel();
  void End();
};

}  // namespace lesskv
