#!/usr/bin/env python3
"""Codes and transforms of compare.py.   python -m unittest test_compare   (in this folder; needs numpy and gguf)"""
import unittest

import numpy as np

import compare


class OneHead:
  """Keys with a rotating bias and uneven channels, queries whose powers differ: what a Capture gives."""
  def __init__(self, seed, n=1024, dim=64):
    rng = np.random.default_rng(seed)
    power = np.random.default_rng(0).permutation(np.geomspace(0.1, 10, dim))
    self.q = (rng.normal(size=(n, 2, dim)) / power).astype(np.float32)
    bias = np.zeros(dim)
    bias[3] = 40
    self.k = (rng.normal(size=(n, dim)) * power[::-1]).astype(np.float32)
    self.k += compare.rope(bias, "pairs", 1e4, np.arange(n))
    self.v = rng.normal(size=(n, dim)).astype(np.float32)

  def of(self, _):
    return self.q, self.k, self.v, self.q


class CodesTest(unittest.TestCase):
  @classmethod
  def setUpClass(cls):
    cls.learned = compare.Learned([OneHead(1), OneHead(2)], 0, "pairs", 1e4)
    cls.other = OneHead(3)

  def error(self, recipe, bits):
    q, k, _, _ = self.other.of(0)
    d = np.einsum("tgd,sd->tgs", q[::64], compare.stored(k, "k", recipe, bits, self.learned) - k)
    return np.mean((d - d.mean(-1, keepdims=True)) ** 2)

  def test_errors_of_normal_rows(self):
    """Squared errors of unit normal rows of 64, scales in f16: known numbers of plain, clipped and fitted codes."""
    x = np.random.default_rng(0).normal(size=(20000, 64)).astype(np.float32)
    for recipe, bits, expected in [("", 2, 0.202), ("", 4, 0.0080), ("clip", 2, 0.156), ("g32", 2, 0.154)]:
      error = np.mean((compare.stored(x, "k", recipe, bits, self.learned) - x) ** 2)
      self.assertAlmostEqual(error / expected, 1, delta=0.03, msg=f"{recipe} {bits}")
    fitted = compare.affine(x, 2, True)
    self.assertLess(np.mean((fitted - x) ** 2), 0.62 * 0.202)
    self.assertLess(abs(np.mean((fitted - x) * x)), 0.6 * np.mean((fitted - x) ** 2))  # widened: sums do not shrink

  def test_many_bits_give_the_numbers_back(self):
    for side, recipes in (("k", compare.KEYS), ("v", compare.VALUES)):
      x = self.other.k if side == "k" else self.other.v
      for recipe in recipes:
        if "clip" in recipe: continue
        away = compare.stored(x, side, recipe, 14, self.learned) - x
        self.assertLess(np.sqrt(np.mean(away ** 2)), 2e-3 * np.sqrt(np.mean(x ** 2)), f"{side} {recipe}")

  def test_what_was_learned_helps_on_other_rows(self):
    self.assertLess(self.error("H mean", 3), 1.01 * self.error("H", 3))
    self.assertLess(self.error("H ropemean", 3), 0.6 * self.error("H mean", 3))       # the bias rotates with positions
    self.assertLess(self.error("BH ropemean", 3), 0.6 * self.error("H ropemean", 3))  # uneven channels and queries
    self.assertAlmostEqual(self.error("channel mean", 3) / self.error("channel", 3), 1, delta=0.02)

  def test_bits(self):
    self.assertEqual([compare.bits_a_number(r.split(), 2, 128) for r in ("", "g32", "channel")], [2.25, 3, 2.5])
    self.assertEqual(compare.bits_a_number(["H", "q4"], 4, 64), 4.5)


if __name__ == "__main__":
  unittest.main()
