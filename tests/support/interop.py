"""Runs a script of this folder in the environment that has PyTorch and JAX."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

PYTHON = Path(os.environ.get("INTEROP_PYTHON", ROOT / ".venv-interop" / "bin" / "python"))


NEEDS_PEERS = pytest.mark.skipif(
    not PYTHON.exists(), reason=f"no {PYTHON}: `make test-interop` installs PyTorch and JAX"
)


def run_peer(*arguments, script="interop_peer.py", timeout=280):
    command = [PYTHON, ROOT / "tests/support" / script, *arguments]
    env = {**os.environ, "PYTHONPATH": str(ROOT / "benchmarks")}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stderr[-3000:]
