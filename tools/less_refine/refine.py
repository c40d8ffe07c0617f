#!/usr/bin/env python3
"""Refines LESS feature maps jointly: all layers against the full cache's next-token distribution.

  refine.py --model MODEL.gguf --sidecar IN.less.gguf --text FILE... --out OUT.less.gguf [--steps 400] [--resume]

`lesskv train less` trains a layer at a time against attention outputs; here the whole model runs compressed, so that a layer sees what the
compressed layers below it really produce, and the loss is the mean KL divergence of next-token distributions from the full cache's. The model
stays frozen. Nothing of size T x T is made: a step of the text attends its resident rows and reads the state, which is a sum over steps.
Selection is replayed as the engine does it and taken as given (no gradient passes through which rows stay).
Models as models/README.md describes (`llama`, sidecars with exp features). OUT has the parameters in place of IN's and tells of this
run in `less.refine.history`. With the same number of threads, the same command gives the same file. OUT.state.pt holds what --resume continues.
"""
import argparse
import math
import random
import sys
import time
from pathlib import Path

import gguf
import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "reference_model"))
from export_gguf import read_gguf  # noqa: E402
from model import rotate  # noqa: E402

MAX_EXPONENT = 25.0  # kMaxExponent of feature_maps.h
BYTES_PER_TOKEN = 12
FEATURE_FIELDS = ("w1", "w2", "b1", "b2")


# -- texts


def read_tokenizer(path) -> Tokenizer:
  """The byte-level BPE inside the model file."""
  fields = gguf.GGUFReader(str(path)).fields
  tokens, merges = (fields[f"tokenizer.ggml.{key}"].contents() for key in ("tokens", "merges"))
  tokenizer = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=[tuple(m.split(" ")) for m in merges]))
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
  return tokenizer


class Crops:
  """Random stretches of the files, in proportion to their bytes; `BOS` first, as the engine does."""

  def __init__(self, tokenizer, paths, n_tokens):
    self.tokenizer, self.n_tokens = tokenizer, n_tokens
    self.blobs = [Path(p).read_bytes() for p in paths]
    if not any(len(b) > n_tokens * BYTES_PER_TOKEN for b in self.blobs):
      sys.exit(f"refine.py: the texts hold no stretch of {n_tokens} tokens")
    self.sizes = [len(b) for b in self.blobs]

  def batch(self, seed, n):
    rng, rows, reach = random.Random(seed), [], self.n_tokens * BYTES_PER_TOKEN
    while len(rows) < n:
      blob = rng.choices(self.blobs, self.sizes)[0]
      at = rng.randrange(max(1, len(blob) - reach))
      ids = self.tokenizer.encode(blob[at:at + reach].decode("utf-8", "ignore")).ids
      if len(ids) >= self.n_tokens - 1:
        rows.append([0] + ids[:self.n_tokens - 1])
    return torch.tensor(rows)


# -- the maps


