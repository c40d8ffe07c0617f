#!/usr/bin/env bash
# python_test.sh PROGRAM: builds the wheel of python/, installs it into a new virtual environment and runs the package's
# tests there. Needs PyPI; without it says so and fails.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/build" && python3 -m venv "$folder/clean"
if ! "$folder/build/bin/pip" install -q build; then
  echo "python-test: the package index cannot be reached, so no wheel was built" >&2
  exit 1
fi
"$folder/build/bin/python" -m build -q --wheel --outdir "$folder" "$root/python"
"$folder/clean/bin/pip" install -q "$(ls "$folder"/lesskv-*.whl)[test]"
cd "$folder" && LESSKV_PROGRAM="$1" "$folder/clean/bin/python" -m pytest -q -p no:cacheprovider "$root/python/tests"
