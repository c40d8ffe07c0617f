#!/usr/bin/env python3
"""Checks the trainer: on tiny random `llama` and `qwen2` models against the engine, and on the bundled model.

  python -m unittest -v test_refine       (in this folder; tests against the engine need a built lesskv: LESSKV=path, or build/release)

TRITON_INTERPRET=1 runs the GPU kernel's test on a CPU, in minutes.
"""
import json
import math
import os
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

import gguf
import numpy as np
import torch
import torch.nn.functional as F

import cache
import refine
import sidecar
import texts
from cache import Policy
from llm import Llm
from sidecar import FeatureMaps

ROOT = Path(__file__).resolve().parents[2]
MODEL, SIDECAR, TEXT = ROOT / "models/lesskv-small.gguf", ROOT / "models/lesskv-small.less.gguf", ROOT / "docs/sample.txt"
LESSKV = Path(os.environ.get("LESSKV", ROOT / "build/release/apps/lesskv/lesskv"))


def byte_tokens():
  """GPT-2's names of the 256 bytes, in the order of the bytes."""
  plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
  others = (b for b in range(256) if b not in plain)
  names = {b: chr(b) for b in plain} | {b: chr(256 + i) for i, b in enumerate(others)}
  return [names[b] for b in range(256)]


def write_tiny(path, arch, group, n_kv, tied, seed):
  """A random model of two layers with heads of 16 whose attention is peaked; a token a byte, and `th`."""
  rng, d, layers, ffn = np.random.default_rng(seed), 16, 2, 64
  width, vocab = group * n_kv * d, 257
  writer = gguf.GGUFWriter(str(path), arch)
  writer.add_name(f"tiny-{arch}")
  writer.add_context_length(1024)
  writer.add_embedding_length(width)
  writer.add_block_count(layers)
  writer.add_feed_forward_length(ffn)
  writer.add_head_count(group * n_kv)
  writer.add_head_count_kv(n_kv)
  writer.add_layer_norm_rms_eps(1e-6)
  writer.add_rope_freq_base(12345.0)
  writer.add_vocab_size(vocab)
  writer.add_tokenizer_model("gpt2")
  writer.add_tokenizer_pre("qwen2" if arch == "qwen2" else "smollm")
  writer.add_token_list([*byte_tokens(), "th"])
  writer.add_token_types([gguf.TokenType.NORMAL] * vocab)
  writer.add_token_merges(["t h"])
  writer.add_eos_token_id(0)
  writer.add_add_bos_token(False)
  matrix = lambda rows, columns, scale: (rng.standard_normal((rows, columns)) * scale / math.sqrt(columns)).astype(np.float32)
  writer.add_tensor("token_embd.weight", matrix(vocab, width, math.sqrt(width) if tied is False else 2.0))
  writer.add_tensor("output_norm.weight", np.ones(width, np.float32))
  if not tied:
    writer.add_tensor("output.weight", matrix(vocab, width, 2.0))
  for i in range(layers):
    for name, rows, columns, scale in (("attn_q", width, width, 1.8), ("attn_k", n_kv * d, width, 1.8), ("attn_v", n_kv * d, width, 2.0),
                                       ("attn_output", width, width, 2.0), ("ffn_gate", ffn, width, 1.0), ("ffn_up", ffn, width, 1.0),
                                       ("ffn_down", width, ffn, 1.0)):
      writer.add_tensor(f"blk.{i}.{name}.weight", matrix(rows, columns, scale))
      if arch == "qwen2" and name in ("attn_q", "attn_k", "attn_v"):
        writer.add_tensor(f"blk.{i}.{name}.bias", (rng.standard_normal(rows) * (3 if name == "attn_k" else 0.5)).astype(np.float32))
    for name in ("attn_norm", "ffn_norm"):
      writer.add_tensor(f"blk.{i}.{name}.weight", (1 + 0.2 * rng.standard_normal(width)).astype(np.float32))
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()


TINY = {"llama, 3 queries a KV head, tied": ("llama", 3, 2, True), "llama, 2 queries a KV head, untied": ("llama", 2, 1, False),
        "qwen2, 7 queries a KV head, tied": ("qwen2", 7, 1, True), "qwen2, 7 queries a KV head, untied": ("qwen2", 7, 2, False)}


def likely_maps(llm, ids, path):
  """Random maps that weigh something, relative to centres of the keys, written for the model and read again as the engine reads them."""
  maps = FeatureMaps.random(llm.shape, 6, 32, seed=3)
  refine.calibrate(llm, ids, maps, fresh=True)
  with torch.no_grad():
    for name, values in maps.weights.items():
      if name.endswith("psi_b2"):
        values.fill_(-0.5)
    for layer in range(maps.n_layers):
      getattr(maps, f"{layer}_center").normal_(generator=torch.Generator().manual_seed(layer)).mul_(0.2)
  maps.identify(llm.path)
  maps.write(path)
  read = FeatureMaps.read(path)
  for layer in range(maps.n_layers):
    assert torch.equal(getattr(read, f"{layer}_center"), getattr(maps, f"{layer}_center"))
  return read


