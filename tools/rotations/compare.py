#!/usr/bin/env python3
"""Few-bit keys and values under fixed and learned rotations, at equal bits: what each does to attention's outputs.

Reads captures of `lesskv train less` (queries and keys behind RoPE, values, outputs of full attention), learns from
some texts and measures on others. README.md beside it says how they are made.
"""
import argparse
import sys
from pathlib import Path

import numpy as np
from gguf import GGUFReader

SINKS, WINDOW, GROUP = 4, 64, 64  # exact first and last rows; tokens of a group of keys per channel
CLIP = {"k": {2: 0.96, 3: 0.96, 4: 1.0}, "v": {2: 0.92, 3: 0.96, 4: 1.0}}  # OSCAR's shares, none where they only cost

# A recipe is a list of words: how the rows of one side are stored.
#   H, U, UH     rotated: Hadamard; eigenvectors of the covariance of queries (keys), of weighted values; these, then H
#   OH           values: eigenvectors of the covariance of attention's outputs, then H
#   BH           keys: the matrix behind which keys and queries (these take its inverse) have one, diagonal covariance,
#                then H: the product of the two powers, which white errors of few bits meet, is then the least
#   mean, ropemean   without a constant vector, learned behind RoPE, or before it and then rotated (keys only)
#   clip, fit    the row's largest entries clamped; scale and minimum by least squares (GroupFit::kFitted)
#   channel      keys in groups of 64 tokens of one channel, as in kivi; otherwise a row has its own scales
#   g32, q4      a scale and minimum for 32 channels instead of the whole head; the same with 4 bits and a scale alone
#   sinks, early the first tokens coded too; and keys exact only in the group that is not yet full, as the codec has it
KEYS = ("g32,,H,H clip,H mean clip,H ropemean clip,UH clip,UH mean clip,UH mean fit,UH ropemean clip,BH mean fit,"
        "BH ropemean clip,BH ropemean fit,channel,channel mean,channel fit,channel U,channel UH,channel BH,"
        "channel BH fit,channel ropemean,channel ropemean BH fit").split(",")
VALUES = "g32,,fit,H,H clip,H fit,H mean fit,UH clip,UH fit,OH fit".split(",")
DESIGNS = [("", ""), ("H", "H"), ("H clip", "H clip"), ("H mean clip", "H clip"), ("UH clip", "UH clip"),
           ("UH mean clip", "UH clip"), ("UH ropemean clip", "UH clip"), ("BH mean fit", "H fit"),
           ("BH ropemean fit", "H fit"), ("channel", ""), ("channel", "H fit"), ("channel sinks", "H fit"),
           ("channel early", "H fit"), ("channel U", "H fit"), ("channel BH", "H fit"), ("channel BH fit", "H fit")]
BITS = [(2, 2), (3, 2), (3, 3), (4, 2), (4, 3), (4, 4)]


def half(x):
  return x.astype(np.float16).astype(np.float32)


def affine(x, bits, fit):
  """x [..., group] coded and decoded: code * scale + minimum, both f16, as src/kernels/rows/group_codes.cpp does it."""
  most = 2 ** bits - 1
  low, high = x.min(-1, keepdims=True), x.max(-1, keepdims=True)
  step, base = half((high - low) / most), half(low)

  def codes():
    return np.where(step == 0, 0, np.rint(np.clip((x - base) / np.where(step == 0, 1, step), 0, most)))

  if fit:
    cut = (high - low) / (most + 1) / 2
    step, base = half((high - low - 2 * cut) / most), half(low + cut)
    for unbiased in (False, False, False, True):
      c, y = codes(), x - base
      c_mean, y_mean = c.mean(-1, keepdims=True), y.mean(-1, keepdims=True)
      both = ((c - c_mean) * (y - y_mean)).sum(-1, keepdims=True)
      above = ((y - y_mean) ** 2).sum(-1, keepdims=True) if unbiased else both
      below = both if unbiased else ((c - c_mean) ** 2).sum(-1, keepdims=True)
      good = (above > 0) & (below > 0)
      new = np.where(good, above / np.where(good, below, 1), step)
      base = np.where(good, half(base + y_mean - new * c_mean), base)
      step = np.where(good, half(new), step)
  return codes() * step + base


def q4(x):
  """Blocks of 32, the number of largest magnitude is -8 times the f16 scale."""
  y = x.reshape(len(x), -1, 32)
  extreme = np.take_along_axis(y, np.abs(y).argmax(-1)[..., None], -1)
  scale = extreme / -8
  codes = np.clip(np.floor(y / np.where(scale == 0, 1, scale) + 8.5), 0, 15) - 8
  return (codes * half(scale)).reshape(x.shape)


def bits_a_number(words, bits, dim):
  if "q4" in words: return 4.5
  return bits + 32 / (GROUP if "channel" in words else 32 if "g32" in words else dim)


def hadamard(dim):
  h = np.ones((1, 1))
  while len(h) < dim: h = np.block([[h, h], [h, -h]])
  return (h / np.sqrt(dim)).astype(np.float32)


