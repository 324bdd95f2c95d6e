"""tools/install.sh with a Python that only says what it is asked for."""

import subprocess
from pathlib import Path

import pytest

INSTALL = Path(__file__).resolve().parents[2] / "tools" / "install.sh"

PYTHON = """#!/usr/bin/env bash
case "$*" in
  "-m pip config list") printf '%s\\n' {settings} ;;
  *) echo "$*, links ${{UV_FIND_LINKS-}}" ;;
esac
[[ "$*" != "-m {fails} "* ]]
"""
UV = "-m uv pip install --quiet --compile-bytecode --python {python} -e .[dev], links {links}"
PIP = "-m pip install --quiet -e .[dev], links "
GET_UV = "-m pip install --quiet uv, links "


@pytest.mark.spawns
@pytest.mark.parametrize(
    ("settings", "fails", "expected"),
    [
        ("", "nothing", [GET_UV, UV.format(python="{python}", links="")]),
        (
            r"""":env:.find-links='/a'" "global.find-links='/b\n/c /d'" """,
            "nothing",
            [GET_UV, UV.format(python="{python}", links="/b,/c,/d")],
        ),
        (
            "\"global.extra-index-url='x'\"",
            "uv pip",
            [GET_UV, UV.format(python="{python}", links=""), PIP],
        ),
        ("\"global.index-url='https://mirror'\"", "nothing", [PIP]),
    ],
)
def test_uv_installs_where_it_can_and_pip_elsewhere(tmp_path, settings, fails, expected):
    python = tmp_path / "python"
    python.write_text(PYTHON.format(settings=settings, fails=fails))
    python.chmod(0o755)
    command = [INSTALL, python, "-e", ".[dev]"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [line.format(python=python) for line in expected]
    assert ("pip does" in done.stderr) == (len(expected) == 3)
