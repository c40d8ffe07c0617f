#!/usr/bin/env python3
"""Runs the whole chain at a tiny scale on the CPU, in about a minute, on text made from a seed.

  python -m unittest -v test_reference_model       (in this folder)
"""
import io
import json
import random
import subprocess
import sys
import tarfile
import tempfile
import unittest
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer

import shards
from model import CONFIGS, Model
from ngram import ORDER, KneserNey
from tasks import Tasks, eval_doc, eval_tasks, load_words

HERE = Path(__file__).resolve().parent


def run(script: str, *args) -> str:
  done = subprocess.run([sys.executable, str(HERE / script), *map(str, args)], capture_output=True, text=True)
  assert done.returncode == 0, f"{script} {args}\n{done.stdout}\n{done.stderr}"
  return done.stdout


def write_archives(folder: Path) -> None:
  """Archives of the expected names with nonsense prose: words of two or three syllables, a paragraph a line."""
  rng = random.Random(5)
  syllables = [a + b for a in "bdfgklmnprst" for b in "aeiou"]
  words = ["".join(rng.choices(syllables, k=rng.choice((2, 3)))) for _ in range(600)]
  def text(n):
    return "\n\n".join(" ".join(rng.choices(words, k=12)).capitalize() + ", so it is." for _ in range(n)) + "\n"
  for name, files in (("books-train-core", 6), ("books-train-extra", 6), ("books-valid", 2), ("books-test", 2), ("tech-docs", 40)):
    with tarfile.open(folder / f"{name}.tar.xz", "w:xz") as tar:
      for i in range(files):
        data = text(60 if name == "tech-docs" else 400).encode()
        info = tarfile.TarInfo(f"{name}/{i:03d}.txt")
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))


class Chain(unittest.TestCase):
  @classmethod
  def setUpClass(cls):
    cls.folder = tempfile.TemporaryDirectory()
    cls.root = Path(cls.folder.name)
    (cls.root / "text").mkdir()
    write_archives(cls.root / "text")
    cls.data = cls.root / "data"
    run("prepare.py", "--text", cls.root / "text", "--out", cls.data, "--vocab", 4096)
    # The nonsense text has fewer than 4096 tokens; the model's vocabulary may be larger than the tokenizer's.
    cls.tokenizer = Tokenizer.from_file(str(cls.data / "tokenizer.json"))
    cls.text = np.fromfile(cls.data / "train.bin", dtype=np.uint16)

  @classmethod
  def tearDownClass(cls):
    cls.folder.cleanup()

  def train(self, name: str, *more) -> Path:
    run("train.py", "--config", "tiny", "--data", self.data, "--run", self.root / name, "--minutes", 1000, "--tokens", 16 * 512,
        "--step-tokens", 512, "--micro-tokens", 256, "--no-compile", "--threads", 1, "--log-steps", 1, "--device", "cpu", *more)
    return self.root / name

  def test_tasks_are_cut_where_the_tokenizer_cuts(self):
    tasks = Tasks(self.tokenizer, load_words(self.data / "words.txt"), self.text)
    for kind in (tasks.kv, tasks.variable):
      for seed in range(40):
        doc = kind(random.Random(seed), 200)
        whole = self.tokenizer.encode(self.tokenizer.decode(doc.ids), add_special_tokens=False).ids
        if whole != doc.ids:  # filler text may begin or end inside a word; then the document is not comparable
          self.assertEqual(kind, tasks.variable)
        self.assertEqual(len(doc.ids), len(doc.weights))
        self.assertTrue(doc.answers)

  def test_answers_are_stated_before_they_are_asked(self):
    tasks = eval_tasks(self.tokenizer, self.text)
    for kind in ("kv", "kv_words", "needle"):
      doc = eval_doc(tasks, kind, 240, 3)
      for a, b in doc.answers:
        line = doc.ids[a - 2:b]
        self.assertTrue(any(doc.ids[i:i + len(line)] == line for i in range(a - 2)), kind)

  def test_evaluation_words_are_never_trained(self):
    held_out = set((HERE / "eval_words.txt").read_text().split())
    self.assertEqual(len(held_out), 400)
    self.assertFalse(held_out & set(load_words(self.data / "words.txt")))

  def test_resumed_training_equals_uninterrupted(self):
    whole, parts = self.train("whole"), self.train("parts", "--max-steps", 9)
    self.assertFalse((parts / "final.pt").exists())
    self.train("parts")
    a, b = (torch.load(r / "final.pt", weights_only=True)["model"] for r in (whole, parts))
    for key in a:
      self.assertTrue(torch.equal(a[key], b[key]), key)
    losses = [json.loads(l)["loss"] for l in (whole / "log.jsonl").read_text().splitlines() if '"loss"' in l]
    self.assertLess(losses[-1], losses[0])

  def test_export_equals_checkpoint(self):
    run_dir = self.train("exported")
    tokenizer = json.loads((self.data / "tokenizer.json").read_text())
    for i in range(len(tokenizer["model"]["vocab"]), CONFIGS["tiny"].vocab):
      tokenizer["model"]["vocab"][f"<unused{i}>"] = i
    (self.root / "padded.json").write_text(json.dumps(tokenizer))
    for kind in ("f32", "q8_0"):
      run("export_gguf.py", "--checkpoint", run_dir / "final.pt", "--tokenizer", self.root / "padded.json", "--type", kind,
          "--out", self.root / f"{kind}.gguf")
    golden = self.root / "golden.safetensors"
    out = run("make_logits_golden.py", "--model", self.root / "f32.gguf", "--against", run_dir / "final.pt", "--out", golden)
    self.assertIn("argmax equal: True", out)
    self.assertLess(golden.stat().st_size, 400 << 10)

  def test_pack_and_shards_give_back_the_same_bytes(self):
    run("prepare.py", "--pack", self.data, "--out", self.root / "packed")
    run("prepare.py", "--unpack", self.root / "packed", "--out", self.root / "unpacked")
    for name in ("train.bin", "valid.bin", "tokenizer.json", "words.txt"):
      self.assertEqual((self.data / name).read_bytes(), (self.root / "unpacked" / name).read_bytes(), name)
    source = self.data / "train.bin"
    shards.split(source, self.root / "parts_of", part_bytes=10_000)
    self.assertGreater(len(list((self.root / "parts_of").glob("part.*"))), 2)
    shards.join(self.root / "parts_of", self.root / "joined")
    self.assertEqual(source.read_bytes(), (self.root / "joined").read_bytes())
    damaged = self.root / "parts_of" / "part.001"
    damaged.write_bytes(b"x" + damaged.read_bytes()[1:])
    with self.assertRaises(SystemExit):
      shards.join(self.root / "parts_of", self.root / "joined")

  def test_ngram_probabilities_sum_to_one(self):
    model = KneserNey(self.text, 4096)
    for start in (10, 500, 3000):
      history = self.text[start:start + ORDER - 1]
      rows = np.concatenate([np.append(history, np.uint16(w)) for w in range(4096)])
      self.assertAlmostEqual(float(np.exp(-model.nats(rows)[::ORDER]).sum()), 1.0, places=9)

  def test_base_has_its_size(self):
    with torch.device("meta"):
      n = Model(CONFIGS["base"]).n_params()
    self.assertTrue(50e6 < n < 60e6, n)
    self.assertEqual(CONFIGS["base"].context, 4096)


if __name__ == "__main__":
  unittest.main()
