"""The reference architecture: a Llama decoder (RMSNorm, SwiGLU, grouped-query attention, RoPE on adjacent pairs, tied output).

RoPE rotates the pairs (2i, 2i+1), which is what ggml's `llama` architecture expects, so weights are exported as they are.
"""
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import nn


@dataclass
class Config:
  vocab: int = 4096
  dim: int = 256
  n_layers: int = 6
  n_heads: int = 4
  n_kv_heads: int = 2
  head_dim: int = 64
  ffn: int = 1024
  context: int = 2048
  rope_theta: float = 10000.0
  norm_eps: float = 1e-5


CONFIGS = {
    "tiny": Config(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=16, ffn=192, context=256),  # tests only
    "small": Config(),
    "base": Config(dim=640, n_layers=12, n_heads=10, n_kv_heads=2, head_dim=64, ffn=1728, context=4096),
}


def rope_tables(cfg: Config, n: int):
  """cos and sin, each [n, head_dim / 2], float32."""
  freq = cfg.rope_theta ** (-torch.arange(0, cfg.head_dim, 2, dtype=torch.float64) / cfg.head_dim)
  angle = torch.arange(n, dtype=torch.float64)[:, None] * freq[None]
  return angle.cos().float(), angle.sin().float()


def rotate(x, cos, sin):
  """x [batch, tokens, heads, head_dim]; rotates adjacent pairs by position."""
  a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
  cos, sin = cos[:, None].to(x.dtype), sin[:, None].to(x.dtype)
  return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2)


class Norm(nn.Module):
  def __init__(self, dim: int, eps: float):
    super().__init__()
    self.weight, self.eps = nn.Parameter(torch.ones(dim)), eps

  def forward(self, x):
    return F.rms_norm(x, (x.shape[-1],), self.weight.to(x.dtype), self.eps)


class Layer(nn.Module):
  def __init__(self, cfg: Config):
    super().__init__()
    self.cfg = cfg
    q, kv = cfg.n_heads * cfg.head_dim, cfg.n_kv_heads * cfg.head_dim
    self.attn_norm, self.ffn_norm = Norm(cfg.dim, cfg.norm_eps), Norm(cfg.dim, cfg.norm_eps)
    self.attn_q = nn.Linear(cfg.dim, q, bias=False)
    self.attn_k = nn.Linear(cfg.dim, kv, bias=False)
    self.attn_v = nn.Linear(cfg.dim, kv, bias=False)
    self.attn_output = nn.Linear(q, cfg.dim, bias=False)
    self.ffn_gate = nn.Linear(cfg.dim, cfg.ffn, bias=False)
    self.ffn_up = nn.Linear(cfg.dim, cfg.ffn, bias=False)
    self.ffn_down = nn.Linear(cfg.ffn, cfg.dim, bias=False)

  def forward(self, x, cos, sin):
    cfg, (b, t, _) = self.cfg, x.shape
    h = self.attn_norm(x)
    q = rotate(self.attn_q(h).view(b, t, cfg.n_heads, cfg.head_dim), cos, sin).transpose(1, 2)
    k = rotate(self.attn_k(h).view(b, t, cfg.n_kv_heads, cfg.head_dim), cos, sin).transpose(1, 2)
    v = self.attn_v(h).view(b, t, cfg.n_kv_heads, cfg.head_dim).transpose(1, 2)
    group = cfg.n_heads // cfg.n_kv_heads  # query heads h*group .. h*group+group-1 read KV head h
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    a = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    x = x + self.attn_output(a.transpose(1, 2).reshape(b, t, -1))
    h = self.ffn_norm(x)
    return x + self.ffn_down(F.silu(self.ffn_gate(h)) * self.ffn_up(h))


class Model(nn.Module):
  """forward(ids [batch, tokens]) -> final hidden states [batch, tokens, dim]; logits(hidden) -> [..., vocab]."""

  def __init__(self, cfg: Config):
    super().__init__()
    self.cfg = cfg
    self.token_embd = nn.Embedding(cfg.vocab, cfg.dim)
    self.blk = nn.ModuleList(Layer(cfg) for _ in range(cfg.n_layers))
    self.output_norm = Norm(cfg.dim, cfg.norm_eps)
    cos, sin = rope_tables(cfg, cfg.context)
    self.register_buffer("cos", cos, persistent=False)
    self.register_buffer("sin", sin, persistent=False)
    for p in self.parameters():
      if p.dim() == 2:
        nn.init.normal_(p, std=min(0.02, p.shape[1] ** -0.5) if p is self.token_embd.weight else p.shape[1] ** -0.5)
    for layer in self.blk:  # each layer starts as the identity
      nn.init.zeros_(layer.attn_output.weight)
      nn.init.zeros_(layer.ffn_down.weight)

  def forward(self, ids):
    t = ids.shape[1]
    x = self.token_embd(ids)
    if torch.is_autocast_enabled(ids.device.type):
      x = x.to(torch.get_autocast_dtype(ids.device.type))
    for layer in self.blk:
      x = layer(x, self.cos[:t], self.sin[:t])
    return self.output_norm(x)

  def logits(self, hidden):
    return F.linear(hidden, self.token_embd.weight)

  def n_params(self) -> int:
    return sum(p.numel() for p in self.parameters())


def save_state(model: Model) -> dict:
  return {"config": asdict(model.cfg), "model": model.state_dict()}


def load_model(path, device="cpu") -> Model:
  """Reads a checkpoint written by train.py, or one made of parts joined by shards.py."""
  state = torch.load(path, map_location=device, weights_only=True)
  model = Model(Config(**state["config"])).to(device)
  model.load_state_dict(state["model"])
  return model
