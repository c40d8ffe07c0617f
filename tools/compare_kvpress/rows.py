"""What compare.py computes without torch: kvpress's parameters as a cache spec, and how far two kept sets agree.

Where both give a parameter the same name and mean something else, `spec` says what kvpress does; `spec_as_named` passes the
number on as it is, which shows what the difference of the definitions costs.
"""
import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Options:
    """kvpress's parameters, by its meaning of them."""
    window: int = 32  # last tokens that vote and stay (SnapKVPress and ThinKPress: window_size)
    kernel: int = 5  # SnapKVPress: kernel_size
    sinks: int = 4  # StreamingLLMPress: n_sink
    alpha: float = 0.2  # AdaKVPress: alpha_safeguard
    pyramid_window: int = 8  # PyramidKVPress: window_size
    beta: float = 5  # PyramidKVPress: beta
    channels: float = 0.5  # ThinKPress: key_channel_compression_ratio
    sidecar: str = ""  # a .less.gguf with kvzap's scores, which both sides use


def ratio_for(rows, tokens):
    """A compression_ratio with which kvpress keeps exactly `rows` tokens: it computes int(tokens * (1 - ratio))."""
    ratio = 1 - (rows + 1e-6) / tokens
    if not 0 <= ratio < 1 or int(tokens * (1 - ratio)) != rows:
        raise ValueError(f"no compression ratio keeps {rows} of {tokens} tokens")
    return ratio


def ada_floor(rows, o):
    """kvpress counts the window among the int(alpha rows) a head is sure of, `ada` adds its share to the window."""
    own = max(1, int(rows * o.alpha)) - o.window
    return (own + 1e-3) / rows if own > 0 and o.alpha > 0 else 0.0  # a little more, since `ada` rounds down


def pyramid_beta(rows, tokens, o):
    """`pyramid`'s beta for the top layer's rows as kvpress has them, None where kvpress falls back to equal layers.

    kvpress: the layers' totals fall from 2 rows - least to least = rows / beta, the window inside; the bottom layer has at
    most all tokens but the window. `pyramid`, and the authors' code, divides rows - window that way and adds the window.
    """
    least, most = rows / o.beta, 2 * rows - rows / o.beta
    if most >= tokens - o.pyramid_window:
        most = tokens - o.pyramid_window
        least = 2 * rows - most
    if not tokens >= most >= least >= o.pyramid_window:
        return None
    return (rows - o.pyramid_window) / max(least - o.pyramid_window, 1e-3)


def snapkv(rows, window, o):
    return f"snapkv({rows},window={window},kernel={o.kernel},pool=avg)"


def spec(method, rows, tokens, o):
    """The spec that keeps what kvpress's method keeps; float32 rows."""
    if method == "full":
        return "full+f32"
    if method == "window":
        return f"window({rows},sinks={o.sinks})+f32"
    if method == "snapkv":
        return snapkv(rows, o.window, o) + "+f32"
    if method == "ada":
        return f"{snapkv(rows, o.window, o)}+ada({ada_floor(rows, o):.9f})+f32"
    if method == "pyramid":
        beta = pyramid_beta(rows, tokens, o)
        return snapkv(rows, o.pyramid_window, o) + ("" if beta is None else f"+pyramid({beta:.9f})") + "+f32"
    if method in ("think", "think-window"):
        return f"full+think({o.channels},window={o.window})+f32"
    if method == "kvzap":  # as in kvpress's, each head keeps as many and nothing but for its score
        return f'kvzap({rows},scope=head,window=0,sinks=0,file="{o.sidecar}")+f32'
    raise ValueError(f"no method '{method}'")


def spec_as_named(method, rows, tokens, o):
    """The spec with kvpress's own numbers, where that differs from `spec`; else None."""
    named = {"ada": f"{snapkv(rows, o.window, o)}+ada({o.alpha})+f32",
             "pyramid": f"{snapkv(rows, o.pyramid_window, o)}+pyramid({o.beta})+f32"}.get(method)
    return None if named == spec(method, rows, tokens, o) else named


def kept_of_runs(kv_runs):
    """`lesskv run --json --kv-stats`: a layer's heads as [begin, end, begin, end, ...]; the same as sets of positions."""
    layers = []
    for heads in kv_runs:
        layers.append([])
        for runs in heads:
            if len(runs) % 2:
                raise ValueError(f"runs are pairs of begin and end, found {len(runs)} numbers")
            layers[-1].append({p for begin, end in zip(runs[::2], runs[1::2]) for p in range(begin, end)})
    return layers


def agreement(ours, theirs):
    """Of every layer and head, in order: the rows that both keep, as a share of the larger set."""
    if [len(heads) for heads in ours] != [len(heads) for heads in theirs]:
        raise ValueError("the kept sets are of different layers and heads")
    return [len(a & b) / max(len(a), len(b)) if a or b else 1.0 for x, y in zip(ours, theirs) for a, b in zip(x, y)]


def rows_kept(layers):
    """Mean rows of a layer's head."""
    heads = [len(kept) for layer in layers for kept in layer]
    return sum(heads) / len(heads)


def log_softmax(logits):
    top = max(logits)
    norm = top + math.log(sum(math.exp(x - top) for x in logits))
    return [x - norm for x in logits]


def divergence(theirs, ours):
    """KL of our next token's distribution from theirs, in nats, of logits."""
    p, q = log_softmax(theirs), log_softmax(ours)
    return sum(math.exp(a) * (a - b) for a, b in zip(p, q))
