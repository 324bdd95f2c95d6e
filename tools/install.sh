#!/usr/bin/env bash
# Installs packages as `pip install` does, by uv where it can: that takes a fifth of the time.
#
#   tools/install.sh .venv/bin/python -r requirements.txt -e '.[dev]'
#
# Of pip's own settings (pip.conf, PIP_...) uv is told the folders of wheels. Where they name another index than PyPI,
# and where uv fails, pip installs.
set -euo pipefail
python=$1
shift

# Lines such as global.find-links='/a\n/b', of which the last counts.
settings=$("$python" -m pip config list)
if ! grep -q '[.]index-url=' <<<"$settings"; then
  links=$(sed -n "s/^.*[.]find-links='\(.*\)'$/\1/p" <<<"$settings" | tail -n 1)
  links=${links//\\n/,}
  if "$python" -m pip install --quiet uv && UV_FIND_LINKS=${UV_FIND_LINKS:-${links// /,}} \
    "$python" -m uv pip install --quiet --compile-bytecode --python "$python" "$@"; then
    exit
  fi
  echo "${0##*/}: uv did not do it; pip does" >&2
fi
exec "$python" -m pip install --quiet "$@"
