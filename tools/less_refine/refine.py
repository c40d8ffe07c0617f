#!/usr/bin/env python3
"""Trains the LESS feature maps of all layers of a model together, from a sidecar or from nothing, on a CPU or a GPU.

  refine.py --model MODEL.gguf --text FILE... --out OUT.less.gguf [--sidecar IN.less.gguf] [--layerwise 300] [--steps 400] [--resume]

The model (llama.py names which) stays frozen and runs compressed, so that a layer sees what the compressed layers below it really produce.
Two phases: layer by layer (`--layerwise` steps: the error of each layer's attention output, all layers in one pass) and joint (`--steps`: the
mean KL divergence of next-token distributions from the full cache's). Selection is replayed as the engine does it and taken as given (no gradient
passes through which rows stay). A phase may be bounded in minutes instead; its rate then falls with the clock.
OUT has exp features; `less.refine.history` in it tells of each run. OUT.state.pt holds what --resume continues.
"""
import argparse
import math
import random
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from cache import Policy, attend_parts, by_token, replay
from llm import Llm
from sidecar import FeatureMaps
from texts import Crops, TextTokenizer, read_packed, tokenize

# selector:percent and how often it is drawn
POLICIES = "h2o:2*8,h2o:5*5,h2o:10*4,h2o:1,h2o:20,window:2,window:5,tova:2,tova:5"


# -- the compressed model


class Compressed:
  """A compressed pass of the model: attend() is what Llm.forward takes. What the selector chose is kept for a second pass (checkpointing)."""

  def __init__(self, llm, maps, policy, step):
    self.llm, self.maps, self.policy, self.step, self.plans = llm, maps, policy, step, {}

  def parts(self, layer, q, k, v):
    if layer not in self.plans:
      self.plans[layer] = replay(q.detach(), k.detach(), self.policy, self.step)
    phi, psi = self.maps.features(layer, "phi", q), self.maps.features(layer, "psi", k)
    return attend_parts(q, k, v, phi, psi, self.plans[layer], self.step, self.maps.offset(layer, q))

  def attend(self, layer, q, k, v):
    return by_token(self.parts(layer, q, k, v).merged(), self.step)

  def hidden(self, ids):
    def run_layer(layer, x):
      return checkpoint(lambda y: self.llm.layer(layer, y, self.attend), x, use_reentrant=False, preserve_rng_state=False)

    return self.llm.forward(ids, self.attend, run_layer if torch.is_grad_enabled() else None)


def layerwise_loss(llm, ids, policy, step, maps):
  """Adds each layer's gradient; returns the layers' mean squared errors of the attention output over the bare selector's. Layers see a compressed
  model's inputs, no gradient passes from one to another."""
  run, shares, first = Compressed(llm, maps, policy, step), [], policy.budget
  x = llm.embed(ids)
  for layer in range(llm.shape.n_layers):
    with torch.no_grad():
      q, k, v = llm.qkv(layer, x)
      target = llm.attend_all(layer, q, k, v)
    parts = run.parts(layer, q, k, v)
    output = by_token(parts.merged(), step)
    error = lambda a: llm.output_projection(layer, (a - target)[:, :, first:]).square().mean()
    with torch.no_grad():
      bare = error(by_token(parts.exact, step))
    loss = error(output) / bare
    loss.backward()
    shares.append(loss.detach())
    with torch.no_grad():
      x = llm.finish(layer, x, output.detach())
  return torch.stack(shares)


@torch.no_grad()
def calibrate(llm, ids, maps, fresh):
  """Maps learn what their inputs look like, from the full cache."""
  def attend(layer, q, k, v):
    maps.calibrate(layer, "phi", q, fresh)
    maps.calibrate(layer, "psi", k, fresh)
    return llm.attend_all(layer, q, k, v)

  llm.forward(ids, attend)