def engine_nats(model, text_path, specs, context):
  command = [LESSKV, "eval", "perplexity", "-m", model, "--text", text_path, "--ctx", str(context), "--max-windows", "1", "--mode", "stream",
             "--step", "8", "--compute", "f32", "-t", "1", "-o", "json", *[a for s in specs for a in ("--kv", s)]]
  return [math.log(row["perplexity"]) for row in json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)]


@torch.no_grad()
def script_nats(llm, maps, ids, spec):
  if spec == "full":
    return refine.nats(llm, llm.full(ids), ids).mean().item()
  policy = Policy(spec.split("(")[0], int(spec.split("(")[1].split(")")[0]))
  return refine.nats(llm, refine.Compressed(llm, maps, policy, 8).hidden(ids), ids).mean().item()


class TinyModels(unittest.TestCase):
  def test_the_engine_computes_the_same(self):
    if not LESSKV.exists():
      self.skipTest(f"{LESSKV} is not there")
    specs = ["full", "h2o(20)+less", "window(24)+less", "tova(22)+less", "h2o(20)"]
    for seed, (label, form) in enumerate(TINY.items()):
      with self.subTest(label), tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "tiny.gguf"
        write_tiny(model, *form, seed)
        llm, ids = Llm(model), texts.TextTokenizer(model).encode(TEXT.read_text())[:256]
        ids = torch.from_numpy(ids.astype(np.int64))[None]
        maps = likely_maps(llm, ids, Path(folder) / "tiny.less.gguf")
        engine = engine_nats(model, TEXT, specs, 256)
        for spec, expected in zip(specs[:-1], engine):
          self.assertAlmostEqual(script_nats(llm, maps, ids, spec), expected, delta=3e-3, msg=spec)
        self.assertGreater(abs(engine[1] - engine[-1]), 0.02)  # else it would not show whether LESS is right

  def test_matrices_of_16_bits_change_little(self):
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
      model, ids = Path(folder) / "tiny.gguf", torch.arange(40, 104)[None]
      write_tiny(model, *TINY["qwen2, 7 queries a KV head, untied"], seed=6)
      full, short = (Llm(model, bf16=bf16).full(ids) for bf16 in (False, True))
      self.assertLess((short - full).norm() / full.norm(), 0.03)
      self.assertFalse(torch.equal(short, full))
      self.assertEqual(short.dtype, torch.float32)

  def test_both_phases_lower_their_loss(self):
    for label in ("llama, 3 queries a KV head, tied", "qwen2, 7 queries a KV head, untied"):
      with self.subTest(label), tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(1)
        model = Path(folder) / "tiny.gguf"
        write_tiny(model, *TINY[label], seed=8)
        llm, ids, policy = Llm(model), torch.randint(32, 120, (2, 128)), Policy("h2o", 24)
        maps = FeatureMaps.random(llm.shape, 4, 16, seed=0)
        refine.calibrate(llm, ids, maps, fresh=True)
        losses = {"layerwise": [], "joint": []}
        for phase, found in losses.items():
          optimizer = torch.optim.Adam(maps.parameters(), lr=2e-2)
          for _ in range(25):
            optimizer.zero_grad()
            if phase == "layerwise":
              loss = refine.layerwise_loss(llm, ids, policy, 8, maps).mean()
            else:
              loss = refine.joint_loss(llm, ids, policy, 8, maps)
              loss.backward()
            optimizer.step()
            found.append(loss.item())
        self.assertAlmostEqual(losses["layerwise"][0], 1, delta=0.05)  # untrained maps are about the bare selector
        self.assertLess(losses["layerwise"][-1], 0.9)
        self.assertLess(losses["joint"][-1], 0.9 * losses["joint"][0])

  def test_gradients_agree_with_finite_differences(self):
    with tempfile.TemporaryDirectory() as folder:
      torch.manual_seed(2)
      model = Path(folder) / "tiny.gguf"
      write_tiny(model, *TINY["qwen2, 7 queries a KV head, untied"], seed=5)
      llm, ids, policy = Llm(model), torch.randint(32, 120, (1, 64)), Policy("window", 16)  # window: what stays depends on nothing
      maps = likely_maps(llm, ids, Path(folder) / "tiny.less.gguf")
      refine.joint_loss(llm, ids, policy, 8, maps).backward()
      for name in ("0_psi_b2", "1_phi_w2", "0_phi_b1"):
        weight = maps.weights[name]
        direction = torch.randn_like(weight)
        with torch.no_grad():
          weight += 1e-2 * direction
          above = refine.joint_loss(llm, ids, policy, 8, maps)
          weight -= 2e-2 * direction
          below = refine.joint_loss(llm, ids, policy, 8, maps)
          weight += 1e-2 * direction
        expected = ((above - below) / 2e-2).item()
        self.assertAlmostEqual((weight.grad * direction).sum().item(), expected, delta=0.03 * abs(expected) + 1e-5, msg=name)


