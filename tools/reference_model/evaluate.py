#!/usr/bin/env python3
"""Measures a model file on held-out text and writes one JSON file; README.md and the model card quote it.

  evaluate.py --model MODEL.gguf --data DATA --wikitext wiki.test.raw --out MODEL.eval.json [--max-tokens N] [--skip ngram,curve,...]

losses    nats per token and bits per byte on books-valid, books-test, tech-docs held out, WikiText-2 test: windows of one context, each
          scoring its second half (the first window all of it), so that nearly every token sees at least half a context
ngram     a modified Kneser-Ney 5-gram scored on the same tokens: trained on the text the model has seen (--seen RUN/last.pt), and on
          all of DATA/train.bin, of which a short run sees only a part
curve     loss of the same target tokens (books-test) given 64 .. context earlier tokens
recall    share of answers right in every token, by task and length (TASKS.md), and by depth at the full context
"""
import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer

from export_gguf import read_gguf
from model import load_model
from ngram import ORDER, KneserNey
from tasks import eval_doc, eval_tasks
from train import block_order

LN2 = float(np.log(2))


@torch.no_grad()
def token_losses(model, rows):
  """-log p of rows[:, 1:], in nats; rows is an integer array [n, tokens + 1].  float32 arithmetic."""
  out = []
  for row in torch.from_numpy(rows.astype(np.int64)).split(4):
    logits = model.logits(model(row[:, :-1]))
    out.append(F.cross_entropy(logits.flatten(0, 1), row[:, 1:].flatten(), reduction="none").view(len(row), -1).numpy())
  return np.concatenate(out)


def stream_losses(model, tokens):
  """-log p of every token but the first, over windows of one context that overlap by half."""
  n = model.cfg.context
  half, parts = n // 2, []
  for start in range(0, max(1, len(tokens) - half + 1), half):
    window = np.concatenate(([0], tokens[start:start + n - 1]))
    loss = token_losses(model, window[None])[0]
    parts.append(loss if start == 0 else loss[half - 1:])
  loss = np.concatenate(parts)
  assert len(loss) == len(tokens), f"{len(loss)} losses for {len(tokens)} tokens"
  return loss[1:]