class Divergence(torch.autograd.Function):
  """Mean KL(teacher | student) of next-token distributions, from hidden states [tokens, width]; a few tokens' logits at a time."""

  @staticmethod
  def forward(ctx, student, teacher, head):
    total, gradients, n = torch.zeros((), device=student.device), [], student.shape[0]
    chunk = 4096 if student.is_cuda else 256
    for at in range(0, n, chunk):
      log_s, log_t = (F.linear(x[at:at + chunk].to(head.dtype), head).float().log_softmax(-1) for x in (student, teacher))
      p_t = log_t.exp()
      total += (p_t * (log_t - log_s)).sum()
      gradients.append(((log_s.exp() - p_t).to(head.dtype) @ head).float() / n)
    ctx.save_for_backward(torch.cat(gradients))
    return total / n

  @staticmethod
  def backward(ctx, upstream):
    return ctx.saved_tensors[0] * upstream, None, None


def joint_loss(llm, ids, policy, step, maps):
  teacher, first = llm.full(ids), policy.budget  # nothing has left before position `first`
  student = Compressed(llm, maps, policy, step).hidden(ids)
  return Divergence.apply(student[:, first:].flatten(0, 1), teacher[:, first:].flatten(0, 1), llm.head)


# -- validation


@torch.no_grad()
def nats(llm, hidden, ids):
  """Of each token but the first, [batch, tokens - 1]."""
  losses = [F.cross_entropy(F.linear(h[:-1].to(llm.head.dtype), llm.head).float(), row[1:], reduction="none") for h, row in zip(hidden, ids)]
  return torch.stack(losses)


@torch.no_grad()
def validate(llm, maps, ids, policies, step, log):
  """Perplexities of the full cache, the bare selector and LESS, and what part of the lost perplexity LESS wins back."""
  none = FeatureMaps.random(llm.shape, 1, 1, 0).to(llm.device)
  for name, values in none.weights.items():
    if name.endswith("b2"):
      values.fill_(-100.0)
  perplexity = lambda run: math.exp(torch.cat([nats(llm, run(some), some) for some in ids.split(8)]).mean().item())
  full = perplexity(llm.full)
  for text, policy in policies:
    bare, less = (perplexity(Compressed(llm, m, policy, step).hidden) for m in (none, maps))
    log(f"  {text}: full {full:.3f}, bare {bare:.3f}, LESS {less:.3f}: {(bare - less) / (bare - full):.1%} won back")


# -- the run


@dataclass
class Phase:
  name: str
  steps: int
  minutes: float
  rate: float

  def done(self, step, seconds):
    """The share of the phase that is over."""
    return max(step / self.steps if self.steps else 0, seconds / (60 * self.minutes) if self.minutes else 0)


def parse_weighted(text, parse):
  """`a*3,b` -> [(a, 3), (b, 1)] with parse() of each."""
  pairs = [(item.split("*") + ["1"])[:2] for item in text.split(",")]
  return [parse(item) for item, _ in pairs], [float(weight) for _, weight in pairs]


def read_groups(args, tokenizer):
  shares = {n: float(s) for n, s in (item.split("=") for item in args.mix.split(","))} if args.mix else None
  if args.tokens:
    return read_packed(args.tokens, shares)
  return {"text": (1, tokenize(tokenizer, args.text))}


