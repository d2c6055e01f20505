#!/usr/bin/env bash
# Writes infra/constraints.txt: the exact versions that the image installs. Run it to take new ones
# in, then run the tests with them.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
cd "$ROOT"
resolve() {
  "$VENV/bin/python" -m pip install -qq --dry-run --ignore-installed --report - "$1" 2>/dev/null |
    "$VENV/bin/python" -c 'import json, sys
for item in json.load(sys.stdin)["install"]:
    meta = item["metadata"]
    if meta["name"] != "image-embedding-pipeline":
        print(meta["name"].lower() + "==" + meta["version"])'
}
prepare_venv cpu,serve
{ resolve ".[cpu,openvino,serve]" && resolve ".[gpu,gpu-decode,serve]"; } | sort -u >infra/constraints.txt
say "infra/constraints.txt: $(wc -l <infra/constraints.txt) packages"
