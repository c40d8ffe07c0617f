#!/usr/bin/env python3
"""Feature maps and the file that holds them (docs/formats.md, "Sidecar").

  sidecar.py --sidecar IN.less.gguf --out OUT.less.gguf [--model MODEL.gguf] [--matrix-type bf16|f32]

writes IN again: for another file of the same model (requantised, say: its fingerprint differs), or with matrices of another type.
"""
import argparse
import math
import sys
from pathlib import Path

import gguf
import numpy as np
import torch
import torch.nn.functional as F
import xxhash

from llm import narrow, read_shape

MAX_EXPONENT = 25.0  # kMaxExponent of feature_maps.h
WARM_START = 1e-4    # psi before training: about the bare selector
FIELDS = ("w1", "w2", "b1", "b2")
MATRIX_TYPES = {"bf16": gguf.GGMLQuantizationType.BF16, "f32": gguf.GGMLQuantizationType.F32}


def fingerprint(path) -> str:
  """A model file's name in sidecars, session files and result rows (docs/formats.md, "Fingerprint")."""
  reader, sample = gguf.GGUFReader(str(path)), 4096
  hasher = xxhash.xxh3_64()
  hasher.update(bytes(reader.data[:max(t.field.offset + sum(p.nbytes for p in t.field.parts) for t in reader.tensors)]))
  for t in reader.tensors:
    data = reader.data[t.data_offset:t.data_offset + t.n_bytes]
    hasher.update(bytes(data[:sample]))
    hasher.update(bytes(data[-sample:]))
  return hasher.hexdigest()


def model_name(path) -> str:
  field = gguf.GGUFReader(str(path)).fields.get("general.name")
  return field.contents() if field else Path(path).stem