class Training:
  def __init__(self, args):
    self.args, self.began = args, time.time()
    self.llm = Llm(args.model, args.device, args.bf16)
    shape = self.llm.shape
    self.maps = FeatureMaps.read(args.sidecar) if args.sidecar else FeatureMaps.random(shape, args.rank, args.hidden, args.seed)
    self.maps.check(shape, args.sidecar)
    self.maps.identify(args.identity or args.model)
    self.maps.to(args.device)
    tokenizer = TextTokenizer(args.model)
    self.crops = Crops(read_groups(args, tokenizer), tokenizer.bos, self.llm.head.shape[0])
    self.contexts = parse_weighted(args.context or str(min(2048, shape.context)), int)
    self.steps = parse_weighted(args.step, int)
    self.policies = parse_weighted(args.policies, str)
    self.optimizer = torch.optim.Adam(self.maps.parameters(), lr=args.rate, betas=(0.9, 0.98))
    self.phases = [Phase("layerwise", args.layerwise, args.layerwise_minutes, args.layerwise_rate),
                   Phase("joint", args.steps, args.minutes, args.rate)]
    self.at = {"phase": 0, "step": 0, "seconds": 0.0}
    self.tokens = self.taken = 0

  def log(self, line):
    print(f"{time.time() - self.began:6.0f} s  {line}", file=sys.stderr, flush=True)

  def draw(self, phase, step):
    """(token ids, policy, tokens a step) of a step, from the seed alone."""
    rng = random.Random(f"{self.args.seed} {phase.name} {step}")
    pick = lambda weighted: rng.choices(*weighted)[0]
    context = pick(self.contexts)
    n = max(1, self.args.batch * self.contexts[0][0] // context)
    ids = self.crops.batch(rng.random(), n, context).to(self.args.device)
    return ids, Policy.parse(pick(self.policies), context), pick(self.steps)

  def step(self, phase, drawn, done, step):
    for group in self.optimizer.param_groups:
      group["lr"] = phase.rate * min(1, (step + 1) / 10) * max(0.02, 0.5 + 0.5 * math.cos(math.pi * min(1, done)))
    self.optimizer.zero_grad()
    if phase.name == "layerwise":
      loss = layerwise_loss(self.llm, *drawn, self.maps)
    else:
      loss = joint_loss(self.llm, *drawn, self.maps)
      loss.backward()
      torch.nn.utils.clip_grad_norm_(self.maps.parameters(), 1.0)
    self.optimizer.step()
    self.tokens += drawn[0].numel()
    self.taken += 1
    return loss.detach()

  def run_phase(self, phase):
    start, losses = time.time() - self.at["seconds"], []
    while not self.stopped() and (done := phase.done(self.at["step"], time.time() - start)) < 1 and (phase.steps or phase.minutes):
      losses.append(self.step(phase, self.draw(phase, self.at["step"]), done, self.at["step"]))
      self.at["step"] += 1
      self.at["seconds"] = time.time() - start
      if self.at["step"] % self.args.every == 0:
        self.report(phase, losses)
        self.save()
        losses = []
    if losses:
      self.report(phase, losses)

  def stopped(self):
    return self.args.stop_after and self.taken >= self.args.stop_after

  def report(self, phase, losses):
    mean = torch.stack(losses).float().mean(0)
    step, seconds = self.at["step"], self.at["seconds"]
    what = f"KL {mean.item():.4f}" if mean.ndim == 0 else \
        f"error left {mean.mean().item():.3f} of the bare selector's, worst layer {mean.max().item():.3f}"
    self.log(f"{phase.name} step {step}  {what}  {seconds / step:.2f} s a step, {min(1, phase.done(step, seconds)):.0%}")

  def history(self):
    a = self.args
    lengths = ", ".join(f"{p.name} to step {self.at['step'] if i == self.at['phase'] else '0' if i > self.at['phase'] else 'end'} "
                        f"at {p.rate}" for i, p in enumerate(self.phases) if p.steps or p.minutes)
    return f"refine.py: {lengths}; batch {a.batch}, step {a.step}, context {a.context}, policies {a.policies}, mix {a.mix}, seed {a.seed}"

  def save(self):
    torch.save({"maps": self.maps.state_dict(), "optimizer": self.optimizer.state_dict(), "at": self.at, "tokens": self.tokens},
               f"{self.args.out}.state.pt")
    if not self.args.sidecar:
      self.maps.describe(self.policies[0], self.tokens, self.contexts[0][0], self.args.seed)
    self.maps.write(self.args.out, self.args.matrix_type, self.history())

  def resume(self):
    state = torch.load(f"{self.args.out}.state.pt", map_location=self.args.device, weights_only=True)
    self.maps.load_state_dict(state["maps"])
    self.optimizer.load_state_dict(state["optimizer"])
    self.at, self.tokens = state["at"], state["tokens"]

  def run(self):
    if self.args.resume and Path(f"{self.args.out}.state.pt").exists():
      self.resume()
    else:
      calibrate(self.llm, self.draw(self.phases[0], 0)[0], self.maps, fresh=not self.args.sidecar)
    for index in range(self.at["phase"], len(self.phases)):
      if self.stopped():
        break
      if index != self.at["phase"]:
        self.at = {"phase": index, "step": 0, "seconds": 0.0}
      self.run_phase(self.phases[index])
    self.save()
    if self.args.valid:
      self.validate()

  def validate(self):
    context = self.contexts[0][0]
    for name, (_, texts) in read_packed(self.args.tokens, {n: 1 for n in self.args.valid.split(",")}).items():
      rows = [torch.from_numpy(t[at:at + context].astype("int64")) for t in texts for at in range(0, len(t) - context + 1, context)]
      ids = torch.stack(rows[::max(1, len(rows) // self.args.valid_windows)][:self.args.valid_windows]).to(self.args.device)
      self.log(f"{name}: {len(ids)} windows")
      validate(self.llm, self.maps, ids, [(p, Policy.parse(p, context)) for p in ("h2o:2", "h2o:5", "h2o:10")], 8, self.log)


def parse_arguments():
  p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  p.add_argument("--model", required=True)
  p.add_argument("--sidecar", help="maps to start from (default: random ones of --rank and --hidden)")
  p.add_argument("--rank", type=int, default=8)
  p.add_argument("--hidden", type=int, default=128)
  texts = p.add_mutually_exclusive_group(required=True)
  texts.add_argument("--text", nargs="+")
  texts.add_argument("--tokens", help="a file of texts.py")
  p.add_argument("--mix", help="shares of its groups: books=0.5,tech=0.5 (default: all, by size)")
  p.add_argument("--out", required=True)
  p.add_argument("--identity", help="the model file that OUT names (default: --model)")
  p.add_argument("--matrix-type", choices=("bf16", "f32"), default="bf16")
  p.add_argument("--policies", default=POLICIES, help="selector:percent*weight, drawn at random")
  p.add_argument("--step", default="8*6,16,32", help="tokens a step while text streams in, drawn at random; must divide the context")
  p.add_argument("--context", help="tokens of a text, drawn at random (default: 2048, or the model's if that is less)")
  p.add_argument("--layerwise", type=int, default=0, help="steps of the first phase")
  p.add_argument("--layerwise-minutes", type=float, default=0)
  p.add_argument("--layerwise-rate", type=float, default=4e-3)
  p.add_argument("--steps", type=int, default=0, help="steps of the joint phase")
  p.add_argument("--minutes", type=float, default=0)
  p.add_argument("--rate", type=float, default=2e-3)
  p.add_argument("--batch", type=int, default=2, help="texts a step, of the first context; of longer ones fewer")
  p.add_argument("--stop-after", type=int, default=0, help="steps of this run, for a rest that --resume makes up")
  p.add_argument("--every", type=int, default=25, help="steps between reports and states")
  p.add_argument("--valid", help="groups of --tokens to validate on at the end")
  p.add_argument("--valid-windows", type=int, default=8)
  p.add_argument("--seed", type=int, default=0)
  p.add_argument("--threads", type=int, default=1)
  p.add_argument("--device", default="cpu")
  p.add_argument("--bf16", action="store_true", help="the model's matrices in bfloat16 on a CPU, too: twice as fast where it has such products")
  p.add_argument("--resume", action="store_true")
  args = p.parse_args()
  if args.valid and not args.tokens:
    p.error("--valid needs --tokens")
  return args


def main() -> None:
  args = parse_arguments()
  torch.set_num_threads(args.threads)
  torch.backends.cuda.matmul.allow_tf32 = True
  Training(args).run()


if __name__ == "__main__":
  main()
