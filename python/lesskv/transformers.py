"""Hugging Face models that attend through lesskv's cache, on the CPU.

    cache = lesskv.transformers.Cache(model, kv="h2o(5%)", ctx=4096)
    tokens = model.generate(ids, cache=cache, max_new_tokens=100)     # past_key_values=cache before transformers 5.24
    print(cache.stats[0].kv_bytes)

The model's own layers compute everything but attention: keys and values go into a `lesskv.Cache` for each text of the batch,
which rotates, stores, evicts and attends, so that what a method claims to save is not held anywhere. Left padding, several
texts, turns and beam search work; cropping (assisted generation) does not. `detach(model)` gives the model back to its own
attention.

The first forward and each later one of more than one token are a prompt or turn, cut at its end as the spec says; with
`stream=True` they are parts of a text that streams in, for `generate(prefill_chunk_size=N)` and specs with prefill(chunk=N).
"""
from __future__ import annotations

import threading

import numpy as np
import torch
from transformers import cache_utils
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from . import _c
from .cache import Cache as OneText
from .model import Stats

NAME = "lesskv"
# The architectures whose rotation, windows and scale are known to be read right (the tests compare each with the engine).
ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3", "gemma3_text")
STATIC_ROPES = ("default", "linear", "llama3", "yarn")
# Whose heads GGUF files hold with the two coordinates of a rotated pair side by side, not half a head apart. Cached rows lie
# likewise: blocks of low-bit codes have the members that they have in the engine, and trained parts fit.
ADJACENT_PAIRS = ("llama", "mistral")

_step = threading.local()  # .cache: what a layer has just updated, for the attention that it calls next


_refuse = _c.refuse


class _Layer(cache_utils.CacheLayerMixin):
    """What transformers asks of one layer's cache. It holds nothing: rows lie in the texts' caches."""

    is_compileable = False
    is_sliding = False

    def __init__(self, cache: "Cache", layer: int):
        super().__init__()
        self.cache, self.layer = cache, layer

    def lazy_initialization(self, keys, values):
        pass

    def update(self, keys, values, *arguments, **options):
        if self.layer > 0 and getattr(_step, "cache", None) == (self.cache, self.layer - 1):  # which nobody has taken
            _step.cache = None
            _refuse("this model attends by itself, and keys and values would be lost: lesskv.transformers.attach(model)")
        _step.cache = (self.cache, self.layer)
        return keys, values

    def get_seq_length(self) -> int:
        return self.cache.length

    def get_mask_sizes(self, query_length: int):
        return self.cache.length + query_length, 0

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length

    def reset(self):
        pass  # Cache.reset does it


