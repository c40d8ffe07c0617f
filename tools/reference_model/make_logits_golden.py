#!/usr/bin/env python3
"""Writes the logits the engine is compared with, and checks an export against the training code.

  make_logits_golden.py --model MODEL.gguf --out MODEL.logits.safetensors
  make_logits_golden.py --model MODEL-f32.gguf --against RUN/final.pt        (max difference; fails above 1e-4 of the range)

The forward pass here shares nothing with model.py: plain NumPy in float64, one head and one token's scores at a time, weights
dequantised from the file.  The file holds  ids i32[64], argmax i32[64] (of every position), positions i32[16], logits f32[16, vocab].
"""
import argparse
import json
import struct
from pathlib import Path

import gguf
import numpy as np

N_IDS, N_ROWS = 64, 16


def norm(x, weight, eps):
  return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight


def rope(x, theta):
  """x [tokens, head_dim]; the pair (2i, 2i+1) of token t turns by t * theta^(-2i / head_dim)."""
  n, d = x.shape
  turn = np.exp(1j * np.arange(n)[:, None] * theta ** (-np.arange(0, d, 2) / d))
  z = (x[:, 0::2] + 1j * x[:, 1::2]) * turn
  return np.stack([z.real, z.imag], -1).reshape(n, d)


def attend(q, k, v):
  """Causal attention of one head, [tokens, head_dim] each."""
  out = np.zeros_like(q)
  for t in range(len(q)):
    s = k[:t + 1] @ q[t] / np.sqrt(q.shape[1])
    p = np.exp(s - s.max())
    out[t] = (p / p.sum()) @ v[:t + 1]
  return out


def forward(path, ids):
  """Logits [tokens, vocab] in float64 of a GGUF file of architecture llama."""
  reader = gguf.GGUFReader(str(path))
  get = lambda key: reader.fields["llama." + key].contents()
  w = {t.name: gguf.quants.dequantize(t.data, t.tensor_type).astype(np.float64) for t in reader.tensors}
  heads, kv_heads = get("attention.head_count"), get("attention.head_count_kv")
  eps, theta = get("attention.layer_norm_rms_epsilon"), get("rope.freq_base")
  x = w["token_embd.weight"][ids]
  for i in range(get("block_count")):
    m = lambda name: w[f"blk.{i}.{name}.weight"]
    h = norm(x, m("attn_norm"), eps)
    q = np.split(h @ m("attn_q").T, heads, axis=1)
    k = np.split(h @ m("attn_k").T, kv_heads, axis=1)
    v = np.split(h @ m("attn_v").T, kv_heads, axis=1)
    group = heads // kv_heads
    a = [attend(rope(q[j], theta), rope(k[j // group], theta), v[j // group]) for j in range(heads)]
    x = x + np.concatenate(a, axis=1) @ m("attn_output").T
    h = norm(x, m("ffn_norm"), eps)
    gate = h @ m("ffn_gate").T
    x = x + (gate / (1 + np.exp(-gate)) * (h @ m("ffn_up").T)) @ m("ffn_down").T
  return norm(x, w["output_norm.weight"], eps) @ w["token_embd.weight"].T


def write_safetensors(path: Path, arrays: dict) -> None:
  names = {np.dtype("int32"): "I32", np.dtype("float32"): "F32"}
  header, at = {}, 0
  for key, a in arrays.items():
    header[key] = {"dtype": names[a.dtype], "shape": list(a.shape), "data_offsets": [at, at + a.nbytes]}
    at += a.nbytes
  text = json.dumps(header).encode()
  text += b" " * (-len(text) % 8)
  path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(a.tobytes() for a in arrays.values()))


def main() -> None:
  p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  p.add_argument("--model", type=Path, required=True)
  p.add_argument("--out", type=Path)
  p.add_argument("--against", type=Path, help="checkpoint whose logits must be the same")
  p.add_argument("--seed", type=int, default=7)
  args = p.parse_args()

  vocab = len(gguf.GGUFReader(str(args.model)).fields["tokenizer.ggml.tokens"].data)
  ids = np.random.default_rng(args.seed).integers(1, vocab, N_IDS).astype(np.int32)
  ids[0] = 0
  ids[N_IDS // 2:] = ids[:N_IDS // 2]  # a repetition, so that attention over distance matters
  logits = forward(args.model, ids)
  if args.out:
    positions = np.linspace(0, N_IDS - 1, N_ROWS).astype(np.int32)
    write_safetensors(args.out, {"ids": ids, "argmax": logits.argmax(-1).astype(np.int32), "positions": positions,
                                 "logits": np.ascontiguousarray(logits[positions], dtype=np.float32)})
    print(args.out, args.out.stat().st_size, "bytes")
  if args.against:
    import torch
    from model import load_model
    model = load_model(args.against)
    with torch.no_grad():
      other = model.logits(model(torch.from_numpy(ids.astype(np.int64))[None]))[0].double().numpy()
    worst = np.abs(other - logits).max() / (logits.max() - logits.min())
    same = (other.argmax(-1) == logits.argmax(-1)).all()
    print(f"max difference {worst:.2e} of the logit range, argmax equal: {same}")
    if worst > 1e-4 or not same:
      raise SystemExit("the export does not equal the checkpoint")


if __name__ == "__main__":
  main()
