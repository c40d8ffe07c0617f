"""An interpolated modified Kneser-Ney n-gram model (Chen and Goodman 1998), the yardstick the reference model has to beat.

Token ids below 4096 take 12 bits, so an n-gram up to order 5 is one 64-bit number and counting is sorting.
"""
import numpy as np

BITS = 12
ORDER = 5


def pack(tokens, n: int):
  """Keys of all n-grams of `tokens`, oldest token in the highest bits; uint64 [len(tokens) - n + 1]."""
  count = len(tokens) - n + 1
  key = np.zeros(count, dtype=np.uint64)
  for i in range(n):
    key = (key << np.uint64(BITS)) | tokens[i:i + count].astype(np.uint64)
  return key


class Table:
  """Counts of one order: n-grams and, for each history, the total and how many n-grams count 1, 2, 3 or more."""

  def __init__(self, grams, counts):
    self.grams, self.counts = grams, counts
    n1, n2, n3, n4 = (float((counts == i).sum()) for i in (1, 2, 3, 4))
    y = n1 / (n1 + 2 * n2)
    self.discount = np.array([0, 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / max(n2, 1), 3 - 4 * y * n4 / max(n3, 1)]).clip(0)
    self.histories, first = np.unique(grams >> np.uint64(BITS), return_index=True)
    self.totals = np.add.reduceat(counts, first).astype(np.float64)
    cls = np.minimum(counts, 3)
    self.left = sum(self.discount[c] * np.add.reduceat((cls == c).astype(np.float64), first) for c in (1, 2, 3))

  def probability(self, keys, lower):
    """p(w | h) of each key (h, w), given the shorter history's p."""
    i = np.minimum(np.searchsorted(self.histories, keys >> np.uint64(BITS)), len(self.histories) - 1)
    seen = self.histories[i] == keys >> np.uint64(BITS)
    j = np.minimum(np.searchsorted(self.grams, keys), len(self.grams) - 1)
    count = np.where(self.grams[j] == keys, self.counts[j], 0)
    kept = np.maximum(count - self.discount[np.minimum(count, 3)], 0)
    return np.where(seen, (kept + self.left[i] * lower) / self.totals[i], lower)


class KneserNey:
  def __init__(self, tokens, vocab: int):
    assert vocab <= 1 << BITS, f"vocabulary of at most {1 << BITS}, found {vocab}"
    self.vocab, self.tables = vocab, {}
    grams, counts = np.unique(pack(tokens, ORDER), return_counts=True)
    for n in range(ORDER, 0, -1):
      self.tables[n] = Table(grams, counts.astype(np.int64))
      mask = np.uint64((1 << (BITS * (n - 1))) - 1)  # a lower order counts in how many contexts its n-gram occurs
      grams, counts = np.unique(np.sort(grams & mask), return_counts=True)

  def nats(self, tokens):
    """-log p of tokens[ORDER - 1:]; the first ones only serve as history."""
    p = np.full(len(tokens) - ORDER + 1, 1.0 / self.vocab)
    for n in range(1, ORDER + 1):
      p = self.tables[n].probability(pack(tokens[ORDER - n:], n), p)
    return -np.log(p)