def rope(x, kind, base, positions):
  """Rotates x [n, dim] (or one vector) to the positions; `pairs` of neighbours (llama) or of `halves` (qwen2)."""
  dim = x.shape[-1]
  angle = positions[:, None] * base ** (-np.arange(0, dim, 2) / dim)
  even, odd = (slice(0, None, 2), slice(1, None, 2)) if kind == "pairs" else (slice(0, dim // 2), slice(dim // 2, None))
  out = np.empty((len(positions), dim))
  out[:, even] = x[..., even] * np.cos(angle) - x[..., odd] * np.sin(angle)
  out[:, odd] = x[..., even] * np.sin(angle) + x[..., odd] * np.cos(angle)
  return out.astype(np.float32)


def without_group_means(k):
  groups = k.reshape(-1, GROUP, k.shape[1])
  return (groups - groups.mean(1, keepdims=True)).reshape(k.shape)


class Capture:
  def __init__(self, folder, text, layer):
    reader = GGUFReader(Path(folder) / f"text-{text:05}-layer-{layer:03}.gguf")
    self.n, heads, self.n_kv_heads, self.dim = (
        int(reader.fields[f"capture.{key}"].contents()) for key in ("n_tokens", "n_heads", "n_kv_heads", "head_dim"))
    wanted = [t for t in reader.tensors if t.name in ("q", "k", "v", "target")]
    self.tensors = {t.name: t.data.reshape(self.n, -1, self.dim)[:self.n // GROUP * GROUP] for t in wanted}
    self.n, self.group = self.n // GROUP * GROUP, heads // self.n_kv_heads

  def of(self, head):
    """q [n, group, dim], k, v [n, dim] and target, as q, of a KV head."""
    queries = slice(head * self.group, (head + 1) * self.group)
    columns = {"q": queries, "k": head, "v": head, "target": queries}
    return [self.tensors[name][:, which].astype(np.float32) for name, which in columns.items()]


class Learned:
  """Rotations and means of one KV head, from calibration texts."""
  def __init__(self, captures, head, kind, base):
    rows = [c.of(head) for c in captures]
    gram = lambda parts: sum(p.T.astype(np.float64) @ p for p in parts) / sum(len(p) for p in parts)
    c_q, c_o = (gram([row[i].reshape(-1, row[i].shape[-1]) for row in rows]) for i in (0, 3))
    weighted = []  # OSCAR's values: each weighted by its key's mean squared logit
    for _, k, v, _ in rows:
      w = (k @ c_q * k).sum(1)
      weighted.append(v * np.sqrt(w / w.mean())[:, None])
    covariances = {"q": c_q, "v": gram(weighted), "o": c_o}
    self.u = {name: np.linalg.eigh(c)[1].astype(np.float32) for name, c in covariances.items()}
    self.h = hadamard(len(c_q))
    keys, values = ([row[i] for row in rows] for i in (1, 2))
    self.mean = {"k": np.concatenate(keys).mean(0), "v": np.concatenate(values).mean(0)}
    self.unrotated = np.concatenate([rope(k, kind, base, -np.arange(len(k))) for k in keys]).mean(0)
    self.rope = (kind, base)
    rest = {"mean": [k - self.mean["k"] for k in keys], "channel": [without_group_means(k) for k in keys],
            "ropemean": [k - rope(self.unrotated, kind, base, np.arange(len(k))) for k in keys]}
    lower = np.linalg.cholesky(c_q + 1e-4 * np.trace(c_q) / len(c_q) * np.eye(len(c_q)))
    self.balanced = {}
    for name, parts in rest.items():
      s, vectors = np.linalg.eigh(lower.T @ gram(parts) @ lower)
      self.balanced[name] = lower @ vectors * np.maximum(s, 1e-6 * s[-1]) ** -0.25

  def transform(self, side, words):
    """The matrix behind a row vector and its inverse, or None."""
    if "H" in words: return self.h, self.h.T
    if "BH" in words:
      b = next(self.balanced[name] for name in ("ropemean", "mean", "channel") if name in words) @ self.h
      return b.astype(np.float32), np.linalg.inv(b).astype(np.float32)
    u = self.u["q" if side == "k" else "o" if "OH" in words else "v"]
    if "UH" in words or "OH" in words: u = u @ self.h
    elif "U" not in words: return None
    return u, u.T


def stored(x, side, recipe, bits, learned):
  """What reading back gives for x [n, dim]."""
  words, mean = recipe.split(), np.float32(0)
  if "mean" in words: mean = learned.mean[side]
  if "ropemean" in words: mean = rope(learned.unrotated, *learned.rope, np.arange(len(x)))
  matrices = learned.transform(side, words)
  y = x - mean if matrices is None else (x - mean) @ matrices[0]
  if "clip" in words:
    last = min(int(CLIP[side][bits] * y.shape[1]), y.shape[1] - 1)
    limit = np.sort(np.abs(y), -1)[:, last:last + 1]
    y = np.clip(y, -limit, limit)
  if "q4" in words:
    y = q4(y)
  elif "channel" in words:
    y = affine(y.reshape(-1, GROUP, y.shape[1]).swapaxes(1, 2), bits, "fit" in words).swapaxes(1, 2).reshape(y.shape)
  else:
    y = affine(y.reshape(len(y), -1, 32 if "g32" in words else y.shape[1]), bits, "fit" in words).reshape(y.shape)
  return (y if matrices is None else y @ matrices[1]) + mean


def softmax(s):
  e = np.exp(s - s.max(-1, keepdims=True))
  return e / e.sum(-1, keepdims=True)


def measure(capture, head, learned, designs, stride, errors):
  """Adds to errors[design] = [squared output error, squared outputs, squared logit error, logits]."""
  q, k, v, target = capture.of(head)
  at = np.arange(capture.n // 4, capture.n, stride)
  q = q[at].reshape(-1, capture.dim) / np.sqrt(np.float32(capture.dim))
  t = np.repeat(at, capture.group)[:, None]
  j = np.arange(capture.n)[None, :]
  old = j < t - WINDOW
  coded = old & (j >= SINKS)
  masks = {"": (coded, coded), "sinks": (old, old), "early": (j < t // GROUP * GROUP, old)}  # of keys, of values
  logits = np.where(j <= t, q @ k.T, np.float32(-np.inf))
  exact = softmax(logits) @ v
  assert np.sum((exact - target[at].reshape(exact.shape)) ** 2) < 1e-4 * np.sum(exact ** 2), "not the capture's outputs"
  values = {(r, b): v if b is None else stored(v, "v", r, b, learned) for r, b in {d[2:] for d in designs}}
  for key in dict.fromkeys(d[:2] for d in designs):
    recipe, bits = key
    of_keys, of_values = next(masks[word] for word in ("sinks", "early", "") if word in recipe)
    s, logit_error, n = logits, 0.0, 1
    if bits is not None:
      s = np.where(of_keys, q @ stored(k, "k", recipe, bits, learned).T, logits)
      d = np.where(of_keys, s - np.where(of_keys, logits, 0), 0)
      n = np.count_nonzero(of_keys)
      logit_error = np.sum(d ** 2) - np.sum(d.sum(-1) ** 2 / of_keys.sum(-1))  # a constant changes no softmax
    p = softmax(s)
    old, new = p * of_values, (p * ~of_values) @ v
    for design in designs:
      if design[:2] != key: continue
      o = old @ values[design[2:]] + new
      errors[design] += [np.sum((o - exact) ** 2), np.sum(exact ** 2), logit_error, n]


def main():
  numbers = lambda text: [int(part) for part in text.split(",")]
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("folder", help="captures: text-NNNNN-layer-LLL.gguf")
  parser.add_argument("--rope", required=True, help="pairs:BASE (llama) or halves:BASE (qwen2)")
  parser.add_argument("--layers", type=numbers, required=True)
  parser.add_argument("--learn", type=numbers, required=True, help="texts that rotations and means come from")
  parser.add_argument("--measure", type=numbers, required=True, help="texts that errors are measured on")
  parser.add_argument("--stride", type=int, default=32, help="a query every so many tokens, behind the first quarter")
  args = parser.parse_args()
  if set(args.learn) & set(args.measure): parser.error("a text is both learned from and measured on")
  kind, base = args.rope.split(":")

  designs = [(r, b, "", None) for b in (2, 3, 4) for r in KEYS] + [("", None, r, b) for b in (2, 3, 4) for r in VALUES]
  designs += [(rk, bk, rv, bv) for bk, bv in BITS for rk, rv in DESIGNS]
  designs += [(r, 4, r, 4) for r in ("q4", "H q4")]
  result = {design: [] for design in designs}
  for layer in args.layers:
    learn, test = ([Capture(args.folder, text, layer) for text in texts] for texts in (args.learn, args.measure))
    for head in range(learn[0].n_kv_heads):
      learned = Learned(learn, head, kind, float(base))
      errors = {design: np.zeros(4) for design in designs}
      for capture in test: measure(capture, head, learned, designs, args.stride, errors)
      for design, e in errors.items(): result[design].append((e[0] / e[1] * 100, np.sqrt(e[2] / e[3])))
      print(f"layer {layer}, KV head {head}", file=sys.stderr, flush=True)

  print("| bits | keys | values | outputs: mean % | median | worst | logits: mean | worst |")
  print("|---:|---|---|" + "---:|" * 5)
  for design in designs:
    rk, bk, rv, bv = design
    sides = [bits_a_number(r.split(), b, learn[0].dim) for r, b in ((rk, bk), (rv, bv)) if b is not None]
    out, logit = np.array(result[design]).T
    name = lambda r, b: "exact" if b is None else f"{b} {r}".strip()
    print(f"| {np.mean(sides):.2f} | {name(rk, bk)} | {name(rv, bv)} | {out.mean():.3g} | {np.median(out):.3g} "
          f"| {out.max():.3g} | {logit.mean():.3f} | {logit.max():.3f} |")


if __name__ == "__main__":
  main()
