#!/usr/bin/env python3
"""Prepares what training reads: tokenizer, token files, word lists, and the packed form for another machine.

  prepare.py --text DIR --out DIR [--book-bytes N] [--tech-bytes N] [--vocab N]   tokenizer + train/valid/test tokens
  prepare.py --pack DIR --out DIR                                                 the same folder as xz shards (<= 60 MiB)
  prepare.py --unpack DIR --out DIR                                               and back

--text is a folder with the archives of the text collection (books-*.tar.xz, tech-docs.tar.xz).  Its split is binding:
training text comes from books-train-*, and from tech-docs minus every 20th file (those are the technical held-out set).

Output: tokenizer.json, {train,valid,test,tech_valid}.bin (uint16 ids; each document begins with <|endoftext|>),
bytes.json (UTF-8 bytes per token file, for loss per byte), words.txt (words that training tasks draw from).
The held-out words, eval_words.txt beside this script, are chosen here once and read afterwards.
"""
import argparse
import json
import lzma
import random
import re
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

HERE = Path(__file__).resolve().parent
EVAL_WORDS = HERE / "eval_words.txt"
BOS = "<|endoftext|>"
SHARD_BYTES = 15 << 20


def read_archive(path: Path):
  """Yields (name, text) of every regular file, in name order."""
  with tarfile.open(path) as tar:
    members = sorted((m for m in tar if m.isfile()), key=lambda m: m.name)
    for m in members:
      yield m.name, tar.extractfile(m).read().decode("utf-8", errors="replace")


def excerpt(text: str, limit: int, rng: random.Random) -> str:
  """At most `limit` characters, from a random paragraph start."""
  if limit <= 0 or len(text) <= limit:
    return text
  start = text.find("\n", rng.randrange(len(text) - limit + 1)) + 1
  return text[start:start + limit]


def collect(text_dir: Path, book_chars: int, tech_chars: int, seed: int):
  """Returns {split: [document, ...]}; 0 means no limit."""
  rng = random.Random(seed)
  train = []
  for archive in ("books-train-core.tar.xz", "books-train-extra.tar.xz"):
    train += [excerpt(t, book_chars, rng) for _, t in read_archive(text_dir / archive)]
  tech = [t for _, t in read_archive(text_dir / "tech-docs.tar.xz")]
  tech_valid, tech_train = tech[::20], [t for i, t in enumerate(tech) if i % 20]
  rng.shuffle(tech_train)
  taken, size = [], 0
  for t in tech_train:
    if tech_chars and size >= tech_chars:
      break
    taken.append(excerpt(t, 40_000 if tech_chars else 0, rng))
    size += len(taken[-1])
  train += taken
  rng.shuffle(train)
  return {
      "train": train,
      "valid": [t for _, t in read_archive(text_dir / "books-valid.tar.xz")],
      "test": [t for _, t in read_archive(text_dir / "books-test.tar.xz")],
      "tech_valid": tech_valid,
  }


