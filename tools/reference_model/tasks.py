"""Generated sequences that train and test in-context recall.  TASKS.md states the exact text; keep both equal.

A document is two lists of the same length: token ids, and the loss weight of predicting each of them.  Pieces are encoded one by one
and joined; they are cut where GPT-2's pre-tokenizer cuts, so the ids equal those of the whole text (test_reference_model.py checks).
"""
import random
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

ANSWER, CONTEXT, END = 5.0, 0.1, 0.5  # loss weights: answer tokens; unpredictable pairs and questions; what ends an answer

# (before the key, between key and value, after the value); the first is the one evaluation uses.
KV_TEMPLATES = [
    ("The code of", " is", ".\n"),
    ("", ":", "\n"),
    ("", " =", "\n"),
    ("The number of", " is", ".\n"),
    ("-", " ->", "\n"),
    ("Remember that", " means", ".\n"),
]
NEEDLE_TEMPLATES = [("The secret word of", " is", ".\n"), ("The code of", " is", ".\n"), ("The name of", " is", ".\n")]


@dataclass
class Doc:
  ids: list = field(default_factory=list)
  weights: list = field(default_factory=list)
  answers: list = field(default_factory=list)  # half-open (begin, end) of each answer

  def add(self, ids, weight: float) -> None:
    self.ids.extend(ids)
    self.weights.extend([weight] * len(ids))

  def answer(self, ids) -> None:
    self.answers.append((len(self.ids), len(self.ids) + len(ids)))
    self.add(ids, ANSWER)

  def append(self, other: "Doc") -> None:
    shift = len(self.ids)
    self.answers += [(a + shift, b + shift) for a, b in other.answers]
    self.ids += other.ids
    self.weights += other.weights


