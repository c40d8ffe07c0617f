#!/usr/bin/env python3
"""Checks refine.py on the bundled model, in about a minute.

  python -m unittest -v test_refine       (in this folder; the last test needs a built lesskv: LESSKV=path, or build/release)
"""
import json
import math
import os
import subprocess
import tempfile
import unittest
from pathlib import Path

import gguf
import torch
import torch.nn.functional as F

import refine

ROOT = Path(__file__).resolve().parents[2]
MODEL, SIDECAR, TEXT = ROOT / "models/lesskv-small.gguf", ROOT / "models/lesskv-small.less.gguf", ROOT / "docs/sample.txt"
LESSKV = Path(os.environ.get("LESSKV", ROOT / "build/release/apps/lesskv/lesskv"))


class Refine(unittest.TestCase):
  @classmethod
  def setUpClass(cls):
    cls.runner = refine.Runner(MODEL)
    cls.maps = refine.FeatureMaps(SIDECAR, cls.runner.cfg.n_layers)
    ids = refine.read_tokenizer(MODEL).encode(TEXT.read_text()).ids
    cls.ids = torch.tensor([[0] + ids[:511]])

  def test_with_room_for_all_it_is_full_attention(self):
    full = self.runner.full(self.ids)
    for name in ("h2o", "window", "tova"):
      compressed = self.runner.compressed(self.ids, (name, 512), 8, self.maps)
      self.assertLess((compressed - full).norm() / full.norm(), 0.02, name)  # bfloat16 products of other shapes

  def test_a_window_keeps_sinks_and_the_latest(self):
    q, k = torch.randn(1, 4, 64, 64), torch.randn(1, 2, 64, 64)
    before, leave = refine.replay(q, k, ("window", 16), 8)
    self.assertEqual(before[0, 0, 5].tolist(), [*range(4), *range(28, 40)])
    self.assertTrue((before[0, 0, 0] == -1).all())
    self.assertEqual(leave[0, 0, :8].tolist(), [8, 8, 8, 8, 3, 3, 3, 3])  # token 4 is out before the step at 24

  def test_each_token_is_exact_or_in_the_state(self):
    torch.manual_seed(1)
    q, k = torch.randn(1, 4, 128, 64), torch.randn(1, 2, 128, 64)
    for name in ("h2o", "window", "tova"):
      before, leave = refine.replay(q, k, (name, 24), 8)
      for head in range(2):
        for step in range(16):
          rows = set(before[0, head, step].tolist()) - {-1}
          left = set((leave[0, head] <= step).nonzero()[:, 0].tolist())
          self.assertFalse(rows & left, name)
          self.assertEqual(rows | left, set(range(8 * step)), name)

  def test_divergence_and_its_gradient(self):
    torch.manual_seed(2)
    embedding = torch.randn(50, 16).bfloat16()
    student, teacher = torch.randn(300, 16, requires_grad=True), torch.randn(300, 16)
    logits = lambda x: F.linear(x.bfloat16(), embedding).float().log_softmax(-1)
    expected = F.kl_div(logits(student), logits(teacher), log_target=True, reduction="none").sum(-1).mean()
    wanted, = torch.autograd.grad(expected, student)
    found = refine.Divergence.apply(student, teacher, embedding)
    got, = torch.autograd.grad(found, student)
    self.assertAlmostEqual(found.item(), expected.item(), delta=1e-4)
    self.assertLess((got - wanted).norm() / wanted.norm(), 0.02)

  def test_refining_lowers_the_divergence_and_writes_a_sidecar(self):
    with tempfile.TemporaryDirectory() as folder:
      out = Path(folder) / "out.less.gguf"
      maps = refine.FeatureMaps(SIDECAR, self.runner.cfg.n_layers)
      optimizer = torch.optim.Adam(maps.parameters(), lr=1e-3)
      losses = []
      for _ in range(6):
        loss = refine.loss_of(self.runner, self.ids, ("h2o", 24), 8, maps)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
      self.assertLess(losses[-1], 0.95 * losses[0])
      maps.write(SIDECAR, out, "six steps")
      self.assertEqual(gguf.GGUFReader(str(out)).fields["less.refine.history"].contents()[-1], "six steps")
      read = refine.FeatureMaps(out, self.runner.cfg.n_layers)
      for name, value in maps.weights.items():
        self.assertLess((read.weights[name] - value).norm() / value.norm().clamp(min=1e-6), 0.01, name)  # stored in halves

  def test_the_engine_computes_the_same(self):
    if not LESSKV.exists():
      self.skipTest(f"{LESSKV} is not there")
    specs = ["full", "h2o(24)+less", "window(24)+less", "tova(24)+less"]
    rows = json.loads(subprocess.run(
        [LESSKV, "eval", "perplexity", "-m", MODEL, "--text", TEXT, "--ctx", "512", "--max-windows", "1", "--mode", "stream", "--step", "8", "-o", "json",
         *[a for s in specs for a in ("--kv", s)]], check=True, capture_output=True, text=True).stdout)
    with torch.no_grad():
      for spec, row in zip(specs, rows):
        policy = (spec.split("(")[0], 24)
        hidden = self.runner.full(self.ids) if spec == "full" else self.runner.compressed(self.ids, policy, 8, self.maps)
        scores = F.linear(hidden[0, :-1].bfloat16(), self.runner.embedding).float().log_softmax(-1)
        nats = -scores.gather(1, self.ids[0, 1:, None]).mean().item()
        self.assertAlmostEqual(nats, math.log(row["perplexity"]), delta=0.02, msg=spec)


if __name__ == "__main__":
  unittest.main()
