#!/usr/bin/env python3
"""Training text as token ids, in groups that are mixed at given shares.

  texts.py --model MODEL.gguf --out TEXTS.npz --group books:50000 FILE... [--group tech FILE...]

writes ids once, for training elsewhere: NAME.ids (uint16 or uint32) and NAME.ends of each group's texts. A number after the name: bytes of a file
at most, from a random place.
"""
import argparse
import functools
import random
import sys
from pathlib import Path

import gguf
import numpy as np
import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

QWEN2 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")


def pre_tokenizer(name, path):
  if name == "gpt-2":
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
  if name == "smollm":
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
  if name == "qwen2":
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(QWEN2), "isolated"),
                                    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
  sys.exit(f"{path}: tokenizer.ggml.pre must be gpt-2, smollm or qwen2, found {name}")


class TextTokenizer:
  """The byte-level BPE inside a model file. `bos` is the token that begins every text, or None."""

  def __init__(self, path):
    self.path, self.fields = path, gguf.GGUFReader(str(path)).fields
    self.bos = self.get("bos_token_id") if self.get("add_bos_token") else None

  def get(self, key):
    field = self.fields.get(f"tokenizer.ggml.{key}")
    return field.contents() if field else None

  @functools.cached_property
  def bpe(self):
    merges = [tuple(m.split(" ")) for m in self.get("merges")]
    bpe = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(self.get("tokens"))}, merges=merges))
    bpe.pre_tokenizer = pre_tokenizer(self.get("pre"), self.path)
    if self.get("pre") == "qwen2":
      bpe.normalizer = normalizers.NFC()
    return bpe

  def encode(self, text):
    ids = np.array(self.bpe.encode(text).ids, dtype=np.uint32)
    return ids.astype(np.uint16) if self.bpe.get_vocab_size() <= 1 << 16 else ids


def excerpt(blob, limit, rng):
  """At most `limit` bytes from a random place."""
  if not limit or len(blob) <= limit:
    return blob
  at = rng.randrange(len(blob) - limit)
  return blob[at:at + limit]


def tokenize(tokenizer, paths, limit=0, seed=0):
  rng = random.Random(seed)
  return [tokenizer.encode(excerpt(Path(p).read_bytes(), limit, rng).decode("utf-8", "ignore")) for p in paths]


class Crops:
  """Random stretches of texts. groups: name -> (share, [ids of a text])."""

  def __init__(self, groups, bos, vocabulary):
    self.bos, self.groups = bos, {}
    for name, (share, texts) in groups.items():
      worst = max((int(t.max()) for t in texts if len(t)), default=0)
      if worst >= vocabulary:
        sys.exit(f"text group {name} holds token {worst}, the model has {vocabulary}: tokenised for another model?")
      self.groups[name] = (share, sorted(texts, key=len))

  def batch(self, seed, n, tokens):
    rng, prefix = random.Random(seed), [] if self.bos is None else [self.bos]
    own = tokens - len(prefix)
    fitting = {name: (share, [t for t in texts if len(t) >= own]) for name, (share, texts) in self.groups.items()}
    names = [name for name, (_, texts) in fitting.items() if texts]
    if not names:
      sys.exit(f"the texts hold no stretch of {tokens} tokens")
    rows = []
    for name in rng.choices(names, [fitting[name][0] for name in names], k=n):
      texts = fitting[name][1]
      text = rng.choices(texts, [len(t) - own + 1 for t in texts])[0]
      at = rng.randrange(len(text) - own + 1)
      rows.append(prefix + text[at:at + own].tolist())
    return torch.tensor(rows)


def read_packed(path, shares):
  """shares: {"books": 0.5, ...}, of the groups to use; None: all, by size."""
  with np.load(path) as data:
    names = sorted(key[:-4] for key in data if key.endswith(".ids"))
    if shares and set(shares) - set(names):
      sys.exit(f"{path}: no group {min(set(shares) - set(names))}, there are {', '.join(names)}")
    groups = {}
    for name in shares or names:
      ids, ends = data[f"{name}.ids"], data[f"{name}.ends"]
      groups[name] = (shares[name] if shares else len(ids), np.split(ids, ends[:-1]))
    return groups


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--model", required=True)
  parser.add_argument("--out", required=True)
  parser.add_argument("--group", nargs="+", action="append", required=True, metavar=("NAME[:BYTES]", "FILE"))
  parser.add_argument("--seed", type=int, default=0)
  args = parser.parse_args()
  tokenizer, arrays = TextTokenizer(args.model), {}
  for group, *paths in args.group:
    name, _, limit = group.partition(":")
    texts = tokenize(tokenizer, paths, int(limit or 0), args.seed)
    arrays |= {f"{name}.ids": np.concatenate(texts), f"{name}.ends": np.cumsum([len(t) for t in texts])}
    print(f"{name}: {len(paths)} files, {arrays[f'{name}.ids'].size:,} tokens")
  np.savez(args.out, **arrays)


if __name__ == "__main__":
  main()
