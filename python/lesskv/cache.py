"""The cache alone, over NumPy arrays or whatever speaks DLPack (torch tensors on the CPU), for layers of your own."""
from __future__ import annotations

import ctypes as c

import numpy as np

from . import _c
from .model import Stats, address, choice, fields_of

KINDS = {"prompt": 0, "stream": 1, "decode": 2}


def rows(name: str, array, shape: tuple) -> np.ndarray:
    """float32, row-major, without a copy where it is already so."""
    if type(array) is np.ndarray and array.dtype == np.float32 and array.shape == shape and array.flags.c_contiguous:
        return array
    if not isinstance(array, np.ndarray):
        array = np.from_dlpack(array) if hasattr(array, "__dlpack__") else np.asarray(array)
    if array.shape != shape:
        _c.refuse(f"{name}: expected shape {shape}, found {array.shape}")
    return np.ascontiguousarray(array, dtype=np.float32)


def _array(name: str, values, n: int, ctype):
    if values is None:
        return None
    if len(values) != n:
        _c.refuse(f"{name}: expected {n} values, found {len(values)}")
    return (ctype * n)(*([_c.whole(name, value, ctype) for value in values] if ctype in _c.LIMITS else values))


class Cache(_c.Handle):
    """A key-value cache for layers of one shape.

        cache = lesskv.Cache(layers=2, heads=8, kv_heads=2, head_dim=64, ctx=4096, kv="h2o(5%)")
        with cache.step(n, "prompt"):
            for layer in range(2):
                out = cache(layer, queries, keys, values)   # [n, heads, head_dim]; keys and values [n, kv_heads, head_dim]
        cache.end_prompt()

    Queries and keys come unrotated; the cache rotates them (rope_dims coordinates of each head, 0: none; rope_halves: pairs
    (i, i + rope_dims / 2), as Hugging Face's models have them, else (2 i, 2 i + 1)). rope_factors: divisors of the
    frequencies, one a pair; rope_linear: divisor of all; rope_magnitude: of rotated coordinates (YaRN's attention factor).
    scale: of scores, 0 for 1 / sqrt(head_dim). windows: one a layer, 0 for a global one, which the spec is about; a local
    one sees and holds so many last tokens, and rotates by local_rope_theta.
    """

    _free = "cache_free"

    def __init__(self, layers: int, heads: int, kv_heads: int, head_dim: int, ctx: int, kv: str = "full",
                 rope_dims: int | None = None, rope_halves: bool = True, rope_theta: float = 10000.0, threads: int = 0,
                 rope_linear: float = 1.0, rope_factors=None, rope_magnitude: float = 1.0, scale: float = 0.0, windows=None,
                 local_rope_theta: float = 10000.0):
        dims = head_dim if rope_dims is None else rope_dims
        shape = _c.CacheShape(n_layers=layers, n_heads=heads, n_kv_heads=kv_heads, head_dim=head_dim, ctx=ctx, rope_dims=dims,
                              rope_halves=rope_halves, rope_theta=rope_theta, rope_linear=rope_linear, scale=scale,
                              rope_factors=_array("rope_factors", rope_factors, dims // 2, c.c_float),
                              rope_magnitude=rope_magnitude, windows=_array("windows", windows, layers, c.c_size_t),
                              local_rope_theta=local_rope_theta)
        handle = c.c_void_p()
        _c.call("cache_new", c.byref(shape), _c.encoded(kv), _c.whole("threads", threads, _c.i32), c.byref(handle))
        super().__init__(handle)
        self.layers, self.heads, self.kv_heads, self.head_dim = layers, heads, kv_heads, head_dim
        self._n = 0

    def step(self, n: int, kind: str = "decode") -> "Cache":
        """Begins a step of n tokens: "prompt" (a whole one), "stream" (a part of a text) or "decode". Use it in `with`."""
        _c.call("cache_begin_step", self._pointer, _c.whole("n", n, _c.size_t), choice("kind", kind, KINDS))
        self._n = n
        return self

    def __enter__(self) -> "Cache":
        return self

    def __exit__(self, kind, *_):
        if kind is None:
            self.end_step()

    def end_step(self) -> None:
        """What `with` does at its end."""
        _c.call("cache_end_step", self._pointer)
        self._n = 0

    def __call__(self, layer: int, queries, keys, values) -> np.ndarray:
        """Appends keys and values of the step's tokens to a layer and attends: the output [n, heads, head_dim]."""
        if self._n == 0:
            _c.refuse("no step is in progress")
        row = (self._n, self.kv_heads, self.head_dim)
        k, v = rows("keys", keys, row), rows("values", values, row)
        q = rows("queries", queries, (self._n, self.heads, self.head_dim))
        out = np.empty_like(q)
        _c.call("cache_append", self._pointer, layer, address(k), address(v))
        _c.call("cache_attend", self._pointer, layer, address(q), address(out))
        return out

    def end_prompt(self) -> None:
        _c.call("cache_end_prompt", self._pointer)

    def clone(self) -> "Cache":
        handle = c.c_void_p()
        _c.call("cache_clone", self._pointer, c.byref(handle))
        clone = object.__new__(Cache)
        clone.__dict__.update(self.__dict__, _pointer=handle)
        return clone

    @property
    def stats(self) -> Stats:
        stats = _c.CStats()
        _c.call("cache_get_stats", self._pointer, c.byref(stats))
        return fields_of(stats, Stats)

    def positions(self, layer: int, kv_head: int) -> np.ndarray:
        """The positions that one head holds, ascending."""
        return np.array(_c.array_of("cache_get_positions", c.c_int32, self._pointer, layer, kv_head), dtype=np.int32)

    def save(self) -> bytes:
        return bytes(_c.array_of("cache_save", c.c_char, self._pointer))

    def load(self, state: bytes) -> None:
        """Into a new cache of the same shape and spec."""
        state = bytes(state)
        _c.call("cache_load", self._pointer, state, len(state))