def spread(tokens, limit: int, piece: int = 16384):
  """Pieces of a long token array, evenly spaced, `limit` tokens in all."""
  if limit <= 0 or len(tokens) <= limit:
    return [tokens]
  starts = np.linspace(0, len(tokens) - piece, max(1, limit // piece)).astype(int)
  return [tokens[s:s + piece] for s in starts]


def text_seen(folder: Path, checkpoint: Path):
  """The training text up to where train.py's cursor stands."""
  state = torch.load(checkpoint, map_location="cpu", weights_only=True)
  context = state["config"]["context"]
  text = np.fromfile(folder / "train.bin", dtype=np.uint16)
  order = block_order(len(text), context, state.get("seed", 1))
  blocks = state["at"]["cursor"] // 16
  return np.concatenate([text[b * context:(b + 1) * context] for b in order[:blocks]]) if blocks < len(order) else text


def measure_losses(model, ngrams, sets, token_bytes, limit: int) -> dict:
  """`ngrams`: models by name."""
  out = {}
  for name, tokens in sets.items():
    nats, gram, n_bytes, count = 0.0, dict.fromkeys(ngrams, 0.0), 0, 0
    for piece in spread(tokens, limit):
      scored = piece[ORDER - 1:]  # the 5-gram needs four earlier tokens; both models are scored on the same ones
      nats += stream_losses(model, piece)[ORDER - 2:].sum(dtype=np.float64)
      for key, ngram in ngrams.items():
        gram[key] += ngram.nats(piece).sum()
      n_bytes += int(token_bytes[scored].sum())
      count += len(scored)
    row = {"tokens": count, "bytes": n_bytes, "nats_per_token": nats / count, "bits_per_byte": nats / n_bytes / LN2}
    for key, total in gram.items():
      row |= {f"{key}_nats_per_token": total / count, f"{key}_bits_per_byte": total / n_bytes / LN2}
    out[name] = {k: round(float(v), 4) if isinstance(v, float) else v for k, v in row.items()}
    print(name, out[name], flush=True)
  return out


def context_curve(model, tokens, samples: int, targets: int = 64) -> list:
  """The same targets after 64, 128, ... tokens of context (to the end of the trained window)."""
  n, out = model.cfg.context, []
  starts = np.linspace(n, len(tokens) - targets, samples).astype(int)
  lengths = [c for c in (64, 128, 256, 512, 1024, 2048, 4096) if c + targets < n] + [n - targets]
  for c in lengths:
    rows = np.stack([np.concatenate(([0], tokens[s - c + 1:s + targets])) for s in starts])
    loss = token_losses(model, rows)[:, -targets:].mean(1)
    out.append({"context": c, "nats_per_token": round(float(loss.mean()), 4), "perplexity": round(float(np.exp(loss.mean())), 3),
                "standard_error": round(float(loss.std() / len(loss) ** 0.5), 4)})
    print(out[-1], flush=True)
  return out


@torch.no_grad()
def measure_recall(model, tasks, documents: int) -> dict:
  """Accuracy by task and length; for `kv` at the longest length also by depth (five equal parts of the list)."""
  n, out = model.cfg.context, {}
  lengths = [c for c in (128, 256, 512, 1024, 1536, 1792, 2048, 3072, 4096) if c < n] + [n]
  for kind in ("kv", "kv_words", "needle", "variable"):
    out[kind] = {}
    for length in lengths:
      good = total = 0
      depth = np.zeros((5, 2))
      for seed in range(documents):
        doc = eval_doc(tasks, kind, int(length * 0.97), 1000 + seed)
        top = model.logits(model(torch.tensor([doc.ids[:n]])))[0].argmax(-1).tolist()
        for a, b in (x for x in doc.answers if x[1] <= n):
          right = top[a - 1:b - 1] == doc.ids[a:b]
          good, total = good + right, total + 1
          if length == n and kind == "kv":
            depth[stated_part(doc, a, b)] += (right, 1)
      out[kind][str(length)] = {"accuracy": round(good / total, 3), "questions": total}
    print(kind, {k: v["accuracy"] for k, v in out[kind].items()}, flush=True)
    if kind == "kv":
      out["kv_by_depth"] = {"length": n, "accuracy": [round(float(g / max(t, 1)), 3) for g, t in depth]}
      print(out["kv_by_depth"], flush=True)
  return out


def stated_part(doc, a: int, b: int) -> int:
  """Which fifth of the document states this answer: the first place where question line and answer already stand."""
  line = doc.ids[a - 2:b]  # the last token of the key, " is", the answer
  first = next(i for i in range(len(doc.ids)) if doc.ids[i:i + len(line)] == line)
  return min(4, first * 5 // doc.answers[0][0])


def main() -> None:
  p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  p.add_argument("--model", type=Path, required=True, help="GGUF file or checkpoint")
  p.add_argument("--data", type=Path, required=True)
  p.add_argument("--wikitext", type=Path, help="wiki.test.raw")
  p.add_argument("--seen", type=Path, help="last.pt of the run, which tells how much of the training text was read")
  p.add_argument("--out", type=Path, required=True)
  p.add_argument("--max-tokens", type=int, default=400_000, help="tokens scored of each text; 0: all")
  p.add_argument("--samples", type=int, default=300, help="target places of the context curve")
  p.add_argument("--documents", type=int, default=16, help="recall documents of each task and length")
  p.add_argument("--skip", default="", help="comma-separated: losses, ngram, curve, recall; their old numbers stay in --out")
  p.add_argument("--threads", type=int, default=0)
  args = p.parse_args()
  if args.threads:
    torch.set_num_threads(args.threads)

  skip = set(args.skip.split(",")) - {""}
  model = (read_gguf if args.model.suffix == ".gguf" else load_model)(args.model).eval()
  tokenizer = Tokenizer.from_file(str(args.data / "tokenizer.json"))
  read = lambda name: np.fromfile(args.data / f"{name}.bin", dtype=np.uint16)
  result = json.loads(args.out.read_text()) if args.out.exists() else {}
  result |= {"model": args.model.name, "parameters": model.n_params()}
  begin = time.time()

  if "losses" not in skip:
    sets = {"books-valid": read("valid"), "books-test": read("test"), "tech-docs held out": read("tech_valid")}
    if args.wikitext:
      ids = tokenizer.encode(args.wikitext.read_text(encoding="utf-8"), add_special_tokens=False).ids
      sets["WikiText-2 test"] = np.array(ids, dtype=np.uint16)
    # Byte-level BPE: one character of a token string is one byte; <|endoftext|> stands for none.
    token_bytes = np.array([0] + [len(tokenizer.id_to_token(i)) for i in range(1, tokenizer.get_vocab_size())])
    ngrams = {}
    if "ngram" not in skip:
      if args.seen:
        seen = text_seen(args.data, args.seen)
        result["text_tokens_seen"] = len(seen)
        ngrams["ngram_seen"] = KneserNey(seen, tokenizer.get_vocab_size())
      ngrams["ngram_all"] = KneserNey(read("train"), tokenizer.get_vocab_size())
    result["losses"] = measure_losses(model, ngrams, sets, token_bytes, args.max_tokens)
  if "curve" not in skip:
    result["curve"] = context_curve(model, read("test"), args.samples)
  if "recall" not in skip:
    result["recall"] = measure_recall(model, eval_tasks(tokenizer, read("test")), args.documents)
  args.out.write_text(json.dumps(result, indent=1) + "\n")
  print(f"{args.out} written after {time.time() - begin:.0f} s")


if __name__ == "__main__":
  main()
