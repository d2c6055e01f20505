#!/usr/bin/env bash
# Checks everything: lint, format, types, tests. Arguments go to pytest: infra/test.sh -k storage
# Without arguments the quick tests run; in CI (CI=true) the slow ones as well, which kill processes,
# start clusters and break the object store.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
cd "$ROOT"

# The page is tested in a real browser; without one those tests skip and say so.
install_browser() {
  command -v chromium >/dev/null || command -v google-chrome >/dev/null && return
  [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null || return 0
  say "installing chromium for the tests of the page"
  export DEBIAN_FRONTEND=noninteractive
  { apt-get update -qq && apt-get install -qq -y --no-install-recommends chromium; } \
    </dev/null >/dev/null 2>&1 || say "that failed; those tests will skip"
}

# The alerts are tested in a real Prometheus. Only its programs: the package would start a server.
install_prometheus() {
  command -v promtool >/dev/null && command -v prometheus >/dev/null && return
  command -v apt-get >/dev/null || return 0
  say "fetching prometheus for the tests of the alerts"
  local folder
  folder="$(mktemp -d)"
  [ "$(id -u)" != 0 ] || apt-get update -qq </dev/null >/dev/null 2>&1 || true
  { (cd "$folder" && apt-get download -qq prometheus && dpkg-deb -x prometheus_*.deb .) \
    && cp "$folder"/usr/bin/prom* "$VENV/bin/"; } </dev/null >/dev/null 2>&1 \
    || say "that failed; those tests will skip"
  rm -rf "$folder"
}

install_browser
prepare_venv test
install_prometheus
say "ruff"
ruff check --quiet .
ruff format --check --quiet .
say "mypy"
mypy
# Tests that race real servers and kill real processes depend on the machine's mood: what fails is
# tried once more by itself, and failing twice is a failure.
run_tests() {
  pytest --durations=15 "$@" && return
  say "trying again what failed, one after the other"
  pytest "$@" --numprocesses 0 --last-failed --last-failed-no-failures=none
}

say "pytest"
if [ $# -gt 0 ]; then
  exec pytest --durations=15 "$@"
fi
# Two at a time; tests that share a Ray or a server share a process (tests/conftest.py). A test that
# hangs beyond pytest-timeout's reach ends its process after eleven minutes, with everyone's stack.
run_tests -m "not slow" --numprocesses 2 --dist loadgroup \
  -o faulthandler_timeout=660 -o faulthandler_exit_on_timeout=true
if [ "${CI:-}" = true ]; then
  say "pytest, the slow ones"
  run_tests -m slow
fi