class Tasks:
  """Draws documents of about `length` tokens.  `text` is an array of token ids (the real text used as filler)."""

  def __init__(self, tokenizer, words, text):
    self.words, self.text, self.vocab = words, text, tokenizer.get_vocab_size()
    self.enc = lru_cache(maxsize=200_000)(lambda s: tuple(tokenizer.encode(s, add_special_tokens=False).ids))
    self.newline = self.enc("\n")[0]

  # -- material
  def symbol(self, rng, numbers: float) -> str:
    if rng.random() < numbers:
      digits = rng.randint(2, 5)
      return str(rng.randrange(10 ** (digits - 1), 10 ** digits))
    return rng.choice(self.words)

  def symbols(self, rng, n: int, numbers: float):
    """Distinct ones; at most three quarters of the word list where no numbers are allowed."""
    n = n if numbers else min(n, len(self.words) * 3 // 4)
    out = set()
    while len(out) < n:
      out.add(self.symbol(rng, numbers))
    out = sorted(out)
    rng.shuffle(out)
    return out

  def passage(self, rng, n: int):
    start = rng.randrange(len(self.text) - n)
    return [t if t else self.newline for t in self.text[start:start + n].tolist()]

  def line(self, template, key: str, value: str):
    """(prefix ids, answer ids, end ids) of one statement."""
    before, between, after = template
    prefix = (self.enc(before) + self.enc(" " + key) if before else self.enc(key)) + self.enc(between)
    return prefix, self.enc(" " + value), self.enc(after)

  def state(self, doc: Doc, line) -> None:
    for part in line:
      doc.add(part, CONTEXT)

  def ask(self, doc: Doc, line) -> None:
    doc.add(line[0], CONTEXT)
    doc.answer(line[1])
    doc.add(line[2], END)

  # -- tasks
  def kv(self, rng, length: int, template=None, numbers=None, queries=None) -> Doc:
    """N pairs, an empty line, then queries in random order (training: all pairs, so half the document)."""
    template = template or rng.choice(KV_TEMPLATES)
    key_numbers, value_numbers = (0.0, numbers) if numbers is not None else (rng.choice((0, 0, 0, 1)), rng.choice((0, 0.5, 1)))
    lines, room = [], length - 1
    for key in self.symbols(rng, max(2, length // 6), key_numbers):
      line = self.line(template, key, self.symbol(rng, value_numbers))
      size = sum(map(len, line))
      room -= size * (1 if queries and len(lines) >= queries else 2)  # stated once, asked at most once
      if room < 0 and len(lines) >= 2:
        break
      lines.append(line)
    doc = Doc()
    for line in lines:
      self.state(doc, line)
    doc.add([self.newline], CONTEXT)
    for line in rng.sample(lines, min(len(lines), queries or len(lines))):
      self.ask(doc, line)
    return doc

  def needle(self, rng, length: int, template=None, numbers=None, n=None) -> Doc:
    """Statements as paragraphs of their own inside real text; the questions come at the end."""
    template = template or rng.choice(NEEDLE_TEMPLATES)
    numbers = rng.choice((0, 0.5, 1)) if numbers is None else numbers
    n = n or rng.randint(1, max(1, min(12, length // 48)))
    lines = [self.line(template, k, self.symbol(rng, numbers)) for k in self.symbols(rng, n, 0.0)]
    size = max(16, length - 2 * sum(sum(map(len, l)) + 1 for l in lines) - 2)
    text = self.passage(rng, size)
    breaks = [i + 2 for i in range(size - 1) if text[i] == text[i + 1] == self.newline] or [0]
    at = sorted(rng.choice(breaks) if rng.random() < 0.9 else 0 for _ in lines)
    doc, done = Doc(), 0
    for cut, line in zip(at, lines):
      doc.add(text[done:cut], 1.0)
      done = cut
      self.state(doc, line)
      doc.add([self.newline], CONTEXT)
    doc.add(text[done:], 1.0)
    doc.add([self.newline] * 2, CONTEXT)
    for line in rng.sample(lines, n):
      self.ask(doc, line)
    return doc

  def repeat(self, rng, length: int) -> Doc:
    """passage, other text, the same passage again; its second copy is predictable from its second token on."""
    n = rng.randint(min(16, length // 4), max(16, min(length // 2, 256)))
    gap = max(0, length - 2 * n)
    passage = self.passage(rng, n)
    doc = Doc()
    doc.add(passage, 1.0)
    doc.add([self.newline] * 2, CONTEXT)
    doc.add(self.passage(rng, gap) if gap else [], 1.0)
    doc.add([self.newline] * 2, CONTEXT)
    doc.add(passage[:2], CONTEXT)
    doc.add(passage[2:], 1.5)
    return doc

  def copy(self, rng, length: int) -> Doc:
    """A line of random tokens, again and again: the plainest call for induction, which the other tasks build on."""
    n = rng.randint(4, max(8, min(64, length // 3)))
    line = [rng.randrange(1, self.vocab) for _ in range(n)]
    doc = Doc()
    doc.add(line, CONTEXT)
    while len(doc.ids) + n + 1 <= length:
      doc.add([self.newline] + line[:1], CONTEXT)
      doc.add(line[1:], 1.5)
    return doc

  def variable(self, rng, length: int, max_hops=3, numbers=None, queries=None) -> Doc:
    """Assignments `x12 = 4821` or `x3 = x12`, always to a name assigned before; then `The value of x3 is 4821.`"""
    numbers = (0.0 if rng.random() < 0.3 else 1.0) if numbers is None else numbers
    stated, asked = 9, 11  # tokens of a line and of a question, rounded up
    n = max(2, (length - queries * asked) // stated if queries else length // (stated + asked))
    filler = rng.random() < 0.3 and not queries
    if filler:
      n = max(2, n // 3)
    names = rng.sample([f"{c}{d}" for c in "abcdefghijklmnopqrstuvwxyz" for d in range(1, 100)], min(n, 2500))
    values, hops, doc, eq, nl = {}, {}, Doc(), self.enc(" ="), [self.newline]
    gap = (length - n * (stated + asked)) // n if filler else 0
    for i, name in enumerate(names):
      known = [m for m in names[max(0, i - 40):i] if hops[m] < max_hops]
      if known and rng.random() < 0.5:
        source = rng.choice(known)
        values[name], hops[name], right = values[source], hops[source] + 1, source
      else:
        values[name], hops[name] = self.symbol(rng, 0.0) if not numbers else str(rng.randrange(1000, 100_000)), 0
        right = values[name]
      doc.add(self.enc(name) + eq + self.enc(" " + right), CONTEXT)
      doc.add(nl, CONTEXT)
      if gap > 4:
        doc.add(self.passage(rng, gap) + nl, 1.0)
    doc.add(nl, CONTEXT)
    for name in rng.sample(names, min(len(names), queries or len(names))):
      doc.add(self.enc("The value of") + self.enc(" " + name) + self.enc(" is"), CONTEXT)
      doc.answer(self.enc(" " + values[name]))
      doc.add(self.enc(".\n"), END)
    return doc

  # -- rows
  def draw(self, rng, length: int, mix) -> Doc:
    """One document; `mix` weighs kv, needle, repeat, variable, copy."""
    kind = rng.choices((self.kv, self.needle, self.repeat, self.variable, self.copy), mix)[0]
    return kind(rng, length)

  def row(self, rng, n: int, max_span: int, mix) -> Doc:
    """n tokens: documents of up to max_span tokens, log-uniform in length, each opened by <|endoftext|> (id 0)."""
    doc = Doc()
    while len(doc.ids) < n:
      room = n - len(doc.ids) - 1
      span = int(48 * (max_span / 48) ** rng.random()) if max_span > 48 else max_span
      if room < 48:
        doc.add([0] + self.passage(rng, max(room, 1)), 1.0)
      else:
        doc.add([0], CONTEXT)
        doc.append(self.draw(rng, min(span, int(room * 0.97)), mix))
    return Doc(doc.ids[:n], doc.weights[:n], [(a, b) for a, b in doc.answers if b <= n])


def load_words(path) -> list:
  return Path(path).read_text().split()


def eval_tasks(tokenizer, text) -> Tasks:
  return Tasks(tokenizer, load_words(Path(__file__).resolve().parent / "eval_words.txt"), text)


def eval_doc(tasks: Tasks, kind: str, length: int, seed: int) -> Doc:
  """One evaluation document of TASKS.md; several questions share a document here, which is harder, never easier."""
  rng = random.Random(f"{kind} {length} {seed}")
  doc = Doc()
  doc.add([0], CONTEXT)
  if kind == "kv":
    doc.append(tasks.kv(rng, length - 1, KV_TEMPLATES[0], 1.0, queries=8))
  elif kind == "kv_words":
    doc.append(tasks.kv(rng, length - 1, KV_TEMPLATES[0], 0.0, queries=8))
  elif kind == "needle":
    doc.append(tasks.needle(rng, length - 1, NEEDLE_TEMPLATES[0], 0.0, n=4))
  elif kind == "variable":
    doc.append(tasks.variable(rng, length - 1, max_hops=2, numbers=1.0, queries=8))
  else:
    raise ValueError(f"unknown task {kind}")
  return doc
