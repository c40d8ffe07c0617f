"""Training from Python, and sweeps: on one process, continued, and on Dask workers of which one is killed."""
import os
import pathlib
import shutil
import signal

import pytest

import lesskv

ROOT = pathlib.Path(__file__).resolve().parents[2]
MODEL, TEXT = ROOT / "models/lesskv-small.gguf", ROOT / "docs/sample.txt"
SPECS = ["full", "window(16)", "h2o(16)", "tova(16)+q8"]


def sweep(**options):
    return lesskv.sweep_rows([MODEL], [TEXT], SPECS, ctx=128, windows=1, divergence=True, threads=1, **options)


def numbers(rows):
    """What does not depend on when it was measured."""
    return [{name: row[name] for name in ("kv_spec", "kl_mean", "kv_bytes", "model_file", "text_file")} for row in rows]


@pytest.fixture(scope="module")
def expected():
    return numbers(sweep())


def test_training_writes_sidecars_that_specs_find(tmp_path):
    path = shutil.copy(MODEL, tmp_path / "m.gguf")
    model, sidecar, phases = lesskv.Model(path, threads=2), tmp_path / "m.less.gguf", []
    shutil.copy(MODEL.with_suffix(".less.gguf"), sidecar)
    budgets = model.train_budgets(sidecar, [TEXT], sequences=2, tokens=64, seed=3)
    shares = budgets[2]["shares"]  # of the rows of each head, the ratio in the mean
    assert len(budgets) > 3 and sum(shares) / len(shares) == pytest.approx(budgets[2]["ratio"], abs=1e-3)
    rows = model.train_less(sidecar, [TEXT], kv=["h2o(10%)"], ctx=64, sequences=4, epochs=2, hidden=16, rank=4,
                            progress=lambda phase, done: phases.append((phase, done)))
    assert len(rows) == model.n_layers and all(row["less"] > 0 and row["selector"] > 0 for row in rows)
    assert {phase for phase, _ in phases} == {"capture", "train"} and phases[-1][1] == pytest.approx(1)
    assert not (tmp_path / "m.less.gguf.work").exists()
    for spec in ("h2o(10%)+less", "h2o(10%)+split", "full+balanced"):  # budgets and matrices are still there
        model.sequence(kv=spec, ctx=128).prefill(model.tokenize("The sea was calm."))


def test_parts_trained_meanwhile_are_kept(tmp_path):
    """A sidecar is what it is when a training ends, not what it was when that began hours before."""
    path, sidecar = shutil.copy(MODEL, tmp_path / "m.gguf"), tmp_path / "m.less.gguf"
    model, other, less = lesskv.Model(path, threads=1), lesskv.Model(path, threads=1), dict(
        kv=["h2o(10%)"], ctx=64, sequences=2, epochs=1, hidden=8, rank=2)
    model.train_less(sidecar, [TEXT], **less,
                     progress=lambda phase, done: sidecar.exists() or other.train_budgets(sidecar, [TEXT], sequences=1, tokens=32))
    for spec in ("h2o(10%)+less", "h2o(10%)+split"):
        model.sequence(kv=spec, ctx=128)
    sidecar.unlink()
    model.train_budgets(sidecar, [TEXT], sequences=1, tokens=32,
                        progress=lambda phase, done: sidecar.exists() or other.train_less(sidecar, [TEXT], **less))
    for spec in ("h2o(10%)+less", "h2o(10%)+split"):
        model.sequence(kv=spec, ctx=128)
    with pytest.raises(lesskv.Error, match="a callback cannot compute"):
        model.train_budgets(sidecar, [TEXT], sequences=1, tokens=32, progress=lambda *_: model.sequence().prefill([1]))


