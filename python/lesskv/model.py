"""Models and sequences."""
from __future__ import annotations

import atexit
import ctypes as c
import dataclasses
import json
import os
import queue
import threading
from typing import Callable, Iterator, Mapping, Sequence as Several, Union

import numpy as np

from . import _c

Tokens = Union[Several[int], np.ndarray]
FINISHES = ("length", "end", "stop", "context", "interrupted")
COMPUTE = {"auto": 0, "f32": 1, "bf16": 2, "int8": 3}
LOADING = {"auto": 0, "map": 1, "read": 2}
LESS_SPECS = ("h2o(2%)", "h2o(5%)", "h2o(10%)", "window(2%)", "window(5%)", "tova(2%)", "tova(5%)")  # as lesskv train less


@dataclasses.dataclass(frozen=True)
class Stats:
    """What a cache holds. Rows are means over (global layer, KV head); bytes are allocated, not estimated."""

    tokens_seen: int
    tokens_resident: float
    tokens_dropped: float
    tokens_absorbed: float
    tokens_merged: float
    tokens_offloaded: float
    kv_bytes: int
    kv_bytes_peak: int
    kv_bytes_full: int  # of a full f16 cache of the same tokens


@dataclasses.dataclass(frozen=True)
class Plan:
    """Bytes that a sequence will take, without running it."""

    bytes_peak: int
    bytes_after_prompt: int
    bytes_end: int
    bytes_full: int
    rows_end: float


@dataclasses.dataclass(frozen=True)
class Result:
    """How a generation ended: finish is length, end, stop, context or interrupted."""

    text: str
    prompt_tokens: int
    generated_tokens: int
    prefill_seconds: float
    decode_seconds: float
    finish: str


def fields_of(structure, kind):
    return kind(**{f.name: getattr(structure, f.name) for f in dataclasses.fields(kind)})


def int32(tokens: Tokens) -> np.ndarray:
    ids = np.asarray(tokens)
    if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
        _c.refuse(f"tokens: expected a list of whole numbers, found {ids.dtype} of shape {ids.shape}")
    for id in (ids.min(), ids.max()) if ids.size else ():
        _c.whole("tokens", id, _c.i32)
    return np.ascontiguousarray(ids, dtype=np.int32)


def pointer(array: np.ndarray, ctype):
    return array.ctypes.data_as(c.POINTER(ctype))


def address(array: np.ndarray) -> int:
    """Of a contiguous array, for an argument of type c_void_p. array.ctypes.data takes six times as long."""
    return c.addressof(c.c_char.from_buffer(array)) if array.flags.writeable else array.ctypes.data


def choice(name: str, value: str, choices: dict) -> int:
    if value not in choices:
        _c.refuse(f"{name}: expected {' or '.join(choices)}, found {value!r}")
    return choices[value]


