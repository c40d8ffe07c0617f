// What every result carries, whichever command printed it: enough to repeat the run and to compare its bytes.
#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>

#include "engine/engine.h"
#include "kvcache/sequence_cache.h"

namespace lesskv {

using Json = nlohmann::ordered_json;  // keys stay in the order in which they were added

std::string Version();  // "0.1.0"

// Keys: model (path), model_fingerprint, kv_spec (canonical), ctx, seed, threads, isa, compute, version; for a model with
// local layers, which the spec is not about, also n_local_layers and local_window.
void AddRunInfo(Json& result, const Engine& engine, const CacheConfig& config, uint64_t seed);

// Of the offloaded rows that queries asked for, the share that was in memory; 1 where none was asked for.
double HitRate(const RecallStats& recall);
// Keys: tokens_seen, tokens_resident, kv_bytes, kv_bytes_peak, kv_bytes_full, sidecar_bytes; where queries chose rows
// rows_read (a query's mean), and where some are in a file tokens_offloaded, offload_file_bytes, recall_bytes_read,
// recall_hit_rate.
void AddCacheStats(Json& result, const CacheStats& stats, const CacheConfig& config);

// Keys: kv_rows, the rows of each KV head of each layer; kv_runs, the ResidentRuns.
void AddHeadStats(Json& result, const SequenceCache& cache);

// The object as text. Invalid UTF-8 (of a file name, say) is replaced, never an exception.
std::string Dump(const Json& result, int indent = 2);

}  // namespace lesskv