def test_training_refuses_and_stops(tmp_path):
    model = lesskv.Model(MODEL, threads=2)
    with pytest.raises(lesskv.Error, match="found 'ranks'"):
        model.train_less(tmp_path / "s.gguf", [TEXT], ranks=3)
    with pytest.raises(lesskv.Error, match="rank must lie"):
        model.train_less(tmp_path / "s.gguf", [TEXT], ctx=64, sequences=2, rank=0)
    with pytest.raises(lesskv.Error, match="sequences: expected at most"):
        model.train_budgets(tmp_path / "s.gguf", [TEXT], sequences=10**9)

    def stop(phase, done):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        model.train_budgets(tmp_path / "s.gguf", [TEXT], sequences=3, tokens=32, progress=stop)
    assert not (tmp_path / "s.gguf").exists()


def test_a_sweep_is_the_evaluations(expected):
    model = lesskv.Model(MODEL, threads=1)
    rows = model.evaluate_rows([TEXT], kv=SPECS, ctx=128, windows=1, divergence=True)
    assert [row["kl_mean"] for row in expected] == [row["kl_mean"] for row in rows]
    assert expected[0]["kl_mean"] == 0 < expected[1]["kl_mean"]
    pandas = pytest.importorskip("pandas")
    frame = lesskv.sweep([MODEL], [TEXT], ["full", "no_such(3)"], ctx=128, windows=1)
    assert isinstance(frame, pandas.DataFrame) and "no_such" in frame.error[1] and frame.perplexity[0] > 1


def test_a_sweep_goes_on_where_it_ended(tmp_path, expected, monkeypatch):
    results = tmp_path / "sweep.jsonl"
    assert numbers(sweep(results=results)) == expected
    lines = results.read_bytes().splitlines(keepends=True)
    results.write_bytes(b"".join(lines[:2]) + lines[2][:40])  # killed while it wrote the third
    measured = []
    measure = lesskv.sweeps.measure
    monkeypatch.setattr(lesskv.sweeps, "measure", lambda task, threads: measured.append(task.kv) or measure(task, threads))
    assert numbers(sweep(results=results)) == expected and measured == SPECS[2:]
    assert numbers(sweep(results=results)) == expected and measured == SPECS[2:], "nothing is left to do"
    results.write_text("not a row\n")
    with pytest.raises(lesskv.Error, match="line 1 is no row"):
        sweep(results=results)


def test_a_sweep_measures_anew_what_another_sidecar_takes_part_in(tmp_path, monkeypatch):
    model, sidecar, results = tmp_path / "m.gguf", tmp_path / "m.less.gguf", tmp_path / "sweep.jsonl"
    shutil.copy(MODEL, model)
    shutil.copy(MODEL.with_suffix(".less.gguf"), sidecar)
    specs, measured = ["window(16)", "h2o(16)+less"], []
    measure = lesskv.sweeps.measure
    monkeypatch.setattr(lesskv.sweeps, "measure", lambda task, threads: measured.append(task.kv) or measure(task, threads))

    def sweep():
        measured.clear()
        rows = lesskv.sweep_rows([model], [TEXT], specs, ctx=128, windows=1, threads=1, results=results)
        assert all("error" not in row for row in rows), rows
        return list(measured)

    assert sweep() == specs and sweep() == []
    lesskv.Model(model, threads=1).train_less(sidecar, [TEXT], kv=["h2o(16)"], ctx=64, sequences=2, epochs=1, hidden=8, rank=2)
    assert sweep() == ["h2o(16)+less"] and sweep() == []


def test_workers_give_the_same_rows_though_one_is_killed(tmp_path, expected):
    distributed = pytest.importorskip("distributed")
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None) as cluster:
        with distributed.Client(cluster) as client:
            victims = sorted(client.run(os.getpid).values())
            killed = []

            class Killing(lesskv.sweeps._Results):
                def add(self, task, row, sidecar):
                    super().add(task, row, sidecar)
                    if not killed:
                        killed.append(os.kill(victims[0], signal.SIGKILL))

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(lesskv.sweeps, "_Results", Killing)
                rows = sweep(client=client, results=tmp_path / "sweep.jsonl")
            assert killed and victims[0] not in client.run(os.getpid).values()
            assert numbers(rows) == expected
            assert numbers(sweep(client=cluster.scheduler_address, results=tmp_path / "sweep.jsonl")) == expected
