#!/usr/bin/env bash
# Runs the bundled model on the bundled text, first with the full cache and then with a small one.
#   tools/demo.sh PROGRAM
set -euo pipefail
program=$1
cd "$(dirname "$0")/.."

small='h2o(5%)'
[ -e models/lesskv-small.less.gguf ] && small='h2o(5%)+less'

for spec in full "$small"; do
  echo
  echo "lesskv run -m models/lesskv-small.gguf -f docs/sample.txt -n 80 --seed 1 --kv '$spec'"
  echo
  "$program" run -m models/lesskv-small.gguf -f docs/sample.txt -n 80 --seed 1 --kv "$spec"
done