def train_tokenizer(docs, vocab: int) -> Tokenizer:
  """Byte-level BPE with GPT-2's pre-tokenizer (GGUF: model gpt2, pre gpt-2)."""
  tok = Tokenizer(models.BPE())
  tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
  tok.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(vocab_size=vocab, special_tokens=[BOS], show_progress=False,
                                initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
  tok.train_from_iterator(docs, trainer)
  return tok


def write_tokens(tok: Tokenizer, docs, path: Path) -> int:
  parts = []
  for start in range(0, len(docs), 64):
    for enc in tok.encode_batch(docs[start:start + 64], add_special_tokens=False):
      parts.append(np.array([0] + enc.ids, dtype=np.uint16))
  ids = np.concatenate(parts)
  ids.tofile(path)
  return len(ids)


def choose_words(tok: Tokenizer, docs, n: int, n_eval: int, seed: int):
  """Common lower-case words of at most two tokens (after a space); a random part is held out for evaluation."""
  counts = Counter()
  for d in docs:
    counts.update(re.findall(r"(?<= )[a-z]{4,10}(?=[ ,.;])", d))
  words = [w for w, c in counts.most_common(4 * n) if c >= 5 and len(tok.encode(" " + w).ids) <= 2][:n]
  random.Random(seed).shuffle(words)
  return sorted(words[n_eval:]), sorted(words[:n_eval])


def prepare(args) -> None:
  out = Path(args.out)
  out.mkdir(parents=True, exist_ok=True)
  docs = collect(Path(args.text), args.book_bytes, args.tech_bytes, args.seed)
  tok = Tokenizer.from_file(args.tokenizer) if args.tokenizer else train_tokenizer(docs["train"], args.vocab)
  tok.save(str(out / "tokenizer.json"))
  words, held_out = choose_words(tok, docs["train"], 9000, 0 if EVAL_WORDS.exists() else 400, args.seed)
  if not EVAL_WORDS.exists():
    EVAL_WORDS.write_text("\n".join(held_out) + "\n")
  kept_out = set(EVAL_WORDS.read_text().split())
  (out / "words.txt").write_text("\n".join(w for w in words if w not in kept_out) + "\n")
  sizes = {}
  for split, texts in docs.items():
    n_tokens = write_tokens(tok, texts, out / f"{split}.bin")
    sizes[split] = {"bytes": sum(len(t.encode()) for t in texts), "tokens": n_tokens, "documents": len(texts)}
    print(split, sizes[split], flush=True)
  (out / "bytes.json").write_text(json.dumps(sizes, indent=1) + "\n")


def pack(src: Path, out: Path, limit: int) -> None:
  """xz over uint16 ids halves them; the training tokens are cut where the total would pass `limit` bytes."""
  out.mkdir(parents=True, exist_ok=True)
  total = 0
  for name in ("tokenizer.json", "words.txt", "bytes.json", "valid.bin", "train.bin"):
    data = (src / name).read_bytes()
    step = SHARD_BYTES if name.endswith(".bin") else max(1, len(data))
    for i in range(0, len(data), step):
      blob = lzma.compress(data[i:i + step], preset=6)
      if total + len(blob) > limit:
        print(f"{name}: stops at {i} of {len(data)} bytes, the limit of {limit} bytes is reached")
        return
      (out / f"{name}.{i // step:03d}.xz").write_bytes(blob)
      total += len(blob)
  print(f"packed into {total} bytes")


def unpack(src: Path, out: Path) -> None:
  out.mkdir(parents=True, exist_ok=True)
  names = sorted({p.name.rsplit(".", 2)[0] for p in src.glob("*.xz")})
  for name in names:
    shards = sorted(src.glob(f"{name}.???.xz"))
    (out / name).write_bytes(b"".join(lzma.decompress(s.read_bytes()) for s in shards))
  print("unpacked", *names)


def main() -> None:
  p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  group = p.add_mutually_exclusive_group(required=True)
  group.add_argument("--text", help="folder with the text archives")
  group.add_argument("--pack", help="prepared folder to pack")
  group.add_argument("--unpack", help="packed folder to unpack")
  p.add_argument("--out", required=True)
  p.add_argument("--book-bytes", type=int, default=0, help="characters taken from each book; 0: all")
  p.add_argument("--tech-bytes", type=int, default=0, help="characters taken from tech-docs; 0: all")
  p.add_argument("--vocab", type=int, default=4096)
  p.add_argument("--tokenizer", help="use this tokenizer.json instead of training one")
  p.add_argument("--pack-limit", type=int, default=60 << 20, help="bytes")
  p.add_argument("--seed", type=int, default=1)
  args = p.parse_args()
  if args.text:
    prepare(args)
  elif args.pack:
    pack(Path(args.pack), Path(args.out), args.pack_limit)
  else:
    unpack(Path(args.unpack), Path(args.out))


if __name__ == "__main__":
  main()
