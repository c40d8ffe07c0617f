#!/usr/bin/env python3
"""Trains a reference model against the clock: the learning rate reaches zero when --minutes of training have passed.

  train.py --config small --data DIR --run DIR --minutes 90          (start, or resume from DIR/last.pt)

Progress p in [0, 1] is the larger of time used / time given and, when --tokens is set, tokens seen / --tokens.  It drives everything:
the learning rate (warm-up, flat, linear to zero), the window (STAGES) and the share of recall sequences.  Data is drawn from a
seed and the step number, so a resumed run sees what an uninterrupted one would.  DIR/log.jsonl receives a line every --log-steps steps.
"""
import argparse
import json
import os
import random
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer

from model import CONFIGS, Model, save_state
from tasks import Tasks, eval_doc, eval_tasks, load_words

# (until progress, share of the context as window, relative tokens a step)
STAGES = [(0.28, 0.25, 0.5), (0.60, 0.5, 0.5), (1.01, 1.0, 1.0)]
WARMUP, FLAT_UNTIL = 0.01, 0.35


def stage(p: float):
  return next(s for s in STAGES if p < s[0])


def lr_factor(p: float) -> float:
  return min(1.0, p / WARMUP + 0.02, max(0.0, (1 - p) / (1 - FLAT_UNTIL)))


def recall_share(p: float) -> float:
  """Much recall at short range first, then less over longer windows."""
  return float(np.interp(p, (0, 0.12, 0.18, 0.6, 1), (0.5, 0.42, 0.25, 0.17, 0.12)))


def task_mix(p: float):
  """Weights of kv, needle, repeat, variable, copy: plain copying first, the rest builds on it."""
  return (0.3, 0.15, 0.15, 0.1, 0.3) if p < 0.12 else (0.4, 0.25, 0.15, 0.15, 0.05)


class Muon:
  """Momentum, orthogonalised (quintic Newton-Schulz, Jordan 2024), for the matrices of the layers.  Equal shapes are batched."""

  def __init__(self, params, lr=0.02, momentum=0.95, weight_decay=0.1):
    self.lr, self.momentum, self.weight_decay = lr, momentum, weight_decay
    self.groups = {}
    for p in params:
      self.groups.setdefault(tuple(p.shape), []).append(p)
    self.buffers = {s: torch.zeros(len(ps), *s, device=ps[0].device) for s, ps in self.groups.items()}

  @torch.no_grad()
  def step(self, factor: float) -> None:
    lr = self.lr * factor
    for shape, params in self.groups.items():
      grad, buf = torch.stack([p.grad for p in params]), self.buffers[shape]
      buf.lerp_(grad, 1 - self.momentum)
      update = orthogonalise(grad.lerp(buf, self.momentum)) * max(1, shape[0] / shape[1]) ** 0.5
      for p, u in zip(params, update.float()):
        p.mul_(1 - lr * self.weight_decay).add_(u, alpha=-lr)

  def state_dict(self):
    return {str(k): v for k, v in self.buffers.items()}

  def load_state_dict(self, state):
    for k, v in self.buffers.items():
      v.copy_(state[str(k)])


def orthogonalise(g):
  """[n, rows, cols] -> about U V^T of each matrix."""
  a, b, c = 3.4445, -4.7750, 2.0315
  flip = g.shape[1] > g.shape[2]
  x = (g.mT if flip else g)
  x = (x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)).bfloat16()
  for _ in range(5):
    s = x @ x.mT
    x = a * x + (b * s + c * (s @ s)) @ x
  return x.mT if flip else x