class Cache(cache_utils.Cache):
    """The cache of a batch of texts through one model. kv: a cache spec; ctx: tokens a text may have (0: what the model was
    trained for); threads: 0 for all CPUs. Makes the model attend through lesskv (see `detach`)."""

    def __init__(self, model, kv: str = "full", ctx: int = 0, threads: int = 0, stream: bool = False):
        attach(model)
        self._shape = _shape_of(model, ctx)
        self._adjacent = not self._shape["rope_halves"]
        super().__init__(layers=[_Layer(self, layer) for layer in range(self._shape["layers"])])
        self.stream = stream
        # An empty cache, of which each text's is a clone: they share its threads.
        self._empty = OneText(kv=kv, threads=threads, **self._shape)
        self.reset()

    def reset(self):
        self.texts: list[OneText] = []
        self.length = 0  # columns that transformers has fed, padding included
        self._seen: list[int] = []  # tokens of each text
        self._steps: list[int] = []  # tokens of each text in the step
        self._kinds: list[str] = []
        self._mask = None

    @property
    def stats(self) -> list[Stats]:
        """Of each text."""
        return [text.stats for text in self.texts]

    def reorder_cache(self, beam_idx):
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int):
        self.batch_select_indices(torch.arange(len(self.texts)).repeat_interleave(repeats))

    def batch_select_indices(self, indices):
        chosen = [int(i) for i in indices]
        self.texts = [self.texts[i].clone() if i in chosen[:at] else self.texts[i] for at, i in enumerate(chosen)]
        self._seen = [self._seen[i] for i in chosen]

    def crop(self, *_):
        _refuse("a lesskv cache cannot give tokens back: what was evicted is gone, so assisted generation needs another cache")

    def _begin(self, n: int, batch: int, mask, positions):
        """Begins a step of n columns in every text; padded ones are none of its business."""
        if not self.texts:
            self.texts, self._seen = [self._empty.clone() for _ in range(batch)], [0] * batch
        if len(self.texts) != batch:
            _refuse(f"the cache holds {len(self.texts)} texts, the step has {batch}")
        if mask is not None and mask.dim() != 2:
            _refuse(f"attention_mask: expected [texts, tokens], which says what is padded, found shape {tuple(mask.shape)}")
        self._mask = None if mask is None else mask[:, -n:].bool()
        self._steps = [n] * batch if self._mask is None else self._mask.sum(-1).tolist()
        for i, (tokens, seen) in enumerate(zip(self._steps, self._seen)):
            if tokens > self._shape["ctx"] - seen:
                _refuse(f"a step of {tokens} tokens does not fit: {seen} of {self._shape['ctx']} tokens are seen")
            self._check_positions(i, seen, positions)
        self._kinds = [self._kind(tokens, seen) for tokens, seen in zip(self._steps, self._seen)]
        self.length += n
        for text, tokens, kind in zip(self.texts, self._steps, self._kinds):
            if tokens > 0:
                text.step(tokens, kind)

    def _kind(self, tokens: int, seen: int) -> str:
        if tokens == 1 and seen > 0:
            return "decode"
        return "stream" if self.stream else "prompt"

    def _check_positions(self, i: int, seen: int, positions):
        if positions is None:
            return
        row = positions[i if positions.shape[0] > 1 else 0]
        row = row if self._mask is None else row[self._mask[i]]
        if row.numel() and (int(row[0]) != seen or int(row[-1]) != seen + row.numel() - 1):
            _refuse(f"text {i}: expected positions from {seen} on, found {int(row[0])} to {int(row[-1])}")

    def _attend(self, layer: int, queries, keys, values, mask, positions):
        batch, _, n, _ = queries.shape
        if layer == 0:
            self._begin(n, batch, mask, positions)
        out = torch.zeros(batch, n, queries.shape[1], queries.shape[3], dtype=torch.float32)
        for i, text in enumerate(self.texts):
            if self._steps[i] == 0:
                continue
            q, k, v = self._rows(i, queries, self._adjacent), self._rows(i, keys, self._adjacent), self._rows(i, values)
            rows = torch.from_numpy(text(layer, q, k, v))
            if self._mask is None:
                out[i] = rows
            else:
                out[i, self._mask[i]] = rows
        if layer == self._shape["layers"] - 1:
            self._end()
        return out

    def _rows(self, i: int, x, adjacent: bool = False) -> np.ndarray:
        """[heads, n, dim] of text i as the cache wants it, [tokens, heads, dim]; no copy where it lies so already. adjacent: the
        halves of a head are interleaved."""
        rows = x[i].transpose(0, 1)
        rows = (rows if self._mask is None else rows[self._mask[i]]).detach().float().contiguous().numpy()
        if not adjacent:
            return rows
        tokens, heads, dim = rows.shape
        return rows.reshape(tokens, heads, 2, dim // 2).swapaxes(2, 3).reshape(rows.shape)  # NumPy: a fifth of torch's time

    def _end(self):
        for i, text in enumerate(self.texts):
            if self._steps[i] == 0:
                continue
            text.end_step()
            if self._kinds[i] == "prompt":
                text.end_prompt()
            self._seen[i] += self._steps[i]


def _attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, sliding_window=None, position_ids=None,
               **_):
    cache, layer = getattr(_step, "cache", None) or (None, None)
    _step.cache = None
    if cache is None or layer != module.layer_idx:
        _refuse("this model attends through lesskv: give it a lesskv.transformers.Cache, or lesskv.transformers.detach(model)")
    if query.device.type != "cpu":
        _refuse(f"lesskv's cache works on the CPU, the model's layer {layer} is on {query.device}")
    if dropout or (module.training and torch.is_grad_enabled()):
        _refuse("lesskv's attention has neither dropout nor gradients: model.eval() first")
    return cache._attend(layer, query, key, value, attention_mask, position_ids).to(query.dtype), None


def _mask(batch_size, q_length, kv_length, attention_mask=None, **_):
    """The padding mask [batch, columns] where anything is padded: causality is the cache's business."""
    return None if attention_mask is None or bool(attention_mask.all()) else attention_mask


