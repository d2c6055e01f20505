# Sourced by the scripts beside it: finds a Python and keeps .venv in step with pyproject.toml.

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
VENV="${VENV:-$ROOT/.venv}"
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore

say() { if [ -t 2 ]; then printf '\033[1m%s\033[0m\n' "$*"; else printf '%s\n' "$*"; fi >&2; }
fail() { printf 'error: %s\n' "$*" >&2; exit 1; }

# Prints the first interpreter that fits; `ensurepip` is missing where Debian split venv off.
find_python() {
  local candidate probe
  probe='import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))'
  for candidate in ${PYTHON:-python3 python3.12 python3.13 python3.11}; do
    if "$candidate" -c "$probe" >/dev/null 2>&1; then
      command -v "$candidate"
      return
    fi
  done
  fail "no Python 3.11 to 3.13 with venv and pip found among: ${PYTHON:-python3, python3.12," \
    "python3.13, python3.11}; install one (Debian: apt install python3-venv) or set PYTHON=/path"
}

# prepare_venv EXTRAS: installs the project with these extras unless that has been done already;
# `test` brings the others along.
prepare_venv() {
  local extras stamp wanted python
  wanted="$(cksum <"$ROOT/pyproject.toml") $ROOT"
  export PATH="$VENV/bin:$PATH"
  for extras in "$1" test; do
    [ "$(cat "$VENV/.installed-$extras" 2>/dev/null)" != "$wanted" ] || return 0
  done
  if [ ! -x "$VENV/bin/python" ]; then
    python="$(find_python)" || exit 1
    say "making ${VENV/#$ROOT\//} with $("$python" --version)"
    "$python" -m venv "$VENV"
  fi
  say "installing the project with [$1] (PyTorch alone is some 5 GB the first time)"
  "$VENV/bin/python" -m pip install -qq --editable "$ROOT[$1]"
  printf '%s\n' "$wanted" >"$VENV/.installed-$1"
}
