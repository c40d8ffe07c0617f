#include "engine/run_info.h"

#include "engine/resident_runs.h"
#include "kernels/basic/cpu.h"

namespace lesskv {

std::string Version() { return LESSKV_VERSION; }

void AddRunInfo(Json& result, const Engine& engine, const CacheConfig& config, uint64_t seed) {
  result["model"] = engine.model().path();
  result["model_fingerprint"] = engine.model().FingerprintText();
  result["kv_spec"] = config.spec_text();
  result["ctx"] = config.shape().ctx;
  result["seed"] = seed;
  result["threads"] = engine.threads().size();
  result["isa"] = IsaName();
  result["compute"] = ComputeTypeName(engine.compute());
  result["version"] = Version();
  if (const LocalLayers local = CountLocal(config.shape()); local.n_layers > 0) {
    result["n_local_layers"] = local.n_layers;
    result["local_window"] = local.window;
  }
}

double HitRate(const RecallStats& recall) {
  const auto asked = static_cast<double>(recall.rows_recalled);
  return asked == 0 ? 1 : static_cast<double>(recall.rows_cached) / asked;
}

void AddCacheStats(Json& result, const CacheStats& stats, const CacheConfig& config) {
  result["tokens_seen"] = stats.tokens_seen;
  result["tokens_resident"] = stats.tokens_resident;
  result["kv_bytes"] = stats.kv_bytes;
  result["kv_bytes_peak"] = stats.kv_bytes_peak;
  result["kv_bytes_slack"] = stats.kv_bytes_slack;
  result["kv_bytes_full"] = stats.kv_bytes_full;
  result["sidecar_bytes"] = config.sidecar_bytes();
  if (const Residual* residual = config.global().residual.get();
      residual != nullptr && residual->Fits(StepKind::kPrompt).n_queries > 0) {
    result["fits"] = stats.fits.taken;
    result["fits_refused"] = stats.fits.refused;
  }
  const RecallStats& recall = stats.recall;
  if (recall.queries > 0)
    result["rows_read"] = static_cast<double>(recall.rows_read) / static_cast<double>(recall.queries);
  if (recall.rows_offloaded == 0) return;
  result["tokens_offloaded"] = stats.tokens_offloaded;
  result["offload_file_bytes"] = recall.file_bytes;
  result["recall_bytes_read"] = recall.bytes_read;
  result["recall_hit_rate"] = HitRate(recall);
}

void AddHeadStats(Json& result, const SequenceCache& cache) {
  const ResidentRuns layers = ReadResidentRuns(cache);
  Json rows = Json::array();
  for (const auto& heads : layers) {
    Json& layer = rows.emplace_back(Json::array());
    for (const auto& runs : heads) layer.push_back(CountRows(runs));
  }
  result["kv_rows"] = std::move(rows);
  result["kv_runs"] = layers;
}

std::string Dump(const Json& result, int indent) {
  return result.dump(indent, ' ', false, Json::error_handler_t::replace);
}

}  // namespace lesskv
