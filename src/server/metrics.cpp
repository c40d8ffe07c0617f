#include "server/api.h"

namespace lesskv {
namespace {

template <typename Value>
std::string MetricText(const char* name, const char* type, const char* help, Value value) {
  return fmt::format("# HELP lesskv_{0} {1}\n# TYPE lesskv_{0} {2}\nlesskv_{0} {3}\n", name, help, type, value);
}

}  // namespace

std::string MetricsText(const StoreMetrics& m) {
  std::string text =
      MetricText("store_saved_total", "counter", "Conversations written to the store.", m.saved) +
      MetricText("store_restored_total", "counter", "Conversations brought back from it.", m.restored) +
      MetricText("store_damaged_total", "counter", "Stored conversations that could not be read.", m.damaged) +
      MetricText("store_skipped_total", "counter", "Conversations that were not written.", m.skipped) +
      MetricText("store_unreachable_total", "counter", "Look-ups and writes that found it gone.", m.unreachable);
  if (!m.usage) return text;
  return text + MetricText("store_removed_total", "counter", "Files that made room for others.", m.usage->removed) +
         MetricText("store_files", "gauge", "Files of the store.", m.usage->files) +
         MetricText("store_bytes", "gauge", "Their bytes.", m.usage->bytes);
}

std::string MetricsText(const SchedulerMetrics& m) {
  std::string text;
  const auto add = [&](auto... all) { text += MetricText(all...); };
  add("requests_finished_total", "counter", "Texts that ended by themselves.", m.jobs_finished);
  add("requests_failed_total", "counter", "Texts that ended with an error.", m.jobs_failed);
  add("requests_cancelled_total", "counter", "Texts whose client went, or that the end of the server cut.",
      m.jobs_cancelled);
  add("requests_rejected_total", "counter", "Requests that found the queue full.", m.jobs_rejected);
  add("prompt_tokens_total", "counter", "Prompt tokens read, of ended texts.", m.prompt_tokens);
  add("generated_tokens_total", "counter", "Tokens generated, of ended texts.", m.generated_tokens);
  add("steps_total", "counter", "Steps of the engine.", m.steps);
  add("tokens_evicted_total", "counter", "Tokens that left the caches of ended texts; means over KV heads.",
      m.tokens_evicted);
  add("tokens_absorbed_total", "counter", "Of these, folded into a residual state.", m.tokens_absorbed);
  add("prefix_hits_total", "counter", "Texts that went on with a cache of an earlier one.", m.prefix_hits);
  add("prefix_tokens_total", "counter", "Prompt tokens that these did not read.", m.prefix_tokens);
  add("idle_dropped_total", "counter", "Idle caches that made room for others.", m.idle_dropped);
  add("idle", "gauge", "Caches of ended texts that are kept.", m.idle);
  add("idle_bytes", "gauge", "Their bytes.", m.idle_bytes);
  add("requests_running", "gauge", "Texts that take part in steps.", m.running);
  add("requests_loading", "gauge", "Texts that have their place and wait for the store.", m.loading);
  add("requests_queued", "gauge", "Texts that wait.", m.queued);
  add("kv_bytes", "gauge", "Bytes of the running texts' caches.", m.kv_bytes);
  add("kv_bytes_reserved", "gauge", "Bytes these caches may reach.", m.kv_bytes_reserved);
  add("tokens_resident", "gauge", "Tokens in the running texts' caches; means over KV heads.", m.tokens_resident);
  return text;
}

}  // namespace lesskv
