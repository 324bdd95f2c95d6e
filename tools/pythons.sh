#!/usr/bin/env bash
# Finds Pythons of this machine: prints VERSION=INTERPRETER, a line each, for those of the given versions that are here.
#
#   tools/pythons.sh 3.11 3.12 3.13
#
# Looks on PATH first, then in the folders of pyenv and uv, whose interpreters need not be on PATH (or are there as
# shims that only say so). One that cannot make virtual environments, as Debian's without python3-venv, is passed over.
# Exits with 1 if none is found.
set -euo pipefail

# candidates VERSION: where its interpreter may be, the likeliest first; patterns without a match stay as they are.
candidates() {
  command -v "python$1" || true
  printf '%s\n' "${PYENV_ROOT:-$HOME/.pyenv}/versions/$1".*/bin/python
  printf '%s\n' "${UV_PYTHON_INSTALL_DIR:-$HOME/.local/share/uv/python}/cpython-$1".*/bin/"python$1"
}

# works INTERPRETER VERSION
works() {
  "$1" -c "import ensurepip, sys, venv; sys.exit('%d.%d' % sys.version_info[:2] != '$2')" >/dev/null 2>&1
}

found=
for version; do
  while read -r python; do
    if [[ -x $python ]] && works "$python" "$version"; then
      echo "$version=$python"
      found=1
      break
    fi
  done < <(candidates "$version")
done
[[ $found ]] || { echo "${0##*/}: none of Python $* is on this machine" >&2 && exit 1; }
