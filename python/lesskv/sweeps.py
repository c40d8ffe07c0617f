"""Many caches on many texts with many models, on this process or on a Dask cluster's workers."""
from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pathlib
import threading
from typing import Iterable, Iterator

from . import _c
from .model import Model


@dataclasses.dataclass(frozen=True)
class Task:
    """One cell of a sweep: what is measured, and of what."""

    model: str
    model_bytes: int
    text: str
    text_sha256: str
    kv: str
    ctx: int
    windows: int
    step: int
    prompt: int
    divergence: bool
    version: str

    @property
    def key(self) -> str:
        return json.dumps(dataclasses.asdict(self), sort_keys=True)


_loaded: dict = {}  # the model in use, by (path, threads); one at a time
_loading = threading.Lock()


def _model(path: str, threads: int) -> Model:
    with _loading:
        if (path, threads) not in _loaded:
            _loaded.clear()
            _loaded[path, threads] = Model(path, threads=threads)
        return _loaded[path, threads]


def measure(task: Task, threads: int = 0) -> dict:
    """The row of one task, as Model.evaluate_rows gives it, or its `error`."""
    try:
        return _model(task.model, threads).evaluate_rows([task.text], kv=[task.kv], ctx=task.ctx, windows=task.windows,
                                                         step=task.step, prompt=task.prompt, divergence=task.divergence)[0]
    except _c.Error as error:
        return {"error": str(error)}


def _tasks(models, texts, kv, **options) -> list[Task]:
    sha = {text: hashlib.sha256(pathlib.Path(text).read_bytes()).hexdigest() for text in texts}
    sizes = {model: os.path.getsize(model) for model in models}
    version = _c.version()
    return [Task(os.fspath(model), sizes[model], os.fspath(text), sha[text], spec, version=version, **options)
            for model in models for text in texts for spec in kv]


def _sidecar(model: str) -> str | None:
    """What was trained for a model and lies beside it, by its bytes: rows that it took part in are measured anew with another."""
    path = pathlib.Path(model).with_suffix(".less.gguf")
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else None


class _Results:
    """Finished rows in a file of JSON lines. A last line that a kill cut short is dropped."""

    def __init__(self, path):
        self.path, self.rows, self.sidecars = path, {}, {}
        if path is None or not os.path.exists(path):
            return
        whole = pathlib.Path(path).read_bytes()
        kept = whole[: whole.rfind(b"\n") + 1]
        for number, line in enumerate(kept.splitlines(), 1):
            try:
                entry = json.loads(line)
                self.rows[entry["key"]], self.sidecars[entry["key"]] = entry["row"], entry.get("sidecar")
            except (ValueError, KeyError, TypeError):
                raise _c.Error(f"{path}: line {number} is no row of a sweep", "bad file") from None
        if len(kept) < len(whole):
            os.truncate(path, len(kept))

    def has(self, task: Task, sidecar: str | None) -> bool:
        row = self.rows.get(task.key)
        return row is not None and (not row.get("sidecar_bytes") or self.sidecars[task.key] == sidecar)

    def add(self, task: Task, row: dict, sidecar: str | None):
        self.rows[task.key] = row
        if self.path is None or "error" in row:  # what failed is tried again
            return
        with open(self.path, "ab") as file:
            file.write(json.dumps({"key": task.key, "sidecar": sidecar, "row": row}).encode() + b"\n")


def _here(tasks: list[Task], threads: int) -> Iterator[tuple[Task, dict]]:
    for task in tasks:
        yield task, measure(task, threads)


def _there(tasks: list[Task], threads: int, client) -> Iterator[tuple[Task, dict]]:
    """A worker that dies costs its tasks in work, which others take over."""
    from distributed import Client, as_completed

    own = None if isinstance(client, Client) else Client(client)
    try:
        futures = {(own or client).submit(measure, task, threads, pure=False): task for task in tasks}
        for future in as_completed(list(futures)):
            yield futures[future], future.result()
    finally:
        if own is not None:
            own.close()


def sweep_rows(models: Iterable, texts: Iterable, kv: Iterable[str], *, ctx: int = 0, windows: int = 0, step: int = 8,
               prompt: int = 0, divergence: bool = False, threads: int = 0, results=None, client=None) -> list[dict]:
    """`sweep` as a list of dictionaries."""
    models, texts, kv = _c.several("models", models), _c.several("texts", texts), _c.several("kv", kv)
    tasks = _tasks(models, texts, kv, ctx=ctx, windows=windows, step=step, prompt=prompt, divergence=divergence)
    sidecars = {os.fspath(model): _sidecar(model) for model in models}
    done = _Results(results)
    todo = list({task.key: task for task in tasks if not done.has(task, sidecars[task.model])}.values())
    for task, row in _here(todo, threads) if client is None else _there(todo, threads, client):
        done.add(task, row, sidecars[task.model])
    return [{"model_file": task.model, "text_file": task.text, "kv_spec": task.kv, **done.rows[task.key]} for task in tasks]


def sweep(*arguments, **options):
    """Evaluates each cache spec on each text with each model: a pandas.DataFrame, a row a (model, text, spec).

        frame = lesskv.sweep(["a.gguf"], ["text.txt"], ["full", "h2o(5%)"], ctx=2048, results="sweep.jsonl")

    ctx, windows, step, prompt and divergence are those of `Model.evaluate_rows`, whose columns the rows have beside
    model_file, text_file and kv_spec. What a model refuses is a row with an `error`. results: a file to which each row is
    added when it is done; a sweep that finds it goes on where the last ended. client: a distributed.Client, or the address
    of a Dask scheduler, whose workers see the same files; results are those of one process, and workers may come and go.
    threads: of one model; 0 for all CPUs.
    """
    import pandas

    return pandas.DataFrame(sweep_rows(*arguments, **options))