ALL_ATTENTION_FUNCTIONS.register(NAME, _attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, _mask)


def _no_rotation(module, arguments, angles):
    """The cache rotates: queries and keys must come to it as they are."""
    cosine, sine = angles
    return torch.ones_like(cosine), torch.zeros_like(sine)


def attach(model) -> None:
    """Makes a model attend through lesskv; it then needs a `Cache` in every forward. Cache(model) does this itself."""
    if getattr(model, "_lesskv_hook", None) is not None:
        return
    kind = model.config.model_type
    if kind not in ARCHITECTURES:
        _refuse(f"lesskv.transformers knows {', '.join(ARCHITECTURES)}, found {kind}")
    hook = model.get_decoder().rotary_emb.register_forward_hook(_no_rotation)
    before = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    model._lesskv_hook = (hook, before)


def detach(model) -> None:
    """Gives a model its own attention back."""
    if getattr(model, "_lesskv_hook", None) is None:
        return
    hook, before = model._lesskv_hook
    hook.remove()
    model.set_attn_implementation(before)
    model._lesskv_hook = None


def _one(name: str, values: list):
    if any(value != values[0] for value in values):
        _refuse(f"{name}: layers with different values are not supported, found {sorted(set(values))}")
    return values[0]


def _shape_of(model, ctx: int) -> dict:
    """The arguments of lesskv.Cache for a model's layers."""
    config, decoder = model.config, model.get_decoder()
    attentions = [layer.self_attn for layer in decoder.layers]
    if getattr(config, "attn_logit_softcapping", None) is not None:
        _refuse("attn_logit_softcapping is not supported")
    if getattr(config, "use_bidirectional_attention", None):
        _refuse("attention to later tokens (use_bidirectional_attention) is not supported")
    head_dim = _one("head_dim", [a.head_dim for a in attentions])
    window_of_all = getattr(config, "sliding_window", None) if config.model_type == "mistral" else None
    windows = [getattr(a, "sliding_window", None) or window_of_all or 0 for a in attentions]
    shape = dict(layers=len(attentions), heads=config.num_attention_heads, kv_heads=config.num_key_value_heads,
                 head_dim=head_dim, ctx=ctx or config.max_position_embeddings,
                 rope_halves=config.model_type not in ADJACENT_PAIRS,
                 scale=_one("scaling", [float(a.scaling) for a in attentions]), windows=windows)
    return {**shape, **_rope_of(decoder.rotary_emb, config.rope_parameters, windows, head_dim)}


def _rope_of(rotary, parameters: dict, windows: list, head_dim: int) -> dict:
    if "full_attention" not in parameters:
        rope = _rope(parameters, rotary.inv_freq, rotary.attention_scaling, head_dim)
        if not any(windows):
            return rope
        if parameters["rope_type"] != "default":
            _refuse(f"sliding windows with rope type {parameters['rope_type']} are not supported")
        return {**rope, "local_rope_theta": parameters["rope_theta"]}
    if all(windows):
        _refuse("a model without global layers is not supported: no cache spec would be about it")
    local = parameters["sliding_attention"]
    if local["rope_type"] != "default":
        _refuse(f"sliding windows with rope type {local['rope_type']} are not supported")
    rope = _rope(parameters["full_attention"], rotary.full_attention_inv_freq, rotary.full_attention_attention_scaling, head_dim)
    return {**rope, "local_rope_theta": local["rope_theta"]}


def _rope(parameters: dict, inverse_frequencies, magnitude: float, head_dim: int) -> dict:
    kind, theta = parameters["rope_type"], float(parameters["rope_theta"])
    if kind not in STATIC_ROPES:
        _refuse(f"rope type {kind}: expected {' or '.join(STATIC_ROPES)}, whose angles do not change with the text's length")
    pairs = inverse_frequencies.numel()
    if 2 * pairs != head_dim:
        _refuse(f"a rotation of {2 * pairs} of {head_dim} coordinates is not supported")
    rope = dict(rope_dims=2 * pairs, rope_theta=theta, rope_magnitude=float(magnitude))
    if kind == "linear":
        return {**rope, "rope_linear": float(parameters["factor"])}
    if kind == "default":
        return rope
    usual = theta ** (-np.arange(pairs) / pairs)
    return {**rope, "rope_factors": usual / inverse_frequencies.double().numpy()}
