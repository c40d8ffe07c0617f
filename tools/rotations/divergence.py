#!/usr/bin/env python3
"""Whole models (llama, qwen2) with coded keys and values, in numpy: what the recipes of compare.py do to next tokens.

Every query meets coded rows, except the first tokens and the newest; later layers see what that does to earlier ones.
Prints the mean KL divergence from the same forward pass with exact rows, and perplexity, over the second half.
"""
import argparse
import sys

import numpy as np
from gguf import GGUFReader
from gguf.quants import dequantize

from compare import SINKS, WINDOW, Capture, Learned, rope, softmax, stored


class Model:
  def __init__(self, path):
    reader = GGUFReader(path)
    arch = reader.fields["general.architecture"].contents()
    get = lambda key: reader.fields[f"{arch}.{key}"].contents()
    self.n_layers, self.n_heads = get("block_count"), get("attention.head_count")
    self.n_kv_heads = get("attention.head_count_kv")
    self.eps = get("attention.layer_norm_rms_epsilon")
    self.rope = ({"llama": "pairs", "qwen2": "halves"}[arch], get("rope.freq_base"))
    self.tensors = {t.name: t for t in reader.tensors}
    self.kept = {}

  def __call__(self, name):
    if name not in self.kept:
      t = self.tensors[name]
      self.kept[name] = dequantize(t.data, t.tensor_type).astype(np.float32)
    return self.kept[name]

  def linear(self, x, name):
    y = x @ self(name + ".weight").T
    return y + self(name + ".bias") if name + ".bias" in self.tensors else y

  def norm(self, x, name):
    return x / np.sqrt((x ** 2).mean(-1, keepdims=True) + self.eps) * self(name + ".weight")

  def logits(self, ids, code):
    """Of the second half's tokens. code(layer, head, k, v) gives the rows that are read where they are not exact."""
    n = len(ids)
    at, t, j = np.arange(n), np.arange(n)[:, None], np.arange(n)[None, :]
    coded, seen = (j >= SINKS) & (j < t - WINDOW), j <= t
    rotated = lambda x: np.stack([rope(x[:, h], *self.rope, at) for h in range(x.shape[1])], 1)
    x = self("token_embd.weight")[ids]
    for layer in range(self.n_layers):
      b = f"blk.{layer}."
      y = self.norm(x, b + "attn_norm")
      q, k, v = (self.linear(y, b + f"attn_{part}") for part in "qkv")
      q, k = rotated(q.reshape(n, self.n_heads, -1)), rotated(k.reshape(n, self.n_kv_heads, -1))
      v = v.reshape(n, self.n_kv_heads, -1)
      out = np.empty_like(q)
      for h in range(self.n_heads):
        head, first = divmod(h, self.n_heads // self.n_kv_heads)
        if first == 0: k_coded, v_coded = code(layer, head, k[:, head], v[:, head])
        scores = np.where(coded, q[:, h] @ k_coded.T, q[:, h] @ k[:, head].T) / np.sqrt(np.float32(q.shape[2]))
        p = softmax(np.where(seen, scores, np.float32(-np.inf)))
        out[:, h] = (p * coded) @ v_coded + (p * ~coded) @ v[:, head]
      x = x + self.linear(out.reshape(n, -1), b + "attn_output")
      y = self.norm(x, b + "ffn_norm")
      gate = self.linear(y, b + "ffn_gate")
      x = x + self.linear(gate / (1 + np.exp(-gate)) * self.linear(y, b + "ffn_up"), b + "ffn_down")
    x = self.norm(x[n // 2:], "output_norm")
    return x @ self("output.weight" if "output.weight" in self.tensors else "token_embd.weight").T


def log_softmax(s):
  s = s - s.max(-1, keepdims=True)
  return s - np.log(np.exp(s).sum(-1, keepdims=True))


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("model")
  parser.add_argument("folder", help="captures of all layers")
  parser.add_argument("--learn", required=True, help="texts of the captures, 0,1,2")
  parser.add_argument("--ids", required=True, help="file with a line of ids a text, of lesskv tokenize --ids")
  parser.add_argument("--tokens", type=int, default=1024, help="of each text, a multiple of 64")
  parser.add_argument("recipes", nargs="+", help="bits and words of keys, of values, such as '3/channel/2/H fit'")
  args = parser.parse_args()
  model = Model(args.model)
  learned = {}
  for layer in range(model.n_layers):
    captures = [Capture(args.folder, int(text), layer) for text in args.learn.split(",")]
    for head in range(model.n_kv_heads): learned[layer, head] = Learned(captures, head, *model.rope)
  recipes = [recipe.split("/") for recipe in args.recipes]
  found = {i: [] for i in range(len(recipes))}
  for line in open(args.ids):
    ids = np.array(line.split()[:args.tokens], dtype=int)
    exact = log_softmax(model.logits(ids, lambda layer, head, k, v: (k, v)))
    nll = lambda logp: -logp[np.arange(len(logp) - 1), ids[len(ids) // 2 + 1:]].mean()
    print(f"{len(ids)} tokens, perplexity {np.exp(nll(exact)):.3f}", file=sys.stderr, flush=True)
    for i, (key_bits, keys, value_bits, values) in enumerate(recipes):
      code = lambda layer, head, k, v: (stored(k, "k", keys, int(key_bits), learned[layer, head]),
                                        stored(v, "v", values, int(value_bits), learned[layer, head]))
      logp = log_softmax(model.logits(ids, code))
      found[i].append((float((np.exp(exact) * (exact - logp)).sum(-1).mean()), float(np.exp(nll(logp) - nll(exact)))))
      print(f"{args.recipes[i]}: {found[i][-1]}", file=sys.stderr, flush=True)
  print("| keys | values | KL mean | perplexity ratio |\n|---|---|---:|---:|")
  for i, (key_bits, keys, value_bits, values) in enumerate(recipes):
    kl, ratio = np.array(found[i]).T
    print(f"| {key_bits} {keys} | {value_bits} {values} | {kl.mean():.4f} | {np.exp(np.log(ratio).mean()):.4f} |")


if __name__ == "__main__":
  main()
