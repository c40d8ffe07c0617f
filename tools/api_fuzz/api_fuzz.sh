#!/usr/bin/env bash
# api_fuzz.sh URL [options of `schemathesis run`]: requests made of the server's own /openapi.json, and such as break it.
# Fails where an answer has a status, type or form that the file does not describe, where what breaks the file is taken,
# and where the server fails. Before it a server must run, such as
#   LESSKV_API_KEY=fuzz lesskv serve -m tests/data/models/llama-gqa-tied.gguf --chat-template plain --ctx 2048 --max-output 16 --parallel 8
# with the same LESSKV_API_KEY in the environment of this script (without a key the file's word on keys is not kept).
# Brings schemathesis (requirements.txt) from PyPI into build/api-fuzz-env, unless SCHEMATHESIS names the program.
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
url=$1
shift
program=${SCHEMATHESIS:-$root/build/api-fuzz-env/bin/schemathesis}
if [ ! -x "$program" ]; then
  python3 -m venv "$root/build/api-fuzz-env"
  "$root/build/api-fuzz-env/bin/pip" install -q -r "$root/tools/api_fuzz/requirements.txt"
fi
# Left out: that all that fits the file is taken. It cannot say which tokens, policies, models and lengths there are here.
cd "$(mktemp -d)"
exec "$program" run "$url/openapi.json" --checks all --exclude-checks positive_data_acceptance \
  --mode all --continue-on-failure --request-timeout 60 --max-response-time 60 \
  --header "Authorization: Bearer ${LESSKV_API_KEY:-none}" "$@"
