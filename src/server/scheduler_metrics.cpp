#include "server/scheduler_metrics.h"

#include <algorithm>

namespace lesskv {

SpecMetrics& SchedulerMetrics::Of(const std::string& spec) {
  return specs[specs.contains(spec) || specs.size() < kMostSpecs ? spec : kOtherSpecs];
}

void SchedulerMetrics::CountEnded(const RunningText& text) {
  const CacheStats now = text.sequence.Stats(), &before = text.before;
  const auto left = [](const CacheStats& s) { return s.tokens_dropped + s.tokens_absorbed + s.tokens_merged; };
  prompt_tokens += text.fed - text.cached;
  if (text.generation) generated_tokens += text.generation->tokens().size();
  SpecMetrics& of_spec = Of(text.sequence.config().spec_text());
  of_spec.tokens_evicted += left(now) - left(before);
  of_spec.tokens_absorbed += now.tokens_absorbed - before.tokens_absorbed;
  of_spec.tokens_merged += now.tokens_merged - before.tokens_merged;
  const auto n_heads = static_cast<double>(std::max<size_t>(text.sequence.config().global().heads.size(), 1));
  of_spec.tokens_recalled += static_cast<double>(now.recall.rows_recalled - before.recall.rows_recalled) / n_heads;
}

void SchedulerMetrics::CountPresent(const RunningTexts& texts, const PrefixCache& idle_caches) {
  running = kv_bytes = 0;
  for (auto& [spec, of_spec] : specs) {
    of_spec.running = of_spec.kv_bytes = of_spec.kv_bytes_logical = of_spec.idle = of_spec.idle_bytes = 0;
    of_spec.tokens_resident = 0;
  }
  for (const auto& text : texts) {
    const CacheStats stats = text->sequence.Stats();
    const size_t own_bytes = stats.kv_bytes - text->counted;
    running += text->places;
    kv_bytes += own_bytes;
    SpecMetrics& of_spec = Of(text->sequence.config().spec_text());
    ++of_spec.running;
    of_spec.kv_bytes += own_bytes;
    of_spec.kv_bytes_logical += stats.kv_bytes_full;
    of_spec.tokens_resident += stats.tokens_resident;
  }
  idle = idle_caches.size();
  idle_bytes = idle_caches.bytes();
  for (const PrefixCache::Entry& entry : idle_caches.entries()) {
    SpecMetrics& of_spec = Of(entry.sequence->config().spec_text());
    ++of_spec.idle;
    of_spec.idle_bytes += entry.own_bytes();
  }
}

SlotState Slot(const RunningText& text) {
  const CacheStats stats = text.sequence.Stats();
  return {.spec = text.sequence.config().spec_text(),
          .prompt_tokens = text.job->request().prompt.size(),
          .prompt_read = text.fed,
          .cached_tokens = text.cached,
          .generated_tokens = text.generation ? text.generation->tokens().size() : 0,
          .kv_bytes = stats.kv_bytes,
          .kv_bytes_reserved = text.bytes,
          .tokens_resident = stats.tokens_resident};
}

}  // namespace lesskv
