#!/usr/bin/env bash
# Checks everything: lint, format, types, tests. Arguments go to pytest: infra/test.sh -k storage
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

install_browser
prepare_venv test
say "ruff"
ruff check --quiet .
ruff format --check --quiet .
say "mypy"
mypy
say "pytest"
exec pytest --durations=15 "$@"
