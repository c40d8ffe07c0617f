#!/bin/sh
# symbols.sh LIBRARY: its dynamic symbols are those of symbols.txt, all of version LESSKV_1.
set -eu
here=$(dirname "$0")
nm -D --defined-only --with-symbol-versions "$1" | awk '$2 == "T" { print $3 }' | sort >"${TMPDIR:-/tmp}/lesskv_symbols.$$"
trap 'rm -f "${TMPDIR:-/tmp}/lesskv_symbols.$$"' EXIT
diff "$here/symbols.txt" "${TMPDIR:-/tmp}/lesskv_symbols.$$"