class FeatureMaps(torch.nn.Module):
  def __init__(self, sidecar, n_layers):
    super().__init__()
    reader = gguf.GGUFReader(str(sidecar))
    if reader.fields["less.features"].contents() != "exp":
      sys.exit(f"refine.py: {sidecar} must have exp features")
    self.rank = reader.fields["less.rank"].contents()
    stored = {t.name: np.array(gguf.quants.dequantize(t.data, t.tensor_type), dtype=np.float32) for t in reader.tensors}
    self.weights = torch.nn.ParameterDict({
        f"{layer}_{net}_{field}": torch.from_numpy(stored[f"less.{layer}.{net}.{field}"].copy())
        for layer in range(n_layers) for net in ("phi", "psi") for field in FEATURE_FIELDS})

  def features(self, layer, net, x):
    """x [batch, heads, tokens, head_dim] -> [batch, heads, tokens, rank]."""
    w1, w2, b1, b2 = (self.weights[f"{layer}_{net}_{field}"] for field in FEATURE_FIELDS)
    hidden = F.gelu((x.bfloat16() @ w1.bfloat16()).float() + b1[:, None])
    return torch.exp(((hidden.bfloat16() @ w2.bfloat16()).float() + b2[:, None]).clamp(max=MAX_EXPONENT))

  @torch.no_grad()
  def write(self, source, out, history):
    """`source` with these parameters, and `history` added to its less.refine.history (strings, a round of refinement each)."""
    reader = gguf.GGUFReader(str(source))
    writer = gguf.GGUFWriter(f"{out}.part", reader.fields["general.architecture"].contents())
    earlier = []
    for name, field in reader.fields.items():
      if name == "less.refine.history":
        earlier = field.contents()
      elif name != "general.architecture" and not name.startswith("GGUF."):
        writer.add_key_value(name, field.contents(), *field.types[:2])
    writer.add_array("less.refine.history", [*earlier, history])
    for tensor in reader.tensors:
      _, layer, net, field = tensor.name.split(".")
      values = gguf.quants.quantize(self.weights[f"{layer}_{net}_{field}"].numpy(), tensor.tensor_type)
      writer.add_tensor(tensor.name, values, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    Path(f"{out}.part").replace(out)


# -- which rows stay


def choose(name, rows, budget, seen, scores):
  """Indices into rows [batch, kv heads, n] of the `budget` that stay, in order. scores: h2o's sums, tova's last row."""
  if name == "window":
    n = rows.shape[2]
    return torch.cat((torch.arange(4), torch.arange(n - budget + 4, n))).expand(*rows.shape[:2], budget)
  kept = scores if name == "tova" else scores.masked_fill(rows >= seen - (budget - budget // 2), math.inf)
  return kept.topk(budget, 2).indices.sort(2).values


@torch.no_grad()
def replay(q, k, policy, step):
  """The cache's life of one layer: rows [batch, kv heads, steps, budget] resident before each step (-1: none), and for each token the first
  step that no longer sees it (the number of steps: never). q [batch, heads, tokens, d], k [batch, kv heads, tokens, d], both rotated."""
  name, budget = policy
  batch, n_kv, tokens, d = k.shape
  group, steps = q.shape[1] // n_kv, tokens // step
  before = torch.full((batch, n_kv, steps, budget), -1)
  leave = torch.full((batch, n_kv, tokens), steps)
  rows, sums = torch.zeros(batch, n_kv, 0, dtype=torch.long), torch.zeros(batch, n_kv, 0)
  q = q.view(batch, n_kv, group, tokens, d)
  causal = torch.tril(torch.ones(step, step, dtype=torch.bool))
  for s in range(steps):
    n = rows.shape[2]
    before[:, :, s, :n] = rows
    rows = torch.cat((rows, torch.arange(s * step, (s + 1) * step).expand(batch, n_kv, step)), 2)
    if name != "window":
      queries = q[:, :, :, s * step:(s + 1) * step] if name == "h2o" else q[:, :, :, (s + 1) * step - 1:(s + 1) * step]
      keys = torch.gather(k, 2, rows[..., None].expand(-1, -1, -1, d))
      scores = (queries @ keys[:, :, None].transpose(3, 4)) / math.sqrt(d)
      if name == "h2o":
        visible = torch.cat((torch.ones(step, n, dtype=torch.bool), causal), 1)
        probabilities = scores.masked_fill(~visible, -math.inf).softmax(-1).sum((2, 3))
        sums = torch.cat((sums, torch.zeros(batch, n_kv, step)), 2) + probabilities
      else:
        sums = scores.softmax(-1).sum((1, 2, 3))[:, None].expand(-1, n_kv, -1)
    if n + step <= budget:
      continue
    stay = choose(name, rows, budget, (s + 1) * step, sums)
    gone = torch.ones(rows.shape, dtype=torch.bool).scatter_(2, stay, False)
    leave.scatter_(2, rows[gone].view(batch, n_kv, -1), s + 1)
    rows = torch.gather(rows, 2, stay)
    sums = torch.gather(sums, 2, stay) if name == "h2o" else sums
  return before, leave


# -- the model, full and compressed


class Runner:
  def __init__(self, path):
    self.model = read_gguf(path).requires_grad_(False)
    self.cfg = self.model.cfg
    self.half = [{n: getattr(layer, n).weight.bfloat16() for n in
                  ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")} for layer in self.model.blk]
    self.embedding = self.model.token_embd.weight.bfloat16()

  def forward(self, ids, attend):
    """Final hidden states [batch, tokens, dim]; attend(layer, q, k, v) -> [batch, heads, tokens, d]."""
    cfg, (batch, tokens) = self.cfg, ids.shape
    cos, sin = self.model.cos[:tokens], self.model.sin[:tokens]
    x = self.model.token_embd(ids)
    for i, (layer, w) in enumerate(zip(self.model.blk, self.half)):
      h = layer.attn_norm(x).bfloat16()
      split = lambda name, heads: F.linear(h, w[name]).float().view(batch, tokens, heads, cfg.head_dim)
      q = rotate(split("attn_q", cfg.n_heads), cos, sin).transpose(1, 2)
      k = rotate(split("attn_k", cfg.n_kv_heads), cos, sin).transpose(1, 2)
      a = attend(i, q, k, split("attn_v", cfg.n_kv_heads).transpose(1, 2))
      x = x + F.linear(a.transpose(1, 2).reshape(batch, tokens, -1).bfloat16(), w["attn_output"]).float()
      h = layer.ffn_norm(x).bfloat16()
      x = x + F.linear(F.silu(F.linear(h, w["ffn_gate"])) * F.linear(h, w["ffn_up"]), w["ffn_down"]).float()
    return self.model.output_norm(x)

  @torch.no_grad()
  def full(self, ids):
    group = self.cfg.n_heads // self.cfg.n_kv_heads
    widen = lambda x: x.bfloat16().repeat_interleave(group, 1)
    return self.forward(ids, lambda i, q, k, v: F.scaled_dot_product_attention(
        q.bfloat16(), widen(k), widen(v), is_causal=True).float())

  def compressed(self, ids, policy, step, maps):
    return self.forward(ids, lambda i, q, k, v: attend_compressed(i, q, k, v, policy, step, maps))


def state_before_steps(psi, v, leave, steps):
  """H and z side by side, [batch, kv heads, steps, rank, d + 1]: the sums over what left before each step."""
  batch, n_kv, tokens, d = v.shape
  extended = torch.cat((v, torch.ones(batch, n_kv, tokens, 1)), 3)
  pairs = (psi[..., None] * extended[..., None, :]).flatten(3)
  at = leave[..., None].expand(-1, -1, -1, pairs.shape[3])
  return torch.zeros(batch, n_kv, steps + 1, pairs.shape[3]).scatter_add(2, at, pairs)[:, :, :steps].cumsum(2).unflatten(3, (-1, d + 1))


def attend_compressed(layer, q, k, v, policy, step, maps):
  batch, n_kv, tokens, d = k.shape
  group, steps = q.shape[1] // n_kv, tokens // step
  before, leave = replay(q.detach(), k.detach(), policy, step)
  budget = before.shape[3]
  by_step = lambda x: x.view(batch, n_kv, group, steps, step, -1).transpose(2, 3).flatten(3, 4)  # [batch, kv, steps, group * step, :]
  take = lambda x: torch.gather(x, 2, before.clamp(min=0).flatten(2)[..., None].expand(-1, -1, -1, d)).unflatten(2, (steps, budget))
  rows = lambda x: torch.cat((take(x), x.unflatten(2, (steps, step))), 3)
  scores = (by_step(q.bfloat16()) @ rows(k.bfloat16()).transpose(3, 4)).float() / math.sqrt(d)
  mask = torch.zeros(batch, n_kv, steps, 1, step, budget + step)
  mask[..., :budget].masked_fill_((before < 0)[:, :, :, None, None], -1e30)
  mask[..., budget:].masked_fill_(~torch.tril(torch.ones(step, step, dtype=torch.bool)), -1e30)
  scores = (scores.unflatten(3, (group, step)) + mask).flatten(3, 4)
  lse = torch.logsumexp(scores, 4, keepdim=True)
  exact = (torch.exp(scores - lse).bfloat16() @ rows(v.bfloat16())).float()
  state = state_before_steps(maps.features(layer, "psi", k), v, leave, steps)
  read = by_step(maps.features(layer, "phi", q)) @ state
  mass = read[..., d:]
  top = torch.maximum(lse, torch.log(mass.clamp(min=1e-30))).detach()  # only to keep exponentials in range
  out = (torch.exp(lse - top) * exact + torch.exp(-top) * read[..., :d]) / (torch.exp(lse - top) + torch.exp(-top) * mass)
  return out.unflatten(3, (group, step)).transpose(2, 3).reshape(batch, n_kv * group, tokens, d)


# -- the run


def parse_policy(text, context):
  name, share = text.split(":")
  if name not in ("h2o", "window", "tova"):
    sys.exit(f"refine.py: --policy must be h2o, window or tova with a percentage, found {text}")
  return name, int(float(share) * context / 100)


class Divergence(torch.autograd.Function):
  """Mean KL divergence of next-token distributions, KL(teacher | student), from hidden states [tokens, dim]; a few tokens' logits at a time."""

  @staticmethod
  def forward(ctx, student, teacher, embedding):
    total, gradients, n = 0.0, [], student.shape[0]
    for at in range(0, n, 256):
      log_s, log_t = (F.linear(x[at:at + 256].bfloat16(), embedding).float().log_softmax(-1) for x in (student, teacher))
      p_t = log_t.exp()
      total += (p_t * (log_t - log_s)).sum().item()
      gradients.append(((log_s.exp() - p_t).bfloat16() @ embedding).float() / n)
    ctx.save_for_backward(torch.cat(gradients))
    return torch.tensor(total / n)

  @staticmethod
  def backward(ctx, upstream):
    return ctx.saved_tensors[0] * upstream, None, None


def loss_of(runner, ids, policy, step, maps):
  teacher, first = runner.full(ids), policy[1]  # nothing has left before position `first`
  student = runner.compressed(ids, policy, step, maps)
  return Divergence.apply(student[:, first:].flatten(0, 1), teacher[:, first:].flatten(0, 1), runner.embedding)


def refine(args) -> None:
  runner = Runner(args.model)
  context = runner.cfg.context
  maps = FeatureMaps(args.sidecar, runner.cfg.n_layers)
  policies = [parse_policy(p, context) for p in args.policies.split(",")]
  crops = Crops(read_tokenizer(args.model), args.text, context)
  optimizer = torch.optim.Adam(maps.parameters(), lr=args.lr, betas=(0.9, 0.98))
  state_path, start = Path(f"{args.out}.state.pt"), 0
  if args.resume and state_path.exists():
    state = torch.load(state_path, weights_only=True)
    maps.load_state_dict(state["maps"])
    optimizer.load_state_dict(state["optimizer"])
    start = state["step"]
  history = lambda steps: f"refine.py: {steps} steps of --batch {args.batch} --step {args.step} --lr {args.lr} --decay {args.decay} --policies {args.policies} " \
                          f"--seed {args.seed}, {len(args.text)} texts"
  begin, average = time.time(), None
  for s in range(start, args.steps):
    for group in optimizer.param_groups:
      group["lr"] = args.lr * min(1, (s + 1) / 10, (args.steps - s) / (args.decay or args.steps))
    ids = crops.batch(args.seed * 1_000_003 + s, args.batch)
    loss = loss_of(runner, ids, policies[s % len(policies)], args.step, maps)
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(maps.parameters(), 1.0)
    optimizer.step()
    average = loss.item() if average is None else 0.95 * average + 0.05 * loss.item()
    if (s + 1) % 25 == 0 or s + 1 == args.steps:
      print(f"step {s + 1}  KL {average:.4f}  {(time.time() - begin) / (s + 1 - start):.2f} s a step", file=sys.stderr, flush=True)
      torch.save({"maps": maps.state_dict(), "optimizer": optimizer.state_dict(), "step": s + 1}, state_path)
      maps.write(args.sidecar, args.out, history(s + 1))
  maps.write(args.sidecar, args.out, history(max(start, args.steps)))


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--model", required=True)
  parser.add_argument("--sidecar", required=True, help="maps to start from")
  parser.add_argument("--text", nargs="+", required=True)
  parser.add_argument("--out", required=True)
  parser.add_argument("--policies", default="h2o:2,h2o:5,window:2,tova:2,h2o:10,window:5,tova:5", help="selector:percent, in turn")
  parser.add_argument("--step", type=int, default=8, help="tokens a step while text streams in; must divide the context")
  parser.add_argument("--steps", type=int, default=400)
  parser.add_argument("--batch", type=int, default=2)
  parser.add_argument("--lr", type=float, default=2e-3)
  parser.add_argument("--decay", type=int, default=0, help="last steps, over which the rate falls to zero (default: all)")
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--threads", type=int, default=1)
  parser.add_argument("--resume", action="store_true")
  args = parser.parse_args()
  torch.set_num_threads(args.threads)
  refine(args)


if __name__ == "__main__":
  main()