class FeatureMaps(torch.nn.Module):
  """phi of every query head and psi of every KV head: exp(GELU(x w1 + b1) w2 + b2). `about` holds the file's metadata.

  Training sees x less its mean over its deviation, a channel each (Qwen2's keys carry biases of hundreds); a file has both folded into w1 and b1.
  Where a file has centres of the keys, log-masses are relative to queries times them. Other parts of the file are kept as they are.
  """

  def __init__(self, n_layers, heads, head_dim, rank, hidden):
    super().__init__()
    self.n_layers, self.heads, self.head_dim, self.rank, self.hidden = n_layers, dict(zip(("phi", "psi"), heads)), head_dim, rank, hidden
    self.about, self.others = {}, []
    self.weights = torch.nn.ParameterDict()
    for layer in range(n_layers):
      self.register_buffer(f"{layer}_center", torch.zeros(self.heads["psi"], head_dim))
      for net, n in self.heads.items():
        self.register_buffer(f"{layer}_{net}_mean", torch.zeros(n, head_dim))
        self.register_buffer(f"{layer}_{net}_deviation", torch.ones(n, head_dim))

  @staticmethod
  def random(shape, rank, hidden, seed):
    maps = FeatureMaps(shape.n_layers, (shape.n_heads, shape.n_kv_heads), shape.head_dim, rank, hidden)
    generator = torch.Generator().manual_seed(seed)
    uniform = lambda *size: (torch.rand(size, generator=generator) * 2 - 1) * math.sqrt(6 / (size[1] + size[2]))
    for layer in range(shape.n_layers):
      for net, heads in maps.heads.items():
        first = {"w1": uniform(heads, shape.head_dim, hidden), "w2": uniform(heads, hidden, rank), "b1": torch.zeros(heads, hidden),
                 "b2": torch.full((heads, rank), math.log(WARM_START) if net == "psi" else 0.0)}
        for field, values in first.items():
          maps.weights[f"{layer}_{net}_{field}"] = torch.nn.Parameter(values)
    return maps

  @staticmethod
  def read(path):
    reader = gguf.GGUFReader(str(path))
    about = {name: (f.contents(), *f.types[:2]) for name, f in reader.fields.items() if not name.startswith("GGUF.")}
    if about.get("general.architecture", ("",))[0] != "lesskv-sidecar" or about["less.features"][0] != "exp":
      sys.exit(f"{path}: expected a sidecar with exp features")
    get = lambda key: about[f"less.{key}"][0]
    maps = FeatureMaps(get("block_count"), (get("head_count"), get("head_count_kv")), get("head_dim"), get("rank"), get("hidden"))
    maps.about = about
    for t in reader.tensors:
      part, *name = t.name.split(".")
      if part != "less":
        maps.others.append((t.name, np.array(t.data), t.tensor_type))
        continue
      values = torch.from_numpy(np.array(gguf.quants.dequantize(t.data, t.tensor_type), dtype=np.float32))
      if name[-1] == "center":
        getattr(maps, f"{name[0]}_center").copy_(values)
      else:
        maps.weights["_".join(name)] = torch.nn.Parameter(values)
    return maps

  def check(self, shape, path):
    found = (self.n_layers, self.heads["phi"], self.heads["psi"], self.head_dim)
    if found != (shape.n_layers, shape.n_heads, shape.n_kv_heads, shape.head_dim):
      sys.exit(f"{path}: feature maps are for layers, query heads, KV heads, head size {found}, the model has {shape}")

  def features(self, layer, net, x):
    """x [batch, heads, tokens, head_dim] -> [batch, heads, tokens, rank]."""
    w1, w2, b1, b2 = (self.weights[f"{layer}_{net}_{field}"] for field in FIELDS)
    mean, deviation = (getattr(self, f"{layer}_{net}_{of}")[:, None] for of in ("mean", "deviation"))
    hidden = F.gelu(narrow((x - mean) / deviation) @ narrow(w1) + narrow(b1)[:, None])
    return torch.exp(((hidden @ narrow(w2)).float() + b2[:, None]).clamp(max=MAX_EXPONENT))

  def offset(self, layer, q):
    """What a state's log-mass has on top for queries q [batch, heads, tokens, head_dim]: [batch, heads, tokens, 1]."""
    center = getattr(self, f"{layer}_center").repeat_interleave(self.heads["phi"] // self.heads["psi"], 0)
    return torch.einsum("bhtd,hd->bht", q, center)[..., None]

  @torch.no_grad()
  def calibrate(self, layer, net, x, fresh):
    """Sets mean and deviation of the inputs, before training only. Maps that are not fresh give what they gave."""
    mean, deviation = x.mean((0, 2)), x.std((0, 2))
    deviation = deviation.maximum(0.01 * deviation.amax(1, keepdim=True))
    if not fresh:
      w1, b1 = self.weights[f"{layer}_{net}_w1"], self.weights[f"{layer}_{net}_b1"]
      b1 += (mean[:, None].double() @ w1.double())[:, 0].float()
      w1 *= deviation[:, :, None]
    getattr(self, f"{layer}_{net}_mean").copy_(mean)
    getattr(self, f"{layer}_{net}_deviation").copy_(deviation)

  def folded(self, layer, net, matrix_type):
    """A net's tensors as a file has them. The first bias answers for w1 as it is rounded: a large mean must cancel."""
    values = {field: self.weights[f"{layer}_{net}_{field}"].detach().double() for field in FIELDS}
    mean, deviation = (getattr(self, f"{layer}_{net}_{of}").double() for of in ("mean", "deviation"))
    values["w1"] = values["w1"] / deviation[:, :, None]
    rounded = values["w1"].bfloat16().double() if matrix_type == "bf16" else values["w1"]
    values["b1"] = values["b1"] - (mean[:, None] @ rounded)[:, 0]
    return values

  def identify(self, model):
    """These maps belong to the model file `model`."""
    string = gguf.GGUFValueType.STRING
    name = model_name(model)
    self.about |= {"general.name": (f"{name} sidecar", string), "lesskv.model.name": (name, string),
                   "lesskv.model.fingerprint": (fingerprint(model), string)}

  def describe(self, policies, tokens, context, seed):
    """Metadata of maps that were trained here from a random start."""
    kind = gguf.GGUFValueType
    self.about |= {"less.train.policies": (policies, kind.ARRAY, kind.STRING), "less.train.tokens": (tokens, kind.UINT64),
                   "less.train.ctx": (context, kind.UINT32), "less.train.epochs": (0, kind.UINT32), "less.train.seed": (seed, kind.UINT64)}

  def centered(self):
    return any(bool(getattr(self, f"{layer}_center").any()) for layer in range(self.n_layers))

  def shape_fields(self, matrix_type):
    u32, string = gguf.GGUFValueType.UINT32, gguf.GGUFValueType.STRING
    version = 2 if self.centered() else 1
    return {"lesskv.sidecar.version": (version, u32), "less.block_count": (self.n_layers, u32), "less.head_count": (self.heads["phi"], u32),
            "less.head_count_kv": (self.heads["psi"], u32), "less.head_dim": (self.head_dim, u32), "less.rank": (self.rank, u32),
            "less.hidden": (self.hidden, u32), "less.features": ("exp", string), "less.matrix_type": (matrix_type, string)}

  @torch.no_grad()
  def write(self, out, matrix_type="bf16", history=None):
    """`history`: a line added to less.refine.history, one for each round of training."""
    writer = gguf.GGUFWriter(f"{out}.part", "lesskv-sidecar")
    about = self.about | self.shape_fields(matrix_type)
    lines = [*about.pop("less.refine.history", ([],))[0], *([history] if history else [])]
    for name, (value, *types) in about.items():
      if name != "general.architecture" and value != []:
        writer.add_key_value(name, value, *types)
    if lines:
      writer.add_array("less.refine.history", lines)
    for layer in range(self.n_layers):
      for net in ("phi", "psi"):
        for field, values in self.folded(layer, net, matrix_type).items():
          kind = MATRIX_TYPES[matrix_type if field.startswith("w") else "f32"]
          values = gguf.quants.quantize(values.float().cpu().numpy(), kind)
          writer.add_tensor(f"less.{layer}.{net}.{field}", values, raw_dtype=kind)
      center = getattr(self, f"{layer}_center")
      if center.any():
        writer.add_tensor(f"less.{layer}.center", center.cpu().numpy())
    for name, data, kind in self.others:
      writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    Path(f"{out}.part").replace(out)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--sidecar", required=True)
  parser.add_argument("--out", required=True)
  parser.add_argument("--model", help="the file that the maps shall belong to")
  parser.add_argument("--matrix-type", choices=MATRIX_TYPES, default="bf16")
  args = parser.parse_args()
  maps = FeatureMaps.read(args.sidecar)
  if args.model:
    maps.check(read_shape(gguf.GGUFReader(args.model), args.model), args.sidecar)
    maps.identify(args.model)
  maps.write(args.out, args.matrix_type)


if __name__ == "__main__":
  main()
