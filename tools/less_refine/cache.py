"""The compressed cache as training sees it: which rows are exact at each step, and attention over them and the LESS state.

Text streams in `step` tokens at a time, as the engine feeds it: a step's queries see the rows that stayed, the step's own tokens before them and
the state; then the selector chooses, and what leaves is absorbed. Nothing of size tokens x tokens is made.
"""
import math
import sys
from dataclasses import dataclass

import torch

from llm import narrow

try:
  import h2o_kernel
except ImportError:  # no Triton
  h2o_kernel = None

SINKS = 4  # of `window`


@dataclass(frozen=True)
class Policy:
  name: str    # h2o, window, tova
  budget: int  # rows a KV head

  @staticmethod
  def parse(text, context):
    """`h2o:2` is 2 percent of the context, rounded as the engine does it: h2o's two halves each down."""
    name, share = text.split(":")
    if name not in ("h2o", "window", "tova"):
      sys.exit(f"a policy must be h2o, window or tova with a percentage, found {text}")
    rows = float(share) * context / 100
    policy = Policy(name, 2 * int(rows / 2) if name == "h2o" else int(rows))
    if policy.budget <= SINKS:
      sys.exit(f"{text} of {context} tokens is {policy.budget} rows: too few")
    return policy

  @property
  def recent(self):
    return self.budget // 2


# -- which rows stay


def replay(q, k, policy, step):
  """The cache's life in one layer. q [batch, heads, tokens, d], k [batch, KV heads, tokens, d], both rotated. Returns
  before [batch, KV heads, steps, budget]: the rows resident before each step (-1: none), in any order;
  leave [batch, KV heads, tokens]: the first step that no longer sees a token (the number of steps: never)."""
  if policy.name == "window":
    return replay_window(k, policy, step)
  if policy.name == "h2o" and h2o_kernel and (k.is_cuda or h2o_kernel.INTERPRETED):
    return h2o_kernel.replay(q, k, policy.budget, policy.recent, step)
  return replay_scored(q, k, policy, step)


