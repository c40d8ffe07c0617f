"""The C API (include/lesskv/lesskv.h) through ctypes, which releases the GIL in every call."""
import ctypes as c
import operator
import os
import pathlib

size_t, i32, f32p, i32p = c.c_size_t, c.c_int32, c.POINTER(c.c_float), c.POINTER(c.c_int32)


class Error(RuntimeError):
    """What the library refused or failed at, in its own sentence. `status` names the kind: "invalid argument", "bad file"."""

    def __init__(self, sentence: str, status: str):
        super().__init__(sentence)
        self.status = status


def refuse(sentence: str):
    raise Error(sentence, "invalid argument")


LIMITS = {i32: (-(2**31), 2**31 - 1), size_t: (0, 2**64 - 1), c.c_uint64: (0, 2**64 - 1)}


def whole(name: str, value, kind) -> int:
    """A number that fits the C type, which ctypes would cut to it without a word."""
    low, high = LIMITS[kind]
    number = operator.index(value)
    if not low <= number <= high:
        refuse(f"{name}: expected {low} to {high}, found {number}")
    return number


class Structure(c.Structure):
    """One that begins with its size."""

    def __init__(self, **fields):
        super().__init__(size=c.sizeof(self))
        for name, value in fields.items():
            setattr(self, name, value)

    def __setattr__(self, name, value):
        kind = dict(self._fields_)[name]
        super().__setattr__(name, whole(name, value, kind) if kind in LIMITS else value)


class ModelParams(Structure):
    _fields_ = [("size", size_t), ("n_threads", i32), ("compute", c.c_int), ("loading", c.c_int)]


class ModelInfo(Structure):
    _fields_ = [("size", size_t), ("n_layers", size_t), ("n_heads", size_t), ("n_kv_heads", size_t), ("head_dim", size_t),
                ("n_vocab", size_t), ("n_ctx_train", size_t), ("n_parameters", size_t), ("weight_bytes", size_t),
                ("bos", i32), ("eos", i32), ("fingerprint", c.c_uint64), ("identity", c.c_uint64)]


class Span(c.Structure):
    _fields_ = [("begin", i32), ("end", i32)]


class SequenceParams(Structure):
    _fields_ = [("size", size_t), ("kv_spec", c.c_char_p), ("ctx", size_t), ("protected_spans", c.POINTER(Span)),
                ("n_protected_spans", size_t)]


class CStats(Structure):
    _fields_ = [("size", size_t), ("tokens_seen", size_t), ("tokens_resident", c.c_double), ("tokens_dropped", c.c_double),
                ("tokens_absorbed", c.c_double), ("tokens_merged", c.c_double), ("tokens_offloaded", c.c_double),
                ("kv_bytes", size_t), ("kv_bytes_peak", size_t), ("kv_bytes_full", size_t)]


class CPlan(Structure):
    _fields_ = [("size", size_t), ("bytes_peak", size_t), ("bytes_after_prompt", size_t), ("bytes_end", size_t),
                ("bytes_full", size_t), ("rows_end", c.c_double)]


OnText = c.CFUNCTYPE(c.c_bool, c.POINTER(c.c_char), size_t, c.c_void_p)


class TokenBias(c.Structure):
    _fields_ = [("token", i32), ("bias", c.c_float)]


class GenerateParams(Structure):
    _fields_ = [("size", size_t), ("temperature", c.c_float), ("top_k", i32), ("top_p", c.c_float), ("min_p", c.c_float),
                ("repeat_penalty", c.c_float), ("repeat_last_n", i32), ("seed", c.c_uint64), ("max_tokens", size_t),
                ("stops", c.POINTER(c.c_char_p)), ("n_stops", size_t), ("on_text", OnText), ("user_data", c.c_void_p),
                ("frequency_penalty", c.c_float), ("presence_penalty", c.c_float),
                ("logit_bias", c.POINTER(TokenBias)), ("n_logit_bias", size_t), ("ignore_eos", c.c_bool)]


class GenerateResult(Structure):
    _fields_ = [("size", size_t), ("prompt_tokens", size_t), ("generated_tokens", size_t), ("prefill_seconds", c.c_double),
                ("decode_seconds", c.c_double), ("finish", c.c_int), ("pending_token", i32)]


