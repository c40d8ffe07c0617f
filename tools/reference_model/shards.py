#!/usr/bin/env python3
"""Cuts a file into parts of at most 16 MiB with a checksum list, and joins them again.

  shards.py split FILE DIR        shards.py join DIR FILE
"""
import hashlib
import json
import sys
from pathlib import Path

PART_BYTES = 16 << 20


def split(src: Path, folder: Path, part_bytes: int = PART_BYTES) -> None:
  folder.mkdir(parents=True, exist_ok=True)
  parts = []
  with open(src, "rb") as f:
    while blob := f.read(part_bytes):
      parts.append({"name": f"part.{len(parts):03d}", "bytes": len(blob), "sha256": hashlib.sha256(blob).hexdigest()})
      (folder / parts[-1]["name"]).write_bytes(blob)
  (folder / "parts.json").write_text(json.dumps(parts, indent=1) + "\n")


def join(folder: Path, dst: Path) -> None:
  with open(dst, "wb") as f:
    for part in json.loads((folder / "parts.json").read_text()):
      blob = (folder / part["name"]).read_bytes()
      if hashlib.sha256(blob).hexdigest() != part["sha256"]:
        raise SystemExit(f"{folder / part['name']}: expected sha256 {part['sha256']}, found another")
      f.write(blob)


if __name__ == "__main__":
  if len(sys.argv) != 4 or sys.argv[1] not in ("split", "join"):
    raise SystemExit(__doc__)
  (split if sys.argv[1] == "split" else join)(Path(sys.argv[2]), Path(sys.argv[3]))