def block_order(n_tokens: int, context: int, seed: int):
  """The order in which the text's blocks of one context are read."""
  return np.random.default_rng(seed).permutation(n_tokens // context)


class Data:
  """Rows of text windows and recall sequences.  Blocks of one context are read in shuffled order, each once an epoch; a block is cut
  into windows of the current length.  `cursor` counts chunks of 1/16 context."""

  def __init__(self, folder: Path, tokenizer, context: int, seed: int):
    self.text = np.fromfile(folder / "train.bin", dtype=np.uint16)
    self.tasks = Tasks(tokenizer, load_words(folder / "words.txt"), self.text)
    self.seed, self.context = seed, context
    self.order = block_order(len(self.text), context, seed)

  def window(self, cursor: int, n: int):
    """The n tokens at `cursor`, moved up to a multiple of n, and the cursor behind them."""
    chunk = self.context // 16
    start = -(-cursor * chunk // n) * n
    block, offset = divmod(start, self.context)
    begin = int(self.order[block % len(self.order)]) * self.context + offset
    return self.text[begin:begin + n], (start + n) // chunk

  def batch(self, step: int, cursor: int, rows: int, n: int, share: float, max_span: int, mix):
    """ids [rows, n + 1], weights of the targets [rows, n]; returns also how far the text cursor moved."""
    rng = random.Random(f"{self.seed} {step}")
    ids, weights = np.zeros((rows, n + 1), np.int64), np.ones((rows, n + 1), np.float32)
    n_recall = int(rows * share + rng.random())
    for r in range(rows):
      if r < n_recall:
        doc = self.tasks.row(rng, n + 1, max_span, mix)
        ids[r], weights[r] = doc.ids, doc.weights
      else:
        ids[r, 1:], cursor = self.window(cursor, n)
    return torch.from_numpy(ids), torch.from_numpy(weights[:, 1:].copy()), cursor


def loss_of(model, ids, weights):
  """Sum of weighted cross-entropies."""
  logits = model.logits(model(ids[:, :-1])).float()
  ce = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
  return (ce * weights.flatten()).sum()


@torch.no_grad()
def quick_eval(model, valid, tasks, window: int, device: str, amp) -> dict:
  """Validation loss per token on 16 k tokens and recall accuracy (share of answers right in every token)."""
  rows = max(1, 16384 // window)
  starts = np.linspace(0, len(valid) - window - 1, rows).astype(int)
  ids = np.stack([np.concatenate(([0], valid[s:s + window])) for s in starts]).astype(np.int64)
  ids = torch.from_numpy(ids).to(device)
  out = {}
  with amp():
    out["valid_loss"] = loss_of(model, ids, torch.ones(rows, window, device=device)).item() / (rows * window)
    for kind in ("kv", "kv_words", "needle", "variable"):
      for length in sorted({window // 4, window}):
        good = total = 0
        for seed in range(4):
          doc = eval_doc(tasks, kind, int(length * 0.95), seed)
          x = torch.tensor([doc.ids[:window]], device=device)
          top = model.logits(model(x))[0].argmax(-1).tolist()
          for a, b in doc.answers:
            if b <= window:
              total += 1
              good += top[a - 1:b - 1] == doc.ids[a:b]
        out[f"{kind}@{length}"] = round(good / max(1, total), 3)
  return out


def save(path: Path, state: dict) -> None:
  tmp = path.with_suffix(".tmp")
  torch.save(state, tmp)
  os.replace(tmp, path)


def parse_arguments() -> argparse.Namespace:
  p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  p.add_argument("--config", choices=CONFIGS, default="small")
  p.add_argument("--data", type=Path, required=True)
  p.add_argument("--run", type=Path, required=True, help="folder for checkpoints and the log")
  p.add_argument("--minutes", type=float, required=True, help="training time in all, resumed parts together")
  p.add_argument("--tokens", type=float, default=0, help="end at this many tokens, if that comes first; 0: no limit")
  p.add_argument("--step-tokens", type=int, default=16384, help="tokens a step in the last stage")
  p.add_argument("--micro-tokens", type=int, default=8192, help="tokens a forward pass")
  p.add_argument("--muon-lr", type=float, default=0.02)
  p.add_argument("--adam-lr", type=float, default=1e-2)
  p.add_argument("--recall", type=float, default=1.0, help="multiplies the share of recall sequences")
  p.add_argument("--save-minutes", type=float, default=4)
  p.add_argument("--eval-minutes", type=float, default=4)
  p.add_argument("--log-steps", type=int, default=10)
  p.add_argument("--max-steps", type=int, default=0, help="stop (checkpointed, resumable) after this many steps of this call; 0: no limit")
  p.add_argument("--threads", type=int, default=0)
  p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
  p.add_argument("--no-compile", action="store_true")
  p.add_argument("--seed", type=int, default=1)
  return p.parse_args()


class Training:
  """One run: model, data and optimisers, and where it stands (`at`), which is what a checkpoint holds."""

  def __init__(self, args: argparse.Namespace):
    self.args = args
    torch.manual_seed(args.seed)
    self.cfg = CONFIGS[args.config]
    tokenizer = Tokenizer.from_file(str(args.data / "tokenizer.json"))
    self.data = Data(args.data, tokenizer, self.cfg.context, args.seed)
    self.valid = np.fromfile(args.data / "valid.bin", dtype=np.uint16)
    self.held_out = eval_tasks(tokenizer, self.valid)
    model = Model(self.cfg)
    model.seed_induction()
    self.model = model.to(args.device)
    matrices = [q for q in self.model.blk.parameters() if q.dim() == 2]
    self.rest = [q for q in self.model.parameters() if not any(q is m for m in matrices)]
    self.muon = Muon(matrices, args.muon_lr)
    self.adam = torch.optim.AdamW(self.rest, lr=args.adam_lr, betas=(0.9, 0.95), eps=1e-10, weight_decay=0.0)
    self.amp = lambda: torch.autocast(args.device, dtype=torch.bfloat16)
    self.loss_fn = loss_of if args.no_compile else torch.compile(loss_of, dynamic=False)
    self.at = {"step": 0, "tokens": 0, "recall_tokens": 0, "seconds": 0.0, "cursor": 0}
    args.run.mkdir(parents=True, exist_ok=True)
    self.last = args.run / "last.pt"
    self.log = open(args.run / "log.jsonl", "a")
    self.recent = []  # losses since the last line of the log

  def resume(self) -> None:
    if self.last.exists():
      state = torch.load(self.last, map_location=self.args.device, weights_only=True)
      self.model.load_state_dict(state["model"])
      self.muon.load_state_dict(state["muon"])
      self.adam.load_state_dict(state["adam"])
      self.at = state["at"]
      print("resumed at", self.at, flush=True)
    if not self.at["step"]:
      self.write({"config": self.args.config, "parameters": self.model.n_params(), "minutes": self.args.minutes, "seed": self.args.seed})

  def write(self, record: dict) -> None:
    self.log.write(json.dumps(record) + "\n")
    self.log.flush()

  def progress(self) -> float:
    by_tokens = self.at["tokens"] / self.args.tokens if self.args.tokens else 0
    return max(self.at["seconds"] / (60 * self.args.minutes), by_tokens)

  def save(self) -> None:
    save(self.last, save_state(self.model) | {"muon": self.muon.state_dict(), "adam": self.adam.state_dict(), "at": self.at,
                                              "seed": self.args.seed})

  def window(self, p: float) -> int:
    return int(self.cfg.context * stage(p)[1])

  def where(self, window: int) -> dict:
    return {"step": self.at["step"], "tokens": self.at["tokens"], "seconds": round(self.at["seconds"], 1), "window": window}

  def evaluate(self, window: int) -> None:
    self.write({"eval": True, **self.where(window),
                **quick_eval(self.model, self.valid, self.held_out, window, self.args.device, self.amp)})

  def batches(self, p: float, window: int, share: float) -> list:
    """A step's micro-batches: (ids, weights) each."""
    rows = max(1, self.args.micro_tokens // window)
    micro = max(1, round(self.args.step_tokens * stage(p)[2] / (rows * window)))
    batches = []
    for m in range(micro):
      # One in three micro-batches keeps recall documents short, so that what was learnt early is not lost.
      span = window if (self.at["step"] + m) % 3 else min(window, 256)
      ids, w, self.at["cursor"] = self.data.batch(self.at["step"] * 64 + m, self.at["cursor"], rows, window, share, span, task_mix(p))
      batches.append((ids.to(self.args.device), w.to(self.args.device)))
    return batches

  def backward(self, batches: list) -> None:
    weight = float(sum(w.sum() for _, w in batches))
    total = torch.zeros((), device=self.args.device)
    for ids, w in batches:
      with self.amp():
        loss = self.loss_fn(self.model, ids, w) / weight
      loss.backward()
      total += loss.detach()  # read when logged: a GPU works while the next batch is drawn
    self.recent.append(total)

  def update(self, p: float) -> None:
    torch.nn.utils.clip_grad_norm_(self.rest, 1.0)
    for group in self.adam.param_groups:
      group["lr"] = self.args.adam_lr * lr_factor(p)
    self.muon.step(lr_factor(p))
    self.adam.step()
    self.model.zero_grad(set_to_none=True)

  def step(self, p: float) -> None:
    window, share = self.window(p), min(0.9, self.args.recall * recall_share(p))
    batches = self.batches(p, window, share)
    self.backward(batches)
    self.update(p)
    tokens = sum(w.numel() for _, w in batches)
    self.at["step"] += 1
    self.at["tokens"] += tokens
    self.at["recall_tokens"] += int(share * tokens)
    self.at["seconds"] += time.time() - self.clock  # with what checkpoints and evaluations took since the last step
    self.clock = time.time()
    if self.at["step"] % self.args.log_steps == 0:
      self.write({**self.where(window), "lr": round(lr_factor(p), 4), "recall_share": round(share, 3),
                  "loss": round(torch.stack(self.recent).mean().item(), 4)})
      self.recent = []

  def run(self) -> None:
    next_save = self.at["seconds"] + 60 * self.args.save_minutes
    next_eval = self.at["seconds"] + 60 * self.args.eval_minutes
    first_step = self.at["step"]
    self.clock = time.time()
    while (p := self.progress()) < 1 and not (self.args.max_steps and self.at["step"] - first_step >= self.args.max_steps):
      self.step(p)
      if self.at["seconds"] >= next_save:
        self.save()
        next_save = self.at["seconds"] + 60 * self.args.save_minutes
      if self.at["seconds"] >= next_eval:
        self.evaluate(self.window(p))
        next_eval = self.at["seconds"] + 60 * self.args.eval_minutes
    self.evaluate(self.window(min(self.progress(), 1.0)))
    self.save()
    if self.progress() >= 1:
      save(self.args.run / "final.pt", save_state(self.model))
    print("ended at", self.at, flush=True)


def main() -> None:
  args = parse_arguments()
  if args.threads:
    torch.set_num_threads(args.threads)
  training = Training(args)
  training.resume()
  training.run()


if __name__ == "__main__":
  main()