class EvalParams(Structure):
    _fields_ = [("size", size_t), ("kv_specs", c.POINTER(c.c_char_p)), ("n_kv_specs", size_t), ("texts", c.POINTER(c.c_char_p)),
                ("n_texts", size_t), ("ctx", size_t), ("max_windows", size_t), ("step", size_t), ("prompt", size_t),
                ("divergence", c.c_bool)]


class CacheShape(Structure):
    _fields_ = [("size", size_t), ("n_layers", size_t), ("n_heads", size_t), ("n_kv_heads", size_t), ("head_dim", size_t),
                ("ctx", size_t), ("rope_dims", size_t), ("rope_halves", c.c_bool), ("rope_theta", c.c_double),
                ("rope_linear", c.c_double), ("scale", c.c_float), ("rope_factors", f32p), ("rope_magnitude", c.c_double),
                ("windows", c.POINTER(size_t)), ("local_rope_theta", c.c_double)]


class SelectorRows(c.Structure):
    _fields_ = [("size", size_t), ("layer", size_t), ("kv_head", size_t), ("kind", c.c_int), ("tokens_seen", size_t),
                ("n_step", size_t), ("budget", size_t), ("n_rows", size_t), ("positions", c.c_void_p),
                ("attention", c.c_void_p), ("votes", c.c_void_p), ("sentence", c.c_void_p), ("sentence_capacity", size_t)]


Vote = c.CFUNCTYPE(c.c_bool, c.POINTER(SelectorRows), c.c_void_p)


class CSelector(Structure):
    _fields_ = [("size", size_t), ("summary", c.c_char_p), ("keeps_votes", c.c_bool), ("last_queries", size_t), ("vote", Vote),
                ("user_data", c.c_void_p)]


OnProgress = c.CFUNCTYPE(c.c_bool, c.c_char_p, c.c_double, c.c_void_p)


class TrainLessParams(Structure):
    _fields_ = [("size", size_t), ("texts", c.POINTER(c.c_char_p)), ("n_texts", size_t), ("kv_specs", c.POINTER(c.c_char_p)),
                ("n_kv_specs", size_t), ("ctx", size_t), ("sequences", size_t), ("rank", size_t), ("hidden", size_t),
                ("epochs", size_t), ("batch", size_t), ("learning_rate", c.c_double), ("seed", c.c_uint64),
                ("work_folder", c.c_char_p), ("resume", c.c_bool), ("on_progress", OnProgress), ("user_data", c.c_void_p)]


class TrainBudgetsParams(Structure):
    _fields_ = [("size", size_t), ("texts", c.POINTER(c.c_char_p)), ("n_texts", size_t), ("sequences", size_t),
                ("tokens", size_t), ("seed", c.c_uint64), ("on_progress", OnProgress), ("user_data", c.c_void_p)]


OPTIONS = {"model_params": ModelParams, "sequence_params": SequenceParams, "generate_params": GenerateParams,
           "eval_params": EvalParams, "cache_shape": CacheShape, "selector": CSelector, "train_less_params": TrainLessParams,
           "train_budgets_params": TrainBudgetsParams}


def _find() -> str:
    """LESSKV_LIBRARY, else the library inside the package."""
    named = os.environ.get("LESSKV_LIBRARY")
    if named:
        return named
    for path in sorted(pathlib.Path(__file__).parent.glob("liblesskv.so*")):
        return str(path)
    raise ImportError("liblesskv.so is neither beside the package nor named by LESSKV_LIBRARY")


