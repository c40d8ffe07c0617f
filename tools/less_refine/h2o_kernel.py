"""h2o's replay (cache.replay_scored) as one Triton kernel: a program a text and KV head walks all steps, so that a step costs no launches."""
import os

import torch
import triton
import triton.language as tl

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
TILE = 64  # queries scored at a time


@triton.jit
def walk(q, k, before, leave, budget, recent, scale, STEPS: tl.constexpr, STEP: tl.constexpr, GROUP: tl.constexpr, TILE: tl.constexpr,
         SLOTS: tl.constexpr, D: tl.constexpr):
  """A row of the cache is a slot: its token's position (-1: free) and the attention it has received."""
  head, tokens = tl.program_id(0).to(tl.int64), STEPS * STEP
  slots, dims, tile = tl.arange(0, SLOTS), tl.arange(0, D), tl.arange(0, TILE)
  position = tl.full((SLOTS,), -1, tl.int32)
  score = tl.zeros((SLOTS,), tl.float32)
  for s in range(STEPS):
    resident = position >= 0
    rank = tl.cumsum(resident.to(tl.int32), 0) - 1
    tl.store(before + (head * STEPS + s) * budget + rank, position.to(tl.int64), mask=resident)
    free = tl.cumsum((position < 0).to(tl.int32), 0) - 1
    is_new = (position < 0) & (free < STEP)
    position = tl.where(is_new, s * STEP + free, position)
    score = tl.where(is_new, 0.0, score)
    keys = tl.load(k + (head * tokens + position[:, None]) * D + dims[None, :], mask=position[:, None] >= 0, other=0.0)
    for first in range(0, GROUP * STEP, TILE):
      at = first + tile
      token = s * STEP + at % STEP
      wanted = at < GROUP * STEP
      queries = tl.load(q + ((head * GROUP + at // STEP) * tokens + token)[:, None] * D + dims[None, :], mask=wanted[:, None], other=0.0)
      logits = tl.dot(queries, tl.trans(keys)) * scale
      visible = (position[None, :] >= 0) & (position[None, :] <= token[:, None])
      logits = tl.where(visible, logits, -1e30)
      weight = tl.where(visible, tl.exp(logits - tl.max(logits, 1)[:, None]), 0.0)
      weight = tl.where(wanted[:, None], weight / tl.sum(weight, 1)[:, None], 0.0)
      score += tl.sum(weight, 0)
    n_leave = tl.maximum(tl.minimum(s * STEP, budget) + STEP - budget, 0)
    value = tl.where((position >= 0) & (position < (s + 1) * STEP - recent), score, 1e30)
    for i in range(STEP):
      worst = (slots == tl.argmin(value, 0)) & (i < n_leave)
      tl.store(leave + head * tokens + position, tl.full((SLOTS,), s + 1, tl.int64), mask=worst)
      position = tl.where(worst, -1, position)
      value = tl.where(worst, 1e30, value)


def replay(q, k, budget, recent, step):
  batch, n_kv, tokens, d = k.shape
  steps = tokens // step
  before = torch.full((batch, n_kv, steps, budget), -1, device=k.device)
  leave = torch.full((batch, n_kv, tokens), steps, device=k.device)
  walk[(batch * n_kv,)](q.contiguous(), k.contiguous(), before, leave, budget, recent, d ** -0.5, STEPS=steps, STEP=step,
                        GROUP=q.shape[1] // n_kv, TILE=TILE, SLOTS=triton.next_power_of_2(budget + step), D=d, num_warps=8)
  return before, leave
