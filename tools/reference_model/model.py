"""The reference architecture: a Llama decoder (RMSNorm, SwiGLU, grouped-query attention, RoPE on adjacent pairs, tied output).

RoPE rotates the pairs (2i, 2i+1), which is what ggml's `llama` architecture expects, so weights are exported as they are.
"""
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import nn


# Large enough that the embedding stays visible beside what the layers add to the residual stream.
EMBED_STD = 0.3


@dataclass
class Config:
  vocab: int = 4096
  dim: int = 256
  n_layers: int = 4
  n_heads: int = 4
  n_kv_heads: int = 2
  head_dim: int = 64
  ffn: int = 1024
  context: int = 2048
  rope_theta: float = 500000.0
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
        nn.init.normal_(p, std=EMBED_STD if p is self.token_embd.weight else p.shape[1] ** -0.5)
    for layer in self.blk:  # each layer starts as the identity
      nn.init.zeros_(layer.attn_output.weight)
      nn.init.zeros_(layer.ffn_down.weight)
    nn.init.constant_(self.output_norm.weight, 0.02 / EMBED_STD)  # logits start small though the tied embedding is not

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

  @torch.no_grad()
  def seed_induction(self):
    """Writes one induction circuit (Olsson et al. 2022) into the initial weights of the first two layers: layer 0 copies from the
    previous token (a second head: from the one before), layer 1 attends to places whose previous token equals the current token and
    copies what stands there.  It would form by itself, but only after more tokens than a small budget has; from here on it is trained
    like everything else.  Token identity is matched in the slow RoPE channels, which hardly turn over the whole window.
    """
    cfg, d, h = self.cfg, self.cfg.dim, self.cfg.head_dim
    first, second = self.blk[0], self.blk[1]
    self.token_embd.weight[:, 0] = 8 * EMBED_STD  # channel 0 is the same for all tokens: what a purely positional head needs
    basis = torch.linalg.qr(torch.randn(d - 1, d - 1))[0]
    read, write, copy = (torch.cat((torch.zeros(h, 1), basis[i * h:(i + 1) * h]), 1) for i in range(3))
    freq = cfg.rope_theta ** (-torch.arange(0, h, 2) / h)
    for head, offset in ((0, 1), (1, 2)):
      q = first.attn_q.weight[head * h:(head + 1) * h]
      q.zero_()
      q[0::2, 0], q[1::2, 0] = 0.7 * torch.cos(offset * freq), -0.7 * torch.sin(offset * freq)
    k = first.attn_k.weight[:h]
    k.zero_()
    k[0::2, 0] = 0.7
    first.attn_v.weight[:h] = read
    first.attn_output.weight[:, :h] = EMBED_STD * write.T
    slow = (torch.arange(h) >= h * 3 // 8)[:, None]
    second.attn_q.weight[:h] = 1.6 * read * slow
    second.attn_k.weight[:h] = 1.6 * write * slow
    second.attn_v.weight[:h] = copy
    second.attn_output.weight[:, :h] = 2.5 * EMBED_STD * copy.T

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
