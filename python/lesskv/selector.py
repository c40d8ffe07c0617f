"""Selectors of your own: a Python function votes on the rows of a head, and the cache keeps those with the most votes."""
from __future__ import annotations

import ctypes as c
import dataclasses
from typing import Callable

import numpy as np

from . import _c

_KINDS = ("prompt", "stream", "decode")
_ALL = c.c_size_t(-1).value
_registered: list = []  # what the library calls must outlive every cache


@dataclasses.dataclass
class Rows:
    """One KV head of a layer after a step's attention and before rows leave. Arrays are copies, which may be kept."""

    layer: int  # among the global ones
    kv_head: int
    kind: str  # of the step: prompt, stream, decode
    tokens_seen: int  # this step included: positions are below it
    n_step: int  # tokens of this step, the last rows
    budget: int  # rows that may stay
    positions: np.ndarray  # [n] int32, not in order after the first eviction
    attention: np.ndarray | None  # [n] probabilities, summed over the observed queries and the group's query heads
    votes: np.ndarray  # [n] float32, to be written


def _view(address, n: int, ctype, dtype):
    return np.frombuffer((ctype * n).from_address(address), dtype=dtype)


def _rows_of(given) -> Rows:
    n = given.n_rows
    attention = _view(given.attention, n, c.c_float, np.float32) if given.attention else None
    return Rows(given.layer, given.kv_head, _KINDS[given.kind], given.tokens_seen, given.n_step, given.budget,
                _view(given.positions, n, c.c_int32, np.int32).copy(), None if attention is None else attention.copy(),
                _view(given.votes, n, c.c_float, np.float32).copy())


def _callback(vote: Callable) -> _c.Vote:
    @_c.Vote
    def call(given, _):
        given = given.contents
        try:
            rows = _rows_of(given)
            votes = vote(rows)
            if votes is None:
                votes = rows.votes
            if np.shape(votes) != (given.n_rows,):
                raise ValueError(f"expected {given.n_rows} votes, found shape {np.shape(votes)}")
            _view(given.votes, given.n_rows, c.c_float, np.float32)[:] = votes
            return True
        except BaseException as error:  # nothing may pass through the library; its own failure says this one's sentence
            if not isinstance(error, Exception):
                _c.interrupts[:] = [error]
            sentence = f"{type(error).__name__}: {error}".encode()[: given.sentence_capacity - 1] + b"\0"
            c.memmove(given.sentence, sentence, len(sentence))
            return False

    return call


def register_selector(name: str, vote: Callable | None = None, *, keeps_votes: bool = False, queries: int | None = None,
                      summary: str = ""):
    """Makes `NAME(rows, recent=4)` a term of cache specs. Also a decorator:

        @lesskv.register_selector("sinks_and_luck")
        def vote(rows):                       # a lesskv.Rows
            luck = np.random.default_rng(rows.layer).random(rows.tokens_seen)
            return np.where(rows.positions < 4, 2, luck[rows.positions])

    The `rows` rows with the most votes stay, and always the `recent` newest. vote returns [n] votes or writes rows.votes (a
    keep set is votes of 1 and 0). keeps_votes: votes of rows that stay come back in the next step, 0 for new ones; else all
    begin at 0. queries: how many of a step's last queries rows.attention is about; None: all, 0: none, which costs
    nothing. It is called once a step for each head, one call at a time (the GIL), from any thread. What it raises becomes the
    `lesskv.Error` of the call in progress; that sequence or cache is then lost. A name may be registered again, for caches made later.
    """
    if vote is None:
        return lambda function: register_selector(name, function, keeps_votes=keeps_votes, queries=queries, summary=summary)
    call, about = _callback(vote), _c.encoded(summary)
    selector = _c.CSelector(summary=about, keeps_votes=keeps_votes, last_queries=_ALL if queries is None else queries, vote=call)
    _c.call("selector_register", _c.encoded(name), c.byref(selector))
    _registered.append((call, about))
    return vote