class Bundled(unittest.TestCase):
  @classmethod
  def setUpClass(cls):
    cls.llm, cls.maps, tokenizer = Llm(MODEL), FeatureMaps.read(SIDECAR), texts.TextTokenizer(MODEL)
    cls.ids = torch.tensor([[tokenizer.bos, *tokenizer.encode(TEXT.read_text())[:511].tolist()]])

  def test_with_room_for_all_it_is_full_attention(self):
    with torch.no_grad():
      full = self.llm.full(self.ids)
      for name in ("h2o", "window", "tova"):
        compressed = refine.Compressed(self.llm, self.maps, Policy(name, 512), 8).hidden(self.ids)
        self.assertLess((compressed - full).norm() / full.norm(), 1e-4, name)

  def test_the_engine_computes_the_same(self):
    if not LESSKV.exists():
      self.skipTest(f"{LESSKV} is not there")
    specs = ["full", "h2o(24)+less"]
    for spec, expected in zip(specs, engine_nats(MODEL, TEXT, specs, 512)):
      self.assertAlmostEqual(script_nats(self.llm, self.maps, self.ids, spec), expected, delta=3e-3, msg=spec)

  def test_a_sidecar_is_written_as_it_was_read_and_can_name_another_file(self):
    with tempfile.TemporaryDirectory() as folder:
      out, other = Path(folder) / "out.less.gguf", Path(folder) / "other.gguf"
      other.write_bytes(MODEL.read_bytes()[:-1] + b"\x01")
      run = lambda *args: subprocess.run([sys.executable, sidecar.__file__, *args], check=True)
      run("--sidecar", SIDECAR, "--out", out, "--model", other)
      self.assertEqual(gguf.GGUFReader(str(out)).fields["lesskv.model.fingerprint"].contents(), sidecar.fingerprint(other))
      self.assertNotEqual(sidecar.fingerprint(other), sidecar.fingerprint(MODEL))
      read = FeatureMaps.read(out)
      for name, value in self.maps.weights.items():
        self.assertTrue(torch.equal(read.weights[name], value), name)
      parts = lambda path: {t.name: bytes(t.data) for t in gguf.GGUFReader(str(path)).tensors if not t.name.startswith("less.")}
      self.assertEqual(parts(out), parts(SIDECAR))
      self.assertTrue(parts(out))

  def test_maps_give_what_they_gave_when_they_learn_what_their_inputs_look_like(self):
    maps, x = FeatureMaps.read(SIDECAR), {}

    def attend(layer, q, k, v):
      x[layer, "phi"], x[layer, "psi"] = q, k
      return self.llm.attend_all(layer, q, k, v)

    with torch.no_grad():
      self.llm.forward(self.ids, attend)
      refine.calibrate(self.llm, self.ids, maps, fresh=False)
      for (layer, net), rows in x.items():
        expected, found = (m.features(layer, net, rows) for m in (self.maps, maps))
        self.assertLess((found - expected).norm() / expected.norm(), 1e-4)
        self.assertFalse(torch.equal(maps.weights[f"{layer}_{net}_w1"], self.maps.weights[f"{layer}_{net}_w1"]))


