// A model as Hugging Face's transformers saves it: a directory of JSON files and safetensors shards. docs/convert.md
// lists what is read.
#pragma once

#include <cstddef>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <unordered_map>
#include <vector>

#include "format/json_reader.h"
#include "format/safetensors.h"

namespace lesskv {

struct HfTensor {
  const SafetensorsFile* shard;
  const Safetensor* tensor;
};

// Immutable. Weights stay mapped; nothing of them is read here.
class HfDirectory {
 public:
  // Opens config.json and all shards. Throws Error when the directory or one of them is missing or damaged, when a
  // shard lacks a tensor that the index places there, or two shards have a tensor of the same name.
  static HfDirectory Open(const std::string& path);

  HfDirectory(HfDirectory&&) = default;
  HfDirectory& operator=(HfDirectory&&) = default;

  const std::string& path() const { return path_; }
  std::string File(std::string_view name) const;  // its path
  bool HasFile(std::string_view name) const;
  std::string Name() const;  // of the directory itself, for people

  JsonReader config() const { return {*config_, File("config.json")}; }
  // The object in one of the optional files; empty when there is no such file.
  nlohmann::json OptionalJson(std::string_view name) const;

  const std::vector<std::string>& weight_files() const { return weight_files_; }  // paths
  const std::unordered_map<std::string, HfTensor>& tensors() const { return tensors_; }
  std::optional<HfTensor> Find(const std::string& name) const;

 private:
  HfDirectory() = default;
  void OpenShards();
  std::vector<std::string> ShardNames() const;
  void AddShard(const std::string& name);
  void CheckIndex() const;

  std::string path_;
  std::unique_ptr<nlohmann::json> config_;
  std::vector<std::string> weight_files_;
  std::vector<std::unique_ptr<SafetensorsFile>> shards_;
  std::unordered_map<std::string, HfTensor> tensors_;
};

}  // namespace lesskv
