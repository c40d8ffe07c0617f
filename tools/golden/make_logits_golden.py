#!/usr/bin/env python3
"""Writes tiny random models and the logits that an independent forward pass computes for them.

The forward pass below is plain NumPy in float64, written from the papers and the GGUF conventions, and shares nothing
with the engine. Each model exercises something the others do not: grouped heads, as many KV heads as query heads, tied
and untied output, linear RoPE scaling, `rope_freqs.weight`, YaRN, a head size that is not d_model / n_heads, optional
biases, and what the other architectures add to a Llama layer. check_logits_with_transformers.py compares it with the
models' reference implementations.

    pip install numpy gguf
    python3 tools/golden/make_logits_golden.py tests/data/models

writes NAME.gguf (f32 weights) and NAME.expected.gguf (tensors `tokens` [n] and `logits` [n, n_vocab]; for LongRoPE also
`short_logits` [original context, n_vocab], of a context that takes the short factors) for each model.
The output is the same on every run.
"""
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path

import gguf
import numpy as np

N_TOKENS = 32


@dataclass
class Shape:
    name: str
    arch: str = "llama"
    layers: int = 2
    d_model: int = 32
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 8
    ffn: int = 40
    vocab: int = 61
    eps: float = 1e-5
    rope_base: float = 10000.0
    rope_factor: float = 1.0      # linear scaling: positions are divided by it
    rope_freqs: bool = False      # per-frequency divisors, as Llama 3.1 has
    tied: bool = True
    biases: tuple = ()            # among q k v output gate up down
    tokenizer: bool = False
    halves: bool = False          # RoPE turns (0, d/2), (1, d/2 + 1), ... instead of (0, 1), (2, 3), ...
    yarn_ctx: int = 0             # YaRN with rope_factor, trained for so many tokens
    context: int = 128
    qk_norm: bool = False
    post_norms: bool = False
    embedding_scale: float = 1.0
    activation: str = "silu"
    gated: bool = True
    window: int = 0               # local layers: window, and of how many layers the last is global
    local_period: int = 6
    fused: bool = False           # attn_qkv
    gate_in_up: bool = False      # ffn_up holds gate and up
    rotated: int = 0              # coordinates that are rotated; 0: all
    longrope_ctx: int = 0         # LongRoPE, trained for so many tokens
    layer_norm: bool = False      # with bias; the layer's halves are parallel
    two_norms: bool = False       # one for each half of a parallel layer
    nope_period: int = 0          # of so many layers the last is not rotated
    weights: dict = field(default_factory=dict)


SHAPES = [
    Shape("llama-gqa-tied", vocab=272, tokenizer=True),
    Shape("llama-mha-untied", d_model=24, heads=3, kv_heads=3, ffn=36, eps=1e-6, rope_base=500000.0, tied=False),
    Shape("llama-rope-scaled", d_model=20, heads=4, kv_heads=1, head_dim=6, ffn=28, vocab=47, rope_factor=4.0,
          rope_freqs=True, biases=("q", "k", "v", "output", "gate", "up", "down")),
    Shape("qwen2-bias", arch="qwen2", layers=3, d_model=24, heads=4, kv_heads=2, head_dim=6, ffn=33, vocab=53,
          rope_base=1000000.0, biases=("q", "k", "v"), halves=True),
    Shape("qwen3-qk-norm", arch="qwen3", d_model=24, heads=4, kv_heads=2, head_dim=10, ffn=33, vocab=53, eps=1e-6,
          rope_base=1000000.0, halves=True, qk_norm=True),
    Shape("llama-yarn", d_model=32, heads=2, kv_heads=2, head_dim=16, ffn=28, vocab=47, rope_factor=4.0, yarn_ctx=2048,
          context=8192),
    Shape("gemma3-local", arch="gemma3", layers=7, d_model=20, heads=2, kv_heads=1, head_dim=12, ffn=24, vocab=59,
          eps=1e-6, rope_base=1000000.0, rope_factor=8.0, halves=True, qk_norm=True, post_norms=True,
          embedding_scale=20 ** 0.5, activation="gelu_tanh", window=9),
    Shape("phi3-longrope", arch="phi3", heads=4, kv_heads=2, head_dim=8, ffn=24, vocab=53, halves=True, tied=False,
          fused=True, gate_in_up=True, rotated=6, longrope_ctx=20, context=80),
    Shape("falcon-mqa", arch="falcon", kv_heads=1, ffn=44, vocab=51, halves=True, activation="gelu", gated=False,
          fused=True, layer_norm=True),
    Shape("falcon-two-norms", arch="falcon", d_model=24, heads=6, kv_heads=2, head_dim=4, ffn=36, vocab=49, halves=True,
          tied=False, activation="gelu", gated=False, fused=True, layer_norm=True, two_norms=True),
    Shape("smollm3-nope", arch="smollm3", layers=5, d_model=24, heads=4, kv_heads=2, head_dim=6, ffn=30, vocab=57,
          eps=1e-6, rope_base=5000000.0, nope_period=4),
]