class Replay(unittest.TestCase):
  def test_a_window_keeps_sinks_and_the_latest(self):
    q, k = torch.randn(1, 4, 64, 64), torch.randn(1, 2, 64, 64)
    before, leave = cache.replay(q, k, Policy("window", 16), 8)
    self.assertEqual(before[0, 0, 5].tolist(), [*range(4), *range(28, 40)])
    self.assertTrue((before[0, 0, 0] == -1).all())
    self.assertEqual(leave[0, 0, :8].tolist(), [8, 8, 8, 8, 3, 3, 3, 3])  # token 4 is out before the step at 24

  def test_each_token_is_exact_or_in_the_state(self):
    torch.manual_seed(1)
    q, k, v = torch.randn(1, 4, 128, 64), torch.randn(1, 2, 128, 64), torch.randn(1, 2, 128, 64)
    psi = torch.rand(1, 2, 128, 3)
    for name in ("h2o", "window", "tova"):
      for budget, step in ((24, 8), (21, 8), (32, 16), (8, 8), (6, 32), (128, 8)):
        before, leave = cache.replay(q, k, Policy(name, budget), step)
        state = cache.state_before_steps(psi, v, leave, budget, step)
        for head in range(2):
          for s in range(128 // step):
            rows = [r for r in before[0, head, s].tolist() if r >= 0]
            left = (leave[0, head] <= s).nonzero()[:, 0]
            self.assertEqual(sorted(rows + left.tolist()), [*range(s * step)], (name, budget, step))
            self.assertLess((state[0, head, s, :, -1] - psi[0, head, left].sum(0)).abs().max(), 1e-4)
            self.assertLess((state[0, head, s, :, :-1] - psi[0, head, left].T @ v[0, head, left]).abs().max(), 1e-4)

  def test_budgets_are_the_engines(self):
    self.assertEqual([Policy.parse(f"{n}:5", 2048).budget for n in ("h2o", "window", "tova")], [102, 102, 102])
    self.assertEqual(Policy.parse("h2o:5", 1000).budget, 50)
    self.assertEqual(Policy.parse("h2o:5", 1020).budget, 50)  # 51 rows are two halves of 25

  def test_the_kernel_agrees(self):
    if not (torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"):
      self.skipTest("no GPU, and TRITON_INTERPRET is not set")
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for group, budget, step in ((3, 24, 8), (7, 20, 8), (2, 25, 16)):
      q, k = 1.5 * torch.randn(1, 2 * group, 128, 64, device=device), torch.randn(1, 2, 128, 64, device=device)
      policy = Policy("h2o", budget)
      before, leave = cache.replay_scored(q, k, policy, step)
      found_before, found_leave = cache.h2o_kernel.replay(q, k, budget, policy.recent, step)
      same = 1.0 if device == "cpu" else 0.97  # TF32 scores order near ties otherwise
      self.assertGreaterEqual((leave == found_leave).float().mean().item(), same)
      self.assertGreaterEqual((before.sort(3).values == found_before.sort(3).values).float().mean().item(), same)


class Loss(unittest.TestCase):
  def test_divergence_and_its_gradient(self):
    torch.manual_seed(2)
    head = torch.randn(50, 16)
    student, teacher = torch.randn(300, 16, requires_grad=True), torch.randn(300, 16)
    logits = lambda x: F.linear(x, head).log_softmax(-1)
    expected = F.kl_div(logits(student), logits(teacher), log_target=True, reduction="none").sum(-1).mean()
    wanted, = torch.autograd.grad(expected, student)
    found = refine.Divergence.apply(student, teacher, head)
    got, = torch.autograd.grad(found, student)
    self.assertAlmostEqual(found.item(), expected.item(), delta=1e-4)
    self.assertLess((got - wanted).norm() / wanted.norm(), 1e-4)


class Runs(unittest.TestCase):
  def test_a_run_that_was_stopped_goes_on_as_if_it_had_not(self):
    with tempfile.TemporaryDirectory() as folder:
      model, packed = Path(folder) / "tiny.gguf", Path(folder) / "texts.npz"
      write_tiny(model, *TINY["llama, 3 queries a KV head, tied"], seed=4)
      tool = lambda script, *args: subprocess.run([sys.executable, Path(__file__).with_name(script), "--model", model, *args], check=True,
                                                  capture_output=True)
      tool("texts.py", "--out", packed, "--group", "sample:3000", TEXT)
      train = lambda out, *args: tool("refine.py", "--tokens", packed, "--context", "64", "--policies", "h2o:20,window:20,tova:20", "--rank", "4",
                                      "--hidden", "16", "--every", "1", "--step", "8", "--out", Path(folder) / out, *args)
      train("once", "--layerwise", "3", "--steps", "3")
      train("twice", "--layerwise", "3", "--steps", "3", "--stop-after", "4")
      train("twice", "--layerwise", "3", "--steps", "3", "--resume")
      once, twice = (FeatureMaps.read(Path(folder) / out) for out in ("once", "twice"))
      self.assertEqual(once.about["lesskv.model.fingerprint"][0], sidecar.fingerprint(model))
      for name, value in once.weights.items():
        self.assertTrue(torch.equal(twice.weights[name], value), name)


class Texts(unittest.TestCase):
  def test_crops_are_stretches_of_their_group(self):
    groups = {"a": (1, [np.arange(100), np.arange(10)]), "b": (3, [np.arange(200, 300)])}
    rows = texts.Crops(groups, bos=None, vocabulary=300).batch(seed=1, n=200, tokens=20)
    self.assertTrue(((rows[:, 1:] - rows[:, :-1]) == 1).all())
    self.assertAlmostEqual((rows[:, 0] >= 200).float().mean().item(), 0.75, delta=0.1)
    with self.assertRaises(SystemExit):
      texts.Crops(groups, bos=None, vocabulary=299)


if __name__ == "__main__":
  unittest.main()
