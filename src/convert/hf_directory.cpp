#include "convert/hf_directory.h"

#include <algorithm>
#include <filesystem>
#include <set>

#include "base/error.h"
#include "format/gguf.h"  // Quoted

namespace lesskv {

namespace fs = std::filesystem;
using Json = nlohmann::json;

namespace {

constexpr std::string_view kIndex = "model.safetensors.index.json";
constexpr std::string_view kSingle = "model.safetensors";

// Shards lie in the directory itself: a name that leads elsewhere is none.
bool IsPlainName(const std::string& name) {
  return !name.empty() && name != "." && name != ".." && name.find('/') == std::string::npos &&
         name.find('\0') == std::string::npos;
}

}  // namespace

HfDirectory HfDirectory::Open(const std::string& path) {
  HfDirectory directory;
  directory.path_ = path;
  std::error_code error;
  if (!fs::exists(path, error)) Fail(ErrorCode::kNotFound, "there is no directory {}", path);
  if (!fs::is_directory(path, error))
    Fail(ErrorCode::kBadFile, "{} is not a directory, expected one with config.json and safetensors files", path);
  if (!directory.HasFile("config.json")) Fail(ErrorCode::kNotFound, "{} has no config.json", path);
  directory.config_ = std::make_unique<Json>(LoadJsonObject(directory.File("config.json")));
  directory.OpenShards();
  return directory;
}

std::string HfDirectory::File(std::string_view name) const { return (fs::path(path_) / name).string(); }

bool HfDirectory::HasFile(std::string_view name) const {
  std::error_code error;
  return fs::exists(File(name), error);
}

std::string HfDirectory::Name() const {
  std::error_code error;
  const fs::path whole = fs::weakly_canonical(path_, error);
  return whole.filename().string();
}

Json HfDirectory::OptionalJson(std::string_view name) const {
  return HasFile(name) ? LoadJsonObject(File(name)) : Json::object();
}

std::vector<std::string> HfDirectory::ShardNames() const {
  if (HasFile(kSingle)) return {std::string(kSingle)};  // transformers, too, then leaves an index alone
  if (!HasFile(kIndex))
    Fail(ErrorCode::kNotFound, "{} has neither {} nor {}{}", path_, kSingle, kIndex,
         HasFile("pytorch_model.bin") || HasFile("pytorch_model.bin.index.json")
             ? "; pytorch_model.bin files are not read"
             : "");
  const Json index = LoadJsonObject(File(kIndex));
  const JsonReader reader(index, File(kIndex));
  std::set<std::string> names;
  const JsonReader map = reader.Object("weight_map");
  for (const auto& [tensor, file] : reader.Find("weight_map")->items()) {
    if (!file.is_string() || !IsPlainName(file.get<std::string>())) map.Refuse(tensor, "the name of a file beside it");
    names.insert(file.get<std::string>());
  }
  if (names.empty()) reader.Refuse("weight_map", "tensors and their files", "none");
  return {names.begin(), names.end()};
}

void HfDirectory::OpenShards() {
  for (const std::string& name : ShardNames()) {
    if (!HasFile(name)) Fail(ErrorCode::kNotFound, "{} has no {}, which {} names", path_, name, kIndex);
    AddShard(name);
  }
  if (!HasFile(kSingle)) CheckIndex();
}

void HfDirectory::AddShard(const std::string& name) {
  weight_files_.push_back(File(name));
  const auto& shard = shards_.emplace_back(std::make_unique<SafetensorsFile>(SafetensorsFile::Open(File(name))));
  for (const Safetensor& tensor : shard->tensors()) {
    if (!tensors_.emplace(tensor.name, HfTensor{shard.get(), &tensor}).second)
      Fail(ErrorCode::kBadFile, "{}: tensor {} is in another shard, too", File(name), Quoted(tensor.name));
  }
}

void HfDirectory::CheckIndex() const {
  const Json index = LoadJsonObject(File(kIndex));
  for (const auto& [name, file] : index["weight_map"].items()) {
    const auto found = Find(name);
    const auto place = std::find(weight_files_.begin(), weight_files_.end(), File(file.get<std::string>()));
    const auto& shard = shards_[static_cast<size_t>(place - weight_files_.begin())];
    if (!found || found->shard != shard.get())
      Fail(ErrorCode::kNotFound, "{} has no tensor {}, which {} places there", *place, Quoted(name), kIndex);
  }
}

std::optional<HfTensor> HfDirectory::Find(const std::string& name) const {
  const auto it = tensors_.find(name);
  return it == tensors_.end() ? std::nullopt : std::optional(it->second);
}

}  // namespace lesskv
