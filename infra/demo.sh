#!/usr/bin/env bash
# Shows the whole thing on this machine: draws pictures, embeds, indexes, looks up neighbours.
#   bash infra/demo.sh                                   MODEL=resnetv2_50.a1h_in1k bash infra/demo.sh
# Everything it makes lies in .venv and demo/; delete them to start afresh.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
cd "$ROOT"
MODEL="${MODEL:-ese_vovnet19b_dw.ra_in1k}"
export RAY_DISABLE_IMPORT_WARNING=1 TOKENIZERS_PARALLELISM=false

# Prints pretrained if the weights are cached or the hub answers within five seconds.
choose_weights() {
  python - "$MODEL" <<'PY'
import os, sys, threading, urllib.request
from huggingface_hub import constants, try_to_load_from_cache
repository = f"timm/{sys.argv[1]}"
def ask_hub():
    try:
        urllib.request.urlopen(f"{constants.ENDPOINT}/api/models/{repository}", timeout=5).close()
        answered.set()
    except OSError:
        pass
answered = threading.Event()
if isinstance(try_to_load_from_cache(repository, "model.safetensors"), str):
    answered.set()
elif not constants.HF_HUB_OFFLINE:
    asking = threading.Thread(target=ask_hub, daemon=True)
    asking.start()
    asking.join(timeout=5)  # a slow name server is not bounded by urlopen's time-out
print("pretrained" if answered.is_set() else "random:0", flush=True)
os._exit(0)
PY
}

prepare_venv cpu
python infra/demo_pictures.py demo/shards >&2
WEIGHTS="${WEIGHTS:-$(choose_weights)}"
[ "$WEIGHTS" != random:0 ] ||
  say "the weights hub is out of reach: using random:0, so neighbours share looks, not meaning"
OUT="demo/$MODEL/${WEIGHTS//[:\/]/-}"
mkdir -p "$OUT"

say "embedding demo/shards with $MODEL"
python jobs/embed.py --input demo/shards --output "$OUT/embeddings" --model "$MODEL" \
  --weights "$WEIGHTS" --carry cls >"$OUT/embed.json"
python - "$OUT/embed.json" <<'PY' >&2
import json, sys
report = json.load(open(sys.argv[1]))
rows = ", ".join(f"{number} {status}" for status, number in report["rows"].items())
print(f"rows: {rows}; embedded now: {report['images']['embedded']}, {report['seconds']:.0f} s")
PY
say "indexing"
python jobs/index.py --embeddings "$OUT/embeddings" --index "$OUT/index" >"$OUT/index.json"
KEY="${KEY:-pictures-00000.tar/zebra-000.jpg}"
python jobs/search.py --index "$OUT/index" --key "$KEY" -k 8 --html "$OUT/neighbours.html"
say "open $OUT/neighbours.html to see them; another: KEY=pictures-00000.tar/sea-000.jpg bash infra/demo.sh"