def make_weights(shape, rng):
    """Matrices [outputs, inputs] in float32, scaled so that attention is neither flat nor a single token."""
    w = {}

    def matrix(name, rows, cols, gain=1.0):
        w[name] = (rng.standard_normal((rows, cols)) * gain / np.sqrt(cols)).astype(np.float32)

    def vector(name, n, mean, std):
        w[name] = (mean + std * rng.standard_normal(n)).astype(np.float32)

    def norm(name, n):
        vector(name + ".weight", n, 1.0, 0.2)
        if shape.layer_norm:
            vector(name + ".bias", n, 0.0, 0.2)

    q_dim, kv_dim = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    w["token_embd.weight"] = rng.standard_normal((shape.vocab, shape.d_model)).astype(np.float32)
    for layer in range(shape.layers):
        p = f"blk.{layer}."
        norm(p + "attn_norm", shape.d_model)
        if shape.two_norms:
            norm(p + "attn_norm_2", shape.d_model)
        if not shape.layer_norm:
            norm(p + "ffn_norm", shape.d_model)
        if shape.qk_norm:
            norm(p + "attn_q_norm", shape.head_dim)
            norm(p + "attn_k_norm", shape.head_dim)
        if shape.post_norms:
            norm(p + "post_attention_norm", shape.d_model)
            norm(p + "post_ffw_norm", shape.d_model)
        matrix(p + "attn_q.weight", q_dim, shape.d_model, 1.5)
        matrix(p + "attn_k.weight", kv_dim, shape.d_model, 1.5)
        matrix(p + "attn_v.weight", kv_dim, shape.d_model)
        matrix(p + "attn_output.weight", shape.d_model, q_dim)
        if shape.gated:
            matrix(p + "ffn_gate.weight", shape.ffn, shape.d_model)
        matrix(p + "ffn_up.weight", shape.ffn, shape.d_model)
        matrix(p + "ffn_down.weight", shape.d_model, shape.ffn)
        sizes = {"q": ("attn_q", q_dim), "k": ("attn_k", kv_dim), "v": ("attn_v", kv_dim),
                 "output": ("attn_output", shape.d_model), "gate": ("ffn_gate", shape.ffn), "up": ("ffn_up", shape.ffn),
                 "down": ("ffn_down", shape.d_model)}
        for bias in shape.biases:
            vector(p + sizes[bias][0] + ".bias", sizes[bias][1], 0.0, 0.5)
    norm("output_norm", shape.d_model)
    if not shape.tied:
        matrix("output.weight", shape.vocab, shape.d_model, 2.0)
    if shape.rope_freqs:
        w["rope_freqs.weight"] = np.linspace(1.0, 8.0, shape.head_dim // 2).astype(np.float32)
    if shape.longrope_ctx:
        w["rope_factors_short.weight"] = np.linspace(1.0, 1.5, shape.rotated // 2).astype(np.float32)
        w["rope_factors_long.weight"] = np.linspace(1.2, 9.0, shape.rotated // 2).astype(np.float32)
    return w


def stored(shape):
    """The weights as the file holds them: some matrices are one."""
    w = dict(shape.weights)
    for layer in range(shape.layers):
        p = f"blk.{layer}."
        if shape.fused:
            w[p + "attn_qkv.weight"] = np.concatenate([w.pop(p + f"attn_{x}.weight") for x in "qkv"])
        if shape.gate_in_up:
            w[p + "ffn_up.weight"] = np.concatenate([w.pop(p + "ffn_gate.weight"), w[p + "ffn_up.weight"]])
    return w


def rms_norm(x, weight, eps):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight


def layer_norm(x, weight, bias, eps):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight + bias


def yarn_frequencies(shape, frequency):
    """Section 3.2 of arXiv 2309.00071: pairs that turn often keep their frequency, those that turn rarely are stretched."""
    n = shape.head_dim
    pair = [n * np.log(shape.yarn_ctx / (turns * 2 * np.pi)) / (2 * np.log(shape.rope_base)) for turns in (32, 1)]
    low, high = max(np.floor(pair[0]), 0), min(np.ceil(pair[1]), n - 1)
    stretched = np.clip((np.arange(n // 2) - low) / max(high - low, 0.001), 0, 1)
    return frequency * (1 - stretched) + frequency / shape.rope_factor * stretched


def rotation(shape, layer, long):
    """Frequencies of the layer's pairs and what rotated coordinates are multiplied by."""
    d = shape.rotated or shape.head_dim
    exponent = -np.arange(0, d, 2, dtype=np.float64) / d
    if shape.nope_period and (layer + 1) % shape.nope_period == 0:
        return 0 * exponent, 1.0
    if shape.window and (layer + 1) % shape.local_period != 0:
        return 10000.0 ** exponent, 1.0
    frequency = shape.rope_base ** exponent
    if shape.yarn_ctx:
        return yarn_frequencies(shape, frequency), 0.1 * np.log(shape.rope_factor) + 1
    if shape.longrope_ctx:
        return frequency / shape.weights[f"rope_factors_{'long' if long else 'short'}.weight"], attention_factor(shape)
    return frequency / shape.rope_factor / shape.weights.get("rope_freqs.weight", 1.0), 1.0


def attention_factor(shape):
    """Of LongRoPE, as Phi 3 has it; models store it as a float32."""
    return float(np.float32(np.sqrt(1 + np.log(shape.context / shape.longrope_ctx) / np.log(shape.longrope_ctx))))


def rope(x, shape, frequency, magnitude):
    """x [n, heads, head_dim] of positions 0 .. n-1."""
    n, d = len(x), 2 * len(frequency)
    angle = np.arange(n)[:, None] * frequency  # [n, d/2]
    cos, sin = magnitude * np.cos(angle)[:, None, :], magnitude * np.sin(angle)[:, None, :]
    y = x.copy()
    if shape.halves:
        first, second = slice(0, d // 2), slice(d // 2, d)
    else:
        first, second = slice(0, d, 2), slice(1, d, 2)
    a, b = x[..., first], x[..., second]
    y[..., first], y[..., second] = a * cos - b * sin, a * sin + b * cos
    return y


def attention(q, k, v, window=0):
    """q [n, heads, d], k and v [n, kv_heads, d]; causal; each KV head serves heads / kv_heads query heads."""
    n, heads, d = q.shape
    group = heads // k.shape[1]
    out = np.empty_like(q)
    distance = np.arange(n)[:, None] - np.arange(n)
    mask = np.where((distance < 0) | (window > 0) & (distance >= window), -np.inf, 0.0)
    for h in range(heads):
        scores = q[:, h] @ k[:, h // group].T / np.sqrt(d) + mask
        p = np.exp(scores - scores.max(-1, keepdims=True))
        out[:, h] = p / p.sum(-1, keepdims=True) @ v[:, h // group]
    return out


def erf(x):
    return np.vectorize(math.erf)(x)


ACTIVATIONS = {
    "silu": lambda x: x / (1 + np.exp(-x)),
    "gelu": lambda x: 0.5 * x * (1 + erf(x / np.sqrt(2))),
    "gelu_tanh": lambda x: 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x ** 3))),
}


def forward(shape, tokens, long=True):
    w = {name: value.astype(np.float64) for name, value in shape.weights.items()}
    n = len(tokens)

    def linear(name, x):
        return x @ w[name + ".weight"].T + w.get(name + ".bias", 0.0)

    def norm(name, x):
        if shape.layer_norm:
            return layer_norm(x, w[name + ".weight"], w[name + ".bias"], shape.eps)
        return rms_norm(x, w[name + ".weight"], shape.eps)

    def heads(name, h, count):
        x = linear(p + "attn_" + name, h).reshape(n, count, shape.head_dim)
        return norm(p + f"attn_{name}_norm", x) if shape.qk_norm and name != "v" else x

    def attend(h, layer):
        turn = rotation(shape, layer, long)
        q = rope(heads("q", h, shape.heads), shape, *turn)
        k = rope(heads("k", h, shape.kv_heads), shape, *turn)
        local = shape.window and (layer + 1) % shape.local_period != 0
        a = attention(q, k, heads("v", h, shape.kv_heads), shape.window if local else 0)
        a = linear(p + "attn_output", a.reshape(n, -1))
        return norm(p + "post_attention_norm", a) if shape.post_norms else a

    def feed_forward(h):
        up, act = linear(p + "ffn_up", h), ACTIVATIONS[shape.activation]
        inner = act(linear(p + "ffn_gate", h)) * up if shape.gated else act(up)
        f = linear(p + "ffn_down", inner)
        return norm(p + "post_ffw_norm", f) if shape.post_norms else f

    x = w["token_embd.weight"][tokens] * shape.embedding_scale
    for layer in range(shape.layers):
        p = f"blk.{layer}."
        if shape.layer_norm:
            own = "attn_norm_2" if shape.two_norms else "attn_norm"
            x = x + attend(norm(p + own, x), layer) + feed_forward(norm(p + "attn_norm", x))
        else:
            x = x + attend(norm(p + "attn_norm", x), layer)
            x = x + feed_forward(norm(p + "ffn_norm", x))
    return norm("output_norm", x) @ w["token_embd.weight" if shape.tied else "output.weight"].T


def write_tokenizer(writer, vocab):
    """A SentencePiece vocabulary: three control tokens, all bytes, a few pieces, so that any text can be encoded."""
    pieces = ["<unk>", "<s>", "</s>"] + [f"<0x{byte:02X}>" for byte in range(256)]
    kinds = [gguf.TokenType.UNKNOWN] + [gguf.TokenType.CONTROL] * 2 + [gguf.TokenType.BYTE] * 256
    words = ["\u2581", "e", "t", "a", "o", "\u2581t", "he", "\u2581the", "n", "in", "\u2581a", "s", "r"]
    pieces, kinds = pieces + words, kinds + [gguf.TokenType.NORMAL] * len(words)
    assert len(pieces) == vocab, len(pieces)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([piece.encode() for piece in pieces])
    writer.add_token_scores([0.0] * 259 + [-float(i + 1) for i in range(len(words))])
    writer.add_token_types(kinds)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)


def write_model(shape, path):
    w = gguf.GGUFWriter(path, shape.arch)
    w.add_name(shape.name)
    w.add_block_count(shape.layers)
    w.add_context_length(shape.context)
    w.add_embedding_length(shape.d_model)
    w.add_feed_forward_length(shape.ffn)
    w.add_head_count(shape.heads)
    w.add_head_count_kv(shape.kv_heads)
    (w.add_layer_norm_eps if shape.layer_norm else w.add_layer_norm_rms_eps)(shape.eps)
    w.add_rope_freq_base(shape.rope_base)
    w.add_rope_dimension_count(shape.rotated or shape.head_dim)
    if shape.head_dim * shape.heads != shape.d_model:
        w.add_key_length(shape.head_dim)
        w.add_value_length(shape.head_dim)
    if shape.rope_factor != 1.0:
        w.add_rope_scaling_type(gguf.RopeScalingType.YARN if shape.yarn_ctx else gguf.RopeScalingType.LINEAR)
        w.add_rope_scaling_factor(shape.rope_factor)
    if shape.yarn_ctx or shape.longrope_ctx:
        w.add_rope_scaling_orig_ctx_len(shape.yarn_ctx or shape.longrope_ctx)
    if shape.longrope_ctx:
        w.add_rope_scaling_attn_factors(attention_factor(shape))
    if shape.window:
        w.add_sliding_window(shape.window)
    if shape.tokenizer:
        write_tokenizer(w, shape.vocab)
    for name, value in stored(shape).items():
        w.add_tensor(name, value)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


def write_expected(path, tokens, logits, short_logits=None):
    w = gguf.GGUFWriter(path, "golden")
    w.add_tensor("tokens", tokens.astype(np.int32))
    w.add_tensor("logits", logits.astype(np.float32))
    if short_logits is not None:
        w.add_tensor("short_logits", short_logits.astype(np.float32))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


def make(index):
    """A model with its weights, and its text; neither depends on the other models."""
    shape = SHAPES[index]
    rng = np.random.default_rng(20240 + index)
    shape.weights = make_weights(shape, rng)
    return shape, rng.integers(0, shape.vocab, N_TOKENS)


def main():
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    out = Path(sys.argv[1])
    out.mkdir(parents=True, exist_ok=True)
    for index in range(len(SHAPES)):
        shape, tokens = make(index)
        logits = forward(shape, tokens)
        short = forward(shape, tokens[:shape.longrope_ctx], long=False) if shape.longrope_ctx else None
        write_model(shape, out / f"{shape.name}.gguf")
        write_expected(out / f"{shape.name}.expected.gguf", tokens, logits, short)
        margin = np.sort(logits, -1)
        print(f"{shape.name}: logits in [{logits.min():.2f}, {logits.max():.2f}], smallest margin of the first place "
              f"{(margin[:, -1] - margin[:, -2]).min():.4f}")


if __name__ == "__main__":
    main()
