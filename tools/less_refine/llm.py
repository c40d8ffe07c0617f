"""The frozen model: `llama` and `qwen2` GGUF files of any size, dequantised, as a forward pass whose attention the caller supplies."""
import sys
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import torch
import torch.nn.functional as F

MATRICES = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
BIASES = ("attn_q", "attn_k", "attn_v")


@dataclass(frozen=True)
class Shape:
  architecture: str
  n_layers: int
  n_heads: int
  n_kv_heads: int
  head_dim: int
  context: int
  norm_eps: float
  rope_base: float

  @property
  def group(self):
    return self.n_heads // self.n_kv_heads


def read_shape(reader, path) -> Shape:
  get = lambda key, default=None: reader.fields[key].contents() if key in reader.fields else default
  arch = get("general.architecture")
  if arch not in ("llama", "qwen2"):
    sys.exit(f"{path}: general.architecture must be llama or qwen2, found {arch}")
  if get(f"{arch}.rope.scaling.type", "none") != "none":
    sys.exit(f"{path}: {arch}.rope.scaling.type must be none, found {get(f'{arch}.rope.scaling.type')}")
  heads = get(f"{arch}.attention.head_count")
  head_dim = get(f"{arch}.attention.key_length", get(f"{arch}.embedding_length") // heads)
  if get(f"{arch}.rope.dimension_count", head_dim) != head_dim:
    sys.exit(f"{path}: {arch}.rope.dimension_count must be the head size {head_dim}, found {get(f'{arch}.rope.dimension_count')}")
  return Shape(arch, get(f"{arch}.block_count"), heads, get(f"{arch}.attention.head_count_kv", heads), head_dim,
               get(f"{arch}.context_length"), get(f"{arch}.attention.layer_norm_rms_epsilon"),
               get(f"{arch}.rope.freq_base", 10000.0))


def read_tensors(reader):
  """name -> float32 array, dequantised one at a time."""
  for t in reader.tensors:
    yield t.name, np.array(gguf.quants.dequantize(t.data, t.tensor_type), dtype=np.float32)


def narrow(x):
  """bfloat16 where it is fast, on a GPU."""
  return x.bfloat16() if x.is_cuda else x


def rotate(x, cos, sin, halves):
  """x [batch, heads, tokens, d]: by position, the pairs (i, i + d/2) if `halves` (qwen2), else (2i, 2i + 1) (llama)."""
  if halves:
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), -1)
  a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
  return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2)


class Llm:
  """Matrices in bfloat16 on a GPU, and on a CPU if asked to, all else in float32. hidden = forward(ids, attend), attend(layer, q, k, v) ->
  attention's output, all [batch, heads or KV heads, tokens, d] in float32, q and k rotated."""

  def __init__(self, path, device="cpu", bf16=False):
    reader = gguf.GGUFReader(str(path))
    self.path, self.device, self.shape = Path(path), torch.device(device), read_shape(reader, path)
    self.matrix_type = torch.bfloat16 if bf16 or self.device.type == "cuda" else torch.float32
    names = {f"blk.{i}.{n}.weight" for i in range(self.shape.n_layers) for n in (*MATRICES, "attn_norm", "ffn_norm")}
    names |= {"token_embd.weight", "output_norm.weight"}
    optional = {f"blk.{i}.{n}.bias" for i in range(self.shape.n_layers) for n in BIASES} | {"output.weight"}
    self.w = {}
    for name, values in read_tensors(reader):
      if name not in names | optional:
        sys.exit(f"{path}: tensor {name} is of no known use in {self.shape.architecture}")
      self.w[name] = torch.from_numpy(values).to(self.device)
      self.w[name] = self.w[name].to(self.matrix_type) if values.ndim == 2 else self.w[name]
    if names - self.w.keys():
      sys.exit(f"{path}: tensor {min(names - self.w.keys())} is missing")
    self.head = self.w.get("output.weight", self.w["token_embd.weight"])
    self.tables = {}

  def angles(self, tokens):
    if tokens not in self.tables:
      d = self.shape.head_dim
      angle = torch.outer(torch.arange(tokens, dtype=torch.float64),
                          self.shape.rope_base ** (-torch.arange(0, d, 2, dtype=torch.float64) / d))
      self.tables[tokens] = (angle.cos().float().to(self.device), angle.sin().float().to(self.device))
    return self.tables[tokens]

  def embed(self, ids):
    return F.embedding(ids, self.w["token_embd.weight"]).float()

  def norm(self, x, name):
    return F.rms_norm(x, x.shape[-1:], self.w[f"{name}.weight"], self.shape.norm_eps)

  def project(self, layer, name, h):
    return F.linear(h.to(self.matrix_type), self.w[f"blk.{layer}.{name}.weight"])

  def qkv(self, layer, x):
    s, (batch, tokens, _) = self.shape, x.shape
    h = self.norm(x, f"blk.{layer}.attn_norm").to(self.matrix_type)

    def split(name, heads):
      y = self.project(layer, name, h).float()
      bias = self.w.get(f"blk.{layer}.{name}.bias")
      return (y if bias is None else y + bias).view(batch, tokens, heads, s.head_dim).transpose(1, 2)

    cos, sin = self.angles(tokens)
    halves = s.architecture == "qwen2"
    return (rotate(split("attn_q", s.n_heads), cos, sin, halves), rotate(split("attn_k", s.n_kv_heads), cos, sin, halves),
            split("attn_v", s.n_kv_heads))

  def output_projection(self, layer, a):
    batch, heads, tokens, d = a.shape
    return self.project(layer, "attn_output", a.transpose(1, 2).reshape(batch, tokens, heads * d)).float()

  def finish(self, layer, x, a):
    """The layer's output from its input x [batch, tokens, width] and its attention's output a."""
    x = x + self.output_projection(layer, a)
    h = self.norm(x, f"blk.{layer}.ffn_norm").to(self.matrix_type)
    return x + self.project(layer, "ffn_down", F.silu(self.project(layer, "ffn_gate", h)) * self.project(layer, "ffn_up", h)).float()

  def layer(self, layer, x, attend):
    return self.finish(layer, x, attend(layer, *self.qkv(layer, x)))

  def forward(self, ids, attend, run_layer=None):
    """Final hidden states [batch, tokens, width], normalised. run_layer(layer, x) may replace a layer's plain call."""
    x = self.embed(ids)
    for i in range(self.shape.n_layers):
      x = run_layer(i, x) if run_layer else self.layer(i, x, attend)
    return self.norm(x, "output_norm")

  def attend_all(self, layer, q, k, v):
    del layer
    widen = lambda x: narrow(x).repeat_interleave(self.shape.group, 1)
    return F.scaled_dot_product_attention(narrow(q), widen(k), widen(v), is_causal=True).float()

  @torch.no_grad()
  def full(self, ids):
    return self.forward(ids, self.attend_all)
