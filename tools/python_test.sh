#!/usr/bin/env bash
# python_test.sh BUILD: packs the wheel of python/ around the library that BUILD has, installs it into a new virtual
# environment and runs the package's tests there. Needs PyPI; without it says so and skips.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
pip=("$folder/env/bin/pip" --disable-pip-version-check)
if ! "${pip[@]}" download -q --no-deps -d "$folder" --retries 1 --timeout 20 scikit-build-core; then
  echo "python-test: SKIPPED: the package index cannot be reached, so no wheel was built"
  exit 0
fi
LESSKV_LIBRARY="$1/src/capi/liblesskv.so" "${pip[@]}" wheel -q --no-deps -w "$folder" "$root/python"
"${pip[@]}" install -q "$(ls "$folder"/lesskv-*.whl)[test]"
cd "$folder" # where no lesskv but the installed one is found
LESSKV_PROGRAM="$1/apps/lesskv/lesskv" "$folder/env/bin/python" -m pytest -q -rs -p no:cacheprovider "$root/python/tests"
