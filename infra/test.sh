#!/usr/bin/env bash
# Checks everything: lint, format, types, tests. Arguments go to pytest: infra/test.sh -k storage
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
cd "$ROOT"

# Some tests need programs that pip does not bring; without them they skip and say why.
install_system_packages() {
  local missing=()
  command -v chromium >/dev/null || command -v google-chrome >/dev/null || missing+=(chromium)
  ldconfig -p 2>/dev/null | grep -q liberasurecode || missing+=(liberasurecode1)
  [ ${#missing[@]} -gt 0 ] && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null || return 0
  say "installing ${missing[*]} for the browser and S3 tests"
  export DEBIAN_FRONTEND=noninteractive
  { apt-get update -qq && apt-get install -qq -y --no-install-recommends "${missing[@]}"; } \
    </dev/null >/dev/null 2>&1 || say "could not; the tests that need them will skip"
}

install_system_packages
prepare_venv test
say "ruff"
ruff check --quiet .
ruff format --check --quiet .
say "mypy"
mypy
say "pytest"
exec pytest --durations=15 "$@"