def replay_window(k, policy, step):
  batch, n_kv, tokens, _ = k.shape
  steps = tokens // step
  seen = torch.arange(steps, device=k.device)[:, None] * step
  column = torch.arange(policy.budget, device=k.device)[None]
  slid = torch.where(column < SINKS, column, seen - policy.budget + column)
  before = torch.where(seen <= policy.budget, torch.where(column < seen, column, -1), slid)
  token = torch.arange(tokens, device=k.device)
  leave = (token + policy.budget - SINKS) // step + 1  # the first s with s * step - (budget - sinks) > token
  leave = torch.where(token < SINKS, steps, leave.clamp(min=policy.budget // step + 1, max=steps))
  return before.expand(batch, n_kv, -1, -1), leave.expand(batch, n_kv, -1)


@torch.no_grad()
def replay_scored(q, k, policy, step):
  batch, n_kv, tokens, d = k.shape
  group, steps, budget, device = q.shape[1] // n_kv, tokens // step, policy.budget, k.device
  before = torch.full((batch, n_kv, steps, budget), -1, device=device)
  leave = torch.full((batch, n_kv, tokens), steps, device=device)
  rows, sums = torch.zeros(batch, n_kv, 0, dtype=torch.long, device=device), torch.zeros(batch, n_kv, 0, device=device)
  q = q.view(batch, n_kv, group, tokens, d)
  causal = torch.tril(torch.ones(step, step, dtype=torch.bool, device=device))
  for s in range(steps):
    n = rows.shape[2]
    before[:, :, s, :n] = rows
    rows = torch.cat((rows, torch.arange(s * step, (s + 1) * step, device=device).expand(batch, n_kv, step)), 2)
    queries = q[:, :, :, s * step:(s + 1) * step] if policy.name == "h2o" else q[:, :, :, (s + 1) * step - 1:(s + 1) * step]
    keys = torch.gather(k, 2, rows[..., None].expand(-1, -1, -1, d))
    scores = (queries @ keys[:, :, None].transpose(3, 4)) / math.sqrt(d)
    if policy.name == "h2o":
      visible = torch.cat((torch.ones(step, n, dtype=torch.bool, device=device), causal), 1)
      received = scores.masked_fill(~visible, -math.inf).softmax(-1).sum((2, 3))
      sums = torch.cat((sums, torch.zeros(batch, n_kv, step, device=device)), 2) + received
      kept = sums.masked_fill(rows >= (s + 1) * step - policy.recent, math.inf)
    else:  # tova: one set for all heads
      kept = scores.softmax(-1).sum((1, 2, 3))[:, None].expand(-1, n_kv, -1)
    if n + step <= budget:
      continue
    stay = kept.topk(budget, 2).indices.sort(2).values
    gone = torch.ones(rows.shape, dtype=torch.bool, device=device).scatter_(2, stay, False)
    leave.scatter_(2, rows[gone].view(batch, n_kv, -1), s + 1)
    rows = torch.gather(rows, 2, stay)
    sums = torch.gather(sums, 2, stay) if policy.name == "h2o" else sums
  return before, leave


# -- attention over what is exact and what was absorbed


class TakeRows(torch.autograd.Function):
  """x [batch, heads, tokens, d] at index [batch, heads, n] (-1 reads row 0), narrowed; its gradient is summed in float32."""

  @staticmethod
  def forward(ctx, x, index):
    batch, heads, tokens, d = x.shape
    base = torch.arange(batch * heads, device=x.device).view(batch, heads, 1) * tokens
    flat = (index.clamp(min=0) + base).flatten()
    ctx.save_for_backward(flat)
    ctx.shape = x.shape
    return narrow(x).reshape(-1, d).index_select(0, flat).view(batch, heads, -1, d)

  @staticmethod
  def backward(ctx, upstream):
    flat, = ctx.saved_tensors
    d = ctx.shape[3]
    gradient = torch.zeros(ctx.shape, device=upstream.device).view(-1, d)
    return gradient.index_add_(0, flat, upstream.reshape(-1, d).float()).view(ctx.shape), None


def state_before_steps(psi, v, leave, budget, step):
  """H and z side by side, [batch, KV heads, steps, rank, d + 1]: sums over what left before each step. After the first eviction exactly
  `step` rows leave a step, so tokens in order of leaving are blocks of `step`, the first one filled up with nothing."""
  batch, n_kv, tokens, d = v.shape
  steps, first = tokens // step, budget // step
  blocks = steps - 1 - first  # before step first + 1 + b the blocks 0..b have left
  if blocks <= 0:
    return psi.new_zeros(batch, n_kv, steps, psi.shape[3], d + 1)
  order = leave.argsort(dim=2, stable=True)[:, :, :blocks * step - budget % step, None]
  take = lambda x: torch.nn.functional.pad(
      torch.gather(x, 2, order.expand(-1, -1, -1, x.shape[3])), (0, 0, budget % step, 0)).unflatten(2, (blocks, step))
  pairs = take(psi).transpose(3, 4) @ take(torch.cat((v, torch.ones_like(v[..., :1])), 3))
  return torch.nn.functional.pad(pairs.cumsum(2), (0, 0, 0, 0, first + 1, 0))


@dataclass
class Parts:
  """Attention over the exact rows, and the state's part, both by step: [batch, KV heads, steps, group * step, ...]."""
  exact: torch.Tensor  # [..., d]
  lse: torch.Tensor    # [..., 1], less the state's offset
  read: torch.Tensor   # [..., d + 1]: phi H and phi z

  def merged(self):
    mass = self.read[..., -1:]
    top = torch.maximum(self.lse, torch.log(mass.clamp(min=1e-30))).detach()  # only to keep exponentials in range
    exact, state = torch.exp(self.lse - top), torch.exp(-top)
    return (exact * self.exact + state * self.read[..., :-1]) / (exact + state * mass)


def attend_parts(q, k, v, phi, psi, plan, step, offset=None):
  """phi [batch, heads, tokens, rank], psi [batch, KV heads, tokens, rank]; plan from replay(). offset [batch, heads, tokens, 1]: of the
  state's log-mass."""
  before, leave = plan
  batch, n_kv, tokens, d = k.shape
  group, steps, budget = q.shape[1] // n_kv, tokens // step, before.shape[3]
  by_step = lambda x: x.view(batch, n_kv, group, steps, step, -1).transpose(2, 3).flatten(3, 4)
  own = lambda x: narrow(x).unflatten(2, (steps, step))
  rows = lambda x: torch.cat((TakeRows.apply(x, before.flatten(2)).unflatten(2, (steps, budget)), own(x)), 3)
  scores = (by_step(narrow(q)) @ rows(k).transpose(3, 4)).float() / math.sqrt(d)
  hidden = torch.zeros(batch, n_kv, steps, 1, step, budget + step, dtype=torch.bool, device=k.device)
  hidden[..., :budget] = (before < 0)[:, :, :, None, None]
  hidden[..., budget:] = ~torch.tril(torch.ones(step, step, dtype=torch.bool, device=k.device))
  scores = scores.unflatten(3, (group, step)).masked_fill(hidden, -1e30).flatten(3, 4)
  lse = torch.logsumexp(scores, 4, keepdim=True)
  exact = (narrow(torch.exp(scores - lse)) @ rows(v)).float()
  lse = lse if offset is None else lse - by_step(offset)
  return Parts(exact, lse, by_step(phi) @ state_before_steps(psi, v, leave, budget, step))


def by_token(x, step):
  """[batch, KV heads, steps, group * step, d] -> [batch, heads, tokens, d]."""
  batch, n_kv, steps, both, d = x.shape
  return x.unflatten(3, (both // step, step)).transpose(2, 3).reshape(batch, n_kv * both // step, steps * step, d)