class Model(_c.Handle):
    """Weights, tokenizer and threads of one GGUF file.

    threads: 0 for all CPUs. compute: "auto", "f32", "bf16". loading: "auto", "map", "read".
    """

    _free = "model_free"

    def __init__(self, path: Union[str, os.PathLike], threads: int = 0, compute: str = "auto", loading: str = "auto"):
        handle = c.c_void_p()
        params = _c.ModelParams(n_threads=threads, compute=choice("compute", compute, COMPUTE),
                                loading=choice("loading", loading, LOADING))
        _c.call("model_load", _c.encoded(path), c.byref(params), c.byref(handle))
        super().__init__(handle)
        info = _c.ModelInfo()
        _c.call("model_get_info", handle, c.byref(info))
        self.n_layers, self.n_heads, self.n_kv_heads = info.n_layers, info.n_heads, info.n_kv_heads
        self.head_dim, self.n_vocab, self.n_ctx_train = info.head_dim, info.n_vocab, info.n_ctx_train
        self.n_parameters, self.weight_bytes = info.n_parameters, info.weight_bytes
        self.bos, self.eos = (None if token < 0 else token for token in (info.bos, info.eos))
        self.fingerprint, self.identity = f"{info.fingerprint:016x}", f"{info.identity:016x}"

    def tokenize(self, text: str, add_special: bool = True, parse_special: bool = False) -> list[int]:
        """The ids of a text; BOS and EOS where the vocabulary wants them."""
        data = text.encode()
        return list(_c.array_of("tokenize", c.c_int32, self._pointer, data, len(data), add_special, parse_special))

    def detokenize(self, tokens: Tokens, skip_special: bool = True) -> str:
        """The text of ids; bytes that are no character become U+FFFD."""
        ids = int32(tokens)
        data = _c.array_of("detokenize", c.c_char, self._pointer, pointer(ids, c.c_int32), ids.size, skip_special)
        return bytes(data).decode("utf-8", "replace")

    def ends_generation(self, token: int) -> bool:
        ends = c.c_bool()
        _c.call("token_ends_generation", self._pointer, _c.whole("token", token, _c.i32), c.byref(ends))
        return ends.value

    def sequence(self, kv: str = "full", ctx: int = 0, protect: Several[tuple[int, int]] = ()) -> "Sequence":
        """A new text through a cache. ctx 0: what the model was trained for. protect: spans [begin, end) that stay."""
        handle = c.c_void_p()
        _c.call("sequence_new", self._pointer, c.byref(_params(kv, ctx, protect)), c.byref(handle))
        return Sequence(self, handle)

    def load(self, path: Union[str, os.PathLike], kv: str = "full", ctx: int = 0) -> "Sequence":
        """A saved text, of the same model, spec and context."""
        handle = c.c_void_p()
        _c.call("sequence_load", self._pointer, c.byref(_params(kv, ctx, ())), _c.encoded(path), c.byref(handle))
        return Sequence(self, handle)

    def plan(self, kv: str, prompt: int, decode: int, ctx: int = 0) -> Plan:
        """The bytes of a sequence that reads `prompt` tokens and writes `decode` more."""
        plan = _c.CPlan()
        _c.call("plan_bytes", self._pointer, c.byref(_params(kv, ctx, ())), _c.whole("prompt", prompt, _c.size_t),
                _c.whole("decode", decode, _c.size_t), c.byref(plan))
        return fields_of(plan, Plan)

    def evaluate_rows(self, texts: Several[Union[str, os.PathLike]], kv: Several[str] = ("full",), ctx: int = 0,
                      windows: int = 0, step: int = 8, prompt: int = 0, divergence: bool = False) -> list[dict]:
        """The rows of `lesskv eval perplexity` (or divergence): a dictionary a cache. Texts are files; windows 0: all.
        step > 0 streams the text so many tokens at a time; step 0 reads `prompt` tokens at once, then one a step."""
        specs, files = _c.strings("kv", kv), _c.strings("texts", texts)
        params = _c.EvalParams(kv_specs=specs, n_kv_specs=len(specs), texts=files, n_texts=len(files), ctx=ctx,
                               max_windows=windows, step=step, prompt=prompt, divergence=divergence)
        return _rows("evaluate", self._pointer, c.byref(params))

    def evaluate(self, *arguments, **options):
        """evaluate_rows as a pandas.DataFrame."""
        import pandas

        return pandas.DataFrame(self.evaluate_rows(*arguments, **options))

    def train_less(self, sidecar: Union[str, os.PathLike], texts: Several[Union[str, os.PathLike]],
                   kv: Several[str] = LESS_SPECS, ctx: int = 0, work: Union[str, os.PathLike, None] = None,
                   resume: bool = False, progress: Callable[[str, float], None] | None = None, **options) -> list[dict]:
        """`lesskv train less`: feature maps for `+less` into a sidecar (NAME.less.gguf beside NAME.gguf is found by itself).
        kv: selectors and budgets to train for. options: sequences, rank, hidden, epochs, batch, learning_rate, seed.
        work: a folder that stays, for resume. progress is called with a phase and the share done; what it raises ends the
        training. Returns a row a layer: mean squared errors of the selector alone and of LESS."""
        specs, files = _c.strings("kv", kv), _c.strings("texts", texts)
        params = _defaults("train_less", options)
        params.kv_specs, params.n_kv_specs, params.texts, params.n_texts = specs, len(specs), files, len(files)
        params.ctx, params.resume = ctx, resume
        params.work_folder = None if work is None else _c.encoded(work)
        return self._train("train_less", params, sidecar, progress)

    def train_budgets(self, sidecar: Union[str, os.PathLike], texts: Several[Union[str, os.PathLike]],
                      progress: Callable[[str, float], None] | None = None, **options) -> list[dict]:
        """`lesskv train budgets`: how many rows each head needs, for `+split`, into a sidecar. options: sequences, tokens,
        seed. Returns a row a ratio with the shares of heads."""
        files = _c.strings("texts", texts)
        params = _defaults("train_budgets", options)
        params.texts, params.n_texts = files, len(files)
        return self._train("train_budgets", params, sidecar, progress)

    def _train(self, name: str, params, sidecar, progress) -> list[dict]:
        raised: list[BaseException] = []

        @_c.OnProgress
        def on_progress(phase, done, _):
            try:
                progress(phase.decode(), done)
            except BaseException as error:
                raised.append(error)
            return not raised

        if progress is not None:
            params.on_progress = on_progress
        try:
            return _rows(name, self._pointer, c.byref(params), _c.encoded(sidecar))
        except _c.Error:
            if raised:
                raise raised[0] from None
            raise


