#!/usr/bin/env bash
# Installs packages as `pip install` does, by uv where it can: that takes a fifth of the time.
#
#   tools/install.sh .venv/bin/python -r requirements.txt -e '.[dev]'
#
# uv is told what pip's settings (pip.conf, PIP_...) say of indexes, folders of wheels and constraints. Where they forbid
# indexes, and where uv fails, pip installs.
set -euo pipefail
python=$1
shift

# Lines such as global.find-links='/a\n/b'. Of equal names the last counts: variables come behind files.
lines=$("$python" -m pip config list)
lines=$(grep -v '^:env:' <<<"$lines" || true; grep '^:env:' <<<"$lines" || true)

# setting NAME: its value, with spaces between several
setting() {
  sed -n "s/^[^=]*[.]$1='\(.*\)'$/\1/p" <<<"$lines" | tail -n 1 | sed 's/\\n/ /g'
}

# tell VARIABLE VALUE: for uv, unless the user has set it or there is nothing to tell
tell() {
  if [[ -n $2 && -z ${!1:-} ]]; then
    export "$1=$2"
  fi
}

if [[ -z $(setting no-index) ]]; then
  tell UV_DEFAULT_INDEX "$(setting index-url)"
  tell UV_INDEX "$(setting extra-index-url)"
  tell UV_INDEX_STRATEGY unsafe-best-match # as pip: the newest release of all indexes
  tell UV_FIND_LINKS "$(setting find-links | tr ' ' ',')"
  tell UV_CONSTRAINT "$(setting constraint)"
  if "$python" -m pip install --quiet uv &&
    "$python" -m uv pip install --quiet --compile-bytecode --python "$python" "$@"; then
    exit
  fi
  echo "${0##*/}: uv did not do it; pip does" >&2
fi
exec "$python" -m pip install --quiet "$@"
