"""tools/install.sh with a Python that only says what it is asked for."""

import os
import subprocess
from pathlib import Path

import pytest

INSTALL = Path(__file__).resolve().parents[2] / "tools" / "install.sh"
PYTHON = """#!/usr/bin/env bash
case "$*" in
  "-m pip config list") cat <<'END'
{settings}
END
  ;;
  "-m uv "*) echo "$*"; env | grep ^UV_ | sort ;;
  *) echo "$*" ;;
esac
[[ "$*" != "-m {fails} "* ]]
"""
UV = ["-m pip install --quiet uv", "-m uv pip install --quiet --compile-bytecode --python PYTHON ."]
PIP = ["-m pip install --quiet ."]
BEST = "UV_INDEX_STRATEGY=unsafe-best-match"
ALL = r"""
:env:.find-links='/a\n/b /c'
global.constraint='/etc/constraints.txt'
global.extra-index-url='file:///one https://two'
global.find-links='/d'
global.index-url='https://mirror'
"""
TOLD = [
    "UV_CONSTRAINT=/etc/constraints.txt",
    "UV_DEFAULT_INDEX=https://mirror",
    "UV_FIND_LINKS=/a,/b,/c",
    "UV_INDEX=file:///one https://two",
    BEST,
]


@pytest.mark.spawns
@pytest.mark.parametrize(
    ("settings", "fails", "expected"),
    [
        ("", "nothing", [*UV, BEST]),
        (ALL, "nothing", [*UV, *TOLD]),
        (ALL, "uv pip", [*UV, *TOLD, *PIP]),
        ("global.no-index='true'", "nothing", PIP),
    ],
)
def test_uv_installs_where_it_can_and_pip_elsewhere(tmp_path, settings, fails, expected):
    python = tmp_path / "python"
    python.write_text(PYTHON.format(settings=settings.strip(), fails=fails))
    python.chmod(0o755)
    env = {key: value for key, value in os.environ.items() if not key.startswith("UV_")}
    command = [INSTALL, python, "."]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
    assert done.stdout.splitlines() == [line.replace("PYTHON", str(python)) for line in expected]
    assert ("pip does" in done.stderr) == (fails != "nothing")
