#!/usr/bin/env bash
# A development stack on this machine, without containers: an S3-compatible server and a Ray head,
# with pictures in a bucket. Ray listens on all interfaces, whatever it is told, so it wants a token.
#   bash infra/dev.sh up | status | down        DEV=/elsewhere S3_PORT=9190 … bash infra/dev.sh up
set -euo pipefail
umask 077
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
cd "$ROOT"
DEV="${DEV:-$ROOT/.dev}"
S3_PORT="${S3_PORT:-9090}"
# One block of ports, so that several clusters can share a machine.
RAY_PORT="${RAY_PORT:-6400}"
# Not under DEV: the path of a Unix socket has 107 bytes at most.
RAY_TMP="${RAY_TMP:-/tmp/ray-dev-$(id -u)}"
DASHBOARD="http://127.0.0.1:$((RAY_PORT + 1))"

alive() { [ -f "$DEV/$1.pid" ] && kill -0 "$(cat "$DEV/$1.pid")" 2>/dev/null; }

# start NAME COMMAND…: runs it in a session of its own, which `stop` ends as a whole.
start() {
  local name=$1
  shift
  setsid nohup "$@" </dev/null >"$DEV/$name.log" 2>&1 &
  echo $! >"$DEV/$name.pid"
}

# wait_for NAME COMMAND…: until COMMAND succeeds; fails with the log when NAME dies or takes long.
wait_for() {
  local name=$1 tries
  shift
  for ((tries = 0; tries < 600; tries++)); do
    "$@" >/dev/null 2>&1 && return
    alive "$name" || break
    sleep 0.2
  done
  tail -n 20 "$DEV/$name.log" >&2
  fail "$name did not start; its log is $DEV/$name.log"
}

stop() {
  alive "$1" || return 0
  local group tries
  group="$(cat "$DEV/$1.pid")"
  kill -TERM -- "-$group"
  for ((tries = 0; tries < 100; tries++)); do
    kill -0 -- "-$group" 2>/dev/null || break
    sleep 0.1
  done
  kill -KILL -- "-$group" 2>/dev/null || true
  rm -f "$DEV/$1.pid"
}

start_s3() {
  alive s3 && return
  say "starting the S3 server (installs itself the first time)"
  rm -f "$DEV/s3.env"
  start s3 python infra/s3_server.py --port "$S3_PORT" --data "$DEV/s3" --bucket dev \
    --env-file "$DEV/s3.env"
  wait_for s3 test -s "$DEV/s3.env"
}

start_ray() {
  alive ray && return
  say "starting Ray"
  start ray ray start --head --block --disable-usage-stats --include-dashboard=true \
    --dashboard-host=127.0.0.1 --temp-dir="$RAY_TMP" \
    --port="$RAY_PORT" --dashboard-port=$((RAY_PORT + 1)) \
    --node-manager-port=$((RAY_PORT + 2)) --object-manager-port=$((RAY_PORT + 3)) \
    --ray-client-server-port=$((RAY_PORT + 4)) --metrics-export-port=$((RAY_PORT + 5)) \
    --dashboard-agent-listen-port=$((RAY_PORT + 6)) --dashboard-agent-grpc-port=$((RAY_PORT + 7)) \
    --runtime-env-agent-port=$((RAY_PORT + 8)) \
    --min-worker-port=$((RAY_PORT + 10)) --max-worker-port=$((RAY_PORT + 99))
  wait_for ray ray job list
}

write_env() {
  [ -s "$DEV/token" ] || python -c 'import secrets; print(secrets.token_hex(16))' >"$DEV/token"
  cat "$DEV/s3.env" - >"$DEV/env" <<ENV
export RAY_API_SERVER_ADDRESS=$DASHBOARD RAY_AUTH_MODE=token RAY_AUTH_TOKEN=$(cat "$DEV/token")
export PATH="$VENV/bin:\$PATH"
ENV
}

# The shipped configuration, with this Ray's list of nodes and the rules where they are.
write_prometheus() {
  local key="$DEV/lookups-key"
  [ -e "$key" ] || echo none >"$key" # lookups on loopback want no key; put one in where they do
  sed -e "s|/tmp/ray/|$RAY_TMP/|" -e "s|\[alerts.yaml\]|[$ROOT/infra/prometheus/alerts.yaml]|" \
    infra/prometheus/prometheus.yaml >"$DEV/prometheus.yaml"
}

fill_bucket() {
  python infra/demo_pictures.py "$DEV/photos" >&2
  python - "$DEV/photos" <<'PY'
import sys
from pathlib import Path
from pipeline.storage import Storage
storage = Storage()
there = {info.uri.rsplit("/", 1)[-1] for info in storage.list_objects("s3://dev/photos")}
for path in sorted(Path(sys.argv[1]).glob("*.tar")):
    if path.name not in there:
        storage.upload(path, f"s3://dev/photos/{path.name}")
PY
}

up() {
  prepare_venv cpu,serve
  mkdir -p "$DEV"
  start_s3
  write_env
  source "$DEV/env"
  start_ray
  write_prometheus
  fill_bucket
  status
  cat <<TEXT

source $DEV/env
ray job submit -- image-nightly --input s3://dev/photos --output s3://dev/embeddings \\
  --index s3://dev/index --model ese_vovnet19b_dw.ra_in1k --weights random:0
prometheus --config.file=$DEV/prometheus.yaml --storage.tsdb.path=$DEV/prometheus
TEXT
}

status() {
  alive s3 && echo "s3    http://127.0.0.1:$S3_PORT, bucket s3://dev" || echo "s3    not running"
  alive ray && echo "ray   $DASHBOARD (jobs and dashboard)" || echo "ray   not running"
}

down() {
  stop ray
  stop s3
  status
}

case "${1:-}" in
  up | status | down) "$1" ;;
  *) fail "usage: bash infra/dev.sh up | status | down" ;;
esac
