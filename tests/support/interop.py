"""Runs interop_peer.py or interop_zoo.py in the environment that has PyTorch."""

import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

PYTHON = Path(os.environ.get("INTEROP_PYTHON", ROOT / ".venv-interop" / "bin" / "python"))


def run_peer(*arguments, script="interop_peer.py", timeout=280):
    command = [PYTHON, ROOT / "tests/support" / script, *arguments]
    env = {**os.environ, "PYTHONPATH": str(ROOT / "benchmarks")}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stderr[-3000:]