def _declare(lib: c.CDLL) -> c.CDLL:
    handle, out = c.c_void_p, c.POINTER(c.c_void_p)
    size_p, bytes_p = c.POINTER(size_t), c.c_void_p
    functions = {
        "model_load": [c.c_char_p, c.POINTER(ModelParams), out], "model_get_info": [handle, c.POINTER(ModelInfo)],
        "tokenize": [handle, c.c_char_p, size_t, c.c_bool, c.c_bool, i32p, size_t, size_p],
        "detokenize": [handle, i32p, size_t, c.c_bool, c.c_char_p, size_t, size_p],
        "token_ends_generation": [handle, i32, c.POINTER(c.c_bool)],
        "sequence_new": [handle, c.POINTER(SequenceParams), out], "sequence_clone": [handle, out],
        "sequence_get_stats": [handle, c.POINTER(CStats)], "sequence_get_tokens": [handle, i32p, size_t, size_p],
        "prefill": [handle, i32p, size_t, f32p], "decode": [out, bytes_p, size_t, bytes_p],
        "sequence_save": [handle, c.c_char_p], "sequence_load": [handle, c.POINTER(SequenceParams), c.c_char_p, out],
        "plan_bytes": [handle, c.POINTER(SequenceParams), size_t, size_t, c.POINTER(CPlan)],
        "generate": [handle, i32p, size_t, c.POINTER(GenerateParams), c.POINTER(GenerateResult)],
        "evaluate": [handle, c.POINTER(EvalParams), c.POINTER(c.c_void_p)],
        "cache_new": [c.POINTER(CacheShape), c.c_char_p, i32, out], "cache_clone": [handle, out],
        "cache_begin_step": [handle, size_t, c.c_int], "cache_append": [handle, size_t, bytes_p, bytes_p],
        "cache_attend": [handle, size_t, bytes_p, bytes_p], "cache_end_step": [handle], "cache_end_prompt": [handle],
        "cache_get_stats": [handle, c.POINTER(CStats)], "cache_get_positions": [handle, size_t, size_t, i32p, size_t, size_p],
        "cache_save": [handle, bytes_p, size_t, size_p], "cache_load": [handle, bytes_p, size_t],
        "selector_register": [c.c_char_p, c.POINTER(CSelector)],
        "train_less": [handle, c.POINTER(TrainLessParams), c.c_char_p, out],
        "train_budgets": [handle, c.POINTER(TrainBudgetsParams), c.c_char_p, out],
    }
    functions.update({name + "_init": [c.POINTER(kind), size_t] for name, kind in OPTIONS.items()})
    for name, arguments in functions.items():
        function = getattr(lib, "lesskv_" + name)
        function.argtypes, function.restype = arguments, c.c_int
    for name in ("model_free", "sequence_free", "cache_free", "string_free"):
        function = getattr(lib, "lesskv_" + name)
        function.argtypes, function.restype = [handle], None
    for name in ("last_error", "version", "status_name"):
        getattr(lib, "lesskv_" + name).restype = c.c_char_p
    lib.lesskv_status_name.argtypes = [c.c_int]
    return lib


lib = _declare(c.CDLL(_find()))


def version() -> str:
    return lib.lesskv_version().decode()


_functions: dict = {}
interrupts: list = []  # what ended a callback though it is no failure of it, such as KeyboardInterrupt: the call raises it


def call(name: str, *arguments) -> None:
    """Calls lesskv_NAME; a status other than ok is an Error."""
    function = _functions.get(name)
    if function is None:
        function = _functions[name] = getattr(lib, "lesskv_" + name)
    status = function(*arguments)
    if status != 0:
        if interrupts:
            raise interrupts.pop() from None
        raise Error(lib.lesskv_last_error().decode("utf-8", "replace"), lib.lesskv_status_name(status).decode())


def defaults(name: str):
    """A structure of options as the library begins it."""
    options = OPTIONS[name]()
    call(name + "_init", c.byref(options), c.sizeof(options))
    return options


def array_of(name: str, ctype, *arguments):
    """What a function gives that takes room, capacity and count at its end: asked twice, for the count and for the values."""
    n = size_t()
    call(name, *arguments, None, 0, c.byref(n))
    values = (ctype * n.value)()
    call(name, *arguments, values, n.value, c.byref(n))
    return values


def encoded(text) -> bytes:
    """A text or path for C, where it ends at a zero byte."""
    data = os.fsencode(text)
    if b"\0" in data:
        refuse(f"{text!r} has a zero byte in it")
    return data


def several(name: str, values) -> list:
    """A list; a single text, which is a list of letters, too, is a mistake."""
    if isinstance(values, (str, bytes, os.PathLike)):
        refuse(f"{name}: expected a list of them, found {values!r}")
    return list(values)


def strings(name: str, texts):
    texts = several(name, texts)
    return (c.c_char_p * len(texts))(*[encoded(t) for t in texts])


class Handle:
    """Owns a handle of the library and frees it with the object."""

    _free = ""

    def __init__(self, pointer: c.c_void_p):
        self._pointer = pointer

    def __del__(self):
        if getattr(self, "_pointer", None):
            getattr(lib, "lesskv_" + self._free)(self._pointer)
            self._pointer = None