def _rows(name: str, *arguments) -> list[dict]:
    """The rows that a function gives as JSON in its last argument."""
    text = c.c_void_p()
    _c.call(name, *arguments, c.byref(text))
    try:
        return json.loads(c.string_at(text))
    finally:
        _c.lib.lesskv_string_free(text)


def _defaults(name: str, options: dict):
    params = _c.defaults(f"{name}_params")
    plain = [field for field, kind in params._fields_ if kind in (c.c_size_t, c.c_double, c.c_uint64)]
    known = [field for field in plain if field != "size" and not field.startswith("n_")]
    for option, value in options.items():
        if option not in known:
            _c.refuse(f"{name}: expected one of {', '.join(known)}, found {option!r}")
        setattr(params, option, value)
    return params


def _params(kv: str, ctx: int, protect) -> _c.SequenceParams:
    spans = (_c.Span * len(protect))(*[_c.Span(*(_c.whole("protect", at, _c.i32) for at in span)) for span in protect])
    return _c.SequenceParams(kv_spec=_c.encoded(kv), ctx=ctx, protected_spans=spans, n_protected_spans=len(spans))


class Sequence(_c.Handle):
    """One text in progress: its cache and the tokens it has seen. Made by Model.sequence and Model.load."""

    _free = "sequence_free"

    def __init__(self, model: Model, handle: c.c_void_p):
        super().__init__(handle)
        self.model = model
        self.result: Result | None = None  # of the last generation that ended
        self._pending: list[int] = []  # generated, not yet seen: what is read next begins with it
        self._generating = False

    @property
    def _idle(self) -> c.c_void_p:
        """The handle, which a generation's thread has for itself."""
        if self._generating:
            _c.refuse("a generation of this sequence is in progress: read its iterator to the end, or close it")
        return self._pointer

    @property
    def tokens(self) -> list[int]:
        """All tokens seen, in order."""
        return list(_c.array_of("sequence_get_tokens", c.c_int32, self._idle))

    @property
    def stats(self) -> Stats:
        stats = _c.CStats()
        _c.call("sequence_get_stats", self._idle, c.byref(stats))
        return fields_of(stats, Stats)

    def clone(self) -> "Sequence":
        handle = c.c_void_p()
        _c.call("sequence_clone", self._idle, c.byref(handle))
        clone = Sequence(self.model, handle)
        clone._pending = list(self._pending)
        return clone

    def save(self, path: Union[str, os.PathLike]) -> None:
        """Writes the compressed cache with its text; `lesskv run --session` reads it, too."""
        try:
            self._read_pending()
        except _c.Error:
            pass  # a full context has no room for it, nor for any more
        _c.call("sequence_save", self._idle, _c.encoded(path))

    def _read_pending(self) -> None:
        """The last token generated, which no prompt has brought yet."""
        if self._pending:
            _c.call("decode", c.byref(self._idle), c.byref(c.c_int32(*self._pending)), 1, None)
            self._pending = []

    def prefill(self, tokens: Tokens) -> np.ndarray:
        """Reads a prompt or turn; the logits [n_vocab] of what follows."""
        ids, logits = int32(tokens), np.empty(self.model.n_vocab, dtype=np.float32)
        if ids.size:
            ids = int32([*self._pending, *ids])
        _c.call("prefill", self._idle, pointer(ids, c.c_int32), ids.size, pointer(logits, c.c_float))
        self._pending = []
        return logits

    def decode(self, token: int) -> np.ndarray:
        """One more token; the logits [n_vocab] of what follows."""
        self._read_pending()
        logits = np.empty(self.model.n_vocab, dtype=np.float32)
        _c.call("decode", c.byref(self._idle), c.byref(c.c_int32(_c.whole("token", token, _c.i32))), 1, address(logits))
        return logits

    def generate(self, prompt: Union[str, Tokens], max_tokens: int | None = None, temperature: float = 0.8, top_k: int = 40,
                 top_p: float = 0.95, min_p: float = 0.05, repeat_penalty: float = 1.0, repeat_last_n: int = 64, seed: int = 0,
                 stop: Several[str] = (), frequency_penalty: float = 0.0, presence_penalty: float = 0.0,
                 logit_bias: Mapping[int, float] | None = None, ignore_eos: bool = False) -> Iterator[str]:
        """Reads the prompt and yields text as it becomes certain. Ends early when the iterator is closed. Afterwards
        `self.result` says how it ended. A text prompt gets BOS only at the beginning of a sequence. `logit_bias` is
        added to tokens' logits (-inf: never chosen); with `ignore_eos` no token ends the text."""
        stops = _c.strings("stop", stop)
        biases = [_c.TokenBias(_c.whole("logit_bias", token, _c.i32), bias) for token, bias in (logit_bias or {}).items()]
        params = _c.GenerateParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
                                   repeat_penalty=repeat_penalty, repeat_last_n=repeat_last_n, seed=seed,
                                   max_tokens=c.c_size_t(-1).value if max_tokens is None else max_tokens, stops=stops,
                                   n_stops=len(stops), frequency_penalty=frequency_penalty,
                                   presence_penalty=presence_penalty, logit_bias=(_c.TokenBias * len(biases))(*biases),
                                   n_logit_bias=len(biases), ignore_eos=ignore_eos)
        return self._stream(prompt if isinstance(prompt, str) else int32(prompt), params)

    def _stream(self, prompt: Union[str, np.ndarray], params: _c.GenerateParams) -> Iterator[str]:
        # The library calls back from inside one long call, which therefore has a thread of its own.
        if isinstance(prompt, str):
            prompt = self.model.tokenize(prompt, add_special=not self.tokens)
        handle, ids = self._idle, int32([*self._pending, *prompt])
        pieces: queue.SimpleQueue = queue.SimpleQueue()
        unwanted = threading.Event()

        @_c.OnText
        def on_text(text, n_bytes, _):
            pieces.put(c.string_at(text, n_bytes).decode("utf-8", "replace"))
            return not unwanted.is_set()

        result = _c.GenerateResult()

        def run():
            try:
                _c.call("generate", handle, pointer(ids, c.c_int32), ids.size, c.byref(params), c.byref(result))
                pieces.put(None)
            except BaseException as error:
                pieces.put(error)

        params.on_text = on_text
        generation = (threading.Thread(target=run, daemon=True), unwanted)
        self._generating = True
        _generations.add(generation)
        generation[0].start()
        text, piece = "", ""
        try:
            while isinstance(piece := pieces.get(), str):
                text += piece
                yield piece
        finally:
            _end(generation)
            self._generating = False
            while isinstance(piece, str):  # the sequence has seen more than was asked for
                text += piece if isinstance(piece := pieces.get(), str) else ""
            if piece is not None:  # what was refused has changed nothing
                raise piece
            self._pending = [] if result.pending_token < 0 else [result.pending_token]
            self.result = Result(text, result.prompt_tokens, result.generated_tokens, result.prefill_seconds,
                                 result.decode_seconds, FINISHES[result.finish])


_generations: set = set()  # in progress: threads, and what tells them that no more is wanted


def _end(generation) -> None:
    thread, unwanted = generation
    unwanted.set()
    thread.join()
    _generations.discard(generation)


@atexit.register
def _end_generations() -> None:
    """A callback that finds the interpreter gone would end the process."""
    for generation in list(_generations):
        _end(generation)


def decode(sequences: Several[Sequence], tokens: Tokens) -> np.ndarray:
    """One token each for sequences of one model, which share the products of weights: logits [n, n_vocab]."""
    ids = int32(tokens)
    if not sequences or len(sequences) != ids.size:
        _c.refuse(f"{len(sequences)} sequences and {ids.size} tokens: one each is needed")
    handles = (c.c_void_p * len(sequences))(*[s._idle for s in sequences])
    for sequence in sequences:
        sequence._read_pending()
    logits = np.empty((len(sequences), sequences[0].model.n_vocab), dtype=np.float32)
    _c.call("decode", handles, address(ids), ids.size, address(logits))
    return logits
