"""The examples run on the bundled model and say what they promise."""
import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]


def run(name, *arguments, cwd):
    return subprocess.run([sys.executable, ROOT / "python/examples" / name, *map(str, arguments)], cwd=cwd, check=True, text=True,
                          capture_output=True, env={**os.environ}).stdout


def test_own_selector(tmp_path):
    out = run("own_selector.py", ROOT / "models/lesskv-small.gguf", ROOT / "docs/sample.txt", "--ctx", 128, "--windows", 1, cwd=tmp_path)
    kl = {line.split()[0]: float(line.split()[2]) for line in out.splitlines()}
    assert kl["full"] == 0 and len(kl) == 5 and len(set(kl.values())) == 5


def test_compare_specs(tmp_path):
    out = run("compare_specs.py", ROOT / "models/lesskv-small.gguf", ROOT / "docs/sample.txt", "full", "h2o(10%)", "full+q4",
              "--ctx", 128, "--windows", 2, cwd=tmp_path)
    lines = out.splitlines()
    assert lines[0].endswith("h2o(10%)") and "KL 0.0000" in lines[2] and lines[2].endswith("full")
    assert (tmp_path / "kl_by_bytes.svg").read_text().count("<circle") == 3


def test_ask_a_document(tmp_path):
    out = run("ask_a_document.py", ROOT / "models/lesskv-small.gguf", ROOT / "docs/sample.txt", "The sea was", "--ctx", 600,
              "--kv", "window(10%)", "--predict", 12, cwd=tmp_path)
    assert out.startswith("read 5") and "60 rows a head" in out and len(out.split("The sea was")[1]) > 10
